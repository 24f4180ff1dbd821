"""The page of a tree of continuations: one self-contained HTML file in which every piece of every path can be opened.

    branching.html   the words and the places
    branching.js     the paths, the tree (drawn by tree_view.js, its looks in tree_view.css), the opened path token by token

A piece is what lies between two places where paths part. Numbers stand in the page with six significant digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glassformer.core.page import scripted, short
from glassformer.text.shown import shown, shown_text

from .trace import Names

if TYPE_CHECKING:
    from .branching import Branches


def render(tree: Branches) -> str:
    """The page."""
    files = ("branching.html", "tree_view.css", "branching.css", "tree_view.js", "branching.js")
    return scripted("Every continuation that was tried", data(tree), "glassformer.infer", *files)


def data(tree: Branches) -> dict[str, Any]:
    """What the page's script reads, as plain data: pieces, each behind the one that it continues, and one table of the tokens' texts."""
    pieces: list[tuple[int | None, dict[str, Any]]] = []
    ahead: list[tuple[int | None, dict[str, Any]]] = [(None, piece) for piece in reversed(tree.nested())]
    while ahead:
        parent, piece = ahead.pop()
        ahead += [(len(pieces), child) for child in reversed(piece["children"])]
        pieces.append((parent, piece))
    names = Names(tree.tokenizer)
    texts = {i: f"#{i}" if (text := names(i)) is None else shown(text) for _, piece in pieces for i in piece["ids"]}
    return {
        "prompt": shown_text(tree._words((), tree.prompt_ids)),
        "chain": tree.chain,
        "seed": str(tree.seed),
        "joint": " " if tree.tokenizer is None else "",
        "fields": ["parent", "ids", "logprobs", "ended", "text"],
        "nodes": [[parent, p["ids"], [short(x, 6) for x in p["logprobs"]], p["ended"], shown_text(p["text"])] for parent, p in pieces],
        "texts": {str(i): text for i, text in texts.items()},
    }
