"""Embedding: from token ids to vectors.

ids ──► table ──► * scale ──► (lift) ──► + token type ──► + position ──► norm ──► (lift) ──► stream

The table may be narrower than the stream, so that a large vocabulary costs little. A linear map lifts its rows to the stream:
those of the tokens alone (``LiftTokens``, the first place) or the finished sum (``LiftSum``, the second).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import InputError, SpecError
from glassformer.core.flow import Pass
from glassformer.core.spec import Spec, check_dropout, part

from .linear import Linear
from .norm import NoNorm, Norm
from .position import LearnedLayer, PositionLayer


class Scale(Spec):
    """A constant factor that follows from the width."""

    def factor(self, d: int) -> float:
        """The factor for vectors of width ``d``."""
        raise NotImplementedError


@part
class Unit(Scale):
    """Factor 1."""

    def factor(self, d: int) -> float:
        return 1.0


@part
class SqrtWidth(Scale):
    """Factor ``sqrt(d)`` (the 2017 transformer's and Gemma's embedding)."""

    def factor(self, d: int) -> float:
        return math.sqrt(d)


@part
class InverseSqrtWidth(Scale):
    """Factor ``1 / sqrt(d)`` (T5's tied read-out)."""

    def factor(self, d: int) -> float:
        return 1.0 / math.sqrt(d)


@part
class Times(Scale):
    """A factor of your own."""

    by: float

    def factor(self, d: int) -> float:
        return self.by


class Lift(Spec):
    """How wide the table is, and where its rows become as wide as the stream."""

    def widths(self, d: int) -> tuple[int, int]:
        """Widths of the table, and of the sum of tokens, types and positions, in a stream of width ``d``."""
        raise NotImplementedError

    def build(self, d: int) -> tuple[nn.Module, nn.Module]:
        """What is done to the rows of the tokens, and to the finished sum."""
        raise NotImplementedError


@part
class NoLift(Lift):
    """The table is as wide as the stream."""

    def widths(self, d: int) -> tuple[int, int]:
        return d, d

    def build(self, d: int) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()


@part
class LiftTokens(Lift):
    """A table ``width`` wide, lifted at once: ``x = W weight[token]``; types and positions are as wide as the stream (OPT-350m)."""

    width: int
    bias: bool = False

    def __post_init__(self) -> None:
        _check_width(self, self.width)

    def widths(self, d: int) -> tuple[int, int]:
        return self.width, d

    def build(self, d: int) -> tuple[nn.Module, nn.Module]:
        return Linear(self.width, d, bias=self.bias), nn.Identity()


@part
class LiftSum(Lift):
    """Table, types, positions and norm ``width`` wide, lifted last: ``x = W norm(weight[token] + …) + b`` (ALBERT, arXiv 1909.11942; ELECTRA)."""

    width: int
    bias: bool = True

    def __post_init__(self) -> None:
        _check_width(self, self.width)

    def widths(self, d: int) -> tuple[int, int]:
        return self.width, self.width

    def build(self, d: int) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), Linear(self.width, d, bias=self.bias)


def _check_width(lift: Lift, width: int) -> None:
    if width < 1:
        raise SpecError(f"{type(lift).__name__}(width={width}): a table is at least 1 wide.")


@part
class Embedding(Spec):
    """A learned vector per token. ``n_types``: token types (BERT's two sentences; 0 for none). ``norm`` and ``dropout`` come after positions.

    ``lift``: a table narrower than the stream (factorised embedding).
    """

    scale: Scale = Unit()
    n_types: int = 0
    norm: Norm = NoNorm()
    dropout: float = 0.0
    lift: Lift = NoLift()

    def __post_init__(self) -> None:
        check_dropout("Embedding", self.dropout)

    def build(self, vocab_size: int, d: int) -> EmbeddingLayer:
        """The module for ``vocab_size`` tokens of width ``d``."""
        return EmbeddingLayer(self, vocab_size, d)


class EmbeddingLayer(nn.Module):
    """``x = lift_sum(norm(lift_tokens(scale * weight[token]) + types[type] + position))``; [b t] -> [b t d]. An unused lift is the identity.

    ``width``: of the table (and of ``embeds``); ``d_sum``: of types, positions and the norm. Both are the stream's ``d`` where nothing is lifted.
    """

    SITES = (sites.EMBED,)

    def __init__(self, spec: Embedding, vocab_size: int, d: int):
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.width, self.d_sum = spec.lift.widths(d)
        self.factor = spec.scale.factor(self.width)
        self.weight = nn.Parameter(torch.empty(vocab_size, self.width))
        if spec.n_types:
            self.types = nn.Parameter(torch.empty(spec.n_types, self.d_sum))
        self.lift_tokens, self.lift_sum = spec.lift.build(d)
        self.norm = spec.norm.build(self.d_sum)

    def forward(
        self, tokens: Int[Tensor, "b t"] | None, embeds: Float[Tensor, "b t w"] | None, types: Int[Tensor, "b t"] | None, position: PositionLayer, p: Pass
    ) -> Float[Tensor, "b t d"]:
        x = self.look_up(tokens) if embeds is None else embeds
        if self.factor != 1.0:
            x = x * torch.tensor(self.factor, dtype=x.dtype, device=x.device)
        x = self.lift_tokens(x)
        if self.spec.n_types:
            x = x + (self.types[0] if types is None else self.types[types])
        elif types is not None:
            raise InputError("Token types were given, but this model has none: build it with Embedding(n_types=2), or leave them out.")
        x = p.see(sites.EMBED, x)
        added = position.add(p.positions, x)
        if added is not None:
            x = x + p.see(sites.POS_EMBED, added)
        x = self.norm(x, p.at("embed").at("norm"))
        x = F.dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x
        y: Tensor = self.lift_sum(x)
        return y

    def look_up(self, tokens: Tensor | None) -> Tensor:
        """The rows of the table; raises :class:`InputError` for an id outside it."""
        if tokens is None:
            raise InputError("Neither tokens nor inputs_embeds were given: a model reads one of them.")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise InputError(
                    f"Token id {low if low < 0 else high} is outside this model's vocabulary of {self.vocab_size}: "
                    "encode the text with the model's own tokenizer."
                )
        return self.rows(tokens)

    def rows(self, tokens: Tensor) -> Tensor:
        """The rows of ids that are in the table."""
        return F.embedding(tokens, self.weight)


def check_positions(position: PositionLayer, asked: int | Tensor) -> None:
    """Raise :class:`InputError` if the model does not have the last position, or one of those given (counted from 0)."""
    if not isinstance(position, LearnedLayer):
        return
    if isinstance(asked, int):
        position.check(asked)
    elif asked.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(asked.min()) < 0:
            raise InputError(f"Position {int(asked.min())} was given, but positions are counted from 0.")
        position.check(int(asked.max()))
