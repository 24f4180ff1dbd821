"""What lies at a path: told by content; whatever is no checkpoint says why, and what to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import warm
from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.weights import own, source
from glassformer.weights.source import INDEX, find
from weights.made import configured, entry, llama, model, raw, rewritten, tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    made = llama(tmp_path / "shards", shard=1_500)
    assert len(list(made.glob("model-*-of-*.safetensors"))) > 2
    return made


def reindexed(folder: Path, **changes: object) -> Path:
    """The index with tensors said to be elsewhere (None: not said at all)."""
    where = json.loads((folder / INDEX).read_text())["weight_map"] | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if f is not None}}))
    return folder


# What it is


def test_kinds_are_told_by_content(folder, sharded, tmp_path):
    assert find(folder).kind == "hf" and find(str(folder)).config["model_type"] == "llama"
    assert find(own.save(model(), tmp_path / "own")).kind == "own"
    assert find(sharded).tensors.keys() == find(folder).tensors.keys()
    (tmp_path / "anything").write_bytes(b"GGUF\x09\0\0\0" + bytes(40))
    with pytest.raises(WeightsError, match="anything has GGUF version 9"):  # it is read as what it says to be, whatever its name
        find(tmp_path / "anything")


def test_a_gguf_beside_a_config_is_the_model_if_there_are_no_safetensors(folder):
    (folder / "x.gguf").write_bytes(b"GGUF\x09\0\0\0" + bytes(40))
    assert find(folder).kind == "hf"
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"x\.gguf has GGUF version 9"):
        find(folder)


def test_other_names_of_the_only_file(folder):
    (folder / "model.safetensors").rename(folder / "llama.fp32.safetensors")
    assert weights.open(folder).load()[1].bytes > 0


def test_one_file_goes_before_others_beside_it(folder):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert {s.file.name for s in find(folder).tensors.values()} == {"model.safetensors"}


def test_nothing_there(tmp_path):
    for name in ("nowhere", "x" * 5_000, "zero\0byte"):
        with pytest.raises(
            WeightsError,
            match=r"There is nothing at .*: give a folder that glassformer wrote, one with config\.json and safetensors files, a \.gguf file, or hf://owner/name",
        ):
            find(tmp_path / name)


def test_an_empty_folder_and_a_strange_file(tmp_path):
    with pytest.raises(
        WeightsError, match=r"holds no model: neither model\.json .* nor config\.json .* nor a \.gguf file\. Give a folder that holds one of these"
    ):
        find(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "model.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"Folders in it do: give one of them \(books\)\."):
        find(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(WeightsError, match=r"notes\.txt is no checkpoint that is known here: give a folder with config\.json"):
        find(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WeightsError, match=r"has a config\.json but no \.safetensors file: fetch the model's weights into it as well"):
        find(tmp_path)


@pytest.mark.parametrize("n", [128, 640])
def test_tensors_alone_are_no_model(tmp_path, n):
    """Also where the length of the header looks like the first bytes of a pickle."""
    header = json.dumps({"a": entry([1])}).encode()
    file = raw(tmp_path / "model.safetensors", header + b" " * (n - len(header)), bytes(4))
    for name in (file, file.rename(tmp_path / "other.bin")):
        file = name if name.exists() else file
        with pytest.raises(WeightsError, match=r"holds tensors, but not what they mean: give the folder that it lies in, with config\.json beside it"):
            find(tmp_path / "other.bin")


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF files: give one of them: a\.gguf, b\.gguf"):
        find(tmp_path)


# Pickles


class Program:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def pickles(folder: Path) -> dict[str, Path]:
    """As torch.save writes them now and wrote them once, a bare one, and an empty file of such a name."""
    torch.save({"a": torch.ones(1), "b": Program()}, folder / "pytorch_model.bin")
    torch.save({"a": torch.ones(1), "b": Program()}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.pkl").write_bytes(pickle.dumps(Program()))
    (folder / "empty.ckpt").touch()
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "old.pt", "bare.pkl", "empty.ckpt"])
def test_pickles_are_refused_by_name_and_by_content(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = pickles(tmp_path)[name]
    for p in [file] + ([] if name == "empty.ckpt" else [Path(shutil.copy(file, tmp_path / "innocent"))]):
        with pytest.raises(WeightsError) as caught:
            weights.open(p)
        said = str(caught.value)
        assert f"{p} is a pickle, and opening one runs whatever program its writer put in it: it is not opened." in said
        assert said.endswith(f"If you trust it, convert it once: {source.UNPICKLE.format(tmp_path)}") and "\n" not in said
        assert "save_pretrained" in said and f"{tmp_path}-safe" in said
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_pickles_says_how_to_convert_it(config, folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "training_args.bin")
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="no .safetensors file" if config else "holds no model"):  # what a training run leaves is no model
        weights.open(folder)
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model-00001-of-00002\.bin is a pickle.*convert it once: python -c"):
        weights.open(folder)


def test_a_pickle_with_the_name_of_tensors_is_not_unpickled(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for how in (True, False):
        torch.save({"b": Program()}, folder / "model.safetensors", _use_new_zipfile_serialization=how)
        with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
            weights.open(folder)
    with zipfile.ZipFile(folder / "model.safetensors", "w") as z:
        z.writestr("data.pkl", pickle.dumps(Program()))
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        weights.open(folder)
    assert not (folder / "was_run").exists()


# Shards


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
        "x.safetensors/",
    ],
)
def test_an_index_does_not_lead_out_of_the_folder(name, sharded):
    save_file({"model.norm.weight": torch.ones(8)}, sharded.parent / "secret.safetensors")
    reindexed(sharded, **{"model.norm.weight": name})
    with pytest.raises(WeightsError, match=r"index\.json names the file .*, but only \.safetensors files in the same folder are opened") as caught:
        weights.open(sharded)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["zero\0byte.safetensors", "absent.safetensors", "\ud800.safetensors", "x" * 5_000 + ".safetensors"])
def test_a_shard_that_is_not_there(name, sharded):
    reindexed(sharded, **{"model.norm.weight": name})
    with pytest.raises(WeightsError, match=r"index\.json names .*, which is not in .*: 1 tensors are missing\. Fetch that file too") as caught:
        weights.open(sharded)
    assert len(str(caught.value)) < 1_000 and str(caught.value).isprintable()


def test_a_shard_that_was_not_fetched(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    n = sum(f == shard.name for f in json.loads((sharded / INDEX).read_text())["weight_map"].values())
    shard.unlink()
    with pytest.raises(WeightsError, match=rf"names '{shard.name}', which is not in .*: {n} tensors are missing"):
        weights.open(sharded)


def test_a_tensor_in_another_shard_than_the_index_says(sharded):
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(f for f in where.values() if f != where["model.norm.weight"])
    reindexed(sharded, **{"model.norm.weight": other})
    with pytest.raises(WeightsError, match=rf"says that 'model\.norm\.weight' is in {other}, but it is not there: index and shards belong to different models"):
        weights.open(sharded)


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    twice = next(iter(find(sharded).tensors.values()))
    save_file({twice.name: twice.read()}, sharded / "extra.safetensors")
    reindexed(sharded, more="extra.safetensors")
    with pytest.raises(WeightsError, match="says that 'more' is in extra"):
        weights.open(sharded)
    save_file({twice.name: twice.read(), "more": torch.ones(1)}, sharded / "extra.safetensors")
    with pytest.raises(WeightsError, match=rf"'{twice.name}' is in .*\.safetensors and in .*: the files belong to different models, so keep those of one only"):
        weights.open(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(WeightsError, match="the files belong to different models"):
        weights.open(sharded)
    assert first != second


def test_what_the_index_leaves_out_still_counts(sharded):
    reindexed(sharded, **{"model.norm.weight": None})
    assert weights.open(sharded).load()[1].bytes > 0
    save_file({"stray": torch.ones(1)}, sharded / "extra.safetensors")
    reindexed(sharded, stray="extra.safetensors")
    with pytest.raises(WeightsError, match="'stray' is claimed by no parameter"):
        weights.open(sharded).load()


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}'])
def test_an_index_without_a_map(text, sharded):
    (sharded / INDEX).write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json has no weight_map that names a file for each tensor: fetch it again"):
        weights.open(sharded)


def test_an_index_of_another_name(sharded):
    (sharded / INDEX).rename(sharded / "model.fp16.safetensors.index.json")
    assert weights.open(sharded).load()[1].bytes > 0


# JSON files


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "{'a': 1}", "\ud800", '{"hidden_size": ' + "9" * 5_000 + "}"])
def test_a_config_that_is_no_json(text, folder):
    (folder / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read as JSON \(.*\): copy it again from where it came"):
        weights.open(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_a_config_that_is_no_table(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json is JSON, but no table of fields: is it the right file"):
        weights.open(folder)


def test_a_config_of_any_size_is_not_read(folder):
    os.truncate(folder / "config.json", source.MOST_JSON + 1)
    with pytest.raises(WeightsError, match=rf"config\.json has {source.MOST_JSON + 1} bytes, and more than {source.MOST_JSON} are not believed"):
        weights.open(folder)


def test_a_config_that_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json cannot be read as JSON"):
        weights.open(folder)


# Tied matrices


def test_one_matrix_stored_twice_must_be_one(tmp_path):
    folder = llama(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in tensors(folder)
    table = tensors(folder)["model.embed_tokens.weight"]
    rewritten(folder, {"lm_head.weight": table})
    loaded, report = weights.open(folder).load()
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"} and "repeats another: lm_head.weight = model.embed_tokens.weight" in str(report)
    rewritten(folder, {"lm_head.weight": table + 1})
    with pytest.raises(
        WeightsError,
        match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' are one matrix by the config \(tie_word_embeddings\), but the file holds two different "
        r"ones: set tie_word_embeddings to false",
    ):
        weights.open(folder).load()
    configured(folder, tie_word_embeddings=False)
    assert torch.equal(weights.open(folder).load()[0].readout.matrix, table + 1)
    assert loaded.spec.tied


# The hub


def cached(cache: Path, repo: str, files: Path, commit: str = "c0ffee" * 6 + "c0ff") -> Path:
    """A model as the hub's library lays it out: contents by hash, a folder of links for each commit, and which commit a name means."""
    at = cache / f"models--{repo.replace('/', '--')}"
    for name in ("blobs", f"snapshots/{commit}", "refs"):
        (at / name).mkdir(parents=True)
    for i, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, at / "blobs" / f"{i:064x}")
        (at / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    (at / "refs" / "main").write_text(commit)
    return at / "snapshots" / commit


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_local_cache_is_found_without_a_network(sharded, offline):
    snapshot = cached(offline, "someone/tiny", sharded)
    for name in ("hf://someone/tiny", "hf://someone/tiny@main", f"hf://someone/tiny@{snapshot.name}"):
        opened = weights.open(name)
        assert opened.path == snapshot and opened.load()[1].bytes == weights.open(sharded).load()[1].bytes
    for revision in ("v2", "f00d" * 10):
        with pytest.raises(WeightsError, match=rf"hf://someone/tiny@{revision} could not be fetched"):
            weights.open(f"hf://someone/tiny@{revision}")


def test_a_model_of_pickles_on_the_hub(folder, offline):
    (folder / "model.safetensors").unlink()
    cached(offline, "someone/old", folder)
    with pytest.raises(WeightsError, match=r"hf://someone/old has no \.safetensors file\. .* if you trust it, convert it once: python -c ") as caught:
        weights.open("hf://someone/old")
    assert str(caught.value).endswith(source.UNPICKLE.format("someone/old"))


@pytest.mark.slow
def test_the_environment_says_offline_and_where(sharded, tmp_path, monkeypatch):
    cached(tmp_path / "home/hub", "someone/tiny", sharded)
    code = "from glassformer import weights; print(weights.load('hf://someone/tiny').model.params().total)"
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    process = warm.Program(["-c", code], environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})  # huggingface_hub reads them; it is not warm
    out, err = process.communicate(300)
    assert process.returncode == 0, err
    assert int(out) == model().params().total


def test_without_network_and_cache_the_remedy_is_said(offline):
    with pytest.raises(WeightsError) as caught:
        weights.open("hf://nobody/nothing")
    said = str(caught.value)
    assert said.startswith("hf://nobody/nothing could not be fetched (") and "and is not in the local cache" in said
    assert "Without a network, copy its folder here and give that path" in said and "hf auth login" in said


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", "hf:///", "hf://@main"])
def test_names_that_name_no_model(name, offline):
    with pytest.raises(WeightsError, match=r"names no model on the hub: write hf://owner/name, or hf://owner/name@revision"):
        weights.open(name)


@pytest.mark.parametrize("name", ["hf://../../etc", "hf://a b/c", "hf://a/b@../../x", "hf://-/--"])
def test_names_that_the_hub_refuses(name, offline):
    with pytest.raises(WeightsError, match="names no model on the hub|could not be fetched"):
        weights.open(name)
