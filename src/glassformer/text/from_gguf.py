"""The tokenizer inside a GGUF file, and the way back.

                          ┌─ "gpt2"   byte-level BPE by merges; tokenizer.ggml.pre names how a text is cut first
    tokenizer.ggml.model ─┼─ "llama"  SentencePiece BPE by scores
                          ├─ "t5"     SentencePiece Unigram
                          └─ "bert"   WordPiece, "▁" where a word begins

A GGUF file holds pieces, their types, scores or merges, and a few ids. What a text goes through before, it holds as a name only, and the expressions
behind the names are in the program that reads it; :data:`CUTS` is that table here. The ids are those of the tokenizer that was converted, so where
llama.cpp takes a short cut (it composes no characters for Qwen, lowers the case for every BERT) this module does not.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import TokenizerError, did_you_mean
from .patterns import PATTERNS
from .sentencepiece import BPE, BYTE, CONTROL, NORMAL, SPACE, UNIGRAM, UNKNOWN, USER_DEFINED, Entry, Model, around, library_of
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

KEY = "tokenizer.ggml."
ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "sep": "seperator_token_id",  # so spelt in the format
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
MODELS = ("gpt2", "llama", "bert", "t5")


# ---------------------------------------------------------------------------------------------------------------------- how a text is cut


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _digits(each: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": each}


class Cut(NamedTuple):
    """What a byte-level tokenizer does before it merges."""

    steps: tuple[dict[str, Any], ...]
    """As in a ``tokenizer.json``."""
    composed: bool = False
    """Characters are composed first (NFC)."""
    whole: bool = False
    """A word that is a piece is taken as it stands (``ignore_merges``)."""
    bos: bool = False
    """A text begins with bos where the file does not say otherwise."""


_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_TEKKEN = PATTERNS["o200k"].json.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
# Letters with case, as the makers of DeepSeek listed them: code points, because some of these letters change when a file is normalised.
_CASED = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556
    10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
    1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126
    2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787
    A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_CASED_CLASS = "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED.split())
_DEEPSEEK_3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

_GPT2 = Cut((_bytes(use_regex=True),))
_CL100K = (_split(PATTERNS["cl100k"].json), _bytes())
_QWEN2 = (_split(PATTERNS["qwen2"].json), _bytes())
_DIGIT_BY_DIGIT = Cut((_digits(True), _bytes(use_regex=True)))

CUTS: dict[str, Cut] = {
    "gpt-2": _GPT2,
    "dbrx": Cut(_CL100K),
    "stablelm2": Cut(_QWEN2),
    "gpt-4o": Cut((_split(PATTERNS["o200k"].json), _bytes())),
    "llama-bpe": Cut(_CL100K, whole=True, bos=True),
    "qwen2": Cut(_QWEN2, composed=True),
    "olmo": Cut(_GPT2.steps, composed=True),
    "tekken": Cut((_split(_TEKKEN), _bytes()), whole=True, bos=True),
    "starcoder": _DIGIT_BY_DIGIT,
    "falcon": Cut(({"type": "Punctuation", "behavior": "Contiguous"}, _bytes(use_regex=True), _digits(False), _split("[0-9][0-9][0-9]"))),
    "deepseek-llm": Cut(
        (
            _split("[\r\n]"),
            _split(rf"\s?[{_CASED_CLASS}]+"),
            _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split(r"\s+$"),
            _split(_CJK),
            _digits(True),
            _bytes(),
        )
    ),
    "deepseek-coder": Cut((_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(_CJK), _digits(True), _bytes())),
    "deepseek-v3": Cut((_split(r"\p{N}{1,3}"), _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), _split(_DEEPSEEK_3), _bytes())),
}
"""The names of ``tokenizer.ggml.pre``. Of those that cut alike the first is written."""

for _name, _same in {
    "default": "gpt-2",
    "gpt2": "gpt-2",
    "mpt": "gpt-2",
    "phi-2": "gpt-2",
    "smaug-bpe": "dbrx",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "llama4": "gpt-4o",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "refact": "starcoder",
    "smollm": "starcoder",
    "codeshell": "starcoder",
    "command-r": "starcoder",
}.items():
    CUTS[_name] = CUTS[_same]
CUTS["command-r"] = CUTS["command-r"]._replace(composed=True)


def _alike(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A step in the one way in which it is compared: the expression of GPT-2 spelled out, without what only decides about offsets."""
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        step["pattern"] = {"Regex": step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")}
    if step["type"] == "ByteLevel" and step.pop("use_regex", True):
        return [_split(PATTERNS["gpt2"].json), step]
    return [step]


def _all_alike(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [one for step in steps for one in _alike(step)]


# ---------------------------------------------------------------------------------------------------------------------- reading


class _Keys:
    """Metadata that is checked as it is read."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(KEY + name)
        if value is None:
            return default
        if hasattr(value, "item") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if (kind is int and (isinstance(value, bool) or not isinstance(value, int))) or (kind is not int and not isinstance(value, kind)):
            raise TokenizerError(f"the GGUF key {KEY + name} is of type {type(value).__name__}, and it should be {kind.__name__}: the file is damaged.")
        return value

    def row(self, name: str, kind: type, length: int | None = None) -> list[Any] | None:
        values = self.metadata.get(KEY + name)
        if values is None:
            return None
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
            raise TokenizerError(f"the GGUF key {KEY + name} is of type {type(values).__name__}, and it should be a list: the file is damaged.")
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if length is not None and len(values) != length:
            raise TokenizerError(f"the GGUF file has {length:,} pieces in {KEY}tokens and {len(values):,} entries in {KEY + name}: it is damaged.")
        try:
            if kind is not str:
                return [kind(value) for value in values]
        except (TypeError, ValueError):
            raise TokenizerError(f"the GGUF key {KEY + name} holds what is no {kind.__name__}: the file is damaged.") from None
        if odd := next((value for value in values if not isinstance(value, str)), None):
            raise TokenizerError(f"the GGUF key {KEY + name} holds {odd!r}, which is no text: the file is damaged.")
        return values


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    """By role."""

    @property
    def roles(self) -> dict[str, str]:
        return {role: self.tokens[id] for role, id in self.ids.items()}

    def of(self, *kinds: int) -> list[str]:
        return [token for token, type in zip(self.tokens, self.types, strict=True) if type in kinds]


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe (``{"tokenizer.ggml.model": "gpt2", …}``), with the ids of the tokenizer that was converted.

    Raises TokenizerError for a kind or a ``tokenizer.ggml.pre`` that is not known here, and for keys that are missing or do not fit each other.
    """
    keys = _Keys(metadata)
    model = keys.get("model", str)
    if model is None:
        raise TokenizerError(f"this GGUF file has no tokenizer: the key {KEY}model is missing. Give the file of the whole model, or a tokenizer of its own.")
    if model not in MODELS:
        raise TokenizerError(f"the tokenizer of this GGUF file is of kind {model!r}; {', '.join(MODELS)} can be read.{did_you_mean(model, MODELS)}")
    vocabulary = _vocabulary(keys)
    make = {"gpt2": _byte_level, "llama": _by_scores, "t5": _unigram, "bert": _wordpiece}[model]
    try:
        library = make(keys, vocabulary)
    except TokenizerError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # the tokenizers library's words for pieces that it cannot use
        raise TokenizerError(f"the vocabulary of this GGUF file makes no tokenizer ({error}): the file is damaged.") from error
    known = library.get_vocab(with_added_tokens=True)
    template = metadata.get("tokenizer.chat_template")
    # WordPiece spells its pieces otherwise, its special tokens alike
    return Tokenizer(
        library, {role: token for role, token in vocabulary.roles.items() if token in known}, chat_template=template if isinstance(template, str) else None
    )


def _vocabulary(keys: _Keys) -> _Vocabulary:
    tokens = keys.row("tokens", str)
    if not tokens:
        raise TokenizerError(f"the GGUF file has no vocabulary: {KEY}tokens is missing or empty. Take a file that was made with its tokenizer.")
    ids = {}
    for role, key in ROLE_KEYS.items():
        id = keys.get(key, int)
        if id is not None and id != 0xFFFFFFFF and id != -1:  # both are written for none
            if not 0 <= id < len(tokens):
                raise TokenizerError(f"the GGUF key {KEY + key} is {id}, and the vocabulary has {len(tokens):,} pieces: the file is damaged.")
            ids[role] = id
    broken = next((token for token in tokens if any("\ud800" <= c <= "\udfff" for c in token)), None)
    if broken is not None:
        raise TokenizerError(f"the piece {broken!r} in {KEY}tokens is not UTF-8: the GGUF file is damaged.")
    types = keys.row("token_type", int, len(tokens))
    if types is None:
        special = {ids[role] for role in ids if role != "unk"}
        types = [
            UNKNOWN if id == ids.get("unk") else CONTROL if id in special else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
            for id, token in enumerate(tokens)
        ]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise TokenizerError(f"the piece {twice!r} is twice in {KEY}tokens, so that one of its ids could not be found: the GGUF file is damaged.")
    return _Vocabulary(tokens, types, ids)


def _ends(keys: _Keys, vocabulary: _Vocabulary, bos: bool, eos: bool, before: str = "bos", after: str = "eos") -> tuple[str | None, str | None]:
    roles = vocabulary.roles
    return (
        roles.get(before, roles.get("bos")) if keys.get("add_bos_token", bool, bos) else None,
        roles.get(after, roles.get("eos")) if keys.get("add_eos_token", bool, eos) else None,
    )


def _byte_level(keys: _Keys, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    import tokenizers

    pre = keys.get("pre", str, "default")
    if pre not in CUTS:
        raise TokenizerError(
            f"the GGUF file cuts its texts by {pre!r} ({KEY}pre), which is not known here, and another cut would give other ids; known are "
            f"{', '.join(sorted(CUTS))}.{did_you_mean(pre, CUTS)} Open the checkpoint's tokenizer.json instead."
        )
    cut = CUTS[pre]
    merges = keys.row("merges", str)
    if merges is None:
        raise TokenizerError(f"the GGUF file has no {KEY}merges, and a byte-level BPE is made of them: it was made without its tokenizer.")
    pairs = [_pair(merge) for merge in merges]
    added = [(id, token) for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)) if type in (CONTROL, USER_DEFINED)]
    end, merged = len(vocabulary.tokens), {piece for left, right in pairs for piece in (left, right, left + right)}
    # Those at the end need not be in the model, where a text could become them.
    while end and vocabulary.types[end - 1] in (CONTROL, USER_DEFINED) and vocabulary.tokens[end - 1] not in merged:
        end -= 1
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cut.whole,
        "vocab": {token: id for id, token in enumerate(vocabulary.tokens[:end])},
        "merges": pairs,
    }
    config = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": vocabulary.types[i] == CONTROL}
            for i, t in added
            if t
        ],
        "normalizer": {"type": "NFC"} if cut.composed else None,
        "pre_tokenizer": cut.steps[0] if len(cut.steps) == 1 else {"type": "Sequence", "pretokenizers": list(cut.steps)},
        "post_processor": None,
        "decoder": _bytes(use_regex=True),
        "model": model,
    }
    if odd := unfitting(model["vocab"], pairs):
        raise TokenizerError(f"the vocabulary and the merges of this GGUF file do not fit each other ({odd}): it is damaged.")
    library = tokenizers.Tokenizer.from_str(json.dumps(config))
    around(library, *_ends(keys, vocabulary, cut.bos, False))
    return library


