"""``glassformer look patch``: put values of one text's run into another's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, Target, show
from .intervening import Memory, asked_of


def patch(
    clean: Annotated[str, typer.Argument(help="The text whose answer is wanted.")],
    corrupted: Annotated[str, typer.Argument(help="The same text with something changed, of equally many tokens.")],
    model: Model,
    site: Annotated[str, typer.Option("--site", help="What is patched: resid_pre, attn_out, mlp_out, z, q, k, v, pattern, result, cross.z, ...")] = "resid_pre",
    by: Annotated[
        str | None, typer.Option("--by", help="Along which axes, of layer, position and head, joined by commas: layer,head. By default what suits the site.")
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="What is measured: logit_diff (of two targets; of one, its logit), logit, prob, logprob or kl (bits).")
    ] = "logit_diff",
    noise: Annotated[bool, typer.Option("--noise", help="Put corrupted values into the clean run, in place of clean ones into the corrupted.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Estimate by one gradient (attribution patching), and compare with the exact sweep.")] = False,
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
    """Put one value of the clean run into the corrupted one, for every place in turn, and measure how much of the clean answer comes back."""
    from ...look.patching import activation_patch, attribution_patch

    loaded, asked = asked_of(model, device, dtype, target, position, source, edits, memory)
    options: dict[str, Any] = {"by": by, "metric": metric, "direction": "noise" if noise else "denoise"} | asked
    result = (
        attribution_patch(loaded, clean, corrupted, site, exact=True, **options) if estimate else activation_patch(loaded, clean, corrupted, site, **options)
    )
    show(result, out, rows)
