"""How a unit is drawn: its contexts as lines of text, every token shaded by the unit's value, and its directions as words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figure import Theme, below_above, dress, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .units import Neuron
    from .windows import Context

WIDTH = 118
"""Characters of a line."""
NUMBER = 10
"""Characters that the number before a line takes."""


def draw_contexts(axes: Axes, theme: Theme, unit: Neuron, most: int = 20) -> None:
    """The unit's contexts as lines of text, every token shaded by its value; below them the unit's words."""
    dress(axes, theme, f"{unit.name}   above zero at {unit.positive:.1%}, kurtosis {unit.kurtosis:.3g}, furthest {unit.side} the mean", grid=False)
    shown = unit.contexts[:most]
    top = max((abs(v) for c in shown for v in c.values or (c.value,)), default=1.0) or 1.0
    for row, context in enumerate(shown):
        _context(axes, theme, row, context, top)
    rows = len(shown) + _words(axes, theme, len(shown), unit)
    axes.set_xlim(-0.5, WIDTH)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _context(axes: Axes, theme: Theme, row: int, c: Context, top: float) -> None:
    """One line: the value, and the pieces around the token, which stands at the same place in all lines; ``top``: the value of the full colour."""
    room = WIDTH - NUMBER - 1 - len(c.pieces[c.at])
    before, after = c.pieces[: c.at], c.pieces[c.at + 1 :]
    while sum(map(len, before)) > room * 2 // 3:
        before = before[1:]
    while sum(map(len, before + after)) > room:
        after = after[:-1]
    _line(axes, theme, row, f"{c.value:9.3g}")
    below, above = below_above(theme)
    x = NUMBER + room * 2 // 3 - sum(map(len, before))
    for i, piece in enumerate((*before, c.pieces[c.at], *after), c.at - len(before)):
        value = c.values[i] if c.values else c.value if i == c.at else 0.0
        axes.barh(row, len(piece), left=x, height=0.86, color=above if value > 0 else below, alpha=min(1.0, abs(value) / top) * 0.75, linewidth=0)
        axes.text(x, row, plain_text(piece), family="monospace", fontsize=9, color=theme.ink, va="center", fontweight="bold" if i == c.at else "normal")
        x += len(piece)


def _words(axes: Axes, theme: Theme, row: int, unit: Neuron) -> int:
    """A line for each of the unit's directions from ``row`` on; gives how many there are."""
    known = [(name, words) for name, words in unit.words("reads", "× reads") if words is not None]
    for i, (name, words) in enumerate(known):
        line = ""
        for piece in words.pieces:
            line = line if len(line) + len(piece) + 2 > WIDTH - NUMBER - 1 else f"{line}  {piece}"
        _line(axes, theme, row + i, f"{name:>9}", line)
    return len(known)


def _line(axes: Axes, theme: Theme, row: int, first: str, rest: str = "") -> None:
    """What stands before a line, and the rest of it."""
    for x, text in ((0, first), (NUMBER - 1, rest)):
        if text:
            axes.text(x, row, plain_text(text), family="monospace", fontsize=9, color=theme.dim, va="center")
