"""The tokenizer of a checkpoint folder, whichever files it is written in.

    tokenizer.json ─────────────────────────────────────────────► as it stands
    tokenizer.model, spiece.model, sentencepiece.bpe.model ─────► SentencePiece                       ┐
    source.spm + vocab.json ────────────────────────────────────► SentencePiece, ids from vocab.json  ├─ tokens and roles from tokenizer_config.json,
    vocab.json + merges.txt ────────────────────────────────────► byte-level BPE                      │  special_tokens_map.json, added_tokens.json
    vocab.txt ──────────────────────────────────────────────────► WordPiece                           ┘

The first that is there counts. The older files do not say everything: what surrounds a text was a line of Python in the class that
``tokenizer_config.json`` names (``tokenizer_class``), so :data:`ENDS` lists it here; classes that also rewrite the text in Python cannot be opened from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TokenizerError
from .from_gguf import CUTS, unfitting
from .sentencepiece import CONTROL, NORMAL, UNIGRAM, UNKNOWN, Entry, Model, around, library_of, read_model
from .special import ROLES, USUAL, roles_in_config
from .tokenizer import CONFIG, FILE, TEMPLATE, Tokenizer, _template_in

if TYPE_CHECKING:
    import tokenizers

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MOST_BYTES = 256 << 20
"""Of one file; the longest published vocabulary has 40 MB."""

ENDS: dict[str, tuple[str | None, str | None]] = {
    "LlamaTokenizer": ("bos", None),
    "CodeLlamaTokenizer": ("bos", None),
    "GemmaTokenizer": ("bos", None),
    "T5Tokenizer": (None, "eos"),
    "MT5Tokenizer": (None, "eos"),
    "MarianTokenizer": (None, "eos"),
    "XLMRobertaTokenizer": ("bos", "eos"),
    "RobertaTokenizer": ("bos", "eos"),
    "BartTokenizer": ("bos", "eos"),
    "LongformerTokenizer": ("bos", "eos"),
    "LEDTokenizer": ("bos", "eos"),
}
"""The roles of the tokens before and after a text, by the class that a checkpoint names; the settings ``add_bos_token`` and ``add_eos_token`` go before it."""

PYTHON = (
    *("Albert", "XLNet", "Pegasus", "BigBird", "Camembert", "MBart", "Nllb", "M2M100", "Speech2Text", "Reformer", "DebertaV2", "CLIP", "CTRL", "OpenAIGPT"),
    *("XGLM", "FNet", "RemBert", "Whisper"),
)
"""Classes that rewrite the text or number the pieces in Python."""


def tokenizer_of_folder(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, with the ids of the library that wrote it; ``None`` if the folder holds none.

    ``encode(…, add_special=True)`` puts around a text what the checkpoint's own class did. Nothing is unpickled, and no code of the folder is run but its
    chat template, when a chat is written (see :mod:`~glassformer.text.chat`).

    Raises TokenizerError for damaged or contradicting files, and for formats that need code of their own.
    """
    folder = Path(folder)
    if (folder / FILE).exists():
        _size(folder / FILE)
        return Tokenizer.load(folder)
    opener = next((opener for names, opener in OPENERS if all((folder / name).is_file() for name in names)), None)
    if opener is None:
        if (folder / "tekken.json").exists():
            raise TokenizerError(f"{folder} has only tekken.json, which needs Mistral's own library: take the {FILE} of the same checkpoint.")
        return None
    config = _json(folder / CONFIG)
    library, roles = opener(folder, config)
    _add_tokens(library, folder, config)
    roles = roles | _given_roles(folder, config)
    _around(library, config, roles)
    vocab = library.get_vocab(with_added_tokens=True)
    return Tokenizer(library, {role: token for role, token in roles.items() if token in vocab and role in ROLES}, chat_template=_template_in(folder, config))


# ---------------------------------------------------------------------------------------------------------------------- files


