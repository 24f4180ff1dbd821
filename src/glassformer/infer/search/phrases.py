"""Phrases that an output has to hold, and how far each hypothesis is with them.

    phrases = Phrases([[(5, 9)], [(7,), (3, 7)]])     "5 9" has to occur, and "7" or "3 7"
    state = phrases.start()
    state = phrases.push(state, 5)                    phrases.need(state): 2 tokens more; phrases.next(state): [9, 7, 3]

A phrase is met once one of its alternatives has occurred, and stays met. Of a phrase that is not met, a hypothesis remembers the longest end
of its own text that begins an alternative (Aho and Corasick 1975), so an occurrence is never overlooked, wherever it begins:

    … 5 5 9        the first 5 begins the phrase, the second begins it anew, 9 completes it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glassformer.core.errors import SamplerError

from ..forcing import text_ids

Ids = tuple[int, ...]
Progress = tuple[Ids | None, ...]
"""Per phrase: what of it stands at the end of the text so far, or None once it is met."""


class Phrases:
    """Phrases, each a choice of alternatives; ``alternatives[i]`` are those of phrase i. No phrases: everything is met from the start."""

    def __init__(self, phrases: Sequence[Sequence[Sequence[int]]] = ()):
        self.alternatives: tuple[tuple[Ids, ...], ...] = tuple(tuple(tuple(a) for a in phrase) for phrase in phrases)
        self._shortest = [min(len(a) for a in phrase) for phrase in self.alternatives]
        self._known: dict[tuple[int, Ids, int], Ids | None] = {}

    def __len__(self) -> int:
        return len(self.alternatives)

    @property
    def tokens(self) -> int:
        """How many tokens the shortest alternatives take one after another."""
        return sum(self._shortest)

    def start(self) -> Progress:
        """Nothing is there yet."""
        return ((),) * len(self)

    def push(self, state: Progress, token: int) -> Progress:
        """The progress with one token more."""
        return tuple(None if begun is None else self._step(i, begun, token) for i, begun in enumerate(state))

    def met(self, state: Progress) -> bool:
        """Whether every phrase has occurred."""
        return all(begun is None for begun in state)

    def need(self, state: Progress) -> int:
        """How many tokens are enough to meet all that is open: the begun phrase that is furthest, then the others from their beginnings.

        Each token of :meth:`next` that goes on with that phrase lowers this by 1 at least, so a hypothesis that has the room never loses it. Phrases
        that overlap may be met by fewer tokens.
        """
        still = [(self._rest(i, begun), self._shortest[i]) for i, begun in enumerate(state) if begun is not None]
        return sum(whole for _, whole in still) + min((rest - whole for rest, whole in still), default=0)

    def next(self, state: Progress) -> list[int]:
        """The tokens that begin an open phrase or go on with it."""
        found: dict[int, None] = {}
        for i, begun in enumerate(state):
            if begun is not None:
                for a in self.alternatives[i]:
                    found[a[_overlap(begun, a)]] = None
        return list(found)

    def _rest(self, i: int, begun: Ids) -> int:
        return min(len(a) - _overlap(begun, a) for a in self.alternatives[i])

    def _step(self, i: int, begun: Ids, token: int) -> Ids | None:
        key = (i, begun, token)
        if key not in self._known:
            text = (*begun, token)
            if any(text[-len(a) :] == a for a in self.alternatives[i]):
                self._known[key] = None
            else:
                self._known[key] = max((text[len(text) - _overlap(text, a) :] for a in self.alternatives[i]), key=len)
        return self._known[key]


def read_phrases(force_words: Any, tokenizer: Any = None) -> Phrases:
    """``force_words`` as phrases: each a text, a list of ids, or a list of alternatives (texts, or lists of ids).

    A text may stand at the beginning of a line or behind a space, which tokenizers spell differently: both are alternatives.
    Raises :class:`SamplerError` for anything else, for an empty phrase, and for a text without a tokenizer.
    """
    given = (force_words,) if isinstance(force_words, str) else force_words
    if not isinstance(given, Iterable):
        raise SamplerError(f"force_words is a list of phrases, texts or lists of ids, but got {force_words!r}.")
    return Phrases([_alternatives(phrase, tokenizer) for phrase in given])


def _alternatives(phrase: Any, tokenizer: Any) -> list[Ids]:
    if isinstance(phrase, str):
        texts = (phrase,) if phrase[:1].isspace() else (phrase, f" {phrase}")
        return list(dict.fromkeys(text_ids(text, tokenizer, "force_words") for text in texts))
    if isinstance(phrase, int):
        raise SamplerError(f"force_words holds the number {phrase!r}, but a phrase is a text or a list of ids: write [[{phrase!r}]] for this one token.")
    items = list(phrase) if isinstance(phrase, Iterable) else []
    if not items:
        raise SamplerError(f"force_words holds {phrase!r}, which is no phrase: give a text, a list of ids, or a list of alternatives.")
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return [tuple(items)]
    return [a for item in items for a in _alternatives(item, tokenizer)]


def _overlap(text: Ids, phrase: Ids) -> int:
    """The length of the longest end of ``text`` that begins ``phrase`` and is not all of it."""
    return next(n for n in range(min(len(text), len(phrase) - 1), -1, -1) if text[len(text) - n :] == phrase[:n])
