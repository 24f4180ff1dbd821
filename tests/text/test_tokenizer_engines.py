"""The fast engines give the ids of ``tokenizers``, for every text, or stand back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from corpus_of_tokenizers import ANY_TEXT, END, MIXED, TRICKY_TEXT, shakespeare, trained
from glassformer.text import Tokenizer, engines, train
from glassformer.text.alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE, bytes_of, readable
from glassformer.text.patterns import LONGEST_RUN, PATTERNS, has_long_run, in_parts

FAST = [("bpe", "gpt2"), ("bpe", "cl100k"), ("bpe", "qwen2"), ("bpe", "o200k"), ("bytes", "gpt2"), ("characters", "gpt2")]


def reference(tokenizer: Tokenizer, text: str, allow_special: bool = True) -> list[int]:
    library = tokenizer.library
    library.encode_special_tokens = not allow_special
    return library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("kind", "pattern"), FAST)
@pytest.mark.parametrize("texts", [ANY_TEXT, TRICKY_TEXT], ids=["any", "tricky"])
def test_fast_and_slow_give_the_same_ids(kind: str, pattern: str, texts: st.SearchStrategy[str]) -> None:
    tokenizer = trained(kind, pattern)
    assert tokenizer.engine == ("tiktoken" if kind == "bpe" else "table")
    library, plain = tokenizer.library, tokenizer.library
    plain.encode_special_tokens = True

    @given(texts)
    @settings(max_examples=200, deadline=None)
    def law(text: str) -> None:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, allow_special=False) == plain.encode(text, add_special_tokens=False).ids

    law()


@pytest.mark.parametrize(("kind", "pattern"), FAST)
def test_fast_and_slow_give_the_same_ids_on_real_text(kind: str, pattern: str) -> None:
    tokenizer, text = trained(kind, pattern), shakespeare()[:300_000] + MIXED * 20 + END + MIXED
    assert tokenizer.encode(text) == tokenizer.encode_to_array(text).tolist() == reference(tokenizer, text)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])  # between them they ask for every class of characters that any pattern asks for
def test_both_regex_engines_cut_alike_around_every_code_point(pattern: str) -> None:
    """One that knows a newer Unicode would call a new letter a letter; a rank for every pair of bytes makes each border show in the ids."""
    pairs = [(a, b) for a in CHARACTER_OF_BYTE for b in CHARACTER_OF_BYTE]
    vocab = {piece: id for id, piece in enumerate([*CHARACTER_OF_BYTE, *(a + b for a, b in pairs)])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    library.pre_tokenizer = _cut_by(pattern)
    tokenizer = Tokenizer(library)
    assert tokenizer.engine == "tiktoken"
    points = [*range(0xD800), *range(0xE000, 0x32400), *range(0xE0000, 0xE0200), *range(0x32400, 0x110000, 4096)]  # the rest is unassigned or private
    probes = [f"a{c}1{c}\n {c}b'{c}'s{c}A  {c}" for c in map(chr, points)]
    for at in range(0, len(probes), 8192):
        texts = ["1b".join(probes[first : first + 16]) for first in range(at, min(at + 8192, len(probes)), 16)]
        for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), library.encode_batch_fast(texts), strict=True):
            assert ours == theirs.ids, f"U+{ord(text[1]):04X} or one of the 15 after it"


def _cut_by(pattern: str) -> Any:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern].json), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# ------------------------------------------------------------------------------------------------------------- merges are not ranks


@st.composite
def any_bpe(draw: st.DrawFn) -> tokenizers.Tokenizer:
    """Merges nobody would learn: in any order, several for one piece, pieces that nothing reaches, ids in any order."""
    pieces = ["a", "b", "c", "Ġ"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 14))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        if pair not in merges and len("".join(pair)) < 9:
            merges.append(pair)
            pieces.append("".join(pair))
    merges = draw(st.permutations(merges))
    extra = draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=3))
    vocab_pieces = list(dict.fromkeys([*CHARACTER_OF_BYTE, *pieces, *extra]))
    if draw(st.booleans()):
        vocab_pieces = draw(st.permutations(vocab_pieces))
    model = models.BPE(vocab={piece: id for id, piece in enumerate(vocab_pieces)}, merges=merges, ignore_merges=draw(st.booleans()))
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


@given(any_bpe(), st.lists(st.text("abc ", max_size=14), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_list_of_merges_gives_the_same_ids(library: tokenizers.Tokenizer, texts: list[str]) -> None:
    tokenizer = Tokenizer(library)
    for text in texts:
        assert tokenizer.encode(text) == library.encode(text).ids, tokenizer.engine
        assert tokenizer.encode_to_array(text).tolist() == library.encode(text).ids


def bpe(merges: list[tuple[str, str]], extra: tuple[str, ...] = (), **settings: Any) -> Tokenizer:
    pieces = list(dict.fromkeys([*CHARACTER_OF_BYTE, *("".join(pair) for pair in merges), *extra]))
    library = tokenizers.Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges, **settings))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(library)


def test_a_pair_that_is_no_merge_stays_apart_though_the_vocabulary_has_the_piece() -> None:
    tokenizer = bpe([("a", "b"), ("b", "c"), ("a", "bc")])
    assert tokenizer.engine == "tiktoken"
    assert [piece.text for piece in tokenizer.offsets("abc")] == ["ab", "c"]


def test_the_merge_that_fires_gives_the_rank_not_the_first_that_spells_the_piece() -> None:
    merges = [("a", "bc"), ("b", "c"), ("a", "b"), ("c", "a"), ("ab", "c")]  # bc comes before ab: a+bc makes abc, at place 0
    assert bpe(merges).engine == "tiktoken"
    assert bpe(merges).encode("abcaabc") == bpe(merges).library.encode("abcaabc").ids


def test_whole_words_that_no_merge_makes() -> None:
    apart = bpe([("a", "b")], extra=("abcc",), ignore_merges=True)
    assert apart.engine == "tiktoken"
    assert [p.text for p in apart.offsets("abcc abccc")] == ["abcc", " ", "ab", "c", "c", "c"]
    two = bpe([("a", "b"), ("c", "c")], extra=("abcc",), ignore_merges=True)
    assert two.engine == "tokenizers"
    assert "whole word only" in two.engine_reason
    assert [p.text for p in two.offsets("abcc abccc")] == ["abcc", " ", "ab", "cc", "c"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda j: j["model"].update(dropout=0.1), "random"),
        (lambda j: j.update(normalizer={"type": "Lowercase"}), "normaliser Lowercase"),
        (lambda j: j["pre_tokenizer"].update(add_prefix_space=True), "more than cut"),
        (
            lambda j: j.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, j["pre_tokenizer"]]}),
            "more than cut",
        ),
        (lambda j: j["added_tokens"][0].update(lstrip=True), "space around it"),
        (lambda j: j["model"]["vocab"].pop("!"), "of the 256 bytes"),
    ],
)
def test_what_ranks_cannot_say_is_left_to_the_library(change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    config = json.loads(train("bpe", texts=[shakespeare()[:20_000]], vocab_size=300, special=[END]).library.to_str())
    change(config)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(config)))
    assert tokenizer.engine == "tokenizers"
    assert reason in tokenizer.engine_reason
    text = f"Hear {END} me 12"
    if not config["model"]["dropout"]:
        assert tokenizer.encode(text) == reference(tokenizer, text)
        assert [piece.id for piece in tokenizer.offsets(text)] == reference(tokenizer, text)


def test_an_unknown_pattern_is_left_to_the_library() -> None:
    library = trained("bpe").library
    split = pre_tokenizers.Split(tokenizers.Regex(r"\w+|\W"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = Tokenizer(library)
    assert "none of the known" in tokenizer.engine_reason
    assert tokenizer.encode(MIXED) == library.encode(MIXED).ids


def test_a_difference_on_the_probe_hands_over_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.Ranked, "_one_list", lambda self, segment: [0])
    tokenizer = Tokenizer(trained("bpe").library)
    assert tokenizer.engine == "tokenizers"
    assert "differ on the text" in tokenizer.engine_reason
    assert tokenizer.encode("hear me") == tokenizer.library.encode("hear me").ids


def test_text_that_a_normaliser_composes() -> None:
    library = trained("bpe").library
    library.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(library)
    assert tokenizer.engine == "tiktoken"

    @given(TRICKY_TEXT)
    @settings(max_examples=100, deadline=None)
    def law(text: str) -> None:
        expected = library.encode(text).ids
        assert tokenizer.encode(text) == tokenizer.encode_to_array(text).tolist() == expected
        assert [piece.id for piece in tokenizer.offsets(text)] == expected

    law()
    assert {piece.start for piece in tokenizer.offsets("e\u0301")} == {0}


def test_added_tokens_of_both_passes() -> None:
    library = trained("bpe").library
    library.add_tokens(
        [tokenizers.AddedToken("  ", normalized=True), tokenizers.AddedToken("hear", normalized=False), tokenizers.AddedToken("hear me", normalized=True)]
    )
    tokenizer = Tokenizer(library)
    assert tokenizer.engine == "tiktoken"
    for text in ("we hear me   speak", f"   {END}hear", "    "):
        for allow in (True, False):
            assert tokenizer.encode(text, allow_special=allow) == reference(tokenizer, text, allow)


# ------------------------------------------------------------------------------------------------------------------ long and many


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "日", "\u00a0"])
@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])
def test_a_megabyte_of_the_same_takes_seconds(unit: str, pattern: str) -> None:
    tokenizer = trained("bpe", pattern)
    many = 1_000_000 // len(unit.encode())
    for text in (unit * many, "x" + unit * (many // 2) + "x"):
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        assert time.perf_counter() - start < 20
        assert tokenizer.decode(ids) == text
    short = "x" + unit * 3_000 + "x"
    assert tokenizer.encode(short) == reference(tokenizer, short)


def test_runs_of_white_space_are_seen_wherever_they_start() -> None:
    for before in range(0, LONGEST_RUN, 997):
        assert has_long_run("x" * before + " " * LONGEST_RUN + "x")
        assert not has_long_run("x" * before + " " * (LONGEST_RUN // 2 - 1) + "x")
    assert not has_long_run(shakespeare())
    assert not has_long_run("")


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
@given(text=TRICKY_TEXT | ANY_TEXT, size=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_parts_of_a_text_have_the_ids_of_the_whole(pattern: str, text: str, size: int) -> None:
    parts = list(in_parts(text, size))
    assert "".join(parts) == text
    cut = _cut_by(pattern)
    whole = [word for word, _ in cut.pre_tokenize_str(text)]
    assert [word for part in parts for word, _ in cut.pre_tokenize_str(part)] == whole


@pytest.mark.parametrize("pattern", ["gpt2", "o200k"])
def test_threads_do_not_change_the_ids(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = trained("bpe", pattern), (shakespeare()[:200_000] + END) * 3
    texts = [text, "", "short", *text[:50_000].split("\n"), text[:999]]
    monkeypatch.setattr(engines, "PART", 10_000)
    monkeypatch.setattr(engines, "n_threads", lambda: 4)
    many = tokenizer.encode_batch(texts)
    array = tokenizer.encode_to_array(text).tolist()
    monkeypatch.setattr(engines, "PART", 1 << 40)
    assert many == tokenizer.encode_batch(texts)
    assert array == tokenizer.encode(text) == many[0]
    assert many[0] == reference(tokenizer, text)


# ---------------------------------------------------------------------------------------------------------------- the byte alphabet


def test_the_byte_alphabet_is_the_one_of_the_library() -> None:
    assert sorted(CHARACTER_OF_BYTE) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [BYTE_OF_CHARACTER[c] for c in CHARACTER_OF_BYTE] == list(range(256))
    assert bytes_of("Ġthe") == b" the"
    assert bytes_of("日") is None


@given(st.binary(max_size=20))
def test_broken_characters_are_readable(raw: bytes) -> None:
    shown = readable(raw)
    if "⟨" not in shown:
        assert shown.encode() == raw


def test_broken_characters_are_shown_as_bytes() -> None:
    assert readable("n😀".encode()[:3]) == "n⟨F0 9F⟩"
    assert readable(b"\x80ok\xff") == "⟨80⟩ok⟨FF⟩"
    assert readable("日本".encode()[1:]) == "⟨97 A5⟩本"
