"""What every task shares: the batch it is given, the loss it gives back.

A task is a Spec that turns a model and a batch into a :class:`Loss`:

    loss = task.loss(model, batch)
    loss.total      the sum over everything that was predicted; differentiable
    loss.count      how many predictions are in the sum
    loss.mean       total / count

Sums and counts, not means, because they add up: a step over several ragged micro-batches is the
sum of the totals over the sum of the counts, whatever the split.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from glassformer.core.spec import Spec


class Batch(NamedTuple):
    """Windows of running text. ``tokens``: int64 [b t+1], inputs and targets overlap by one step to the left;
    ``documents``: int64 [b t+1], the number of the document that each token belongs to, or None."""

    tokens: Tensor
    documents: Tensor | None = None

    def to(self, device: Any) -> Batch:
        """This batch on another device."""
        return Batch(self.tokens.to(device, non_blocking=True), None if self.documents is None else self.documents.to(device, non_blocking=True))


class Loss(NamedTuple):
    """``total``: scalar tensor, the sum over all predictions. ``count``: how many there are.
    ``parts``: detached sums by name (``cross_entropy``, ``z_loss``, ``balance``), for the log."""

    total: Tensor
    count: int | Tensor  # type: ignore[assignment]  # a field, not tuple.count
    parts: dict[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """``total / count``."""
        return self.total / self.count


class Task(Spec):
    """Base of all tasks."""

    def check(self, model: nn.Module) -> None:
        """Raise :class:`~glassformer.core.errors.TrainingError` if this task cannot train ``model``; called once, before the first step."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, **kw: Any) -> Loss:
        """The loss of ``model`` on ``batch``; ``kw`` goes on to the model's call (``tap=…``)."""

    def rows(self, model: nn.Module, batch: Any, **kw: Any) -> tuple[Tensor, Tensor] | None:
        """Sums and counts by row ([b], [b]) of what an evaluation reports, or None if the task has none; ``kw`` as in :meth:`loss`.

        An evaluation says by them how sure it is; without them each batch counts as one observation.
        """
        return None
