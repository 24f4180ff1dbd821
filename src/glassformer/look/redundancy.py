"""How much heads have in common, and what is lost when the least important go.

    patterns ──► Jensen-Shannon distance between every two heads
    results  ──► correlation of what every two heads write
    loss     ──► importance: |d loss / d gate| (Taylor) and the loss with this head off (exact)
             ──► curve: heads switched off in order of importance, against random orders

A gate multiplies a head's ``z``: 1 leaves it, 0 is the same as zeroing its rows of the output projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.text import Tokenizer

from .head_loss import NUMBERS, Loss
from .patterns import each_pattern, head_names
from .result import Cell, Grid, Result
from .subject import check_whole, n_heads, n_layers, note_length
from .windows import Batch, Reading, Texts, Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figure import Theme

CONTEXT = 128
"""Tokens of a window, where the caller says nothing and the model allows it."""
QUERIES = 64
"""Positions of a window at which patterns and results are compared (spread evenly; all of a shorter one)."""
POINTS = 17
"""Points of a curve."""


@dataclass(frozen=True, eq=False)
class HeadRedundancy(Result):
    """``n`` counts heads (:attr:`heads`), ``p`` points of a curve, ``o`` orders (:attr:`orders`).

    ``pattern_distance`` [n n]: mean over queries of the Jensen-Shannon distance (square root of the divergence in bits: 0 the same, 1 nothing shared).
    ``output_correlation`` [n n]: ``sum_t <x_i, x_j> / sqrt(sum_t |x_i|^2 sum_t |x_j|^2)`` of what the heads write, means over positions taken off.

    Losses stand on two sets of windows (equal ones where one window was read, :attr:`held_out`). Those that importance is measured on: ``whole``, the
    whole model's loss; ``exact`` [n], the loss with this one head off, less ``whole``; ``taylor`` [n], mean over texts of ``|sum z . dL/dz|``.
    Those of the curves: ``least``, the whole model's loss; ``curves`` [o p], the loss with the first ``off`` [p] heads of an order switched off.
    """

    heads: tuple[str, ...]
    pattern_distance: Tensor
    output_correlation: Tensor
    taylor: Tensor
    exact: Tensor
    off: tuple[int, ...]
    orders: tuple[str, ...]
    curves: Tensor
    whole: float
    least: float
    loss: str
    tokens: int
    held_out: bool
    """Whether importance and curves come from different windows of the texts."""

    @property
    def title(self) -> str:
        return f"What {len(self.heads)} heads have in common, and what is lost without them ({self.tokens:,} tokens)"

    @property
    def agreement(self) -> float:
        """Rank correlation (Spearman) of the Taylor importance and the size of the exact change, which it estimates."""
        a, b = (x.argsort().argsort().double() for x in (self.taylor, self.exact.abs()))
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1]) if len(a) > 1 else math.nan

    def nearest(self, matrix: Tensor, largest: bool) -> list[int]:
        """For every head the other one that is nearest."""
        own = torch.eye(len(self.heads), dtype=torch.bool)
        away = matrix.nan_to_num(-2.0 if largest else 2.0).masked_fill(own, -3.0 if largest else 3.0)
        return [int(i) for i in (away.argmax(-1) if largest else away.argmin(-1))]

    def grid(self) -> Grid:
        by_pattern, by_output = self.nearest(self.pattern_distance, False), self.nearest(self.output_correlation.abs(), True)
        rows: list[tuple[Cell, ...]] = []
        for i in sorted(range(len(self.heads)), key=lambda i: float(self.exact[i])):
            a, b = by_pattern[i], by_output[i]
            near = (self.heads[a], round(float(self.pattern_distance[i, a]), 3), self.heads[b], round(float(self.output_correlation[i, b]), 3))
            rows.append((self.heads[i], self.whole + float(self.exact[i]), float(self.exact[i]), float(self.taylor[i]), *near))
        columns = ("head", "loss without it", "more than whole", "Taylor", "nearest pattern", "distance", "nearest output", "correlation")
        return Grid(columns, tuple(rows), "\n".join(self._said()))

    def _said(self) -> list[str]:
        """What each loss is."""
        n = len(self.heads)
        few = sorted({min(range(len(self.off)), key=lambda p: abs(self.off[p] - n * part / 4)) for part in (1, 2, 3, 4)})
        other = "other windows than importance was measured on" if self.held_out else "the same window (one was read)"
        lines = [
            f"Loss: {self.loss}. Whole model: {self.whole:.4g}; without it: with that one head off. "
            f"Importance by Taylor and by ablation agree to a rank correlation of {self.agreement:.2f}.",
            f"Loss without the first {', '.join(str(self.off[p]) for p in few)} of {n} heads (the least important first, or in random order), "
            f"on {other}; whole model there: {self.least:.4g}.",
        ]
        each = zip(self.orders, self.curves, strict=True)
        return lines + [f"  {order}: {', '.join(f'{float(curve[p]):.4g}' for p in few)}" for order, curve in each]

    def size(self) -> tuple[float, float]:
        return (11.0, 8.5)

    def draw(self, figure: Figure, theme: Theme) -> None:
        from .figure import dress, heatmap, lines

        (a, b), (c, d) = figure.subplots(2, 2)
        names = list(self.heads)
        step = -(-len(names) // 12)
        for ax, values, title, signed in ((a, self.pattern_distance, "patterns: distance", False), (b, self.output_correlation, "outputs: correlation", True)):
            heatmap(ax, theme, values.numpy(), names, names, title=title, signed=signed, limit=1.0)
            ax.set_xticks(range(0, len(names), step), names[::step])
            ax.set_yticks(range(0, len(names), step), names[::step])
        c.plot(self.taylor.tolist(), self.exact.tolist(), "o", color=theme.series[0], markersize=4)
        for i in self.exact.argsort(descending=True)[:6].tolist():
            c.annotate(names[i], (float(self.taylor[i]), float(self.exact[i])), color=theme.dim, fontsize=8, xytext=(4, 2), textcoords="offset points")
        c.axhline(0, color=theme.dim, linewidth=1, linestyle="--")
        title = f"one head off (the two importances: rank correlation {self.agreement:.2f})"
        dress(c, theme, title, "Taylor importance", f"loss without the head − whole model's ({self.whole:.3g})")
        named = dict(zip(self.orders, self.curves, strict=True))
        title = "several heads off, the least important first, or at random"
        lines(
            d, theme, self.off, named, title="several heads off, the least important first, or at random", x_name=f"heads off, of {len(names)}", y_name="loss"
        )
        d.axhline(self.least, color=theme.dim, linewidth=1, linestyle="--")
        d.annotate(
            f"whole model {self.least:.3g}", (1, self.least), xycoords=("axes fraction", "data"), color=theme.dim, fontsize=8, ha="right", va="bottom",
            xytext=(-2, 2), textcoords="offset points",
        )  # fmt: skip


def head_redundancy(
    model: Any,
    texts: Texts,
    *,
    tokenizer: Tokenizer | None = None,
    source: Any = None,
    context: int | None = None,
    tokens: int | None = 1024,
    random_orders: int = 3,
    points: int = POINTS,
    seed: int = 0,
) -> HeadRedundancy:
    """Similarity of heads, their importance, and the loss as heads are switched off.

    Loss: of a decoder the cross-entropy of the next token, of an encoder with a read-out that of hidden tokens (one in seven, hidden by the tokenizer's mask
    token, or read in place where there is none), of a model without scores over tokens ``1 - cosine`` of its output with the whole model's.
    Importance: ``|sum z . dL/dz|`` per text, averaged (Michel et al., arXiv 1905.10650); a drift has no slope at 0, so there it is the length of the
    output's derivative by the gate, estimated along random directions. Exact: every head off alone. With two windows or more, importance comes from
    every other one and the curves from the rest. Cross-attention is left as it is. Raises :class:`InputError` for texts without two tokens.
    """
    check_whole(0, points=points, random_orders=random_orders, seed=seed)
    if points < 2 or random_orders < 1:
        raise InputError(f"points={points} and random_orders={random_orders}: a curve has at least 2 points, and at least 1 random order is compared with.")
    reading = Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    if context is None:
        reading.context = min(reading.context, CONTEXT)
    every = [w for w in reading.windows() if len(w.ids) > 1]
    if not every:
        raise InputError("A loss needs a text of at least 2 tokens: give a longer one.")
    note_length(reading.model, max(len(w.ids) for w in every))
    names = head_names(reading.stack)
    reading.sites("blocks.*.attn.z")
    alike = _similarity(reading)
    draw = torch.Generator().manual_seed(seed)
    measure = Loss(reading, draw)
    learn, judge = (every[::2], every[1::2]) if len(every) > 1 else (every, every)
    taylor = measure.taylor(learn)
    n = len(names)
    alone = measure.with_off([*(torch.tensor([i]) for i in range(n)), torch.zeros(0, dtype=torch.long)], learn)
    exact = alone[:-1] - alone[-1]
    orders = {"by Taylor": taylor.argsort(), "by ablation": exact.argsort()}
    orders |= {f"random {i + 1}": torch.randperm(n, generator=draw) for i in range(random_orders)}
    off = tuple(sorted({round(i * n / (points - 1)) for i in range(points)}))
    curves = measure.with_off([order[:k] for order in orders.values() for k in off], judge).view(len(orders), len(off))
    shown, values = _with_mean(tuple(orders), curves)
    return HeadRedundancy(
        names,
        *alike,
        taylor.float(),
        exact.float(),
        off,
        shown,
        values.float(),
        float(alone[-1]),
        float(values[0, 0]),
        measure.name,
        sum(len(w.ids) for w in every),
        len(every) > 1,
    )


def _with_mean(orders: tuple[str, ...], curves: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """The random orders' mean beside their lowest and highest."""
    random = curves[2:]
    if len(random) == 1:
        return (*orders[:2], "random"), curves
    return (*orders[:2], "random (mean)", "random (lowest)", "random (highest)"), torch.cat(
        [curves[:2], random.mean(0, keepdim=True), random.amin(0, keepdim=True), random.amax(0, keepdim=True)]
    )


