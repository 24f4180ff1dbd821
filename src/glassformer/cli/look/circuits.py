"""``glassformer look circuits``: what a head looks for and what it moves, read off its matrices; and which heads read which."""

from __future__ import annotations

from typing import Annotated

import typer

from ...core.errors import InputError
from .common import Device, Dtype, Model, Out, Rows, open_loaded, show


def circuits(
    model: Model,
    head: Annotated[str | None, typer.Option("--head", metavar="L.H", help="The head: layer and number, counted from 0, as 1.3.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="ov: what the head moves; qk: what it looks for.")] = "ov",
    distance: Annotated[int, typer.Option("--distance", help="qk: how many positions before the query the key stands (rotary positions).")] = 0,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="How many token pairs are listed.")] = 20,
    composition: Annotated[bool, typer.Option("--composition", help="How far each head reads what each earlier one writes, for all pairs.")] = False,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The circuits of a head as token pairs, eigenvalues and directions; or the composition between all heads."""
    from ...look import circuits as asked
    from ...look.subject import choose

    choose(kind, ("ov", "qk"), "kind of circuit")
    if composition == (head is not None):
        raise InputError("One question at a time: give --head 1.3 for the circuits of a head, or --composition for all pairs of heads.")
    if distance and (composition or kind == "ov"):
        raise InputError(f"--distance {distance} is about what a head looks for: use it with --kind qk.")
    loaded = open_loaded(model, device, dtype)
    if head is None:
        show(asked.composition_scores(loaded), out, rows)
    elif kind == "ov":
        show(asked.ov_circuit(loaded, head, k=pairs), out, rows)
    else:
        show(asked.qk_circuit(loaded, head, distance=distance, k=pairs), out, rows)
