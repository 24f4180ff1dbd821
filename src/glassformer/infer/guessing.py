"""Who guesses the next tokens cheaply, for the model to check them many at a time (see :mod:`glassformer.infer.speculative`).

    generate(model, prompt, draft=small)                     a smaller model of the same vocabulary
    generate(model, prompt, draft=PromptLookup())            what stood behind the same words before
    generate(model, prompt, draft=mine)                      anything with  propose(ids, n) -> up to n ids

A guess is never trusted, so a guesser may be as wrong as it likes: it can cost time, and it cannot change what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from glassformer.core.errors import GlassformerError, InputError, SamplerError
from glassformer.core.fields import described
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap

from .session import _check_readout, opened, vocabulary

DRAFT_TOKENS = 5


@runtime_checkable
class Guesser(Protocol):
    """Whoever guesses from the ids alone."""

    def propose(self, ids: Sequence[int], n: int) -> Sequence[int]:
        """Up to ``n`` tokens that may follow ``ids`` (prompt and output of one row; of an encoder-decoder the source stands before them)."""


@part
class PromptLookup(Spec):
    """Guess that what followed the same words before follows them again.

    The last ``longest`` ids are looked for among the earlier ones, then fewer, down to ``shortest``; the latest place wins. A copy that
    reaches its own beginning goes on with itself, so that a repeat of any length is followed. Good where the text copies from its prompt:
    summaries, edited code, quotations. Raises :class:`SamplerError` for lengths that are no lengths.

    From the program ``prompt-lookup-decoding`` by A. Saxena.
    """

    longest: int = 3
    shortest: int = 1

    _error: ClassVar[type[GlassformerError]] = SamplerError

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise SamplerError(f"PromptLookup looks for 1 token or more, but longest={self.longest} and shortest={self.shortest} were given.")

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to ``n`` ids that followed the longest suffix of ``ids`` that was there before; none if there is none."""
        known = np.asarray(ids)
        for size in range(min(self.longest, len(known) - 1), self.shortest - 1, -1):
            # Where an earlier place may end: every suffix token is compared at once, from the last one back.
            ends = np.flatnonzero(known[size - 1 : -1] == known[-1]) + size
            for back in range(2, size + 1):
                ends = ends[known[ends - back] == known[-back]]
            if len(ends):
                copy, start = [int(i) for i in known[ends[-1] :]], 0
                while len(copy) < n:
                    copy.append(copy[start])
                    start += 1
                return copy[:n]
        return []


class DraftModel:
    """A model that guesses: it draws through the same sampler as the model does, from the same random numbers, with a cache of its own.

    ``model`` has the vocabulary of the model that it guesses for; what ``load`` gives will do. ``tap`` sees the calls of this model and no
    others (``generate(tap=...)`` sees those of the checking model and no others); its paths begin with ``step.{n}.``, n counts the calls.
    """

    def __init__(self, model: Any, tap: Tap | None = None):
        self.model, own = opened(model)
        self.tokenizer: Any = own.get("tokenizer")
        self.tap = tap
        _check_readout(self.model)
        if not hasattr(self.model, "cache"):
            raise InputError(f"A draft has to guess fast, but {described(type(self.model))} has no cache: give a model, or something with propose(ids, n).")

    def __repr__(self) -> str:
        return f"DraftModel({type(self.model).__name__})"

    def check(self, target: Any, tokenizer: Any = None) -> None:
        """Raise :class:`InputError` if it cannot guess for ``target``."""
        own, other = vocabulary(self.model), vocabulary(target)
        if own is not None and other is not None and own != other:
            raise InputError(
                f"The draft has a vocabulary of {own:,} tokens and the model one of {other:,}, but a draft guesses the model's own tokens: "
                "give a draft that was trained with the same tokenizer, or draft=PromptLookup(), which needs no model."
            )
        for i in range(0, own or 0, max(1, (own or 0) // 500)) if tokenizer is not None and self.tokenizer is not None else ():
            theirs, ours = _spelt(self.tokenizer, i), _spelt(tokenizer, i)
            if theirs != ours:
                raise InputError(
                    f"The draft has another tokenizer than the model: token {i} is {theirs!r} for it and {ours!r} for the model. "
                    "Give a draft that was trained with the same tokenizer, or draft=PromptLookup(), which needs no model."
                )
        if hasattr(self.model, "encode") and hasattr(self.model, "decode") and not hasattr(target, "encode"):
            raise InputError(
                "The draft is an encoder-decoder, which reads a source, and the model is a decoder, which has none: give a draft that is a decoder."
            )


def _spelt(tokenizer: Any, i: int) -> str:
    try:
        return str(tokenizer.decode([i]))
    except (GlassformerError, LookupError):  # a hole in the vocabulary
        return ""


def read_draft(
    target: Any, draft: Any, tokens: int | None, lookup: int | None = None, rule: str | None = None, tokenizer: Any = None
) -> tuple[DraftModel | Guesser | None, int]:
    """Who guesses, and how many tokens at a time. Raises :class:`InputError` or :class:`SamplerError` for what cannot guess."""
    if lookup is not None:
        if draft is not None or tokens is not None:
            raise SamplerError("prompt_lookup_num_tokens=n is short for draft=PromptLookup(), draft_tokens=n: give it, or those.")
        draft, tokens = PromptLookup(), lookup
    if draft is None:
        for name, value in (("draft_tokens", tokens), ("draft_rule", rule)):
            if value is not None:
                raise SamplerError(f"{name}={value!r} was given without a draft: say who guesses, draft=a smaller model or draft=PromptLookup().")
        return None, 0
    n = DRAFT_TOKENS if tokens is None else tokens
    if n < 1:
        raise SamplerError(f"draft_tokens is {n}, but a draft guesses 1 token or more at a time.")
    if isinstance(draft, type):
        raise InputError(f"draft is the class {draft.__name__}, not one of its kind: write {draft.__name__}().")
    if not isinstance(draft, (DraftModel, Guesser)):
        draft = DraftModel(draft)
    if isinstance(draft, DraftModel):
        draft.check(target, tokenizer)
    return draft, n


@dataclass(frozen=True)
class Guesses:
    """How the guesses for one row fared: ``forwards`` of the model it took to write ``tokens``, with ``accepted`` of ``guessed`` guesses."""

    forwards: int
    tokens: int
    guessed: int
    accepted: int

    @property
    def per_forward(self) -> float:
        """Tokens per forward pass of the model; 1 without a draft."""
        return self.tokens / max(1, self.forwards)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens in {self.forwards} forward passes of the model, {self.per_forward:.2f} each: "
            f"{self.accepted} of {self.guessed} guesses accepted"
        )

    def __add__(self, other: Guesses) -> Guesses:
        return Guesses(self.forwards + other.forwards, self.tokens + other.tokens, self.guessed + other.guessed, self.accepted + other.accepted)
