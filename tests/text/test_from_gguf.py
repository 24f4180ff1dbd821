"""Tokenizers out of GGUF metadata and back into them: the ids of what was converted."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from corpus_of_tokenizers import END, MIXED, shakespeare, trained
from glassformer.core.errors import TokenizerError
from glassformer.text import Tokenizer
from glassformer.text.engines import PROBE
from glassformer.text.from_gguf import CUTS, gguf_metadata, tokenizer_from_gguf
from glassformer.text.sentencepiece import library_of, parse

KEY = "tokenizer.ggml."
TEXTS = [
    MIXED,
    PROBE,
    shakespeare()[:2_000],
    "",
    " ",
    "  x",
    "a\r\n\r\nb",
    "1234567 12 1",
    "don't DON'T",
    "e\u0301 é",
    "日本語 カタカナ。ひらがな",
    "$x = `a|b`;",
    "x<|endoftext|>y",
]

DISTINCT = [name for at, name in enumerate(CUTS) if CUTS[name] not in list(CUTS.values())[:at]]


@cache
def byte_level(name: str) -> Tokenizer:
    """A tokenizer trained behind the cut of this name."""
    cut = CUTS[name]
    start = trained("bpe").library
    config = json.loads(start.to_str())
    config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(cut.steps)}
    config["normalizer"] = {"type": "NFC"} if cut.composed else None
    config["model"] |= {"vocab": {}, "merges": [], "ignore_merges": cut.whole}
    config["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(config))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[END, "<|bos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    library.train_from_iterator([shakespeare()[:40_000], MIXED * 4], trainer)
    return Tokenizer(library, {"eos": END, "bos": "<|bos|>"})


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """As a converter writes it, by hand."""
    config = json.loads(tokenizer.library.to_str())
    pieces = {id: piece for piece, id in tokenizer.library.get_vocab(with_added_tokens=True).items()}
    return {
        "general.architecture": "llama",
        KEY + "model": "gpt2",
        KEY + "pre": pre,
        KEY + "tokens": [pieces[id] for id in range(len(pieces))],
        KEY + "token_type": [3 if id in tokenizer.special.values() else 1 for id in range(len(pieces))],
        KEY + "merges": [f"{left} {right}" for left, right in config["model"]["merges"]],
        KEY + "bos_token_id": tokenizer.bos_id,
        KEY + "eos_token_id": tokenizer.eos_id,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


@pytest.mark.parametrize("name", DISTINCT)
def test_byte_level_metadata_gives_the_ids_of_what_was_converted(name: str) -> None:
    original = byte_level(name)
    tokenizer = tokenizer_from_gguf(metadata_of(original, name))
    for text in TEXTS:
        for allow in (True, False):
            assert tokenizer.encode(text, allow_special=allow) == original.encode(text, allow_special=allow)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (original.eos_id, original.bos_id)
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode("hi")
    before = [original.bos_id] if CUTS[name].bos else []
    assert tokenizer.encode("hi", add_special=True) == [*before, *original.encode("hi")]
    with_both = tokenizer_from_gguf(metadata_of(original, name) | {KEY + "add_bos_token": True, KEY + "add_eos_token": True})
    assert with_both.encode("hi", add_special=True) == [original.bos_id, *original.encode("hi"), original.eos_id]


@pytest.mark.parametrize("name", DISTINCT)
def test_byte_level_there_and_back(name: str) -> None:
    original = byte_level(name)
    written = gguf_metadata(original)
    assert CUTS[written[KEY + "pre"]].steps == CUTS[name].steps
    again = tokenizer_from_gguf(written)
    assert again.engine == original.engine
    assert [again.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert again.encode("hi", add_special=True) == original.encode("hi")
    assert gguf_metadata(again) == written


def test_names_that_mean_the_same_cut() -> None:
    assert len(DISTINCT) == 14
    for name, alike in (("default", "gpt-2"), ("smollm", "starcoder"), ("llama3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2"), ("llama4", "gpt-4o")):
        assert CUTS[name] == CUTS[alike]
    without = {key: value for key, value in good().items() if key != KEY + "pre"}
    assert tokenizer_from_gguf(without) == tokenizer_from_gguf(good())


def test_the_cuts_do_cut_differently() -> None:
    cut = {
        name: [word for word, _ in tokenizer_from_gguf(metadata_of(trained("bpe"), name)).library.pre_tokenizer.pre_tokenize_str("It'LL x12345y, ok?!\n\n")]
        for name in CUTS
    }
    assert cut["gpt-2"] == ["It", "'", "LL", "Ġx", "12345", "y", ",", "Ġok", "?!", "ĊĊ"]
    assert cut["llama-bpe"] == ["It", "'LL", "Ġx", "123", "45", "y", ",", "Ġok", "?!ĊĊ"]
    assert cut["qwen2"] == ["It", "'LL", "Ġx", "1", "2", "3", "4", "5", "y", ",", "Ġok", "?!ĊĊ"]
    assert cut["gpt-4o"] == ["It'LL", "Ġx", "123", "45", "y", ",", "Ġok", "?!ĊĊ"]
    assert cut["tekken"] == ["It", "'LL", "Ġx", "1", "2", "3", "4", "5", "y", ",", "Ġok", "?!ĊĊ"]
    assert cut["starcoder"] == ["It", "'", "LL", "Ġx", "1", "2", "3", "4", "5", "y", ",", "Ġok", "?!", "ĊĊ"]
    assert cut["falcon"] == ["It", "'", "LL", "Ġx", "123", "45", "y", ",", "Ġok", "?!", "ĊĊ"]
    assert cut["deepseek-llm"] == ["It", "'", "LL", "Ġx", "1", "2", "3", "4", "5", "y", ",", "Ġok", "?!", "Ċ", "Ċ"]
    assert cut["deepseek-v3"] == ["It", "'LL", "Ġx", "123", "45", "y", ",", "Ġok", "?!ĊĊ"]


def sentencepiece_file(**options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    lines = (shakespeare()[:30_000] + MIXED * 4).split("\n")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, vocab_size=500, hard_vocab_limit=False, minloglevel=2, **options)
    return made.getvalue()


SP_TEXTS = [text for text in TEXTS if "\u0085" not in text] + ["<s>", "<0x41>", "aaaaaa", "x  y"]


@pytest.mark.parametrize("symbols", [[], ["\n\n", "▁▁"]], ids=str)
def test_sentencepiece_by_scores(symbols: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_file(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=symbols
    )
    theirs, model = sentencepiece.SentencePieceProcessor(model_proto=data), parse(data)
    metadata = {
        KEY + "model": "llama",
        KEY + "tokens": [entry.piece.replace("▁", " ") if entry.type == 4 else entry.piece for entry in model.pieces],
        KEY + "scores": [entry.score for entry in model.pieces],
        KEY + "token_type": [entry.type for entry in model.pieces],
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
        KEY + "unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    for text in SP_TEXTS:
        assert tokenizer.encode(text, allow_special=False) == theirs.encode(text), text
    assert tokenizer.encode("hi", add_special=True) == [1, *theirs.encode("hi")]
    assert tokenizer_from_gguf(metadata | {KEY + "add_space_prefix": False}).encode("hi")[0] != theirs.encode("hi")[0]
    written = gguf_metadata(tokenizer)
    assert written[KEY + "model"] == "llama"
    assert written[KEY + "token_type"] == [entry.type for entry in model.pieces]
    again = tokenizer_from_gguf(written)
    assert [again.encode(text, allow_special=False) for text in SP_TEXTS] == [theirs.encode(text) for text in SP_TEXTS]
    assert again.encode("hi", add_special=True) == [1, *theirs.encode("hi")]


def test_sentencepiece_unigram() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_file(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    theirs, model = sentencepiece.SentencePieceProcessor(model_proto=data), parse(data)
    metadata = {
        KEY + "model": "t5",
        KEY + "tokens": [entry.piece for entry in model.pieces],
        KEY + "scores": [entry.score for entry in model.pieces],
        KEY + "token_type": [entry.type for entry in model.pieces],
        KEY + "eos_token_id": 1,
        KEY + "unknown_token_id": 2,
        KEY + "padding_token_id": 0,
        KEY + "remove_extra_whitespaces": True,
        KEY + "precompiled_charsmap": list(model.charsmap),
    }
    tokenizer = tokenizer_from_gguf(metadata)
    for text in SP_TEXTS:
        assert tokenizer.encode(text, allow_special=False) == theirs.encode(text), text
    assert tokenizer.encode("hi", add_special=True) == [*theirs.encode("hi"), 1]
    signed = metadata | {KEY + "precompiled_charsmap": [byte - 256 if byte > 127 else byte for byte in model.charsmap]}
    assert tokenizer_from_gguf(signed) == tokenizer
    written = gguf_metadata(Tokenizer(library_of(model, add_eos=True), model.roles))
    assert bytes(written[KEY + "precompiled_charsmap"]) == model.charsmap
    assert tokenizer_from_gguf(written).encode(MIXED, allow_special=False) == theirs.encode(MIXED)


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(lowercase: bool) -> None:
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator([shakespeare()[:30_000]], trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    pieces = {id: piece for piece, id in library.get_vocab().items()}
    tokens = [pieces[id] for id in range(len(pieces))]
    phantom = [t if t in special else t[2:] if t.startswith("##") else "▁" + t for t in tokens]
    metadata = {KEY + "model": "bert", KEY + "tokens": phantom, KEY + "token_type": [3 if t in special else 1 for t in tokens]} | {
        KEY + f"{name}_token_id": id for id, name in enumerate(("padding", "unknown", "cls", "seperator", "mask"))
    }
    tokenizer = tokenizer_from_gguf(metadata)
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("hi there", add_special=True) == [2, *tokenizer.encode("hi there"), 3]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id, tokenizer.role_id("cls"), tokenizer.role_id("sep")) == (0, 1, 4, 2, 3)
    written = gguf_metadata(tokenizer)
    assert written[KEY + "tokens"] == phantom
    assert tokenizer_from_gguf(written) == tokenizer


def good() -> dict[str, Any]:
    return metadata_of(trained("bpe"), "gpt-2") | {KEY + "bos_token_id": None}


def test_what_is_not_known_names_the_nearest() -> None:
    with pytest.raises(TokenizerError, match=r"cuts its texts by 'lama-bpe' .*known are .*Did you mean 'llama-bpe'.*tokenizer\.json instead"):
        tokenizer_from_gguf(good() | {KEY + "pre": "lama-bpe"})
    with pytest.raises(TokenizerError, match=r"of kind 'gpt3'; gpt2, llama, bert, t5 can be read. Did you mean 'gpt2'"):
        tokenizer_from_gguf(good() | {KEY + "model": "gpt3"})
    with pytest.raises(TokenizerError, match=r"has no tokenizer: the key tokenizer\.ggml\.model is missing"):
        tokenizer_from_gguf({})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": None}, "no vocabulary: tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": "abc"}, "tokens is of type str, and it should be a list"),
        ({"tokens": [1, 2]}, "tokens holds 1, which is no text"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "eos_token_id": None}, "the piece 'a' is twice"),
        ({"token_type": [1]}, r"has 7\d\d pieces in tokenizer.ggml.tokens and 1 entries in tokenizer.ggml.token_type"),
        ({"eos_token_id": 10_000_000}, "eos_token_id is 10000000, and the vocabulary has"),
        ({"eos_token_id": "two"}, "eos_token_id is of type str, and it should be int"),
        ({"add_bos_token": 1}, "add_bos_token is of type int, and it should be bool"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "'ab' in tokenizer.ggml.merges is not two pieces"),
        ({"merges": ["zzzz yyyy"]}, "the vocabulary and the merges of this GGUF file do not fit each other"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": "bert"}, r"its unknown piece '\[UNK\]' is missing"),
    ],
)
def test_damaged_metadata_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        tokenizer_from_gguf(good() | {KEY + name: value for name, value in change.items()})


def test_our_own_tokenizers_are_written_where_they_can_be() -> None:
    for kind in ("bpe", "bytes"):
        assert tokenizer_from_gguf(gguf_metadata(trained(kind))).encode(MIXED + END) == trained(kind).encode(MIXED + END)
    for kind in ("characters", "words"):
        with pytest.raises(TokenizerError, match=f"of kind '{kind}' cannot be written as GGUF"):
            gguf_metadata(trained(kind))
    strange = trained("bpe").library
    strange.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("q", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.raises(TokenizerError, match=r"names how a text is cut, .* none of .*qwen2.*tokenizer\.json"):
        gguf_metadata(Tokenizer(strange))
    stripping = trained("bpe").library
    stripping.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    with pytest.raises(TokenizerError, match=r"'<mask>' takes or needs the space around it \(lstrip\)"):
        gguf_metadata(Tokenizer(stripping))
    reversed_merges = library_of(parse(sentencepiece_file(model_type="bpe")))
    reversed_merges.normalizer = normalizers.Sequence([normalizers.Lowercase(), reversed_merges.normalizer])
    with pytest.raises(TokenizerError, match="cannot be written as GGUF: the text .* would get other ids"):
        gguf_metadata(Tokenizer(reversed_merges))


def test_a_gguf_file_has_what_was_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    original = byte_level("qwen2")
    path = write(gguf, tmp_path / "vocab.gguf", gguf_metadata(original))
    reader = gguf.GGUFReader(path)
    again = tokenizer_from_gguf({name: field.contents() for name, field in reader.fields.items()})
    assert [again.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]


def write(gguf: Any, path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 8)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "gpt-4o", "tekken", "starcoder", "deepseek-v3"])
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    original = byte_level(name)
    model = llama_cpp.Llama(
        str(write(gguf, tmp_path / "vocab.gguf", metadata_of(original, name) | {"general.architecture": "llama"})), vocab_only=True, verbose=False
    )
    for text in (MIXED, shakespeare()[:2_000], "a\r\n\r\nb", "1234567 12 1", "don't DON'T"):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == original.encode(text, allow_special=False)


@pytest.mark.parametrize("symbols", [[], ["\n\n", "<sep>"]], ids=str)
def test_llama_cpp_gives_the_same_ids_by_scores(symbols: list[str], tmp_path: Path) -> None:
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    data = sentencepiece_file(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        add_dummy_prefix=not symbols,  # llama.cpp puts a space behind such a piece too, SentencePiece only before the text; Gemma has none
    )
    tokenizer = Tokenizer(library_of(parse(data), add_bos=True), {"bos": "<s>", "eos": "</s>", "unk": "<unk>"})
    model = llama_cpp.Llama(str(write(gguf, tmp_path / "vocab.gguf", gguf_metadata(tokenizer))), vocab_only=True, verbose=False)
    for text in (MIXED, shakespeare()[:2_000], " two  spaces ", "日本語 é e\u0301", "aaaaaa"):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text, allow_special=False)
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text, add_special=True)


def test_llama_cpp_gives_the_same_ids_for_wordpiece(tmp_path: Path) -> None:
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator([shakespeare()[:30_000]], trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    tokenizer = Tokenizer(library)
    model = llama_cpp.Llama(str(write(gguf, tmp_path / "vocab.gguf", gguf_metadata(tokenizer))), vocab_only=True, verbose=False)
    for text in (shakespeare()[:2_000], "It's NAÏVE, ok?", "hello world"):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text, allow_special=False)
