"""What an engine counts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds up to which waits for a first token are counted together."""


@dataclass(frozen=True)
class Stats:
    """An engine at one moment.

    ``waiting``, ``running``, ``slots``, ``capacity``, ``bytes`` are the state of the moment. All others only grow: requests ``submitted``, of
    which ``finished``, ``cancelled``, ``failed``; ``refused``: turned away by a full queue (``Engine.generate`` waits for a place, and is not counted);
    ``tokens`` generated; ``prompt_tokens`` read; ``prefix_tokens`` taken over instead; ``steps`` and the ``seconds`` they took;
    ``first_tokens`` and the seconds they were waited for, in all (``first_token_seconds``) and ``first_token_counts``: how many waited at most
    ``BOUNDS[i]`` and more than the bound before (last: longer than all).
    """

    waiting: int
    running: int
    slots: int
    capacity: int
    bytes: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    tokens: int
    prompt_tokens: int
    prefix_tokens: int
    steps: int
    seconds: float
    first_tokens: int
    first_token_seconds: float
    first_token_counts: tuple[int, ...]


@dataclass
class Counters:
    """The counts that only grow."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    first_token_counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def first(self, seconds: float) -> None:
        """A first token came after so many seconds."""
        self.first_tokens += 1
        self.first_token_seconds += seconds
        self.first_token_counts[bisect_left(BOUNDS, seconds)] += 1

    def snapshot(self, **now: int) -> Stats:
        """The counts with the state of the moment."""
        return Stats(**now, **(vars(self) | {"first_token_counts": tuple(self.first_token_counts)}))  # type: ignore[arg-type]
