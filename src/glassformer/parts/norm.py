"""Norms: what keeps the stream's size in hand.

LayerNorm   y = w * (x - mean) / sqrt(var + eps) + b
RMSNorm     y = w * x / sqrt(mean(x^2) + eps)
DynamicTanh y = w * tanh(alpha * x) + b
NoNorm      y = x

Queries and keys are normed head by head, or by ``Joint`` all heads at once:

    q [.. h k] ──► norm each [k]                       RMSNorm()
    q [.. h k] ──► [.. (h k)] ──► norm ──► [.. h k]    Joint(RMSNorm())
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core.errors import SpecError
from glassformer.core.flow import Pass
from glassformer.core.numerics import wide
from glassformer.core.sites import SCALE, Site
from glassformer.core.spec import Spec, part

from . import decoding, steady


class Norm(Spec):
    """A map of each token's vector to one of controlled size."""

    def build(self, d: int) -> NormLayer:
        """The module for vectors of width ``d``."""
        raise NotImplementedError

    def build_heads(self, n: int, k: int) -> NormLayer:
        """The module for ``n`` heads of size ``k``, [.. n k]: each head by itself, with one weight for all."""
        return self.build(k)


class NormLayer(nn.Module):
    """Base of all norms; ``SITES`` are its observable values, ``constants`` what its parameters start from."""

    SITES: tuple[Site, ...] = ()
    constants: dict[str, float]

    def axes(self, rows: str) -> str:
        """The axes of what is seen when heads with the leading axes ``rows`` (``"b t h"``) are normed."""
        return f"{rows} 1"

    def forward(self, x: Float[Tensor, "*b d"], p: Pass) -> Float[Tensor, "*b d"]:
        raise NotImplementedError


def _check_eps(norm: Any) -> None:
    """Raise :class:`SpecError` for an ``eps`` below zero, under a square root."""
    if not norm.eps >= 0:
        raise SpecError(f"{type(norm).__name__}(eps={norm.eps}): eps stands under a square root and is 0 or more.")


@part
class LayerNorm(Norm):
    """Subtract the mean, divide by the standard deviation, scale and shift (arXiv 1607.06450).

    Per token this is one affine map followed by a fixed one: mean and size are lost, order and
    relative gaps between features stay (until ``weight`` and ``bias``).
    """

    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        _check_eps(self)

    def build(self, d: int) -> LayerNormLayer:
        return LayerNormLayer(d, self.eps, self.bias)


