"""Links that look back: they act on a token because of what stands before it.

    … the old man said that the old man ▌said      NoRepeatNGram(3) removes "said": "old man said" was there
                                        ▌said      DRY lowers it by 0.8 · 1.75^(3 - 2): three tokens repeat already
    … you ▌fool                                    BadWords removes "fool" where "you fool" is a bad word

All of them take the history as it is handed to the chain (prompt and output together) and remember
nothing themselves, so that forking and winding back need nothing of them. :class:`~glassformer.infer.links.Penalties`
is the fourth of the kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from math import isfinite, isnan, log
from typing import Any, cast

import torch
from torch import Tensor

from glassformer.core.errors import GlassformerError, SamplerError
from glassformer.core.spec import Spec, part

from .sampler import GONE, Link
from .state import Own

LARGEST = 1e30  # a penalty that no logit survives; small enough that no float32 overflows by it


def keep_some(before: Tensor, after: Tensor) -> Tensor:
    """``after [b v]``, but ``before`` in the rows in which nothing would be left."""
    some = after.amax(dim=-1, keepdim=True) > GONE
    if some.device.type == "cpu" and some.all():  # a look costs less than a copy; on an accelerator it would wait for the device
        return after
    return torch.where(some, after, before)


def _sequences(given: Iterable[Any], who: str) -> tuple[tuple[int, ...], ...]:
    sequences = []
    for ids in given:
        if isinstance(ids, int):
            raise SamplerError(f"{who} is a sequence of token ids, but {ids} was given: write ({ids},).")
        if isinstance(ids, str):
            raise SamplerError(f"{who} is a sequence of token ids, but the text {ids!r} was given: encode it, or say it by name with a tokenizer.")
        sequences.append(tuple(int(i) for i in ids))
        if not sequences[-1]:
            raise SamplerError(f"{who} is empty; a sequence holds one token id or more. Leave it out.")
        if min(sequences[-1]) < 0:
            raise SamplerError(f"{who} holds the token {min(sequences[-1])}, but ids are 0 or more.")
    return tuple(sequences)


# Repeats


@part
class NoRepeatNGram(Link):
    """Remove every token that would make ``n`` tokens in a row stand in the history a second time. 0 is off.

    Token x goes if the last n - 1 tokens, followed by x, occur already. ``n=1`` removes every token that was there.
    A row in which nothing would be left stays as it is.
    The rule is that of ``transformers`` (``no_repeat_ngram_size``); first in Paulus et al. 2017, arXiv 1705.04304 (trigrams, in a beam search).

    Raises :class:`SamplerError` if ``n`` is negative or not whole.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 0 or int(self.n) != self.n:
            raise SamplerError(f"The n of repeated n-grams is a whole number, 0 or more, but {self.n} was given. Use 0 for none, 3 to repeat no three tokens.")

    @property
    def off(self) -> bool:
        return self.n == 0

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        if self.off or history is None or history.shape[1] < self.n:
            return logits
        logits, v, length = logits.float(), logits.shape[-1], history.shape[1]
        windows = history.unfold(1, self.n, 1)  # [b w n]
        again = (windows[..., :-1] == history[:, None, length + 1 - self.n :]).all(dim=-1) & (windows >= 0).all(dim=-1)
        # One column more than the vocabulary takes the windows that do not match.
        wide = torch.cat([logits, logits.new_zeros(logits.shape[0], 1)], dim=-1)
        after = wide.scatter_(1, torch.where(again, windows[..., -1].clamp(max=v), v), GONE)[:, :-1]
        return keep_some(logits, after)


# DRY

BREAKERS = ("\n", ":", '"', "*")
LONGEST_BREAKER, LONGEST_TAIL = 40, 20  # in characters, and in tokens behind the first; llama.cpp's


