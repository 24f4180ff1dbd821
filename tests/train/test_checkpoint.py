from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from glassformer.core import files
from glassformer.core.errors import CheckpointError, TrainingError
from glassformer.train import AdamW, Constant, Muon, TokenData, checkpoint
from glassformer.train.checkpoint import list_steps, newest, read
from glassformer.train.log import read_metrics
from glassformer.weights import own
from train import small

ANY = {"schedule": Constant(), "save_every": 3}


def run(folder: Path, steps: int = 9, **options) -> list[float]:
    return small.losses(small.trainer(small.model(dropout=0.1), folder=folder, steps=steps, **(ANY | options)))


def logged(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": Muon(1e-2, rest=AdamW(1e-2))}, {"accumulate": 3, "documents": True}, {"dtype": "bf16"}],
    ids=["adamw", "muon", "accumulated", "bf16"],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, options):
    data = TokenData([small.ids()], starts=np.arange(0, 4000, 11), vocab_size=small.VOCABULARY)
    whole = run(tmp_path / "whole", 9, data=data, **options)
    first = run(tmp_path / "broken", 5, data=data, **options)
    torch.rand(10)  # whatever else the process did meanwhile
    second = run(tmp_path / "broken", 9, data=data, resume=True, **options)
    assert first + second == whole
    assert logged(tmp_path / "broken") == whole
    hashes = [json.loads((tmp_path / f"{name}/checkpoints/step-00000009/state.json").read_text())["files"] for name in ("whole", "broken")]
    assert hashes[0]["optimizer.safetensors"] == hashes[1]["optimizer.safetensors"]
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]


def test_what_a_checkpoint_holds(tmp_path):
    run(tmp_path)
    assert list_steps(tmp_path) == [6, 9]  # the newest two
    folder = tmp_path / "checkpoints/step-00000009"
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    found = read(folder)
    assert found.step == 9
    assert found.state["loader"] == {"seed": 0, "epoch": 0, "position": 36}
    assert "blocks.0.attn.out.weight/exp_avg" in found.optimiser()
    assert not list(tmp_path.rglob("*.draft"))


def test_a_run_can_be_opened_as_a_model_while_it_trains_and_after(tmp_path):
    trainer = small.trainer(folder=tmp_path, **ANY)
    for step in trainer:
        if step.number == 4:
            now = own.load(tmp_path)
            assert now.extra["step"] == 3
    after = own.load(tmp_path)
    assert after.extra["step"] == 12
    for a, b in zip(after.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_that_goes_on_is_not_opened_as_it_was(tmp_path):
    run(tmp_path, 5)
    trainer = small.trainer(small.model(dropout=0.1), folder=tmp_path, steps=9, resume=True, **ANY)
    for step in trainer:
        if step.number == 7:
            assert own.load(tmp_path).extra["step"] == 6
            break


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "model.json", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "edited", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, name, damage):
    whole = run(tmp_path)
    file = tmp_path / "checkpoints/step-00000009" / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "edited":
        file.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    else:
        file.unlink()
    words = {"cut": "truncated or was edited", "edited": "edited", "missing": "is missing"}[damage]
    with pytest.raises(CheckpointError, match=f"step-00000009.*{words}|{name}.*{words}"):
        read(file.parent)
    trainer = small.trainer(small.model(dropout=0.1), folder=tmp_path, steps=9, resume=True, **ANY)
    assert trainer.number == 6
    assert name in trainer.notes[0]
    assert "Going on from the one before it, step 6" in trainer.notes[0]
    assert small.losses(trainer) == whole[6:]
    assert read(file.parent).step == 9  # written anew


def test_if_every_checkpoint_is_damaged_nothing_is_begun_anew(tmp_path):
    run(tmp_path)
    for step in list_steps(tmp_path):
        (tmp_path / f"checkpoints/step-{step:08d}/optimizer.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="optimizer.safetensors is truncated or was edited: its hash is e3b0c44298fc…, .* No older checkpoint of this run is whole"
    ):
        run(tmp_path, resume=True)


def test_an_edited_number_breaks_the_seal(tmp_path):
    run(tmp_path)
    file = tmp_path / "checkpoints/step-00000009/state.json"
    file.write_text(file.read_text().replace('"position": 36', '"position": 32'))
    with pytest.raises(CheckpointError, match=r"state.json was edited: its contents do not match its seal"):
        read(file.parent)
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(CheckpointError, match="has format 7, but this version reads format 1"):
        read(file.parent)


