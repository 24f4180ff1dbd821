from __future__ import annotations

import gzip
import json
import lzma

import numpy as np
import pytest

from glassformer.core.errors import DataError
from glassformer.text import Tokenizer, train
from glassformer.train import TokenData, data as data_file, prepare
from glassformer.train.texts import list_files, read_texts

TEXT = "To be, or not to be:\nthat is the question.\n" * 40


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return train("characters", texts=[TEXT])


@pytest.fixture(scope="module")
def merges() -> Tokenizer:
    return train("bpe", texts=[TEXT], vocab_size=280, special=["<|endoftext|>"])


def whole(data: TokenData) -> list[int]:
    return data.read(np.zeros(1, np.int64), len(data))[0].tolist()


def test_a_file_becomes_shards_that_decode_to_the_file(tmp_path, letters):
    (tmp_path / "a.txt").write_text(TEXT)
    data = prepare(tmp_path / "a.txt", letters, tmp_path / "shards", shard_tokens=500)
    assert len(json.loads((tmp_path / "shards/index.json").read_text())["shards"]) == 1  # one piece of text is never parted
    assert letters.decode(whole(data)) == TEXT
    assert data.documents == 1
    assert data.text_bytes == len(TEXT.encode())
    assert data.tokenizer_hash == letters.hash


def test_windows_across_shards_equal_windows_of_one_array(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(data_file, "PIECE", 100)
    (tmp_path / "a.txt").write_text(TEXT)
    many = prepare(tmp_path / "a.txt", letters, tmp_path / "many", shard_tokens=150)
    assert len(list((tmp_path / "many").glob("tokens-*.bin"))) > 5
    one = np.asarray(letters.encode(TEXT))
    starts = np.random.default_rng(0).integers(len(one) - 400, size=50)
    assert np.array_equal(many.read(starts, 400), one[starts[:, None] + np.arange(400)])
    part = many.part(120, 901)
    assert whole(part) == one[120:901].tolist()


def test_long_documents_are_cut_where_the_tokenizer_cuts_too(merges, monkeypatch):
    at_once = merges.encode(TEXT)
    monkeypatch.setattr(data_file, "PIECE", 64)
    assert whole(TokenData.from_text(TEXT, merges)) == at_once


def test_text_without_line_ends_is_still_cut(letters, monkeypatch):
    monkeypatch.setattr(data_file, "PIECE", 7)
    assert whole(TokenData.from_text("to be or not to be", letters)) == letters.encode("to be or not to be")


def test_documents_end_with_the_tokenizers_end_of_sequence(merges):
    data = TokenData.from_text(["to be", "or not", "to be"], merges)
    end = merges.eos_id
    assert whole(data) == [*merges.encode("to be"), end, *merges.encode("or not"), end, *merges.encode("to be"), end]
    assert data.documents == 3
    ids = data.document_ids(np.zeros(1, np.int64), len(data))[0]
    assert np.array_equal(np.unique(ids), [1, 2, 3])
    assert [whole(data)[i] for i in np.flatnonzero(np.diff(ids))] == [end, end]


def test_an_end_of_sequence_spelt_in_the_text_ends_a_document(merges):
    assert TokenData.from_text("to be<|endoftext|>or not", merges).documents == 2
    assert TokenData.from_text(["to be<|endoftext|>", "or not"], merges).documents == 2


def test_ids_in_memory_find_their_documents_by_the_end_token(merges):
    end = merges.eos_id
    assert TokenData.from_ids([5, 6, end, 7, 8, end, 9], merges).documents == 3
    assert TokenData.from_ids([5, 6, 7, end], merges).documents == 1


def test_form_feeds_part_a_file_into_documents(tmp_path, merges):
    (tmp_path / "a.txt").write_text("to be\for not\f\fto be")
    assert prepare(tmp_path / "a.txt", merges, tmp_path / "one").documents == 3
    assert prepare(tmp_path / "a.txt", merges, tmp_path / "two", separator=None).documents == 1


def test_a_folder_gives_all_its_text_files_packed_or_not(tmp_path, letters):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("to be")
    (tmp_path / "in/deep/b.txt.xz").write_bytes(lzma.compress(b"or not"))
    (tmp_path / "in/c.jsonl").write_text('{"text": "to"}\n{"text": "be"}\n')
    (tmp_path / "in/picture.png").write_bytes(b"\x89PNG")
    assert [p.name for p in list_files(tmp_path / "in")] == ["a.txt", "c.jsonl", "b.txt.xz"]
    assert read_texts(tmp_path / "in") == ["to be", "to", "be", "or not"]


def test_shards_are_used_again_only_for_the_same_text_and_tokenizer(tmp_path, letters, merges):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "a.txt", letters, tmp_path / "shards")
    before = (tmp_path / "shards/tokens-00000.bin").stat().st_mtime_ns
    prepare(tmp_path / "a.txt", letters, tmp_path / "shards")
    assert (tmp_path / "shards/tokens-00000.bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="already holds shards of another text or tokenizer"):
        prepare(tmp_path / "a.txt", merges, tmp_path / "shards")
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(DataError, match="already holds shards of another text"):
        prepare(tmp_path / "a.txt", letters, tmp_path / "shards")


def test_an_empty_folder_may_be_there_already(tmp_path, letters):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "shards").mkdir()
    assert len(prepare(tmp_path / "a.txt", letters, tmp_path / "shards")) == len(TEXT)


