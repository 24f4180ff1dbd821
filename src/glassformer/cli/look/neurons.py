"""``glassformer look neurons``: units of feed-forward layers over a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Rows, Source, open_loaded, show


def neurons(
    file: Annotated[Path, typer.Argument(help="A text file (also .gz, .xz, .bz2): what the model reads.")],
    model: Model,
    layer: Annotated[int | None, typer.Option("--layer", help="One layer, counted from 0; by default all.")] = None,
    unit: Annotated[list[int] | None, typer.Option("--unit", "-u", help="A unit of that layer; repeatable. By default the most peaked ones.")] = None,
    top: Annotated[int, typer.Option("--top", help="Contexts for each unit.")] = 10,
    count: Annotated[int, typer.Option("--count", help="How many units are shown where none is named.")] = 8,
    by: Annotated[
        str, typer.Option("--by", help="Contexts where the unit is: largest, smallest, absolute (far from zero), or extreme (the end further from its mean).")
    ] = "extreme",
    skip: Annotated[int, typer.Option("--skip", help="Tokens at the beginning of every window that do not count.")] = 0,
    tokens: Annotated[int, typer.Option("--tokens", help="Read at most so many tokens of the file.")] = 200_000,
    context: Annotated[int | None, typer.Option("--context", help="Tokens of a window; by default 256, or what the model has positions for.")] = None,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="How few units speak at a time, layer by layer, in place of single units.")] = False,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What single feed-forward units answer to in a text file, and which tokens they raise."""
    from ... import look
    from ...core.errors import InputError

    if unit and layer is None:
        raise InputError("--unit names a unit within a layer, but no layer was given: add --layer.")
    loaded = open_loaded(model, device, dtype)
    if sparsity:
        show(look.sparsity(loaded, file, tokens=tokens, context=context, source=source), out, rows)
        return
    found = look.neurons(loaded, file, layer=layer, units=unit, top=top, count=count, by=by, skip=skip, tokens=tokens, context=context, source=source)
    show(found[0] if unit is not None and len(unit) == 1 else found, out, rows)
