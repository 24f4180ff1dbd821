"""The trace: how each token came to be chosen, link by link.

    out = generate(model, "Once upon", tokenizer=tok, temperature=0.8, top_k=40, min_p=0.05, seed=7, trace=True)
    print(out.trace)                    one line per token: the probability it had after each link, bits, how many were left
    print(out.trace[3])                 one token: its candidates, from stage to stage
    out.trace[3].stages[2].gone         the most probable of those that the second link removed
    out.trace.save("why.html")          the page; .json for the numbers

    model ──► TopK ──► MinP ──► Draw        a stage is what stands after a link (the first: what the model said)
     0         1        2        3

What is traced is what was drawn: the numbers are taken from the chain's own pass over the logits, and nothing is computed twice. Links whose
settings make them do nothing leave no stage. Of every stage the ``k`` most probable tokens are kept and followed through all stages, with the
chosen one; of those that a link removes the ``k`` most probable, their number and their whole probability. Nothing as wide as the vocabulary is kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassformer.core import files
from glassformer.core.errors import InputError
from glassformer.core.page import printed

from .sampler import Link

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SUFFIXES = (".html", ".json")
USUAL = 10
"""Candidates kept of every stage by ``trace=True``."""


class Chance(NamedTuple):
    """A token and the probability that it has at one stage; ``text`` is None without a tokenizer."""

    id: int
    text: str | None
    p: float


@dataclass(frozen=True)
class Stage:
    """What stands after one link (``link`` None: what the model said, before any).

    ``candidates``: the most probable tokens left, at least ``k`` of them (or all), and the chosen one; the most probable first. ``left``: how many
    are left in all. ``entropy``: -Σ p log2 p, in bits. ``p`` and ``rank``: the chosen token's probability here, and its place (1: the most probable).
    ``removed``: how many tokens this link removed, ``mass``: the probability that they held before it, all together, and ``gone``: the most
    probable of them, with the probability that each had before. The last link leaves the token that it picks and removes the others.
    """

    link: Link | None
    candidates: tuple[Chance, ...]
    left: int
    entropy: float
    p: float
    rank: int
    removed: int
    mass: float
    gone: tuple[Chance, ...]

    @property
    def name(self) -> str:
        """The kind of the link, ``"TopK"``; ``"model"`` for the first stage."""
        return "model" if self.link is None else type(self.link).__name__

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "link": None if self.link is None else repr(self.link),
            "left": self.left,
            "entropy_bits": _finite(self.entropy),
            "chosen": {"p": _finite(self.p), "rank": self.rank},
            "candidates": [_of(c) for c in self.candidates],
            "removed": {"count": self.removed, "p": _finite(self.mass), "most_probable": [_of(c) for c in self.gone]},
        }


class Names:
    """The texts of single tokens, each decoded once; None without a tokenizer."""

    def __init__(self, tokenizer: Any = None):
        self.tokenizer = tokenizer
        self._known: dict[int, str | None] = {}

    def __call__(self, token: int) -> str | None:
        if token not in self._known:
            self._known[token] = None if self.tokenizer is None else self.tokenizer.decode([token])
        return self._known[token]


@dataclass(frozen=True, eq=False)
class Choice:
    """How one token was chosen: :attr:`stages`, the first the model's own, the last the pick.

    The other fields are the numbers that the stages are made of, in little room: ``facts [s 6]`` (left, entropy, p, rank, removed, mass),
    ``followed [u]`` ids and their probabilities ``p [s u]`` (NaN where a token is not left), ``gone [s k]`` ids (-1: none) and ``gone_p [s k]``.
    """

    id: int
    step: int
    links: tuple[Link, ...]
    names: Names = dataclasses.field(repr=False)
    facts: NDArray[np.float64] = dataclasses.field(repr=False)
    followed: NDArray[np.int64] = dataclasses.field(repr=False)
    p: NDArray[np.float32] = dataclasses.field(repr=False)
    gone: NDArray[np.int64] = dataclasses.field(repr=False)
    gone_p: NDArray[np.float32] = dataclasses.field(repr=False)

    @property
    def text(self) -> str | None:
        """The token as text."""
        return self.names(self.id)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What the model said, and what stood after each link that was at work."""
        made = []
        for i, link in enumerate((None, *self.links[:-1])):
            left, entropy, p, rank, removed, mass = self.facts[i].tolist()
            here = sorted(((t, x) for t, x in zip(self.followed.tolist(), self.p[i].tolist(), strict=True) if x == x), key=lambda c: (-c[1], c[0]))
            gone = [(t, x) for t, x in zip(self.gone[i].tolist(), self.gone_p[i].tolist(), strict=True) if t >= 0]
            made.append(Stage(link, self._chances(here), int(left), entropy, p, int(rank), int(removed), mass, self._chances(gone)))
        last = made[-1]
        passed_over = tuple(c for c in last.candidates if c.id != self.id)
        pick = Stage(self.links[-1], (Chance(self.id, self.text, 1.0),), 1, 0.0, 1.0, 1, last.left - 1, max(0.0, 1 - last.p), passed_over)
        return (*made, pick)

    def _chances(self, pairs: list[tuple[int, float]]) -> tuple[Chance, ...]:
        return tuple(Chance(t, self.names(t), x) for t, x in pairs)

    @property
    def followed_through(self) -> list[tuple[int, list[float | None]]]:
        """Every token that was followed, the model's most probable first: its id, and its probability at each stage (None: not left)."""
        rows = [(t, [_finite(x) for x in self.p[:, j].tolist()] + [1.0 if t == self.id else None]) for j, t in enumerate(self.followed.tolist())]
        return sorted(rows, key=lambda row: (-(row[1][0] or 0.0), row[0]))

    def removed_by(self, token: int | str) -> Link | None:
        """The link that removed a token (its id, or its text), or None for the chosen one and for one that the model itself ruled out.

        Raises :class:`InputError` for a token that was not among those followed.
        """
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            known = (*before.candidates, *after.gone)
            if any(token in (c.id, c.text) for c in known) and not any(token in (c.id, c.text) for c in after.candidates):
                return after.link
        if not any(token in (c.id, c.text) for stage in self.stages for c in stage.candidates):
            raise InputError(
                f"Token {token!r} was not followed in step {self.step}: only the most probable of each stage are. Ask for more: trace={4 * USUAL}."
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"step": self.step, "id": self.id, "text": self.text, "stages": [stage.to_dict() for stage in self.stages]}

    def __rich__(self) -> RenderableType:
        from .trace_table import choice_table

        return choice_table(self)

    def __str__(self) -> str:
        return _printed(self)


