"""Which bytes each token writes: what a grammar, which rules characters, needs in order to rule tokens.

    tokenizer ──► words[id]: b" the", b"\\xf0\\x9f", b"" (writes nothing) ──► the trie of llguidance, once per tokenizer
                  special: ids that are no text, whatever their spelling

The bytes are those that a token adds behind other text. Byte-level tokens have theirs in the vocabulary, ``<0xNN>`` of SentencePiece is one
byte, and the rest is decoded behind another token: so "▁the" and a whole word of a vocabulary of words begin with their space.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from glassformer.core.errors import GlassformerError, InputError, SamplerError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
KEPT = 32  # compiled grammars per tokenizer
_KNOWN: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


@dataclass(eq=False)
class Vocabulary:
    """The bytes that each id writes (``words``; none: it writes nothing), and the ids that are no text (``special``, by their spelling)."""

    words: list[bytes]
    special: dict[str, int]
    _compiled: OrderedDict[str, Any] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._tries: Any = None

    @staticmethod
    def of(tokenizer: Any) -> Vocabulary:
        """That of a tokenizer, found once and kept for as long as the tokenizer is. Raises :class:`InputError` if it does not say its size."""
        try:
            known = _KNOWN.get(tokenizer)
        except TypeError:  # no hash
            return _read(tokenizer)
        if known is None:
            known = _read(tokenizer)
            with suppress(TypeError):  # no weak references
                _KNOWN[tokenizer] = known
        return known

    def __len__(self) -> int:
        return len(self.words)

    @property
    def end(self) -> int:
        """The id, one behind the vocabulary, that says in a matcher's masks whether the text may end here."""
        return len(self.words)

    @cached_property
    def complete(self) -> bool:
        """Whether every byte of every text is a token by itself: then what a grammar begins it can always go on with."""
        single = {word for word in self.words if len(word) == 1}
        return all(bytes([b]) in single for b in (9, 10, 13, *range(32, 127), *range(0x80, 0xC0), *range(0xC2, 0xF5)))

    def lacks(self, characters: str) -> str:
        """Those of some characters that no token holds."""
        there = set(b"".join(self.words).decode("utf-8", "ignore"))
        return "".join(c for c in characters if c not in there)

    def matcher(self, lark: str) -> Any:
        """A matcher at the beginning of a grammar, for reading only: copy it. Raises :class:`SamplerError` with the library's reason."""
        with self._lock:
            found = self._compiled.get(lark)
            if found is None:
                found = self._compiled[lark] = self._compile(lark)
            self._compiled.move_to_end(lark)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return found

    def _compile(self, lark: str) -> Any:
        import llguidance

        if self._tries is None:
            words = [*self.words, b"<end>"]
            for spelling, id in self.special.items():
                words[id] = spelling.encode()
            self._tries = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Given(words, [*self.special.values(), self.end])), n_vocab=len(words))
        matcher = llguidance.LLMatcher(self._tries, lark, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise SamplerError(reason(matcher))
        return matcher


class _Given:
    """The shape in which llguidance takes a vocabulary. It never cuts a text into tokens here: grammars are compiled without forcing."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, special[-1]

    def __call__(self, text: bytes) -> list[int]:
        return []


def reason(matcher: Any) -> str:
    """What the library found wrong, in one line, without the states of its parser."""
    said = str(matcher.get_error()).partition("<state>")[0]
    lines = [line.strip() for line in said.strip().splitlines()]
    picture = next((i for i, line in enumerate(lines) if re.match(r"\d+ \|", line)), len(lines))  # of the place, drawn
    text = " ".join(line for line in lines[:picture] if line.strip("^ "))
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)[:400]


def _read(tokenizer: Any) -> Vocabulary:
    size = getattr(tokenizer, "vocab_size", None)
    size = size if isinstance(size, int) else len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if not size:
        raise InputError(
            f"A constraint looks at every token, but this {type(tokenizer).__name__} does not say how many it has: give it a vocab_size, or use one of ours."
        )
    named = getattr(tokenizer, "special", {})
    special: dict[str, int] = dict(named) if isinstance(named, dict) else {}
    for id in getattr(tokenizer, "all_special_ids", ()):
        special.setdefault(str(tokenizer.decode([id])), int(id))
    hidden = {*special.values(), getattr(tokenizer, "unk_id", None)}
    word = _bytes_of if getattr(tokenizer, "kind", None) in ("bpe", "bytes", "characters") else _behind(tokenizer, size, hidden)
    return Vocabulary([b"" if id in hidden else _or_nothing(word, tokenizer, id) for id in range(size)], {s: i for s, i in special.items() if s and i < size})


def _or_nothing(word: Any, tokenizer: Any, id: int) -> bytes:
    try:
        return bytes(word(tokenizer, id))
    except (GlassformerError, LookupError, ValueError, TypeError):  # a hole in the vocabulary
        return b""


def _bytes_of(tokenizer: Any, id: int) -> bytes:
    return bytes(tokenizer.decode_bytes([id]))


def _behind(tokenizer: Any, size: int, hidden: set[Any]) -> Any:
    """How to read the tokens of a vocabulary that decodes to text only: behind a token of letters."""

    def text(ids: list[int]) -> str:
        try:
            return str(tokenizer.decode(ids))
        except (GlassformerError, LookupError, ValueError):
            return ""

    before = next((id for id in range(size) if id not in hidden and text([id]).strip().isalpha()), None)
    head = "" if before is None else text([before])

    def word(tokenizer: Any, id: int) -> bytes:
        piece = tokenizer.piece(id) if hasattr(tokenizer, "piece") else ""
        if (found := _BYTE.match(piece)) and tokenizer.decode([id]) != piece:
            return bytes([int(found.group(1), 16)])
        both = text([id]) if before is None else text([before, id])
        new = both[len(head) :] if both.startswith(head) else ""
        return b"" if "\ufffd" in new else new.encode()

    return word
