"""A trace in a terminal: one line per token for the whole, one line per candidate for a single choice (rich)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from glassformer.text.shown import short, shown

if TYPE_CHECKING:
    from .trace import Choice, Stage, Trace

MOST_CANDIDATES = 12
"""Candidates in the table of one choice; the page shows all that were kept."""
WIDEST = 18
"""Characters of a token in a table."""


def trace_table(trace: Trace, width: int) -> Iterator[Text | Table]:
    """Title, a table, and how to read it; on a narrow terminal the probabilities between the first and the last are left out."""
    if not trace.choices:
        yield Text("No token was generated.")
        return
    yield Text(f"How {len(trace)} tokens were chosen" if len(trace) > 1 else "How one token was chosen", style="bold")
    yield Text(trace.chain, style="dim")
    names = numbered([stage.name for stage in trace[0].stages[:-1]])
    middle = list(range(1, len(names) - 1))
    if 54 + sum(max(7, len(n)) + 2 for n in names) > width:
        middle = []
    shown_stages = sorted({0, *middle, len(names) - 1})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    for i in shown_stages:
        table.add_column(names[i], justify="right", no_wrap=True)
    for name in ("rank", "bits", "left", "instead of"):
        table.add_column(name, justify="left" if name == "instead of" else "right", no_wrap=True)
    for choice in trace:
        stages = choice.stages[:-1]
        first, last = stages[0], stages[-1]
        best = first.candidates[0] if first.candidates else None
        table.add_row(
            str(choice.step),
            Text(_name(choice.id, choice.text), style="bold"),
            *(Text(percent(stages[i].p), style=_style(stages[i].p)) for i in shown_stages),
            f"{first.rank:,}",
            bits(first.entropy, last.entropy),
            f"{last.left:,}",
            Text("")
            if best is None or best.id == choice.id
            else Text.assemble(_name(best.id, best.text), (f" {percent(best.p)}", "dim"), _fate(choice, best.id)),
        )
    yield table
    yield Text(
        "The token's probability by the model and after each link; its rank by the model (1: the most probable); entropy before and after the links; "
        "how many tokens were left to draw from; and which the model found most probable, where that was another.",
        style="dim",
    )


def choice_table(choice: Choice) -> Group:
    """The candidates of one token in lines, the stages in columns, and under them what each link left and removed."""
    stages = choice.stages
    title = Text.assemble(("Token ", ""), (_name(choice.id, choice.text, 60), "bold"), f", step {choice.step}: ")
    title.append(f"{percent(stages[0].p)} by the model (rank {stages[0].rank:,}), {percent(stages[-2].p)} when it was picked")
    rows = choice.followed_through
    most = rows[:MOST_CANDIDATES]
    most += [row for row in rows[MOST_CANDIDATES:] if row[0] == choice.id]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("candidate", no_wrap=True)
    for name in numbered([stage.name for stage in stages]):
        table.add_column(name, justify="right", no_wrap=True)
    for token, chances in most:
        here = token == choice.id
        table.add_row(Text(_name(token, choice.names(token)), style="bold" if here else ""), *_cells(chances, here))
    table.add_row()
    for name, cells in _facts(stages):
        table.add_row(Text(name, style="dim"), *(Text(c, style="dim") for c in cells))
    lines: list[Text | Table] = [title, table]
    for stage in stages[1:-1]:
        if stage.removed:
            lines.append(_removed(stage))
    return Group(*lines)


def numbered(names: list[str]) -> list[str]:
    """Names of columns: a kind of link that stands twice in a chain is counted."""
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def percent(p: float | None) -> str:
    """A probability to three digits or one decimal."""
    if p is None or p != p:
        return "–"
    if p == 1:
        return "100%"
    if p >= 0.9995:
        return ">99.9%"
    return f"{p:.1%}" if p >= 0.0995 else f"{p:.2%}" if p >= 0.00095 else f"{p:.4%}" if p >= 0.000001 else "<0.0001%"


def bits(before: float, after: float) -> str:
    """``5.20 → 2.11``."""
    return f"{before:.2f} → {after:.2f}"


def _cells(chances: list[float | None], here: bool) -> list[Text]:
    """One candidate's line: its probabilities, a cross where it was removed, nothing after that."""
    cells = []
    for i, p in enumerate(chances):
        if p is not None:
            last = i + 1 == len(chances)
            cells.append(Text("picked" if last else percent(p), style="bold green" if last else "bold" if here else ""))
        elif i + 1 == len(chances):
            cells.append(Text(""))
        else:
            cells.append(Text("×", style="red") if i and chances[i - 1] is not None else Text(""))
    return cells


def _facts(stages: tuple[Stage, ...]) -> list[tuple[str, list[str]]]:
    links = stages[1:-1]
    return [
        ("tokens left", [f"{s.left:,}" for s in stages[:-1]]),
        ("removed", ["", *(f"{s.removed:,}" if s.removed else "0" for s in links)]),
        ("their share", ["", *(percent(s.mass) if s.removed else "" for s in links)]),
        ("entropy, bits", [f"{s.entropy:.2f}" for s in stages[:-1]]),
        ("pick's rank", [f"{s.rank:,}" for s in stages[:-1]]),
    ]


def _removed(stage: Stage) -> Text:
    line = Text.assemble((f"{stage.link!r}", ""), " removed ")
    for i, c in enumerate(stage.gone[:5]):
        line.append("  " if i else "")
        line.append_text(Text.assemble((_name(c.id, c.text), "red"), (f" {percent(c.p)}", "dim")))
    more = stage.removed - min(5, len(stage.gone))
    if more:
        line.append(f"  and {more:,} more", style="dim")
    return line


def _fate(choice: Choice, token: int) -> str:
    link = choice.removed_by(token)
    return "" if link is None or link is choice.links[-1] else f" removed by {type(link).__name__}"


def _style(p: float) -> str:
    """Improbable ones stand out."""
    return "red" if p < 0.005 else "yellow" if p < 0.05 else ""


def _name(token: int, text: str | None, most: int = WIDEST) -> str:
    return f"#{token}" if text is None else short(shown(text), most)
