"""How a byte-level BPE cuts a text into words before any merge: a few regular expressions that everybody uses.

Merges never cross the borders that these patterns draw, so the pattern decides what a piece can be at all:

========  ==================================================================================================================
gpt2      letters, digits and signs apart, one leading space joins the word (GPT-2, GPT-3, RoBERTa, OPT)
cl100k    also: contractions in any case, at most three digits together, line feeds join the signs before them (GPT-4, Llama 3)
qwen2     cl100k with every digit alone (Qwen 2 and 3)
o200k     cl100k, but a lower-case letter before an upper-case one ends a word; marks belong to letters (GPT-4o)
========  ==================================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Pattern(NamedTuple):
    """One cutting rule in two spellings that cut alike."""

    json: str
    """As it is written in ``tokenizer.json``."""
    fast: str
    """The same alternatives, all those without look-ahead in one group: the regex engine then runs them as one automaton (measured: 1.4 times as fast)."""


_SPACES = r"|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _pattern(without_lookahead: str) -> Pattern:
    return Pattern(without_lookahead + _SPACES, f"(?:{without_lookahead}){_SPACES}")


PATTERNS: dict[str, Pattern] = {
    "gpt2": _pattern(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"),
    "cl100k": _pattern(_SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"),
    "qwen2": _pattern(_SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"),
    "o200k": _pattern(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    ),
}

# Between a visible ASCII character and a space, or between a plain letter and a space or line feed, every pattern above ends one word and
# begins the next: no alternative holds a space anywhere but in front, none that takes letters goes on into white space, and the one
# look-ahead, (?!\S), is only asked after white space. Matching runs forward and never looks back, so both sides cut as they would alone.
_BORDER = re.compile(r"[!-~](?= )|[A-Za-z\u0410-\u044f\u4e00-\u9fa5\uac00-\ud7a3](?=[ \n])")


def in_parts(text: str, size: int) -> Iterator[str]:
    """The text in parts of about ``size`` characters, cut only where each of :data:`PATTERNS` cuts too: the parts' ids, joined, are the text's ids.

    Where no such place follows (a text without spaces), the part goes on until there is one.
    """
    start = 0
    while len(text) - start > size:
        border = _BORDER.search(text, start + size)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:] if start else text


LONGEST_RUN = 65_536
"""White space without end makes a backtracking regex engine overflow its stack: a million spaces do, 200,000 do not yet."""


def has_long_run(text: str) -> bool:
    """Whether white space may go on for :data:`LONGEST_RUN` characters (a run of half that length can count; a longer one always does)."""
    half = LONGEST_RUN // 2
    if len(text) < half:
        return False
    sampled = text[::half]
    if not any(map(str.isspace, sampled)):
        return False
    return any(character.isspace() and text[at * half : (at + 1) * half].isspace() for at, character in enumerate(sampled) if (at + 1) * half <= len(text))
