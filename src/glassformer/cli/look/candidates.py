"""``glassformer look candidates``: what may come next."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, edits_of, open_loaded, position_of, show


def candidates(
    text: Annotated[str, typer.Argument(help="The text that is continued.")],
    model: Model,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Tokens that are listed.")] = 20,
    temperature: Annotated[float, typer.Option("--temperature", help="Logits are divided by it.")] = 1.0,
    position: Position = None,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
    edits: Edits = None,
) -> None:
    """List the most probable next tokens with probabilities and logits, and the entropy."""
    from ...look.next_tokens import candidates as ask

    loaded = open_loaded(model, device, dtype)
    show(ask(loaded, text, k, temperature=temperature, position=position_of(position), source=source, tap=edits_of(edits, loaded)), out, max(rows, k))
