"""What the commands that change a model's values have in common: their options, and what they ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import edits_of, open_loaded, position_of, target_of

if TYPE_CHECKING:
    from ...weights.own import Loaded

Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
Memory = Annotated[int | None, typer.Option("--memory", min=1, metavar="MB", help="Megabytes that a batch of the sweep may hold.")]


def asked_of(
    model: str,
    device: str | None,
    dtype: str | None,
    target: list[str] | None,
    position: str | None,
    source: str | None,
    edits: Path | None,
    memory: int | None = None,
) -> tuple[Loaded, dict[str, Any]]:
    """The model, and what is asked of it: the options that all functions of changes take."""
    loaded = open_loaded(model, device, dtype)
    asked: dict[str, Any] = {
        "target": target_of(target),
        "position": position_of(position),
        "source": source,
        "tap": edits_of(edits, loaded.model),
        "memory": None if memory is None else memory * 10**6,
    }
    return loaded, asked
