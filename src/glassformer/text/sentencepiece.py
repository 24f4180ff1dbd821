"""SentencePiece models (``tokenizer.model``, ``spiece.model``) as tokenizers of this package, with the ids that the ``sentencepiece`` library gives.

    file ──► read_model ──► Model: pieces (spelling, score, type) and what is done to a text first ──► library_of ──► tokenizers.Tokenizer
                              ▲
    GGUF metadata ────────────┘

A SentencePiece tokenizer does to a text:

    characters mapped (NFKC, …) ──► spaces trimmed ──► "▁" put in front ──► " " becomes "▁" ──► user-defined pieces cut out ──► Unigram or BPE

and cuts nothing at spaces: "▁" is a character like any other. The file is a Protocol Buffers message; the thirty fields that matter are read here, so
that neither ``sentencepiece`` nor ``protobuf`` is needed.

Where the ids can differ from the library's, as far as is known: characters that the map rewrites and that carry combining marks, which ``tokenizers``
looks up by whole graphemes; several marks on one letter in an unusual order, which are put in the usual one; cuts of a Unigram model that are equally
probable to seven digits (``sentencepiece`` adds in 32 bits, ``tokenizers`` in 64).

Kudo and Richardson 2018 (arXiv 1808.06226).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of pieces; GGUF numbers them alike."""
UNIGRAM, BPE, WORD, CHARACTER = range(1, 5)
"""The types of models."""
SPACE = "▁"
MOST_BYTES = 256 << 20
"""The longest published model file has 8 MB."""
LONGEST_PIECE = 512
"""Characters of a learnt piece. SentencePiece learns up to 16 unless told otherwise; the longest published ones are runs of some dozen spaces or dashes."""


class Entry(NamedTuple):
    """One piece of a vocabulary; its id is its place."""

    piece: str
    score: float = 0.0
    type: int = NORMAL


@dataclass(frozen=True)
class Model:
    """What a SentencePiece model file says, as far as it decides about ids."""

    pieces: tuple[Entry, ...]
    type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    space_behind: bool = False
    """The "▁" stands behind a word (``treat_whitespace_as_suffix``)."""
    named: dict[str, str] = field(default_factory=dict)
    """``{"bos": "<s>", ...}``: the roles that the trainer gave."""

    @property
    def unk_id(self) -> int | None:
        """The first piece of type unknown."""
        return next((id for id, entry in enumerate(self.pieces) if entry.type == UNKNOWN), None)

    @property
    def roles(self) -> dict[str, str]:
        """Roles whose spelling is in the vocabulary as a control piece."""
        known = {entry.piece for entry in self.pieces if entry.type in (CONTROL, UNKNOWN)}
        return {role: spelling for role, spelling in self.named.items() if spelling in known}


# ---------------------------------------------------------------------------------------------------------------------- the file


class _Damaged(Exception):
    pass


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise _Damaged(f"a number at byte {at} has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field of the message ``data[at:end]``; of a field with length its borders, so that nothing is copied."""
    while at < end:
        key, at = _varint(data, at, end)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at, end)
            yield key >> 3, wire, value
            continue
        length = 4
        if wire == 2:
            length, at = _varint(data, at, end)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Damaged(f"byte {at} begins a field of unknown wire type {wire}")
        if length > end - at:
            raise _Damaged(f"a field at byte {at} claims {length:,} bytes and {end - at:,} are left")
        yield key >> 3, wire, (at, at + length)
        at += length


def _entry(data: bytes, at: int, end: int) -> Entry:
    piece, score, type = "", 0.0, NORMAL
    for number, wire, value in _fields(data, at, end):
        if (number, wire) == (1, 2):
            piece = data[slice(*value)].decode("utf-8")
        elif (number, wire) == (2, 5):
            (score,) = struct.unpack("<f", data[slice(*value)])
        elif (number, wire) == (3, 0):
            type = value
    if not NORMAL <= type <= BYTE:
        raise _Damaged(f"the piece {piece!r} has the type {type}, and there are types 1 to 6")
    return Entry(piece, score, type)


