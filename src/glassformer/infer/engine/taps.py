"""Looking into one row of a batch that others are in.

    a call of n rows ──► RowTap ──► row 0: nobody looks
                                ├─► row 1: its own Record sees [1 …], under the number of its own step
                                └─► row 2: its own Record …

Only taps that look share a call; one that may change something gets calls of its own, so that nobody else's numbers move.
In a layer with a ring the places of patterns are in the order of storage, as in any call with such a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from glassformer.core import sites
from glassformer.core.cache import Cache
from glassformer.core.tap import Chain, Record, Tap

BY_KEY = frozenset((sites.SCORES.name, sites.PATTERN.name))


def only_looks(tap: Tap) -> bool:
    """Whether a tap surely leaves every value as it is, and asks for no gradient."""
    if type(tap) is Chain:
        return all(map(only_looks, tap.taps))
    return type(tap) is Record and not tap.differentiates()


@dataclass(frozen=True, eq=False)
class Looker:
    """One row's tap, and the step that this call is for it."""

    row: int
    tap: Tap
    step: int


class RowTap(Tap):
    """Taps of single rows as one tap of a batch. ``failed`` gets what a row's tap raised: from there on it is left out."""

    def __init__(self, lookers: list[Looker], cache: Cache):
        self.lookers, self.cache = lookers, cache
        self.failed: dict[int, Exception] = {}

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        self._each(lambda one: one.tap.begin(_renumbered(path, one.step), index if index.ndim == 1 else index[one.row : one.row + 1], None))

    def visit(self, path: str, x: Tensor) -> Tensor:
        self._each(lambda one: one.tap.visit(_renumbered(path, one.step), self._own(path, x, one.row)))
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        made: dict[tuple[int, ...] | None, Tensor] = {}

        def of(row: int, heads: tuple[int, ...] | None) -> Tensor:
            if heads not in made:
                made[heads] = compute(heads)
            return self._own(path, made[heads], row)

        self._each(lambda one: one.tap.offer(_renumbered(path, one.step), lambda heads: of(one.row, heads)))

    def _own(self, path: str, x: Tensor, row: int) -> Tensor:
        """What this row alone would have had there."""
        *_, layer, part, site = ("", "", *path.split("."))
        if site == sites.POS_EMBED.name:
            return x if x.ndim == 2 else x[row]
        x = x[row : row + 1]
        if site in BY_KEY and layer.isdigit():
            slot = self.cache.layers[int(layer)]["cross" if part == "cross" else "attn"]
            if slot.layout == "shelf":
                return x[..., : self.cache.clock.sources[row]]
            if slot.layout == "dense":
                return x[..., : self.cache.clock.lengths[row] + self.cache.clock.new[row]]
        return x

    def _each(self, look: Callable[[Looker], object]) -> None:
        for one in self.lookers:
            if one.row not in self.failed:
                try:
                    look(one)
                except Exception as error:
                    self.failed[one.row] = error


def _renumbered(path: str, step: int) -> str:
    """``step.0.blocks…`` of the call as ``step.{n}.blocks…`` of the row."""
    head, _, rest = path.partition(".")
    rest = rest.partition(".")[2]
    return f"{head}.{step}.{rest}" if rest else f"{head}.{step}"
