"""Mixture of experts: many feed-forward layers, each token goes through a few.

x ──► router ──► soft-max ──► the k best ──┐ weights
│                                          ▼
└──► expert 0, 1, … (only the chosen) ──► weighted sum ──► out
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from glassformer.core import sites
from glassformer.core.errors import SpecError
from glassformer.core.flow import Pass
from glassformer.core.numerics import wide
from glassformer.core.spec import part

from .feedforward import FeedForward, Gated


@part
class Experts(FeedForward):
    """A sparsely gated mixture of experts (arXiv 1701.06538, 2101.03961; top-k as in Mixtral, arXiv 2401.04088).

    ``normalise``: the chosen weights are divided by their sum. ``balance``: factor of the load-balancing
    loss ``n_experts * sum_e f_e P_e`` (``f_e`` share of assignments, ``P_e`` mean router probability),
    charged to the pass's ledger as ``"balance"``; it is 1 when all experts are used alike.
    """

    n_experts: int
    top_k: int = 2
    expert: FeedForward = Gated(d_ff=256)
    normalise: bool = True
    balance: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise SpecError(f"Experts(top_k={self.top_k}) of n_experts={self.n_experts}: choose at least 1 and at most all.")

    @property
    def name(self) -> str:
        return "experts"

    def build(self, d: int) -> ExpertsLayer:
        return ExpertsLayer(self, d)


class ExpertsLayer(nn.Module):
    """``out = sum_{e in top-k} w_e expert_e(x)``; [b t d] -> [b t d]."""

    SITES = sites.TABLE["experts"]

    def __init__(self, spec: Experts, d: int):
        super().__init__()
        self.spec = spec
        self.router = nn.Linear(d, spec.n_experts, bias=False)
        self.experts = nn.ModuleList(spec.expert.build(d) for _ in range(spec.n_experts))

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.EXPERTS_IN, x)
        probabilities = p.see(sites.ROUTER, torch.softmax(wide(self.router(x)), -1))
        weights, chosen = probabilities.topk(self.spec.top_k, -1)
        chosen = p.see(sites.CHOSEN, chosen)
        weights = probabilities.gather(-1, chosen)
        if self.spec.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if p.aux is not None and self.spec.balance:
            p.aux.charge("balance", self.spec.balance * self.imbalance(probabilities, chosen))
        return p.see(sites.EXPERTS_OUT, self.route(x, chosen, weights.to(x.dtype), p))

    def route(self, x: Tensor, chosen: Tensor, weights: Tensor, p: Pass) -> Tensor:
        """Each expert reads the tokens that chose it; their outputs are added up by weight."""
        if x.is_meta:  # shapes only: nothing is chosen where there are no values
            return torch.empty_like(x)
        inner = replace(p, tap=None)  # an expert sees an odd lot of tokens: its inside has no axes of its own
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        chosen, weights = chosen.flatten(0, 1), weights.flatten(0, 1)
        for e, expert in enumerate(self.experts):
            token, rank = (chosen == e).nonzero(as_tuple=True)
            part = expert(flat[token][None], inner)[0] * weights[token, rank, None]
            out = out.index_add(0, token, part.to(out.dtype))
        return out.view_as(x)

    def imbalance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """``n_experts * sum_e f_e P_e``."""
        n = self.spec.n_experts
        share = torch.zeros(n, device=chosen.device, dtype=probabilities.dtype).index_add(
            0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device, dtype=probabilities.dtype)
        )
        return n * (share / chosen.numel() * probabilities.flatten(0, 1).mean(0)).sum()