@dataclass(frozen=True, eq=False)
class Trace:
    """The choices of one row, in order: ``trace[i]`` is the i-th new token's :class:`Choice`."""

    choices: tuple[Choice, ...]
    prompt: str | None = None

    def __len__(self) -> int:
        return len(self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __getitem__(self, i: int) -> Choice:
        return self.choices[i]

    @property
    def chain(self) -> str:
        """The links that were at work, as they are written."""
        return " | ".join(map(repr, self.choices[0].links)) if self.choices else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; ``p`` None means that there is no number (a model that gave infinities)."""
        return {"kind": "Trace", "chain": self.chain, "prompt": self.prompt, "tokens": [c.to_dict() for c in self.choices]}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """A page that needs nothing else, light or dark as the reader's system is: every token can be opened."""
        from .trace_page import render

        return render(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace; the ending says as what (.html, .json). Raises :class:`InputError` with the remedy if it cannot."""
        target = check_place(path)
        return files.save(target, self.to_html() if target.suffix.lower() == ".html" else self.to_json())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from .trace_table import trace_table

        yield from trace_table(self, options.max_width)

    def __str__(self) -> str:
        return _printed(self)

    def _repr_html_(self) -> str:
        return printed(self)


def check_place(path: str | os.PathLike[str]) -> Path:
    """The file that a trace is to be written to. Raises :class:`InputError` if it cannot be."""
    return files.check_place(path, "a trace", SUFFIXES, "trace.html")


def read_trace(wanted: bool | int) -> int:
    """How many candidates of every stage are kept: ``True`` means 10, ``False`` and 0 no trace. Raises :class:`InputError` below 0."""
    if wanted is True:
        return USUAL
    if wanted < 0:
        raise InputError(f"trace is {wanted}; it is True, or the number of candidates to keep of every stage, 0 (no trace) or more.")
    return int(wanted)


# Small things


def _finite(x: float) -> float | None:
    return x if isfinite(x) else None


def _of(c: Chance) -> dict[str, Any]:
    return {"id": c.id, "text": c.text, "p": _finite(c.p)}


def _printed(thing: Any) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=120, color_system=None, highlight=False).print(thing)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
