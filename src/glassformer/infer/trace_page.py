"""The page of a trace: one self-contained HTML file in which every token can be opened.

    trace.html   the words and the places
    trace.css    the looks
    trace.js     the strip of tokens, the opened token, what each link did over the whole text

Numbers stand in it with four significant digits.
"""

from __future__ import annotations

from typing import Any

from glassformer.core.page import scripted, short
from glassformer.text.shown import shown, shown_text

from .trace import Choice, Trace


def render(trace: Trace) -> str:
    """The page."""
    return scripted("How each token was chosen", data(trace), "glassformer.infer", "trace.html", "trace.css", "trace.js")


def data(trace: Trace) -> dict[str, Any]:
    """What the page's script reads, as plain data: ids, and one table of their texts."""
    texts: dict[int, str] = {}

    def named(choice: Choice, token: int) -> int:
        if token not in texts:
            text = choice.names(token)
            texts[token] = f"#{token}" if text is None else shown(text)
        return token

    tokens = [
        {
            "step": choice.step,
            "id": named(choice, choice.id),
            "facts": [[s.left, short(s.entropy), short(s.p), s.rank, s.removed, short(s.mass)] for s in choice.stages],
            "candidates": [[named(choice, token), *map(short, chances)] for token, chances in choice.followed_through],
            "gone": [[[named(choice, c.id), short(c.p)] for c in s.gone] for s in choice.stages[:-1]],
        }
        for choice in trace
    ]
    stages = trace[0].stages if len(trace) else ()
    return {
        "prompt": None if trace.prompt is None else shown_text(trace.prompt),
        "chain": trace.chain,
        "stages": [{"name": s.name, "link": "before any link" if s.link is None else repr(s.link)} for s in stages],
        "tokens": tokens,
        "texts": {str(i): text for i, text in texts.items()},
    }
