"""``glassformer look steer``: continue a text with a direction added."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import Device, Dtype, Model, Out, Rows, open_loaded, show


def steer(
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model,
    positive: Annotated[list[str], typer.Option("--positive", "-p", metavar="TEXT", help="A text to steer towards. Repeatable.")],
    negative: Annotated[list[str], typer.Option("--negative", "-n", metavar="TEXT", help="A text to steer away from. Repeatable.")],
    layer: Annotated[int, typer.Option("--layer", "-l", help="The block that the changed stream enters.")],
    strength: Annotated[
        list[float] | None, typer.Option("--strength", "-s", help="How many times the difference is added. Repeatable; by default 1, 2 and 4.")
    ] = None,
    start: Annotated[
        int | None, typer.Option("--from", metavar="N", help="Add it from this position on, counted from 0 in the whole row; by default everywhere.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many new tokens.")] = 24,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Draw by this temperature; by default the most probable token.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws.")] = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Add the difference of two sets of texts to the stream while the model continues a text, at several strengths side by side."""
    from ...look import steering

    loaded = open_loaded(model, device, dtype)
    vector = steering.steering_vector(loaded, list(positive), list(negative), layer)
    options: dict[str, Any] = {k: v for k, v in (("temperature", temperature), ("seed", seed)) if v is not None}
    show(steering.steer(loaded, text, vector, strength or (1.0, 2.0, 4.0), positions=start, max_new_tokens=tokens, **options), out, rows)
