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
import html
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

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.files import replace, trouble

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
        title = html.escape(self.title)
        body = f"<h1>{title}</h1>{_pictures(self)}{_table('', self.grid(), None)}"
        return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\
<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">\
<title>{title}</title><style>{STYLE}</style></head><body>{body}</body></html>\n'

    def save(self, path: str | os.PathLike[str], dark: bool = False) -> Path:
        """Write the answer; the suffix says as what (.png .svg .pdf .html .json .csv). ``dark``: of a picture; a page follows its reader.

        Raises :class:`InputError` with the remedy if it cannot.
        """
        target = check_place(path)
        kind = target.suffix.lower()
        try:
            if kind in (".png", ".svg", ".pdf"):
                draft = target.with_name(f".{target.stem}.draft{kind}")
                try:
                    self.plot(dark).savefig(draft, dpi=150)
                    draft.replace(target)
                finally:
                    draft.unlink(missing_ok=True)
            else:
                replace(target, {".html": self.to_html, ".json": self.to_json, ".csv": self._csv}[kind]())
        except OSError as error:
            reason, todo = trouble(error)
            raise InputError(f"{str(target)!r} cannot be written: {reason}. {todo}; what was there before is untouched.") from error
        return target

    def _csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        grid = self.grid()
        writer.writerow(grid.columns)
        writer.writerows(["" if c is None else c for c in row] for row in grid.rows)
        return out.getvalue()


def check_place(path: str | os.PathLike[str]) -> Path:
    """The file that an answer is to be written to. Raises :class:`InputError` if its ending says nothing, or its folder is not there."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"An answer is written to a file, but {described(type(path))} was given: name one, such as 'answer.html'.")
    target = Path(path)
    kind = target.suffix.lower()
    if target.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: it is a folder, and an answer is a file. Name one in it, such as {str(target / 'answer.html')!r}.")
    if kind not in SUFFIXES:
        raise InputError(f"{target.name!r} ends in {kind or 'nothing'!r}, but the ending says how an answer is written: one of {', '.join(SUFFIXES)}.")
    if not target.parent.is_dir():
        raise InputError(f"{str(target)!r} cannot be written: the folder {str(target.parent)!r} does not exist; create it or choose another.")
    return target


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
:root { color-scheme: light dark; --line: light-dark(#d5dae1, #333b46); --dim: light-dark(#55606d, #a3adba);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  background: light-dark(#ffffff, #12151a); color: light-dark(#1a2027, #e7eaee); }
body { margin: 0 auto; max-width: 1100px; padding: 1rem clamp(12px, 2.5vw, 32px) 3rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .2em .7em; border-bottom: 1px solid var(--line); text-align: left; white-space: pre; }
td.n, th.n { text-align: right; }
p.note { color: var(--dim); max-width: 78ch; }
img { max-width: 100%; height: auto; }
"""


def _table(title: str, grid: Grid, most: int | None) -> str:
    numbers = [all(isinstance(r[i], int | float) or r[i] is None for r in grid.rows) for i in range(len(grid.columns))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if n else ''}>{html.escape(c)}</{tag}>" for c, n in zip(cells, numbers, strict=True)) + "</tr>"

    shown = grid.rows if most is None else grid.rows[:most]
    head = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    note = f'<p class="note">{html.escape(grid.note)}</p>' if grid.note else ""
    more = f'<p class="note">and {len(grid.rows) - len(shown):,} more rows</p>' if len(shown) < len(grid.rows) else ""
    body = "".join(line("td", [written(c) for c in row]) for row in shown)
    return f'{head}<div class="scroll"><table>{line("th", grid.columns)}{body}</table></div>{more}{note}'


def _pictures(result: Result) -> str:
    """The figure twice, of which the reader's system picks one."""
    sources = []
    for dark in (True, False):
        out = io.BytesIO()
        result.plot(dark).savefig(out, format="png", dpi=110)
        sources.append("data:image/png;base64," + base64.b64encode(out.getvalue()).decode())
    alt = html.escape(result.title, quote=True)
    return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[0]}"><img alt="{alt}" src="{sources[1]}"></picture>'