TRAINER = {3: "type", 24: "space_behind", 35: "byte_fallback"}
NAMES = {45: "unk", 46: "bos", 47: "eos", 48: "pad"}
USUAL_NAMES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
NORMALIZER = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def parse(data: bytes) -> Model:
    """The model that the bytes of a file hold. Raises TokenizerError, without saying which file, if they hold none."""
    pieces: list[Entry] = []
    said: dict[str, Any] = {}
    named = dict(USUAL_NAMES)
    try:
        for number, wire, value in _fields(data, 0, len(data)):
            if (number, wire) == (1, 2):
                pieces.append(_entry(data, *value))
            elif (number, wire) == (2, 2):
                for inner, kind, it in _fields(data, *value):
                    if kind == 0 and inner in TRAINER:
                        said[TRAINER[inner]] = it if inner == 3 else bool(it)
                    elif kind == 2 and inner in NAMES:
                        named[NAMES[inner]] = data[slice(*it)].decode("utf-8")
            elif (number, wire) == (3, 2):
                for inner, kind, it in _fields(data, *value):
                    if kind == 0 and inner in NORMALIZER:
                        said[NORMALIZER[inner]] = bool(it)
                    elif (inner, kind) == (2, 2):
                        said["charsmap"] = data[slice(*it)]
    except (_Damaged, UnicodeDecodeError, struct.error) as error:
        raise TokenizerError(f"this is no SentencePiece model, or a damaged one: {error}. Copy the file again.") from None
    if not pieces:
        raise TokenizerError("this is no SentencePiece model: it has no pieces. Copy the file again.")
    return Model(tuple(pieces), named=named, **said)


def read_model(path: str | Path) -> Model:
    """The model in a file.

    Raises TokenizerError for a file that is missing, too long or no SentencePiece model.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise TokenizerError(f"{path} has {size:,} bytes, and a SentencePiece model at most {MOST_BYTES:,}: it is another kind of file.")
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from None
    try:
        return parse(data)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------- the tokenizer


def library_of(model: Model, *, add_bos: bool = False, add_eos: bool = False) -> tokenizers.Tokenizer:
    """A ``tokenizers.Tokenizer`` with the ids of a model.

    Control pieces (``<s>``) become special tokens: found in a text only when it is read with special tokens, never by the model itself.
    ``add_bos`` and ``add_eos`` say what ``encode(…, add_special=True)`` puts around a text; a SentencePiece file is silent about it.

    Raises TokenizerError for what ``tokenizers`` cannot do: models of words, spaces behind the words, unused pieces that the model would find.
    """
    import tokenizers
    from tokenizers import AddedToken

    _check(model)
    symbols = _user_defined(model)
    normalizer = _normalizer(model)
    strange = [s for s in symbols if normalizer is not None and normalizer.normalize_str(f"x{s}x").strip(SPACE) != f"x{s.replace(' ', SPACE)}x"]
    inside = [s for s in symbols if s not in strange]
    if model.type == UNIGRAM:
        inside = []  # its scores see to them
    library = tokenizers.Tokenizer(_model(model, merged=bool(inside)))
    if normalizer is not None:
        library.normalizer = normalizer
    cuts = _cuts(model, inside)
    if cuts:
        library.pre_tokenizer = cuts[0] if len(cuts) == 1 else tokenizers.pre_tokenizers.Sequence(cuts)
    library.decoder = _decoder(model)
    library.add_tokens([AddedToken(symbol, normalized=False) for symbol in strange])
    library.add_special_tokens([AddedToken(e.piece, normalized=False, special=True) for e in model.pieces if e.type in (CONTROL, UNKNOWN) and e.piece])
    around(library, model.roles.get("bos") if add_bos else None, model.roles.get("eos") if add_eos else None)
    return library


def around(library: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Let a tokenizer put these tokens around a text where it is asked for its special tokens."""
    from tokenizers import processors

    if before is None and after is None:
        return
    tokens = [token for token in dict.fromkeys((before, after)) if token is not None]
    missing = [token for token in tokens if library.token_to_id(token) is None]
    if missing:
        raise TokenizerError(f"the text is to be put between special tokens, and {missing[0]!r} is not in the vocabulary: the files do not belong together.")
    front, back = ([before] if before else []), ([after] if after else [])
    library.post_processor = processors.TemplateProcessing(
        single=[*front, "$A", *back],
        pair=[*front, "$A", *back, *(f"{token}:1" for token in front), "$B:1", *(f"{token}:1" for token in back)],
        special_tokens=[(token, library.token_to_id(token)) for token in tokens],
    )