def unfitting(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> str | None:
    """What is wrong with merges for a vocabulary, or nothing: the library would end the process's thread over it."""
    for left, right in merges:
        if lacking := [piece for piece in (left, right, left + right) if piece not in vocab]:
            return f"the merge of {left!r} and {right!r} needs {lacking[0]!r}, which is no piece"
    return None


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge[:1] + merge[1:].partition(" ")[0], *merge[1:].partition(" ")[1:]  # the first piece may begin with a space
    if not space or not left or not right:
        raise TokenizerError(f"{merge!r} in {KEY}merges is not two pieces with a space between them: the GGUF file is damaged.")
    return left, right


def _model(keys: _Keys, vocabulary: _Vocabulary, type: int, trimmed: bool, charsmap: bytes) -> Model:
    scores = keys.row("scores", float, len(vocabulary.tokens))
    if scores is None:
        raise TokenizerError(f"the GGUF file has no {KEY}scores, and a SentencePiece vocabulary is nothing without them: it is damaged.")
    pieces = []
    here = set(vocabulary.tokens)
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        spelt = token.replace(" ", SPACE) if kind == USER_DEFINED else token  # converters write their spaces as spaces
        pieces.append(Entry(token if spelt in here else spelt, score, kind if NORMAL <= kind <= BYTE else NORMAL))
    return Model(
        tuple(pieces),
        type=type,
        byte_fallback=BYTE in vocabulary.types,
        charsmap=charsmap,
        add_dummy_prefix=keys.get("add_space_prefix", bool, True),
        remove_extra_whitespaces=keys.get("remove_extra_whitespaces", bool, trimmed),
    )


def _by_scores(keys: _Keys, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    library = library_of(_model(keys, vocabulary, BPE, False, _charsmap(keys)))
    around(library, *_ends(keys, vocabulary, True, False))
    return library


def _unigram(keys: _Keys, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    library = library_of(_model(keys, vocabulary, UNIGRAM, False, _charsmap(keys)))
    around(library, *_ends(keys, vocabulary, False, True))
    return library


def _charsmap(keys: _Keys) -> bytes:
    raw = keys.metadata.get(KEY + "precompiled_charsmap", b"")
    try:
        return bytes(value & 0xFF for value in (raw.tolist() if hasattr(raw, "tolist") else raw))  # some readers give signed bytes
    except TypeError:
        raise TokenizerError(f"the GGUF key {KEY}precompiled_charsmap is no row of bytes: the file is damaged.") from None


def _wordpiece(keys: _Keys, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = [_bert_piece(token, type) for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True)]
    unk = pieces[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else "[UNK]"
    vocab = {piece: id for id, piece in enumerate(pieces)}
    if len(vocab) < len(pieces) or unk not in vocab:
        what = "two of its pieces are the same" if len(vocab) < len(pieces) else f"its unknown piece {unk!r} is missing"
        raise TokenizerError(f"the WordPiece vocabulary of this GGUF file is damaged: {what}.")
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    # The file does not say whether letters are made small; a vocabulary that has learnt large ones does not.
    large = any(piece != piece.lower() for piece, type in zip(pieces, vocabulary.types, strict=True) if type == NORMAL and not _bracketed(piece))
    library.normalizer = normalizers.BertNormalizer(lowercase=not large)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = dict.fromkeys([*vocabulary.of(CONTROL, UNKNOWN), *vocabulary.roles.values()])
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special if token in vocab])
    library.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in vocabulary.of(USER_DEFINED) if token in vocab])
    around(library, *_ends(keys, vocabulary, True, True, "cls", "sep"))
    return library


