"""Training a tokenizer from files and strings."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from corpus_of_tokenizers import END, MIXED, shakespeare, trained
from glassformer.core.errors import TokenizerError
from glassformer.text import KINDS, train, training


def test_bpe_learns_the_most_frequent_pair_first_and_counts_special_tokens() -> None:
    tokenizer = train("bpe", texts=["aab aab aab zz"], vocab_size=260, special=[END], min_frequency=1)
    assert tokenizer.vocab_size == 260
    assert [tokenizer.piece(id) for id in (256, 257, 258, 259)] == ["aa", "aab", " aab", END]


def test_the_same_corpus_gives_the_same_tokenizer() -> None:
    for kind in ("bpe", "bytes", "characters", "words"):
        first, second = (train(kind, texts=[shakespeare()[:30_000]], special=[END]) for _ in range(2))
        assert first.hash == second.hash


def test_files_and_strings_packed_and_plain_give_the_same_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shakespeare()[:50_000] + MIXED
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    expected = train("bpe", texts=[text], vocab_size=400).hash
    for name in ("a.txt", "a.txt.gz", "a.txt.xz"):
        assert train("bpe", [tmp_path / name], vocab_size=400).hash == expected
    assert train("bpe", str(tmp_path / "a.txt"), vocab_size=400).hash == expected
    monkeypatch.setattr(training, "CHUNK", 101)  # characters and words lie across the borders of what is read at a time
    assert train("bpe", tmp_path / "a.txt", vocab_size=400).hash == expected


def test_line_ends_are_learnt_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n" * 20)
    tokenizer = train("bpe", tmp_path / "dos.txt", vocab_size=270, pattern="cl100k")
    assert "\r\n\r\n" in [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "words", "characters"])
def test_special_tokens_in_the_corpus_are_not_learnt(kind: str) -> None:
    text = "zebra" + f"{END}zebra" * 30
    tokenizer = train(kind, texts=[text], vocab_size=300 if kind == "bpe" else 12 if kind == "unigram" else None, special=END)
    others = "".join(tokenizer.piece(id) for id in range(tokenizer.vocab_size) if id not in tokenizer.special.values() and len(tokenizer.piece(id)) > 1)
    assert "endof" not in others
    assert "ot" not in others.replace("⟨", "")
    assert list(tokenizer.special)[-1] == END
    assert tokenizer.encode(END) == [tokenizer.eos_id]


def test_characters_are_in_order_and_the_rare_ones_give_way() -> None:
    tokenizer = train("characters", texts=["ccc aa b"])
    assert [tokenizer.piece(id) for id in range(4)] == [" ", "a", "b", "c"]
    small = train("characters", texts=["ccc aa b"], special=["<unk>"], vocab_size=3)
    assert [small.piece(id) for id in range(3)] == [" ", "c", "<unk>"]
    assert small.encode("cab") == [1, 2, 2]


def test_bytes_are_their_own_ids() -> None:
    tokenizer = train("bytes", special=[END])
    assert tokenizer.encode("Aé") == [0x41, 0xC3, 0xA9]
    assert tokenizer.special == {END: 256}
    assert tokenizer.vocab_size == 257


def test_words_and_wordpiece_and_unigram_cut_as_their_names_say() -> None:
    words = train("words", texts=["the car, the bus"])
    assert [p.text for p in words.offsets("the bus, the car")] == ["the", "bus", ",", "the", "car"]
    parts = train("wordpiece", texts=["play playing played plays " * 20 + "sing singing"], vocab_size=40)
    assert parts.offsets("playing")[0].text.startswith("play")
    assert "".join(p.text.removeprefix("##") for p in parts.offsets("singing")) == "singing"
    lowered = train("wordpiece", texts=["Play it"], vocab_size=40, lowercase=True)
    assert lowered.encode("PLAY") == lowered.encode("play")
    likely = trained("unigram")
    assert len(likely.encode("the king")) < len("the king")
    assert likely.decode(likely.encode("the king\n  is the first")) == "the king\n  is the first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "bpee", "texts": ["a"]}, "no tokenizer of kind 'bpee'.*Did you mean 'bpe'"),
        ({"kind": "bpe"}, "from files or from texts: give one"),
        ({"kind": "bpe", "texts": ["a"], "files": ["a"]}, "from files or from texts: give one"),
        ({"kind": "bpe", "texts": ["a"], "vocab_size": 200}, "vocab_size=200 is less than 256 and 0 special tokens.*Take 256"),
        ({"kind": "bpe", "texts": ["a"], "pattern": "gpt4"}, "no pattern 'gpt4'.*gpt2"),
        ({"kind": "bpe", "texts": ["a"], "special": [""]}, "empty spelling"),
        ({"kind": "bpe", "texts": ["a"], "roles": {"eos": "</s>"}}, "the eos token '</s>' is not among the special tokens.*add it"),
        ({"kind": "bytes", "special": ["x"], "roles": {"end": "x"}}, "no role 'end'.*eos"),
        ({"kind": "bytes", "vocab_size": 300}, "256 tokens and 0 special ones, not 300"),
        ({"kind": "characters", "texts": ["abc"], "vocab_size": 2}, "3 characters and 0 special tokens, more than vocab_size=2.*<unk>"),
        ({"kind": "words", "texts": ["abc"], "vocab_size": 1, "special": ["<s>"]}, "vocab_size=1 is less than 1 and 1 special"),
        ({"kind": "unigram", "texts": ["abc abd"], "vocab_size": 3}, "could not learn from this text.*another vocab_size"),
        ({"kind": "bpe", "files": ["not/there.txt"]}, r"no file not.there\.txt"),
    ],
)
def test_mistakes_are_named_with_their_remedy(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        train(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes"])
def test_an_empty_corpus_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for corpus in ({"texts": []}, {"texts": ["", ""]}, {"files": tmp_path / "empty.txt"}):
        with pytest.raises(TokenizerError, match=r"no text to train on|could not learn"):
            train(kind, **corpus)  # type: ignore[arg-type]


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(TokenizerError, match=r"latin\.txt is not UTF-8: byte FC"):
        train("bpe", tmp_path / "latin.txt", vocab_size=256)
    (tmp_path / "half.txt.xz").write_bytes(lzma.compress(b"some text" * 99)[:-20])
    with pytest.raises(TokenizerError, match=r"half\.txt\.xz cannot be read"):
        train("words", tmp_path / "half.txt.xz")
    (tmp_path / "cut.txt").write_bytes("日本".encode()[:-1])
    with pytest.raises(TokenizerError, match="is not UTF-8"):
        train("words", tmp_path / "cut.txt")
