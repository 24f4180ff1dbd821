"""How much heads have in common, and what is lost when the least important go.

    patterns ──► Jensen-Shannon distance between every two heads
    results  ──► correlation of what every two heads write
    loss     ──► importance: |d loss / d gate| (Taylor) and the loss with this head off (exact)
             ──► curve: heads switched off in order of importance, against random orders

A gate multiplies a head's ``z``: 1 leaves it, 0 is the same as zeroing its rows of the output projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.core.tap import Tap
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer

from .patterns import each_pattern, head_names
from .result import Cell, Grid, Result
from .subject import check_whole, n_heads, n_layers, read, reads_tokens, vocabulary
from .windows import Batch, Reading, Texts, Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figure import Theme

CONTEXT = 128
"""Tokens of a window, where the caller says nothing and the model allows it."""
QUERIES = 64
"""Positions of a window at which patterns and results are compared (spread evenly; all of a shorter one)."""
DIRECTIONS = 8
"""Random directions of the output along which gradients are taken, where there is no loss over tokens."""
POINTS = 17
"""Points of a curve."""
AT_ONCE = 8192
"""Tokens of a batch of ablations."""
NUMBERS = 2**24
"""Numbers that are held at once: scores over the vocabulary of a batch of ablations, and what all heads write at a batch's chosen queries."""
NEXT, HIDDEN, IN_PLACE = "cross-entropy of the next token", "cross-entropy of hidden tokens", "cross-entropy of tokens that are read in place"
DRIFT = "drift of the output (1 - cosine with the whole model's)"


@dataclass(frozen=True, eq=False)
class HeadRedundancy(Result):
    """``n`` counts heads (:attr:`heads`), ``p`` points of a curve, ``o`` orders (:attr:`orders`).

    ``pattern_distance`` [n n]: mean over queries of the Jensen-Shannon distance (square root of the divergence in bits: 0 the same, 1 nothing shared).
    ``output_correlation`` [n n]: ``sum_t <x_i, x_j> / sqrt(sum_t |x_i|^2 sum_t |x_j|^2)`` of what the heads write, means over positions taken off.
    ``taylor`` [n]: mean over texts of ``|sum z . dL/dz|``; ``exact`` [n]: the loss with this head off, less the whole model's.
    ``curves`` [o p]: the loss with the first ``off`` [p] heads of an order switched off; ``least``: the whole model's loss.
    """

    heads: tuple[str, ...]
    pattern_distance: Tensor
    output_correlation: Tensor
    taylor: Tensor
    exact: Tensor
    off: tuple[int, ...]
    orders: tuple[str, ...]
    curves: Tensor
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
            rows.append((self.heads[i], float(self.exact[i]), float(self.taylor[i]), *near))
        half = min(range(len(self.off)), key=lambda p: abs(self.off[p] - len(self.heads) / 2))
        lost = ", ".join(f"{o} {float(c[half]):.4g}" for o, c in zip(self.orders, self.curves, strict=True))
        other = "on other windows than importance was measured on" if self.held_out else "on the same window (one was read)"
        note = (
            f"Loss: {self.loss}; whole model {self.least:.4g}. Importance by Taylor and by ablation agree to a rank correlation of {self.agreement:.2f}. "
            f"With {self.off[half]} of {len(self.heads)} heads off, {other}: {lost}."
        )
        return Grid(("head", "loss added", "Taylor", "nearest pattern", "distance", "nearest output", "correlation"), tuple(rows), note)

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
        dress(c, theme, f"importance (rank correlation {self.agreement:.2f})", "Taylor", "loss without the head, less the whole model's")
        lines(d, theme, self.off, dict(zip(self.orders, self.curves, strict=True)), title="heads switched off", x_name="heads off", y_name="loss")


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
    names = head_names(reading.stack)
    reading.sites("blocks.*.attn.z")
    alike = _similarity(reading)
    draw = torch.Generator().manual_seed(seed)
    measure = _Loss(reading, draw)
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


# Loss


class _Gates(Tap):
    """Multiplies every head's ``z`` by a gate, [b n]."""

    def __init__(self, gates: Tensor, first: dict[str, tuple[int, int]]):
        self.gates, self.first = gates, first

    def visit(self, path: str, x: Tensor) -> Tensor:
        if path not in self.first:
            return x
        start, stop = self.first[path]
        return x * self.gates[:, None, start:stop, None].to(x.dtype)

    def edits(self, path: str) -> bool:
        return path in self.first


