"""A model, its cache, and how many tokens of every row it has read: rows here may be far apart, and each is wound back by itself.

    known   p0 p1 p2 x0 x1 g0 g1 ·          left-aligned; g are guesses
    held    ━━━━━━━━━━━                     what the cache holds of the row
    read(ends)          ▲───────▲           reads up to ``ends``, and gives the logits after each token that it read

What a cache cannot do (a ring has lost what came before, the angles of LongRoPE have changed) is done by reading the rows anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache, Ring
from glassformer.core.errors import CacheError
from glassformer.core.modes import evaluating
from glassformer.core.tap import Tap
from glassformer.parts.rotary import DynamicNTKScaling, RotaryLayer

from .session import Source, _boundaries, _device, position_limit


class Reader:
    """Reads rows of ids with a model. ``cache``: True makes one for ``capacity`` tokens that forgets up to ``slack``; False reads all anew each time."""

    def __init__(self, model: Any, rows: int, capacity: int, slack: int, cache: Cache | bool, source: Source | None = None, tap: Tap | None = None):
        self.model, self.capacity, self.slack, self.source, self.tap = model, capacity, slack, source, tap
        self.device = _device(model)
        self.own = not isinstance(cache, Cache)
        self.cache = cache if isinstance(cache, Cache) else self._fresh(rows) if cache else None
        self.before = self.cache.lengths if self.cache is not None else [0] * rows  # what a given one held already
        self.held = [0] * rows
        self.borders = _boundaries(model) if self.own else frozenset()
        self.most, self.steady = position_limit(model), _steady(model)

    def _fresh(self, rows: int) -> Cache:
        made: Cache = self.model.cache(batch=rows, capacity=self.capacity, rewind=self.slack)
        return made

    def room(self, row: int, end: int) -> int:
        """How many guesses behind the ``end`` tokens of a row can be read in one call as they would be one by one."""
        place = self.before[row] + end
        limits = [b - place for b in self.borders if place <= b]
        limits += [] if self.steady is None else [self.steady - place]
        return max(0, min(limits, default=self.capacity))

    @property
    def longest(self) -> int:
        """Tokens held of the longest row."""
        return 0 if self.cache is None else self.cache.length

    @property
    def limit(self) -> int:
        """How many tokens a row may have."""
        held = self.capacity if self.cache is None or self.cache.capacity is None else self.cache.capacity
        return held if self.most is None else min(held, self.most)

    def free(self, row: int, end: int) -> int:
        """How many places a row of ``end`` tokens leaves before the very last one, which a row takes only together with all others: a call begins
        behind the longest row, so one that is full leaves no column for the rest.
        """
        return self.limit - 1 - self.before[row] - end

    def width(self) -> int:
        """How many columns a call may have: all rows are as wide as the widest, behind the longest."""
        return max(1, self.limit - self.longest)

    def fresh(self, rows: Sequence[tuple[int, int]]) -> bool:
        """Whether one of these rows, with its end, is read from its beginning by the next call."""
        return self.cache is not None and any(self.held[r] == 0 or self._crosses(self.held[r], end) for r, end in rows)

    def _crosses(self, held: int, end: int) -> bool:
        return any(held <= b < end for b in self.borders)

    def read(self, known: Tensor, ends: Sequence[int], path: str, last: bool = False) -> tuple[Tensor, list[int]]:
        """Read every row of ``known [b n]`` up to its end (0: not at all) -> logits ``[b w v]``, and the place of each row's first column.

        ``last``: read out the last place of each row only, ``w`` = 1.
        """
        if any(held and self._crosses(held, end) for held, end in zip(self.held, ends, strict=True)):
            self._anew()
        fed = [max(0, end - held) for end, held in zip(ends, self.held, strict=True)]
        wide = max(fed)
        starts = torch.tensor(self.held, device=known.device)[:, None]
        tokens = known.gather(1, (starts + torch.arange(wide, device=known.device)).clamp(max=known.shape[1] - 1)).to(self.device)
        lengths, ragged = (None, False) if min(fed) == wide else (fed, True)
        keep: Any = None if not last else torch.tensor([max(0, n - 1) for n in fed], device=self.device) if ragged else 1
        with torch.no_grad(), evaluating(self.model):
            read = self.model if self.source is None else self.source.decode
            logits: Tensor = read(tokens, lengths=lengths, cache=self.cache, keep=keep, tap=self.tap, path=path)
        first = [max(0, end - 1) for end in ends] if last else list(self.held)
        if self.cache is not None:
            self.held = [held + n for held, n in zip(self.held, fed, strict=True)]
        return logits.to(known.device), first

    def keep(self, ends: Sequence[int]) -> None:
        """Forget what was read beyond each row's end."""
        ends = [min(end, held) for end, held in zip(ends, self.held, strict=True)]
        if self.cache is None or ends == self.held:
            return
        try:
            if any(end <= b < held for end, held in zip(ends, self.held, strict=True) for b in self.borders):
                self._anew()  # its keys fit longer rows only
            else:
                self.cache.rewind([held - end for end, held in zip(ends, self.held, strict=True)])
                self.held = ends
        except CacheError:
            if not self.own:
                raise
            self._anew()

    def _anew(self) -> None:
        self.cache, self.held = self._fresh(len(self.held)), [0] * len(self.held)

    def select(self, rows: Sequence[int]) -> Reader:
        """A copy that has read these rows."""
        new = object.__new__(Reader)
        new.__dict__.update(self.__dict__)
        new.cache = None if self.cache is None else self.cache.select(rows)
        new.source = None if self.source is None else self.source.select(rows)
        new.held, new.before = [self.held[r] for r in rows], [self.before[r] for r in rows]
        return new

    def check_slack(self) -> None:
        """Raise :class:`CacheError` for a cache that was given and cannot be wound back by ``slack`` tokens."""
        slots = [slot for layer in self.cache.layers for slot in layer.values()] if self.cache is not None else []
        for slot in slots:
            if isinstance(slot, Ring) and slot.capacity - slot.window < self.slack:
                raise CacheError(
                    f"Guesses that are wrong are forgotten again, up to {self.slack} tokens at a time, but this cache has a ring of {slot.capacity} places "
                    f"for a window of {slot.window}: make it with model.cache(..., rewind={self.slack}), or ask for fewer draft_tokens."
                )


def _steady(model: Any) -> int | None:
    """Up to which length keys are turned alike however many are read at a time (None: always)."""
    layers = (m for m in model.modules() if isinstance(m, RotaryLayer)) if hasattr(model, "modules") else ()
    return min((m.spec.scaling.original_context for m in layers if isinstance(m.spec.scaling, DynamicNTKScaling)), default=None)
