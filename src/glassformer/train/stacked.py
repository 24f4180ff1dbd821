"""Muon over stacks: matrices of one shape are made orthogonal together.

    gradients ──► momentum ──► by shape ──► stack [n, short, long] ──► five Newton-Schulz steps ──► each to its own matrix

torch's Muon goes from matrix to matrix: fifteen small products each, which the library gives to one core
(docs/log.md). A stack has the same products in one call, on all cores. The rule is torch's, and so are the
settings and the state; the bits differ where a product of a stack is summed in another order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TOGETHER = 2**24  # numbers in a stack: larger matrices keep all cores busy alone


class Muon(torch.optim.Muon):
    """:class:`torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``, many matrices at a time."""

    def __init__(self, params: Any, **settings: Any):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(params, group)

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p, g in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(g)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for places in _stacks(params):
            old = [buffers[i] for i in places]
            wanted = torch._foreach_lerp([grads[i] for i in places], old, group["momentum"]) if group["nesterov"] else old
            stack = torch.stack([_wide(x).bfloat16() for x in wanted])
            made = orthogonal(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(params[places[0]].dtype)
            for i, update in zip(places, made, strict=True):
                size = 0.2 * math.sqrt(max(params[i].shape))  # of AdamW's updates, by arXiv 2502.16982
                params[i].add_(update if update.shape == params[i].shape else update.mT, alpha=-group["lr"] * size)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz steps from matrices ``x`` [n, r, c], r <= c, towards ``U V^T`` of their singular value decompositions.

        A = X X^T;    X = a X + (b A + c A A) X

    A quintic that is steep at zero: the singular values come near 1, not to it.
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(x: Tensor) -> Tensor:
    """The matrix lying down: no more rows than columns."""
    return x if x.shape[0] <= x.shape[1] else x.mT


def _stacks(matrices: list[Tensor]) -> list[list[int]]:
    """Which matrices go together: on one device, of one type and of one shape but for lying or standing, ``TOGETHER`` numbers at most."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(matrices):
        if x.numel():
            alike.setdefault((x.device, x.dtype, *sorted(x.shape)), []).append(i)
    stacks = []
    for places in alike.values():
        n = max(1, TOGETHER // matrices[places[0]].numel())
        stacks += [places[i : i + n] for i in range(0, len(places), n)]
    return stacks
