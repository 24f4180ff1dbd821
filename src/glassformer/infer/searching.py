"""The search of one call of ``generate``: its options read and checked, and what it finds handed back as rows.

num_beams, length_penalty, … ─► Searching ─► BeamRun(session) ─► per prompt the n best paths ─► _Row.take, token by token ─► Generated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glassformer.core.cache import Cache
from glassformer.core.errors import SamplerError

from .named import eos_ids
from .search import BeamRun, BeamSearch, BeamTree, Endings, Phrases, read_phrases, read_search
from .search.settings import NAMES
from .session import Session

NOT_WITH_BEAMS = {
    "trace": "a trace says how single tokens were drawn; for a search there is beam_tree=True",
    "draft": "guessed tokens are checked for one text at a time",
    "prompt_lookup_num_tokens": "guessed tokens are checked for one text at a time",
    "penalty_alpha": "contrastive search is another search",
}
NO_STREAM = "A search knows its text only at the end, so there is nothing to stream with num_beams: use generate() without stream, or leave num_beams out."


@dataclass(frozen=True)
class Searching:
    """What one call searches for; ``record``: whether the tree is wanted."""

    search: BeamSearch
    phrases: Phrases
    record: bool

    def over(self, session: Session, rows: Sequence[Any], top: int) -> BeamRun:
        """The search over a session that has drawn nothing yet; ``rows`` (of generate) say what ends a text. Raises :class:`SamplerError`."""
        first = rows[0]
        endings = Endings(first.eos, first.limit, first.stops.stops, first.tokenizer, [row.context for row in rows])
        return BeamRun(session, self.search, endings, self.phrases, self.record, top)

    def tree(self, run: BeamRun, found: Any, prompt_ids: Sequence[int], tokenizer: Any) -> BeamTree | None:
        """The tree of one prompt, if it is wanted."""
        if not self.record:
            return None
        return BeamTree.of(found.nodes, found.best, self.search, run.session.sampler, self.phrases, prompt_ids, tokenizer)


def read_searching(options: Mapping[str, Any]) -> tuple[Searching | None, dict[str, Any]]:
    """The search that the options of ``generate`` ask for (None: none), and the other options. Raises :class:`SamplerError` for what does not go with it."""
    search = read_search(options)
    rest = {name: value for name, value in options.items() if name not in NAMES}
    if search is None:
        return None, rest
    for name, why in NOT_WITH_BEAMS.items():
        if rest.get(name):
            raise SamplerError(f"{name} does not go with num_beams: {why}. Leave one of them out.")
    if isinstance(rest.get("cache"), Cache):
        raise SamplerError("A search forks the rows of its cache, so it makes its own: leave cache out, or give cache=False to compute everything anew.")
    phrases = read_phrases(options.get("force_words") or (), rest.get("tokenizer"))
    if rest.get("sampler") is None and rest.get("min_keep") is None:
        # As transformers does: filters leave so many tokens that a beam can go on if the others end the text.
        rest["min_keep"] = 1 + max(1, len(eos_ids(rest.get("eos_id"), rest.get("tokenizer"))))
        if rest.get("top_k"):
            rest["top_k"] = max(rest["top_k"], rest["min_keep"])
    return Searching(search, phrases, bool(options.get("beam_tree"))), rest
