"""What a gradient attribution answers: a number for every token, or for every place of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import figure as drawing
from .result import Grid, Result

WIDE = 8
"""Tokens in a line of a strip."""
NAMES = {"t": "position", "s": "key position", "h": "head", "g": "key/value head", "f": "unit", "e": "expert", "c": "choice", "v": "token id", "1": ""}


@dataclass(frozen=True, eq=False)
class TokenAttribution(Result):
    """A number for every token: ``values`` [t], of an encoder's text ``source_values`` [s] (None without).

    ``actual``: the number asked about; ``baseline``: that of the baseline (None where there is none); ``steps``: gradients made.
    """

    method: str
    target: str
    place: str
    pieces: tuple[str, ...]
    values: Tensor
    source_pieces: tuple[str, ...]
    source_values: Tensor | None
    actual: float
    baseline: float | None
    baseline_name: str
    steps: int

    @property
    def sum(self) -> float:
        """What the tokens' numbers sum to."""
        return float(self.values.sum()) + (0.0 if self.source_values is None else float(self.source_values.sum()))

    @property
    def error(self) -> float | None:
        """Completeness: how far the sum is from ``actual - baseline``; None for a method that promises no sum."""
        return None if self.baseline is None else abs(self.sum - (self.actual - self.baseline))

    def best(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` tokens with the largest numbers, either way."""
        rows = self._rows()
        return [(rows[i][0], rows[i][2]) for i in range(min(k, len(rows)))]

    def _rows(self) -> list[tuple[str, int, float]]:
        rows = [(p, i, float(v)) for i, (p, v) in enumerate(zip(self.pieces, self.values, strict=True))]
        if self.source_values is not None:
            rows += [(f"source {p}", i, float(v)) for i, (p, v) in enumerate(zip(self.source_pieces, self.source_values, strict=True))]
        return sorted(rows, key=lambda r: -abs(r[2]))

    @property
    def title(self) -> str:
        return f"{self.method}: {self.target}" + (f" at {self.place}" if self.place else "")

    def grid(self) -> Grid:
        if self.baseline is None:
            note = f"The number is {self.actual:.4f}; first-order shares need not sum to it (their sum: {self.sum:.4f})."
        else:
            note = f"Sum {self.sum:.4f}; from {self.baseline:.4f} (baseline: {self.baseline_name}) to {self.actual:.4f} is {self.actual - self.baseline:.4f}: "
            note += f"completeness error {self.error:.1e} after {self.steps:,} gradients."
            if self.error is not None and self.error > 0.01 * abs(self.actual - self.baseline):
                note += " That is much: the output jumps on the line (experts change) or bends sharply; try another baseline, or a larger most=."
        return Grid(("token", "position", "attribution"), tuple(self._rows()), note)

    def size(self) -> tuple[float, float]:
        lines = sum(-(-len(p) // WIDE) for p in (self.pieces, self.source_pieces if self.source_values is not None else ()))
        return (11.0, max(3.6, min(16.0, 0.42 * lines + 1.6)))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        rows = self._rows()[:14]
        strips = [(self.pieces, self.values, "")]
        if self.source_values is not None:
            strips.insert(0, (self.source_pieces, self.source_values, "encoder's text"))
        heights = [-(-len(p) // WIDE) for p, _, _ in strips]
        cells = figure.add_gridspec(len(strips), 2, width_ratios=(2, 1), height_ratios=heights)
        limit = max(float(v.abs().max()) for _, v, _ in strips)
        for i, (pieces, values, name) in enumerate(strips):
            token_strip(figure.add_subplot(cells[i, 0]), theme, pieces, values, limit, (self.title if i == 0 else "") + (f"   ({name})" if name else ""))
        drawing.bars(figure.add_subplot(cells[:, 1]), theme, [f"{p} {i}" for p, i, _ in rows], [v for _, _, v in rows], title="the largest", x="attribution")


def token_strip(axes: Any, theme: drawing.Theme, pieces: Sequence[str], values: Tensor, limit: float, title: str = "") -> None:
    """The text, token by token in lines, each on the colour of its number."""
    lines = -(-len(pieces) // WIDE)
    cells = torch.full((lines * WIDE,), torch.nan)
    cells[: len(pieces)] = values
    texts = [p if len(p) <= 11 else p[:10] + "…" for p in pieces] + [""] * (lines * WIDE - len(pieces))
    rows = [str(WIDE * i) for i in range(lines)]
    drawing.heatmap(
        axes,
        theme,
        cells.view(lines, WIDE),
        rows,
        [str(i) for i in range(WIDE)],
        title=title,
        signed=True,
        limit=limit,
        texts=[texts[WIDE * i : WIDE * (i + 1)] for i in range(lines)],
    )


@dataclass(frozen=True, eq=False)
class SiteAttribution(Result):
    """Gradient times value at a site, summed over features: ``values`` with the axes that are left (``t`` position, ``h`` head, ``f`` unit…)."""

    site: str
    axes: tuple[str, ...]
    target: str
    place: str
    pieces: tuple[str, ...]
    key_pieces: tuple[str, ...]
    values: Tensor

    @property
    def title(self) -> str:
        return f"Gradient x value at {self.site}: {self.target}" + (f" at {self.place}" if self.place else "")

    def _label(self, axis: str, i: int) -> str:
        pieces = {"t": self.pieces, "s": self.key_pieces}.get(axis)
        return f"{pieces[i]} {i}" if pieces is not None else str(i)

    def grid(self) -> Grid:
        order = self.values.abs().flatten().argsort(descending=True)[:1000]
        places = torch.stack(torch.unravel_index(order, self.values.shape), 1).tolist()
        rows: tuple[tuple[str | float, ...], ...] = tuple(
            (*(self._label(a, i) for a, i in zip(self.axes, at, strict=True)), float(self.values[tuple(at)])) for at in places
        )
        return Grid(
            (*(NAMES.get(a, a) for a in self.axes), "attribution"), rows, "First order: the tangent at this text, summed over the features of each vector."
        )

    def size(self) -> tuple[float, float]:
        return (9.0, 4.8) if len(self.axes) != 1 else (9.0, max(3.0, 0.42 * -(-len(self.values) // WIDE) + 1.6))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        axes, values = list(self.axes), self.values
        if axes == ["t"]:
            token_strip(figure.subplots(), theme, self.pieces, values, float(values.abs().max()), self.title)
            return
        summed = "" if len(axes) <= 2 else f" (summed over {', '.join(NAMES.get(a, a) for a in axes[1:-1])})"
        while len(axes) > 2:
            values = values.sum(1)
            del axes[1]
        values = values[:, None] if len(axes) < 2 else values
        axes = axes if len(axes) == 2 else [*axes, ""]
        rows, columns = ([self._label(a, i) for i in range(n)] for a, n in zip(axes, values.shape, strict=True))
        drawing.heatmap(
            figure.subplots(),
            theme,
            values,
            rows,
            columns,
            title=self.title + summed,
            x=NAMES.get(axes[1], axes[1]),
            y=NAMES.get(axes[0], axes[0]),
            signed=True,
        )
