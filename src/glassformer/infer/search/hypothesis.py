"""A hypothesis while the search runs: one token more than its parent, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..text import Detokenizer, StopStrings
from .phrases import Progress

Fate = Literal[
    "kept",  # it went on
    "barren",  # it was kept, but none of its continuations was
    "outscored",  # others of its step had higher scores
    "diversity",  # without the penalty for what earlier groups chose it would have been kept
    "bank",  # hypotheses that are further with their phrases took its place
    "no_room",  # the phrases that it still needs do not fit into what is left
    "unmet",  # it ended before its phrases had come
    "late",  # it ended, but was not among the num_beams best (or first drawn) of its step
    "finished",  # it ended, and is among the n best
    "displaced",  # it ended, and better ones have taken its place among the n best
    "stuck",  # the links left it no token
    "pruned",  # it was still going when the search stopped
]
Ending = Literal["eos", "stop", "length"]


@dataclass(eq=False, slots=True)
class Node:
    """``gain`` is what its token adds (ln p after the links), ``penalty`` what diversity takes off; ``sum`` and ``diversity`` are their totals."""

    parent: Node | None
    token: int
    step: int
    row: int  # of the batch that it was chosen from
    group: int
    logprob: float
    gain: float
    penalty: float
    sum: float
    diversity: float
    progress: Progress
    top: list[tuple[int, float]]
    rank: int = 0  # its place among the candidates of its step and group, 1 is the best
    score: float = 0.0
    coverage: float = 0.0
    fate: Fate = "kept"
    by: float | None = None  # the score that decided against it
    ending: Ending | None = None
    text: tuple[Detokenizer, StopStrings] | None = None

    @property
    def total(self) -> float:
        """Σ ln p less the penalties: by this the beams of one step are ranked."""
        return self.sum - self.diversity

    @property
    def length(self) -> int:
        """New tokens."""
        return self.step + 1

    def path(self) -> list[Node]:
        """From the first new token to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.step >= 0:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def common(self, other: Node) -> int:
        """How many new tokens it shares with another of the same step: those of the nearest ancestor of both."""
        a: Node | None = self
        b: Node | None = other
        while a is not None and b is not None and a is not b:
            a, b = a.parent, b.parent
        return 0 if a is None else a.length


def root(group: int, progress: Progress, text: tuple[Detokenizer, StopStrings] | None) -> Node:
    """Nothing drawn yet."""
    return Node(None, -1, -1, -1, group, 0.0, 0.0, 0.0, 0.0, 0.0, progress, [], text=text)
