"""Mixture of experts: many feed-forward layers, each token goes through a few.

x ─┬──► router ──► routing ──► the k best ──► weights ─┐
   ├──► expert 0, 1, … (only the chosen) ──────────────┴─► weighted sum ─┐
   └──► shared expert (every token) ─────────────────────────────────────┴─ + ──► out
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.eager import eagerly
from glassformer.core.errors import SpecError
from glassformer.core.flow import Pass
from glassformer.core.numerics import wide
from glassformer.core.spec import part

from . import steady
from .feedforward import FeedForward, Gated
from .linear import Linear, product
from .routing import Routing, SoftmaxRouting


@part
class Experts(FeedForward):
    """A sparsely gated mixture of experts (arXiv 1701.06538, 2101.03961; top-k as in Mixtral, arXiv 2401.04088).

    ``normalise``: the chosen weights are divided by their sum. ``balance``: factor of the load-balancing
    loss ``n_experts * sum_e f_e P_e`` (``f_e`` share of assignments, ``P_e`` mean router probability),
    charged to the pass's ledger as ``"balance"``; it is 1 when all experts are used alike. ``routing``: from
    the router's logits to the choice. ``shared``: one more expert that every token goes through, as wide as all shared
    ones together (DeepSeekMoE, arXiv 2401.06066).
    """

    n_experts: int
    top_k: int = 2
    expert: FeedForward = Gated(d_ff=256)
    normalise: bool = True
    balance: float = 0.01
    routing: Routing = SoftmaxRouting()
    shared: FeedForward | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise SpecError(f"Experts(top_k={self.top_k}) of n_experts={self.n_experts}: choose at least 1 and at most all.")
        self.routing.groups.check(self.n_experts, self.top_k)

    @property
    def name(self) -> str:
        return "experts"

    def build(self, d: int) -> ExpertsLayer:
        return ExpertsLayer(self, d)


class ExpertsLayer(nn.Module):
    """``out = sum_{e in top-k} w_e expert_e(x) + shared(x)``; [b t d] -> [b t d]."""

    SITES = sites.TABLE["experts"]

    def __init__(self, spec: Experts, d: int):
        super().__init__()
        self.spec = spec
        self.router = Linear(d, spec.n_experts, bias=spec.routing.bias)
        self.routing = spec.routing.build(spec.n_experts)
        self.experts = nn.ModuleList(spec.expert.build(d) for _ in range(spec.n_experts))
        self.shared = None if spec.shared is None else spec.shared.build(d)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.EXPERTS_IN, x)
        scores = p.see(sites.ROUTER, self.routing(self.logits(x)))
        chosen = p.see(sites.CHOSEN, self.routing.choose(scores, self.spec.top_k))
        weights = scores.gather(-1, chosen)
        if self.spec.normalise:
            weights = weights / (steady.total(weights) if steady.on() else weights.sum(-1, keepdim=True))
        if self.spec.routing.scale != 1.0:
            weights = weights * self.spec.routing.scale
        if p.aux is not None and self.spec.balance:
            p.aux.charge("balance", self.spec.balance * self.imbalance(self.routing.shares(scores), chosen))
        out = self.route(x, chosen, weights.to(x.dtype), p)
        if self.shared is not None:
            out = out + self.shared(x, p.at("shared"))
        return p.see(sites.EXPERTS_OUT, out)

    def logits(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        """How well each expert suits each token, in float32."""
        if not self.spec.routing.wide:
            return wide(self.router(x))
        bias = None if self.router.bias is None else wide(self.router.bias)
        with torch.autocast(x.device.type, enabled=False):
            return (product if steady.on() else F.linear)(wide(x), wide(self.router.weight), bias)

    @eagerly
    def route(self, x: Tensor, chosen: Tensor, weights: Tensor, p: Pass) -> Tensor:
        """Each expert reads the tokens that chose it; their outputs are added up by weight.

        How many those are is known only when it happens, and a compiled graph would be made anew for every count: this runs as it is written.
        """
        if x.is_meta:  # shapes only: nothing is chosen where there are no values
            return torch.empty_like(x)
        inner = replace(p, tap=None)  # an expert sees an odd lot of tokens: its inside has no axes of its own
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        flat_weights = weights.flatten()
        for e, places in self.visits(chosen):
            token = places // self.spec.top_k
            part = self.experts[e](flat[token][None], inner)[0] * flat_weights[places, None]
            out = out.index_add(0, token, part.to(out.dtype))
        return out.view_as(x)

    def visits(self, chosen: Tensor) -> list[tuple[int, Tensor]]:
        """Each expert with the places in ``chosen`` (flat) that name it. An expert that nobody chose is left out,
        but where gradients are made: there its parameters are given their zeros.
        """
        places = chosen.flatten().argsort(stable=True)
        counts: list[int] = chosen.flatten().bincount(minlength=self.spec.n_experts).tolist()  # one wait for the device, not one per expert
        return [(e, at) for e, at in enumerate(places.split(counts)) if len(at) or torch.is_grad_enabled()]

    def imbalance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """``n_experts * sum_e f_e P_e``."""
        n = self.spec.n_experts
        share = torch.zeros(n, device=chosen.device, dtype=probabilities.dtype).index_add(
            0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device, dtype=probabilities.dtype)
        )
        return n * (share / chosen.numel() * probabilities.flatten(0, 1).mean(0)).sum()
