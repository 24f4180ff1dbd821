"""Links that rule by the place in the new text: what may not come yet, and what must come now.

    step     0    1    2    3   …   n-2  n-1
             ├─ ForceFirst((4, 9)) at 0 and 1
             ├─ SuppressFirst((2,)) at 0
             ├────── MinNewTokens(3, eos=(0,)): no 0 at 0, 1, 2
                                         └─ ForceLast((0,), total=n) at n-1

The place is the number of tokens that the row has drawn, which the sampler's state counts for every row
and which forks and is wound back with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.spec import part

from .history import encode_plain, keep_some
from .links import _ids_inside
from .sampler import GONE, Link
from .state import Own


@part
class MinNewTokens(Link):
    """Remove the tokens ``eos``, which end a text, until ``n`` tokens were drawn. 0, or no such token, is off.

    A row in which nothing else is left stays as it is. The rule is that of ``transformers`` (``min_new_tokens``).
    Raises :class:`SamplerError` if ``n`` is negative and for an id outside the vocabulary.
    """

    n: int
    eos: tuple[int, ...] | Iterable[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos", tuple(int(i) for i in self.eos))
        if self.n < 0:
            raise SamplerError(f"A smallest number of new tokens is 0 or more, but {self.n} was given.")

    @property
    def off(self) -> bool:
        return self.n == 0 or not self.eos

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return logits if self.off else _without(self.eos, self.n, logits, state, "MinNewTokens")


@part
class SuppressFirst(Link):
    """Remove given tokens for the first ``n`` steps only. No tokens, or n = 0, is off.

    A row in which nothing else is left stays as it is. With n = 1 the rule is that of ``transformers`` (``begin_suppress_tokens``).
    Raises :class:`SamplerError` if ``n`` is negative and for an id outside the vocabulary.
    """

    ids: tuple[int, ...] | Iterable[int]
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        if self.n < 0:
            raise SamplerError(f"Tokens are suppressed for 0 steps or more, but {self.n} was given.")

    @property
    def off(self) -> bool:
        return self.n == 0 or not self.ids

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return logits if self.off else _without(self.ids, self.n, logits, state, "SuppressFirst")


@part
class ForceFirst(Link):
    """The first new tokens are these, one per step: only that token is left, with a logit of 0. No tokens is off.

    One token is ``forced_bos_token_id`` of ``transformers``. Raises :class:`SamplerError` for an id outside the vocabulary.
    """

    ids: tuple[int, ...] | Iterable[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))

    @property
    def off(self) -> bool:
        return not self.ids

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return _forced(dict(enumerate(self.ids)), logits, state, "ForceFirst")


@part
class ForceLast(Link):
    """The last of ``total`` new tokens are these: only that token is left, with a logit of 0. No tokens is off.

    A text that ends before ``total`` tokens never meets them. One token is ``forced_eos_token_id`` of ``transformers``.
    Raises :class:`SamplerError` if there are more than ``total`` of them, and for an id outside the vocabulary.
    """

    ids: tuple[int, ...] | Iterable[int]
    total: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        if len(cast(Any, self.ids)) > self.total:
            raise SamplerError(f"{len(cast(Any, self.ids))} tokens are forced at the end of {self.total}: allow more new tokens, or force fewer.")

    @property
    def off(self) -> bool:
        return not self.ids

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return _forced(dict(enumerate(self.ids, self.total - len(cast(Any, self.ids)))), logits, state, "ForceLast")


def _steps(state: Own | None, logits: Tensor) -> list[int]:
    """How many tokens each row has drawn; none, if there is no state."""
    return [0] * logits.shape[0] if state is None else state.state.steps


def _without(ids: Any, n: int, logits: Tensor, state: Own | None, who: str) -> Tensor:
    early = [step < n for step in _steps(state, logits)]
    if not any(early):
        return logits
    logits = logits.float()
    after = keep_some(logits, logits.index_fill(1, _ids_inside(list(ids), logits, who), GONE))
    return after if all(early) else torch.where(torch.tensor(early, device=logits.device)[:, None], after, logits)


def _forced(at: Mapping[int, int], logits: Tensor, state: Own | None, who: str) -> Tensor:
    """Only token ``at[step]`` left in the rows that are at such a step."""
    now = [(row, at[step]) for row, step in enumerate(_steps(state, logits)) if step in at]
    if not now:
        return logits
    _ids_inside([token for _, token in now], logits, who)
    rows, tokens = torch.tensor(now, device=logits.device).unbind(1)
    after = logits.float().index_fill(0, rows, GONE)
    after[rows, tokens] = 0.0
    return after


# From what people say to ids


def token_bias(bias: Mapping[Any, Any] | Iterable[tuple[Any, Any]], tokenizer: Any = None) -> tuple[tuple[int, float], ...]:
    """Pairs of token and bias; a text stands for each of its tokens, and ``False`` for -inf (both as in llama.cpp's ``logit_bias``).

    A bias on a text acts on its tokens wherever they come: for a whole word say it as a sequence (``sequence_bias``, ``bad_words``).
    Raises :class:`SamplerError` for a text without a tokenizer, one that has no tokens, and a bias that is no number.
    """
    pairs: dict[int, float] = {}
    for key, value in bias.items() if isinstance(bias, Mapping) else bias:
        if value is True or not isinstance(value, int | float):
            raise SamplerError(f"The bias of {key!r} is {value!r}; give a number, or False (or -inf) to remove it.")
        for token in text_ids(key, tokenizer, "A logit bias") if isinstance(key, str) else (int(key),):
            pairs[token] = -inf if value is False else float(value)
    return tuple(pairs.items())


def word_ids(words: str | Iterable[Any], tokenizer: Any = None) -> tuple[tuple[int, ...], ...]:
    """Bad words as sequences of ids. A text is taken at the start of a line and behind a space: these two are spelled differently."""
    found: dict[tuple[int, ...], None] = {}
    each: tuple[Any, ...] = (words,) if isinstance(words, str) else tuple(words)
    for word in each:
        if not isinstance(word, str):
            found[tuple(word) if isinstance(word, Iterable) else (int(word),)] = None
            continue
        for text in (word,) if word[:1].isspace() else (word, f" {word}"):
            found[text_ids(text, tokenizer, "A bad word")] = None
    return tuple(found)


def text_ids(text: str, tokenizer: Any, who: str) -> tuple[int, ...]:
    """The tokens of a text. Raises :class:`SamplerError` without a tokenizer, and for a text that has none."""
    if tokenizer is None:
        raise SamplerError(f"{who} names the text {text!r}, and without a tokenizer there are only ids: give tokenizer=…, or ids.")
    ids = tuple(encode_plain(tokenizer, text)) if text else ()
    if not ids:
        raise SamplerError(f"{who} names the text {text!r}, which has no tokens. Leave it out.")
    return ids
