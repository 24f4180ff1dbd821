"""What all commands of look have in common: a word that is no command, and notes on what may not mean what was meant."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.core.errors import GlassformerWarning
from glassformer.look import Add, Intervention, ablate, ablate_heads, candidates, capture, compare, gather, head_redundancy, read, steer, steering_vector
from glassformer.look.steering import SteeringVector
from glassformer.look.subject import read_pair
from look import zoo

LONG = "the old man saw a red fox and the dog ran home"
TOLD = r"The text has 12 tokens, but this model was trained on windows of 8: beyond them its numbers are untried; give its first 8 tokens to stay within them\."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder as a run leaves it: the model, and beside it what the run was."""
    folder = tmp_path_factory.mktemp("run")
    gf.save(zoo.model("llama"), folder, tokenizer=zoo.words())
    (folder / "run.json").write_text(json.dumps({"settings": {"context": 8, "data": "hash"}}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("word", "near"), [("lenz", " Did you mean 'lens'"), ("nonsense", ""), ("head-roles", ""), ("activation", " Did you mean 'activations'")]
)
def test_a_word_that_is_no_command(word: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["look", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {word!r} is no command of look, and a text needs a model: glassformer look TEXT --model RUN, or one of page, tokens, ")
    assert ", embeddings." in said and near in said


def test_a_word_may_be_a_text(run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--model", str(run)], [f"--model={run}"], ["-m", str(run)]):
        assert cli.main(["look", "fox", *given, "--out", str(tmp_path / "look.html")]) == 0
    assert cli.main(["look", "fox", "--help"]) == 0
    assert capsys.readouterr().out.count("look.html") == 4


@pytest.mark.parametrize("command", [["candidates"], ["compare", "the fox"], ["page"], ["lens"], ["journey"]])
def test_a_text_longer_than_the_runs_windows_is_one_note(command: list[str], run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.html")] if command == ["page"] else []
    assert cli.main(["look", command[0], LONG, *command[1:], "--model", str(run), *out]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: " + TOLD.replace("\\", "")]


def test_a_long_text_in_python_warns_once_in_a_call(run: Any) -> None:
    loaded = gf.load(run)
    push = SteeringVector(torch.ones(zoo.D), 1)
    asked = {
        "candidates": lambda: candidates(loaded, LONG),
        "compare": lambda: compare(loaded, LONG, LONG),
        "read_pair": lambda: read_pair(loaded, LONG, LONG),
        "capture": lambda: capture(loaded, [LONG, "the fox", LONG], "blocks.0.resid_post"),
        "gather": lambda: gather(loaded.model, loaded.tokenizer, LONG),
        "ablate": lambda: ablate(loaded, LONG, "0.1", how="mean", reference=[LONG, LONG]),
        "ablate, a long reference": lambda: ablate(loaded, "the fox", "0.1", how="mean", reference=["the dog", LONG]),
        "ablate_heads": lambda: ablate_heads(loaded, LONG, how="mean", reference=[LONG, LONG]),
        "steering_vector": lambda: steering_vector(loaded, [LONG, "the fox"], ["the dog ran", LONG[4:]], 1),
        "steer": lambda: steer(loaded, LONG, push, max_new_tokens=2),
        "head_redundancy": lambda: head_redundancy(loaded, [LONG, " ".join(LONG.split()[::-1]), LONG]),
    }
    for name, ask in asked.items():
        with pytest.warns(GlassformerWarning, match=TOLD) as told:
            ask()
        assert len(told) == 1 and told[0].filename == __file__, f"{name}: at the line that asks"


def test_no_warning_where_none_is_due(run: Any) -> None:
    loaded = gf.load(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        candidates(loaded, "the old man saw a red fox and")  # 8 tokens
        steer(loaded, "the old man saw a red", SteeringVector(torch.ones(zoo.D), 1), max_new_tokens=4)  # what the model writes is its own doing
        candidates(zoo.model("llama"), zoo.ids(40))  # nothing is known of its training
        read(zoo.model("t5"), zoo.ids(40), source=zoo.ids(40))


def test_what_a_run_said_stays_with_its_model(run: Any, tmp_path: Any) -> None:
    """Through saving and loading; from a checkpoint within the run; a config's positions where there was no run."""
    loaded = gf.load(run)
    assert loaded.extra["training"] == {"context": 8}
    again = gf.load(gf.save(loaded.model, tmp_path / "again"))
    assert again.model.origin["training"] == {"context": 8}
    gf.save(zoo.model("llama"), tmp_path / "run" / "checkpoints" / "step-00000001")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"context": 4, "data": "hash"}}), encoding="utf-8")
    assert gf.load(tmp_path / "run").extra["training"] == {"context": 4}
    assert "training" not in gf.load(gf.save(zoo.model("llama"), tmp_path / "run" / "others" / "one")).extra, "no checkpoint of that run"
    for unsaid in ("{}", "[", '{"settings": {"context": 4, "data": null}}', '{"settings": {"context": "x", "data": "hash"}}'):
        (tmp_path / "run" / "run.json").write_text(unsaid, encoding="utf-8")
        assert "training" not in gf.load(tmp_path / "run").extra
    published = zoo.model("llama")
    published.origin = {"config": {"max_position_embeddings": 6}}
    with pytest.warns(GlassformerWarning, match=r"The text has 7 tokens, but this model names 6 positions in its config: .* give its first 6 tokens"):
        read(published, zoo.ids(7))


def test_a_pipe_that_is_closed_early_costs_no_file(run: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    files = [tmp_path / "lens.json", tmp_path / "lens.csv"]
    monkeypatch.setattr("sys.stdout", Closed())
    with contextlib.suppress(BrokenPipeError, SystemExit):
        cli.main(["look", "lens", "the old man", "--model", str(run), *(x for f in files for x in ("--out", str(f)))])
    monkeypatch.undo()
    assert all(f.stat().st_size for f in files)


def test_a_misspelt_command_before_a_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["look", "lnes", "the fox", "--model", "somewhere"]) == 2
    said = capsys.readouterr().err
    assert "'lnes' is no command of look. Did you mean 'lens'" in said and "quote it" in said


def test_a_folder_in_place_of_a_file_is_said(run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    for asked, answer in (
        (["heads", folder], "it is a folder; name a file"),
        (["lens", "the fox", "--out", folder], "it is a folder, and an answer is a file. Name one in it, such as"),
        (["lens", "the fox", "--edits", folder], "which is a folder: name the file of edits in it"),
    ):
        assert cli.main(["look", *asked, "--model", str(run)]) == 2
        assert answer in capsys.readouterr().err
    assert cli.main(["look", "lens", "the fox", "--edits", str(tmp_path / "none.json"), "--model", str(run)]) == 2
    assert "which does not exist: check the path" in capsys.readouterr().err


def test_edits_that_do_not_fit_name_their_file(run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wide = Intervention("wide", (Add("blocks.0.resid_post", torch.ones(7), 1.0),)).save(tmp_path / "wide.json")
    assert cli.main(["look", "candidates", "the fox", "--edits", str(wide), "--model", str(run)]) == 2
    assert "wide" in (said := capsys.readouterr().err) and "7" in said
