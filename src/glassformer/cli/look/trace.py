"""``glassformer look trace``: causal tracing of a fact."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Device, Dtype, Edits, Model, Out, Position, Rows, Source, Target, position_of, show
from .intervening import Memory, Seed, asked_of


def trace(
    text: Annotated[str, typer.Argument(help="The text that ends before the answer.")],
    model: Model,
    subject: Annotated[str, typer.Option("--subject", metavar="WORDS", help="The words of the text that get noise (or one position).")],
    noise: Annotated[float, typer.Option("--noise", help="Strength, times the standard deviation of the embeddings.")] = 3.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Noise samples to take the mean of.")] = 10,
    window: Annotated[int, typer.Option("--window", min=1, help="Layers of attention and feed-forward restored together.")] = 1,
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
    """Put noise on a subject's embeddings, restore one state at a time, and print how much of the answer's probability comes back."""
    from ...look.tracing import causal_trace

    loaded, asked = asked_of(model, device, dtype, target, position, source, edits, memory)
    show(causal_trace(loaded, text, position_of(subject), noise=noise, samples=samples, window=window, seed=seed, **asked), out, rows)
