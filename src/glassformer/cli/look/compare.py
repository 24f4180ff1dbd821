"""``glassformer look compare``: what changes in the output when a text becomes another."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, Target, edits_of, open_loaded, position_of, show, target_of


def compare(
    text: Annotated[str, typer.Argument(help="The first text.")],
    other: Annotated[str, typer.Argument(help="The second text; it may be longer or shorter.")],
    model: Model,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Most probable tokens of each text that are listed.")] = 20,
    target: Target = None,
    position: Position = None,
    source: Source = None,
    other_source: Annotated[str | None, typer.Option("--other-source", metavar="TEXT", help="The encoder's text for the second; by default the same.")] = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
    edits: Edits = None,
) -> None:
    """Compare the outputs after two texts: ranks and probabilities, where in the layers they part, and which heads carry the change."""
    from ...look.comparison import compare as ask

    loaded = open_loaded(model, device, dtype)
    found = ask(
        loaded,
        text,
        other,
        k,
        target=target_of(target),
        position=position_of(position),
        source=source,
        other_source=other_source,
        tap=edits_of(edits, loaded),
    )
    show(found, out, rows)
