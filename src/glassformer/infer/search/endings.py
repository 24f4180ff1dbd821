"""What ends a text that is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..text import Decodes, Detokenizer, StopStrings
from .hypothesis import Ending, Node


@dataclass(frozen=True)
class Endings:
    """What ends a text: an end-of-sequence id, a stop string, or ``limit`` new tokens. ``contexts``: per prompt what the new text follows (see Detokenizer)."""

    eos: frozenset[int] = frozenset()
    limit: int = 128
    stops: tuple[str, ...] = ()
    tokenizer: Decodes | None = None
    contexts: Sequence[Sequence[int]] = ()

    def begin(self, prompt: int) -> tuple[Detokenizer, StopStrings] | None:
        """What is needed to find stop strings (None if there are none)."""
        if not self.stops or self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, self.contexts[prompt] if self.contexts else ()), StopStrings(self.stops)

    def of(self, node: Node) -> Ending | None:
        """How the text of a new hypothesis has ended, if it has; reads its token."""
        if node.token in self.eos:
            return "eos"
        if node.parent is not None and node.parent.text is not None:
            detokenizer, stops = node.parent.text[0].fork(), node.parent.text[1].fork()
            if stops.push(detokenizer.push(node.token))[1]:
                return "stop"
            node.text = detokenizer, stops
        return "length" if node.length >= self.limit else None
