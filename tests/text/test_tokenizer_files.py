"""Saving and loading, and files that others made or will open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from corpus_of_tokenizers import END, MIXED, shakespeare, trained
from glassformer.core.errors import TokenizerError
from glassformer.text import KINDS, Tokenizer, train


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    assert tokenizer.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "tokenizer.json"
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json", str(tmp_path / "new" / "folder")):
        again = Tokenizer.load(path)
        assert again == tokenizer
        assert again.hash == tokenizer.hash
        assert again.engine == tokenizer.engine
        assert again.encode(MIXED) == tokenizer.encode(MIXED)
    assert tokenizer.save(tmp_path / "alone.json") == tmp_path / "alone.json"
    assert Tokenizer.load(tmp_path / "alone.json") == tokenizer
    assert sorted(os.listdir(tmp_path)) == ["alone.json", "new"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_our_file_and_we_open_theirs(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.save(tmp_path / "ours")))
    text = shakespeare()[:2_000] + END + shakespeare()[:50]
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    if kind in ("bpe", "bytes", "characters"):
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    theirs.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.load(tmp_path / "theirs")
    assert back.encode(text) == tokenizer.encode(text)
    assert back.engine == tokenizer.engine
    opened = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    assert opened.eos_token == END
    assert opened(text)["input_ids"] == tokenizer.encode(text)


def test_a_file_that_the_tokenizers_library_wrote_loads(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.BPEDecoder()
    library.train_from_iterator([shakespeare()[:20_000]], trainers.BpeTrainer(vocab_size=200, special_tokens=["[UNK]", "[PAD]"], show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.kind, tokenizer.engine, tokenizer.unk_id, tokenizer.pad_id) == ("bpe (characters)", "tokenizers", 0, 1)
    text = "First Citizen: hear € me"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert [(p.text, p.start) for p in tokenizer.offsets(text)] == [
        (token, start) for token, (start, _) in zip(library.encode(text).tokens, library.encode(text).offsets, strict=True)
    ]


def test_an_older_file_with_merges_as_strings_loads(tmp_path: Path) -> None:
    config = json.loads(trained("bpe").library.to_str())
    config["model"]["merges"] = [" ".join(pair) for pair in config["model"]["merges"]]
    for newer in ("ignore_merges", "byte_fallback", "fuse_unk"):
        del config["model"][newer]
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.hash == trained("bpe").hash
    assert tokenizer.engine == "tiktoken"


def test_roles_survive_and_other_settings_stay(tmp_path: Path) -> None:
    tokenizer = train("bytes", special=["###", "</s>", "<p>"], roles={"eos": "###", "pad": "<p>"})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "…", "eos_token": "old", "model_max_length": 9}))
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "…", "model_max_length": 9, "eos_token": "###", "pad_token": "<p>"}
    again = Tokenizer.load(tmp_path)
    assert (again.eos_id, again.pad_id) == (256, 258)
    assert again == tokenizer
    single = tokenizer.save(tmp_path / "other" / "name.json")
    assert Tokenizer.load(single).eos_id == 256


def test_roles_of_a_hugging_face_folder_count(tmp_path: Path) -> None:
    train("bytes", special=["<a>", "<b>", "</s>"]).save(tmp_path)
    entries = {"eos_token": {"content": "<b>", "lstrip": False}, "bos_token": "<a>", "pad_token": None, "unk_token": "not there"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) == (257, 256, None, None)
    (tmp_path / "tokenizer_config.json").write_text("{ damaged")
    assert Tokenizer.load(tmp_path).eos_id == 258


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained("bpe").save(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        trained("words").save(tmp_path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def test_what_cannot_be_loaded_says_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*nowhere.*check the path.*tokenizer train"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json was not found; check the path"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"it has vocab\.json, an older format: .*save_pretrained"):
        Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not JSON .*copy it again"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(TokenizerError, match="is not JSON but a binary file"):
        Tokenizer.load(tmp_path)
    for nothing in ("[1, 2]", '{"a": 1}', '{"model": "gpt2"}', "3"):
        file.write_text(nothing)
        with pytest.raises(TokenizerError, match=r"is JSON but no tokenizer: it has no 'model'"):
            Tokenizer.load(tmp_path)
    file.write_text('{"version": "1.0", "model": {"type": "Telepathy"}}')
    with pytest.raises(TokenizerError, match="the tokenizers library .* cannot read"):
        Tokenizer.load(tmp_path)


def test_a_folder_in_place_of_the_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"cannot be read: Is a directory|no tokenizer at|cannot be read"):
        Tokenizer.load(tmp_path)
