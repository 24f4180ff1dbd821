"""``glassformer look redundancy``: what heads have in common, and what is lost without them."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Rows, Source, open_loaded, show
from .heads import text_or_file


def redundancy(
    text: Annotated[str, typer.Argument(help="A text file, or a text.")],
    model: Model,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text that are read.")] = 1024,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Tokens of a window that the text is cut into.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random orders.")] = 0,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Which heads look and write alike, how much the loss rises without each, and how it grows as the least important go."""
    from ...look.redundancy import head_redundancy

    loaded = open_loaded(model, device, dtype)
    show(head_redundancy(loaded, text_or_file(text), source=source, context=context, tokens=tokens, seed=seed), out, rows)