# What the disk does


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def breaking_at(monkeypatch, name: str, step: int, trainer) -> None:
    """Let ``name`` fail from a step on."""
    room = files if name == "flush" else checkpoint
    real = getattr(room, name)
    monkeypatch.setattr(room, name, lambda *a, **k: real(*a, **k) if trainer.number < step else full_disk())


@pytest.mark.parametrize("name", ["save_file", "flush", "file_hash"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, name):
    whole = run(tmp_path / "whole")
    trainer = small.trainer(small.model(dropout=0.1), folder=tmp_path / "run", steps=9, **ANY)
    breaking_at(monkeypatch, name, 6, trainer)
    with pytest.raises(CheckpointError, match="step-00000006 could not be written: the disk is full. The checkpoints before it are untouched. Free some space"):
        trainer.run()
    monkeypatch.undo()
    assert list_steps(tmp_path / "run") == [0, 3]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert small.losses(small.trainer(small.model(dropout=0.1), folder=tmp_path / "run", steps=9, resume=True, **ANY)) == whole[3:]


def test_a_disk_that_is_full_for_the_model_s_own_files(tmp_path, monkeypatch):
    trainer = small.trainer(folder=tmp_path, **ANY)
    monkeypatch.setattr(own, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="step-00000000 could not be written: the disk is full. Free some space"):
        trainer.run()


def test_a_disk_that_is_full_for_the_log(tmp_path):
    trainer = small.trainer(folder=tmp_path, **ANY)
    steps = iter(trainer)
    for _ in range(4):
        next(steps)
    trainer._log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"metrics.jsonl could not be written: the disk is full. Free some space, then go on with --resume"):
        list(steps)
    assert newest(tmp_path)[0].step == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"The run folder .*file/run cannot be written: Not a directory. Move what is in the way"):
        small.trainer(folder=tmp_path / "file/run")
    (tmp_path / "run/checkpoints").parent.mkdir()
    (tmp_path / "run/checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step-00000000 could not be written: File exists. Move what is in the way, then go on with --resume"):
        small.trainer(folder=tmp_path / "run").run()
    with pytest.raises(CheckpointError, match=r"none/run.json could not be written: No such file or directory. See that the folder is there"):
        checkpoint.write_json(tmp_path / "none/run.json", {})


def test_a_folder_that_became_read_only(tmp_path, monkeypatch):
    trainer = small.trainer(folder=tmp_path / "run", **ANY)
    steps = iter(trainer)
    for _ in range(4):
        next(steps)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(
        CheckpointError, match="step-00000006 could not be written: Permission denied. The checkpoints before it are untouched. Make the folder writable"
    ):
        list(steps)
    assert list_steps(tmp_path / "run") == [0, 3]


# Which run it is


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"already holds a run: go on with it \(resume=True, --resume\) or choose another folder"):
        run(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no run to resume in .*nowhere: check the folder, or leave out --resume"):
        run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointError, match="resume=True needs the folder"):
        small.trainer(resume=True)
    with pytest.raises(CheckpointError, match="This run has no folder to be saved in"):
        small.trainer().save()


def test_a_finished_run_resumed_has_nothing_to_do(tmp_path):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(tmp_path, resume=True) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 5}, "batch was 4 and is 5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"optimizer": AdamW(1e-4)}, "optimizer.lr was 0.003 and is 0.0001"),
        ({"data": TokenData.from_ids(small.ids(3000), vocab_size=13)}, "data was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"),
        ({"repeats": 0.5}, "repeats was None and is 0.5"),
        ({"dtype": "bf16", "clip": None}, "clip was 1.0 and is None; dtype was 'fp32' and is 'bf16'"),
    ],
    ids=["batch", "seed", "optimizer", "data", "repeats", "several"],
)
def test_other_settings_are_named(tmp_path, change, message):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=f"belongs to a run with other settings: {message}.* Use the same settings, or start in a new folder"):
        run(tmp_path, resume=True, **change)


