"""The page of a beam tree: one self-contained HTML file in which every hypothesis can be opened.

    tree.html   the words and the places
    tree.css    the looks (behind those of ../tree_view.css, which any tree has)
    tree.js     the n best, the tree step by step (drawn by ../tree_view.js), the opened hypothesis with its path and the parts of its score

Numbers stand in it with six significant digits.
"""

from __future__ import annotations

from typing import Any

from glassformer.core.page import scripted, short
from glassformer.text.shown import shown, shown_text

from .tree import BeamTree

FIELDS = ["parent", "step", "token", "group", "rank", "logprob", "gain", "sum", "diversity", "divisor", "coverage", "score", "met", "fate", "why"]


def render(tree: BeamTree) -> str:
    """The page."""
    files = ("search/tree.html", "tree_view.css", "search/tree.css", "tree_view.js", "search/tree.js")
    return scripted("What the beam search considered", data(tree), "glassformer.infer", *files)


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
        "fields": FIELDS,
        "nodes": [[short(x, 6) if isinstance(x, float) else x for x in (getattr(h, name) for name in FIELDS)] for h in tree],
        "texts": {str(i): text for i, text in texts.items()},
    }
