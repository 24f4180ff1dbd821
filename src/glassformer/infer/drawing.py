"""Links that act by chance, or steer by what was drawn before.

    TopK(40) | XTC(0.5) | Temperature(0.8) | Draw(seed=7)
    Temperature(0.8) | Mirostat2(tau=5) | Draw(seed=7)
    MinP(0.05) | AdaptiveP(target=0.5) | Draw(seed=7)

A steering link leaves the drawing to :class:`~glassformer.infer.links.Draw`, shows in the steps what it did like any other
link, and then looks at how probable the drawn token was:

    logits ── Mirostat2 ── Draw ── token
                 ↑ mu              │
                 └── its surprise ─┘

What it remembers is one number per row in the :class:`~glassformer.infer.state.State`: it forks, and is wound back, with the row.
"""

from __future__ import annotations

from math import isfinite, log

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.spec import part

from .links import check_min_keep, descending, descending_by_numpy
from .sampler import GONE, Link
from .state import Own
from .thinning import cut


@part
class XTC(Link):
    """Exclude top choices: with ``probability``, remove all tokens of probability >= ``threshold`` but the weakest of them.

    So a likely, but not the likeliest token is drawn; nothing goes if fewer than two are that strong, or fewer than ``min_keep`` tokens would
    be left. Of equally weak ones the lowest id stays. The chance is fixed by the seeds and the step of the row, in a stream of its own: the
    number that Draw uses says nothing about it. From the program text-generation-webui (pull request 6335); the rule is llama.cpp's.
    A probability of 0 is off, and so is a threshold above 0.5, which two tokens cannot reach.

    Raises :class:`SamplerError` if ``probability`` or ``threshold`` is not in [0, 1] or ``min_keep`` is below 1, and when it is applied without a state.
    """

    probability: float
    threshold: float = 0.1
    min_keep: int = 1

    by_value = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise SamplerError(f"XTC acts with a probability from 0 to 1, but {self.probability} was given. Use 0 to switch it off.")
        if not 0 <= self.threshold <= 1:
            raise SamplerError(f"The threshold of XTC is a probability from 0 to 1, but {self.threshold} was given. Use 0.1; above 0.5 it is off.")
        check_min_keep(self.min_keep)

    @property
    def off(self) -> bool:
        return self.probability == 0 or self.threshold > 0.5

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        if state is None:
            raise SamplerError("XTC needs a state, which knows the step of every row. Use a chain: (XTC(0.5) | Draw(seed=0))(logits).")
        logits = logits.float()
        # No more than 1 / threshold tokens can be that strong, so that few have to be looked at.
        values, columns = logits.topk(min(logits.shape[-1], int(1 / self.threshold) + 1 if self.threshold > 0 else logits.shape[-1]), dim=-1)
        strong = ((values - logits.logsumexp(dim=-1, keepdim=True)).exp() >= self.threshold) & (values > GONE)
        more = strong.sum(dim=-1, keepdim=True) - 1  # that are removed
        acts = (state.uniform(logits.device)[:, None] <= self.probability) & (more > 0)
        if self.min_keep > 1:
            acts &= (logits > GONE).sum(dim=-1, keepdim=True) - more >= self.min_keep
        weakest = values.masked_fill(~strong, torch.inf).amin(dim=-1, keepdim=True)
        stays = columns.masked_fill(~strong | (values > weakest), logits.shape[-1]).amin(dim=-1, keepdim=True)
        return logits.scatter(1, columns, values.masked_fill(strong & acts & (columns != stays), GONE))


class _Mirostat(Link):
    """What the two have in common: mu starts at 2 tau and goes down by eta times what the surprise of the drawn token has too much."""

    tau: float
    eta: float

    observes = True

    def __post_init__(self) -> None:
        if not self.tau > 0 or not isfinite(self.tau):
            raise SamplerError(f"The surprise that Mirostat aims at is above 0 bits, but tau={self.tau} was given. Use 5, or 3 for more coherent text.")
        if not 0 <= self.eta <= 1:
            raise SamplerError(f"The rate at which Mirostat learns lies from 0 to 1, but eta={self.eta} was given. Use 0.1.")

    def start(self, rows: int, device: torch.device) -> Tensor | None:
        return torch.full((rows,), 2.0 * self.tau, device=device)

    def observe(self, memory: Tensor, before: Tensor, after: Tensor, column: Tensor) -> Tensor:
        surprise = -_ln_p(after, column) / log(2)
        return torch.where((column < 0) | ~surprise.isfinite(), memory, memory - self.eta * (surprise - self.tau))

    def _mu(self, state: Own | None, rows: int) -> Tensor:
        """``[b 1]``: what is remembered."""
        return _remembered(self, state, rows, f"{type(self).__name__}()")


