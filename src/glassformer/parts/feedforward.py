"""Feed-forward layers: each position by itself, widened, bent, narrowed.

plain   x ──► W_in ──► pre ──► act ──► post ──► W_out ──► out

gated   x ─┬► W_up ────► pre ───────────┐
           └► W_gate ──► gate ──► act ──┴─ * ──► post ──► W_out ──► out
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import SpecError, did_you_mean
from glassformer.core.flow import Pass
from glassformer.core.spec import Spec, check_dropout, part

from . import decoding, steady
from .linear import Linear


def _gelu_tanh(x: Tensor) -> Tensor:
    if (quick := decoding.bend("gelu_tanh", x)) is not None:
        return quick
    if torch.compiler.is_compiling():
        # The same function, since 1 + tanh(u) = 2 sigmoid(2u): one exponential in place of a hyperbolic tangent,
        # which on a CPU is half of what a compiled feed-forward layer spends outside its products.
        return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    r = F.relu(x)
    return r * r  # square() is pow(2), whose backward pass is slower than three products


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # exact: x Phi(x), arXiv 1606.08415
    "gelu_tanh": _gelu_tanh,  # GPT-2's approximation by tanh
    "silu": F.silu,  # x sigmoid(x), also called Swish
    "relu2": _relu_squared,  # arXiv 2109.08668
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": _identity,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name; raises :class:`SpecError` with the nearest ones."""
    if name not in ACTIVATIONS:
        raise SpecError(f"No activation is named {name!r}.{did_you_mean(name, ACTIVATIONS)} Known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class FeedForward(Spec):
    """A map applied to every position alike."""

    @property
    def name(self) -> str:
        """The part's name in paths."""
        return "ffn"

    def build(self, d: int) -> nn.Module:
        """The module for streams of width ``d``."""
        raise NotImplementedError


@part
class Plain(FeedForward):
    """Two linear maps with an activation between (arXiv 1706.03762, section 3.3)."""

    d_ff: int
    act: str = "gelu"
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        activation(self.act)
        if self.d_ff < 1:
            raise SpecError(f"Plain(d_ff={self.d_ff}): a feed-forward layer is at least 1 wide.")
        check_dropout("Plain", self.dropout)

    def build(self, d: int) -> PlainLayer:
        return PlainLayer(self, d)


class PlainLayer(nn.Module):
    """``out = W_out act(W_in x)``; [b t d] -> [b t d]."""

    SITES = (sites.FFN_IN, sites.FFN_PRE, sites.FFN_POST, sites.FFN_OUT)

    def __init__(self, spec: Plain, d: int):
        super().__init__()
        self.spec = spec
        self.act = activation(spec.act)
        self.up = Linear(d, spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, d, bias=spec.bias)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        pre = p.see(sites.FFN_PRE, self.up(p.see(sites.FFN_IN, x)))
        post = p.see(sites.FFN_POST, steady.each(self.act, pre))
        if self.training and self.spec.dropout:
            post = F.dropout(post, self.spec.dropout)
        return p.see(sites.FFN_OUT, self.down(post))


@part
class Gated(FeedForward):
    """A gated linear unit: SwiGLU with ``act="silu"``, GeGLU with ``"gelu"``, ReGLU with ``"relu"`` (arXiv 2002.05202)."""

    d_ff: int
    act: str = "silu"
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        activation(self.act)
        if self.d_ff < 1:
            raise SpecError(f"Gated(d_ff={self.d_ff}): a feed-forward layer is at least 1 wide.")
        check_dropout("Gated", self.dropout)

    def build(self, d: int) -> GatedLayer:
        return GatedLayer(self, d)


class GatedLayer(nn.Module):
    """``out = W_out (act(W_gate x) * W_up x)``; [b t d] -> [b t d]. Rows of ``gate_up``: gate, then up."""

    SITES = (sites.FFN_IN, sites.FFN_PRE, sites.FFN_GATE, sites.FFN_POST, sites.FFN_OUT)

    def __init__(self, spec: Gated | ClampedGated, d: int):
        super().__init__()
        self.spec = spec
        self.act = activation(spec.act)
        self.gate_up = Linear(d, 2 * spec.d_ff, bias=spec.bias)
        self.down = Linear(spec.d_ff, d, bias=spec.bias)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        gate, pre = self.gate_up(p.see(sites.FFN_IN, x)).chunk(2, -1)
        gate, pre = p.see(sites.FFN_GATE, gate), p.see(sites.FFN_PRE, pre)
        post = p.see(sites.FFN_POST, self.meet(gate, pre))
        if self.training and self.spec.dropout:
            post = F.dropout(post, self.spec.dropout)
        return p.see(sites.FFN_OUT, self.down(post))

    def meet(self, gate: Float[Tensor, "*b f"], pre: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
        """What the gate lets through."""
        quick = decoding.bend(self.spec.act, gate, pre)
        return steady.each(self.act, gate) * pre if quick is None else quick


@part
class ClampedGated(FeedForward):
    """SwiGLU whose parts are held within ``limit`` before they meet (GPT-OSS, arXiv 2508.10925).

    ``(u + 1) * g * sigmoid(alpha g)``, ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``.
    """

    d_ff: int
    limit: float = 7.0
    alpha: float = 1.702
    bias: bool = True
    dropout: float = 0.0

    act: ClassVar[str] = "silu"

    def __post_init__(self) -> None:
        if self.d_ff < 1:
            raise SpecError(f"ClampedGated(d_ff={self.d_ff}): a feed-forward layer is at least 1 wide.")
        if not self.limit > 0:
            raise SpecError(f"ClampedGated(limit={self.limit}): values are held within a limit above 0.")
        check_dropout("ClampedGated", self.dropout)

    def build(self, d: int) -> GatedLayer:
        return ClampedGatedLayer(self, d)


class ClampedGatedLayer(GatedLayer):
    """``out = W_out ((u + 1) * g * sigmoid(alpha g))``; [b t d] -> [b t d]. Rows of ``gate_up``: gate, then up."""

    def __init__(self, spec: ClampedGated, d: int):
        super().__init__(spec, d)
        self.limit, self.alpha = spec.limit, spec.alpha

    def meet(self, gate: Float[Tensor, "*b f"], pre: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
        g, u = gate.clamp(max=self.limit), pre.clamp(-self.limit, self.limit)
        return (u + 1) * (g * steady.each(torch.sigmoid, g * self.alpha))
