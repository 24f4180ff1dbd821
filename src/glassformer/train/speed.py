"""Choices of speed: number format and compilation, by rules simple enough to be written down.

Measured on CPUs with AVX-512: autocast to bfloat16 halves a step from about ten million parameters on; with AMX it is faster
than float32 at 0.8 million (15.2 to 12.8 thousand tokens a second, compiled 21.5 to 14.9). ``torch.compile`` saves a quarter
of each step there and costs, once, some 35 to 55 seconds for four layers and two minutes for twelve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from glassformer.core.errors import TrainingError
from glassformer.tasks import Loss

BF16_PARAMETERS = 500_000  # where bfloat16 begins to pay on a CPU
COMPILE_GAIN = {"cpu": 0.25, "cuda": 0.35}  # share of a step that compilation saves; cuda is a guess
COMPILE_COST = {"cpu": (15.0, 10.0), "cuda": (15.0, 10.0)}  # seconds, and seconds a layer, with nothing cached; cuda is a guess
MEASURED_STEPS = 5  # eager steps before "auto" decides


def autocast_dtype(name: str, model: nn.Module, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (no autocast) for ``"bf16"``, ``"fp32"`` or ``"auto"``: where it pays on this machine."""
    if name in ("fp32", "float32"):
        return None
    if name in ("bf16", "bfloat16"):
        return torch.bfloat16
    if name != "auto":
        raise TrainingError(f"dtype is 'fp32', 'bf16' or 'auto' for training; {name!r} was given.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16 if sum(p.numel() for p in model.parameters()) >= BF16_PARAMETERS else None
    return None


def compiling_pays(device: torch.device, remaining_seconds: float, layers: int = 4) -> bool:
    """Whether the time that compilation would save in the rest of the run exceeds what it costs."""
    once, each = COMPILE_COST.get(device.type, (float("inf"), 0.0))
    return remaining_seconds * COMPILE_GAIN.get(device.type, 0.0) > once + each * layers


def compiled(loss: Callable[..., Any], device: torch.device, products: dict[str, int] | None = None) -> tuple[Callable[..., Any], Any]:
    """``loss`` compiled as the trainer does it, and the pass over its products on a CPU (None elsewhere).

    Kernels are not chosen by measurement, since the choice would differ from process to process; products are
    (see products.py), and ``products`` is what a resumed run knows of them.
    """
    if device.type != "cpu":
        return torch.compile(loss, dynamic=False, options={"deterministic": True}), None
    try:
        from .products import SplitProducts  # imports the compiler, and parts of it that torch does not promise to keep
    except ImportError:
        return torch.compile(loss, dynamic=False), None
    split = SplitProducts(products)
    return torch.compile(loss, dynamic=False, options={"post_grad_custom_post_pass": split}), split


class Compiler:
    """Gives the loss function of each step, eager or compiled as a whole (model and loss in one graph).

    ``wanted``: True, False or ``"auto"``, which decides after a few eager steps. ``decision`` is plain data
    (``{"compile": True, "after": 5}``) that a run keeps, since compiled and eager steps differ in their last bits:
    a resumed run must change over at the same step.
    """

    def __init__(self, loss: Callable[[Any], Loss], wanted: bool | str, device: torch.device, layers: int = 4):
        if wanted not in (True, False, "auto"):
            raise TrainingError(f"compile is True, False or 'auto'; {wanted!r} was given.")
        self.wanted, self._loss, self._device, self._layers = wanted, loss, device, layers
        self.decision: dict[str, Any] | None = None if wanted == "auto" else {"compile": wanted, "after": 0}
        self.products: dict[str, int] | None = None  # which products are computed in blocks (see products.py); kept with the run too
        self._compiled: Callable[[Any], Loss] | None = None
        self._split: Any = None
        self._tried = self._proven = False

    def function(self, done: int) -> Callable[[Any], Loss]:
        """The loss function for the step after ``done`` steps."""
        if self.decision is None or not self.decision["compile"] or done < self.decision["after"]:
            return self._loss
        if self._compiled is None:
            self._tried = True
            self._compiled, self._split = compiled(self._loss, self._device, self.products)
        return self._compiled

    def decide(self, done: int, remaining_seconds: float) -> bool:
        """After enough eager steps: settle ``"auto"``. True if it was settled now."""
        if self.decision is not None or done < MEASURED_STEPS:
            return False
        self.decision = {"compile": compiling_pays(self._device, remaining_seconds, self._layers), "after": done}
        return True

    def worked(self) -> bool:
        """A step went through: later errors are not the compiler's. True if there are products that the run's record does not name yet."""
        self._proven = self._compiled is not None
        if not self._proven or self._split is None or self.products == (table := self._split.recorded()):
            return False
        self.products = table
        return True

    def give_up(self, error: Exception, done: int) -> str:
        """The first compiled step failed: go on eagerly and return a note; raise what must be raised."""
        if not self._tried or self._proven:
            raise error
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        if self.wanted is True:
            raise TrainingError(f"The loss cannot be compiled here ({reason}): train with compile=False.") from error
        self.decision, self._compiled = {"compile": False, "after": done}, None
        return f"Not compiled: {reason}"


class Rate:
    """Tokens per second, smoothed over some fifty steps; the first step (allocation) and slow exceptions (compilation) fade."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._steps = 0.0, 0.0, 0

    def add(self, seconds: float, tokens: float) -> None:
        """A step took so long for so many tokens."""
        if self._steps > 1 and seconds > 20 * self._seconds:  # compiling
            return
        keep = 0.0 if self._steps <= 1 else 1 - 1 / min(self._steps, 50)
        self._seconds = keep * self._seconds + (1 - keep) * seconds
        self._tokens = keep * self._tokens + (1 - keep) * tokens
        self._steps += 1

    @property
    def tokens_per_second(self) -> float:
        """The rate now; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """How long a step takes now."""
        return self._seconds
