"""How a token is written on a page: every character visible, none able to disturb its neighbours.

A space becomes ``·``, a line break ``⏎``, a tab ``⇥``; other control characters get their Unicode pictures, and
characters without a shape (direction marks, zero-width spaces, lone halves of surrogate pairs) their code point in
angle quotes: ``‹U+202E›``.
"""

from __future__ import annotations

import re
import unicodedata

_NAMED = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_JOINERS = {"\u200c", "\u200d"}  # parts of words in some scripts, and of composed emoji


def shown(text: str) -> str:
    """The display form of a token's text; ``∅`` for an empty one."""
    if not text:
        return "∅"
    whole = not any(_visible(c) for c in text)  # a joiner on its own would be an empty box
    return "".join(_character(c, alone=whole) for c in text)


def shown_text(text: str) -> str:
    """A text as it is read: spaces and line breaks stay, all other characters are as :func:`shown` has them."""
    return "".join(shown(word) if word.strip(" \n") else word for word in re.split(r"([ \n]+)", text))


def _visible(c: str) -> bool:
    return unicodedata.category(c)[0] not in "CZ" and not unicodedata.category(c).startswith("M")


def _character(c: str, *, alone: bool) -> str:
    if c in _NAMED:
        return _NAMED[c]
    category = unicodedata.category(c)
    if category == "Cc":
        return chr(0x2400 + ord(c)) if ord(c) < 0x20 else f"‹U+{ord(c):04X}›"
    if category.startswith("M"):
        return f"◌{c}" if alone else c
    if category in {"Cf", "Cs", "Cn", "Co", "Zs", "Zl", "Zp"} and (alone or c not in _JOINERS):
        return f"‹U+{ord(c):04X}›"
    return c


def short(text: str, most: int = 10) -> str:
    """A piece that fits into a cell."""
    return text if len(text) <= most else text[: most - 1] + "…"
