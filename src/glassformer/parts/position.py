"""Positions: how a transformer, which without them is permutation-equivariant, learns of order.

Three ways, one interface; whatever a position part does not do is the identity:

    added    Sinusoidal, Learned     x + table[position], once, at the embedding
    rotated  Rotary (rotary.py)      q and k turned by angles that grow with position
    biased   ALiBi, T5Buckets        a number per head and distance added to the scores

    embedding ──► position.add ──► stream ──► block ──► q, k ──► position.rotate ──► scores ──► + position.bias

A position part stands in ``Decoder(position=…)`` (added, or a bias that all layers share) or in
``Attention(position=…)`` (rotated, or a bias of the layer's own).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glassformer.core.errors import InputError, SpecError
from glassformer.core.spec import Spec, part

from . import steady


class Position(Spec):
    """A way to tell order."""

    def build(self, d_model: int, n_heads: int, d_head: int) -> PositionLayer:
        """The module for streams of width ``d_model`` and heads of size ``d_head``."""
        raise NotImplementedError

    @property
    def rotates(self) -> bool:
        """Whether queries and keys change."""
        return False

    @property
    def biases(self) -> bool:
        """Whether scores change."""
        return False

    @property
    def adds(self) -> bool:
        """Whether the embedding changes."""
        return False


class PositionLayer(nn.Module):
    """Base of all positions: adds nothing, turns nothing, biases nothing."""

    key: str | None = None
    """Equal keys mean equal tables, so that layers share them within a pass; None means never shared."""

    def add(self, positions: Tensor, x: Tensor) -> Tensor | None:
        """What is added to the embedding, [t d] or [b t d]; None for nothing."""
        return None

    def tables(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for :meth:`rotate`; None for nothing. ``lengths`` [b]: how many places of each row are real (None: all)."""
        return None

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys [b t h k], turned."""
        return x

    def bias(self, q_index: Tensor, k_index: Tensor) -> Tensor | None:
        """A bias [1|b, h, t, s] on the scores; None for nothing."""
        return None


@part
class NoPosition(Position):
    """No positions at all (in a causal model order still shows through the mask, arXiv 2203.16634)."""

    def build(self, d_model: int, n_heads: int, d_head: int) -> PositionLayer:
        return NoPositionLayer()


class NoPositionLayer(PositionLayer):
    """Nothing, in every layer alike."""

    key = "none"


# Added


@part
class Sinusoidal(Position):
    """Fixed sines and cosines of geometrically spaced wavelengths (arXiv 1706.03762, section 3.5).

    ``layout``: ``"interleaved"`` puts sine and cosine of a frequency side by side (the paper),
    ``"halves"`` all sines first (tensor2tensor, Marian).
    """

    base: float = 10_000.0
    layout: str = "interleaved"

    def __post_init__(self) -> None:
        _check_layout("Sinusoidal", self.layout)

    @property
    def adds(self) -> bool:
        return True

    def build(self, d_model: int, n_heads: int, d_head: int) -> SinusoidalLayer:
        return SinusoidalLayer(self, d_model)


class SinusoidalLayer(PositionLayer):
    """``pe[p, 2i] = sin(p / base^(2i/d))``, ``pe[p, 2i+1] = cos(p / base^(2i/d))``."""

    def __init__(self, spec: Sinusoidal, d: int):
        super().__init__()
        self.spec, self.d = spec, d

    def add(self, positions: Tensor, x: Tensor) -> Tensor:
        # In float32 an angle of 500 radians is off by 3e-5, and so are its sine and cosine.
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        rates = self.spec.base ** (-torch.arange(0, self.d, 2, device=x.device, dtype=exact) / self.d)
        angles = positions[..., None].to(exact) * rates
        sines, cosines = steady.each(torch.sin, angles), steady.each(torch.cos, angles)
        if self.spec.layout == "halves":
            return torch.cat([sines, cosines[..., : self.d // 2]], -1).to(x.dtype)
        return torch.stack([sines, cosines], -1).flatten(-2)[..., : self.d].to(x.dtype)


@part
class Learned(Position):
    """A learned vector per position (arXiv 1705.03122; GPT-2, BERT). ``offset`` rows stand before position 0 (OPT: 2)."""

    max_positions: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.max_positions < 1 or self.offset < 0:
            raise SpecError(f"Learned(max_positions={self.max_positions}, offset={self.offset}): there is at least one position, and no row is missing.")

    @property
    def adds(self) -> bool:
        return True

    def build(self, d_model: int, n_heads: int, d_head: int) -> LearnedLayer:
        return LearnedLayer(self, d_model)


class LearnedLayer(PositionLayer):
    """``table[offset + position]``; the table is [max_positions + offset, d]."""

    def __init__(self, spec: Learned, d: int):
        super().__init__()
        self.spec = spec
        self.table = nn.Parameter(torch.empty(spec.max_positions + spec.offset, d))

    def add(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.table[positions + self.spec.offset]

    def check(self, last: int) -> None:
        """Raise :class:`InputError` if a position lies beyond the table."""
        if last >= self.spec.max_positions:
            raise InputError(
                f"This model has learned {self.spec.max_positions} positions, but position {last} was asked for: "
                f"shorten the text to {self.spec.max_positions} tokens."
            )


# Biased


@part
class ALiBi(Position):
    """A penalty proportional to distance, with a fixed slope per head (arXiv 2108.12409)."""

    @property
    def biases(self) -> bool:
        return True

    def build(self, d_model: int, n_heads: int, d_head: int) -> ALiBiLayer:
        return ALiBiLayer(n_heads)


class ALiBiLayer(PositionLayer):
    """``bias[h, q, s] = -slope_h * |q - s|``; slopes ``2^(-8 i / n)`` for a power of two of heads, interleaved otherwise."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.key = f"alibi:{n_heads}"

    def slopes(self) -> list[float]:
        """One slope per head."""

        def power_of_two(n: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

        n = 2 ** int(math.log2(self.n_heads))
        return power_of_two(n) + power_of_two(2 * n)[0::2][: self.n_heads - n]

    def bias(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        slopes = torch.tensor(self.slopes(), device=q_index.device)[:, None, None]
        return -slopes * _distance(q_index, k_index)[:, None].abs().float()


@part
class T5Buckets(Position):
    """A learned bias per head and bucket of distance; near distances have buckets of their own, far ones share (T5, arXiv 1910.10683)."""

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self) -> None:
        least = 4 if self.bidirectional else 2
        if self.buckets < least:
            raise SpecError(f"T5Buckets(buckets={self.buckets}): with bidirectional={self.bidirectional} at least {least} are needed.")
        exact = self.buckets // least
        if self.max_distance <= exact:
            raise SpecError(f"T5Buckets(max_distance={self.max_distance}): the first {exact} distances have buckets of their own, so it lies above {exact}.")

    @property
    def biases(self) -> bool:
        return True

    def build(self, d_model: int, n_heads: int, d_head: int) -> T5BucketsLayer:
        return T5BucketsLayer(self, n_heads)


class T5BucketsLayer(PositionLayer):
    """``bias[h, q, s] = table[bucket(s - q), h]``; exact below half the buckets, logarithmic up to ``max_distance``."""

    def __init__(self, spec: T5Buckets, n_heads: int):
        super().__init__()
        self.spec = spec
        self.table = nn.Parameter(torch.empty(spec.buckets, n_heads))
        # Never shared between layers: the table is this layer's own, and a gradient must find the
        # look-up inside the layer that did it (activation checkpointing computes it again there).
        self.key = None

    def bucket(self, offset: Tensor) -> Tensor:
        """The bucket of ``s - q``."""
        n, base = self.spec.buckets, torch.zeros_like(offset)
        if self.spec.bidirectional:
            n //= 2
            base = (offset > 0).long() * n
            distance = offset.abs()
        else:
            distance = (-offset).clamp(min=0)
        exact = n // 2
        far = exact + (steady.each(torch.log, distance.float().clamp(min=1) / exact) / math.log(self.spec.max_distance / exact) * (n - exact)).long()
        return base + torch.where(distance < exact, distance, far.clamp(max=n - 1))

    def bias(self, q_index: Tensor, k_index: Tensor) -> Tensor:
        return self.table[self.bucket(-_distance(q_index, k_index))].movedim(-1, 1)


def _distance(q_index: Tensor, k_index: Tensor) -> Tensor:
    """``q - s`` for every query and key place, [1|b, t, s]."""
    q = q_index if q_index.ndim == 2 else q_index[None]
    s = k_index if k_index.ndim == 2 else k_index[None]
    return q[:, :, None] - s[:, None, :]


def _check_layout(name: str, layout: str) -> None:
    if layout not in ("interleaved", "halves"):
        raise SpecError(f"{name}(layout={layout!r}): layout is 'interleaved' (the paper) or 'halves' (tensor2tensor).")
