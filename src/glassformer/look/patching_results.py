"""What patching answers: the number asked about, for every place that was patched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .figure import Theme, heatmap
from .result import Grid, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def column_of(metric: str, normalised: bool) -> str:
    """What the numbers of a table are: ``logit difference, normalised``."""
    return metric.split(" of ")[0] + (", normalised" if normalised else "")


def unchanged(clean: float, corrupted: float, direction: str, normalised: bool) -> float:
    """The value of a patch that changes nothing."""
    low, high = (0.0, 1.0) if normalised else (corrupted, clean)
    return low if direction == "denoise" else high


def scale_of(clean: float, corrupted: float, normalised: bool) -> str:
    """What a reader must know of the two runs' own numbers."""
    return "1 is the clean run, 0 the corrupted one" if normalised else f"clean run {clean:.4g}, corrupted run {corrupted:.4g}"


def agreement(pearson: float | None, spearman: float | None, what: str) -> str:
    """How an estimate agrees with what was measured; empty where nothing was."""
    return "" if pearson is None else f"; against {what}: Pearson {pearson:.3f}, Spearman {spearman:.3f}"


@dataclass(frozen=True, eq=False)
class Patched(Result):
    """What every patch does to the metric. ``values`` has an axis for each name in ``by``, whose places are named in ``names``.

    ``clean``, ``corrupted``: the metric of the two runs without patches. With ``normalised`` they stand for 1 and 0. ``exact`` (of an
    approximation): the values of the exact sweep, and how both agree over all patches (``pearson``, ``spearman``). ``metric`` names the number:
    ``logit of he`` where one target was named, ``logit difference of he − she`` where two were.
    """

    site: str
    by: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    values: Tensor
    clean: float
    corrupted: float
    metric: str
    direction: str
    normalised: bool
    kind: str = "activation patching"
    exact: Tensor | None = None
    pearson: float | None = None
    spearman: float | None = None

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.site} by {', '.join(self.by)} ({self.direction}): {'change of ' * self._estimated}{self.metric}"

    @property
    def _estimated(self) -> bool:
        """Whether the numbers are changes by the patch (0: nothing changed), and not the metric with the patch made."""
        return self.kind.startswith("attribution")

    @property
    def _still(self) -> float:
        return 0.0 if self._estimated else unchanged(self.clean, self.corrupted, self.direction, self.normalised)

    def best(self, n: int = 5) -> list[tuple[tuple[str, ...], float]]:
        """The ``n`` patches that change the metric most, as names and values."""
        flat = self.values.flatten()
        order = (flat - self._still).abs().argsort(descending=True)[:n].tolist()
        places = list(itertools.product(*self.names))
        return [(places[i], float(flat[i])) for i in order]

    def grid(self) -> Grid:
        both = self.exact is not None
        rows = [(*(place), value, *((float(self.exact[self._index(place)]),) if self.exact is not None else ())) for place, value in self.best(10**9)]
        column, exact = column_of(self.metric, self.normalised), "exact"
        scale = f"{scale_of(self.clean, self.corrupted, self.normalised)}; a patch that changes nothing gives {self._still:.4g}"
        if self._estimated:
            column, exact = f"change of {column}", "exact change"
            scale = "estimated change of the metric by the patch (0: nothing changed), "
            scale += "in units of clean less corrupted" if self.normalised else "as it is"
        agree = agreement(self.pearson, self.spearman, "the exact sweep")
        return Grid((*self.by, column, *((exact,) if both else ())), tuple(rows), f"{scale}{agree}")

    def _index(self, place: Sequence[str]) -> tuple[int, ...]:
        return tuple(names.index(p) for names, p in zip(self.names, place, strict=True))

    def draw(self, figure: Figure, theme: Theme) -> None:
        rows, columns = self._rows(), self.names[-1]
        panels = [(self.values, self.title)]
        if self.exact is not None:
            panels = [(self.values, "estimated change"), (self.exact, f"exact change (Pearson {self.pearson:.3f})")]
        label = "change, normalised" if self.normalised else "change"  # of the metric, which the title names
        for axes, (values, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = values.reshape(len(rows), len(columns)) - self._still
            low = " and ".join(self.by[:-1]) or ""
            heatmap(axes, theme, shown, rows, columns, title=title, x=self.by[-1], y=low, label=label, signed=True)
        if self.exact is not None:
            figure.suptitle(self.title, color=theme.ink, fontsize=11)

    def _rows(self) -> tuple[str, ...]:
        return tuple(".".join(p) for p in itertools.product(*self.names[:-1])) or ("",)

    def size(self) -> tuple[float, float]:
        wide = min(14.0, 3.2 + 0.28 * len(self.names[-1]))
        return (max(8.5, wide * (1.6 if self.exact is not None else 1.0)), max(3.0, min(14.0, 1.6 + 0.24 * len(self._rows()))))