def _bracketed(piece: str) -> bool:
    return piece.startswith("[") and piece.endswith("]") and len(piece) > 2


def _bert_piece(token: str, type: int) -> str:
    if type not in (NORMAL,) or _bracketed(token):
        return token.removeprefix(SPACE) if token.startswith(SPACE + "<") else token
    return token[1:] if token.startswith(SPACE) and len(token) > 1 else f"##{token}"


# ---------------------------------------------------------------------------------------------------------------------- writing


def gguf_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a GGUF file that describe a tokenizer: :func:`tokenizer_from_gguf` of them gives the same ids.

    Byte-level BPE, SentencePiece BPE and Unigram, and WordPiece can be written. Raises TokenizerError for other kinds, and for what the format has no key for.
    """
    config = json.loads(tokenizer.library.to_str())
    for token in config["added_tokens"]:
        if odd := [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]:
            raise TokenizerError(f"the token {token['content']!r} takes or needs the space around it ({odd[0]}), which a GGUF file cannot say.")
    writers = {"bpe": _written_merges, "bytes": _written_merges, "bpe (characters)": _written_scores, "unigram": _written_scores, "wordpiece": _written_words}
    if tokenizer.kind not in writers:
        raise TokenizerError(f"a tokenizer of kind {tokenizer.kind!r} cannot be written as GGUF: bpe, bytes, SentencePiece, unigram and wordpiece can.")
    written = writers[tokenizer.kind](tokenizer, config)
    found: dict[str, Any] = {KEY + name: value for name, value in written.items()} | _written_ends(tokenizer)
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    _compare(tokenizer, tokenizer_from_gguf(found))
    return found


def _compare(tokenizer: Tokenizer, again: Tokenizer) -> None:
    """A file that a reader would understand otherwise is not written."""
    from .engines import PROBE

    pieces = [tokenizer.piece(id) for id in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 2000)) if id in tokenizer._pieces]
    texts = (PROBE, *PROBE.split(" "), " ".join(pieces).replace(SPACE, " "), "".join(pieces), " two  spaces ", "a\nb\r\nc\td", *list(tokenizer.special)[:50])
    for text in texts:
        for allow in (True, False):
            ours, theirs = tokenizer.encode(text, allow_special=allow), again.encode(text, allow_special=allow)
            if ours != theirs:
                raise TokenizerError(
                    f"this tokenizer cannot be written as GGUF: the text {text[:40]!r} would get other ids ({theirs[:8]} and not {ours[:8]}), because the "
                    f"format has no key for its normaliser, its way of cutting or its order of merges. Keep its tokenizer.json beside the file."
                )


def _tokens(tokenizer: Tokenizer) -> list[str]:
    """Every piece by id; ids without one get a name that no text has."""
    return [tokenizer._pieces.get(id, f"[PAD{id}]") for id in range(tokenizer.vocab_size)]


def _types(tokenizer: Tokenizer, config: Mapping[str, Any]) -> list[int]:
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in config["added_tokens"]}
    return [added.get(id, NORMAL) if id in tokenizer._pieces else 5 for id in range(tokenizer.vocab_size)]


def _written_merges(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    cut = config["pre_tokenizer"]
    config_steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    steps = _all_alike(config_steps)
    normalizer = config["normalizer"]
    composed = normalizer == {"type": "NFC"}
    plain = normalizer is None or composed or normalizer == {"type": "Sequence", "normalizers": []}
    alike = [name for name, cut in CUTS.items() if _all_alike(cut.steps) == steps]
    if not config["model"]["merges"] and _all_alike(config_steps[-1:]) == [_alike(_bytes())[0]]:
        alike = ["gpt-2"]  # where nothing is merged, no cut makes a difference
    exact = [name for name in alike if plain and CUTS[name].composed == composed and CUTS[name].whole == config["model"]["ignore_merges"]]
    near = [name for name in alike if plain and CUTS[name].composed == composed]  # whether words are taken whole may make no difference
    if not (exact or near):
        raise TokenizerError(
            "this tokenizer cannot be written as GGUF: the format names how a text is cut, and its normaliser and expression are none of "
            f"{', '.join(sorted(CUTS))}. Keep its tokenizer.json beside the file."
        )
    return {
        "model": "gpt2",
        "pre": (exact or near)[0],
        "tokens": _tokens(tokenizer),
        "token_type": _types(tokenizer, config),
        "merges": [f"{left} {right}" for left, right in config["model"]["merges"]],
    }


def _written_words(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    tokens, types = _tokens(tokenizer), _types(tokenizer, config)
    prefix = config["model"]["continuing_subword_prefix"]
    unk = config["model"]["unk_token"]
    types = [UNKNOWN if token == unk else type for token, type in zip(tokens, types, strict=True)]

    def phantom(token: str, type: int) -> str:
        if type != NORMAL or _bracketed(token):
            return token
        return token.removeprefix(prefix) if token.startswith(prefix) and len(token) > len(prefix) else SPACE + token

    return {"model": "bert", "tokens": [phantom(token, type) for token, type in zip(tokens, types, strict=True)], "token_type": types}


def _written_scores(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    model, before = config["model"], json.dumps([config["normalizer"], config["pre_tokenizer"]], ensure_ascii=False)
    tokens, types = _tokens(tokenizer), _types(tokenizer, config)
    unk = tokenizer.unk_id
    if model["type"] == "Unigram":
        score: dict[str, float] = dict(map(tuple, model["vocab"]))
        chosen = {piece for piece, value in model["vocab"] if value >= 0.0 and abs(value - 0.1 * (len(piece.encode()) - 1)) < 1e-6 and len(piece) > 1}
    else:
        made = list(dict.fromkeys(left + right for left, right in model["merges"]))
        score = {piece: -float(at) for at, piece in enumerate(made)}
        chosen = {piece for piece in model["vocab"] if len(piece) > 1 and piece not in score} if model["ignore_merges"] else set()
    for id, token in enumerate(tokens):
        if id == unk:
            types[id] = UNKNOWN
        elif model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[id] = BYTE
        elif types[id] == NORMAL and token in chosen:
            types[id] = USER_DEFINED
    steps = {
        "model": "t5" if model["type"] == "Unigram" else "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": [float(score.get(token, -float(len(tokens)) if type == NORMAL else 0.0)) for token, type in zip(tokens, types, strict=True)],
        "add_space_prefix": '"Prepend"' in before or re.search(r'"prepend_scheme": "(first|always)"', before) is not None,
        "remove_extra_whitespaces": " {2,}" in before or '"WhitespaceSplit"' in before,
    }
    if found := re.search(r'"precompiled_charsmap": "([^"]*)"', before):
        steps["precompiled_charsmap"] = list(base64.b64decode(found.group(1)))
    return steps


def _written_ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of roles, and whether a text is put between them."""
    ids = {role: id for role in ROLE_KEYS if (id := tokenizer.role_id(role)) is not None}
    before, after = tokenizer._around
    first, last = ("cls", "sep") if tokenizer.kind == "wordpiece" else ("bos", "eos")
    for role, around_text in ((first, before), (last, after)):
        if len(around_text) > 1:
            raise TokenizerError(f"this tokenizer puts {len(around_text)} special tokens on one side of a text, and a GGUF file can say one: write it without.")
        if around_text and ids.setdefault(role, around_text[0]) != around_text[0]:
            raise TokenizerError(
                f"this tokenizer puts {tokenizer.piece(around_text[0])!r} at the {'beginning' if role == first else 'end'} of a text, and its {role} token is "
                f"{tokenizer.piece(ids[role])!r}: a GGUF file can only say that they are the same. Give Tokenizer(…, roles=…) the one that is right."
            )
    return {
        **{KEY + ROLE_KEYS[role]: id for role, id in ids.items()},
        KEY + "add_bos_token": bool(before),
        KEY + "add_eos_token": bool(after),
    }


__all__: Sequence[str] = ["CUTS", "gguf_metadata", "tokenizer_from_gguf"]
