"""Giving back: what is written is what the reference library reads, in one file or several, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from glassformer import weights
from glassformer.core import files
from glassformer.core.errors import WeightsError
from glassformer.parts.position import ALiBi
from glassformer.weights import export, own
from glassformer.weights.source import INDEX
from tools import built
from weights.made import CONFIG, configured, llama, model, published, spec


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {n: x for f in sorted(folder.glob("*.safetensors")) for n, x in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# What is written


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_holds_what_the_format_says(tied, tmp_path):
    given = model(tied=tied)
    folder = weights.export_hf(given, tmp_path / "out")
    assert folder == tmp_path / "out" and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same(everything(folder), published(given)) and ("lm_head.weight" in everything(folder)) is not tied
    values = json.loads((folder / "config.json").read_text())
    assert {k: values[k] for k in CONFIG} == CONFIG | {"tie_word_embeddings": tied}
    assert values["architectures"] == ["LlamaForCausalLM"] and values["dtype"] == "float32"
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert {oct(p.stat().st_mode)[-3:] for p in folder.iterdir()} == {"644"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [1, 2_000, 10**9])
def test_it_comes_back_to_the_bit(dtype, shard, tmp_path):
    given = model().to(dtype)
    weights.export_hf(given, tmp_path, shard=shard)
    again, report = weights.open(tmp_path).load(dtype=dtype)
    assert again.spec == given.spec == spec()
    assert same(dict(again.named_parameters()), dict(given.named_parameters()))
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same(reference.state_dict(), published(given))
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_shards_are_as_large_as_asked_and_the_index_is_right(tmp_path):
    given = model()
    weights.export_hf(given, tmp_path, shard=1_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] and len(shards) > 3
    total = 0
    for name in shards:
        held = load_file(tmp_path / name)
        size = sum(x.numel() * x.element_size() for x in held.values())
        assert size <= 1_000 or len(held) == 1
        assert {n for n, f in index["weight_map"].items() if f == name} == held.keys()
        total += size
    assert index["metadata"] == {"total_size": total} and index["weight_map"].keys() == published(given).keys()
    assert "model.safetensors" not in shards


def test_only_a_shard_is_waiting_at_a_time(tmp_path, monkeypatch):
    sizes = []
    save = export.save_file

    def watched(tensors, file, **options):
        sizes.append(sum(x.numel() * x.element_size() for x in tensors.values()))
        save(tensors, file, **options)

    monkeypatch.setattr(export, "save_file", watched)
    weights.export_hf(model(), tmp_path, shard=1_000)
    assert max(sizes) <= 1_000 and sum(sizes) == sum(x.numel() * 4 for x in published(model()).values())


# What is kept of the config


def test_fields_that_change_nothing_are_kept_and_others_are_our_own(tmp_path):
    opened = weights.open(
        llama(tmp_path / "in", eos_token_id=[2, 3], max_position_embeddings=77, use_cache=True, torch_dtype="float16", transformers_version="4.1")
    )
    loaded, _ = opened.load()
    weights.export_hf(loaded, tmp_path / "out", config=opened.config, generation={"eos_token_id": [2, 3], "temperature": 0.6})
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["eos_token_id"] == [2, 3] and values["max_position_embeddings"] == 77 and values["use_cache"] is True
    assert values["dtype"] == "float32" and "torch_dtype" not in values and "transformers_version" not in values
    again = weights.open(tmp_path / "out")
    assert again.generation == {"eos_token_id": [2, 3], "temperature": 0.6} and again.spec == loaded.spec
    weights.export_hf(loaded, tmp_path / "other", config=opened.config | {"hidden_size": 4_000, "twist": 3})
    assert weights.open(tmp_path / "other").spec == loaded.spec and "twist" not in json.loads((tmp_path / "other/config.json").read_text())


def test_a_config_that_json_cannot_say(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json cannot say what was given \(.*not JSON serializable\): give numbers, texts, lists and tables"):
        weights.export_hf(model(), tmp_path / "out", config={"eos_token_id": torch.tensor(3)})
    assert not [*(tmp_path / "out").iterdir()]


# What cannot be written


def test_a_model_that_no_family_computes_says_which_is_nearest(tmp_path):
    odd = spec().at("blocks.*.attention.position").set(ALiBi()).build()
    with pytest.raises(WeightsError) as caught:
        weights.export_hf(odd, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("No published family computes what this Decoder does, so it can be saved in glassformer's own format only.")
    assert "The nearest, " in said and "would make it another model:\n" in said
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_spec(tmp_path):
    with pytest.raises(WeightsError, match="A model that was built from a Spec can be exported, but a Linear was given"):
        weights.export_hf(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(WeightsError, match="folder"):
        weights.export_hf(model(), 3)


def test_our_own_folder_is_not_written_over(tmp_path):
    own.save(built("llama"), tmp_path / "own")
    before = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    with pytest.raises(WeightsError, match=r"own holds a model in glassformer's own format, which would be lost: choose another folder"):
        weights.export_hf(model(), tmp_path / "own")
    assert {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()} == before


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(WeightsError, match=r"The model could not be written to .*taken.*what was there before is untouched"):
        weights.export_hf(model(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("when", ["first", "later", "places"])
def test_a_full_disk_leaves_what_was_there(when, tmp_path, monkeypatch):
    llama(tmp_path / "model", shard=2_000)
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    save, calls = export.save_file, []

    def full(*given, **options):
        calls.append(1)
        if when == "places" or len(calls) <= (0 if when == "first" else 2):
            return save(*given, **options)
        raise OSError(28, "No space left on device")

    def no_place(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    if when == "places":
        monkeypatch.setattr(files, "take_places", no_place)
    with pytest.raises(WeightsError, match=r"could not be written to .*: .*; what was there before is untouched"):
        weights.export_hf(model(d=16), tmp_path / "model", shard=500)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize(("first", "second"), [(10**9, 900), (900, 10**9), (900, 2_000)])
def test_nothing_of_an_earlier_model_is_left_to_be_opened(first, second, tmp_path):
    """One file beside an old index, or shards beside an old single file: some programs open the one, some the other."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter.safetensors").write_text("mine")
    weights.export_hf(model(d=16), tmp_path, shard=first)
    weights.export_hf(model(), tmp_path, shard=second)
    (tmp_path / "adapter.safetensors").unlink()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert same(everything(tmp_path), published(model())) and weights.open(tmp_path).spec == spec()
    assert (tmp_path / INDEX).exists() is (second < 10**9)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


def test_a_model_that_was_edited_is_refused_where_the_config_cannot_say_it(tmp_path):
    loaded, _ = weights.open(configured(llama(tmp_path / "in"))).load()
    loaded.spec = loaded.spec.at("blocks.0.attention.cap").set(5.0)
    with pytest.raises(WeightsError, match="No published family computes"):
        weights.export_hf(loaded, tmp_path / "out")