class LayerNormLayer(NormLayer):
    """``y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias``; [.. d] -> [.. d]."""

    SITES = (SCALE,)

    def __init__(self, d: int, eps: float, bias: bool):
        super().__init__()
        self.d, self.eps = d, eps
        self.constants = {"weight": 1.0, "bias": 0.0}
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x: Float[Tensor, "*b d"], p: Pass) -> Float[Tensor, "*b d"]:
        if p.edits(SCALE):
            steady.refuse("A norm's scale cannot be edited")
            centred = wide(x) - wide(x).mean(-1, keepdim=True)
            scale = p.see(SCALE, (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
            y = (centred / scale).to(x.dtype) * self.weight
            return y if self.bias is None else y + self.bias
        # The kernel's third result is 1 / scale; a variance of its own would take as long as eight norms.
        p.offer(SCALE, lambda _: torch.native_layer_norm(wide(x), (self.d,), None, None, self.eps)[2].reciprocal())
        quick = decoding.norm(x, self.weight, self.bias, self.eps)
        if quick is not None:
            return quick
        if steady.on():
            return steady.layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, (self.d,), self.weight, self.bias, self.eps)


@part
class RMSNorm(Norm):
    """Divide by the root mean square and scale (arXiv 1910.07467).

    ``offset``: added to the weight (Gemma stores ``weight - 1``: offset 1). ``cast``: ``"early"``
    returns to the input's type before the weight is multiplied (Llama), ``"late"`` after (Gemma).
    """

    eps: float = 1e-6
    offset: float = 0.0
    cast: str = "early"

    def __post_init__(self) -> None:
        _check_eps(self)
        if self.cast not in ("early", "late"):
            raise SpecError(f"RMSNorm(cast={self.cast!r}): cast is 'early' (Llama) or 'late' (Gemma).")

    def build(self, d: int) -> RMSNormLayer:
        return RMSNormLayer(d, self.eps, self.offset, self.cast == "late")


class RMSNormLayer(NormLayer):
    """``y = (offset + weight) * x / sqrt(mean(x^2) + eps)``, the mean in float32; [.. d] -> [.. d]."""

    SITES = (SCALE,)

    def __init__(self, d: int, eps: float, offset: float, late: bool):
        super().__init__()
        self.d, self.eps, self.offset, self.late = d, eps, offset, late
        self.constants = {"weight": 1.0 - offset}
        self.weight = nn.Parameter(torch.full((d,), 1.0 - offset))

    def forward(self, x: Float[Tensor, "*b d"], p: Pass) -> Float[Tensor, "*b d"]:
        if p.edits(SCALE):
            steady.refuse("A norm's scale cannot be edited")
            y = wide(x) / p.see(SCALE, self._scale(x))
        else:
            p.offer(SCALE, lambda _: self._scale(x))
            quick = decoding.norm(x, self.weight, None, self.eps, rms=True, offset=self.offset, late=self.late)
            if quick is not None:
                return quick
            if steady.on():
                y = steady.rms_norm(x, self.eps)
            elif self.offset == 0 and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
                return F.rms_norm(x, (self.d,), self.weight, self.eps)
            else:
                y = F.rms_norm(wide(x), (self.d,), None, self.eps)
        if self.late:
            return (y * (self.offset + wide(self.weight))).to(x.dtype)
        return y.to(x.dtype) * (self.weight if self.offset == 0 else self.offset + self.weight)

    def _scale(self, x: Tensor) -> Tensor:
        return (wide(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@part
class DynamicTanh(Norm):
    """An element-wise squashing in place of a norm (arXiv 2503.10622)."""

    alpha: float = 0.5

    def build(self, d: int) -> DynamicTanhLayer:
        return DynamicTanhLayer(d, self.alpha)


class DynamicTanhLayer(NormLayer):
    """``y = weight * tanh(alpha * x) + bias`` with a learned scalar ``alpha``; [.. d] -> [.. d]."""

    def __init__(self, d: int, alpha: float):
        super().__init__()
        self.constants = {"alpha": alpha, "weight": 1.0, "bias": 0.0}
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Float[Tensor, "*b d"], p: Pass) -> Float[Tensor, "*b d"]:
        return steady.each(torch.tanh, self.alpha * x) * self.weight + self.bias


@part
class NoNorm(Norm):
    """Leave the vector as it is."""

    def build(self, d: int) -> NoNormLayer:
        return NoNormLayer()


class NoNormLayer(NormLayer):
    """``y = x``."""

    def forward(self, x: Float[Tensor, "*b d"], p: Pass) -> Float[Tensor, "*b d"]:
        return x


@part
class Joint(Norm):
    """One norm over all heads' queries (or keys) as one vector, with a weight per head and feature (OLMo 2, arXiv 2501.00656).

    Heads keep their sizes relative to each other, which a norm per head would make equal. For a vector that has no heads it is ``norm`` itself.
    """

    norm: Norm = RMSNorm()

    def build(self, d: int) -> NormLayer:
        return self.norm.build(d)

    def build_heads(self, n: int, k: int) -> NormLayer:
        return JointLayer(self.norm.build(n * k))


class JointLayer(NormLayer):
    """``y = norm(concat_h(x_h))``, cut into heads again; [.. h k] -> [.. h k]."""

    def __init__(self, norm: NormLayer):
        super().__init__()
        self.norm = norm
        self.SITES = norm.SITES

    def axes(self, rows: str) -> str:
        return f"{rows.rsplit(' ', 1)[0]} 1"

    def forward(self, x: Float[Tensor, "*b h k"], p: Pass) -> Float[Tensor, "*b h k"]:
        joined: Tensor = self.norm(x.flatten(-2), p)
        return joined.view_as(x)
