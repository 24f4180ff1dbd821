"""``glassformer look activations``: the values of a whole text, written to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Model, open_loaded
from .forecast import Budget, Site, bytes_of


def activations(
    text: Annotated[Path, typer.Argument(metavar="FILE", help="The text to read.")],
    model: Model,
    site: Site,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the shards go; the same command goes on with what is there.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at a time.")] = 8,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in a window.")] = 128,
    as_type: Annotated[str, typer.Option("--as", metavar="TYPE", help="Type on disk: float32, float16, bfloat16 or float64.")] = "float32",
    most: Annotated[int | None, typer.Option("--most", min=1, help="At most so many tokens.")] = None,
    budget: Budget = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write the values at sites for every token of a text, as safetensors shards with an index."""
    from ...core.errors import InputError
    from ...look.corpus import activations as write, read_activations

    try:
        before = read_activations(out)
    except InputError:
        before = None
    loaded = open_loaded(model, device, dtype)
    made = write(loaded, text, site, out, batch=batch, context=context, dtype=as_type, most=most, budget=bytes_of(budget))
    print(f"{'all of it was there already: ' if before is not None else ''}{made!r}: {', '.join(made.sites)}")