# Similarity


def _similarity(reading: Reading) -> tuple[Tensor, Tensor]:
    """Distances of patterns and correlations of outputs, [n n] each; one batch's chosen queries are held at a time."""
    stack = reading.stack
    n = len(head_names(stack))
    first = [sum(n_heads(stack, i) for i in range(layer)) for layer in range(n_layers(stack))]
    reading.at_once = max(1, min(reading.at_once, NUMBERS // (n * QUERIES)))
    distance, queries = torch.zeros(n, n, dtype=torch.float64), 0
    held: dict[int, Tensor] = {}

    def places(w: Window) -> Tensor:
        return torch.linspace(0, len(w.ids) - 1, min(QUERIES, len(w.ids))).round().long().unique()

    def take(layer: int, heads: slice, pattern: Tensor, visible: Tensor, batch: Batch) -> None:
        nonlocal queries
        for row, w in enumerate(batch.windows):
            at = places(w)
            at = at[visible[row % len(visible), at][:, : len(w.ids)].sum(-1) > 1]  # a query that sees one position has no choice
            rows = held.setdefault(row, torch.zeros(n, len(at), len(w.ids), dtype=torch.float64))
            rows[first[layer] + heads.start : first[layer] + heads.stop] = pattern[row, :, at, : len(w.ids)].abs()
        if layer == len(first) - 1 and heads.stop == n_heads(stack, layer):
            for rows in held.values():
                distance.add_(_js(rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)))
                queries += rows.shape[1]
            held.clear()

    each_pattern(reading, take)
    return (distance / queries).float() if queries else torch.full((n, n), torch.nan), _correlation(reading, places)


def _js(share: Tensor) -> Tensor:
    """Sum over queries of the Jensen-Shannon distance between every two heads' rows: [n q s] -> [n n]."""
    n = len(share)
    entropy = torch.special.entr(share).sum(-1)
    found = torch.zeros(n, n, dtype=share.dtype)
    for i in range(n - 1):
        middle = torch.special.entr((share[i] + share[i + 1 :]) / 2).sum(-1)
        divergence = (middle - (entropy[i] + entropy[i + 1 :]) / 2).clamp_min(0) / math.log(2)
        found[i, i + 1 :] = divergence.sqrt().sum(-1)
    return found + found.T


def _correlation(reading: Reading, places: Any) -> Tensor:
    n = len(head_names(reading.stack))
    if not reading.subject.has("blocks.*.attn.result"):
        return torch.full((n, n), torch.nan)  # a model that only lends its borders does not show them
    paths = reading.sites("blocks.*.attn.result")
    reading.at_once = max(1, min(reading.at_once, NUMBERS // (n * int(reading.stack.spec.d_model))))
    product, count = torch.zeros(n, n, dtype=torch.float64), 0
    mean: Tensor | None = None
    held: list[Tensor] = []

    def take(path: str, x: Tensor, batch: Batch) -> None:
        nonlocal mean, count
        held.append(torch.cat([x[row, places(w).to(x.device)] for row, w in enumerate(batch.windows)]).cpu().double())
        if path == paths[-1]:
            written = torch.cat(held, 1)  # [t n d]
            product.add_(torch.einsum("tid,tjd->ij", written, written))
            mean = written.sum(0) if mean is None else mean + written.sum(0)
            count += len(written)
            held.clear()

    reading.run(paths, take)
    assert mean is not None
    product -= mean @ mean.T / count
    size = product.diagonal().clamp_min(0).sqrt()
    nothing = size <= 1e-9 * size.max().clamp_min(1e-30)  # a head that writes the same everywhere has no correlation
    found = (product / (size[:, None] * size).clamp_min(1e-300)).clamp(-1, 1)
    return found.masked_fill(nothing[:, None] | nothing, torch.nan).float()


__all__ = ["HeadRedundancy", "head_redundancy"]
