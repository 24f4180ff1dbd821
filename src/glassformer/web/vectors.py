"""``/v1/embeddings``: one vector for each text.

A sentence encoder gives its own (:class:`~glassformer.parts.readout.Vector`); of any other model it is the mean of the last states (``resid_final``)
over the text, of an encoder-decoder that of its encoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.modes import evaluating
from glassformer.core.tap import Record
from glassformer.parts.readout import Vector

BATCH_TOKENS = 8192
"""Tokens that are read at once, padding included."""


def vectors(model: Any, rows: Sequence[Sequence[int]], check: Callable[[], None] = lambda: None) -> Tensor:
    """``[n d]`` in float32; rows of like length are read together. ``check`` is called before each pass, and may raise."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    at = 0
    while at < len(order):
        check()
        end = at + 1
        while end < len(order) and (end + 1 - at) * len(rows[order[end]]) <= BATCH_TOKENS:
            end += 1
        batch = order[at:end]
        for i, vector in zip(batch, _read(model, [rows[i] for i in batch]), strict=True):
            found[i] = vector
        at = end
    return torch.stack(found)


def _read(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    device = next(model.parameters()).device
    lengths = [len(r) for r in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    ids = ids.to(device)
    fed = lengths if len(set(lengths)) > 1 else None
    with torch.no_grad(), evaluating(model):
        if hasattr(model, "encode") and hasattr(model, "decode"):
            return _mean(model.encode(ids, lengths), lengths)
        if isinstance(getattr(model.spec, "readout", None), Vector):
            return model(ids, lengths=fed).float().cpu()
        tap = Record("resid_final")
        model(ids, lengths=fed, tap=tap)
        return _mean(tap["resid_final"], lengths)


def _mean(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Over the real positions, ``[b t d] -> [b d]``."""
    n = torch.tensor(lengths, device=states.device)
    real = torch.arange(states.shape[1], device=states.device)[None] < n[:, None]
    return ((states.float() * real[:, :, None]).sum(1) / n[:, None]).cpu()


def width(model: Any) -> int:
    """How long the vectors are."""
    spec = getattr(model.spec, "encoder", model.spec)
    return int(spec.d_model)
