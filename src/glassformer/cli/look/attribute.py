"""``glassformer look attribute``: which parts of the model, or which tokens, make an output."""

from __future__ import annotations

from typing import Annotated

import typer

from ...core.errors import InputError
from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, Target, edits_of, open_loaded, position_of, show, target_of

WAYS = ("head", "layer", "neuron", "source", "gradient", "integrated", "rollout")


def attribute(
    text: Annotated[str, typer.Argument(help="The text to look at.")],
    model: Model,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="A logit as an exact sum by head, layer, neuron or source (the token that heads read); or a number per token: gradient, integrated, rollout.",
        ),
    ] = "head",
    target: Target = None,
    position: Position = None,
    baseline: Annotated[str, typer.Option("--baseline", metavar="zero|mean|ID", help="Where integrated gradients begin.")] = "zero",
    top: Annotated[int, typer.Option("--top", min=1, help="Units of each layer that are named (--by neuron).")] = 10,
    source: Source = None,
    edits: Edits = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Say which heads, layers, neurons or tokens make a logit, or the difference of two."""
    from ...look.attribution import direct_logit_attribution
    from ...look.gradients import gradient_x_input, integrated_gradients
    from ...look.result import Result
    from ...look.rollout import attention_rollout
    from ...look.subject import choose

    choose(by, WAYS, "way to attribute")
    if target and by == "rollout":
        raise InputError("--by rollout follows attention weights and knows no target: leave --target out, or choose another --by.")
    if baseline != "zero" and by != "integrated":
        raise InputError(f"--baseline {baseline} is where integrated gradients begin: use it with --by integrated.")
    if edits is not None and by in ("gradient", "integrated", "rollout"):
        raise InputError(f"--by {by} asks the model in a way of its own, where edits are not seen: use --edits with --by head, layer, neuron or source.")
    loaded, at, asked = open_loaded(model, device, dtype), position_of(position), target_of(target)
    found: Result
    if by == "gradient":
        found = gradient_x_input(loaded, text, asked, position=at, source=source)
    elif by == "integrated":
        start = int(baseline) if baseline.isascii() and baseline.isdigit() else baseline
        found = integrated_gradients(loaded, text, asked, baseline=start, position=at, source=source)
    elif by == "rollout":
        found = attention_rollout(loaded, text, position=at, source=source)
    else:
        found = direct_logit_attribution(loaded, text, target=asked, positions=at, by=by, top=top, source=source, tap=edits_of(edits, loaded.model))
    show(found, out, rows)
