"""Rules: how the tensors of a checkpoint become the parameters of a model, and back.

    Rule("blocks.{i}.attn.qkv.weight", "layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight", form=Joined())
          ours                          theirs                                                          the map between

    their tensors ── form.ours ──► one parameter ── form.theirs ──► their tensors

A table of rules reads from both sides. Loading goes by our parameters: the first rule whose left side fits (and whose
right side is there) fills it, so one table may list biases, norms and experts that only some members of a family have.
Where ours counts experts ``{e}`` and theirs does not, theirs is one stacked tensor [e …] and ours its slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .stored import Stored

NUMBERS = ("i", "j", "e")
LEAVES = "weight|bias"


@dataclass(frozen=True)
class Place:
    """Where a parameter stands: ``part`` is the module around the layer that owns it, ``name`` that layer's name there."""

    part: Any
    name: str

    @property
    def widths(self) -> tuple[int, ...]:
        """How many rows each of the joined matrices has."""
        if self.name == "gate_up":
            half = self.part.gate_up.out_features // 2
            return half, half
        return tuple(self.part.widths)


class Form:
    """An invertible map between tensors of a checkpoint and one parameter; works on the meta device too."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        """The parameter."""
        raise NotImplementedError

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        """The checkpoint's tensors."""
        raise NotImplementedError

    def fill(self, out: Tensor, stored: Sequence[Stored], place: Place) -> None:
        """Read the parameter into ``out``; forms that need no second copy say how."""
        out.copy_(self.ours([s.read() for s in stored], place))


class Same(Form):
    """The tensor itself."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return theirs[0]

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return (ours,)

    def fill(self, out: Tensor, stored: Sequence[Stored], place: Place) -> None:
        stored[0].fill(out)


class Joined(Form):
    """Rows one below the other: queries, keys, values; gate, up."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return torch.cat(list(theirs))

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return ours.split(place.widths)

    def fill(self, out: Tensor, stored: Sequence[Stored], place: Place) -> None:
        at = 0
        for s in stored:
            s.fill(out[at : at + s.shape[0]])
            at += s.shape[0]


class Transposed(Form):
    """Input by output in the checkpoint (GPT-2), output by input here; vectors stay as they are."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return theirs[0].mT if theirs[0].ndim > 1 else theirs[0]

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return (self.ours((ours,), place),)


class PerHead(Form):
    """Rows go head by head in the checkpoint (q, k, v of head 0, of head 1, …: NeoX), kind by kind here."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        x, h = theirs[0], place.part.n_heads
        return x.unflatten(0, (h, 3, -1)).transpose(0, 1).flatten(0, 2)

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return (ours.unflatten(0, (3, place.part.n_heads, -1)).transpose(0, 1).flatten(0, 2),)


@dataclass(frozen=True, init=False)
class Rule:
    """``ours`` is made of ``theirs`` by ``form``.

    In names ``{i}``, ``{j}``, ``{e}`` are numbers, ``{w}`` is ``weight`` or ``bias``, other words are one segment of a path.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form

    def __init__(self, ours: str, *theirs: str, form: Form | None = None):
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "theirs", theirs)
        object.__setattr__(self, "form", (Same() if len(theirs) == 1 else Joined()) if form is None else form)

    @cached_property
    def _left(self) -> re.Pattern[str]:
        return pattern(self.ours)

    @property
    def stacked(self) -> bool:
        """Whether theirs holds all experts in one tensor."""
        return "{e}" in self.ours and "{e}" not in self.theirs[0]

    def match(self, path: str) -> dict[str, str] | None:
        """What the placeholders stand for in one of our paths, or None."""
        found = self._left.fullmatch(path)
        return None if found is None else found.groupdict()

    def names(self, holes: Mapping[str, str]) -> tuple[str, ...]:
        """Their names for these values of the placeholders."""
        return tuple(t.format_map(holes) for t in self.theirs)


def pattern(name: str) -> re.Pattern[str]:
    """The regular expression of a name with placeholders (``*`` any run of characters); a placeholder that comes twice is the same twice."""
    seen: set[str] = set()

    def hole(found: re.Match[str]) -> str:
        if found[0] == r"\*":
            return ".*"
        word = found[1]
        if word in seen:
            return f"(?P={word})"
        seen.add(word)
        return f"(?P<{word}>{r'[0-9]+' if word in NUMBERS else LEAVES if word == 'w' else '[^.]+'})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}|\\\*", hole, re.escape(name)))


def any_matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    """Whether one of the patterns is the whole of ``name``."""
    return any(p.fullmatch(name) for p in patterns)


class Table:
    """Rules, with the work of finding the right one done once per kind of path."""

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)
        self._of_kind: dict[str, tuple[Rule, ...]] = {}

    def rules_for(self, path: str) -> tuple[Rule, ...]:
        """The rules whose left side fits one of our paths, the canonical one first."""
        kind = re.sub(r"\.[0-9]+(?=\.|$)", ".0", path)  # paths that differ in numbers only have the same rules
        if kind not in self._of_kind:
            self._of_kind[kind] = tuple(r for r in self.rules if r.match(kind) is not None)
        return self._of_kind[kind]
