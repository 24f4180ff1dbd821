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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CacheError


class Clock:
    """How many tokens each row holds, and how many the running call adds."""

    def __init__(self, batch: int):
        self.lengths = [0] * batch
        self.new = [0] * batch
        self.width = 0  # columns of the running call
        self.overwritten = False  # whether the running call has overwritten what an earlier one wrote
        self.sources = [0] * batch  # places of each row's source on a Shelf
        self.filling = False  # whether the running call is the first that sees its sources

    @property
    def uniform(self) -> bool:
        """Whether all rows hold, and receive, equally many tokens."""
        return len(set(self.lengths)) <= 1 and all(n == self.width for n in self.new)


class Slot:
    """One attention layer's part of a cache. The base is the null object :class:`NoCache` derives from."""

    layout = "none"

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add keys and values [b t g k] at places ``index``; return all as [b g s k] with their places."""
        return k.transpose(1, 2), v.transpose(1, 2), index

    def reserve(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """In place of :meth:`update`, for a caller that writes keys and values [b t g k] at their places itself: views [b g s k] up to the last of them.

        Key ``j`` of a row lies at place ``j``. None: not to be had, use :meth:`update`.
        """
        return None

    def once(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values that never change during a generation: made on the first call only."""
        return make()

    @property
    def newest(self) -> bool:
        """Whether the running call holds one token per row and no key lies beyond it."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name (rows on axis 0)."""
        return {}

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        """A copy whose rows are ``pick(tensor)``."""
        return self

    def part(self, clock: Clock, first: int, last: int) -> Slot:
        """A slot over rows ``first`` to ``last`` (not included) of the same memory: ``clock`` counts them."""
        return self.rearranged(clock, lambda x: x[first:last])

    def of_row(self, row: int, n: int, sources: int) -> list[Tensor]:
        """Where the first ``n`` tokens of a row, or the first ``sources`` places of its source, lie: pieces of the buffers, to read and to write."""
        return [x[row] for x in self.tensors().values()]

    def keeps(self, held: int, n: int) -> bool:
        """Whether a row that holds ``held`` tokens still has all that is needed to go on after the first ``n`` of them."""
        return True

    def forget(self, row: int) -> None:
        """Note that a row holds nothing."""

    def check_rewind(self, lengths: list[int], ks: list[int]) -> None:
        """Raise :class:`CacheError` if the last ``ks`` tokens of the rows cannot be forgotten."""


class NoCache(Slot):
    """Holds nothing."""


NO_CACHE = NoCache()


class Dense(Slot):
    """Keys and values of every token so far, in buffers of fixed capacity.

    What is written is a constant to autograd; ``capacity=None`` (:class:`Growing`) keeps the graph.
    """

    layout = "dense"

    def __init__(self, clock: Clock, capacity: int):
        self.clock, self.capacity = clock, capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """[b g s k], the filled part (None before the first call)."""
        return None if self._keys is None else self._keys[:, :, : max(self.clock.lengths)]

    @property
    def values(self) -> Tensor | None:
        """[b g s k], the filled part (None before the first call)."""
        return None if self._values is None else self._values[:, :, : max(self.clock.lengths)]

    @property
    def newest(self) -> bool:
        return self.clock.width == 1 and self.clock.uniform

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start, t = max(self.clock.lengths), k.shape[1]
        end = start + t
        if self._keys is None or self._values is None:
            self._keys, self._values = self._buffer(k), self._buffer(v)
        if self.clock.uniform:
            self._keys[:, :, start:end] = k.detach().transpose(1, 2)
            self._values[:, :, start:end] = v.detach().transpose(1, 2)
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            self._keys.transpose(1, 2)[rows, index] = k.detach()
            self._values.transpose(1, 2)[rows, index] = v.detach()
        places = index if start == 0 and index.ndim == 1 else torch.arange(end, device=k.device)
        return self._keys[:, :, :end], self._values[:, :, :end], places

    def reserve(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        end = max(self.clock.lengths) + k.shape[1]
        if self._keys is None or self._values is None or end == k.shape[1]:
            return None  # the first call
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)

    def _buffer(self, x: Tensor) -> Tensor:
        b, _, g, d = x.shape
        return torch.zeros(b, g, self.capacity, d, dtype=x.dtype, device=x.device)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._keys is None or self._values is None else {"keys": self._keys, "values": self._values}

    def of_row(self, row: int, n: int, sources: int) -> list[Tensor]:
        return [x[row, :, :n] for x in self.tensors().values()]

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        new = type(self)(clock, self.capacity)
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys), pick(self._values)
        return new


