"""``glassformer params``: where a model's parameters are."""

from __future__ import annotations

from typing import Annotated

import typer


def params(
    name: Annotated[str, typer.Argument(metavar="PRESET_OR_DIR", help="A preset (gpt2, tiny, ...) or the folder of a trained model.")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change the preset: --set d_model=128.")] = None,
) -> None:
    """Count a model's parameters, part by part. Nothing is allocated, so the largest presets work too."""
    from .models import open_shape

    print(open_shape(name, sets or ()).model.params())