@part
class Breakers(Spec):
    """Where a repeat may not reach across: the token sequences that spell the ``texts``; made by :meth:`of`.

    A text may begin in the middle of one token and end in others: a sequence is the token whose text ends with the beginning of the breaker,
    and the tokens of what is left of it. A token that holds the whole breaker is a sequence of one.
    Raises :class:`SamplerError` for an empty sequence and for negative ids.
    """

    texts: tuple[str, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    _error = SamplerError

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _sequences(self.sequences, "A sequence breaker"))

    def __repr__(self) -> str:
        # Thousands of ids say less than what they spell.
        return f"Breakers.of(tokenizer, {self.texts!r})" if self.texts else f"Breakers(sequences={self.sequences!r})" if self.sequences else "Breakers()"

    @staticmethod
    def of(tokenizer: Any, texts: Iterable[str] = BREAKERS) -> Breakers:
        """Every way in which the vocabulary of ``tokenizer`` spells the texts, found once per tokenizer.

        Texts beyond 40 characters are cut there. Raises :class:`SamplerError` for an empty text and for a tokenizer that does not say its size.
        """
        given = (texts,) if isinstance(texts, str) else tuple(texts)
        if "" in given:
            raise SamplerError("A sequence breaker is empty, and an empty text is everywhere. Leave it out.")
        find = _spellings if getattr(type(tokenizer), "__hash__", None) is not None else _spellings.__wrapped__  # the cache needs a hash
        return Breakers(given, find(tokenizer, given)) if given else Breakers()

    @cached_property
    def _alone(self) -> Tensor:
        """Whether a token is a breaker by itself ``[max id + 2]``; the last place stands for all other ids."""
        ids = [s[0] for s in self.sequences if len(s) == 1]
        table = torch.zeros(max(ids, default=-1) + 2, dtype=torch.bool)
        table[ids] = True
        return table

    @cached_property
    def _longer(self) -> list[Tensor]:
        """The sequences of two tokens and more, those of one length together ``[s n]``, short ones first."""
        lengths = sorted({len(s) for s in self.sequences} - {1})
        return [torch.tensor([s for s in self.sequences if len(s) == n], dtype=torch.long) for n in lengths]

    def alone(self, ids: Tensor) -> Tensor:
        """Whether each of these tokens is a breaker by itself."""
        table = self._alone.to(ids.device)
        last = len(table) - 1
        return table[torch.where(ids < 0, last, ids.clamp(max=last))]

    def reach(self, history: Tensor) -> Tensor:
        """How many tokens stand behind the last breaker in each row of ``history [b n]``: ``[b]``, n if there is none."""
        b, n = history.shape
        length = self.alone(history).long()  # of the longest breaker that begins at each place
        for group in self._longer:
            m = group.shape[1]
            if m <= n:
                found = (history.unfold(1, m, 1)[:, :, None] == group.to(history.device)).all(dim=-1).any(dim=-1)
                length[:, : n - m + 1] = torch.where(found, m, length[:, : n - m + 1])
        places = torch.arange(n, device=history.device).expand(b, -1)
        last = torch.where(length > 0, places, -1).amax(dim=-1)
        return torch.where(last < 0, n, n - last - length.gather(1, last.clamp(min=0)[:, None])[:, 0])


