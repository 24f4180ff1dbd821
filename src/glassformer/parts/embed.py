"""Embedding: from token ids to vectors.

ids ──► table ──► * scale ──► + token type ──► + position ──► norm ──► stream
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import InputError
from glassformer.core.flow import Pass
from glassformer.core.spec import Spec, check_dropout, part

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


@part
class Embedding(Spec):
    """A learned vector per token. ``n_types``: token types (BERT's two sentences; 0 for none). ``norm`` and ``dropout`` come after positions."""

    scale: Scale = Unit()
    n_types: int = 0
    norm: Norm = NoNorm()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout("Embedding", self.dropout)

    def build(self, vocab_size: int, d: int) -> EmbeddingLayer:
        """The module for ``vocab_size`` tokens of width ``d``."""
        return EmbeddingLayer(self, vocab_size, d)


class EmbeddingLayer(nn.Module):
    """``x = norm(scale * weight[token] + types[type] + position)``; [b t] -> [b t d]."""

    SITES = (sites.EMBED,)

    def __init__(self, spec: Embedding, vocab_size: int, d: int):
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.factor = spec.scale.factor(d)
        self.weight = nn.Parameter(torch.empty(vocab_size, d))
        if spec.n_types:
            self.types = nn.Parameter(torch.empty(spec.n_types, d))
        self.norm = spec.norm.build(d)

    def forward(
        self, tokens: Int[Tensor, "b t"] | None, embeds: Float[Tensor, "b t d"] | None, types: Int[Tensor, "b t"] | None, position: PositionLayer, p: Pass
    ) -> Float[Tensor, "b t d"]:
        x = self.look_up(tokens) if embeds is None else embeds
        if self.factor != 1.0:
            x = x * torch.tensor(self.factor, dtype=x.dtype, device=x.device)
        if self.spec.n_types:
            x = x + (self.types[0] if types is None else self.types[types])
        elif types is not None:
            raise InputError("Token types were given, but this model has none: build it with Embedding(n_types=2), or leave them out.")
        x = p.see(sites.EMBED, x)
        added = position.add(p.positions, x)
        if added is not None:
            x = x + p.see(sites.POS_EMBED, added)
        x = self.norm(x, p.at("embed").at("norm"))
        return F.dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x

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
