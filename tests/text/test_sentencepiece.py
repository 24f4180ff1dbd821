"""SentencePiece models read without the library that made them: its ids on awkward texts, whatever it was told when it trained."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings

from corpus_of_tokenizers import ANY_TEXT, MIXED, shakespeare
from glassformer.core.errors import TokenizerError
from glassformer.text import Tokenizer
from glassformer.text.sentencepiece import (
    BPE,
    CONTROL,
    MOST_BYTES,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD,
    Charsmap,
    Entry,
    Model,
    library_of,
    parse,
    read_model,
)

sentencepiece = pytest.importorskip("sentencepiece")

AWKWARD = [
    *["", " ", "  ", "a", " a", "a ", "  a  b  ", "\n", "\r\n", "a\r\nb", "\t x", "Hello world", "the the  the", "a" * 40, "abababababab", MIXED],
    *[
        "é e\u0301",
        "e\u0302\u0301",
        "ﬁ Ａ ½ ²",
        "日本語 中文。한국어",
        "\u1112\u1161\u11ab",
        "👩‍💻🇩🇪",
        "\u00a0x\u3000y\u2028",
        "\x00",
        "ſ İ",
        "～ー",
        "K Ⅷ",
        "ﷺ",
    ],
    *["<s>", "a <s> b</s>", "<unk>", "<0x41>", "x<0x0A>y", "▁", "▁▁a", "a▁", "foo<sep>bar", "<sep>", "  <sep>  <sep><sep>", "<ctl>", "\ufeffx", "a\u200bb"],
    *["it's THE car's 3rd 12345", "don't you'LL see?", "ththethe th", shakespeare()[:3_000], shakespeare()[100:160] * 20],
]
AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "like Llama": {"byte_fallback": True, **AS_IT_IS},
    "like Gemma": {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "\n", "▁▁"], **AS_IT_IS},
    "like T5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "own symbols": {"user_defined_symbols": ["<sep>", "th", "▁▁"], "control_symbols": ["<ctl>"], **AS_IT_IS},
    "small letters": {"user_defined_symbols": ["<sep>"], "normalization_rule_name": "nmt_nfkc_cf"},
    "over spaces": {"split_by_whitespace": False},
}


@cache
def trained_file(kind: str, option: str) -> bytes:
    made = io.BytesIO()
    lines = (shakespeare()[:40_000] + MIXED * 5).split("\n")
    settings = {"vocab_size": 600 if kind != "char" else 400, "hard_vocab_limit": False, "minloglevel": 2, **OPTIONS[option]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, model_type=kind, **settings)
    return made.getvalue()


@cache
def both(kind: str, option: str) -> tuple[Any, Tokenizer]:
    data = trained_file(kind, option)
    return sentencepiece.SentencePieceProcessor(model_proto=data), Tokenizer(library_of(parse(data)))


CASES = [(kind, option) for kind in ("unigram", "bpe") for option in OPTIONS] + [("char", "plain"), ("char", "small letters")]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_the_ids_and_texts_are_those_of_sentencepiece(kind: str, option: str) -> None:
    theirs, ours = both(kind, option)
    assert ours.vocab_size == theirs.get_piece_size()
    assert [ours.piece(id) for id in range(ours.vocab_size)] == [theirs.id_to_piece(id) for id in range(ours.vocab_size)]
    for text in AWKWARD:
        ids = theirs.encode(text)
        assert ours.encode(text, allow_special=False) == ids, text
        if "\n" not in text and theirs.unk_id() not in ids and option not in ("like Gemma", "own symbols"):
            assert ours.decode(ids) == theirs.decode(ids)


# Marks out of their usual order are put in order where a map of characters composes letters; see the module's text.
@pytest.mark.parametrize("case", [("unigram", "like Llama"), ("bpe", "like Llama"), ("bpe", "like Gemma")], ids=str)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example(text="x\u0301\u0323y")
def test_any_text_has_the_ids_of_sentencepiece(case: tuple[str, str], text: str) -> None:
    theirs, ours = both(*case)
    assert ours.encode(text, allow_special=False) == theirs.encode(text)


def test_the_map_of_characters_is_read_as_the_library_reads_it() -> None:
    theirs, _ = both("bpe", "plain")
    table = Charsmap(parse(trained_file("bpe", "plain")).charsmap)
    for text in AWKWARD:
        mapped = theirs.normalize(text) if hasattr(theirs, "normalize") else None
        assert mapped is None or " ".join(table.normalize(text).split(" ")).split() == mapped.replace("▁", " ").split()
    assert table.normalize("ﬁ Ａ ½ e\u0302\u0301\t") == "fi A 1\u20442 \u1ebf "


def test_control_pieces_are_special_and_nothing_else_is() -> None:
    _, ours = both("unigram", "own symbols")
    assert ours.special == {"<unk>": 0, "<s>": 1, "</s>": 2, "<ctl>": 3}
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert ours.encode("<s>hi</s>")[0] == 1
    assert ours.encode("<s>hi</s>")[-1] == 2
    assert not {1, 2, 3} & set(ours.encode("<s>hi<ctl></s>", allow_special=False))
    model = parse(trained_file("bpe", "like Llama"))
    around = Tokenizer(library_of(model, add_bos=True, add_eos=True), model.roles)
    assert around.encode("hi", add_special=True) == [1, *around.encode("hi"), 2]
    assert model.roles == {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}


def test_a_file_is_opened_and_lasts(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(trained_file("bpe", "like Llama"))
    tokenizer = Tokenizer(library_of(read_model(tmp_path / "spiece.model")))
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again == tokenizer
    assert again.encode(MIXED) == both("bpe", "like Llama")[0].encode(MIXED)
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        read_model(tmp_path / "nowhere.model")
    with (tmp_path / "huge.model").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(TokenizerError, match="268,435,457 bytes, and a SentencePiece model at most"):
        read_model(tmp_path / "huge.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(TokenizerError, match=r"text\.model: this is no SentencePiece model"):
        read_model(tmp_path / "text.model")


def test_damaged_files_are_refused_and_never_read_past_their_end() -> None:
    data = trained_file("bpe", "plain")
    for cut in (*range(0, 400, 7), len(data) // 2, len(data) - 1):
        with suppress(TokenizerError):  # where the cut falls between two fields, it is a shorter model
            assert len(parse(data[:cut]).pieces) > 0
    with pytest.raises(TokenizerError, match="claims 99 bytes and 3 are left"):
        parse(b"\x0a\x63abc")
    with pytest.raises(TokenizerError, match="a number at byte 10 has no end"):
        parse(b"\xff" * 20)
    with pytest.raises(TokenizerError, match="unknown wire type 3"):
        parse(b"\x0b")
    with pytest.raises(TokenizerError, match="has no pieces"):
        parse(b"")
    with pytest.raises(TokenizerError, match="has the type 9"):
        parse(b"\x0a\x05\x0a\x01a\x18\x09")
    for raw in (b"", b"\x08", struct.pack("<I", 400) + b"abc", struct.pack("<I", 4) + struct.pack("<I", 0xFFFFFFFF) + b"x"):
        model = Model((Entry("<unk>", 0.0, UNKNOWN), Entry("a", -1.0)), charsmap=raw)
        if raw:
            with pytest.raises(TokenizerError, match="the map of characters in this SentencePiece model is damaged"):
                library_of(model)


def test_what_cannot_be_followed_is_refused() -> None:
    unk = Entry("<unk>", 0.0, UNKNOWN)
    for model, words in (
        (Model((unk,), type=WORD), "of type 3 \\(words\\), and only Unigram"),
        (Model((unk,), type=BPE, space_behind=True), "treat_whitespace_as_suffix"),
        (Model((unk, Entry("a"), Entry("a"))), "the piece 'a' is twice in the vocabulary"),
        (Model((Entry("a"),), type=UNIGRAM), "no piece for what it does not know"),
        (Model((unk, Entry("a", -1.0, UNUSED))), "the piece 'a' is in the vocabulary but marked as unused"),
    ):
        with pytest.raises(TokenizerError, match=words):
            library_of(model)
    assert Model((unk, Entry("<x>", 0.0, CONTROL)), named={"eos": "<y>"}).roles == {}


def test_pieces_of_enormous_length_are_refused_at_once() -> None:
    """Every cut of a learnt piece is tried; runs of spaces and dashes as published ones have, and those a user gave, pass."""
    unk, ok = Entry("<unk>", 0.0, UNKNOWN), [Entry(" " * 128, -1.0), Entry("-" * 512, -2.0), Entry("u" * 2_000, 0.0, USER_DEFINED)]
    for type in (BPE, UNIGRAM):
        assert library_of(Model((unk, *ok), type=type)).get_vocab_size() == 4
        with pytest.raises(TokenizerError, match=r"the piece 'aaaaaaaaaaaaaaaaaaaa'… has 160,000 characters, and a learnt piece at most 512"):
            library_of(Model((unk, Entry("a" * 160_000, -1.0)), type=type))
