"""``glassformer verify``: a checkpoint here and in transformers, site by site."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..weights.verify import Verification


def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder in the Hugging Face format, or hf://owner/name.")],
    text: Annotated[str | None, typer.Option("--text", help="What to run; by default fixed random tokens.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="The type that both compute in.")] = "float32",
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="The largest error of a site, relative to its largest number; by default 1e-4 (5e-2 in bfloat16).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Compare a model with the transformers library: every site that both have. Exit code 1 if they differ."""
    from ..weights.verify import verify as compare

    found = compare(folder, text=text, dtype=dtype, tolerance=tolerance)
    if as_json:
        print(json.dumps(found.to_dict()))
    elif sys.stdout.isatty():
        _table(found)
    else:
        print(found)
    if not found.agrees:
        raise typer.Exit(1)


def _table(found: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("site")
    table.add_column("shape", style="dim")
    table.add_column("max abs", justify="right")
    table.add_column("max rel", justify="right")
    for c in found.compared:
        style = None if c.relative <= found.tolerance else "red"
        table.add_row(c.site, " ".join(map(str, c.shape)), f"{c.error:.1e}", f"{c.relative:.1e}", style=style)
    console = Console()
    console.print(table)
    console.print(found.counts, highlight=False)
    console.print(found.verdict, style="bold green" if found.agrees else "bold red", highlight=False)
