"""The figure of a word on its way to its tokens: the rows of BPE's merges, the lattice of Unigram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glassformer.text.shown import shown

from .figure import Theme, dress, plain_text
from .subject import shorten
from .trails import Edge, Merge, Trail, word_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_rows(axes: Axes, theme: Theme, word: Trail) -> None:
    """The word after every step, one row each, boxes as wide as their text."""
    rows: list[tuple[str, tuple[str, ...], str]] = []
    first = next((s for s in word.steps if isinstance(s, Merge)), None)
    if first is not None:
        rows.append(("letters", _before(word), ""))
    for step in word.steps:
        if isinstance(step, Merge):
            rows.append((f"rank {step.rank:,}", step.pieces, step.left + step.right))
    if not rows:
        rows = [("tokens", word.pieces, "")]
    for y, (_, pieces, new) in enumerate(rows):
        x = 0.0
        for piece in pieces:
            width = max(1, len(piece))
            fill = theme.series[1] if piece == new else theme.grid
            axes.add_patch(_box(x, y, width, fill))
            axes.text(
                x + width / 2, y, plain_text(piece), ha="center", va="center", fontsize=10, family="monospace", color=theme.paper if piece == new else theme.ink
            )
            x += width + 0.15
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.3, max(sum(max(1, len(p)) + 0.15 for p in r[1]) for r in rows) + 0.2)
    dress(axes, theme, shorten(word_of(word)), grid=False)
    axes.set_xticks([])


def _before(word: Trail) -> tuple[str, ...]:
    """The letters before the first merge: the first state with its new piece taken apart again."""
    first = next(s for s in word.steps if isinstance(s, Merge))
    pieces = list(first.pieces)
    at = next(i for i, p in enumerate(pieces) if p == first.left + first.right)
    pieces[at : at + 1] = [first.left, first.right]
    return tuple(pieces)


def _box(x: float, y: float, width: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y - 0.32), width, 0.64, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor=colour, edgecolor="none")


def draw_lattice(axes: Axes, theme: Theme, word: Trail) -> None:
    """Every edge as a bar from its first letter to its last, long ones on top; the best path in colour."""
    edges = sorted((s for s in word.steps if isinstance(s, Edge)), key=lambda e: (e.start - e.end, e.start))
    free: list[int] = []  # per row, the place from which it is free
    for e in edges:
        row = next((r for r, until in enumerate(free) if until <= e.start), len(free))
        if row == len(free):
            free.append(0)
        free[row] = e.end
        axes.add_patch(_box(e.start + 0.04, row, e.end - e.start - 0.08, theme.series[0] if e.taken else theme.grid))
        ink = theme.paper if e.taken else theme.ink
        axes.text(
            (e.start + e.end) / 2, row, plain_text(f"{shown(e.piece)}\n{e.score:.1f}"), ha="center", va="center", fontsize=8, family="monospace", color=ink
        )
    axes.set_xlim(-0.2, len(word.text) + 0.2)
    axes.set_ylim(len(free) - 0.4, -0.6)
    dress(axes, theme, word.note, grid=False)
    axes.set_xticks([i + 0.5 for i in range(len(word.text))], [plain_text(shown(c)) for c in word.text])
    axes.set_yticks([])