@lru_cache(maxsize=8)
def _spellings(tokenizer: Any, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    size = getattr(tokenizer, "vocab_size", None)
    if size is None and not hasattr(tokenizer, "__len__"):
        raise SamplerError(
            f"{type(tokenizer).__name__} does not say how many tokens it has (vocab_size), so its spellings of {', '.join(map(repr, texts))} cannot be "
            "found. Give dry_sequence_breakers=() for none, or lists of ids."
        )
    words = [_bytes(tokenizer, i) for i in range(len(tokenizer) if size is None else size)]
    found: dict[tuple[int, ...], None] = {}  # keeps the order
    for text in texts:
        raw = text[:LONGEST_BREAKER].encode()
        tails: dict[int, list[int]] = {}
        for token, word in enumerate(words):
            if raw in word:
                found[(token,)] = None
                continue
            at = word.find(raw[:1])
            while at >= 0:
                if raw.startswith(word[at:]):
                    done = len(word) - at
                    tail = tails[done] if done in tails else tails.setdefault(done, _encode_rest(tokenizer, raw, done, words))
                    if tail:
                        found[(token, *tail[:LONGEST_TAIL])] = None
                at = word.find(raw[:1], at + 1)
    return tuple(found)


def _bytes(tokenizer: Any, token: int) -> bytes:
    try:
        return bytes(tokenizer.decode_bytes([token])) if hasattr(tokenizer, "decode_bytes") else str(tokenizer.decode([token])).encode()
    except (GlassformerError, LookupError):  # a hole in the vocabulary
        return b""


def _encode_rest(tokenizer: Any, raw: bytes, done: int, words: Sequence[bytes]) -> list[int]:
    """The tokens of ``raw[done:]``; none if the vocabulary has none."""
    try:
        return encode_plain(tokenizer, raw[done:].decode())
    except UnicodeDecodeError:  # it begins within a character: the tokens that the whole text has there
        ids = _encode_rest(tokenizer, raw, 0, words) if done else []
        return next((ids[k:] for k in range(1, len(ids)) if b"".join(words[i] for i in ids[k:]) == raw[done:]), [])
    except (GlassformerError, LookupError):
        return []


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in which special tokens are spelled as text, if the tokenizer can tell."""
    try:
        return list(tokenizer.encode(text, allow_special=False))
    except TypeError:
        return list(tokenizer.encode(text))


@part
class DRY(Link):
    """Don't Repeat Yourself: lower every token that would continue a repeat, the more the longer the repeat is. multiplier 0 is off.

    Where the last L >= ``allowed_length`` tokens stand in the history before, followed by x:  l_x <- l_x - multiplier * base^(L - allowed_length).

    The longest such L counts. L never reaches back across a sequence breaker, and a token that is itself a breaker is never lowered: so
    line feeds, names before a colon and quotation marks may repeat. ``window`` is how many tokens of the history count (None: all, 0: off).
    From text-generation-webui (p-e-w, pull request 5677), with the breakers across token borders of KoboldCpp and llama.cpp; there the default breakers
    are newline, colon, quotation mark and asterisk (:data:`BREAKERS`): ``DRY(0.8, breakers=Breakers.of(tokenizer))``. Breakers may also be lists of ids.

    Raises :class:`SamplerError` if ``multiplier`` < 0, ``base`` < 1, ``allowed_length`` < 1 or ``window`` < 0.
    """

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    window: int | None = None
    breakers: Breakers | Iterable[Sequence[int]] = Breakers()

    def __post_init__(self) -> None:
        if not isinstance(self.breakers, Breakers):
            object.__setattr__(self, "breakers", Breakers((), _sequences(self.breakers, "A sequence breaker")))
        if not self.multiplier >= 0 or not isfinite(self.multiplier):
            raise SamplerError(f"DRY's multiplier is 0 or more, but {self.multiplier} was given. Use 0 for none, 0.8 for a usual one.")
        if not self.base >= 1 or not isfinite(self.base):
            raise SamplerError(f"DRY's base is 1 or more, but {self.base} was given: longer repeats are lowered more. 1.75 is usual.")
        if self.allowed_length < 1:
            raise SamplerError(f"DRY's allowed length is 1 token or more, but {self.allowed_length} was given. 2 is usual.")
        if self.window is not None and self.window < 0:
            raise SamplerError(f"DRY's window is 0 tokens or more, but {self.window} was given. Use None for the whole history.")

    @property
    def off(self) -> bool:
        return self.multiplier == 0 or self.window == 0

    @property
    def most(self) -> int | None:
        """The repeat from whose length on the penalty does not grow: base^(L - allowed) stays a float32, as in llama.cpp."""
        return None if self.base <= 1.000001 else self.allowed_length + int(88.7228391 / log(self.base))

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        found = None if self.off or history is None else self._lowered(history, logits.shape[1])
        return logits if found is None else logits.float().flatten().index_add(0, *found).view(logits.shape)

    writes = True

    def write(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        found = None if history is None else self._lowered(history, logits.shape[1])
        if found is not None:
            logits.view(-1).index_add_(0, *found)
        return logits

    def _lowered(self, history: Tensor, v: int) -> tuple[Tensor, Tensor] | None:
        """Which logits are lowered, as places among all of them, and by how much (below 0)."""
        recent = history if self.window is None else history[:, -self.window :]
        if recent.shape[1] <= self.allowed_length:
            return None
        breakers = cast(Breakers, self.breakers)
        rows, ends = torch.nonzero((recent[:, :-1] == recent[:, -1:]) & (recent[:, :-1] >= 0), as_tuple=True)
        lengths = repeats(recent, rows, ends, self.most).minimum(breakers.reach(recent)[rows])
        tokens = recent[rows, ends + 1]
        worth = (lengths >= self.allowed_length) & ~breakers.alone(tokens) & (tokens < v)
        rows, tokens, lengths = rows[worth], tokens[worth], lengths[worth]
        if not len(rows):
            return None
        penalty = (self.multiplier * self.base ** (lengths - self.allowed_length).double()).clamp(max=LARGEST).float()
        places, of = (rows * v + tokens).unique(return_inverse=True)
        largest = torch.zeros(len(places), device=recent.device).scatter_reduce_(0, of, penalty, "amax")
        return places, -largest


def repeats(history: Tensor, rows: Tensor, ends: Tensor, most: int | None = None) -> Tensor:
    """How many tokens up to place ``ends[m]`` equal the last ones of row ``rows[m]``, ``[m]``; the first of them is known to. Counted up to ``most``.

    Compared in stretches that double, and only where all before were equal: most repeats end at once.
    """
    n = history.shape[1]
    lengths, going = torch.ones_like(ends), torch.arange(len(ends), device=ends.device)
    done, stretch = 1, 8
    while len(going) and done < n and (most is None or done < most):
        back = torch.arange(done, min(done + stretch, n), device=ends.device)
        here = ends[going, None] - back
        a, z = history[rows[going, None], here.clamp(min=0)], history[rows[going, None], n - 1 - back]
        equal = ((a == z) & (a >= 0) & (here >= 0)).long().cumprod(dim=1).sum(dim=1)
        lengths[going] += equal
        going, done, stretch = going[equal == len(back)], done + len(back), 2 * stretch
    return lengths if most is None else lengths.clamp(max=most)


# Sequences of tokens


@part
class SequenceBias(Link):
    """Add a number to the last token of given sequences where the tokens before it stand in the history: ``SequenceBias({(5, 9): -2.0})``. None is off.

    A sequence of one token is a plain bias. Sequences that end in one token add up. -inf removes; a row in which nothing would be left stays as it is.
    The rule is that of ``transformers`` (``sequence_bias``). A word has as many spellings in tokens as there are ways to cut it: only those named count.

    Raises :class:`SamplerError` for an empty sequence, negative ids, a bias of NaN or +inf, and an id outside the vocabulary.
    """

    bias: tuple[tuple[tuple[int, ...], float], ...] | Mapping[tuple[int, ...], float] | Iterable[tuple[Sequence[int], float]]  # kept as pairs

    def __post_init__(self) -> None:
        pairs = list(self.bias.items() if isinstance(self.bias, Mapping) else self.bias)
        sequences = _sequences([ids for ids, _ in pairs], "A sequence with a bias")
        object.__setattr__(self, "bias", tuple((ids, float(value)) for ids, (_, value) in zip(sequences, pairs, strict=True)))
        for ids, value in self.pairs:
            if isnan(value) or value == float("inf"):
                raise SamplerError(f"The bias of the sequence {ids} is {value}; give a finite number, or -inf to remove its last token.")

    @property
    def pairs(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        """The sequences and what is added to the last token of each."""
        return cast(tuple[tuple[tuple[int, ...], float], ...], self.bias)

    @property
    def off(self) -> bool:
        return not self.pairs

    @cached_property
    def _table(self) -> _Sequences:
        return _Sequences(self.pairs)

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return logits if self.off else self._table.add(logits.float(), history, "A sequence bias")


@part
class BadWords(Link):
    """Remove the last token of every given sequence where the tokens before it stand in the history: ``BadWords(((5,), (7, 9)))``. None is off.

    It is :class:`SequenceBias` with -inf (``bad_words_ids`` of ``transformers``), with its limits. There, end-of-sequence is never a bad word;
    here it is what you say. Raises :class:`SamplerError` for an empty sequence, negative ids and an id outside the vocabulary.
    """

    sequences: tuple[tuple[int, ...], ...] | Iterable[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _sequences(self.sequences, "A bad word"))

    @property
    def off(self) -> bool:
        return not self.sequences

    @cached_property
    def _table(self) -> _Sequences:
        return _Sequences([(ids, GONE) for ids in cast(Any, self.sequences)])

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return logits if self.off else self._table.add(logits.float(), history, "A bad word")


class _Sequences:
    """Sequences with what is added to the last token of each; those of one length are compared at once."""

    def __init__(self, pairs: Sequence[tuple[tuple[int, ...], float]]):
        pairs = sorted(pairs, key=lambda pair: len(pair[0]))
        self.highest = max(max(ids) for ids, _ in pairs)
        self.last = torch.tensor([ids[-1] for ids, _ in pairs])
        self.values = torch.tensor([value for _, value in pairs])
        self.before = [torch.tensor([ids[:-1] for ids, _ in pairs if len(ids) == n]) for n in sorted({len(ids) for ids, _ in pairs})]
        self.removes = bool((self.values == GONE).any())

    def add(self, logits: Tensor, history: Tensor | None, who: str) -> Tensor:
        b, v = logits.shape
        if self.highest >= v:
            raise SamplerError(f"{who} names token {self.highest}, but the vocabulary has {v} tokens: ids go from 0 to {v - 1}.")
        history = logits.new_empty(b, 0, dtype=torch.long) if history is None else history
        met = torch.cat([self._met(history, before.to(logits.device)) for before in self.before], dim=1)  # [b s]
        after = logits.index_add(1, self.last.to(logits.device), torch.where(met, self.values.to(logits.device), 0.0))
        return keep_some(logits, after) if self.removes else after

    @staticmethod
    def _met(history: Tensor, before: Tensor) -> Tensor:
        (b, n), (s, m) = history.shape, before.shape
        return torch.full((b, s), m == 0, device=history.device) if m == 0 or n < m else (history[:, None, n - m :] == before).all(dim=-1)
