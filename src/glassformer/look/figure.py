"""How figures look: one set of colours, light and dark, and the three forms that most answers take.

heatmap   a number for every pair (layer and position, query and key): one colour up, or two away from zero
lines     a number along an axis, one line for each of a few names
bars      a number for each of some names, the largest first
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glassformer.core.page import seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    dark: bool
    paper: str
    ink: str
    dim: str
    grid: str
    series: tuple[str, ...]
    """Told apart by eyes of every kind, and in print; at most eight lines stand in one figure."""


_ON_WHITE = ("#1f5a94", "#c2410c", "#2f7d4f", "#8b5fbf", "#b58900", "#0f8b8d", "#b03060", "#6b7280")
_ON_BLACK = ("#6fb3ec", "#ff9d5c", "#6fcf97", "#c4a1f0", "#f3d250", "#56d4d6", "#ff8fb1", "#b6bec9")
LIGHT = Theme(False, "#ffffff", "#1a2027", "#55606d", "#e2e6eb", _ON_WHITE)
DARK = Theme(True, "#12151a", "#e7eaee", "#a3adba", "#2a323c", _ON_BLACK)

MOST_LABELS = 48
"""Names along an axis; of more, every second, third, … is written."""


def new_figure(size: tuple[float, float], dark: bool = False) -> tuple[Figure, Theme]:
    """An empty figure that belongs to nobody else (no pyplot), and its theme."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure, theme


def dress(axes: Axes, theme: Theme, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Title, axis names, colours."""
    axes.set_facecolor(theme.paper)
    axes.set_title(plain_text(title), color=theme.ink, fontsize=11, loc="left")
    axes.set_xlabel(x, color=theme.dim, fontsize=9)
    axes.set_ylabel(y, color=theme.dim, fontsize=9)
    axes.tick_params(colors=theme.dim, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    if grid:
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def heatmap(
    axes: Axes,
    theme: Theme,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    label: str = "",
    signed: bool = False,
    texts: Sequence[Sequence[str]] | None = None,
    limit: float | None = None,
    bar: bool = True,
) -> Any:
    """[rows columns] as colours, NaN left empty. Returns the image.

    ``signed``: two colours away from zero. ``texts``: written into the cells. ``limit``: the value of the full colour. ``bar``: whether a
    :func:`colour_bar` stands beside it.
    """
    data = np.ma.masked_invalid(np.asarray(values, dtype=float))
    finite = np.abs(data.compressed())
    top = limit if limit is not None else float(finite.max()) if finite.size else 1.0
    top = top or 1.0
    low = -top if signed else min(0.0, float(data.min()) if finite.size else 0.0)
    image = axes.imshow(data, aspect="auto", cmap=colours(theme, signed), vmin=low, vmax=top, interpolation="nearest")
    dress(axes, theme, title, x, y, grid=False)
    _ticks(axes, "x", columns)
    _ticks(axes, "y", rows)
    if bar:
        colour_bar([axes], theme, image, label, fraction=0.04)
    if texts is not None:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                strong = abs(float(np.ma.filled(data[i, j], 0.0))) > 0.55 * top
                ink = theme.paper if strong else theme.ink
                axes.text(j, i, plain_text(text), ha="center", va="center", fontsize=7, color=ink)
    return image


def colour_bar(axes: Sequence[Axes], theme: Theme, image: Any, label: str, fraction: float = 0.02) -> None:
    """The scale of an image's colours, beside all ``axes`` that share it; ``fraction``: its share of their room."""
    bar = axes[0].figure.colorbar(image, ax=list(axes), fraction=fraction, pad=0.01)
    bar.set_label(label, color=theme.dim, fontsize=9)
    bar.ax.tick_params(colors=theme.dim, labelsize=8)
    bar.outline.set_visible(False)


def lines(axes: Axes, theme: Theme, x: Sequence[float], named: Mapping[str, Any], *, title: str = "", x_name: str = "", y_name: str = "") -> None:
    """One line per name, with marks where the points are few."""
    for i, (name, values) in enumerate(named.items()):
        y, color, marker = np.asarray(values, dtype=float), theme.series[i % len(theme.series)], "o" if len(x) <= MOST_LABELS else ""
        axes.plot(x, y, label=plain_text(name), color=color, linewidth=1.8, marker=marker, markersize=3)
    dress(axes, theme, title, x_name, y_name)
    if len(named) > 1 or any(named):
        axes.legend(fontsize=8, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid)


def bars(axes: Axes, theme: Theme, names: Sequence[str], values: Any, *, title: str = "", x: str = "") -> None:
    """A bar to the side for each name, the first on top; on both sides of zero in the two colours of a signed :func:`heatmap`."""
    numbers = np.asarray(values, dtype=float)
    below, above = below_above(theme) if (numbers < 0).any() else (theme.series[0], theme.series[0])
    axes.barh(range(len(names)), numbers, color=[above if v >= 0 else below for v in np.nan_to_num(numbers)])
    axes.set_yticks(range(len(names)), [plain_text(n) for n in names])
    axes.invert_yaxis()
    dress(axes, theme, title, x)
    axes.grid(axis="y", visible=False)


def below_above(theme: Theme) -> tuple[str, str]:
    """The colours of numbers below and above zero, in every figure: the cold one and the warm one, as in a signed :func:`heatmap`."""
    return theme.series[0], theme.series[1]


def colours(theme: Theme, signed: bool) -> Any:
    """The colour map: matplotlib's own on white, one that begins at the paper's colour on black."""
    from matplotlib.colors import LinearSegmentedColormap

    if not theme.dark:
        return "RdBu_r" if signed else "Blues"
    if signed:
        return LinearSegmentedColormap.from_list("dusk", ["#7db8f0", "#2a5f96", theme.paper, "#a3491a", "#ffb27d"])
    return LinearSegmentedColormap.from_list("glow", [theme.paper, "#1f5a94", "#6fb3ec", "#d7ecff"])


def plain_text(text: str) -> str:
    """A label as it is: matplotlib would set what stands between two dollar signs as a formula, and its font has no pictures of control characters."""
    return re.sub("[\u2400-\u2421]", lambda m: f"‹{(ord(m[0]) - 0x2400):02X}›", seen(text).replace("$", r"\$"))


def mark(token: str) -> str:
    """A token as a label: one punctuation character, with or without a space before it, which alone is hardly seen, in quotes."""
    own = token[-1:]
    if token not in (own, f"·{own}") or not own or not unicodedata.category(own).startswith("P"):
        return token
    return f"“{token}”" if own in "'‘’" else f"'{token}'"


def _ticks(axes: Axes, which: str, names: Sequence[str]) -> None:
    step = -(-len(names) // MOST_LABELS)
    places = range(0, len(names), step)
    labels = [plain_text(names[i]) for i in places]
    if which == "x":
        upright = max(map(len, labels), default=0) * len(labels) < 90
        axes.set_xticks(places, labels, rotation=0 if upright else 60, ha="center" if upright else "right", rotation_mode=None if upright else "anchor")
    else:
        axes.set_yticks(places, labels)
