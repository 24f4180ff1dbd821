"""A beam tree in a terminal: the n best with the parts of their scores, then the tree, in which what died is said with its cause (rich)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from glassformer.text.shown import short, shown

from .hypothesis import Fate

if TYPE_CHECKING:
    from .tree import BeamTree, Hypothesis

MOST_LINES = 200
"""Lines of the tree; the page shows all."""
LOOKS: dict[Fate, str] = {"kept": "", "finished": "bold green", "barren": "dim", "pruned": "yellow", "diversity": "magenta", "bank": "magenta"}


def tree_table(tree: BeamTree, width: int) -> Iterator[Text | Table | Tree]:
    """Title, the n best, the tree, and how to read it."""
    yield Text(f"A beam search of {len(tree.steps)} steps: {len(tree):,} hypotheses, {len(tree.best)} finished texts among the best", style="bold")
    yield Text(f"{tree.asked}   {tree.chain}", style="dim")
    yield _best(tree, width)
    yield Text()
    yield from _drawn(tree, width)
    yield Text(
        "Score: (sum of ln p - diversity) / divisor + coverage; the divisor is the number of new tokens to the power of length_penalty. "
        "Behind each token: its probability by the model and the score so far. Where only one continuation lived it stands in the same line.",
        style="dim",
    )


def _best(tree: BeamTree, width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = ["#", "score", "sum of ln p", *(["diversity"] if tree.search.diversity_penalty else []), "tokens", "divisor"]
    columns += ["coverage"] if tree.search.coverage_penalty else []
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for h in tree.best:
        cells = [str(h.place), f"{h.score:.4f}", f"{h.sum:.4f}"]
        cells += [f"{-h.diversity:.4f}"] if tree.search.diversity_penalty else []
        cells += [str(h.step + 1), f"{h.divisor:.3f}"]
        cells += [f"{h.coverage:.4f}"] if tree.search.coverage_penalty else []
        text = tree.written(h)
        words = " ".join(map(str, tree.ids(h))) if text is None else shown(text)
        table.add_row(*cells, h.ending or "", short(words, max(20, width - 60)))
    return table


def _drawn(tree: BeamTree, width: int) -> Iterator[Tree | Text]:
    """The tree itself: a chain of only children is one line."""
    prompt = f"prompt of {len(tree.prompt_ids)} tokens" if tree.prompt is None else short(shown(tree.prompt[-80:]), 60)
    top = Tree(Text(prompt, style="bold"), guide_style="dim")
    lines = 0
    waiting = [(top, h) for h in reversed([h for h in tree if h.parent is None])]
    while waiting and lines < MOST_LINES:
        at, h = waiting.pop()
        run = [h]
        while h.fate == "kept" and len(below := tree.children(h)) == 1:
            h = below[0]
            run.append(h)
        line = Text()
        for one in run:
            line.append(_name(one), style="bold" if one.fate == "finished" else "")
            line.append(" ")
        line.append(f"{_percent(h)} {h.score:.3f} ", style="dim")
        line.append("" if h.fate == "kept" else h.why, style=LOOKS.get(h.fate, "red"))
        branch = at.add(line)
        waiting += [(branch, child) for child in reversed(tree.children(h))]
        lines += 1
    yield top
    if waiting:
        yield Text(f"The first {MOST_LINES} lines; tree.save('beams.html') shows all.", style="dim")


def _name(h: Hypothesis) -> str:
    return f"#{h.token}" if h.text is None else short(shown(h.text), 18)


def _percent(h: Hypothesis) -> str:
    from math import exp

    from ..trace_table import percent

    return percent(exp(h.logprob))
