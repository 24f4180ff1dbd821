"""What each attention layer holds in a cache, by the kind of its mask (see :mod:`.cache`; the ring of a window is in :mod:`.ring`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[[Tensor, int | None], Tensor]
"""Some rows of a buffer. The number says how many of its places (axis 2) are filled, None: all."""


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

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        """A slot whose rows are ``pick(tensor, filled)``."""
        return self

    def part(self, clock: Clock, first: int, last: int) -> Slot:
        """A slot over rows ``first`` to ``last`` (not included) of the same memory: ``clock`` counts them."""
        return self.rearranged(clock, lambda x, _: x[first:last])

    def of_row(self, row: int, n: int, sources: int, since: int = 0) -> list[Tensor]:
        """Where the first ``n`` tokens of a row, or the first ``sources`` places of its source, lie: pieces of the buffers, to read and to write.

        With ``since`` as many of its first tokens, and its source, may be left out.
        """
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

    def of_row(self, row: int, n: int, sources: int, since: int = 0) -> list[Tensor]:
        return [x[row, :, since:n] for x in self.tensors().values()]

    @property
    def _filled(self) -> int | None:
        """How many places of the buffers count."""
        return max(self.clock.lengths)

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        new = type(self)(clock, self.capacity)
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys, self._filled), pick(self._values, self._filled)
        return new


class Growing(Dense):
    """A dense slot that grows by concatenation, so that gradients flow through the cached tokens too."""

    _filled = None

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

    def of_row(self, row: int, n: int, sources: int, since: int = 0) -> list[Tensor]:
        return [] if since else super().of_row(row, n, sources)

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        new = Once()
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys, None), pick(self._values, None)
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

    def of_row(self, row: int, n: int, sources: int, since: int = 0) -> list[Tensor]:
        return [] if since else [x[row, :, :sources] for x in self.tensors().values()]

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        new = Shelf(clock, self.room)
        if self._keys is not None and self._values is not None:
            new._keys, new._values = pick(self._keys, None), pick(self._values, None)
        return new
