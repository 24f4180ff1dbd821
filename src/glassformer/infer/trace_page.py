"""The page of a trace: one self-contained HTML file in which every token can be opened.

    trace.html   the words and the places
    trace.css    the looks
    trace.js     the strip of tokens, the opened token, what each link did over the whole text

It asks the network for nothing, and its content security policy lets it ask for nothing. Numbers stand in it with four significant digits.
"""

from __future__ import annotations

import re
from importlib import resources
from math import isfinite
from typing import Any

from glassformer.core.page import fill
from glassformer.text.shown import shown

from .trace import Choice, Trace


def render(trace: Trace) -> str:
    """The page."""
    return fill(_file("trace.html"), "How each token was chosen", _file("trace.css"), _file("trace.js"), data(trace))


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
            "facts": [[s.left, _short(s.entropy), _short(s.p), s.rank, s.removed, _short(s.mass)] for s in choice.stages],
            "candidates": [[named(choice, token), *map(_short, chances)] for token, chances in choice.followed_through],
            "gone": [[[named(choice, c.id), _short(c.p)] for c in s.gone] for s in choice.stages[:-1]],
        }
        for choice in trace
    ]
    stages = trace[0].stages if len(trace) else ()
    return {
        "prompt": None if trace.prompt is None else _readable(trace.prompt),
        "chain": trace.chain,
        "stages": [{"name": s.name, "link": "before any link" if s.link is None else repr(s.link)} for s in stages],
        "tokens": tokens,
        "texts": {str(i): text for i, text in texts.items()},
    }


def _readable(text: str) -> str:
    """A text as it is read: spaces and line breaks stay, characters that would disturb the page are made visible."""
    return "".join(shown(word) if word.strip(" \n") else word for word in re.split(r"([ \n]+)", text))


def _short(x: float | None) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return float(f"{x:.4g}") if x is not None and isfinite(x) else None


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
