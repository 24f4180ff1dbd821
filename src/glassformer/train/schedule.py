"""Schedules: how the learning rate moves through a run.

A schedule is a pure function of where the run is: ``factor(step, total)`` multiplies the optimiser's
learning rate at the 0-based ``step`` of ``total``. Nothing is stored, so nothing has to be resumed.

    factor
    1.0 |    ________                    1.0 |    ______________
        |   /        \\__   Cosine            |   /              \\   WSD
        |  /            \\__                  |  /                \\
    0.1 | /                \\__          0.0 | /                  \\
        +----------------------              +----------------------
          warm-up                              warm-up        decay

A run with a budget of seconds has no ``total`` beforehand; the loop then gives its running estimate.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from glassformer.core.errors import SpecError
from glassformer.core.spec import Spec, part


class Schedule(Spec):
    """Base of all schedules. ``warmup``: steps (an int) or a share of the run (a float below 1)."""

    warmup: int | float

    def __post_init__(self) -> None:
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise SpecError(f"warmup is a number of steps (an int) or a share of the run (a float below 1); {self.warmup!r} was given.")

    @abstractmethod
    def shape(self, step: float, warmup: float, total: float) -> float:
        """The factor after the warm-up; 1.0 at its end."""

    def factor(self, step: float, total: float) -> float:
        """What the learning rate is multiplied by at the 0-based ``step`` of ``total``: in [0, 1].

        The warm-up is linear and ends with the full rate; its first step already moves.
        """
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.shape(min(step, total), warmup, total)

    def warmup_steps(self, total: float) -> float:
        """The length of the warm-up in steps; at most half of the run."""
        wanted = self.warmup * total if isinstance(self.warmup, float) else self.warmup
        return min(wanted, total / 2)

    def check(self, steps: int) -> None:
        """Raise :class:`SpecError` if the warm-up leaves nothing of a run of so many steps."""
        if isinstance(self.warmup, int) and self.warmup > max(steps // 2, 1):
            raise SpecError(
                f"A warm-up of {self.warmup} steps takes more than half of a run of {steps}: use fewer, or a share such as {type(self).__name__}(warmup=0.05)."
            )


@part
class Constant(Schedule):
    """The full rate after the warm-up: ``1``."""

    warmup: int | float = 0

    def shape(self, step: float, warmup: float, total: float) -> float:
        return 1.0


@part
class Cosine(Schedule):
    """Half a cosine down to ``final`` (arXiv 1608.03983).

    ``final + (1 - final) * (1 + cos(pi * p)) / 2`` with ``p`` the share of the way after the warm-up.
    """

    warmup: int | float = 0.02
    final: float = 0.1

    def shape(self, step: float, warmup: float, total: float) -> float:
        p = (step - warmup) / max(total - warmup, 1e-9)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(p, 1.0))) / 2


@part
class WSD(Schedule):
    """Warm-up, stable, decay (arXiv 2404.06395): the full rate, then down to ``final`` in the last ``decay`` of the run.

    ``curve``: ``"linear"``, or ``"sqrt"`` = ``1 - sqrt(p)``, which arXiv 2405.18392 found better.
    """

    warmup: int | float = 0.02
    decay: float = 0.2
    final: float = 0.0
    curve: str = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise SpecError(f"decay is the share of the run that decays, above 0 and at most 1; {self.decay} was given.")
        if self.curve not in ("linear", "sqrt"):
            raise SpecError(f"curve is 'linear' or 'sqrt'; {self.curve!r} was given.")

    def shape(self, step: float, warmup: float, total: float) -> float:
        start = max(total * (1 - self.decay), warmup)
        if step <= start:
            return 1.0
        p = (step - start) / max(total - start, 1e-9)
        fall = 1 - math.sqrt(p) if self.curve == "sqrt" else 1 - p
        return self.final + (1 - self.final) * fall


@part
class InverseSqrt(Schedule):
    """``sqrt(warmup / step)`` after the warm-up, without an end (arXiv 1706.03762)."""

    warmup: int | float = 0.02

    def shape(self, step: float, warmup: float, total: float) -> float:
        scale = max(warmup, 1.0)
        return math.sqrt(scale / max(step + 1, scale))
