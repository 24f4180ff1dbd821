"""Evaluation with confidence: the mean loss of a text that was not learnt from, and how sure it is.

Each window (a row of a batch) is one observation. With sums ``x_i`` over counts ``n_i``:

    loss  = sum x / sum n
    error = sqrt(W / (W - 1) * sum (x_i - loss n_i)^2) / sum n        over W windows

which is the standard error of a ratio of means. The interval is ``loss ± 1.96 error``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from glassformer.core.errors import DataError
from glassformer.core.fields import typed
from glassformer.core.modes import evaluating
from glassformer.core.tap import Tap
from glassformer.tasks import Batch, Task

from .data import TokenData


@dataclass(frozen=True)
class Evaluation:
    """``loss``: nats per prediction. ``error``: its standard error (nan with one observation).
    ``windows``: observations; ``tokens``: predictions; ``bytes_per_token``: of the text, if known."""

    loss: float
    error: float
    windows: int
    tokens: int
    bytes_per_token: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 of 100 such intervals hold the mean loss of all text of this kind."""
        return self.loss - 1.96 * self.error, self.loss + 1.96 * self.error

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """``loss / ln 2 / bytes per token``: comparable across tokenizers."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        sure = "" if math.isnan(self.error) else f" ± {1.96 * self.error:.4f} (95 %)"
        return f"loss {self.loss:.4f}{sure}, perplexity {self.perplexity:.2f}{bits} ({self.windows} windows, {self.tokens:,} tokens)"


def windows(data: TokenData, batch: int, context: int, *, most: int | None = None, documents: bool = False) -> Iterator[Batch]:
    """Consecutive windows that do not overlap; with more than ``most`` of them, that many at even distances.

    What remains at the end and does not fill a window is left out (a text shorter than one window is one shorter window).
    """
    if len(data) < 2:
        raise DataError(f"The validation data has {len(data)} tokens, but a prediction needs two.")
    if batch < 1 or context < 1:
        raise DataError(f"An evaluation needs at least one row of at least one token; batch={batch} and context={context} were given.")
    context = min(context, len(data) - 1)
    starts = np.arange(0, len(data) - context, context, dtype=np.int64)
    if most is not None and len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    for at in range(0, len(starts), batch):
        chosen = starts[at : at + batch]
        ids = torch.from_numpy(data.document_ids(chosen, context + 1)) if documents else None
        yield Batch(torch.from_numpy(data.read(chosen, context + 1)), ids)


@typed(DataError)
def evaluate(
    model: nn.Module,
    task: Task,
    data: TokenData | Iterable[Any],
    *,
    batch: int = 16,
    context: int = 256,
    most: int | None = None,
    documents: bool = False,
    autocast: torch.dtype | None = None,
    tap: Tap | None = None,
) -> Evaluation:
    """The loss of ``model`` on ``data`` (token data, or batches that the task understands).

    ``tap``: sees (or edits) every call. ``most``: at most so many windows. Of token data, the last window is left out if it is not full.
    The model is in evaluation mode meanwhile and back in its own afterwards.
    Raises :class:`DataError` if nothing can be predicted.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = windows(data, batch, context, most=most, documents=documents) if isinstance(data, TokenData) else data
    seen: dict[str, Any] = {} if tap is None else {"tap": tap}
    sums: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for one in batches:
            one = one.to(device) if hasattr(one, "to") else one
            rows = task.rows(model, one, **seen)
            if rows is None:
                loss = task.loss(model, one, **seen)
                rows = loss.total.reshape(1), torch.as_tensor(loss.count, device=loss.total.device).reshape(1)
            sums.append(rows[0].double())
            counts.append(rows[1].double())
    if not sums:
        raise DataError("There was no batch to evaluate on: the validation data is empty.")
    total, count = torch.cat(sums).cpu(), torch.cat(counts).cpu()
    if not count.sum() > 0:
        raise DataError("Nothing was predicted in the validation data: every document is a single token.")
    total, count = total[count > 0], count[count > 0]
    mean, n = float(total.sum() / count.sum()), len(total)
    spread = float((total - mean * count).square().sum())
    error = math.sqrt(spread * n / (n - 1)) / float(count.sum()) if n > 1 else math.nan
    return Evaluation(mean, error, n, int(count.sum()), data.bytes_per_token() if isinstance(data, TokenData) else None)
