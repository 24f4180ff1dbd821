"""Tokenizers opened: why a text is cut as it is, word by word.

    text ──► normalised ──► words ──► BPE         the pair that was learnt first is joined, again and again   (arXiv 1508.07909)
                                  ├─► Unigram     every piece that fits is an edge, the best path wins        (arXiv 1804.10959)
                                  ├─► WordPiece   the longest piece that fits, then the longest of the rest   (arXiv 1609.08144)
                                  └─► words, bytes, characters    looked up

What was learnt, and from what, is settled when a tokenizer is trained: BPE's merges come from counts in a corpus, not from the model that
reads them later. Cutting a text is deterministic. Each trail here is followed step by step, and its end is compared with what the tokenizer itself gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glassformer.core.errors import InputError, TokenizerError
from glassformer.text import Tokenizer
from glassformer.text.shown import shown
from glassformer.weights.own import Loaded

from .figure import Theme
from .result import Grid, Result
from .segmentation_picture import draw_lattice, draw_rows
from .subject import shorten
from .trails import Edge, Match, Merge, Trail, follower, word_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Segmentation(Result):
    """Every word of a text with the trail to its tokens (see :func:`segment`)."""

    text: str
    kind: str
    words: tuple[Trail, ...]

    @property
    def title(self) -> str:
        n = sum(len(w.ids) for w in self.words)
        return f"{n:,} token{'' if n == 1 else 's'} of {shorten(self.text)!r}, by {self.kind}"

    def grid(self) -> Grid:
        rows: list[tuple[Any, ...]] = []
        for word in self.words:
            where = f"{word.offsets[0][0]}–{word.offsets[-1][1]}" if word.offsets else ""
            for i, told in enumerate(_told(word) or ("looked up",)):
                rows.append((word_of(word) if not i else "", where if not i else "", told, " ".join(word.pieces) if not i else ""))
        return Grid(("word", "characters", "step", "tokens"), tuple(rows), NOTES.get(self.kind, ""))

    def size(self) -> tuple[float, float]:
        word = self._drawn()
        return (min(14.0, max(7.0, 0.7 * len(word.text) + 2)), min(12.0, max(3.0, 0.36 * len(_told(word)) + 2)))

    def draw(self, figure: Figure, theme: Theme) -> None:
        """The word with the longest trail."""
        axes, word = figure.add_subplot(), self._drawn()
        if word.steps and isinstance(word.steps[0], Edge):
            draw_lattice(axes, theme, word)
        else:
            draw_rows(axes, theme, word)

    def _drawn(self) -> Trail:
        return max(self.words, key=lambda w: len(w.steps), default=Trail("", (), (), (), ()))


NOTES = {
    "bpe": "rank: the merge's place in the learnt list; of all adjacent pairs the one with the lowest rank is joined, the leftmost of equals",
    "unigram": "score: ln p of a piece; the path with the largest sum wins",
    "wordpiece": "the longest piece that fits is taken, from left to right; ## begins a piece inside a word",
}


def segment(tokenizer: Tokenizer | Loaded, text: str) -> Segmentation:
    """Follow a tokenizer through ``text``: BPE's merges in order, Unigram's lattice and best path, WordPiece's trail of matches.

    ``tokenizer``: one, or what ``gf.load`` gave. Raises :class:`InputError` for an empty text, and :class:`TokenizerError` for a tokenizer that cuts in a
    way that is not followed here (what it does then differs from the trail, which is never shown).
    """
    if isinstance(tokenizer, Loaded):
        if tokenizer.tokenizer is None:
            raise InputError("This model was saved without a tokenizer, so there is none to open: give Tokenizer.load(path).")
        tokenizer = tokenizer.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise InputError("segment(tokenizer, text) opens a tokenizer: give gf.Tokenizer.load(path), or what gf.load(folder) gave.")
    if not isinstance(text, str) or not text:
        raise InputError("The text is empty, so no word of it can be followed: give some text.")
    library = tokenizer.library
    config = json.loads(library.to_str())
    offsets = tokenizer.offsets(text)
    follow = follower(config["model"], library)
    trails: list[Trail] = []
    at = 0
    for word, added in _words(library, config, text):
        steps, ids, note = ((), (added,), "a token of its own") if added is not None else follow(word)
        mine = offsets[at : at + len(ids)]
        if tuple(p.id for p in mine) != tuple(ids):
            raise TokenizerError(
                f"The word {word!r} comes to the ids {list(ids)} here, but the tokenizer gives {[p.id for p in mine]}: it cuts in a way that is not followed."
            )
        trails.append(Trail(word, steps, tuple(ids), tuple(shown(p.text) for p in mine), tuple((p.start, p.end) for p in mine), note))
        at += len(ids)
    if at != len(offsets):
        raise TokenizerError(f"The trail ends after {at} tokens, but the tokenizer gives {len(offsets)}: it cuts in a way that is not followed.")
    kind = {"BPE": "bpe", "Unigram": "unigram", "WordPiece": "wordpiece"}.get(config["model"]["type"], "lookup")
    return Segmentation(text, kind, tuple(trails))


# From text to words


def _words(library: Any, config: Mapping[str, Any], text: str) -> list[tuple[str, int | None]]:
    """The words as the model of the tokenizer sees them; an added token (a special one) with its id."""
    added = sorted((t for t in config["added_tokens"]), key=lambda t: -len(t["content"]))
    found: list[tuple[str, int | None]] = []
    for part, id in _cut(text, added):
        if id is not None:
            found.append((part, id))
            continue
        normal = library.normalizer.normalize_str(part) if library.normalizer is not None else part
        pieces = [w for w, _ in library.pre_tokenizer.pre_tokenize_str(normal)] if library.pre_tokenizer is not None else [normal]
        found += [(w, None) for w in pieces if w]
    return found


def _fits(token: Mapping[str, Any], text: str, at: int) -> bool:
    """Whether a token that must be a whole word is one there."""
    before, behind = text[:at][-1:], text[at + len(token["content"]) :][:1]
    return not token["single_word"] or not any(c.isalnum() or c == "_" for c in before + behind)


def _cut(text: str, added: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None]]:
    """The text around its added tokens. Such a token may take the white space beside it along (``lstrip``, ``rstrip``), or count as a whole word only."""
    parts: list[tuple[str, int | None]] = []
    begin = at = 0
    while at < len(text):
        token = next((t for t in added if text.startswith(t["content"], at) and _fits(t, text, at)), None)
        if token is None:
            at += 1
            continue
        end = at + len(token["content"])
        if token["lstrip"]:
            at = max(begin, len(text[:at].rstrip()))
        if token["rstrip"]:
            end = len(text) - len(text[end:].lstrip())
        if at > begin:
            parts.append((text[begin:at], None))
        parts.append((text[at:end], token["id"]))
        begin = at = end
    return [*parts, (text[begin:], None)] if begin < len(text) else parts


# Showing


def _tried(step: Match) -> str:
    return "" if step.piece is None or not step.tried else f"  ({step.tried} longer one{'s are' if step.tried > 1 else ' is'} not in the vocabulary)"


def _told(word: Trail) -> list[str]:
    told: list[str] = []
    for step in word.steps:
        if isinstance(step, Merge):
            told.append(f"rank {step.rank:,}: {step.left} + {step.right}  →  {' '.join(step.pieces)}")
        elif isinstance(step, Match):
            told.append(f"from {step.start}: {'nothing fits' if step.piece is None else shown(step.piece)}{_tried(step)}")
    edges = [s for s in word.steps if isinstance(s, Edge)]
    if edges:
        told.append(
            "  ".join(f"{shown(e.piece)} {e.score:.2f}" for e in edges if e.taken)
            + f"  ({len(edges)} piece{'s' * (len(edges) != 1)} of the vocabulary fit{'s' * (len(edges) == 1)})"
        )
    return told + ([word.note] if word.note else [])


__all__ = ["Edge", "Match", "Merge", "Segmentation", "Trail", "segment"]
