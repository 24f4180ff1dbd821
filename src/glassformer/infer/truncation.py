"""Links that remove tokens by how the whole distribution looks: its entropy, its spread, its peak.

Probabilities are those of the tokens that reach the link. Every link keeps at least the strongest token (typical: the
most typical one) and leaves a row alone in which the model gave NaN. With H the entropy, in nats:

    Typical     the tokens whose -ln p is nearest to H, until they hold the probability ``p``
    TopNSigma   logit >= max - n σ, σ the standard deviation of the logits
    TopH        the strongest tokens, until their part of H is more than ``h`` of it
    Epsilon     p >= epsilon
    Eta         p >= min(epsilon, sqrt(epsilon) e^-H)
    TopA        p >= a p_max^2
"""

from __future__ import annotations

import sys
from math import isfinite, log, sqrt

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.spec import part

from .links import check_min_keep, strongest, strongest_by_numpy
from .sampler import GONE, Link, Narrowing
from .state import Own, Room
from .thinning import at_least, cut, likely, masses


@part
class Typical(Link):
    """Keep the tokens whose surprise is nearest to the entropy, until they hold ``p`` (Meister et al. 2022, arXiv 2202.00666). 1 is off.

    In the order of |-ln p_i - H| a token stays if those before it hold less than ``p``; tokens equal to the last one stay too. The strongest
    token can go. The rule is that of ``transformers``; llama.cpp differs only where the sum equals ``p`` exactly, and for equals.
    At least ``min_keep`` stay. Raises :class:`SamplerError` if ``p`` is not in (0, 1] or ``min_keep`` is below 1.
    """

    p: float
    min_keep: int = 1

    by_value = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise SamplerError(f"typical sampling takes a probability above 0 and up to 1, but {self.p} was given. Use 1 to keep all.")
        check_min_keep(self.min_keep)

    @property
    def off(self) -> bool:
        return self.p == 1

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        found = None if self.min_keep > 1 else likely(logits, self.p, room)
        if found is None:
            return None
        few, columns, top, total, nats = found
        ln_p = few - top - total.log()
        deviation = (-ln_p - nats).abs_()
        # What was left out is farther from the entropy than all of this, if the strongest is nearer to it than the border.
        border = -log((1 - self.p) / (2 * logits.shape[1])) - nats
        if not bool((deviation.masked_fill(few == GONE, 0.0).amax(dim=-1, keepdim=True) <= border + 1e-3).all()):
            return None
        nearest, mass = _together_by_numpy(deviation, ln_p.exp())
        count = (mass.cumsum(dim=-1, dtype=torch.float64) - mass < self.p).sum(dim=-1, keepdim=True).clamp(max=few.shape[1])
        return few.masked_fill_(deviation > nearest.gather(1, count - 1), GONE), columns

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        ln_p = logits.log_softmax(dim=-1)
        p = ln_p.exp()
        deviation = (-ln_p - entropy(ln_p, p)).abs_()
        nearest, mass = _together_by_numpy(deviation, p) if logits.device.type == "cpu" else _together(deviation, p)
        count = (mass.cumsum(dim=-1, dtype=torch.float64) - mass < self.p).sum(dim=-1, keepdim=True).clamp(min=min(self.min_keep, logits.shape[-1]))
        return logits.masked_fill(deviation > nearest.gather(1, count - 1), GONE)


