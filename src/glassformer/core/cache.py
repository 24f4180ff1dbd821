"""The cache: keys and values of the tokens that a model has already read.

    cache  = model.cache(batch=1, capacity=512)
    logits = model(prompt, cache=cache)          # prefill: writes, attends
    logits = model(next_token, cache=cache)      # decode: the same code, another slot

Every attention layer has a slot. Its kind follows the layer's mask:

    no cache ──► NoCache    hands its arguments back
    causal   ──► Dense      [b g capacity k], written at each row's own place (held in bfloat16 or int8: see .packed_cache)
    window   ──► Ring       only the last ``window`` places (and a little slack for rewinding)
    cross    ──► Once       the encoder's keys and values, computed on the first call (Shelf: put into buffers of fixed size, row by row)
    growing  ──► Growing    capacity=None: concatenates, and keeps the graph for gradients

    k, v [b t g k] ──► slot.update ──► keys, values [b g s k] and the place of each key [s] or [b s]

Rows of a batch may have different lengths: prompts are padded on the right, each row goes on
writing at its own length, and what lies beyond a row's length is invisible because it is later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CacheError
from .ring import Ring
from .slots import NO_CACHE, Clock, Dense, Growing, NoCache, Once, Pick, Shelf, Slot

__all__ = ["NO_CACHE", "Cache", "Clock", "Dense", "Growing", "NoCache", "Once", "Pick", "Ring", "Shelf", "Slot", "View"]


class Cache:
    """The slots of all layers and the length of every row (made by ``model.cache(...)``)."""

    def __init__(self, clock: Clock, layers: Sequence[dict[str, Slot]], capacity: int | None):
        self.clock, self.capacity = clock, capacity
        self.layers = tuple(layers)
        self.plan: Any = None  # a decode step as a model has written it down for these buffers; False: it cannot

    # What a model does with it

    def open(self, rows: int, t: int, lengths: Sequence[int] | None, device: torch.device) -> Tensor:
        """Begin a call of ``t`` columns; returns the places of its tokens, [t] or [b t]."""
        clock = self.clock
        self._check_whole()
        if rows != len(clock.lengths):
            raise CacheError(
                f"This cache was made for {len(clock.lengths)} rows, but {rows} came: make it with model.cache(batch={rows}), or fork or select rows."
            )
        new = [t] * rows if lengths is None else [int(n) for n in lengths]
        if self.capacity is not None and max(clock.lengths) + t > self.capacity:
            raise CacheError(f"The cache holds {self.capacity} tokens; {max(clock.lengths)} are filled and {t} more came. Make it with a larger capacity.")
        clock.new, clock.width = new, t
        steps = torch.arange(t, device=device)
        if len(set(clock.lengths)) == 1:
            return steps + clock.lengths[0]
        return torch.tensor(clock.lengths, device=device)[:, None] + steps

    def close(self) -> None:
        """End a call: its tokens are now held."""
        clock = self.clock
        clock.lengths = [a + b for a, b in zip(clock.lengths, clock.new, strict=True)]
        clock.new, clock.width, clock.overwritten = [0] * len(clock.lengths), 0, False

    def _check_whole(self) -> None:
        # Dense slots write beyond what they hold, so a call that failed left nothing that counts; rings write over it.
        if self.clock.overwritten:
            raise CacheError("An earlier call with this cache failed midway and has overwritten part of its rings: make a new cache with model.cache(...).")

    # What a user does with it

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.clock.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens held, per row."""
        return list(self.clock.lengths)

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self.clock.lengths)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers (allocated on the first call)."""
        return sum(x.untyped_storage().nbytes() for layer in self.layers for slot in layer.values() for x in slot.tensors().values())

    def slot(self, layer: int, kind: str = "attn") -> Any:
        """One layer's slot (``.keys``, ``.values``); ``kind`` is ``"attn"`` or ``"cross"``."""
        if not -len(self.layers) <= layer < len(self.layers):
            raise CacheError(f"This cache has {len(self.layers)} layers, so there is no layer {layer}.")
        if kind not in self.layers[layer]:
            raise CacheError(f"Layer {layer} has no {kind!r} slot; it has {', '.join(self.layers[layer]) or 'none'}.")
        return self.layers[layer][kind]

    def fork(self, n: int) -> Cache:
        """A new cache in which each row stands ``n`` times in a row (copies)."""
        if n < 1:
            raise CacheError(f"fork({n}) would leave no rows; n is at least 1.")
        return self.select([i for i in range(self.batch) for _ in range(n)])

    def select(self, rows: Sequence[int]) -> Cache:
        """A new cache of copies of these rows, in this order; a row may be taken several times."""
        self._check_whole()
        self._check_rows(*rows)
        clock = Clock(len(rows))
        clock.lengths = [self.clock.lengths[r] for r in rows]
        clock.sources = [self.clock.sources[r] for r in rows]

        def pick(x: Tensor, filled: int | None) -> Tensor:
            at = torch.tensor(list(rows), device=x.device, dtype=torch.long)
            if filled is None or 2 * filled > x.shape[2]:
                return x.index_select(0, at)
            new = x.new_zeros(len(rows), *x.shape[1:])
            new[:, :, :filled] = x[:, :, :filled].index_select(0, at)
            return new

        return Cache(clock, [{k: s.rearranged(clock, pick) for k, s in layer.items()} for layer in self.layers], self.capacity)

    def reorder(self, rows: Sequence[int], shared: Sequence[int] | None = None) -> Cache:
        """:meth:`select` for a cache that nobody needs any more: where the number of rows stays, the same buffers, in which only rows that change are written.

        ``shared``: how many of its first tokens (and its source, if any) each new row already has where it will stand, as copies: they are not copied
        again. Returns the cache to go on with, this one or another.
        """
        if type(self) is not Cache or self.capacity is None or len(rows) != self.batch:
            return self.select(rows)
        self._check_whole()
        self._check_rows(*rows)
        clock, moves = self.clock, _moves(rows, shared or [0] * len(rows))
        for slot in self._slots():
            aside: list[Tensor] = []
            for move in moves:
                told = clock.lengths[move.row], clock.sources[move.row], move.since
                there = aside if move.source == _ASIDE else slot.of_row(move.source, *told)
                if move.target == _ASIDE:
                    aside = [x.clone() for x in there]
                    continue
                for new, old in zip(slot.of_row(move.target, *told), there, strict=True):
                    new.copy_(old)
        clock.lengths, clock.sources = [clock.lengths[r] for r in rows], [clock.sources[r] for r in rows]
        return self

    def rewind(self, k: int | Sequence[int]) -> None:
        """Forget the last ``k`` tokens of every row, or of each row as many as its number in a list says."""
        self._check_whole()
        ks = [k] * self.batch if isinstance(k, int) else [int(n) for n in k]
        if len(ks) != self.batch:
            raise CacheError(f"This cache has {self.batch} rows, but {len(ks)} numbers of tokens to forget were given: give one for all, or one per row.")
        for n, held in zip(ks, self.clock.lengths, strict=True):
            if n < 0 or n > held:
                raise CacheError(
                    f"Cannot forget {n} tokens: the shortest row holds {min(self.clock.lengths)}."
                    if isinstance(k, int)
                    else f"Cannot forget {n} tokens of a row that holds {held}."
                )
        for layer in self.layers:
            for slot in layer.values():
                slot.check_rewind(self.clock.lengths, ks)
        self.clock.lengths = [held - n for held, n in zip(self.clock.lengths, ks, strict=True)]

    # Rows that come and go (what an engine does with it)

    def view(self, first: int, last: int) -> View:
        """Rows ``first`` to ``last`` (not included) as a cache over the same memory: what a call with it reads becomes these rows' own.

        The buffers must be there: one call with the whole cache makes them. Views count for themselves: ``refresh()`` tells one what others have read.
        """
        if not 0 <= first < last <= self.batch:
            raise CacheError(f"This cache has rows 0 to {self.batch - 1}, so there is no view of rows {first} to {last - 1}.")
        if not all(slot.tensors() for layer in self.layers for slot in layer.values()):
            raise CacheError("This cache has no memory yet, so nothing can be viewed: it is made by the first call with the whole cache.")
        return View(self, first, last)

    def shelve(self, sources: int) -> None:
        """Have every source of an encoder put into buffers of ``sources`` places; before the first call."""
        for layer in self.layers:
            if "cross" in layer:
                layer["cross"] = Shelf(self.clock, sources)

    def copy_row(self, source: int, target: int, n: int) -> None:
        """Make the first ``n`` tokens of row ``source`` those of row ``target``."""
        self._check_rows(source, target)
        if not self.keeps(source, n):
            raise CacheError(
                f"Row {source} holds {self.clock.lengths[source]} tokens, and of its first {n} not all is there any more, so they cannot be copied."
            )
        for slot in self._slots():
            for old, new in zip(slot.of_row(source, n, self.clock.sources[source]), slot.of_row(target, n, self.clock.sources[source]), strict=True):
                new.copy_(old)
        self.clock.lengths[target], self.clock.sources[target] = n, self.clock.sources[source]

    def swap_rows(self, a: int, b: int) -> None:
        """Each of two rows gets what the other holds."""
        self._check_rows(a, b)
        if a == b:
            return
        lengths, sources = self.clock.lengths, self.clock.sources
        n, s = max(lengths[a], lengths[b]), max(sources[a], sources[b])
        for slot in self._slots():
            for one, other in zip(slot.of_row(a, n, s), slot.of_row(b, n, s), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        for counts in (lengths, sources):
            counts[a], counts[b] = counts[b], counts[a]

    def keeps(self, row: int, n: int) -> bool:
        """Whether row ``row`` still has all that is needed to go on after the first ``n`` of its tokens."""
        return self.would_keep(self.clock.lengths[row], n)

    def would_keep(self, held: int, n: int) -> bool:
        """Whether a row that holds ``held`` tokens has all that is needed to go on after the first ``n`` of them."""
        return n <= held and all(slot.keeps(held, n) for slot in self._slots())

    def trim_row(self, row: int, n: int) -> None:
        """Forget all of a row but its first ``n`` tokens."""
        self._check_rows(row)
        if not self.keeps(row, n):
            raise CacheError(f"Row {row} holds {self.clock.lengths[row]} tokens, and of its first {n} not all is there any more, so it cannot be cut to them.")
        self.clock.lengths[row] = n

    def clear_row(self, row: int, wipe: bool = False) -> None:
        """Forget what a row holds. ``wipe``: write zeros over it too, which is needed where NaN may lie: it spreads from where nobody looks."""
        self._check_rows(row)
        for slot in self._slots():
            for piece in slot.of_row(row, self.capacity or 0, slot.tensors()["keys"].shape[2]) if wipe else ():
                piece.zero_()
            slot.forget(row)
        self.clock.lengths[row] = self.clock.sources[row] = 0

    def _slots(self) -> list[Slot]:
        return [slot for layer in self.layers for slot in layer.values()]

    def _check_rows(self, *rows: int) -> None:
        for r in rows:
            if not 0 <= r < self.batch:
                raise CacheError(f"This cache has {self.batch} rows, so there is no row {r}.")

    def __repr__(self) -> str:
        return f"Cache({self.batch} rows, lengths {self.clock.lengths}, capacity {self.capacity}, {len(self.layers)} layers, {self.bytes:,} bytes)"


@dataclass(frozen=True)
class _Move:
    """``target`` gets the tokens of row ``row`` behind its first ``since`` from where they lie: in row ``source``. :data:`_ASIDE`: beside the cache."""

    row: int
    source: int
    target: int
    since: int


_ASIDE = -1


def _moves(rows: Sequence[int], shared: Sequence[int]) -> list[_Move]:
    """How row ``i`` becomes row ``rows[i]``, all in place: nobody is overwritten who is still to be read, and one of each circle is put aside first."""
    waiting = {target: source for target, source in enumerate(rows) if source != target}
    readers = Counter(waiting.values())
    free, moves = [target for target in waiting if not readers[target]], []
    while waiting:
        if not free:
            # Only circles are left, in which each is read by one.
            target, row = next(iter(waiting.items()))
            moves.append(_Move(row, row, _ASIDE, shared[target]))
            waiting[target] = _ASIDE
            free, readers[row] = [row], 0
        target = free.pop()
        source, row = waiting.pop(target), rows[target]
        moves.append(_Move(row, source, target, shared[target]))
        readers[source] -= 1
        if source in waiting and not readers[source]:
            free.append(source)
    return moves


class View(Cache):
    """Some rows of a larger cache (made by :meth:`Cache.view`): the same memory, and lengths that are handed back when a call ends."""

    def __init__(self, whole: Cache, first: int, last: int):
        clock = Clock(last - first)
        super().__init__(clock, [{k: s.part(clock, first, last) for k, s in layer.items()} for layer in whole.layers], whole.capacity)
        self.whole, self.first, self.last = whole, first, last
        self.refresh()

    def refresh(self) -> View:
        """Take over the lengths that the rows have now."""
        rows = slice(self.first, self.last)
        self.clock.lengths, self.clock.sources = self.whole.clock.lengths[rows], self.whole.clock.sources[rows]
        return self

    def begin(self, source: int) -> None:
        """The next call is the first of these rows, and brings sources of so many places."""
        self.clock.sources, self.clock.filling = [source] * self.batch, True

    def close(self) -> None:
        super().close()
        rows = slice(self.first, self.last)
        self.whole.clock.lengths[rows], self.whole.clock.sources[rows] = self.clock.lengths, self.clock.sources
        self.clock.filling = False
