"""When a loss is not finite: where it began.

The batch is run once more under a tap that stops at the first value that is NaN or infinite, in the
order of computation. Parameters are looked at first: a damaged one explains everything after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.errors import NotFinite
from glassformer.core.tap import Tap
from glassformer.tasks import Task


class FirstNotFinite(Tap):
    """Remembers the first site whose value is not finite (``-inf`` in masked scores is meant, so scores are passed over)."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.value: Tensor | None = None

    def visit(self, path: str, x: Tensor) -> Tensor:
        if self.path is None and not path.endswith(".scores") and not is_finite(x):
            self.path, self.value = path, x.detach()
        return x


def is_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


def explain_loss(
    model: nn.Module, task: Task, batches: Sequence[Any], step: int, loss: float, autocast: torch.dtype | None, also: Tap | None = None
) -> NotFinite:
    """The error for a loss that is not finite at ``step``: names the first site, and what to try. ``also``: the run's own tap."""
    device = next(model.parameters()).device
    for name, p in model.named_parameters():
        if not is_finite(p):
            return _error(step, f"the loss is {loss}", f"the parameter {name} (before the step)", p)
    with torch.no_grad(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for batch in batches:
            tap = FirstNotFinite()
            try:
                found = task.loss(model, batch, tap=tap if also is None else also | tap)
            except TypeError:  # a model without taps
                found = task.loss(model, batch)
            if tap.path is not None and tap.value is not None:
                return _error(step, f"the loss is {loss}", f"the site {tap.path}", tap.value)
            if not is_finite(found.total):
                return _error(step, f"the loss is {loss}", "the loss itself (every site before it is finite)", found.total)
    return NotFinite(f"Step {step}: the loss is {loss}, but the same batch run again gives a finite one. {ADVICE} If it stays, try compile=False.")


def explain_gradient(named: Iterable[tuple[str, nn.Parameter]], step: int, norm: float) -> NotFinite:
    """The error for gradients that are not finite: names the parameter nearest to the loss."""
    last: tuple[str, Tensor] | None = None
    for name, p in named:
        if p.grad is not None and not is_finite(p.grad):
            last = name, p.grad
    if last is None:
        return NotFinite(f"Step {step}: the gradient's norm is {norm}: each gradient is finite, but their squares are too large to add. {ADVICE}")
    return _error(step, f"the loss is finite, but the gradient's norm is {norm}", f"the gradient of {last[0]}", last[1])


ADVICE = "Try a lower learning rate, a longer warm-up, clipping (clip=1.0) or dtype='fp32'; the weights of this step were not saved."


def _error(step: int, what: str, where: str, x: Tensor) -> NotFinite:
    nans, infinities = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return NotFinite(f"Step {step}: {what}. The first value that is not finite is in {where}: {nans} NaN and {infinities} infinite of {x.numel()}. {ADVICE}")
