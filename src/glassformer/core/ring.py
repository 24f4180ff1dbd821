"""The last tokens of each row, for a layer that looks no further back than its window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import CacheError
from .slots import Clock, Pick, Slot


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
        b, t, _, _ = k.shape
        if self._index is None:
            self._make(k, v)
            self._index = torch.full((b, self.capacity), -1, device=k.device)
        fresh = index.expand(b, t)
        if max(self.clock.lengths) == 0:
            keys, values, places = k.transpose(1, 2), v.transpose(1, 2), index
        else:
            # Places beyond what a row holds (left by rewinding) do not exist until they are written again.
            held = torch.tensor(self.clock.lengths, device=k.device)[:, None]
            old_keys, old_values = self._kept(k.dtype)
            keys = torch.cat([old_keys, k.transpose(1, 2)], 2)
            values = torch.cat([old_values, v.transpose(1, 2)], 2)
            places = torch.cat([torch.where(self._index < held, self._index, -1), fresh], 1)
        self.clock.overwritten = True
        for to, of in self._spots(t, k.device):
            self._keep(to, k.detach()[of], v.detach()[of])
            self._index[to] = fresh[of]  # in place, as all of it: the buffers may be some rows of larger ones
        return keys, values, places

    def _spots(self, t: int, device: torch.device) -> list[tuple[Any, Any]]:
        """Where the running call's newest tokens go: places of the ring [b s], and which of the call's columns [b t] go there."""
        lengths, new, most = self.clock.lengths, self.clock.new, self.capacity
        every = slice(None)
        if self.clock.uniform:
            column, found = max(0, t - most), []
            while column < t:
                place = (lengths[0] + column) % most
                n = min(t - column, most - place)
                found.append(((every, slice(place, place + n)), (every, slice(column, column + n))))
                column += n
            return found
        spots = [(row, (held + i) % most, i) for row, (held, n) in enumerate(zip(lengths, new, strict=True)) for i in range(max(0, n - most), n)]
        rows, places, columns = torch.tensor(spots, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
        return [((rows, places), (rows, columns))]

    def _make(self, k: Tensor, v: Tensor) -> None:
        self._keys, self._values = (x.new_zeros(x.shape[0], x.shape[2], self.capacity, x.shape[3]) for x in (k.detach(), v.detach()))

    def _kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def _keep(self, to: Any, k: Tensor, v: Tensor) -> None:
        """Put keys and values, [.. g k], to these places of the ring (an index of [b s])."""
        for old, new in zip(self._kept(k.dtype), (k, v), strict=True):
            old.transpose(1, 2)[to] = new

    def keeps(self, held: int, n: int) -> bool:
        return n == held or held <= self.capacity  # as long as nothing was overwritten, any beginning is whole

    def forget(self, row: int) -> None:
        if self._index is not None:
            self._index[row] = -1

    def tensors(self) -> dict[str, Tensor]:
        if self._keys is None or self._values is None or self._index is None:
            return {}
        return {"keys": self._keys, "values": self._values, "index": self._index}

    def of_row(self, row: int, n: int, sources: int, since: int = 0) -> list[Tensor]:
        return [x[row] if name == "index" else x[row, :, :n] for name, x in self.tensors().items()]

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        new = Ring(clock, self.window, self.capacity - self.window)
        if self._keys is not None and self._values is not None and self._index is not None:
            new._keys, new._values, new._index = pick(self._keys, None), pick(self._values, None), pick(self._index, None)
        return new

    def check_rewind(self, lengths: list[int], ks: list[int]) -> None:
        if self._index is None:
            return
        # After forgetting k tokens the next query needs the window - 1 tokens before it. The oldest is overwritten first, so it answers for all.
        asked = [(row, max(0, n - k - self.window + 1), n, k) for row, (n, k) in enumerate(zip(lengths, ks, strict=True)) if k]
        asked = [(row, oldest, n, k) for row, oldest, n, k in asked if oldest < n - k]
        found = self._index[[row for row, *_ in asked], [oldest % self.capacity for _, oldest, *_ in asked]].tolist()
        for (_, oldest, n, k), there in zip(asked, found, strict=True):
            if there != oldest:
                raise CacheError(
                    f"This cache has a ring of {self.capacity} places for a window of {self.window}, so {k} tokens of a row of {n} can no longer be forgotten. "
                    f"Make the cache with rewind={k} or more."
                )