def test_another_model_is_named(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings: model\.blocks\.0\.dropout was 0\.1 and is 0\.0"):
        small.trainer(small.model(), folder=tmp_path, resume=True, **ANY)
    found, _ = newest(tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors belongs to another model: it lacks the parameter 'weight'"):
        found.load_model(torch.nn.Linear(2, 2, bias=False))
    wide = small.spec().at("blocks.*.feedforward.d_ff").set(128).build(seed=0)
    with pytest.raises(CheckpointError, match=r"'blocks.0.ffn.*' has shape \(.*64.*\), but the model has \(.*128.*\)"):
        found.load_model(wide)
    with pytest.raises(CheckpointError, match="it also has the parameter 'blocks.1"):
        found.load_model(small.spec().replace(blocks=small.spec().blocks[:1]).build(seed=0))


def test_other_versions_are_noted(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    trainer = small.trainer(small.model(dropout=0.1), folder=tmp_path, steps=9, resume=True, **ANY)
    assert "other versions or threads (threads 1 -> 7): the run goes on, but not bit for bit" in trainer.notes[0]


def test_one_process_to_a_run(tmp_path):
    first = small.trainer(folder=tmp_path, **ANY)
    with pytest.raises(CheckpointError, match="Another process is training in"):
        small.trainer(folder=tmp_path, resume=True, **ANY)
    first.run()
    small.trainer(folder=tmp_path, resume=True, **ANY)


def test_the_settings_of_compilation_are_kept_over_a_kill(tmp_path):
    trainer = small.trainer(folder=tmp_path, steps=8, compile="auto")
    steps = iter(trainer)
    for _ in range(6):
        next(steps)
    trainer._finish = lambda: None
    steps.close()  # as if killed: no checkpoint since step 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["decision"] == {"compile": False, "after": 5}
    (tmp_path / "run.json").write_text(json.dumps(record | {"decision": {"compile": True, "after": 5}}))
    again = small.trainer(folder=tmp_path, steps=8, compile="auto", resume=True)
    assert again.number == 0
    assert again._compiler.decision == {"compile": True, "after": 5}


# Smaller things


def test_random_state_of_every_generator_comes_back():
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002
    state = checkpoint.plain(checkpoint.random_state())
    expected = draw(), draw()
    checkpoint.restore_random_state(state)
    assert (draw(), draw()) == expected
    with checkpoint.same_randomness():
        inside = draw()
    assert draw() == inside


def test_tied_tensors_are_stored_once_and_come_back(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("seen", torch.ones(2))

    one, two = Tied(), Tied()
    checkpoint.save_parameters(one, tmp_path / "model.safetensors")
    checkpoint.load_parameters(two, tmp_path / "model.safetensors")
    assert torch.equal(one.b.weight, two.b.weight)
    assert two.b.weight is two.a.weight


def test_drafts_of_a_killed_process_do_not_count(tmp_path):
    run(tmp_path)
    shutil.copytree(tmp_path / "checkpoints/step-00000009", tmp_path / "checkpoints/.step-00000012.draft")
    (tmp_path / "checkpoints/step-later").mkdir()
    assert list_steps(tmp_path) == [6, 9]


def test_a_run_record_that_cannot_be_read(tmp_path):
    run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json cannot be read .* truncated or was edited"):
        run(tmp_path, resume=True)


def test_leaving_the_loop_saves_and_lets_go_of_the_folder(tmp_path):
    whole = run(tmp_path / "whole")
    trainer = small.trainer(small.model(dropout=0.1), folder=tmp_path / "left", steps=9, **ANY)
    for step in trainer:
        if step.number == 5:
            break
    assert list_steps(tmp_path / "left")[-1] == 5
    with pytest.raises(TrainingError, match=r"let go of .*left when its loop ended, after step 5: go on with a new Trainer\(…, folder=…, resume=True\)"):
        trainer.run()
    again = small.trainer(small.model(dropout=0.1), folder=tmp_path / "left", steps=9, resume=True, **ANY)
    assert small.losses(again) == whole[5:]
    assert list(again) == []  # finished: nothing to do


def test_leaving_the_loop_at_the_last_step_finishes_the_run(tmp_path):
    for step in small.trainer(folder=tmp_path, **ANY | {"steps": 3}):
        if step.number == 3:
            break
    assert own.load(tmp_path).extra["step"] == 3