@part
class Mirostat1(_Mirostat):
    """Keep as many of the strongest tokens as a Zipf law needs for a surprise of mu bits; mu is steered so that the text's surprise is ``tau``.

    From the ``m`` strongest tokens of probabilities p_1 >= p_2 >= …:  s = Σ t_i b_i / Σ t_i^2  with t_i = ln((i+1)/i), b_i = ln(p_i / p_(i+1));
    k = (e 2^mu / (1 - V^-e))^(1/s) with e = s - 1 and V the size of the vocabulary, rounded down, at least 1. The k strongest stay, and tokens
    equal to the last. After the draw  mu <- mu - eta (-log2 p - tau), p among the tokens that were kept; mu begins at 2 tau.

    Basu et al. 2020 (arXiv 2007.14966), as in llama.cpp; the authors' program takes p before the cut. There is no off value: leave the link out.
    llama.cpp runs it after the temperature, and nothing else. Raises :class:`SamplerError` if ``tau`` <= 0, ``eta`` is not in [0, 1] or ``m`` is below 2.
    """

    tau: float = 5.0
    eta: float = 0.1
    m: int = 100

    by_value = False  # it asks how large the vocabulary is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m < 2:
            raise SamplerError(f"Mirostat 1 estimates from 2 tokens or more, but m={self.m} was given. Use 100.")

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        logits = logits.float()
        ordered = descending_by_numpy(logits) if logits.device.type == "cpu" else descending(logits)
        k = self.kept(ordered, self._mu(state, logits.shape[0]))
        return cut(logits, ordered.gather(1, k - 1))

    def kept(self, ordered: Tensor, mu: Tensor) -> Tensor:
        """k of each row: of the logits ``[b v]`` in descending order, and mu ``[b 1]``, to ``[b 1]``."""
        v = ordered.shape[-1]
        few = ordered[:, : self.m].double()
        i = torch.arange(1, few.shape[-1], dtype=torch.float64, device=few.device)
        b, t = few[:, :-1] - few[:, 1:], ((i + 1) / i).log()
        known = b.isfinite()  # both are left
        s = torch.where(known, t * b, 0).sum(dim=-1, keepdim=True) / torch.where(known, t * t, 0).sum(dim=-1, keepdim=True)
        e = s - 1
        ratio = torch.where(e.abs() < 1e-9, 1 / log(max(v, 2)), e / -torch.expm1(-e * log(max(v, 2))))  # e / (1 - V^-e), and its limit
        ln_k = (ratio.log() + mu.double() * log(2)) / s
        return ln_k.nan_to_num(nan=0.0, posinf=log(v) + 1, neginf=0.0).clamp(0, log(v) + 1).exp().long().clamp(1, v)


@part
class Mirostat2(_Mirostat):
    """Remove tokens of a surprise above mu bits, -log2 p > mu; mu is steered so that the text's surprise is ``tau``. The strongest stays.

    After the draw  mu <- mu - eta (-log2 p - tau), p among the tokens that were kept; mu begins at 2 tau.

    Basu et al. 2020 (arXiv 2007.14966), as in llama.cpp. There is no off value: leave the link out. llama.cpp runs it after the temperature,
    and nothing else. Raises :class:`SamplerError` if ``tau`` <= 0 or ``eta`` is not in [0, 1].
    """

    tau: float = 5.0
    eta: float = 0.1

    by_value = True

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        logits = logits.float()
        return cut(logits, logits.logsumexp(dim=-1, keepdim=True) - self._mu(state, logits.shape[0]) * log(2))


@part
class AdaptiveP(Link):
    """Favour tokens whose probability is near ``target``, so that the drawn ones have it on average. A negative target is off.

    With m the average of the drawn tokens' probabilities before this link, which fades by ``decay`` per token and begins at ``target``:

        wanted = clamp(2 target - m, 0, 1),   d = |p - wanted| / 0.3,   logit <- 5 - 10 d^2 / (1 + d)

    The rule is llama.cpp's (pull request 17927). It removes nothing, and the many tokens of no probability become likelier than they were: put
    a filter such as ``MinP(0.05)`` before it, and nothing but Draw behind it.

    Raises :class:`SamplerError` if ``target`` is above 1 or not a number, or ``decay`` is not in [0, 0.99].
    """

    target: float
    decay: float = 0.9

    by_value = True
    observes = True

    def __post_init__(self) -> None:
        if not self.target <= 1:
            raise SamplerError(f"Adaptive-p aims at a probability from 0 to 1, but target={self.target} was given. Use -1 to switch it off.")
        if not 0 <= self.decay <= 0.99:
            raise SamplerError(f"The decay of adaptive-p lies from 0 to 0.99, but {self.decay} was given. Use 0.9, an average over about 10 tokens.")

    @property
    def off(self) -> bool:
        return self.target < 0

    def start(self, rows: int, device: torch.device) -> Tensor | None:
        return None if self.off else torch.full((rows,), float(self.target), device=device)

    def observe(self, memory: Tensor, before: Tensor, after: Tensor, column: Tensor) -> Tensor:
        p = _ln_p(before, column).exp()
        return torch.where((column < 0) | p.isnan(), memory, self.decay * memory + (1 - self.decay) * p)

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off:
            return logits
        logits = logits.float()
        wanted = (2 * self.target - _remembered(self, state, logits.shape[0], f"AdaptiveP({self.target})")).clamp(0, 1)
        d = (logits.softmax(dim=-1) - wanted).abs_().div_(0.3)
        return torch.where((logits == GONE) | d[:, :1].isnan(), logits, d.square().div_(d.add_(1)).mul_(-10).add_(5))


def _ln_p(logits: Tensor, column: Tensor) -> Tensor:
    """ln p of the column of each row, ``[b c], [b] -> [b]``."""
    return logits.gather(1, column.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _remembered(link: Link, state: Own | None, rows: int, written: str) -> Tensor:
    """The memory ``[b 1]`` of a link that cannot work without one."""
    if state is None or state.memory is None:
        raise SamplerError(f"{type(link).__name__} needs a state, which remembers what was drawn. Use a chain: ({written} | Draw(seed=0))(logits).")
    return state.memory[:, None]
