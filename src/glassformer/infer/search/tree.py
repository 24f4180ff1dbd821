"""The beam tree: every hypothesis that a search considered, what it scored, and what became of it.

    out = generate(model, "Once upon", tokenizer=tok, num_beams=4, beam_tree=True)
    print(out.tree)                      the n best with the parts of their scores, and per step who went on and who died of what
    out.tree.best[0].why                 "finished as number 1 of 4"
    for h in out.tree.steps[3]:          the candidates of one step, the best first
        print(h.text, h.score, h.why)
    out.tree.path(h), out.tree.children(h)
    out.tree.save("beams.html")          the page; .json for the numbers

    step 0          step 1            step 2
    ─ The ────┬──── dog ────┬──── ran      kept
              │             └──── sat      outscored: -2.31 against -2.02 of the last that went on
              └──── cat                    barren: it was kept, but none of its continuations was
    ─ A ─────────── <end>                  finished as number 2 of 4

Of each step the tree holds the candidates that the search looked at: as many as all beams need to go on even if their best tokens end the text.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassformer.core import files
from glassformer.core.page import printed

from ..sampler import Chain
from ..trace import SUFFIXES, Names
from .hypothesis import Ending, Fate, Node
from .phrases import Phrases
from .settings import BeamSearch

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


@dataclass(frozen=True)
class Hypothesis:
    """A beginning (or a whole) of a text: its last token, and those of its ancestors.

    ``token``, ``text`` (None without a tokenizer), ``logprob`` (ln p by the model) and ``gain`` (ln p after the links of the sampler) are the last token's.
    ``score`` is (``sum`` - ``diversity``) / ``divisor`` + ``coverage``: ``sum`` is Σ gain over the path, ``diversity`` Σ penalties for what earlier groups
    chose (``penalty``: this token's), ``divisor`` n^length_penalty; ``coverage`` counts in finished texts.

    ``rank``: its place among the candidates of its step and group. ``row``: the row of the batch that it was chosen from: recorded sites
    that begin with ``step.{step}.`` hold in that row what the model computed for it. ``met``: how many of the phrases that must come it holds.
    ``fate`` and ``by`` (the score that decided against it) are said in words by :attr:`why`. ``place``: its number among the finished texts, 1 is the best.
    """

    id: int
    step: int
    parent: int | None
    token: int
    text: str | None
    logprob: float
    gain: float
    penalty: float
    sum: float
    diversity: float
    divisor: float
    coverage: float
    score: float
    group: int
    rank: int
    row: int
    met: int
    fate: Fate
    by: float | None
    ending: Ending | None
    place: int | None
    of: int  # how many texts were finished

    @property
    def alive(self) -> bool:
        """Whether it went on to the next step."""
        return self.fate in ("kept", "barren", "pruned", "stuck")

    @property
    def parts(self) -> dict[str, float]:
        """What the score is made of."""
        return {"log_probability": self.sum, "diversity": -self.diversity, "length": self.step + 1, "divisor": self.divisor, "coverage": self.coverage}

    @property
    def why(self) -> str:
        """What became of it, in words with the numbers."""
        against = "" if self.by is None else f": {_number(self.score)} against {_number(self.by)}"
        return {
            "kept": "went on",
            "barren": "went on, but none of its continuations did" + ("" if self.by is None else f" (the last that went on had {_number(self.by)})"),
            "outscored": f"outscored{against} of the last that was kept" if self.by is not None else "outscored: all that was kept has ended",
            "diversity": f"held back by the penalty of {_number(self.penalty)} for what earlier groups chose{against} of the last that went on",
            "bank": f"gave way to hypotheses that are further with their phrases{against} of the last of those",
            "no_room": "dropped: the phrases that must still come do not fit into the tokens left",
            "unmet": f"ended ({self._ended}) before its phrases had come",
            "late": f"ended ({self._ended}) outside the best of its step{against} of the last of those"
            if self.by is not None
            else f"ended ({self._ended}), but was drawn after the first num_beams of its step",
            "finished": f"finished ({self._ended}) as number {self.place} of {self.of}",
            "displaced": f"finished ({self._ended}), and better ones have taken its place{against} of the last of those",
            "stuck": "went on, but the sampler left it no token",
            "pruned": f"was going when the search stopped{against} of the last finished text"
            if self.by is not None
            else "was going when early stopping ended the search: enough texts were finished",
        }[self.fate]

    @property
    def _ended(self) -> str:
        return {"eos": "end-of-sequence", "stop": "stop", "length": "length", None: ""}[self.ending]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {f.name: _finite(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "of"} | {"why": self.why}


@dataclass(frozen=True, eq=False)
class BeamTree:
    """All hypotheses of one prompt's search: ``tree[i]`` is the one with the id ``i``; ids count from the first step on."""

    hypotheses: tuple[Hypothesis, ...]
    search: BeamSearch
    chain: str
    phrases: tuple[tuple[str, ...], ...] = ()
    prompt: str | None = None
    prompt_ids: tuple[int, ...] = ()
    tokenizer: Any = dataclasses.field(default=None, repr=False)

    @staticmethod
    def of(
        nodes: Sequence[Node], best: Sequence[Node], search: BeamSearch, chain: Chain, phrases: Phrases, prompt_ids: Sequence[int], tokenizer: Any = None
    ) -> BeamTree:
        """The tree of what a search recorded; ``best`` are the finished ones."""
        names = Names(tokenizer)
        known = {id(node): node for end in (*nodes, *best) for node in end.path()}
        order = sorted(known.values(), key=lambda n: (n.step, n.group, n.rank))
        ids = {id(node): i for i, node in enumerate(order)}
        places = {id(node): i for i, node in enumerate(best, 1)}
        made = tuple(
            Hypothesis(
                id=i,
                step=n.step,
                parent=None if n.parent is None else ids.get(id(n.parent)),
                token=n.token,
                text=names(n.token),
                **{name: getattr(n, name) for name in ("logprob", "gain", "penalty", "sum", "diversity", "coverage", "score", "group", "rank", "row")},
                divisor=search.divisor(n.length),
                met=sum(begun is None for begun in n.progress),
                **{name: getattr(n, name) for name in ("fate", "by", "ending")},
                place=places.get(id(n)),
                of=len(best),
            )
            for i, n in enumerate(order)
        )

        def said(ids: tuple[int, ...]) -> str:
            return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(list(ids))

        named = tuple(tuple(said(a) for a in phrase) for phrase in phrases.alternatives)
        prompt = None if tokenizer is None else tokenizer.decode(list(prompt_ids))
        return BeamTree(made, search, repr(chain), named, prompt, tuple(prompt_ids), tokenizer)

    def __len__(self) -> int:
        return len(self.hypotheses)

    def __iter__(self) -> Iterator[Hypothesis]:
        return iter(self.hypotheses)

    def __getitem__(self, i: int) -> Hypothesis:
        return self.hypotheses[i]

    @property
    def asked(self) -> str:
        """What was searched for: num_beams, and what else was not left as usual."""
        said = {
            f.name: getattr(self.search, f.name) for f in dataclasses.fields(self.search) if f.name == "num_beams" or getattr(self.search, f.name) != f.default
        }
        return ", ".join(f"{name}={value!r}" for name, value in said.items())

    @cached_property
    def steps(self) -> tuple[tuple[Hypothesis, ...], ...]:
        """The candidates of every step, group by group, the best of each first."""
        found: list[list[Hypothesis]] = [[] for _ in range(1 + max((h.step for h in self), default=-1))]
        for h in self:
            found[h.step].append(h)
        return tuple(map(tuple, found))

    @cached_property
    def best(self) -> tuple[Hypothesis, ...]:
        """The finished texts, the best first."""
        return tuple(sorted((h for h in self if h.place is not None), key=lambda h: h.place or 0))

    @cached_property
    def _children(self) -> dict[int | None, list[Hypothesis]]:
        found: dict[int | None, list[Hypothesis]] = {}
        for h in self:
            found.setdefault(h.parent, []).append(h)
        return found

    def children(self, hypothesis: Hypothesis) -> list[Hypothesis]:
        """Its continuations."""
        return self._children.get(hypothesis.id, [])

    def path(self, hypothesis: Hypothesis) -> list[Hypothesis]:
        """From the first new token to this hypothesis."""
        found = [hypothesis]
        while (parent := found[-1].parent) is not None:
            found.append(self[parent])
        return found[::-1]

    def ids(self, hypothesis: Hypothesis) -> list[int]:
        """The new tokens up to this one."""
        return [h.token for h in self.path(hypothesis)]

    def written(self, hypothesis: Hypothesis) -> str | None:
        """The new text up to this token (None without a tokenizer)."""
        return None if self.tokenizer is None else self.tokenizer.decode(self.ids(hypothesis))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; None where there is no number."""
        search = {f.name: getattr(self.search, f.name) for f in dataclasses.fields(self.search)}
        head = {"kind": "BeamTree", "search": search, "chain": self.chain, "phrases": [list(p) for p in self.phrases]}
        return head | {
            "prompt": self.prompt,
            "prompt_ids": list(self.prompt_ids),
            "best": [{"id": h.id, "score": _finite(h.score), "ids": self.ids(h), "text": self.written(h)} for h in self.best],
            "hypotheses": [h.to_dict() for h in self],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """A page that needs nothing else, light or dark as the reader's system is: every hypothesis can be opened."""
        from .tree_page import render

        return render(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tree; the ending says as what (.html, .json). Raises :class:`InputError` with the remedy if it cannot."""
        target = check_place(path)
        return files.save(target, self.to_html() if target.suffix.lower() == ".html" else self.to_json())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from .tree_table import tree_table

        yield from tree_table(self, options.max_width)

    def __str__(self) -> str:
        from ..trace import _printed

        return _printed(self)

    def _repr_html_(self) -> str:
        return printed(self)


def check_place(path: str | os.PathLike[str]) -> Path:
    """The file that a beam tree is to be written to. Raises :class:`InputError` if it cannot be."""
    return files.check_place(path, "a beam tree", SUFFIXES, "beams.html")


def _number(x: float) -> str:
    return f"{x:.3f}"


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not isfinite(x) else x
