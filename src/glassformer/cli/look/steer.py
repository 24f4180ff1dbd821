"""``glassformer look steer``: continue a text with a direction added."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.errors import InputError
from .common import Device, Dtype, Edits, Model, Out, Rows, edits_of, open_loaded, show

if TYPE_CHECKING:
    from ...look.steering import SteeringVector


def steer(
    text: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model,
    positive: Annotated[list[str] | None, typer.Option("--positive", "-p", metavar="TEXT", help="A text to steer towards. Repeatable.")] = None,
    negative: Annotated[list[str] | None, typer.Option("--negative", metavar="TEXT", help="A text to steer away from. Repeatable.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", "-l", help="The block that the changed stream enters.")] = None,
    vector: Annotated[
        Path | None, typer.Option("--vector", metavar="FILE", help="A saved vector (.safetensors), in place of --positive, --negative and --layer.")
    ] = None,
    save_vector: Annotated[Path | None, typer.Option("--save-vector", metavar="FILE", help="Keep the vector as a .safetensors file.")] = None,
    save_edits: Annotated[
        Path | None,
        typer.Option(
            "--save-edits", metavar="FILE", help="Keep the vector, times the one --strength, as edits (.json or .safetensors) for --edits of any command."
        ),
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option("--strength", help="How many times the difference is added. Repeatable; by default 1, 2 and 4.")
    ] = None,
    start: Annotated[
        int | None, typer.Option("--from", metavar="N", help="Add it from this position on, counted from 0 in the whole row; by default everywhere.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many new tokens.")] = 24,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Draw by this temperature; by default the most probable token.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws.")] = None,
    edits: Edits = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Add the difference of two sets of texts to the stream while the model continues a text, at several strengths side by side."""
    from ...look import edits as changes, steering, steering_vectors

    if save_vector is not None:
        steering_vectors.check_saved(save_vector)
    if save_edits is not None:
        changes.check_saved(save_edits)
    if save_edits is not None and len(strength or ()) != 1:
        raise InputError(f"--save-edits keeps the vector at one strength, but {len(strength or ())} were given: name one by --strength.")
    loaded = open_loaded(model, device, dtype)
    tap = edits_of(edits, loaded.model)
    added = _vector(loaded, positive, negative, layer, vector, tap)
    options: dict[str, Any] = {k: v for k, v in (("temperature", temperature), ("seed", seed)) if v is not None}
    found = steering.steer(loaded, text, added, strength or (1.0, 2.0, 4.0), positions=start, max_new_tokens=tokens, tap=tap, **options)
    written = [added.save(save_vector)] if save_vector is not None else []  # before the table, as show() does
    if save_edits is not None and strength:
        written.append(added.intervention(strength[0], start).save(save_edits))
    show(found, out, rows)
    for path in written:
        print(f"wrote {path}")


def _vector(loaded: Any, positive: list[str] | None, negative: list[str] | None, layer: int | None, file: Path | None, tap: Any) -> SteeringVector:
    """The vector of a file, or of texts."""
    from ...look.steering import SteeringVector, steering_vector

    if file is not None:
        if positive or negative or layer is not None:
            raise InputError("--vector has a direction and its layer already: leave --positive, --negative and --layer out, or leave --vector out.")
        return SteeringVector.load(file, loaded)
    if not positive or not negative or layer is None:
        raise InputError("A direction is needed: give --positive, --negative and --layer, or a saved one by --vector.")
    return steering_vector(loaded, positive, negative, layer, tap=tap)
