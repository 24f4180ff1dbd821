"""``glassformer look journey``: every step of one text's way through a model."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Position, Rows, Source, open_loaded, position_of, show


def journey(
    text: Annotated[str, typer.Argument(help="The text whose way is shown.")],
    model: Model,
    layer: Annotated[int | None, typer.Option("--layer", "-l", min=0, help="Show the steps of this layer only, counted from 0.")] = None,
    head: Annotated[
        int | None, typer.Option("--head", min=0, help="The head that sentences speak of; by default, in each layer, the one whose pattern is narrowest.")
    ] = None,
    position: Position = None,
    source: Source = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="How the next token is drawn: 0 is greedy, which is also the default.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw among the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw among the fewest tokens that hold this probability.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Leave out tokens below this share of the best one's probability.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed draws the same token.")] = None,
    rows: Rows = 400,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Show every step from the text to the next token: its name, its shape, and what it means for this text."""
    from ...infer.named import build_chain
    from ...look.journeys import journey as ask

    loaded = open_loaded(model, device, dtype)
    chain = build_chain(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    show(ask(loaded, text, source=source, position=position_of(position), layer=layer, head=head, sampler=chain), out, rows)
