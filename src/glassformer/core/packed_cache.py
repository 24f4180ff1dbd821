"""Keys and values in fewer bits: the same slots, which hold a shorter form and give back the model's own.

    k, v [b t g k] ──► pack ──► bfloat16 [b g s k]                            ──► unpack ──► keys, values [b g s k]
                            └─► int8 [b g s k] and a scale per vector [b g s 1] ─┘

``packed(model.cache(...), "int8")`` takes 1 + 4 / k bytes per number where float32 takes 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import Cache, Clock, Dense, Pick, Ring, Slot
from .errors import CacheError

FORMS = ("bfloat16", "int8")
"""Shorter forms in which keys and values can be held."""


def pack(x: Tensor, form: str) -> list[Tensor]:
    """``x`` [.. k] in a shorter form: as bfloat16, or as int8 with a scale per vector, ``round(127 x / max|x|)`` and ``max|x| / 127``.

    int8 is off by at most half a step, ``max|x| / 254``; bfloat16 by at most one part in 256.
    """
    if form == "bfloat16":
        return [x.to(torch.bfloat16)]
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return [torch.where(scale > 0, x.float() / scale, 0.0).round_().to(torch.int8), scale]


def unpack(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """What :func:`pack` was given, nearly."""
    return parts[0].to(dtype) if len(parts) == 1 else (parts[0] * parts[1]).to(dtype)


class _Packed:
    """Keys and values in a shorter form: each one or two buffers with rows on axis 0 and places on axis 2."""

    def __init__(self, form: str) -> None:
        self.form, self.dtype = form, torch.float32
        self.parts: dict[str, list[Tensor]] = {}

    def make(self, k: Tensor, v: Tensor, capacity: int) -> None:
        self.dtype = k.dtype
        for name, x in (("keys", k), ("values", v)):
            one = pack(x.detach()[:, :1].transpose(1, 2), self.form)
            self.parts[name] = [p.new_zeros(p.shape[0], p.shape[1], capacity, p.shape[3]) for p in one]

    def named(self) -> dict[str, Tensor]:
        return {name + "_scale" * i: part for name, parts in self.parts.items() for i, part in enumerate(parts)}

    def scratch(self) -> int:
        """Bytes of what :func:`unpack` makes of all places of the keys and the values, in between included."""
        numbers, size = [parts[0].numel() for parts in self.parts.values()], self.dtype.itemsize
        if self.form == "bfloat16":
            return 0 if self.dtype == torch.bfloat16 else sum(numbers) * size
        # A product with its scale is float32 first: for a model of another type that is a second copy, of the one that is being unpacked.
        return sum(numbers) * size + (0 if self.dtype == torch.float32 else max(numbers, default=0) * 4)

    def picked(self, pick: Pick, filled: int | None) -> _Packed:
        new = _Packed(self.form)
        new.dtype, new.parts = self.dtype, {name: [pick(p, filled) for p in parts] for name, parts in self.parts.items()}
        return new

    def read(self, name: str, end: int | None = None) -> Tensor | None:
        return unpack([p[:, :, :end] for p in self.parts[name]], self.dtype) if self.parts else None


class PackedDense(Dense):
    """A dense slot that holds keys and values in a shorter form (see :func:`pack`) and gives them back in the model's own."""

    def __init__(self, clock: Clock, capacity: int, packed: _Packed):
        super().__init__(clock, capacity)
        self._packed = packed

    @property
    def keys(self) -> Tensor | None:
        return self._packed.read("keys", max(self.clock.lengths))

    @property
    def values(self) -> Tensor | None:
        return self._packed.read("values", max(self.clock.lengths))

    def reserve(self, k: Tensor, v: Tensor) -> None:
        """Nobody writes into these but :meth:`update`."""

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start, end = max(self.clock.lengths), max(self.clock.lengths) + k.shape[1]
        if not self._packed.parts:
            self._packed.make(k, v, self.capacity)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for name, x in (("keys", k), ("values", v)):
            for buffer, new in zip(self._packed.parts[name], pack(x.detach(), self._packed.form), strict=True):
                if self.clock.uniform:
                    buffer[:, :, start:end] = new.transpose(1, 2)
                else:
                    buffer.transpose(1, 2)[rows, index] = new
        places = index if start == 0 and index.ndim == 1 else torch.arange(end, device=k.device)
        keys, values = self._packed.read("keys", end), self._packed.read("values", end)
        assert keys is not None
        assert values is not None
        return keys, values, places

    def tensors(self) -> dict[str, Tensor]:
        return self._packed.named()

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        return PackedDense(clock, self.capacity, self._packed.picked(pick, self._filled))


class PackedRing(Ring):
    """A ring that holds keys and values in a shorter form (see :func:`pack`); a call's own tokens are attended to as they are."""

    def __init__(self, clock: Clock, window: int, slack: int, packed: _Packed):
        super().__init__(clock, window, slack)
        self._packed = packed

    @property
    def keys(self) -> Tensor | None:
        return self._packed.read("keys")

    @property
    def values(self) -> Tensor | None:
        return self._packed.read("values")

    def _make(self, k: Tensor, v: Tensor) -> None:
        self._packed.make(k, v, self.capacity)

    def _kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self._packed.read("keys"), self._packed.read("values")
        assert keys is not None
        assert values is not None
        return keys, values

    def _keep(self, to: Any, k: Tensor, v: Tensor) -> None:
        for name, x in (("keys", k), ("values", v)):
            for old, new in zip(self._packed.parts[name], pack(x, self._packed.form), strict=True):
                old.transpose(1, 2)[to] = new

    def tensors(self) -> dict[str, Tensor]:
        return {} if self._index is None else {**self._packed.named(), "index": self._index}

    def rearranged(self, clock: Clock, pick: Pick) -> Slot:
        new = PackedRing(clock, self.window, self.capacity - self.window, self._packed.picked(pick, None))
        new._index = None if self._index is None else pick(self._index, None)
        return new


def scratch(cache: Cache) -> int:
    """Bytes that a call unpacks beside the cache, at most: all keys and values of the largest layer, since layers run one after another.

    0 for a cache that is not packed, or has no memory yet.
    """
    return max((slot._packed.scratch() for layer in cache.layers for slot in layer.values() if isinstance(slot, PackedDense | PackedRing)), default=0)


def packed(cache: Cache, form: str) -> Cache:
    """The cache, holding the keys and values of tokens as ``"bfloat16"`` or ``"int8"``; an encoder's stay as they are.

    Raises :class:`CacheError` for another form, a cache that holds tokens already, and one that grows.
    """
    if form not in FORMS:
        raise CacheError(f"A cache is packed as {' or '.join(FORMS)}; {form!r} was given.")
    if any(slot.tensors() for layer in cache.layers for slot in layer.values()):
        raise CacheError("This cache holds tokens already: pack it before the first call.")
    for layer in cache.layers:
        slot = layer["attn"]
        if type(slot) is Dense:
            layer["attn"] = PackedDense(cache.clock, slot.capacity, _Packed(form))
        elif type(slot) is Ring:
            layer["attn"] = PackedRing(cache.clock, slot.window, slot.capacity - slot.window, _Packed(form))
        else:
            raise CacheError("Only a cache of fixed capacity can be packed: make it with model.cache(capacity=...).")
    return cache
