"""Read-outs: from the last stream to what the task asks for.

LanguageModel   every position ──► scores over the vocabulary    b t v
Tagger          every position ──► scores over tags              b t v
Classifier      one pooled position ──► scores over classes      b v
Vector          one pooled position ──► a vector                 b d
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core.errors import SpecError
from glassformer.core.flow import Pass
from glassformer.core.sites import LOGITS, Site
from glassformer.core.spec import Spec, check_dropout, part

from . import steady
from .embed import EmbeddingLayer, Scale, Unit
from .feedforward import activation
from .linear import Linear, product
from .norm import NoNorm, Norm, NormLayer

CLASS_LOGITS = Site("logits", "b v", "scores over the classes before soft-max")
VECTOR = Site("logits", "b d", "the pooled vector")


class ReadOut(Spec):
    """What the model's last stream is turned into."""

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> ReadOutLayer:
        """The module; ``tied`` shares the embedding's table where there is one to share."""
        raise NotImplementedError


class ReadOutLayer(nn.Module):
    """Base of all read-outs: [b t d] -> ``SITES[0].axes``."""

    SITES: tuple[Site, ...] = (LOGITS,)
    pooled = False
    """Whether a row becomes one vector, so that there are no positions to choose from."""


class Transform(Spec):
    """A map before the vocabulary or the classes (see :class:`Dense`)."""

    def build(self, d: int) -> TransformLayer:
        """The module for a stream of width ``d``."""
        raise NotImplementedError


class TransformLayer(nn.Module):
    """Base of all transforms: [.. d] -> [.. width]."""

    width: int
    norm: NormLayer


@part
class Dense(Transform):
    """``norm(act(W h + b))``: BERT's masked-token head and pooler (arXiv 1810.04805).

    ``width``: None means the stream's; a tied read-out of a factorised embedding needs the table's. ``act="identity"`` leaves a
    linear map (OPT's ``project_out``).
    """

    act: str = "gelu"
    norm: Norm = NoNorm()
    bias: bool = True
    width: int | None = None

    def __post_init__(self) -> None:
        activation(self.act)
        if self.width is not None and self.width < 1:
            raise SpecError(f"Dense(width={self.width}): a map has at least 1 output; None means as many as the stream is wide.")

    def build(self, d: int) -> DenseLayer:
        return DenseLayer(self, d)


class DenseLayer(TransformLayer):
    """``norm(act(W h + b))``; [.. d] -> [.. width]."""

    def __init__(self, spec: Dense, d: int):
        super().__init__()
        self.width = d if spec.width is None else spec.width
        self.act = activation(spec.act)
        self.linear = Linear(d, self.width, bias=spec.bias)
        self.norm = spec.norm.build(self.width)

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        y: Tensor = self.norm(steady.each(self.act, self.linear(x)), p.at("norm"))
        return y


@part
class States(ReadOut):
    """The stream itself: an encoder whose output another part reads."""

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> StatesLayer:
        return StatesLayer()


