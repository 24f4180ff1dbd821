"""The page of a beam tree: one self-contained HTML file in which every hypothesis can be opened.

    tree.html   the words and the places
    tree.css    the looks (after those of the trace's page)
    tree.js     the n best, the tree step by step, the opened hypothesis with its path and the parts of its score

It asks the network for nothing, and its content security policy lets it ask for nothing. Numbers stand in it with six significant digits.
"""

from __future__ import annotations

import re
from importlib import resources
from math import isfinite
from typing import Any

from glassformer.core.page import fill
from glassformer.text.shown import shown

from .tree import BeamTree


def render(tree: BeamTree) -> str:
    """The page."""
    return fill(_file("tree.html"), "What the beam search considered", _file("tree.css"), _file("tree.js"), data(tree))


def data(tree: BeamTree) -> dict[str, Any]:
    """What the page's script reads, as plain data: one list per hypothesis, and one table of the tokens' texts."""
    texts = {h.token: f"#{h.token}" if h.text is None else shown(h.text) for h in tree}
    return {
        "prompt": None if tree.prompt is None else shown_text(tree.prompt),
        "prompt_length": len(tree.prompt_ids),
        "search": tree.asked,
        "chain": tree.chain,
        "phrases": [[shown(a) for a in phrase] for phrase in tree.phrases],
        "groups": tree.search.num_beam_groups,
        "diversity": bool(tree.search.diversity_penalty),
        "coverage": bool(tree.search.coverage_penalty),
        "best": [h.id for h in tree.best],
        "written": [" ".join(map(str, tree.ids(h))) if (text := tree.written(h)) is None else shown_text(text) for h in tree.best],
        "fields": ["parent", "step", "token", "group", "rank", "logprob", "gain", "sum", "diversity", "divisor", "coverage", "score", "met", "fate", "why"],
        "nodes": [
            [
                *(h.parent, h.step, h.token, h.group, h.rank, _short(h.logprob), _short(h.gain), _short(h.sum), _short(h.diversity), _short(h.divisor)),
                *(_short(h.coverage), _short(h.score), h.met, h.fate, h.why),
            ]
            for h in tree
        ],
        "texts": {str(i): text for i, text in texts.items()},
    }


def shown_text(text: str) -> str:
    """A text as it is read: spaces and line breaks stay, characters that would disturb the page are made visible."""
    return "".join(shown(word) if word.strip(" \n") else word for word in re.split(r"([ \n]+)", text))


def _short(x: float) -> float | None:
    """Six significant digits; None for what JSON has no number for."""
    return float(f"{x:.6g}") if isfinite(x) else None


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
