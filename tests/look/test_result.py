"""Answers show themselves: tables, figures in light and dark, pages, files."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.look.figure import DARK, LIGHT, bars, heatmap, lines, new_figure, plain_text
from glassformer.look.result import Grid, Result, plain, written


@dataclass(frozen=True, eq=False)
class Answer(Result):
    values: Tensor
    names: tuple[str, ...]
    hidden: Any = field(default=None, repr=False)

    @property
    def title(self) -> str:
        return "What <b> costs $5 & $6"

    def grid(self) -> Grid:
        return Grid(("name", "value", "share"), tuple((n, float(v), i) for i, (n, v) in enumerate(zip(self.names, self.values, strict=True))), "a note")

    def draw(self, figure: Any, theme: Any) -> None:
        bars(figure.add_subplot(), theme, self.names, self.values, title=self.title)


def answer(n: int = 3) -> Answer:
    return Answer(torch.tensor([0.5, math.nan, -1e-7] + [1.0] * (n - 3)), tuple(f"$n{i}$ <i>" for i in range(n)), hidden=object())


def test_it_prints_itself() -> None:
    said = str(answer())
    assert "What <b> costs $5 & $6" in said
    assert "$n0$ <i>" in said
    assert "-1.00e-07" in said
    assert "a note" in said
    assert "and 5 more rows: save() writes them all" in str(answer(45))


def test_it_is_plain_data() -> None:
    d = json.loads(answer().to_json())
    assert d == {"kind": "Answer", "title": answer().title, "values": [0.5, None, pytest.approx(-1e-7)], "names": ["$n0$ <i>", "$n1$ <i>", "$n2$ <i>"]}
    assert plain({"a": (1, True), 2: torch.tensor([1.5], dtype=torch.bfloat16)}) == {"a": [1, True], "2": [1.5]}


@pytest.mark.parametrize(
    ("cell", "text"), [(None, "–"), (math.nan, "–"), (True, "yes"), (12345, "12,345"), (0.25, "0.25"), (1234.5, "1,234"), (1e7, "1.00e+07"), ("x", "x")]
)
def test_cells(cell: Any, text: str) -> None:
    assert written(cell) == text


def test_pages_are_whole_and_escaped() -> None:
    page = answer().to_html()
    assert "What &lt;b&gt; costs" in page
    assert "<b> costs" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", ""), "the page asks for something from outside"
    assert "data:image/png" in answer()._repr_html_()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html", ".json", ".csv"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = answer().save(tmp_path / f"a{suffix}")
    assert path.stat().st_size > 50
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"], "a draft was left behind"
    if suffix == ".csv":
        assert list(csv.reader(io.StringIO(path.read_text())))[1] == ["$n0$ <i>", "0.5", "0"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"An answer is written to a file, but None was given: name one, such as 'answer.html'"):
        answer().save(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'a.bmp' ends in '.bmp', but the ending says how an answer is written: one of .png, .svg"):
        answer().save(tmp_path / "a.bmp")
    with pytest.raises(InputError, match="the folder .* does not exist; create it or choose another"):
        answer().save(tmp_path / "none" / "a.png")
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        answer().save(tmp_path / "a.html")


@pytest.mark.parametrize("dark", [False, True])
def test_figures_are_dark_or_light(dark: bool) -> None:
    figure = answer().plot(dark)
    theme = DARK if dark else LIGHT
    assert figure.get_facecolor() == pytest.approx((*tuple(int(theme.paper[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0))


def test_pictures_may_be_dark_and_colours_mean_the_same(tmp_path: Path) -> None:
    light, dark = (answer().save(tmp_path / f"{d}.png", dark=d).read_bytes() for d in (False, True))
    assert light != dark
    figure, theme = new_figure((4, 3))
    one, two = figure.subplots(1, 2)
    bars(one, theme, ["a", "b"], [2.0, -1.0])
    bars(two, theme, ["a", "b"], [2.0, 1.0])
    colour = lambda axes, i: tuple(round(255 * c) for c in axes.patches[i].get_facecolor()[:3])
    red, blue = ((0xC2, 0x41, 0x0C), (0x1F, 0x5A, 0x94))
    assert [colour(one, 0), colour(one, 1), colour(two, 0)] == [red, blue, blue], "above zero is red, as in a signed heat map"


def test_the_three_forms() -> None:
    figure, theme = new_figure((6, 4), dark=True)
    a, b = figure.subplots(1, 2)
    heatmap(a, theme, [[0.1, math.nan], [-1.0, 0.4]], ["r0", "r1"], ["c0", "c1"], signed=True, texts=[["$a$", ""], ["b", "c"]], label="value")
    lines(b, theme, [0, 1, 2], {"one": [1, 2, 3], "two": [3, 2, 1]}, title="t", x_name="x", y_name="y")
    figure.canvas.draw()  # type: ignore[attr-defined]
    assert a.images[0].get_clim() == (-1.0, 1.0)
    assert [t.get_text() for t in a.texts] == [r"\$a\$", "", "b", "c"]
    assert len(b.lines) == 2
    assert plain_text("$x$") == r"\$x\$"
    assert plain_text("a␍b") == "a‹0D›b"
