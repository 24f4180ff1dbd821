"""Rotary positions: pairs of features of queries and keys turn by ``position * frequency`` (RoFormer, arXiv 2104.09864).

    base, scaling ──► frequencies ─┐
                                   ├─► angles ──► cos, sin ─┐
    positions ─────────────────────┘                        ├─► turned q, k
                                         q, k ──────────────┘

A scaling stretches a trained context by changing the frequencies. Most do so once and for all; two look at how
long the pass at hand is:

    LinearScaling      every frequency divided by a factor
    NTKScaling         a larger base: the slowest divided, the fastest kept
    DynamicNTKScaling  the same, by no more than the pass at hand needs
    YaRNScaling        slow ones divided, fast ones kept, a blend between, and sharper attention
    Llama3Scaling      the same idea by wavelength
    LongRope           a divisor per frequency, found by search: one list for short passes, one for long
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glassformer.core.errors import SpecError
from glassformer.core.spec import Spec, part

from . import decoding, steady
from .position import Position, PositionLayer


class RopeScaling(Spec):
    """A change of RoPE's frequencies that stretches a trained context."""

    def frequencies(self, base: float, dim: int) -> Tensor:
        """Radians per position, [dim / 2]; or what :meth:`fit` chooses from."""
        raise NotImplementedError

    def fit(self, frequencies: Tensor, positions: Tensor, lengths: Tensor | None) -> Tensor:
        """The frequencies for a pass at ``positions`` [t] or [b t], ``lengths`` [b] of which are real: [dim / 2] or [1|b, 1, dim / 2]."""
        return frequencies

    @property
    def magnitude(self) -> float:
        """A factor on the rotated queries and keys."""
        return 1.0

    @property
    def boundary(self) -> int | None:
        """The length of a row beyond which the keys of a shorter one do not fit any more; None if they always do."""
        return None


def _check_factor(name: str, factor: float) -> None:
    if factor <= 0:
        raise SpecError(f"{name}(factor={factor}): a context is stretched by a factor above 0.")


def _check_context(name: str, context: int) -> None:
    if context < 2:
        raise SpecError(f"{name}(original_context={context}): the context that was trained has 2 places or more.")


