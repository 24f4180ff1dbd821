"""A draw by adding noise and taking the strongest."""

from __future__ import annotations

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.spec import part

from .sampler import Link
from .state import Own

_WORD, _GOLDEN, _FIRST, _SECOND = 2**64, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@part
class Gumbel(Link):
    """Add Gumbel noise to every logit: the strongest token is then one drawn by its probability, ``... | Gumbel() | Greedy()``.

    logit_i <- logit_i - ln(-ln u_i), u_i in (0, 1) fixed by the run's seed (``generate(seed=...)``), the row's seed, its step and the token i. Then
    argmax ~ softmax(logits) (the Gumbel-max trick), as with ``Draw``, and a small change of the logits seldom changes the token, whereas ``Draw``
    changes it as soon as anything moves in front of it. So with a draft model the text of a seed is the text without a draft, and the chance that the draft
    guesses right is at least (1 - D) / (1 + D), D the total variation distance of the two models (Daliri et al., arXiv 2408.07978), near the
    1 - D that no rule can pass. It has no off value: leave the link out.

    Raises :class:`SamplerError` when it is applied without a state.
    """

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if state is None:
            raise SamplerError("Gumbel needs a state, which knows the step of every row. Use a chain: (Temperature(0.8) | Gumbel() | Greedy())(logits).")
        keys = (state.uniform(logits.device) * 2.0**53).long() << 10
        ids = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        u = (
            ((_mixed(keys[:, None] + ids * _signed(_GOLDEN)) >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)
        )  # the last one and a half would round to 1
        return (logits.double() - u.log_().neg_().log_()).float()


def _mixed(x: Tensor) -> Tensor:
    """Every bit of 64 depends on every bit (the finish of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _right(x, shift)) * _signed(factor)
    return x ^ _right(x, 31)


def _right(x: Tensor, n: int) -> Tensor:
    """A shift that brings in zeros."""
    return (x >> n) & (2 ** (64 - n) - 1)


def _signed(x: int) -> int:
    return x - _WORD if x >= _WORD // 2 else x
