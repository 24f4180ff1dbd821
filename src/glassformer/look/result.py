"""What every answer of this room has in common: it shows itself, and gives its numbers back.

    result = logit_lens(model, "The old man")
    print(result)               a readable table            (the same as glassformer look lens)
    result.plot()               a matplotlib Figure         light, or dark=True
    result.to_html()            one self-contained page     follows the reader's light or dark
    result.to_dict()            numbers and names, ready for JSON
    result.save("lens.svg")     .png .svg .pdf .html .json .csv

In a notebook a result that stands last in a cell shows its table and its figure.

An answer is a frozen dataclass that derives from :class:`Result` and says three things: ``title``, its :meth:`Result.grid`, and how it is drawn.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.page import escape, still

from .figure import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

Cell = str | int | float | bool | None

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".json", ".csv")
MOST_ROWS = 40
"""Rows of a printed table; files hold all."""


@dataclass(frozen=True)
class Grid:
    """A table: the names of the columns, and rows of texts and numbers. ``note``: what a reader must know to read it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


class Result:
    """Base of all answers."""

    @property
    def title(self) -> str:
        """One line: what was asked of what."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """The answer as a table, the most telling rows first."""
        raise NotImplementedError

    def draw(self, figure: Figure, theme: Theme) -> None:
        """Draw the answer on an empty figure."""
        raise NotImplementedError

    def size(self) -> tuple[float, float]:
        """Width and height of the figure in inches."""
        return (8.0, 4.5)

    # Seeing

    def plot(self, dark: bool = False) -> Figure:
        """The figure of the answer."""
        figure, theme = new_figure(self.size(), dark)
        self.draw(figure, theme)
        return figure

    def table(self, most: int | None = MOST_ROWS) -> Group:
        """The answer for a terminal (rich): title, a table of at most ``most`` rows, and the note."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        grid = self.grid()
        shown = grid.rows if most is None else grid.rows[:most]
        left = len(grid.rows) - len(shown)
        made = Table(box=None, pad_edge=False)
        for i, name in enumerate(grid.columns):
            number = all(isinstance(r[i], int | float) or r[i] is None for r in grid.rows)
            made.add_column(Text(name), justify="right" if number else "left", overflow="fold", min_width=min(len(name), 12))
        for row in shown:
            made.add_row(*(Text(written(c)) for c in row))
        # Title and notes stand around the table and not in it: within, they would be folded to its width.
        notes = [n for n in (grid.note, f"and {left:,} more rows: save() writes them all" if left else "") if n]
        return Group(Text(self.title, style="bold"), made, *(Text(n, style="dim") for n in notes))

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, color_system=None, highlight=False).print(self.table())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> Group:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<div>{_table(self.title, self.grid(), MOST_ROWS)}{_pictures(self)}</div>"

    # Keeping

    def to_dict(self) -> dict[str, Any]:
        """Every field of the answer, tensors as lists (NaN and infinities as None), with the title."""
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, "title": self.title, **fields}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """A page that needs nothing else: figure and table, light or dark as the reader's system is."""
        return still(self.title, f'<div class="scroll">{_pictures(self)}</div>{_table("", self.grid(), None)}', STYLE)

    def save(self, path: str | os.PathLike[str], dark: bool = False) -> Path:
        """Write the answer; the suffix says as what (.png .svg .pdf .html .json .csv). ``dark``: of a picture; a page follows its reader.

        Raises :class:`InputError` with the remedy if it cannot.
        """
        target = check_place(path)
        kind = target.suffix.lower()
        if kind not in (".png", ".svg", ".pdf"):
            return files.save(target, {".html": self.to_html, ".json": self.to_json, ".csv": self._csv}[kind]())
        draft = target.with_name(f".{target.stem}.draft{kind}")
        try:
            with files.saving(target):
                self.plot(dark).savefig(draft, dpi=150)
                draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        grid = self.grid()
        writer.writerow(grid.columns)
        writer.writerows(["" if c is None else c for c in row] for row in grid.rows)
        return out.getvalue()


def check_place(path: str | os.PathLike[str]) -> Path:
    """The file that an answer is to be written to. Raises :class:`InputError` if it cannot be."""
    return files.check_place(path, "an answer", SUFFIXES, "answer.html")


def written(cell: Cell) -> str:
    """A cell as it is printed: numbers to four digits, nothing as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        if math.isnan(cell):
            return "–"
        if cell and (abs(cell) < 1e-3 or abs(cell) >= 1e5):
            return f"{cell:.2e}"
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def plain(value: Any) -> Any:
    """Plain data for JSON: tensors and arrays as lists, dataclasses as mappings, NaN and infinities as None."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return plain((value.double() if value.is_floating_point() else value).tolist() if value.dtype != torch.bfloat16 else value.float().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(v) for v in value]
    return str(value)


STYLE = """
td { white-space: pre; }
picture img { display: block; max-width: max(100%, 620px); margin-bottom: .6rem; }
"""


def _table(title: str, grid: Grid, most: int | None) -> str:
    numbers = [all(isinstance(r[i], int | float) or r[i] is None for r in grid.rows) for i in range(len(grid.columns))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if n else ''}>{escape(c)}</{tag}>" for c, n in zip(cells, numbers, strict=True)) + "</tr>"

    shown = grid.rows if most is None else grid.rows[:most]
    head = f"<p><b>{escape(title)}</b></p>" if title else ""
    note = f'<p class="fine">{escape(grid.note)}</p>' if grid.note else ""
    more = f'<p class="fine">and {len(grid.rows) - len(shown):,} more rows</p>' if len(shown) < len(grid.rows) else ""
    body = "".join(line("td", [written(c) for c in row]) for row in shown)
    return f'{head}<div class="scroll"><table><thead>{line("th", grid.columns)}</thead><tbody>{body}</tbody></table></div>{more}{note}'


def _pictures(result: Result) -> str:
    """The figure twice, of which the reader's system picks one."""
    sources = []
    for dark in (True, False):
        out = io.BytesIO()
        result.plot(dark).savefig(out, format="png", dpi=110)
        sources.append("data:image/png;base64," + base64.b64encode(out.getvalue()).decode())
    alt = escape(result.title)
    return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[0]}"><img alt="{alt}" src="{sources[1]}"></picture>'