def _size(file: Path) -> None:
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise TokenizerError(f"{file} has {size:,} bytes, and a tokenizer's file at most {MOST_BYTES:,}: it is another kind of file.")


def _text(file: Path) -> str:
    try:
        _size(file)
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{file} is not UTF-8 text: it is damaged or another kind of file; copy it again.") from None
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror}. Check the path and its permissions.") from None


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; nothing if there is no such file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON ({error}): it is damaged; copy it again.") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{file} holds {type(found).__name__} where names and values are expected: it is damaged; copy it again.")
    return found


def _vocab_json(file: Path) -> dict[str, int]:
    vocab = _json(file)
    if odd := next((name for name, id in vocab.items() if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 1 << 31), None):
        raise TokenizerError(f"{file} gives the piece {odd!r} the id {vocab[odd]!r}, which is no number: it is damaged; copy it again.")
    if not vocab:
        raise TokenizerError(f"{file} has no pieces: it is damaged; copy it again.")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{file} gives one id to two pieces: it is damaged; copy it again.")
    return vocab


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def _refuse_python(folder: Path, config: Mapping[str, Any]) -> None:
    if (name := _class(config)).startswith(PYTHON):
        raise TokenizerError(
            f"{folder} holds the older files of a {name}, which does a part of its work in Python: open it with transformers.AutoTokenizer and call "
            f"save_pretrained, which writes {FILE}."
        )


# ---------------------------------------------------------------------------------------------------------------------- formats


