"""Predict the next token: the task that makes a language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassformer.core.errors import SpecError, TrainingError
from glassformer.core.flow import Ledger
from glassformer.core.mask import And, Causal, Mask, SameDocument
from glassformer.core.spec import part
from glassformer.parts.readout import LanguageModel, ReadOut

from .task import Batch, Loss, Task

IGNORED = -100  # the target of a position that predicts nothing: the last token of a document


@part
class NextToken(Task):
    """Cross entropy of each token given those before it.

        L = - sum_t log p(x_{t+1} | x_<=t)

    ``label_smoothing`` mixes the target with the uniform distribution (arXiv 1512.00567); ``z_loss`` adds
    ``z_loss * log(Z)^2`` with ``Z`` the softmax's denominator, which keeps logits near zero (arXiv 2204.02311).
    With ``batch.documents`` no token attends to another document, and the first token of a document is
    not predicted from the one before. Balance losses that experts charge are added, weighted by the count.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(f"label_smoothing is a share of the target, from 0 up to but not including 1; {self.label_smoothing} was given.")
        if self.z_loss < 0.0:
            raise SpecError(f"z_loss is a weight, 0 or more; {self.z_loss} was given.")

    def check(self, model: nn.Module) -> None:
        """The model is causal (else it sees what it should predict) and reads out scores over a vocabulary; models without a ``spec`` pass."""
        spec = getattr(model, "spec", None)
        fits = "NextToken trains a Decoder (mask Causal) with the read-out LanguageModel"
        if hasattr(spec, "encoder") and hasattr(spec, "decoder"):
            raise TrainingError(
                f"{fits}, but this model is an {type(spec).__name__}, which reads a second text: use a Decoder, or write a Task that gives it both."
            )
        mask, readout = getattr(spec, "mask", None), getattr(spec, "readout", None)
        if isinstance(mask, Mask) and not _causal(mask):
            raise TrainingError(f"{fits}, but this {type(spec).__name__} has the mask {mask!r} and sees the tokens it should predict: use a Decoder.")
        if isinstance(readout, ReadOut) and not isinstance(readout, LanguageModel):
            raise TrainingError(f"{fits}, but this {type(spec).__name__} has the read-out {type(readout).__name__}: build it with readout=LanguageModel().")

    def loss(self, model: nn.Module, batch: Batch, **kw: Any) -> Loss:
        """Summed loss in float32. ``batch.tokens``: [b t+1]; the model sees [b t] and is asked for [b t]."""
        ledger = Ledger() if getattr(model, "has_experts", False) else None
        if ledger is not None:
            kw["aux"] = ledger
        logits, targets, count = _predict(model, batch, **kw)
        flat = logits.flatten(0, 1).float()
        total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing)
        parts = {"cross_entropy": total.detach()}
        if self.z_loss:
            z = self.z_loss * torch.logsumexp(flat, -1).square().masked_fill(targets.flatten() == IGNORED, 0.0).sum()
            total, parts["z_loss"] = total + z, z.detach()
        charged = ledger.total() if ledger is not None else None
        if charged is not None:
            total, parts["balance"] = total + charged * count, (charged * count).detach()
        return Loss(total, count, parts)

    def rows(self, model: nn.Module, batch: Batch, **kw: Any) -> tuple[Tensor, Tensor]:
        """Plain cross entropy by row, without smoothing or added terms: [b] sums, [b] counts."""
        logits, targets, _ = _predict(model, batch, **kw)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(targets).sum(1), (targets != IGNORED).sum(1)


def _causal(mask: Mask) -> bool:
    return isinstance(mask, Causal) or (isinstance(mask, And) and any(_causal(term) for term in mask.terms))


def _predict(model: nn.Module, batch: Batch, **kw: Any) -> tuple[Tensor, Tensor, int | Tensor]:
    """Logits [b t v], targets [b t] and the count of targets that are not ignored."""
    tokens, documents = batch.tokens[:, :-1], batch.documents
    targets = batch.tokens[:, 1:]
    if documents is None:
        return model(tokens, **kw), targets, targets.numel()
    inside = documents[:, 1:] == documents[:, :-1]
    logits = model(tokens, mask=SameDocument(documents[:, :-1]), **kw)
    return logits, targets.masked_fill(~inside, IGNORED), inside.sum()
