"""The cache: keys and values of the tokens that a model has already read.

    cache  = model.cache(batch=1, capacity=512)
    logits = model(prompt, cache=cache)          # prefill: writes, attends
    logits = model(next_token, cache=cache)      # decode: the same code, another slot

Every attention layer has a slot. Its kind follows the layer's mask:

    no cache ──► NoCache    hands its arguments back
    causal   ──► Dense      [b g capacity k], written at each row's own place
    window   ──► Ring       only the last ``window`` places (and a little slack for rewinding)
    cross    ──► Once       the encoder's keys and values, computed on the first call
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

    def check_rewind(self, lengths: list[int], k: int) -> None:
        """Raise :class:`CacheError` if the last ``k`` tokens cannot be forgotten."""


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

    def _buffer(self, x: Tensor) -> Tensor:
        b, _, g, d = x.shape
        return torch.zeros(b, g, self.capacity, d, dtype=x.dtype, device=x.device)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._keys is None or self._values is None else {"keys": self._keys, "values": self._values}

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
        if self._keys is None or self._values is None or self._index is None:
            self._keys = torch.zeros(b, g, self.capacity, k.shape[3], dtype=k.dtype, device=k.device)
            self._values = torch.zeros(b, g, self.capacity, v.shape[3], dtype=v.dtype, device=v.device)
            self._index = torch.full((b, self.capacity), -1, device=k.device)
        # Places beyond what a row holds (left by rewinding, or padding of a ragged call) do not exist.
        held = torch.tensor(self.clock.lengths, device=k.device)[:, None]
        old_index = torch.where(self._index < held, self._index, -1)
        fresh = index.expand(b, t)
        if max(self.clock.lengths) == 0:
            keys, values, places = k.transpose(1, 2), v.transpose(1, 2), index
        else:
            keys = torch.cat([self._keys, k.transpose(1, 2)], 2)
            values = torch.cat([self._values, v.transpose(1, 2)], 2)
            places = torch.cat([old_index, fresh], 1)
        # The newest token p of each place r: p = last - (last - r) mod capacity, if it is one of this call's.
        end = held + torch.tensor(self.clock.new, device=k.device)[:, None]
        r = torch.arange(self.capacity, device=k.device)[None]
        newest = end - 1 - (end - 1 - r) % self.capacity
        mine = (newest >= held) & (newest < end)
        source = (newest - held).clamp(0, t - 1)[:, None, :, None]
        pick = mine[:, None, :, None]
        self.clock.overwritten = True
        self._keys = torch.where(pick, k.detach().transpose(1, 2).gather(2, source.expand(b, g, -1, k.shape[3])), self._keys)
        self._values = torch.where(pick, v.detach().transpose(1, 2).gather(2, source.expand(b, g, -1, v.shape[3])), self._values)
        self._index = torch.where(mine, newest, old_index)
        return keys, values, places

    def tensors(self) -> dict[str, Tensor]:
        if self._keys is None or self._values is None or self._index is None:
            return {}
        return {"keys": self._keys, "values": self._values, "index": self._index}

    def rearranged(self, clock: Clock, pick: Callable[[Tensor], Tensor]) -> Slot:
        new = Ring(clock, self.window, self.capacity - self.window)
        if self._keys is not None and self._values is not None and self._index is not None:
            new._keys, new._values, new._index = pick(self._keys), pick(self._values), pick(self._index)
        return new

    def check_rewind(self, lengths: list[int], k: int) -> None:
        if self._index is None:
            return
        for row, n in enumerate(lengths):
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


class Cache:
    """The slots of all layers and the length of every row (made by ``model.cache(...)``)."""

    def __init__(self, clock: Clock, layers: Sequence[dict[str, Slot]], capacity: int | None):
        self.clock, self.capacity = clock, capacity
        self.layers = tuple(layers)

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

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, torch.tensor(list(rows), device=x.device, dtype=torch.long))

        return Cache(clock, [{k: s.rearranged(clock, pick) for k, s in layer.items()} for layer in self.layers], self.capacity)

    def rewind(self, k: int) -> None:
        """Forget the last ``k`` tokens of every row."""
        self._check_whole()
        if k < 0 or k > min(self.clock.lengths):
            raise CacheError(f"Cannot forget {k} tokens: the shortest row holds {min(self.clock.lengths)}.")
        for layer in self.layers:
            for slot in layer.values():
                slot.check_rewind(self.clock.lengths, k)
        self.clock.lengths = [n - k for n in self.clock.lengths]

    def __repr__(self) -> str:
        return f"Cache({self.batch} rows, lengths {self.clock.lengths}, capacity {self.capacity}, {len(self.layers)} layers, {self.bytes:,} bytes)"