def _sentencepiece(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    _refuse_python(folder, config)
    file = next(folder / name for name in SENTENCEPIECE if (folder / name).is_file())
    _refuse_ranks(file)
    model = read_model(file)
    if isinstance(prefix := config.get("add_prefix_space"), bool):
        model = changed(model, add_dummy_prefix=prefix)
    if file.name == "sentencepiece.bpe.model":
        model = _fairseq(model, file)
    library = library_of(model)
    if _class(config) in ("T5Tokenizer", "MT5Tokenizer") or "extra_ids" in config:
        _sentinels(library, config.get("extra_ids", 100 if _class(config) == "T5Tokenizer" else 0))
    return library, model.roles


def _refuse_ranks(file: Path) -> None:
    """Llama 3's ``tokenizer.model`` has the name of a SentencePiece file and is a list of base64."""
    with file.open("rb") as handle:
        head = handle.read(64).split(b"\n")[0].split()
    if len(head) == 2 and head[1].isdigit() and len(head[0]) % 4 == 0:
        raise TokenizerError(f"{file} is a list of ranks for tiktoken, which does not say how a text is cut: take the {FILE} of the same checkpoint.")


def _fairseq(model: Model, file: Path) -> Model:
    """The ids of XLM-RoBERTa: its four special tokens first, the pieces shifted by one, the mask last."""
    rest = [entry for entry in model.pieces if entry.type not in (CONTROL, UNKNOWN)]
    if len(model.pieces) - len(rest) != 3 or any(entry.type in (CONTROL, UNKNOWN) for entry in model.pieces[3:]):
        raise TokenizerError(
            f"{file} does not begin with its three special pieces, so its ids are not those of XLM-RoBERTa: take the {FILE} of this checkpoint."
        )
    unk = model.pieces[model.unk_id or 0]
    front = (Entry("<s>", 0.0, CONTROL), Entry("<pad>", 0.0, CONTROL), Entry("</s>", 0.0, CONTROL), unk)
    return changed(model, pieces=(*front, *rest, Entry("<mask>", 0.0, CONTROL)), named={**model.named, "mask": "<mask>", "cls": "<s>", "sep": "</s>"})


def _sentinels(library: tokenizers.Tokenizer, many: Any) -> None:
    """T5's ``<extra_id_0>`` is the last of all ids, ``<extra_id_1>`` the one before."""
    from tokenizers import AddedToken

    if isinstance(many, bool) or not isinstance(many, int) or not 0 <= many <= 10_000:
        raise TokenizerError(f"extra_ids={many!r} in {CONFIG} is no number of tokens: it is damaged.")
    library.add_special_tokens([AddedToken(f"<extra_id_{at}>", normalized=False, special=True) for at in reversed(range(many))])


UNLIKELY = -1e6  # of a piece that the source language lacks, so that no cut takes it
NO_CHARACTER = "\U0010ffff"


def _marian(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Pieces of ``source.spm`` with the ids of ``vocab.json``, which also has those of the target language.

    Pieces of the source that ``vocab.json`` lacks are left out, so a text that holds them is cut smaller, where Marian has one unknown token.
    """
    from tokenizers import AddedToken, Regex, normalizers

    model, vocab = read_model(folder / "source.spm"), _vocab_json(folder / "vocab.json")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"{folder / 'vocab.json'} leaves out ids between 0 and {max(vocab.values())}: it is damaged; copy it again.")
    if "<unk>" not in vocab or model.type != UNIGRAM:
        raise TokenizerError(f"{folder} has a source.spm, but its vocab.json has no <unk>, or its model is not Unigram: this is not a Marian checkpoint.")
    source = {entry.piece: entry for entry in model.pieces}
    special = {"<unk>": UNKNOWN, "</s>": CONTROL, "<s>": CONTROL, "<pad>": CONTROL}
    pieces: list[Entry] = []
    for piece, _ in sorted(vocab.items(), key=lambda item: item[1]):
        language = piece.startswith(">>") and piece.endswith("<<")
        score = source[piece].score if piece in source else UNLIKELY * min(len(piece), 2)
        pieces.append(Entry(piece, score, CONTROL if language else special.get(piece, source[piece].type if piece in source else NORMAL)))
    library = library_of(changed(model, pieces=tuple(pieces)))
    # What the source's model does not know is looked up in vocab.json as it stands: alone it may be a piece there, several together are one unknown token.
    known = {character for entry in model.pieces for character in entry.piece} | {"▁"}
    singles = known | {piece for piece in vocab if len(piece) == 1}
    steps = [library.normalizer] if library.normalizer is not None else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(f"{_but(known)}{{2,}}|{_but(singles)}"), NO_CHARACTER)])
    library.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in vocab if piece.startswith(">>") and piece.endswith("<<")])
    around(library, None, "</s>" if "</s>" in vocab else None)
    return library, {role: token for role, token in (("eos", "</s>"), ("unk", "<unk>"), ("pad", "<pad>")) if token in vocab}


def _but(characters: Iterable[str]) -> str:
    """An expression for any character but these."""
    return "[^" + "".join(f"\\x{{{ord(character):x}}}" for character in sorted(characters)) + "]"


def _byte_level(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    import tokenizers
    from tokenizers import AddedToken

    _refuse_python(folder, config)
    vocab, file = _vocab_json(folder / "vocab.json"), folder / "merges.txt"
    merges = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"line {number} of {file} is {line[:40]!r} and not two pieces with a space between them: it is damaged; copy it again.")
        merges.append((pair[0], pair[1]))
    if any(piece.endswith("</w>") for piece in vocab):
        raise TokenizerError(f"{folder} marks the ends of words (</w>), so its BPE is not byte-level: take the {FILE} of the same checkpoint.")
    qwen = _class(config) == "Qwen2Tokenizer"
    steps = [*CUTS["qwen2" if qwen else "gpt-2"].steps]
    steps[-1] = {**steps[-1], "add_prefix_space": bool(config.get("add_prefix_space", False))}
    if odd := unfitting(vocab, merges):
        raise TokenizerError(f"{folder / 'vocab.json'} and {file.name} do not belong together: {odd}. Copy both again.")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    whole = json.loads(library.to_str())
    whole |= {
        "normalizer": {"type": "NFC"} if qwen else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    whole["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    library = tokenizers.Tokenizer.from_str(json.dumps(whole))
    merged = {left + right for left, right in merges}
    usual = [token for names in USUAL.values() for token in names if token in vocab and token not in merged]
    library.add_special_tokens([AddedToken(token, normalized=False, special=True, lstrip=token == "<mask>") for token in dict.fromkeys(usual)])
    return library, {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>"} if "<s>" in usual and "</s>" in usual else {}


def _wordpiece(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

    _refuse_python(folder, config)
    file = folder / "vocab.txt"
    lines = _text(file).split("\n")
    vocab = {line.rstrip("\r"): id for id, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    given = _given_roles(folder, config)
    names = {role: given.get(role, name) for role, name in {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}.items()}
    if names["unk"] not in vocab:
        raise TokenizerError(f"{file} has no {names['unk']!r}, which a WordPiece needs for unknown words: it is damaged, or of another kind; copy it again.")
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=names["unk"], max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names.values() if token in vocab])
    around(library, names["cls"] if names["cls"] in vocab else None, names["sep"] if names["sep"] in vocab else None)
    return library, {role: token for role, token in names.items() if token in vocab}


OPENERS = (
    *(((name,), _sentencepiece) for name in SENTENCEPIECE),
    (("source.spm", "vocab.json"), _marian),
    (("vocab.json", "merges.txt"), _byte_level),
    (("vocab.txt",), _wordpiece),
)


# ---------------------------------------------------------------------------------------------------------------------- tokens and roles


def _given_roles(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    return roles_in_config(_json(folder / "special_tokens_map.json")) | roles_in_config(config)


def _add_tokens(library: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that were added after training, with the ids that the files give them."""
    from tokenizers import AddedToken

    wanted: dict[int, tuple[str, dict[str, bool]]] = {}
    roles = set(_given_roles(folder, config).values()) | set(_spellings(config.get("additional_special_tokens")))
    for content, id in _json(folder / "added_tokens.json").items():
        if isinstance(id, bool) or not isinstance(id, int):
            raise TokenizerError(f"{folder / 'added_tokens.json'} gives {content!r} the id {id!r}, which is no number: it is damaged; copy it again.")
        wanted[id] = (content, {"special": content in roles, "normalized": content not in roles})
    decoder = config.get("added_tokens_decoder") or {}
    for id, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        if not str(id).isdigit() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise TokenizerError(f"added_tokens_decoder in {folder / CONFIG} has the entry {id!r}: {entry!r}, which is no token: it is damaged; copy it again.")
        wanted[int(id)] = (entry["content"], {flag: bool(entry.get(flag)) for flag in ("special", "normalized", "lstrip", "rstrip", "single_word")})
    for id, (content, flags) in sorted(wanted.items()):
        token = AddedToken(content, **flags)
        (library.add_special_tokens if flags["special"] else library.add_tokens)([token])
        if library.token_to_id(content) != id:
            raise TokenizerError(
                f"{folder} gives the added token {content!r} the id {id}, and behind its vocabulary comes {library.token_to_id(content)}: the files do not "
                f"belong together, or the ids have gaps. Take the {FILE} of the same checkpoint."
            )
    known = library.get_vocab(with_added_tokens=True)
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in sorted(roles) if token in known])


def _spellings(entries: Any) -> Iterable[str]:
    for entry in entries if isinstance(entries, list) else ():
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(token, str):
            yield token


def _around(library: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """What stands before and after a text."""
    name = _class(config)
    before, after = ENDS.get(name, (None, None))
    first, last = config.get("add_bos_token"), config.get("add_eos_token")
    before = ("bos" if first else None) if isinstance(first, bool) else before
    after = ("eos" if last else None) if isinstance(last, bool) else after
    if before or after:
        around(library, roles.get(before) if before else None, roles.get(after) if after else None)


__all__ = ["OPENERS", "TEMPLATE", "tokenizer_of_folder"]
