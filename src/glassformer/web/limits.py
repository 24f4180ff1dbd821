"""What one request may take: sizes, numbers and times, all said before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from glassformer.core.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Limits of a server; a request beyond one is refused with the two numbers.

    Raises :class:`InputError` for a limit that is not positive.
    """

    body_bytes: int = 8 << 20  # of a request
    body_seconds: float = 30.0  # for a request to arrive
    answer_seconds: float = 600.0  # for an answer to be finished
    drain_seconds: float = 120.0  # for running answers to be finished once the server is to stop
    answers: int = 64  # prompts times n, of one request
    new_tokens: int = 32_768  # of one answer
    candidates: int = 20  # logprobs and top_logprobs
    trace_candidates: int = 100  # of every stage of a trace
    site_bytes: int = 32 << 20  # of the values that one request returns, before base64
    edits: int = 64  # of one request
    texts: int = 2048  # of one request for embeddings

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"The limit {name} is {value}, and a limit is above 0.")
