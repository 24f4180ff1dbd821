"""Routing: which experts a token goes to, and how much each of them counts.

    router logits ──► scores ─┬──────────────────────────────────► those of the chosen ──► (divided by their sum) * scale ──► weights
                              └─(+ correction)─► groups ─► the k best ──► chosen ──┘

    SoftmaxRouting   scores = softmax(logits)     experts compete (Mixtral, Qwen3-MoE, GPT-OSS, DeepSeek-V2)
    SigmoidRouting   scores = sigmoid(logits)     each expert by itself, a learned correction used only to choose (DeepSeek-V3)

Soft-max over all experts, the chosen divided by their sum, is soft-max over the chosen logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glassformer.core.errors import SpecError
from glassformer.core.numerics import wide
from glassformer.core.spec import Spec, part

from . import steady

# Which experts may be chosen


class Grouping(Spec):
    """Which experts a token may choose from."""

    def check(self, n_experts: int, top_k: int) -> None:
        """Raise :class:`SpecError` if ``top_k`` of ``n_experts`` cannot be chosen this way."""

    def allow(self, scores: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        """The scores, minus infinity where an expert may not be chosen."""
        return scores


@part
class Ungrouped(Grouping):
    """From all experts."""


@part
class Groups(Grouping):
    """From the best groups only (device-limited routing of DeepSeek-V2, arXiv 2405.04434, section 2.2.2).

    The experts stand in ``n`` groups of neighbours; a token chooses from the ``keep`` groups whose ``best`` highest
    scores sum to the most (V2: 1; V3, arXiv 2412.19437: 2).
    """

    n: int
    keep: int
    best: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.n:
            raise SpecError(f"Groups(n={self.n}, keep={self.keep}): keep at least 1 group and at most all.")
        if self.best < 1:
            raise SpecError(f"Groups(best={self.best}): a group is judged by at least 1 of its experts.")

    def check(self, n_experts: int, top_k: int) -> None:
        if n_experts % self.n:
            raise SpecError(f"{n_experts} experts do not stand in {self.n} equal groups: make n_experts a multiple of Groups(n=...).")
        size = n_experts // self.n
        if self.best > size:
            raise SpecError(f"Groups(best={self.best}) judges a group by more experts than the {size} that it has ({n_experts} experts in {self.n} groups).")
        if top_k > self.keep * size:
            raise SpecError(f"top_k={top_k} experts cannot be chosen from {self.keep} groups of {size}: keep more groups.")

    def allow(self, scores: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        grouped = scores.unflatten(-1, (self.n, -1))
        best = grouped.topk(self.best, -1).values
        kept = (steady.total(best)[..., 0] if steady.on() else best.sum(-1)).topk(self.keep, -1).indices
        open_ = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, kept, True)
        return grouped.masked_fill(~open_[..., None], -math.inf).flatten(-2)


# From logits to scores


class Routing(Spec):
    """How logits become a choice. ``bias``: the router's logits have a learned bias. ``scale``: a factor on the weights of the chosen.

    ``wide``: the router's product is computed in float32 whatever the model's type is: close logits that bfloat16 rounds together choose
    other experts (DeepSeek-V3, arXiv 2412.19437).
    """

    bias: bool = False
    groups: Grouping = Ungrouped()
    scale: float = 1.0
    wide: bool = False

    def build(self, n_experts: int) -> RoutingLayer:
        """The module for ``n_experts`` experts."""
        raise NotImplementedError


@part
class SoftmaxRouting(Routing):
    """Scores that sum to one over all experts (arXiv 1701.06538, 2101.03961)."""

    bias: bool = False
    groups: Grouping = Ungrouped()
    scale: float = 1.0
    wide: bool = False

    def build(self, n_experts: int) -> RoutingLayer:
        return RoutingLayer(self)


@part
class SigmoidRouting(Routing):
    """Scores of each expert by itself; a correction per expert takes part in the choice and not in the weight (arXiv 2408.15664, 2412.19437)."""

    bias: bool = False
    groups: Grouping = Ungrouped()
    scale: float = 1.0
    wide: bool = False

    def build(self, n_experts: int) -> RoutingLayer:
        return SigmoidRoutingLayer(self, n_experts)


class RoutingLayer(nn.Module):
    """``scores = softmax(logits)``; [b t e] -> [b t e]."""

    def __init__(self, spec: Any):
        super().__init__()
        self.spec = spec

    def forward(self, logits: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        return steady.softmax(logits) if steady.on() else torch.softmax(logits, -1)

    def choose(self, scores: Float[Tensor, "b t e"], k: int) -> Int[Tensor, "b t c"]:
        """The ``k`` experts of each token, best first."""
        return self.spec.groups.allow(scores).topk(k, -1).indices

    def shares(self, scores: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        """Scores that sum to one, for the balance of experts."""
        return scores


class SigmoidRoutingLayer(RoutingLayer):
    """``scores = sigmoid(logits)``, chosen by ``scores + correction``; ``correction`` is [e]. No gradient reaches it: only the choice depends on it."""

    def __init__(self, spec: Any, n_experts: int):
        super().__init__(spec)
        self.correction = nn.Parameter(torch.zeros(n_experts), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRoutingLayer:
        """Moved with the model, but never made narrower than float32: the choice hangs on differences that bfloat16 rounds away."""
        held = self.correction.detach()
        super()._apply(fn, recurse)
        now = self.correction
        if now.dtype not in (torch.float32, torch.float64):
            now.data = held.to(now.device, wide(held).dtype)
        return self

    def forward(self, logits: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        return steady.each(torch.sigmoid, logits)

    def choose(self, scores: Float[Tensor, "b t e"], k: int) -> Int[Tensor, "b t c"]:
        return super().choose(scores + self.correction.detach().to(scores.dtype), k)

    def shares(self, scores: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        return scores / scores.sum(-1, keepdim=True)
