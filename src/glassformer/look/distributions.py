"""Entropy and divergences of distributions over the vocabulary, in bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(logp: Tensor) -> Tensor:
    """``-sum_v p_v log2 p_v`` of log-probabilities [.. v]."""
    # 0 * -inf is nan: a token that is excluded outright carries no surprise.
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1) / math.log(2.0)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """``KL(p || q) = sum_v p_v log2(p_v / q_v)``, [.. v]; 0 where both are the same tensor's values."""
    gap = torch.where(logp > -math.inf, logp - logq, torch.zeros_like(logp))
    return (logp.exp() * gap).sum(-1) / math.log(2.0)


def js(logp: Tensor, logq: Tensor) -> Tensor:
    """``JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2``: 0 for equal distributions, 1 bit for ones that share no token."""
    m = torch.logaddexp(logp, logq) - math.log(2.0)
    return (kl(logp, m) + kl(logq, m)) / 2
