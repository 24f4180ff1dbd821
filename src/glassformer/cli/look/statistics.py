"""``glassformer look statistics``: what the values at sites are like over a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Out, Rows, open_loaded, show


def statistics(
    text: Annotated[Path, typer.Argument(metavar="FILE_OR_FOLDER", help="The text to read, or a folder that 'look activations' wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="The model that reads the text; a folder of activations needs none.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option("--site", "-s", metavar="PATTERN", help="By default blocks.*.resid_post. Repeatable.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at a time.")] = 8,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens in a window.")] = 128,
    most: Annotated[int | None, typer.Option("--most", min=1, help="At most so many tokens.")] = None,
    rows: Rows = 40,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Mean, variance, kurtosis, outlier features and norms of the values at sites, over a text."""
    from ...core.errors import InputError
    from ...look.corpus import read_activations
    from ...look.statistics import site_statistics

    if text.is_dir():
        show(site_statistics(read_activations(text), sites=site), out, rows)
        return
    if model is None:
        raise InputError("A text is read by a model: give --model, or a folder that 'glassformer look activations' wrote.")
    show(site_statistics(open_loaded(model, device, dtype), text, site, batch=batch, context=context, most=most), out, rows)
