"""Gradients of a step that is read in several micro-batches, exact whatever the split.

    g = sum_i grad(total_i) / sum_i count_i

Sums are added before anything is divided: a micro-batch with few predictions (ragged rows, short
documents) weighs as much as it predicts, no more. The mean of means, which is common, is not that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glassformer.tasks import Loss


class Gradient(NamedTuple):
    """``mean``: the step's loss; ``norm``: of the gradient; ``predicted``: how many predictions; ``parts``: mean parts
    of the loss by name, if it has several; ``scale``: what ``.grad`` must still be multiplied by (with the clipping)."""

    mean: Tensor
    norm: Tensor
    predicted: int | Tensor
    parts: dict[str, Tensor]
    scale: float

    def numbers(self) -> tuple[float, float, float, dict[str, float]]:
        """Loss, norm, predictions and parts as numbers: the one wait for the device in a step."""
        predicted = torch.as_tensor(self.predicted, device=self.mean.device)
        loss, norm, count, *values = torch.stack([self.mean, self.norm, predicted, *self.parts.values()]).tolist()
        return loss, norm, count, dict(zip(self.parts, values, strict=True))


def gradient(forward: Callable[[Any], Loss], batches: Sequence[Any], parameters: Sequence[nn.Parameter]) -> Gradient:
    """Leave the gradient of the mean loss over all micro-batches in ``.grad``, up to the returned scale.

    With several micro-batches each total is divided by the first count meanwhile, so that sums keep their size.
    """
    first = forward(batches[0])
    unit = _at_least_one(first.count)
    (first.total / unit).backward()
    total, count, parts = first.total.detach(), first.count, dict(first.parts)
    for batch in batches[1:]:
        more = forward(batch)
        (more.total / unit).backward()
        total, count = total + more.total.detach(), count + more.count
        for name, value in more.parts.items():
            parts[name] = parts[name] + value if name in parts else value
    count = _at_least_one(count)
    scale = 1.0 if len(batches) == 1 else float(unit) / float(count)
    norm = global_norm(p.grad for p in parameters if p.grad is not None) * scale
    return Gradient(total / count, norm, count, {n: v / count for n, v in parts.items()} if len(parts) > 1 else {}, scale)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    """A batch in which nothing is predicted (documents of one token) has no loss, not an undefined one."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every ``.grad`` by ``factor``."""
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, in float32, as a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(list(tensors))]))
