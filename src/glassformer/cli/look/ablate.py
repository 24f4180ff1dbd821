"""``glassformer look ablate``: take parts of a model away."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, Target, show
from .intervening import Memory, Seed, asked_of


def ablate(
    text: Annotated[str, typer.Argument(help="The text whose prediction is watched.")],
    model: Model,
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--what",
            metavar="PART",
            help="'5.1' (a head), 'ffn 3.412' (a unit), 'attn 3', 'ffn 3', 'block 3', 'position 4'. Repeatable. By default every head.",
        ),
    ] = None,
    how: Annotated[str, typer.Option("--how", help="What takes its place: zero, mean, or resample (values at random positions).")] = "zero",
    reference: Annotated[
        list[str] | None, typer.Option("--reference", metavar="TEXT", help="A text to take means or samples from. Repeatable; by default the text itself.")
    ] = None,
    seed: Seed = 0,
    target: Target = None,
    position: Position = None,
    source: Source = None,
    memory: Memory = None,
    edits: Edits = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Take heads, units, layers or positions away and print what the prediction loses."""
    from ...look import ablation

    loaded, asked = asked_of(model, device, dtype, target, position, source, edits, memory)
    taken = {"how": how, "reference": reference, "seed": seed} | asked
    show(ablation.ablate(loaded, text, list(what), **taken) if what else ablation.ablate_heads(loaded, text, **taken), out, rows)
