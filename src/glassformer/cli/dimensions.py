"""``glassformer dimensions``: the shapes that a text goes through."""

from __future__ import annotations

from typing import Annotated

import typer


def dimensions(
    name: Annotated[str, typer.Argument(metavar="PRESET_OR_DIR", help="A preset (gpt2, tiny, ...) or the folder of a trained model.")],
    text: Annotated[str, typer.Argument(help="The text to follow through the model.")] = "The car is red",
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change the preset: --set d_model=128.")] = None,
) -> None:
    """Follow a text through a model and print the shape of everything on the way."""
    from .models import open_shape

    shape = open_shape(name, sets or ())
    print(shape.model.dimensions(text, tokenizer=shape.tokenizer))
