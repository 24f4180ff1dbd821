"""Four ways to the same ids: the library ``tokenizers``, and three faster ones for the tokenizers that allow it.

=============  =======================================================================================================
``tokenizers``  any tokenizer; the reference that the others are held to
``tiktoken``    byte-level BPE with one of the known patterns, whose merges have equal ranks (:mod:`.ranks`)
``table``       one token per byte or per character: a look-up in a NumPy table
=============  =======================================================================================================

:func:`engine_for` chooses by what ``tokenizer.json`` says, runs the choice and the library over a text full of traps, and takes
the library if a single id differs.
"""

from __future__ import annotations

import array
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..core.errors import TokenizerError
from .alphabet import CHARACTER_OF_BYTE
from .patterns import PATTERNS, has_long_run, in_parts
from .ranks import Ranks, Unfit, ranks_of
from .special import FOR_UNKNOWN, Cutter

if TYPE_CHECKING:
    import tiktoken
    import tokenizers
    from numpy.typing import NDArray

Id32 = np.uint32
_T = TypeVar("_T")

PART = 1 << 17
"""Characters that one thread takes at a time: some 10 ms of work, so that the cost of handing it over does not show."""


def n_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine(ABC):
    """Text to ids. Nothing is added around the text; ``allow_special`` says whether special spellings become their ids."""

    name: str

    @abstractmethod
    def batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def array(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        """The ids of one text, [t]."""


class Library(Engine):
    """``tokenizers`` itself."""

    name = "tokenizers"

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        self._plain: tokenizers.Tokenizer | None = None

    def reading(self, allow_special: bool) -> tokenizers.Tokenizer:
        """The library's tokenizer, or its twin that leaves the spellings of special tokens as text."""
        if allow_special:
            return self.library
        if self._plain is None:
            plain = type(self.library).from_str(self.library.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain

    def batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        return [encoding.ids for encoding in self.reading(allow_special).encode_batch_fast(list(texts), add_special_tokens=False)]

    def array(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        return np.array(self.batch([text], allow_special)[0], dtype=Id32)


class Ranked(Engine):
    """``tiktoken`` with the ranks of the merges, on all cores; long texts are cut where the pattern cuts as well."""

    name = "tiktoken"

    def __init__(self, encoding: tiktoken.Encoding, ids: list[int] | None, cutter: Cutter, fallback: Library, composed: bool) -> None:
        self._encoding, self._ids, self._cutter, self._fallback, self._composed = encoding, ids, cutter, fallback, composed

    def batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        jobs = [(at, segment) for at, text in enumerate(texts) for segment in self._segments(text, allow_special)]
        done: list[list[list[int]]] = [[] for _ in texts]
        for (at, _), ids in zip(jobs, self._work([segment for _, segment in jobs], self._one_list), strict=True):
            done[at].append(ids)
        return [parts[0] if len(parts) == 1 else list(chain.from_iterable(parts)) for parts in done]

    def array(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        parts = self._work(self._segments(text, allow_special), self._one_array)
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=Id32)

    def _segments(self, text: str, allow_special: bool) -> list[str | list[int]]:
        """Stretches of text that can be encoded apart, and ids where they are known already."""
        if self._composed and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return [self._fallback.batch([text], allow_special)[0]]
        segments: list[str | list[int]] = []
        for segment in self._cutter.cut(text, allow_special):
            if isinstance(segment, int):
                segments.append([segment])
            else:
                segments.extend(in_parts(segment, PART))
        return segments

    def _one_list(self, segment: str | list[int]) -> list[int]:
        if isinstance(segment, list):
            return segment
        if has_long_run(segment):
            return self._fallback.batch([segment], False)[0]
        ranks = self._encoding.encode_ordinary(segment)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _one_array(self, segment: str | list[int]) -> NDArray[np.uint32]:
        return np.frombuffer(array.array("I", self._one_list(segment)), dtype=Id32)

    def _work(self, segments: list[str | list[int]], one: Callable[[str | list[int]], _T]) -> list[_T]:
        """``one`` of every segment, in order; on several threads if there is enough to do."""
        groups: list[list[str | list[int]]] = [[]]
        size = 0
        for segment in segments:
            if size >= PART:
                groups.append([])
                size = 0
            groups[-1].append(segment)
            size += len(segment)
        if len(groups) == 1 or n_threads() == 1:
            return [one(segment) for segment in segments]
        with ThreadPoolExecutor(n_threads()) as pool:  # both libraries let go of the interpreter while they work
            return list(chain.from_iterable(pool.map(lambda group: [one(segment) for segment in group], groups)))


class Table(Engine):
    """One token per unit (byte or character): ``ids[unit]``; units beyond the table, or without an id, are ``unk`` or an error.

    ``units`` gives the bytes or code points of a text, [t]; the entry ``NONE`` of the table means no id.
    """

    name = "table"
    NONE = np.uint32(0xFFFFFFFF)

    def __init__(self, ids: NDArray[np.uint32], units: Callable[[str], NDArray[Any]], cutter: Cutter, unk: int | None) -> None:
        self._known = int((ids != self.NONE).sum())
        self._ids = np.append(ids, self.NONE)
        self._complete = self._known == 256 and len(ids) == 256
        self._units, self._cutter, self._unk = units, cutter, unk

    def batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        return [self.array(text, allow_special).tolist() for text in texts]

    def array(self, text: str, allow_special: bool) -> NDArray[np.uint32]:
        parts = []
        at = 0
        for segment in self._cutter.cut(text, allow_special):
            if isinstance(segment, int):
                parts.append(np.array([segment], dtype=Id32))
                at += len(self._cutter.spelling[segment])
            else:
                parts.append(self._look_up(segment, at))
                at += len(segment)
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=Id32)

    def _look_up(self, segment: str, at: int) -> NDArray[np.uint32]:
        units = self._units(segment)
        if self._complete:
            return np.asarray(self._ids[units], dtype=Id32)
        ids: NDArray[np.uint32] = self._ids[np.minimum(units, len(self._ids) - 1)]
        unknown = ids == self.NONE
        if unknown.any():
            if self._unk is None:
                first = int(unknown.argmax())
                character = segment[first]
                raise TokenizerError(
                    f"the character {character!r} (U+{ord(character):04X}) at position {at + first} of the text is none of the {self._known} "
                    f"characters that this tokenizer knows: {FOR_UNKNOWN}."
                )
            ids[unknown] = self._unk
        return ids


def bytes_in(text: str) -> NDArray[np.uint8]:
    """The UTF-8 bytes of a text, [t]."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


def characters_in(text: str) -> NDArray[np.uint32]:
    """The code points of a text, [t]."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.dtype("<u4"))


# ---------------------------------------------------------------------------------------------------------------------- the choice

PROBE = (
    "It's THE car's 3rd  12345678 tour, don't you'LL see?\n\n\tTabs\r\n\r\n   three  \n spaces \u00a0\u3000\u2028\u0085 \u200b x\x00\x7f\x1c \ufeff"
    " naïve cafe\u0301 Ａ ﬁ ǅ ʰ İı ſ'ſ K Ⅷ ½ ² ٣ १२३४ \u180e Ελλάδα русский עִבְרִית العربية हिन्दी ไทย 日本語、中文。 한국어 ᄒ"
    " \U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea \U0010ffff \ue000"
    " camelCaseHTTPServer x=y**2;//http://a.b/c?d=e&f=%20 ______ ====----... 'tis 'S'T'LL' aaaaaaaaaaaaaaaaaaaaaaa ababababab abcabcabc \ud7ff"
)
"""Contractions, digits, white space of every kind, marks, letters without case, joined emoji, private and unassigned characters, repetitions."""


def engine_for(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tuple[Engine, str]:
    """The fastest engine that gives the ids of ``library`` (``config`` is its ``tokenizer.json``), and why it is this one."""
    reference = Library(library)
    try:
        engine = _table_of(config) or _ranked(library, config, reference)
    except Unfit as why:
        return reference, str(why)
    for text in (PROBE, *(f"{before}{token}{after}" for token in _spellings(config)[:8] for before, after in (("a ", " b"), ("", "")))):
        if _safely(engine, text) != _safely(reference, text):
            return reference, f"{engine.name} and tokenizers differ on the text {text[:40]!r}"
    return engine, {"table": "each unit of text is one token", "tiktoken": "the merges have equal ranks"}[engine.name]


def _safely(engine: Engine, text: str) -> list[list[int]] | None:
    try:
        return [engine.batch([text], allow)[0] for allow in (True, False)]
    except Exception:  # a character without an id: both must refuse it
        return None


def _spellings(config: Mapping[str, Any]) -> list[str]:
    return [token["content"] for token in config["added_tokens"]]


def _cutter(config: Mapping[str, Any]) -> Cutter:
    for token in config["added_tokens"]:
        if odd := [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]:
            raise Unfit(f"its added token {token['content']!r} takes or needs the space around it ({odd[0]})")
    return Cutter(config["added_tokens"])


def _steps(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = config["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def is_byte_level(config: Mapping[str, Any]) -> bool:
    """Whether the vocabulary is written in the byte-level alphabet."""
    return config["model"]["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in _steps(config))


def is_bytes(config: Mapping[str, Any]) -> bool:
    """Whether every token is one byte."""
    model = config["model"]
    return is_byte_level(config) and not model["merges"] and not model["ignore_merges"] and all(c in model["vocab"] for c in CHARACTER_OF_BYTE)


EACH_CHARACTER_REGEX = r"[\s\S]"
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": EACH_CHARACTER_REGEX}, "behavior": "Isolated", "invert": False}
"""The pre-tokeniser that makes each character a word."""


def is_characters(config: Mapping[str, Any]) -> bool:
    """Whether every token is one character."""
    return config["model"]["type"] == "WordLevel" and _steps(config) == [EACH_CHARACTER]


def _table_of(config: Mapping[str, Any]) -> Table | None:
    if config["normalizer"] is not None:
        return None
    vocab: dict[str, int] = config["model"]["vocab"] if config["model"]["type"] != "Unigram" else {}
    if is_bytes(config):
        if any(step.get("add_prefix_space") for step in _steps(config)):
            raise Unfit("it puts a space before the text")
        return Table(np.array([vocab[character] for character in CHARACTER_OF_BYTE], dtype=Id32), bytes_in, _cutter(config), None)
    if is_characters(config):
        single = {ord(piece): id for piece, id in vocab.items() if len(piece) == 1}
        ids = np.full(max(single, default=-1) + 1, Table.NONE, dtype=Id32)
        ids[list(single)] = list(single.values())
        return Table(ids, characters_in, _cutter(config), vocab.get(config["model"]["unk_token"]))
    return None


def _ranked(library: tokenizers.Tokenizer, config: Mapping[str, Any], reference: Library) -> Ranked:
    model = config["model"]
    if not is_byte_level(config):
        raise Unfit(f"its model is {model['type']}, not byte-level BPE")
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise Unfit("its merges are random or mark the parts of a word")
    normalizer = config["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Unfit(f"its normaliser {normalizer['type']} rewrites the text")
    pattern, cutter = _pattern_of(_steps(config)), _cutter(config)
    ranks = _ranks(library, model)
    import tiktoken

    encoding = tiktoken.Encoding("glassformer", pat_str=pattern, mergeable_ranks=ranks.of, special_tokens={})
    return Ranked(encoding, ranks.ids, cutter, reference, composed=normalizer is not None)


def _pattern_of(steps: Iterable[Mapping[str, Any]]) -> str:
    match list(steps):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return PATTERNS["gpt2"].fast
        case [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            for pattern in PATTERNS.values():
                if pattern.json == expression:
                    return pattern.fast
            raise Unfit("its pattern is none of the known ones")
    raise Unfit("its pre-tokeniser does more than cut by one known pattern")


def _ranks(library: tokenizers.Tokenizer, model: Mapping[str, Any]) -> Ranks:
    merging = library.model
    if model["ignore_merges"]:
        import tokenizers

        merging = tokenizers.models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in model["merges"]])
    return ranks_of(model, lambda piece: [token.id for token in merging.tokenize(piece)])