class StatesLayer(ReadOutLayer):
    """The identity; [b t d] -> [b t d]."""

    SITES = ()

    def forward(self, h: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        return h


# Over the vocabulary


@part
class LanguageModel(ReadOut):
    """Scores over the vocabulary: ``cap(scale * h W^T + b)``, after an optional transform of ``h`` (BERT: linear, activation, norm).

    ``scale`` multiplies ``h`` (T5's tied read-out: ``InverseSqrtWidth()``); ``cap`` is Gemma 2's ``c tanh(l / c)``.
    """

    bias: bool = False
    scale: Scale = Unit()
    cap: float | None = None
    transform: Transform | None = None

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> LanguageModelLayer:
        return LanguageModelLayer(self, d, embed, tied)


class LanguageModelLayer(ReadOutLayer):
    """``logits = cap(scale * transform(h) W^T + b)``; [b t d] -> [b t v]."""

    def __init__(self, spec: LanguageModel, d: int, embed: EmbeddingLayer, tied: bool):
        super().__init__()
        self.spec, self.tied = spec, tied
        self.transform = None if spec.transform is None else spec.transform.build(d)
        width = d if self.transform is None else self.transform.width
        if tied and width != embed.width:
            raise SpecError(
                f"The tied table is {embed.width} wide, but the read-out multiplies it by vectors of width {width}: "
                f"use LanguageModel(transform=Dense(..., width={embed.width})), or tied=False."
            )
        self.factor = spec.scale.factor(width)
        # A tied table belongs to the embedding; a tuple keeps torch from registering it twice.
        self._embed = (embed,)
        if not tied:
            self.matrix = nn.Parameter(torch.empty(embed.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(embed.vocab_size)) if spec.bias else None

    @property
    def weight(self) -> Tensor:
        """The matrix [v width] (the embedding's own if tied)."""
        return self._embed[0].weight if self.tied else self.matrix

    def forward(self, h: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t v"]:
        if self.transform is not None:
            h = self.transform(h, p.at("readout").at("transform"))
        if self.factor != 1.0:
            h = h * self.factor
        logits = self.scores(h)
        if self.spec.cap is not None:
            logits = self.spec.cap * steady.each(torch.tanh, logits / self.spec.cap)
        return p.see(LOGITS, logits)

    def scores(self, h: Tensor) -> Tensor:
        """``h W^T + b``."""
        return product(h, self.weight, self.bias)


# Over classes


@part
class Tagger(ReadOut):
    """A class for every token: ``h W^T + b``, after an optional transform (ELECTRA's discriminator: ``Dense("gelu")``, one class, arXiv 2003.10555)."""

    n_classes: int
    transform: Transform | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout("Tagger", self.dropout)

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> TaggerLayer:
        return TaggerLayer(self, d)


class TaggerLayer(ReadOutLayer):
    """``logits = transform(h) W^T + b``; [b t d] -> [b t v]."""

    def __init__(self, spec: Tagger, d: int):
        super().__init__()
        self.spec = spec
        self.transform = None if spec.transform is None else spec.transform.build(d)
        self.linear = Linear(d if self.transform is None else self.transform.width, spec.n_classes)

    def forward(self, h: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t v"]:
        y = h if self.transform is None else self.transform(h, p.at("readout").at("transform"))
        return p.see(LOGITS, self.linear(F.dropout(y, self.spec.dropout, self.training)))


class Pool(Spec):
    """How the positions of a row become one vector."""

    def pool(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        """[b t d] -> [b d]; positions beyond ``lengths`` do not count."""
        raise NotImplementedError


@part
class First(Pool):
    """The first position's vector (BERT's ``[CLS]``)."""

    def pool(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        return h[:, 0]


@part
class Last(Pool):
    """The last real position's vector: in a causal model the only one that has seen the whole text."""

    def pool(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        return h[:, -1] if lengths is None else h[torch.arange(h.shape[0], device=h.device), lengths - 1]


@part
class Mean(Pool):
    """The mean over real positions."""

    def pool(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return steady.total(h, 1)[:, 0] / h.shape[1] if steady.on() else h.mean(1)
        real = (torch.arange(h.shape[1], device=h.device)[None] < lengths[:, None])[..., None].to(h.dtype)
        return (steady.total(h * real, 1)[:, 0] if steady.on() else (h * real).sum(1)) / real.sum(1)


@part
class Classifier(ReadOut):
    """A class for the whole text: pool, optional transform (BERT's pooler: ``Dense("tanh")``), linear."""

    n_classes: int
    pool: Pool = First()
    transform: Transform | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout("Classifier", self.dropout)

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> ClassifierLayer:
        return ClassifierLayer(self, d)


class ClassifierLayer(ReadOutLayer):
    """``logits = transform(pool(h)) W^T + b``; [b t d] -> [b v]."""

    SITES = (CLASS_LOGITS,)
    pooled = True

    def __init__(self, spec: Classifier, d: int):
        super().__init__()
        self.spec = spec
        self.transform = None if spec.transform is None else spec.transform.build(d)
        self.linear = Linear(d if self.transform is None else self.transform.width, spec.n_classes)

    def forward(self, h: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b v"]:
        y = self.spec.pool.pool(h, p.lengths)
        y = y if self.transform is None else self.transform(y, p.at("readout").at("transform"))
        return p.see(CLASS_LOGITS, self.linear(F.dropout(y, self.spec.dropout, self.training)))


@part
class Vector(ReadOut):
    """One vector for the whole text: pool, optional transform, optionally scaled to length one."""

    pool: Pool = Mean()
    transform: Transform | None = None
    normalise: bool = False

    def build(self, d: int, embed: EmbeddingLayer, tied: bool) -> VectorLayer:
        return VectorLayer(self, d)


class VectorLayer(ReadOutLayer):
    """``v = transform(pool(h))``, divided by its length if ``normalise``; [b t d] -> [b d]."""

    SITES = (VECTOR,)
    pooled = True

    def __init__(self, spec: Vector, d: int):
        super().__init__()
        self.spec = spec
        self.transform = None if spec.transform is None else spec.transform.build(d)

    def forward(self, h: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b d"]:
        y = self.spec.pool.pool(h, p.lengths)
        y = y if self.transform is None else self.transform(y, p.at("readout").at("transform"))
        return p.see(VECTOR, _of_length_one(y) if self.spec.normalise else y)


def _of_length_one(y: Tensor) -> Tensor:
    return y / steady.total(y * y).sqrt().clamp(min=1e-12) if steady.on() else F.normalize(y, dim=-1)