def _plain_frequencies(base: float, dim: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


@part
class Unscaled(RopeScaling):
    """``f_i = base^(-2i/dim)`` (arXiv 2104.09864)."""

    def frequencies(self, base: float, dim: int) -> Tensor:
        return _plain_frequencies(base, dim)


@part
class LinearScaling(RopeScaling):
    """Position interpolation: all frequencies divided by ``factor`` (arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor("LinearScaling", self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        return _plain_frequencies(base, dim) / self.factor


@part
class NTKScaling(RopeScaling):
    """The base grows so that the slowest frequency is divided by ``factor`` and the fastest stays: ``base * factor^(dim / (dim - 2))``."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor("NTKScaling", self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        return _plain_frequencies(base * self.factor ** (dim / (dim - 2)), dim)


def _reach(positions: Tensor, lengths: Tensor | None) -> Tensor:
    """One more than the last real position, [1, 1] or per row [b, 1, 1]: how long a context the pass reaches into.

    Each row counts its own places, so that neither its neighbours nor what pads it changes a row.
    """
    if lengths is not None:
        real = torch.arange(positions.shape[-1], device=positions.device) < lengths[:, None]
        positions = torch.where(real, positions, 0)
    return positions.amax(-1, keepdim=True)[..., None] + 1


@part
class DynamicNTKScaling(RopeScaling):
    """NTK scaling by no more than the pass needs (arXiv 2309.00071, section 3.3): within ``original_context`` places nothing changes, then the base grows.

    A pass that reaches into a context of ``n`` places has the base ``base * (factor * n / original_context - factor + 1)^(dim / (dim - 2))``.

    Keys in a cache stay as they were turned: beyond the original context they were so by smaller bases, and a row read
    piece by piece differs a little from the same row read at once. It does in the published code too. That also keeps the
    largest base that a model has ever needed; here a pass depends on nothing but itself.
    """

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_factor("DynamicNTKScaling", self.factor)
        _check_context("DynamicNTKScaling", self.original_context)

    def frequencies(self, base: float, dim: int) -> Tensor:
        return _plain_frequencies(base, dim)

    def fit(self, frequencies: Tensor, positions: Tensor, lengths: Tensor | None) -> Tensor:
        n = _reach(positions, lengths).clamp(min=self.original_context)
        if steady.on():
            if int(n.max()) > self.original_context:
                steady.refuse(f"DynamicNTKScaling turns keys beyond {self.original_context} places by how long the call is, which cannot be had")
            return frequencies
        stretch = self.factor * n / self.original_context - (self.factor - 1)
        # (base s^(dim / (dim - 2)))^(-2i / dim) = base^(-2i / dim) s^(-2i / (dim - 2)): exactly the plain ones at s = 1.
        i = torch.arange(frequencies.shape[-1], device=frequencies.device, dtype=torch.float32)
        return frequencies * stretch ** (-i / max(frequencies.shape[-1] - 1, 1))


@part
class YaRNScaling(RopeScaling):
    """Interpolate slow frequencies, keep fast ones, blend between (YaRN, arXiv 2309.00071).

    A frequency that turns more than ``beta_fast`` times within the original context is kept, one
    that turns less than ``beta_slow`` times is divided by ``factor``, linear in the index between.
    ``attention_factor`` scales q and k (None: ``0.1 ln(factor) + 1``).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor("YaRNScaling", self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        def index_of(turns: float) -> float:
            return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        plain = _plain_frequencies(base, dim)
        return plain / self.factor * ramp + plain * (1 - ramp)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@part
class Llama3Scaling(RopeScaling):
    """Long wavelengths divided by ``factor``, short ones kept, a smooth blend between (Llama 3.1, arXiv 2407.21783)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8_192

    def __post_init__(self) -> None:
        _check_factor("Llama3Scaling", self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        plain = _plain_frequencies(base, dim)
        wavelength = 2 * math.pi / plain
        smooth = (self.original_context / wavelength - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * plain / self.factor + smooth * plain


@part
class LongRope(RopeScaling):
    """A divisor of its own for every frequency: ``short`` ones for passes within ``original_context`` places, ``long`` ones beyond (arXiv 2402.13753; Phi-3).

    ``factor``: by how much the context was stretched, from which follows how much q and k are scaled:
    ``sqrt(1 + ln(factor) / ln(original_context))``, or ``attention_factor`` where it is given.

    Short and long angles do not go together: keys in a cache stay as they were turned. A row that grows beyond the
    original context is to be read once more, whole, into a new cache; then cached = uncached again. Generation does so
    by itself (as the published code's loop does); a model alone that is given the old cache mixes the two.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_factor("LongRope", self.factor)
        _check_context("LongRope", self.original_context)
        if len(self.short) != len(self.long):
            raise SpecError(f"LongRope has {len(self.short)} short and {len(self.long)} long divisors: one of each per frequency.")
        if not all(f > 0 for f in self.short + self.long):
            raise SpecError(f"LongRope has the divisor {min(self.short + self.long)}: frequencies are divided by numbers above 0.")

    def frequencies(self, base: float, dim: int) -> Tensor:
        if len(self.short) != dim // 2:
            raise SpecError(f"LongRope has {len(self.short)} divisors, but {dim} rotated features have {dim // 2} frequencies: one for each.")
        return _plain_frequencies(base, dim) / torch.tensor([self.short, self.long])

    def fit(self, frequencies: Tensor, positions: Tensor, lengths: Tensor | None) -> Tensor:
        return torch.where(_reach(positions, lengths) > self.original_context, frequencies[1], frequencies[0])

    @property
    def boundary(self) -> int:
        return self.original_context

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context)) if self.factor > 1 else 1.0


@part
class Rotary(Position):
    """Rotary position embedding: pairs of features turn by ``position * frequency`` (RoFormer, arXiv 2104.09864).

    A score then depends on positions only through their difference (up to rounding).
    ``fraction`` of each head turns (NeoX 0.25). ``layout``: ``"half"`` pairs feature ``i`` with
    ``i + dim/2`` (Llama, NeoX), ``"interleaved"`` pairs ``2i`` with ``2i + 1`` (the paper, GPT-J).
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: str = "half"
    scaling: RopeScaling = Unscaled()

    def __post_init__(self) -> None:
        if self.layout not in ("half", "interleaved"):
            raise SpecError(f"Rotary(layout={self.layout!r}): layout is 'half' (Llama) or 'interleaved' (GPT-J).")
        if not self.base > 0:
            raise SpecError(f"Rotary(base={self.base}): the base lies above 0 (10,000 in arXiv 2104.09864).")
        if not 0 < self.fraction <= 1:
            raise SpecError(f"Rotary(fraction={self.fraction}): a fraction lies above 0 and is at most 1.")

    @property
    def rotates(self) -> bool:
        return True

    def build(self, d_model: int, n_heads: int, d_head: int) -> RotaryLayer:
        return RotaryLayer(self, d_head)


class RotaryLayer(PositionLayer):
    """``(x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a)`` with ``a = position * frequency``."""

    def __init__(self, spec: Rotary, d_head: int):
        super().__init__()
        self.spec = spec
        self.dim = int(d_head * spec.fraction)
        if self.dim % 2 or self.dim == 0:
            raise SpecError(f"Rotary turns pairs, but fraction {spec.fraction} of d_head {d_head} is {self.dim} features: choose an even number of them.")
        self.d_head = d_head
        self.key = f"{spec!r}:{d_head}"
        # Computed on the processor and moved: the same bits on every device. Not a buffer: it
        # follows from the Spec, so it is neither saved nor cast with the weights.
        with torch.device("cpu"):
            self._frequencies = {"cpu": spec.scaling.frequencies(spec.base, self.dim)}

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, [dim / 2] in float32 (or what the scaling chooses from)."""
        name = str(device)
        if name not in self._frequencies:
            self._frequencies[name] = self._frequencies["cpu"].to(device)
        return self._frequencies[name]

    def tables(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.spec.scaling.fit(self.frequencies(positions.device), positions, lengths)
        angles = torch.cat([angles, angles], -1) if self.spec.layout == "half" else angles.repeat_interleave(2, -1)
        m = self.spec.scaling.magnitude
        return steady.each(torch.cos, angles) * m, steady.each(torch.sin, angles) * m

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        assert tables is not None
        quick = decoding.turn(x, tables, self.spec.layout == "half")
        if quick is not None:
            return quick
        cos, sin = (t[..., None, :].to(x.dtype) for t in tables)  # [t 1 dim] or [b t 1 dim]
        turned, rest = (x, None) if self.dim == self.d_head else (x[..., : self.dim], x[..., self.dim :])
        turned = turned * cos + self._quarter(turned) * sin
        return turned if rest is None else torch.cat([turned, rest], -1)

    def _quarter(self, x: Tensor) -> Tensor:
        """Every pair turned by a quarter: (x1, x2) -> (-x2, x1)."""
        if self.spec.layout == "half":
            x1, x2 = x.chunk(2, -1)
            return torch.cat([-x2, x1], -1)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
