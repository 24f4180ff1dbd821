"""From a stream of token ids to a stream of text that never has to be taken back.

    ids ──► Detokenizer ──► whole characters ──► StopStrings ──► text to show
            holds a character             holds a tail that may be
            whose bytes are not all here  the beginning of a stop string

Both hold back as little as possible and say at the end (``flush``) what was still held.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

from glassformer.core.errors import SamplerError

REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character


class Decodes(Protocol):
    """All that this room needs of a tokenizer for output."""

    def decode(self, ids: list[int], /) -> str:
        """The text of these ids."""
        ...


class Detokenizer:
    """Text of ids that come one by one.

    ``context`` are ids before the first one (the end of the prompt): some tokenizers write a token differently at the start of a text.
    Only a window of ids is decoded at each step, so that a long text costs no more per token than a short one.
    """

    WINDOW, KEPT = 24, 8  # when the window reaches 24 ids, it is cut down to the last 8

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(context)[-self.KEPT :]
        self._given = len(self._stable())

    def fork(self) -> Detokenizer:
        """Another that goes on from here by itself."""
        twin = copy(self)
        twin._ids = list(self._ids)
        return twin

    def push(self, token: int) -> str:
        """The text that this token makes certain: perhaps none, perhaps more than its own."""
        self._ids.append(token)
        text = self._stable()
        new, self._given = text[self._given :], max(self._given, len(text))
        if len(self._ids) >= self.WINDOW:
            self._shorten()
        return new

    def flush(self) -> str:
        """What was held back: bytes that never became a character, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        new, self._given = text[self._given :], len(text)
        return new

    def _stable(self) -> str:
        # A character whose last bytes are missing decodes to one U+FFFD at the end.
        text = self._tokenizer.decode(self._ids) if self._ids else ""
        return text[:-1] if text.endswith(REPLACEMENT) else text

    def _shorten(self) -> None:
        text = self._tokenizer.decode(self._ids)
        if self._given < len(text):  # in the middle of a character: wait
            return
        for start in range(len(self._ids) - self.KEPT, 0, -1):
            kept = self._tokenizer.decode(self._ids[start:])
            if text.endswith(kept):  # not begun in the middle of a character
                self._ids, self._given = self._ids[start:], len(kept)
                return


class StopStrings:
    """Ends a text at the given string that is complete first (of two at once the longer), wherever the borders of the tokens fall.

    Raises :class:`SamplerError` for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        if "" in self.stops:
            raise SamplerError("A stop string is empty, which would end every text before it begins. Leave it out.")
        self._held = ""

    def fork(self) -> StopStrings:
        """Another that goes on from here by itself."""
        return copy(self)

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was met (then nothing from it on is ever given out)."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if stop.startswith(text[-n:])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The tail that turned out to be no stop string."""
        text, self._held = self._held, ""
        return text
