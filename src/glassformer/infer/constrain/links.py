"""Links that let only those tokens through with which the text stays within a rule.

    chain = Constrained(JSONSchema(schema), tokenizer) | Temperature(0.8) | Draw(seed=7)
    chain = Where(lambda ids: allowed ids) | Greedy()

    drawn  {"a":        the row's place in the grammar ──► tokens that may follow: 1, 12, "▌…
    logits  …           all others become -inf; what is left is drawn as ever

Drawing under a constraint is drawing from the model's own distribution, cut to the tokens allowed and renormalised, one step at a time.
That is not the model's distribution over the whole texts of the rule: a step does not know what it leads to.

A constraint begins where the chain's :class:`~glassformer.infer.state.State` does and reads the tokens drawn since from the history. It
remembers nothing itself, so that forks, rewinding and batches need nothing of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import InputError, SamplerError
from glassformer.core.fields import described
from glassformer.core.spec import part

from ..sampler import GONE, Link
from ..state import Own
from .matchers import Matchers, Place
from .rules import Choices, Grammar, Regex, TextRule, with_header
from .vocabulary import Vocabulary


@part
class Constrained(Link):
    """Remove every token with which the new text could not become one that ``rule`` allows: ``Constrained(Regex("[a-z]+"), tokenizer)``.

    ``eos``: the ids that end a text; None: the tokenizer's. They are allowed exactly where the text may end, and never as text; other special tokens
    never, unless the rule names them. Where nothing can follow, the row is :meth:`complete <ended>`: ``generate`` ends it there, with "stop", and needs no
    end-of-sequence for that. A text that may both end and go on ends by end-of-sequence, or at ``max_new_tokens``; what that limit cuts short
    ("length") is the beginning of an allowed text and no more.

    The text is what is added behind the prompt: in a vocabulary of words it begins with a space.
    Put it first: what comes before may leave nothing that it allows, and what comes behind may not bring tokens back.

    Raises :class:`SamplerError`, before any model runs, for a rule that is wrong, that nothing meets, or that the vocabulary cannot spell;
    :class:`InputError` for a tokenizer that does not say its size.
    """

    rule: TextRule
    tokenizer: Any
    eos: tuple[int, ...] | Iterable[int] | None = None

    ends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        eos = getattr(self.tokenizer, "eos_id", None) if self.eos is None else self.eos
        ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(sorted(int(i) for i in eos))
        object.__setattr__(self, "eos", ids)
        if self.tokenizer is None or not hasattr(self.tokenizer, "decode"):
            raise InputError(f"A {self.rule.what} rules text, and without a tokenizer there are only ids: give tokenizer=….")
        _ = self._matchers

    def __repr__(self) -> str:
        return f"Constrained({self.rule!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_matchers"}  # a memo, and of a library that cannot be pickled

    @cached_property
    def _matchers(self) -> Matchers:
        what, vocabulary = self.rule.what, Vocabulary.of(self.tokenizer)
        try:
            matchers = Matchers(with_header(self.rule.lark(vocabulary)), vocabulary, cast(Any, self.eos))
        except SamplerError as error:
            if "NoExtension" not in str(error):
                raise SamplerError(f"The {what} cannot be used: {str(error).rstrip('.')}.") from None
            matchers = None
        if matchers is None or not (matchers.root.may_end or matchers.finishable()):
            lacks = vocabulary.lacks("".join(dict.fromkeys(_letters(self.rule))))
            why = f"The vocabulary has no {' '.join(lacks[:24])}" if lacks else "Nothing meets it, or the vocabulary lacks a character of it"
            if all(word.startswith(b" ") for word in vocabulary.words if word):
                why += " (its tokens are words that begin with their space, and so has the text to)"
            raise SamplerError(f"No text of this {what} can be written with this tokenizer's tokens. {why}: change the {what}, or take another model.")
        if not self.eos and matchers.only_empty():
            raise SamplerError(f"The {what} allows the empty text alone, which is no token, and the model has no end-of-sequence to say: change the {what}.")
        return matchers

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        logits = logits.float()
        allowed = self.allowed(logits.shape[0], logits.shape[1], history, state)
        few = np.flatnonzero(allowed) if logits.device.type == "cpu" else allowed
        if few.size * 50 < logits.numel():  # where a text must go on in one of a few ways it is faster to move those than to look at all
            places, after = torch.from_numpy(few), torch.full_like(logits, GONE, memory_format=torch.contiguous_format)
            after.view(-1)[places] = logits.reshape(-1)[places]
            return after
        return torch.where(torch.from_numpy(allowed).to(logits.device), logits, GONE)

    def allowed(self, rows: int, width: int, history: Tensor | None = None, state: Own | None = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may follow in each row, ``[b v]``."""
        places = self.places(rows, history, state)
        matchers, n = self._matchers, len(self._matchers.vocabulary)
        bits = np.unpackbits(np.stack([matchers.bits(place) for place in places]), axis=1, count=n + 1, bitorder="little").view(np.bool_)
        may_end = bits[:, n]
        mask = bits[:, :width] if width <= n else np.concatenate([bits[:, :n], np.zeros((rows, width - n), np.bool_)], axis=1)
        if any(place.over for place in places):
            mask[[place.over for place in places]] = True
        for token in cast(tuple[int, ...], self.eos):
            if token < width:
                mask[:, token] = [place.over or bool(end) for place, end in zip(places, may_end, strict=True)]
        return mask

    def places(self, rows: int, history: Tensor | None, state: Own | None) -> list[Place]:
        """Where each row stands in the grammar."""
        steps = [0] * rows if state is None else state.state.steps
        most = max(steps)
        if not most:
            return [self._matchers.root] * rows
        known = 0 if history is None else history.shape[1]
        if history is None or known < most:
            raise SamplerError(f"A constraint looks at all {most} tokens that were drawn, but the history has {known}: hand the whole of it to the chain.")
        new = history[:, history.shape[1] - most :].cpu().numpy()
        return [self._matchers.at(np.ascontiguousarray(row[most - n :])) for row, n in zip(new, steps, strict=True)]

    def ended(self, rows: int, history: Tensor | None, state: Own | None = None) -> list[bool]:
        """Which rows hold a whole text of the rule that nothing can follow."""
        return [place.complete or place.over for place in self.places(rows, history, state)]