class _Loss:
    """The loss of windows under gates."""

    def __init__(self, reading: Reading, draw: torch.Generator):
        self.reading, self.draw = reading, draw
        stack, self.model = reading.stack, reading.model
        self.n = len(head_names(stack))
        begin, self.first = 0, dict[str, tuple[int, int]]()
        for layer, path in enumerate(reading.sites("blocks.*.attn.z")):
            self.first[path] = (begin, begin + n_heads(stack, layer))
            begin += n_heads(stack, layer)
        self.scores = reads_tokens(stack)
        self.mask = None if reading.subject.causal or reading.tokenizer is None else reading.tokenizer.mask_id
        self.name = DRIFT if not self.scores else NEXT if reading.subject.causal else HIDDEN if self.mask is not None else IN_PLACE
        self.hidden: dict[Window, list[int]] = {}
        self.whole: dict[Window, Tensor] = {}

    def out(self, window: Window, gates: Tensor) -> Tensor:
        """What the model makes of a window, once for every row of ``gates`` [b n]."""
        s = read(self.model, list(window.ids), self.reading.tokenizer, source=self._source(window))
        if self.mask is not None and self.scores:
            s = read(self.model, [self.mask if i in self._hidden(window) else t for i, t in enumerate(window.ids)], self.reading.tokenizer)
        inputs = [x.expand(len(gates), -1) for x in s.inputs]
        y: Tensor = self.model(*inputs, tap=_Gates(gates.to(s.device), self.first))
        return y

    def _source(self, window: Window) -> Any:
        return self.reading.source(window.text) if isinstance(self.model, EncoderDecoderModel) else None

    def _hidden(self, window: Window) -> list[int]:
        """The places that are hidden or read in place: one in seven of the text's own, at least one."""
        if window not in self.hidden:
            own = torch.arange(window.before, len(window.ids) - window.after)
            self.hidden[window] = own[torch.randperm(len(own), generator=self.draw)[: max(1, len(own) // 7)]].tolist()
        return self.hidden[window]

    def of(self, window: Window, gates: Tensor) -> Tensor:
        """The loss [b] of a window for every row of gates."""
        y = self.out(window, gates)
        if not self.scores:
            return 1 - F.cosine_similarity(y.flatten(1).double(), self._whole(window).double(), -1).cpu()
        ids = torch.tensor(window.ids, device=y.device)
        at = torch.arange(len(ids) - 1) if self.name == NEXT else torch.tensor(self._hidden(window))
        targets = ids[at + 1] if self.name == NEXT else ids[at]
        chosen = y[:, at].double().log_softmax(-1)
        return -chosen.gather(-1, targets.expand(len(gates), -1)[..., None])[..., 0].mean(-1).cpu()

    def _whole(self, window: Window) -> Tensor:
        if window not in self.whole:
            self.whole[window] = self.out(window, torch.ones(1, self.n)).flatten(1).detach()
        return self.whole[window]

    def taylor(self, windows: Sequence[Window]) -> Tensor:
        """Importance [n]: the mean over windows of the absolute slope of the loss by each gate."""
        total = torch.zeros(self.n, dtype=torch.float64)
        with evaluating(self.model), torch.enable_grad():
            for w in windows:
                gates = torch.ones(1, self.n, requires_grad=True)
                if self.scores:
                    total += torch.autograd.grad(self.of(w, gates).sum(), gates)[0][0].double().abs()
                else:
                    total += self._lengths(w, gates)
        return total / len(windows)

    def _lengths(self, w: Window, gates: Tensor) -> Tensor:
        """The length of the derivative of the output (as a unit vector) by each gate, by random directions: ``E (u . dy/dg)^2 = |dy/dg|^2``."""
        y = F.normalize(self.out(w, gates).flatten().double(), dim=0)
        squares = torch.zeros(self.n, dtype=torch.float64)
        for i in range(DIRECTIONS):
            u = torch.randn(y.shape, generator=self.draw, dtype=torch.float64).to(y.device)
            squares += torch.autograd.grad((u * y).sum(), gates, retain_graph=i + 1 < DIRECTIONS)[0][0].double() ** 2
        return (squares / DIRECTIONS).sqrt()

    @torch.no_grad()
    def with_off(self, sets: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
        """Mean loss over windows with each of these sets of heads off, [len(sets)]; equal windows weigh equally."""
        gates = torch.ones(len(sets), self.n)
        for row, off in enumerate(sets):
            gates[row, off] = 0
        total = torch.zeros(len(sets), dtype=torch.float64)
        wide = vocabulary(self.reading.stack) if self.scores else 1
        with evaluating(self.model):
            for w in windows:
                step = max(1, min(AT_ONCE // len(w.ids), NUMBERS // (len(w.ids) * wide)))
                total += torch.cat([self.of(w, gates[i : i + step]) for i in range(0, len(sets), step)])
        return total / len(windows)


__all__ = ["HeadRedundancy", "head_redundancy"]