def _check(model: Model) -> None:
    if model.type not in (UNIGRAM, BPE, CHARACTER):
        raise TokenizerError(f"this SentencePiece model is of type {model.type} (words), and only Unigram (1), BPE (2) and characters (4) can be used here.")
    if model.space_behind:
        raise TokenizerError("this SentencePiece model puts the space behind a word (treat_whitespace_as_suffix), which cannot be used here.")
    seen: set[str] = set()
    for entry in model.pieces:
        # How a piece was merged is found by trying every cut of it, so its length counts twice.
        if len(entry.piece) > LONGEST_PIECE and entry.type in (NORMAL, UNUSED):
            raise TokenizerError(
                f"the piece {entry.piece[:20]!r}… has {len(entry.piece):,} characters, and a learnt piece at most {LONGEST_PIECE}: the file is damaged."
            )
        if entry.piece in seen:
            raise TokenizerError(f"the piece {entry.piece!r} is twice in the vocabulary, so that one of its ids could not be found: the file is damaged.")
        seen.add(entry.piece)
    if model.type == UNIGRAM and model.unk_id is None:
        raise TokenizerError("this Unigram model has no piece for what it does not know: the file is damaged.")
    unused = [entry.piece for entry in model.pieces if entry.type == UNUSED]
    if unused and model.type == UNIGRAM:
        raise TokenizerError(
            f"the piece {unused[0]!r} is in the vocabulary but marked as unused, which tokenizers cannot follow: train the model again without."
        )


def _user_defined(model: Model) -> list[str]:
    return sorted((entry.piece for entry in model.pieces if entry.type == USER_DEFINED and entry.piece), key=lambda s: (-len(s), s))


def _model(model: Model, merged: bool) -> Any:
    """The model itself; ``merged``: words that are a piece as they stand are taken whole, for user-defined pieces, which no merges lead to."""
    from tokenizers import models

    unk = model.unk_id
    if model.type == UNIGRAM:
        # A user-defined piece has no say about its score: it gets a tenth for every byte after its first (measured on sentencepiece 0.2.3), and so wins.
        scores = [0.1 * (len(e.piece.encode()) - 1) if e.type == USER_DEFINED else e.score for e in model.pieces]
        return models.Unigram([(entry.piece, score) for entry, score in zip(model.pieces, scores, strict=True)], unk, model.byte_fallback)
    vocab = {entry.piece: id for id, entry in enumerate(model.pieces)}
    merges = merges_of(model.pieces) if model.type == BPE else []
    return models.BPE(
        vocab, merges, unk_token=None if unk is None else model.pieces[unk].piece, fuse_unk=True, byte_fallback=model.byte_fallback, ignore_merges=merged
    )


