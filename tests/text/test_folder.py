"""Tokenizers of checkpoint folders in the formats before ``tokenizer.json``: the ids of the library that wrote them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from corpus_of_tokenizers import END, MIXED, shakespeare, trained
from glassformer.core.errors import TokenizerError
from glassformer.text import Tokenizer
from glassformer.text.folder import MOST_BYTES, tokenizer_of_folder
from glassformer.text.sentencepiece import parse

TEXTS = [MIXED, shakespeare()[:1_500], "", " ", " a", "a  b ", "é e\u0301 ﬁ", "日本語", "👩‍💻", "it's 123", "<s> </s> <pad>", "x\ny"]


def opened(folder: Path) -> Tokenizer:
    tokenizer = tokenizer_of_folder(folder)
    assert tokenizer is not None
    return tokenizer


def sentencepiece_file(lines: list[str] | None = None, size: int = 500, **options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    lines = lines or (shakespeare()[:30_000] + MIXED * 4).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=size, hard_vocab_limit=False, minloglevel=2, **options
    )
    return made.getvalue()


def put(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer_of_folder(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert tokenizer_of_folder(tmp_path) is None


def test_tokenizer_json_goes_first(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    assert opened(tmp_path) == trained("bpe")


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def test_a_llama_folder(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_file(**LLAMA)
    size = len(parse(data).pieces)
    (tmp_path / "tokenizer.model").write_bytes(data)
    put(
        tmp_path,
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}},
        special_tokens_map={"eos_token": "</s>", "pad_token": {"content": "<pad>"}},
        added_tokens={"<pad>": size, "<tool>": size + 1},
    )
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), opened(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, allow_special=False) == theirs.encode(text)
    assert ours.encode("hi", add_special=True) == [1, *theirs.encode("hi")]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, size, 0)
    assert ours.encode("<tool>") == [size + 1]
    assert ours.chat([{"role": "user", "content": "hi"}]) == [1, *theirs.encode("hi")]
    ours.save(tmp_path / "new")
    assert Tokenizer.load(tmp_path / "new").chat([{"role": "user", "content": "hi"}]) == [1, *theirs.encode("hi")]
    put(tmp_path, tokenizer_config={"add_bos_token": False, "add_eos_token": True, "eos_token": "</s>"})
    assert opened(tmp_path).encode("hi", add_special=True) == [*theirs.encode("hi"), 2]
    put(tmp_path, added_tokens={"<pad>": size + 5})
    with pytest.raises(TokenizerError, match=rf"the added token '<pad>' the id {size + 5}, and behind its vocabulary comes {size}: the files do not"):
        opened(tmp_path)
    put(tmp_path, added_tokens={"<pad>": "last"})
    with pytest.raises(TokenizerError, match=r"added_tokens\.json gives '<pad>' the id 'last', which is no number"):
        opened(tmp_path)


def test_a_t5_folder(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_file(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    size = len(parse(data).pieces)
    (tmp_path / "spiece.model").write_bytes(data)
    put(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer", "extra_ids": 10, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), opened(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, allow_special=False) == theirs.encode(text)
    assert ours.encode("hi", add_special=True) == [*theirs.encode("hi"), 1]
    assert ours.encode("<extra_id_0>") == [size + 9]
    assert ours.encode("<extra_id_9>") == [size]
    assert (ours.eos_id, ours.pad_id, ours.unk_id, len(ours)) == (1, 0, 2, size + 10)
    put(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer", "extra_ids": -3})
    with pytest.raises(TokenizerError, match="extra_ids=-3"):
        opened(tmp_path)


def test_an_xlm_roberta_folder(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_file()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(data)
    put(tmp_path, tokenizer_config={"tokenizer_class": "XLMRobertaTokenizer"})
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), opened(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, allow_special=False) == [3 if id == 0 else id + 1 for id in theirs.encode(text)]
    assert ours.encode("hi", add_special=True) == [0, *ours.encode("hi"), 2]
    assert (ours.pad_id, ours.mask_id, ours.role_id("cls"), len(ours)) == (1, theirs.get_piece_size() + 1, 0, theirs.get_piece_size() + 2)


def test_a_marian_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = sentencepiece_file(shakespeare()[:30_000].split("\n"), 300)
    target = sentencepiece_file((MIXED * 20).split("\n"), 200)
    pieces = list(dict.fromkeys(entry.piece for data in (source, target) for entry in parse(data).pieces if entry.type == 1))
    vocab = {piece: id for id, piece in enumerate(["</s>", "<unk>", ">>fra<<", *reversed(pieces), "<pad>"])}
    (tmp_path / "source.spm").write_bytes(source)
    (tmp_path / "target.spm").write_bytes(target)
    put(tmp_path, vocab=vocab, tokenizer_config={"source_lang": "en", "target_lang": "fr", "tokenizer_class": "MarianTokenizer"})
    theirs, ours = transformers.MarianTokenizer.from_pretrained(str(tmp_path)), opened(tmp_path)
    for text in ["Hello there, my lord.", shakespeare()[:500].replace("\n", " "), "naïve 日本", "Съешь же q", ">>fra<< Hello", "x"]:
        assert ours.encode(text, add_special=True) == theirs(text)["input_ids"], text
    assert (ours.eos_id, ours.unk_id, ours.pad_id) == (0, 1, len(vocab) - 1)
    put(tmp_path, vocab=vocab | {"zz": 9_999})
    with pytest.raises(TokenizerError, match="leaves out ids between 0 and 9999"):
        opened(tmp_path)


def gpt2_files(folder: Path, specials: list[str]) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [shakespeare()[:30_000], MIXED * 4], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    )
    library.model.save(str(folder))
    return library


def test_a_gpt2_folder(tmp_path: Path) -> None:
    library = gpt2_files(tmp_path, [END])
    ours = opened(tmp_path)
    for text in [*TEXTS, f"a {END} b"]:
        assert ours.encode(text) == library.encode(text).ids
    assert ours.special == {END: 0}
    assert (ours.eos_id, ours.engine) == (0, "tiktoken")
    assert ours.encode("a", add_special=True) == ours.encode("a")
    put(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    assert opened(tmp_path).encode("the car") == library.encode(" the car").ids


def test_a_roberta_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpt2_files(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    put(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    theirs, ours = transformers.RobertaTokenizer.from_pretrained(str(tmp_path)), opened(tmp_path)
    for text in TEXTS:
        assert ours.encode(text, add_special=True) == theirs(text)["input_ids"], text
    # The space before a mask belongs to it: so RoBERTa was trained, and so says its own tokenizer.json.
    assert ours.encode("a <mask> b") == [*ours.encode("a"), 4, *ours.encode(" b")]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id) == (0, 2, 1, 3, 4)


def test_a_qwen_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    library = gpt2_files(tmp_path, [])
    size = library.get_vocab_size()
    entries = {str(size + at): {"content": name, "special": True, "normalized": False} for at, name in enumerate([END, "<|im_start|>", "<|im_end|>"])}
    put(
        tmp_path,
        tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": entries, "eos_token": "<|im_end|>", "pad_token": END, "bos_token": None},
    )
    theirs, ours = transformers.Qwen2Tokenizer.from_pretrained(str(tmp_path)), opened(tmp_path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert (ours.eos_id, ours.pad_id) == (size + 2, size)


@pytest.mark.parametrize("lower", [True, False])
def test_a_bert_folder(lower: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(lowercase=lower), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    library.train_from_iterator([shakespeare()[:30_000]], trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    library.model.save(str(tmp_path))
    put(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
    theirs, ours = transformers.BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=lower), opened(tmp_path)
    for text in [*TEXTS, "a [MASK] b"]:
        assert ours.encode(text, add_special=True) == theirs(text)["input_ids"], text
    assert (ours.pad_id, ours.unk_id, ours.role_id("cls"), ours.role_id("sep"), ours.mask_id) == (0, 1, 2, 3, 4)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt has no '\[UNK\]', which a WordPiece needs"):
        opened(tmp_path)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    def refused(words: str, **files: bytes) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(TokenizerError, match=words):
            tokenizer_of_folder(tmp_path)

    merges = b"#version: 0.2\na b\n"
    refused(r"tokenizer\.model: this is no SentencePiece model", tokenizer__model=b"\x80\x04pickled")
    refused(r"list of ranks for tiktoken.*take the tokenizer\.json", tokenizer__model=b"IQ== 0\nIg== 1\n")
    refused(
        r"older files of a AlbertTokenizer, which does a part of its work in Python",
        spiece__model=b"x",
        tokenizer_config__json=b'{"tokenizer_class": "AlbertTokenizer"}',
    )
    refused(r"tokenizer_config\.json is not JSON", vocab__txt=b"[UNK]\n", tokenizer_config__json=b"{")
    refused(r"special_tokens_map\.json holds list where names", vocab__txt=b"[UNK]\n", special_tokens_map__json=b"[]")
    refused(r"vocab\.txt is not UTF-8", vocab__txt=b"\xff\xfe\n")
    refused(r"vocab\.json gives the piece 'a' the id 'b', which is no number", vocab__json=b'{"a": "b"}', merges__txt=merges)
    refused(r"vocab\.json has no pieces", vocab__json=b"{}", merges__txt=merges)
    refused(r"gives one id to two pieces", vocab__json=b'{"a": 1, "b": 1}', merges__txt=merges)
    refused(r"line 2 of .*merges\.txt is 'a b c' and not two pieces", vocab__json=b'{"a": 0, "b": 1}', merges__txt=b"#version: 0.2\na b c\n")
    refused(r"do not belong together: .*Copy both again", vocab__json=b'{"a": 0, "b": 1}', merges__txt=merges)
    refused(r"marks the ends of words", vocab__json=b'{"a": 0, "b</w>": 1}', merges__txt=b"")
    refused(r"added_tokens_decoder .* has the entry 'x'", vocab__txt=b"[UNK]\n", tokenizer_config__json=b'{"added_tokens_decoder": {"x": {}}}')
    refused(r"only tekken\.json, which needs Mistral's own library", tekken__json=b"{}")
    refused(r"is not JSON", tokenizer__json=b"{")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(TokenizerError, match="268,435,457 bytes, and a tokenizer's file at most"):
        tokenizer_of_folder(tmp_path)