def _letters(rule: TextRule) -> str:
    """The characters that a rule is made of, as far as it says them itself: of a pattern without its signs, of a grammar those in quotes, of JSON its own."""
    if isinstance(rule, Choices):
        return "".join(rule.texts)
    if isinstance(rule, Regex):
        return re.sub(r"\\.|[\^$.|?*+()\[\]{}\-]", "", rule.pattern)
    if isinstance(rule, Grammar):
        return "".join(re.findall(r'"([^"\n]*)"', rule.text))
    return '{}[]":,0123456789_.-+abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'


@part
class Where(Link):
    """Let through what a function of the row's ids (prompt and new, a list) allows: ``Where(lambda ids: {5, 9} if ids[-1] == 3 else None)``.

    It answers with ids, with a mask over the vocabulary (a bool tensor, array or list of its size), or with None for all. It has to be a function of
    the ids alone: it is asked again when a trace is shown, in any order of rows, and for rows that have ended (then its answer does not matter).
    The idea is ``prefix_allowed_tokens_fn`` of ``transformers`` (De Cao et al. 2020, arXiv 2010.00904), where the function gets the number of the row too.

    Raises :class:`SamplerError` for a function of two arguments, and for an answer that is none; an error of the function's own is left as it is.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.function).bind([1])
        except TypeError:
            raise SamplerError(
                "The function of allowed tokens takes one argument, the ids of its row. Rows leave the batch and fork here, so there is no number of the row "
                "(batch_id) to give: write lambda ids: …."
            ) from None
        except ValueError:  # a function of C that does not say
            pass

    def __repr__(self) -> str:
        return f"Where({getattr(self.function, '__qualname__', type(self.function).__name__)})"

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        logits = logits.float()
        past = [[]] * logits.shape[0] if history is None else [[i for i in row if i >= 0] for row in history.tolist()]
        mask = torch.stack([self._mask(self.function(ids), logits.shape[1]) for ids in past])
        return torch.where(mask.to(logits.device), logits, GONE)

    def _mask(self, answer: Any, v: int) -> Tensor:
        if answer is None:
            return torch.ones(v, dtype=torch.bool)
        try:
            given = (
                answer.detach().cpu() if isinstance(answer, Tensor) else torch.as_tensor(np.asarray(answer if isinstance(answer, np.ndarray) else list(answer)))
            )
        except (TypeError, ValueError):
            raise SamplerError(f"{self!r} answered with {described(type(answer))}; it says ids, a mask, or None for all.") from None
        if given.dtype == torch.bool:
            if given.shape != (v,):
                raise SamplerError(f"{self!r} answered with a mask of the shape {list(given.shape)}, but the vocabulary has {v} tokens.")
            return given
        if given.numel() and (given.is_floating_point() or given.dim() != 1):
            raise SamplerError(f"{self!r} answered with {str(answer)[:60]}; it says ids in one row, a mask of bool, or None for all.")
        given = given.long()
        outside = given[(given < 0) | (given >= v)]
        if len(outside):
            raise SamplerError(f"{self!r} allows token {int(outside[0])}, but ids go from 0 to {v - 1}.")
        return torch.zeros(v, dtype=torch.bool).index_fill(0, given, True)