def _together(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``[b c]`` in the order of the keys, smallest first."""
    key, order = key.sort(dim=-1)
    return key, value.gather(1, order)


def _together_by_numpy(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_together` on a CPU, for numbers >= 0: their bits are in the order of the numbers, so that a pair is one whole number to sort.

    50,000 pairs take 0.5 ms, where numpy's argsort takes 1.7 and torch's sort 5.6.
    """
    pair = np.empty((*key.shape, 2), dtype=np.float32)  # little end first: the key is the upper half
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    pair[..., low], pair[..., high] = value.detach().numpy(), key.detach().numpy()
    whole = pair.view(np.uint64)[..., 0]
    whole.sort(axis=-1)
    return torch.from_numpy(pair[..., high].copy()), torch.from_numpy(pair[..., low].copy())


@part
class TopNSigma(Link):
    """Keep the logits at most ``n`` standard deviations below the strongest: l >= max - n σ (Tang et al. 2024, arXiv 2411.07641). 0 or less is off.

    σ is over the tokens left (population: divided by their number), as in llama.cpp. A temperature before this link scales max, σ and the
    logits alike, so what is kept does not depend on it. Raises :class:`SamplerError` if ``n`` is not a finite number.
    """

    n: float

    by_value = True

    def __post_init__(self) -> None:
        if not isfinite(self.n):
            raise SamplerError(f"top-n-sigma takes a finite number of standard deviations, but {self.n} was given. Use 0 to keep all.")

    @property
    def off(self) -> bool:
        return self.n <= 0

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        top = logits.amax(dim=-1, keepdim=True)
        apart = torch.sub(logits, logits.mean(dim=-1, keepdim=True), out=room.scratch(logits, 0))
        sigma = torch.linalg.vector_norm(apart, dim=-1, keepdim=True) / sqrt(logits.shape[-1])
        return at_least(logits, top - self.n * sigma, top, room)  # None where a token is gone already: then sigma is no number

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        top = logits.amax(dim=-1, keepdim=True)
        below = top - logits  # from the top, not from 0: large logits of a small spread lose nothing
        if logits.device.type == "cpu" and bool(logits.amin() > GONE):
            sigma = torch.linalg.vector_norm(below.sub_(below.mean(dim=-1, keepdim=True)), dim=-1, keepdim=True) / sqrt(logits.shape[-1])
        else:
            gone = logits == GONE
            count = (~gone).sum(dim=-1, keepdim=True)
            mean = below.masked_fill_(gone, 0.0).sum(dim=-1, keepdim=True) / count
            sigma = torch.linalg.vector_norm(below.sub_(mean).masked_fill_(gone, 0.0), dim=-1, keepdim=True) / count.sqrt()
        return cut(logits, top - self.n * sigma)


@part
class TopH(Narrowing):
    """Keep the strongest tokens while their part of the entropy is at most ``h`` of it (Potraghloo et al. 2025, arXiv 2509.02510). 1 is off.

    Of the ``width`` strongest tokens, with p among these only and H = -Σ p ln p: the i strongest stay while their -Σ p ln p <= h H; the
    strongest always stays. The rule is that of ``transformers``, whose width is 100; at h = 1 it still cuts to the 100 strongest, here
    nothing goes. Raises :class:`SamplerError` if ``h`` is not in (0, 1] or ``width`` is below 1.
    """

    h: float
    width: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.h <= 1:
            raise SamplerError(f"top-h keeps a part of the entropy above 0 and up to 1, but {self.h} was given. Use 1 to keep all.")
        if self.width < 1:
            raise SamplerError(f"top-h looks at 1 token or more, but a width of {self.width} was given. Use 100 as transformers does.")

    @property
    def off(self) -> bool:
        return self.h == 1

    def narrow(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        width = logits.shape[-1]
        if self.width < width:
            columns = strongest_by_numpy(logits, self.width) if logits.device.type == "cpu" else strongest(logits, self.width)
            logits = logits.gather(1, columns)
        else:
            columns = torch.arange(width, device=logits.device).expand_as(logits)
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        # float64: the part of a token that is nearly certain is p (1 - p), and in float32 1 - p has few digits.
        sums = torch.special.entr(logits.gather(1, order).softmax(dim=-1, dtype=torch.float64)).cumsum(dim=-1)
        over = sums > self.h * sums[:, -1:]
        over[:, 0] = False
        return logits.masked_fill(torch.zeros_like(over).scatter_(1, order, over), GONE), columns


@part
class Epsilon(Link):
    """Keep the tokens of probability ``epsilon`` or more (Hewitt et al. 2022, arXiv 2210.15191). 0 is off.

    At least the ``min_keep`` strongest stay. Raises :class:`SamplerError` if ``epsilon`` is not in [0, 1) or ``min_keep`` is below 1.
    """

    epsilon: float
    min_keep: int = 1

    by_value = True

    def __post_init__(self) -> None:
        _check_epsilon("epsilon", self.epsilon)
        check_min_keep(self.min_keep)

    @property
    def off(self) -> bool:
        return self.epsilon == 0

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        if self.min_keep > 1:
            return None
        top, total, _ = masses(logits, room)
        return at_least(logits, top + total.log() + log(self.epsilon), top, room)

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        return cut(logits, logits.logsumexp(dim=-1, keepdim=True) + log(self.epsilon), self.min_keep)


@part
class Eta(Link):
    """Keep the tokens of probability min(ε, sqrt(ε) e^-H) or more (Hewitt et al. 2022, arXiv 2210.15191). 0 is off.

    The flatter the distribution, the larger its entropy H (nats) and the lower the bar. At least the ``min_keep`` strongest stay.
    Raises :class:`SamplerError` if ``epsilon`` is not in [0, 1) or ``min_keep`` is below 1.
    """

    epsilon: float
    min_keep: int = 1

    by_value = True

    def __post_init__(self) -> None:
        _check_epsilon("eta", self.epsilon)
        check_min_keep(self.min_keep)

    @property
    def off(self) -> bool:
        return self.epsilon == 0

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        if self.min_keep > 1:
            return None
        top, total, nats = masses(logits, room)
        return at_least(logits, top + total.log() + (0.5 * log(self.epsilon) - nats).clamp(max=log(self.epsilon)), top, room)

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        ln_p = logits - total
        bar = (0.5 * log(self.epsilon) - entropy(ln_p, ln_p.exp())).clamp(max=log(self.epsilon))
        return cut(logits, total + bar, self.min_keep)


@part
class TopA(Link):
    """Keep the tokens of probability ``a`` p_max^2 or more, p_max that of the strongest (B. Peng, RWKV-LM on GitHub, there a = 0.02). 0 is off.

    The surer the model, the higher the bar. At least ``min_keep`` stay. Raises :class:`SamplerError` if ``a`` is not in [0, 1] or ``min_keep``
    is below 1.
    """

    a: float
    min_keep: int = 1

    by_value = True

    def __post_init__(self) -> None:
        if not 0 <= self.a <= 1:
            raise SamplerError(f"top-a is a factor from 0 to 1 of the squared probability of the strongest token, but {self.a} was given. Use 0 to keep all.")
        check_min_keep(self.min_keep)

    @property
    def off(self) -> bool:
        return self.a == 0

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        if self.min_keep > 1:
            return None
        top, total, _ = masses(logits, room)
        return at_least(logits, top - total.log() + log(self.a), top, room)

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        top = logits.amax(dim=-1, keepdim=True)
        ln_top = top - logits.logsumexp(dim=-1, keepdim=True)
        return cut(logits, top + ln_top + log(self.a), self.min_keep)


# What they share


def entropy(ln_p: Tensor, p: Tensor) -> Tensor:
    """H = -Σ p ln p in nats, ``[b 1]``; tokens that are gone count nothing."""
    return -(p * ln_p.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1, keepdim=True)


def _check_epsilon(name: str, epsilon: float) -> None:
    if not 0 <= epsilon < 1:
        raise SamplerError(f"{name} is a probability from 0 to below 1, but {epsilon} was given. Use 0 to keep all.")
