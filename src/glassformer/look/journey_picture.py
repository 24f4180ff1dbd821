"""The figure of a journey: how long the stream is along the way, what each layer adds to it, and what it comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .figure import Theme, bars, heatmap, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TOKENS = 64
"""Tokens in the figure: of a longer text the last."""


def stations(journey: Any) -> list[tuple[str, str]]:
    """The stream along the way: (what is said at the axis, name of the step)."""
    way = journey._way
    prefix, stack = way.subject.prefix, way.main.half.stack
    found = [("embedding", f"{prefix}blocks.0.resid_pre")] if len(stack.blocks) else []
    for i in range(len(stack.blocks)):
        for site, word in (("resid_mid", "attention"), ("resid_mid_cross", "cross-attention"), ("resid_post", "feed-forward")):
            if f"{prefix}blocks.{i}.{site}" in journey:
                both = site == "resid_post" and f"{prefix}blocks.{i}.resid_mid" not in journey
                found.append((f"{i} both" if both else f"{i} {word}", f"{prefix}blocks.{i}.{site}"))
    return found or [("embedding", f"{prefix}embed")]


def stream_lengths(journey: Any) -> Tensor:
    """The length of the stream at every station and position, [stations t]."""
    return torch.stack([journey.values(name).norm(dim=-1) for _, name in stations(journey)])


def steep(lengths: Tensor) -> bool:
    """Whether lengths span so much that only their order of magnitude shows all rows: from an embedding to the last layers they may grow a thousandfold."""
    return float(lengths.max()) > 30 * float(lengths.min())


def additions(journey: Any) -> dict[str, Tensor]:
    """What each sublayer adds to the stream, as lengths at the position: by kind, one number per layer."""
    way = journey._way
    prefix, stack = way.subject.prefix, way.main.half.stack
    words = {"attn": "attention", "cross": "cross-attention", "ffn": "feed-forward", "experts": "feed-forward"}
    made: dict[str, list[float]] = {}
    for i, block in enumerate(stack.blocks):
        for name in block.order:
            path = next(p for p in _given(prefix, i, name) if p in journey)
            made.setdefault(words[name], []).append(float(journey.values(path, position=journey.position).norm()))
    return {word: torch.tensor(numbers) for word, numbers in made.items()}


def _given(prefix: str, i: int, name: str) -> list[str]:
    norm = {"attn": "norm1", "cross": "norm_cross"}.get(name, "norm2")
    return [f"{prefix}blocks.{i}.{norm}_post.normed", f"{prefix}blocks.{i}.{name}.out"]


def draw_journey(journey: Any, figure: Figure, theme: Theme) -> None:
    """Stream lengths by token on the left; additions by layer, and the next token, on the right."""
    parts = figure.subplots(1, 2, width_ratios=(2.2, 1)) if "probabilities" not in journey else None
    if parts is None:
        grid = figure.add_gridspec(2, 2, width_ratios=(2.2, 1))
        left, upper, lower = (figure.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1)))
        p = journey.values("probabilities", position=journey.position)
        best = p.argsort(descending=True, stable=True)[:8]
        names = [journey._way.subject.piece(int(i)) for i in best]
        bars(lower, theme, names, 100 * p[best], title="what is expected" + (" next" if journey._way.subject.causal else " here"), x="probability in %")
    else:
        left, upper = parts
    lengths = stream_lengths(journey)
    first = max(0, lengths.shape[1] - MOST_TOKENS)
    shown = lengths[:, first:]
    columns = list(journey.pieces[first:])
    rows = [word for word, _ in stations(journey)]
    texts = [[f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in row] for row in shown.tolist()] if shown.shape[1] <= 14 and len(rows) <= 40 else None
    whole = "" if not first else f" (the last {MOST_TOKENS} of {lengths.shape[1]} tokens)"
    colour = shown.clamp(min=1e-12).log10() if steep(shown) else shown
    title = f"length of the stream after each step{whole}"
    heatmap(left, theme, colour, rows, columns, title=title, label="length, its logarithm to base 10" if steep(shown) else "length", texts=texts)
    added = additions(journey)
    layers = list(range(max(map(len, added.values()), default=0)))
    here = journey._way.subject.labels([journey.position])[0]
    lines(upper, theme, layers, added, title=f"what is added at {here}", x_name="layer", y_name="length")
    upper.set_xticks(layers[:: max(1, len(layers) // 12)])
