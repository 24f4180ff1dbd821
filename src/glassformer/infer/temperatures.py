"""Temperatures that follow the distribution."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.spec import part

from .links import Temperature
from .sampler import GONE, Link
from .state import Own
from .truncation import entropy

COLDEST = 1e-6  # below it the quotients leave float32, and only the strongest token has any probability


@part
class DynamicTemperature(Link):
    """A temperature between max(0, t - range) and t + range that rises with the entropy: the surer the model, the colder.

    t' = lo + (hi - lo) (H / H_max)^exponent  with H the entropy of the tokens left and H_max = ln(their number), the most it can be; then
    logits / t', and only the strongest token where t' is 0. One token left is left as it is. The rule is llama.cpp's (``dynatemp_range``,
    ``dynatemp_exponent``). With ``range`` 0 it is :class:`Temperature` (t); with t = 1 besides it is off.

    Raises :class:`SamplerError` if ``t``, ``range`` or ``exponent`` is negative or not finite.
    """

    t: float
    range: float = 0.0
    exponent: float = 1.0

    by_value = True

    def __post_init__(self) -> None:
        for name, value in (("t", self.t), ("range", self.range), ("exponent", self.exponent)):
            if not value >= 0 or not isfinite(value):
                raise SamplerError(
                    f"The {name} of a dynamic temperature is 0 or more, but {value} was given. Use t=1, range=0 for the model's own distribution."
                )

    @property
    def off(self) -> bool:
        return self.t == 1 and self.range == 0

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.range == 0:
            return Temperature(self.t).apply(logits)
        logits = logits.float()
        t = self.temperature(logits).nan_to_num(nan=1.0)
        if self.t - self.range >= COLDEST:
            return logits / t
        top, column = logits.max(dim=-1, keepdim=True)
        return torch.where(t < COLDEST, torch.full_like(logits, GONE).scatter_(1, column, top), logits / t.clamp(min=COLDEST))

    def temperature(self, logits: Tensor) -> Tensor:
        """t' of each row, ``[b v] -> [b 1]``; NaN where at most one token is left or the model gave NaN."""
        ln_p = logits.float().log_softmax(dim=-1)
        most = (logits > GONE).sum(dim=-1, keepdim=True).float().log()
        low, high = max(0.0, self.t - self.range), self.t + self.range
        return low + (high - low) * (entropy(ln_p, ln_p.exp()) / most).clamp(0, 1).pow(self.exponent).masked_fill(~(most > 0), torch.nan)
