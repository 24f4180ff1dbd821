"""Our own format: what is written is read back to the bit, and a damaged folder says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from glassformer.core.errors import WeightsError
from glassformer.text import train
from glassformer.weights import own
from tools import ALL, built, fresh, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return own.save(built("llama"), tmp_path / "model", extra={"steps": 7})


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_the_folder_holds_two_files_and_each_parameter_once(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]
    about = json.loads((folder / "model.json").read_text())
    assert about["format"] == own.FORMAT and about["spec"]["type"] == "Decoder" and about["extra"] == {"steps": 7}
    assert load_file(folder / "model.safetensors").keys() == dict(built("llama").named_parameters()).keys()
    assert oct((folder / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    for name, shared in (("gpt2", "embed.weight"), ("t5", "encoder.embed.weight")):
        own.save(built(name), tmp_path / name)
        assert [n for n in load_file(tmp_path / name / "model.safetensors") if "embed.weight" in n or "matrix" in n] == [shared]
        model = own.load(tmp_path / name).model
        assert model.params().total == built(name).params().total
    assert model.decoder.embed.weight is model.encoder.embed.weight is model.decoder.readout.weight


def test_loading_in_another_type_and_training_on(folder):
    model = own.load(folder, dtype="bf16").model
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16} and not model.training
    assert all(x.requires_grad and x.device.type == "cpu" for x in model.parameters())
    model.train()(tokens()).float().sum().backward()
    kept = own.save(fresh("llama", torch.bfloat16), folder.parent / "half")
    assert {x.dtype for x in own.load(kept).model.parameters()} == {torch.bfloat16}


def test_saving_again_replaces_the_old_model(folder):
    own.save(fresh("gpt2"), folder)
    assert own.load(folder).model.spec == ALL["gpt2"] and own.load(folder).extra == {}


def test_nothing_is_pickled(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_a_run_in_progress_is_opened_at_its_newest_checkpoint(tmp_path):
    for step, name in (("000010", "gpt2"), ("000020", "llama")):
        own.save(built(name), tmp_path / "checkpoints" / f"step-{step}")
    (tmp_path / "checkpoints" / "step-000030").mkdir()
    assert own.load(tmp_path).model.spec == ALL["llama"]


# What is wrong


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"There is no folder .*nowhere: give the folder that 'glassformer train' wrote\."):
        own.load(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"holds no glassformer model: model\.json is missing\. Give the folder that 'glassformer train' wrote\."):
        own.load(tmp_path)


def test_missing_parameters(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing: the folder holds a description but no parameters\."):
        own.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or cut short \(.*\): copy it again, or go back to an earlier checkpoint\."):
        own.load(folder)


def test_a_damaged_header(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:40] = os.urandom(20)
    file.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match=r"is damaged or cut short|does not fit its model\.json"):
        own.load(folder)


def test_a_tensor_without_a_parameter_and_a_parameter_without_a_tensor(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.attn.qvk.weight"] = tensors.pop("blocks.0.attn.qkv.weight")
    save_file(tensors, file)
    with pytest.raises(
        WeightsError,
        match=r"does not fit its model\.json \(1 missing, 1 left over\): the parameter 'blocks\.0\.attn\.qkv\.weight' has no tensor\. "
        r"Did you mean 'blocks\.0\.attn\.qvk\.weight'\?",
    ):
        own.load(folder)
    tensors["blocks.0.attn.qkv.weight"] = tensors["blocks.0.attn.qvk.weight"].clone()
    save_file(tensors, file)
    with pytest.raises(
        WeightsError,
        match=r"\(0 missing, 1 left over\): the tensor 'blocks\.0\.attn\.qvk\.weight' has no parameter\. Did you mean 'blocks\.0\.attn\.qkv\.weight'",
    ):
        own.load(folder)


def test_a_tensor_of_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["embed.weight"] = tensors["embed.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'embed\.weight' has shape \(30, 24\), but the model needs \(31, 24\): the two files belong to different models\."):
        own.load(folder)


@pytest.mark.parametrize("text", ["", "{", "\ufffd\x00", "[1"])
def test_a_description_that_is_no_json(folder, text):
    (folder / "model.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.json cannot be read as JSON \(.*\): copy it again from where it came\."):
        own.load(folder)
    (folder / "model.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(WeightsError, match=r"cannot be read as JSON"):
        own.load(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": 1}'])
def test_a_description_of_no_model(folder, text):
    (folder / "model.json").write_text(text)
    with pytest.raises(WeightsError, match=r"is JSON, but describes no model \('spec' is missing\): is it the right file\?"):
        own.load(folder)


@pytest.mark.parametrize("spec", [3, None, [], "Decoder", "Nothing", {"type": "Decodr"}, {"type": "Decoder"}, {"type": "RMSNorm"}, {"type": "Decoder", "d": 3}])
def test_a_description_of_a_model_that_cannot_be_built(folder, spec):
    change(folder / "model.json", spec=spec)
    with pytest.raises(WeightsError, match=r"model\.json describes no model that this version can build: "):
        own.load(folder)


def test_a_newer_format(folder):
    change(folder / "model.json", format=own.FORMAT + 1)
    with pytest.raises(WeightsError, match=rf"model\.json has format {own.FORMAT + 1}, but this version reads up to {own.FORMAT}: update glassformer\."):
        own.load(folder)
    change(folder / "model.json", format="two")
    with pytest.raises(WeightsError, match=r"has format 'two', but this version reads up to"):
        own.load(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        WeightsError,
        match=r"The model could not be written to .*: File exists\. Move what is in the way, .*; what was there before is untouched",
    ):
        own.save(built("llama"), tmp_path / "file")


def test_a_write_that_fails_leaves_the_old_model(folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own, "save_file", full)
    with pytest.raises(WeightsError, match=r"could not be written to .*: the disk is full\. Free some space; what was there before is untouched"):
        own.save(fresh("gpt2"), folder)
    assert own.load(folder).model.spec == ALL["llama"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"], "no temporary file is left"


def test_a_model_without_a_tokenizer_removes_an_old_one(folder):
    for name in own.TOKENIZER:
        (folder / name).write_text("{}")
    own.save(built("llama"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]


class _FullDisk:
    def save(self, path: Path) -> None:
        path.write_text("{")
        raise OSError(28, "No space left on device")


def test_a_tokenizer_that_cannot_be_written_leaves_the_old_folder(folder):
    (folder / "tokenizer.json").write_text("old")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(WeightsError, match=r"the disk is full"):
        own.save(fresh("gpt2"), folder, tokenizer=_FullDisk())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_full_disk_under_the_parameters(folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(own, "save_file", full)
    with pytest.raises(WeightsError, match=r"could not be written to .*the disk is full"):
        own.save(fresh("gpt2"), folder)
    assert own.load(folder).model.spec == ALL["llama"]


def test_a_tokenizer_of_another_model_is_not_taken_for_its_own(tmp_path):
    mine, other = (train("characters", texts=[text]) for text in ("abcdefg", "hijk"))
    own.save(fresh("gpt2"), tmp_path, tokenizer=mine)
    assert own.load(tmp_path).tokenizer == mine
    other.save(tmp_path)
    with pytest.raises(WeightsError, match=r"tokenizer\.json is not the tokenizer that the model was saved with \(4 tokens there, 7 in the model's own"):
        own.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert own.load(tmp_path).tokenizer is None
    more = train("characters", texts=["abcdefgh"])
    more.save(tmp_path)
    assert own.load(tmp_path).tokenizer == more, "pieces after the model's own are no harm"


def test_a_rename_that_fails_half_way_leaves_the_old_model(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename = Path.replace

    def fails_at_last(self: Path, other: Path) -> Path:
        if self.name == "model.json":
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", fails_at_last)
    with pytest.raises(WeightsError, match=r"Input/output error\. Choose another place; what was there before is untouched"):
        own.save(fresh("gpt2"), folder, tokenizer=train("characters", texts=["abc"]))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