def test_a_wrong_tokenizer_is_an_error_that_names_both(tmp_path, letters, merges):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "a.txt", letters, tmp_path / "shards")
    with pytest.raises(DataError, match=f"made with the tokenizer {letters.hash[:12]}…, but the one given is {merges.hash[:12]}"):
        TokenData.open(tmp_path / "shards", merges)
    assert TokenData.open(tmp_path / "shards").tokenizer == letters


def test_damaged_shards_are_named(tmp_path, letters):
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "a.txt", letters, tmp_path / "shards")
    shard, index = tmp_path / "shards/tokens-00000.bin", tmp_path / "shards/index.json"
    starts = tmp_path / "shards/documents.bin"
    kept = starts.read_bytes()
    starts.unlink()
    with pytest.raises(DataError, match=r"documents.bin should hold 8 bytes, but there is no file: prepare the text again"):
        TokenData.open(tmp_path / "shards")
    starts.write_bytes(kept)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens-00000.bin should hold \d+ bytes, but there is \d+ bytes"):
        TokenData.open(tmp_path / "shards")
    shard.unlink()
    with pytest.raises(DataError, match="there is no file: prepare the text again"):
        TokenData.open(tmp_path / "shards")
    index.write_text(index.read_text()[:50])
    with pytest.raises(DataError, match=r"index.json is damaged"):
        TokenData.open(tmp_path / "shards")
    index.write_text('{"format": 99}')
    with pytest.raises(DataError, match=r"another format \(99 where 1 is read\)"):
        TokenData.open(tmp_path / "shards")
    with pytest.raises(DataError, match="holds no token shards"):
        TokenData.open(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path, letters):
    with pytest.raises(DataError, match="There is no file or folder"):
        prepare(tmp_path / "none.txt", letters, tmp_path / "out")
    with pytest.raises(DataError, match="holds no text: files end in .txt"):
        prepare(tmp_path, letters, tmp_path / "out")
    with pytest.raises(DataError, match="No files were named"):
        prepare([], letters, tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text \\(byte 1 is 0xe9\\)"):
        prepare(tmp_path / "latin.txt", letters, tmp_path / "out")
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"or not" * 99)[:-20])
    with pytest.raises(DataError, match=r"cut.txt.xz cannot be read"):
        prepare(tmp_path / "cut.txt.xz", letters, tmp_path / "out")
    packed = gzip.compress(b"".join(f"{n}, or not? ".encode() for n in range(999)))
    (tmp_path / "torn.txt.gz").write_bytes(packed[:200] + bytes(b ^ 255 for b in packed[200:260]) + packed[260:])
    with pytest.raises(DataError, match=r"torn.txt.gz cannot be read"):
        prepare(tmp_path / "torn.txt.gz", letters, tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"text": "to"}\n{"words": 1}\n')
    with pytest.raises(DataError, match='bad.jsonl, line 2: a JSON object with a "text" is expected'):
        prepare(tmp_path / "bad.jsonl", letters, tmp_path / "out")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt is empty: give one with words in it"):
        prepare(tmp_path / "empty.txt", letters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))  # no drafts are left


def test_a_full_disk_leaves_nothing_behind(tmp_path, letters, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_file, "_write_shards", full)
    with pytest.raises(DataError, match="could not be written to .*out: the disk is full. Free some space"):
        prepare(tmp_path / "a.txt", letters, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_split_keeps_every_token_once(letters):
    data = TokenData.from_text(TEXT, letters)
    train_part, validation = data.split(0.1)
    assert whole(train_part) + whole(validation) == whole(data)
    assert len(validation) == round(len(data) * 0.1)
    with pytest.raises(DataError, match="lies between 0 and 1; 1.5 was given"):
        data.split(1.5)
    with pytest.raises(DataError, match="2 tokens cannot be split"):
        TokenData.from_ids([1, 2]).split(0.01)


def test_ids_that_are_no_ids(letters):
    with pytest.raises(DataError, match="one row of whole numbers; an array of shape \\(1, 2\\)"):
        TokenData.from_ids(np.array([[1, 2]]))
    with pytest.raises(DataError, match="Token id 99 is outside the vocabulary of"):
        TokenData.from_ids([1, 99], letters)
    with pytest.raises(DataError, match="The text is empty"):
        TokenData.from_text("", letters)


def test_bytes_per_token(letters, merges):
    assert TokenData.from_text(TEXT, letters).bytes_per_token() == 1.0
    merged = TokenData.from_text(TEXT, merges)
    assert merged.bytes_per_token() == len(TEXT.encode()) / len(merges.encode(TEXT))
    assert merged.part(0, 100).bytes_per_token() == len(merges.decode(whole(merged)[:100]).encode()) / 100
    assert TokenData.from_ids([1, 2, 3]).bytes_per_token() is None


def test_the_number_type_follows_the_vocabulary():
    assert data_file._dtype(2**16) is np.uint16
    assert data_file._dtype(2**16 + 1) is np.uint32


def test_the_fingerprint_tells_data_apart(letters):
    one, same, other = (TokenData.from_text(t, letters) for t in (TEXT, TEXT, TEXT.replace("question", "noitseuq")))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert "tokens" in repr(one)