class Growing(Dense):
    """A dense slot that grows by concatenation, so that gradients flow through the cached tokens too."""

    def __init__(self, clock: Clock, capacity: int = 0):
        super().__init__(clock, capacity)

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self._keys is None or self._values is None:
            self._keys, self._values = k, v
        elif self.clock.uniform:
            n = max(self.clock.lengths)
            self._keys, self._values = torch.cat([self._keys[:, :, :n], k], 2), torch.cat([self._values[:, :, :n], v], 2)
        else:
            self._keys, self._values = self._placed(self._keys, k, index), self._placed(self._values, v, index)
        places = index if index.ndim == 1 and max(self.clock.lengths) == 0 else torch.arange(self._keys.shape[2], device=k.device)
        return self._keys, self._values, places

    def reserve(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def _placed(self, old: Tensor, new: Tensor, index: Tensor) -> Tensor:
        end = max(self.clock.lengths) + new.shape[2]
        grown = torch.cat([old, old.new_zeros(*old.shape[:2], max(0, end - old.shape[2]), old.shape[3])], 2)
        rows = torch.arange(new.shape[0], device=new.device)[:, None]
        return grown.transpose(1, 2).index_put((rows, index.expand(new.shape[0], -1)), new.transpose(1, 2)).transpose(1, 2)


class Ring(Slot):
    """The last ``capacity`` tokens of each row: token ``p`` lies at place ``p % capacity``.

    A call's own tokens are attended to in full (a long prompt's early queries need keys that its
    late ones overwrite), then the ring keeps the last ones.

        ring keys ─┐
                   ├─► concatenated ──► attention
        new keys ──┤
                   └─► the newest per place ──► ring
    """

    def __init__(self, clock: Clock, window: int, slack: int):
        self.clock, self.window, self.capacity = clock, window, window + slack
        self.layout = f"ring:{self.capacity}"
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._index: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """[b g s k], the whole ring in storage order (None before the first call)."""
        return self._keys

    @property
    def values(self) -> Tensor | None:
        """[b g s k], the whole ring in storage order (None before the first call)."""
        return self._values

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, g, _ = k.shape
        if self._index is None:
            self._make(k, v)
            self._index = torch.full((b, self.capacity), -1, device=k.device)
        # Places beyond what a row holds (left by rewinding, or padding of a ragged call) do not exist.
        held = torch.tensor(self.clock.lengths, device=k.device)[:, None]
        old_index = torch.where(self._index < held, self._index, -1)
        fresh = index.expand(b, t)
        if max(self.clock.lengths) == 0:
            keys, values, places = k.transpose(1, 2), v.transpose(1, 2), index
        else:
            old_keys, old_values = self._kept(k.dtype)
            keys = torch.cat([old_keys, k.transpose(1, 2)], 2)
            values = torch.cat([old_values, v.transpose(1, 2)], 2)
            places = torch.cat([old_index, fresh], 1)
        # The newest token p of each place r: p = last - (last - r) mod capacity, if it is one of this call's.
        end = held + torch.tensor(self.clock.new, device=k.device)[:, None]
        r = torch.arange(self.capacity, device=k.device)[None]
        newest = end - 1 - (end - 1 - r) % self.capacity
        mine = (newest >= held) & (newest < end)
        source = (newest - held).clamp(0, t - 1)[:, None, :, None]
        pick = mine[:, None, :, None]
        self.clock.overwritten = True
        self._keep(pick, *(x.detach().transpose(1, 2).gather(2, source.expand(b, g, -1, x.shape[3])) for x in (k, v)))
        self._index.copy_(torch.where(mine, newest, old_index))  # in place, as all of it: the buffers may be some rows of larger ones
        return keys, values, places

    def _make(self, k: Tensor, v: Tensor) -> None:
        self._keys, self._values = (x.new_zeros(x.shape[0], x.shape[2], self.capacity, x.shape[3]) for x in (k.detach(), v.detach()))

    def _kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def _keep(self, pick: Tensor, k: Tensor, v: Tensor) -> None:
        """Put what ``k`` and ``v`` [b g s k] hold at the places that are picked."""
        for old, new in zip(self._kept(k.dtype), (k, v), strict=True):
            old.copy_(torch.where(pick, new, old))

    def keeps(self, held: int, n: int) -> bool:
        return n == held or held <= self.capacity  # as long as nothing was overwritten, any beginning is whole

    def forget(self, row: int) -> None:
        if self._index is not None:
            self._index[row] = -1

    def tensors(self) -> dict[str, Tensor]:
        if self._keys is None or self._values is None or self._index is None:
            return {}
        return {"keys": self._keys, "values": self._values, "index": self._index}

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        new = Ring(clock, self.window, self.capacity - self.window)
        if self._keys is not None and self._values is not None and self._index is not None:
            new._keys, new._values, new._index = pick(self._keys), pick(self._values), pick(self._index)
        return new

    def check_rewind(self, lengths: list[int], ks: list[int]) -> None:
        if self._index is None:
            return
        for row, (n, k) in enumerate(zip(lengths, ks, strict=True)):
            if k == 0:
                continue
            # After forgetting k tokens the next query needs the window - 1 tokens before it.
            needed = torch.arange(max(0, n - k - self.window + 1), n - k, device=self._index.device)
            if not torch.isin(needed, self._index[row]).all():
                raise CacheError(
                    f"This cache has a ring of {self.capacity} places for a window of {self.window}, so {k} tokens of a row of {n} can no longer be forgotten. "
                    f"Make the cache with rewind={k} or more."
                )


class Once(Slot):
    """Keys and values of an encoder's output, computed once and kept."""

    layout = "once"

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """[b g s k] (None before the first call)."""
        return self._keys

    @property
    def values(self) -> Tensor | None:
        """[b g s k] (None before the first call)."""
        return self._values

    def once(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self._keys, self._values = make()
        return self._keys, self._values

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._keys is None or self._values is None else {"keys": self._keys, "values": self._values}

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        new = Once()
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys), pick(self._values)
        return new


class Shelf(Once):
    """Keys and values of encoders' outputs in buffers of fixed size: every row's source is put there when its own first call comes."""

    layout = "shelf"

    def __init__(self, clock: Clock, room: int):
        super().__init__()
        self.clock, self.room = clock, room

    def once(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None or self.clock.filling:
            keys, values = make()
            if self._keys is None or self._values is None:
                self._keys, self._values = (x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values))
            self._keys[:, :, : keys.shape[2]], self._values[:, :, : values.shape[2]] = keys.detach(), values.detach()
            return keys, values
        n = max(self.clock.sources)
        return self._keys[:, :, :n], self._values[:, :, :n]

    def of_row(self, row: int, n: int, sources: int) -> list[Tensor]:
        return [x[row, :, :sources] for x in self.tensors().values()]

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        new = Shelf(clock, self.room)
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys), pick(self._values)
        return new


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
        for r in rows:
            if not 0 <= r < self.batch:
                raise CacheError(f"This cache has {self.batch} rows, so there is no row {r}.")
        clock = Clock(len(rows))
        clock.lengths = [self.clock.lengths[r] for r in rows]
        clock.sources = [self.clock.sources[r] for r in rows]

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, torch.tensor(list(rows), device=x.device, dtype=torch.long))

        return Cache(clock, [{k: s.rearranged(clock, pick) for k, s in layer.items()} for layer in self.layers], self.capacity)

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