def merges_of(pieces: Sequence[Entry]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first: the order in which SentencePiece merges."""
    vocab = {entry.piece: id for id, entry in enumerate(pieces) if entry.type == NORMAL}
    found: list[tuple[float, int, int, int, str, str]] = []
    for id, entry in enumerate(pieces):
        if entry.type not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(entry.piece)):
            left, right = vocab.get(entry.piece[:cut]), vocab.get(entry.piece[cut:])
            if left is None or right is None:
                continue
            if entry.type == UNUSED:
                break  # never the result of a merge
            found.append((-entry.score, id, left, right, entry.piece[:cut], entry.piece[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(model: Model) -> Any:
    import tokenizers
    from tokenizers import normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps += _mapping(model.charsmap)
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    space = SPACE if model.escape_whitespaces else " "
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
        if model.remove_extra_whitespaces:
            steps.append(normalizers.Replace(tokenizers.Regex(rf"{SPACE}+\z"), ""))  # a text may end with the sign itself
    return normalizers.Sequence(steps) if steps else None


def _mapping(charsmap: bytes) -> list[Any]:
    """The map of characters, and what makes ``tokenizers`` read it as SentencePiece does.

    SentencePiece looks for the longest key at each place; ``tokenizers`` takes a grapheme at a time and replaces all of it by the shortest: of "e",
    circumflex, acute it would keep one accent, of "\\r\\n" one character. Composed first, or apart, they come out right.
    """
    from tokenizers import normalizers

    try:
        table = Charsmap(charsmap)
        precompiled = normalizers.Precompiled(charsmap)
    except Exception as error:
        raise TokenizerError(f"the map of characters in this SentencePiece model is damaged ({error}): copy the file again.") from None
    steps: list[Any] = []
    if table.normalize("e\u0301") == "\u00e9":
        steps.append(normalizers.NFC())
    line = table.normalize("\r")
    if line != "\r":
        steps.append(normalizers.Replace("\r", line))
    return [*steps, precompiled]


class Charsmap:
    """A map of characters as SentencePiece stores it: a double-array trie of keys, and the texts that replace them.

    u32 size of the trie │ trie, u32 each │ replacements, UTF-8, each ended by a zero byte
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) < 4:
            raise ValueError("it is shorter than its own head")
        (size,) = struct.unpack_from("<I", raw)
        if size % 4 or not 4 <= size <= len(raw) - 4:
            raise ValueError(f"its trie claims {size} of {len(raw) - 4} bytes")
        self._units = struct.unpack_from(f"<{size // 4}I", raw, 4)
        self._texts = raw[4 + size :]
        self._texts.decode("utf-8")
        self._check()

    def _check(self) -> None:
        """That no text leads out of the map: the library would end the process's thread over it."""
        units, texts = self._units, self._texts
        for at, unit in enumerate(units):
            if at and unit >> 31:  # a replacement; whoever leads here is checked
                continue
            children = at ^ _offset(unit)
            if children | 0xFF >= len(units):
                raise ValueError(f"its entry {at} points to entry {children} of {len(units)}")
            if unit >> 8 & 1:
                place = units[children] & 0x7FFFFFFF
                if place >= len(texts) or texts[place] & 0xC0 == 0x80:
                    raise ValueError(f"its entry {at} points to byte {place} of {len(texts)}, where no text begins")

    def longest(self, key: bytes) -> tuple[int, str] | None:
        """The length of the longest key that ``key`` begins with, and what replaces it."""
        found, units, node = None, self._units, 0
        node ^= _offset(units[0])
        for length, byte in enumerate(key, 1):
            node ^= byte
            if not byte > 0 or node >= len(units):
                break
            unit = units[node]
            if unit & 0x800000FF != byte:
                break
            node ^= _offset(unit)
            if unit >> 8 & 1 and node < len(units):
                start = units[node] & 0x7FFFFFFF
                end = self._texts.find(b"\0", start)
                found = (length, self._texts[start : end if end >= 0 else None].decode("utf-8"))
        return found

    def normalize(self, text: str) -> str:
        """The text with every key replaced, longest first, from left to right."""
        raw, at, out = text.encode("utf-8"), 0, []
        while at < len(raw):
            found = self.longest(raw[at : at + 64])
            if found is None:
                width = 1 if raw[at] < 0x80 else 2 if raw[at] < 0xE0 else 3 if raw[at] < 0xF0 else 4
                found = (width, raw[at : at + width].decode("utf-8"))
            at += found[0]
            out.append(found[1])
        return "".join(out)


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _cuts(model: Model, inside: Sequence[str]) -> list[Any]:
    """Cuts around user-defined pieces, and through spellings that no text may become: ``<s>``, ``<0x41>``."""
    from tokenizers import Regex, pre_tokenizers

    cuts = []
    if inside:
        expression = "|".join(re.escape(symbol.replace(" ", SPACE) if model.escape_whitespaces else symbol) for symbol in inside)
        cuts.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    if model.type == UNIGRAM or inside:
        hidden = [e.piece for e in model.pieces if e.type in (CONTROL, UNKNOWN, BYTE) and len(e.piece) > 1]
        if through := _through(hidden, model.pieces):
            cuts.append(pre_tokenizers.Split(Regex("|".join(through)), "merged_with_previous"))
    return cuts


def _through(hidden: Sequence[str], pieces: Sequence[Entry]) -> list[str]:
    """Expressions for the first half of each hidden spelling where the second follows, cut where the fewest pieces would reach over the cut.

    ``tokenizers`` looks for every piece of a Unigram vocabulary in the text; SentencePiece leaves control and byte pieces out.
    """
    pairs: dict[str, int] = {}
    single = {entry.piece for entry in pieces if entry.type == NORMAL and len(entry.piece) == 1}
    for entry in pieces:
        if entry.type in (NORMAL, USER_DEFINED):
            for at in range(len(entry.piece) - 1):
                pair = entry.piece[at : at + 2]
                pairs[pair] = pairs.get(pair, 0) + 1
    groups: dict[tuple[str, str], None] = {}
    for spelling in hidden:
        text = spelling.replace(" ", SPACE)
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None
        # Where both neighbours are unknown the cut would make two unknown tokens of one.
        at = min(range(1, 3 if byte else len(text)), key=lambda i: (text[i - 1] not in single and text[i] not in single, pairs.get(text[i - 1 : i + 1], 0)))
        ending = re.escape(text[at:3]) + "[0-9A-F]{2}>" if byte else re.escape(text[at:])
        groups[re.escape(text[:at]), ending] = None
    return [f"{left}(?={right})" for left, right in groups]


def _decoder(model: Model) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " ")] if model.escape_whitespaces else []
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
