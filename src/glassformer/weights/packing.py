"""Loading without unpacking: quantised matrices go from the file into packed layers as they are.

plan: parameter ◄─ form ◄─ tensors        where the form only moves whole rows, it moves them packed:
      ──► Piece, Piece, …                  bytes of a row are bytes of a row, whatever numbers they stand for
"""

from __future__ import annotations

from typing import Any

import torch

from glassformer.parts.packed import Piece, pack, packable

from .assign import Filling, Plan
from .rules import Joined, Same
from .stored import Stored


def keep(model: Any, plan: Plan, dtype: torch.dtype, device: torch.device) -> set[str]:
    """Put packed layers into ``model`` wherever a plan's tensors are quantised; gives the parameters that they replace.

    ``dtype``: what they are unpacked to. Norms, biases and matrices whose form mixes columns are left to be loaded as numbers.
    """
    kept: dict[str, list[Piece]] = {}
    for filling in plan.fillings:
        if any(s.quantised for s in filling.stored) and packable(model, filling.path):
            pieces = _pieces(filling)
            if pieces is not None:
                kept[filling.path] = [Piece(p.raw.to(device), p.type) for p in pieces]
    pack(model, kept, dtype)
    return set(kept)


def _pieces(filling: Filling) -> list[Piece] | None:
    """The rows of a parameter, packed; None if its form does more than move rows."""
    form: Any = filling.form
    if not isinstance(form, Same | Joined) and not hasattr(form, "moved"):
        return None
    rows = [_rows(s) for s in filling.stored]
    if hasattr(form, "moved"):
        rows = form.moved(rows, filling.place)
    return [Piece(x, s.type) for x, s in zip(rows, filling.stored, strict=True)]


def _rows(stored: Stored) -> torch.Tensor:
    """The bytes of each row, [rows, bytes]."""
    return stored.raw().view(stored.shape[0], -1)
