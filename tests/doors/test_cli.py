"""The command line: what it prints, how it ends, and what it says to a user's mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import glassformer
import warm
from glassformer.cli import app as cli

SMALL = ["--set", "batch=2", "--set", "context=16", "--set", "model.d_model=16", "--set", "model.blocks.*.attention.n_heads=2", "--set", "evaluate_windows=2"]


class Ended:
    """One run of the command line."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLASSFORMER_DEBUG", raising=False)

    def command(*args: str | Path) -> Ended:
        code = cli.main([str(a) for a in args])
        return Ended(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", "shakespeare_quick", "--steps", "3", "--out", str(folder), *SMALL]) == 0
    return folder


def fresh(*args: str) -> list[str]:
    return [sys.executable, "-m", "glassformer", *args]


# Starting


def test_help_is_quick_because_it_imports_no_torch() -> None:
    program = "import sys; from glassformer.cli.app import main; main(['--help']); print('MODULES', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    help_text, modules = out.split("MODULES")
    assert not {"torch", "numpy", "rich", "matplotlib", "tokenizers", "yaml"} & set(modules.split())
    assert all(f"\n  {name}" in help_text for name in ("train", "generate", "evaluate", "look", "dimensions", "params", "tokenizer"))


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "look", "dimensions", "params", "tokenizer"])
def test_every_command_explains_itself(run, command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert f"Usage: glassformer {command}" in ended.out


def test_without_arguments_it_shows_the_help(run) -> None:
    assert run().out == run("--help").out


def test_version(run) -> None:
    assert run("--version").out == f"glassformer {glassformer.__version__}\n"


# Working


def test_train_keeps_a_run_and_says_what_to_type_next(run, trained: Path) -> None:
    assert {"model.safetensors", "model.json", "tokenizer.json", "recipe.yaml", "metrics.jsonl", "loss.png"} <= {p.name for p in trained.iterdir()}
    ended = run("train", trained, "--resume", "--steps", "4")
    assert ended.code == 0
    assert "trained 4 steps" in ended.out
    assert "on text it has not seen: loss" in ended.out
    assert f"glassformer generate {trained}" in ended.out


def test_train_takes_text_of_ones_own_and_a_free_folder(run, tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("the car is red and the sky is blue\n" * 30)
    for wanted in ("runs/shakespeare_quick", "runs/shakespeare_quick-2"):
        ended = run("train", "shakespeare_quick", "--data", "poem.txt", "--steps", "1", *SMALL)
        assert ended.code == 0
        assert f"saved in {wanted} " in ended.out
        assert (tmp_path / wanted / "model.safetensors").exists()
    assert glassformer.load(tmp_path / wanted).model.spec.vocab_size == len(set("the car is red and the sky is blue\n"))


def test_train_says_whose_text_it_takes(run, tmp_path: Path) -> None:
    said = "books: tinyshakespeare (the recipe's own text; --data takes yours) -> runs/books\n"
    ended = run("train", "books", "--steps", "1", "--device", "tpu")
    assert ended.err.startswith(said)
    (tmp_path / "poem.txt").write_text("the car is red")
    for option in (("--data", "poem.txt"), ("--set", "data=poem.txt")):
        assert run("train", "books", *option, "--steps", "1", "--device", "tpu").err.startswith("books: poem.txt -> runs/books\n")


def test_resume_by_name_goes_on_with_the_usual_folder(run, tmp_path: Path) -> None:
    assert run("train", "shakespeare_quick", "--steps", "1", *SMALL).code == 0
    ended = run("train", "shakespeare_quick", "--steps", "2", "--resume", *SMALL)
    assert ended.code == 0
    assert "trained 2 steps" in ended.out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["shakespeare_quick"]


def test_a_run_with_a_part_of_ones_own_goes_on_in_another_process(run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import glassformer as gf\nfrom glassformer.core.spec import part\n"
        "@part\nclass MyRate(gf.Constant):\n    pass\n"
        "def recipe():\n    block = gf.Block(attention=gf.Attention(n_heads=2, position=gf.Rotary()), feedforward=gf.Plain(d_ff=16), norm=gf.RMSNorm())\n"
        "    return gf.Recipe(gf.Decoder(vocab_size=7, d_model=8, blocks=(block,)), steps=1, batch=2, context=16, evaluate_windows=2, schedule=MyRate())\n"
    )

    def train(*args: str) -> Ended:
        process = warm.Program(["-m", "glassformer", "train", *args], cwd=tmp_path)
        out, err = process.communicate()
        return Ended(process.wait(), out, err)

    assert train("mine.py").code == 0
    (tmp_path / "mine.py").unlink()
    ended = train("runs/mine", "--resume", "--steps", "2")
    assert ended.code == 0, ended.err
    assert "trained 2 steps" in ended.out
    (tmp_path / "runs/mine/recipe.py").unlink()
    ended = run("train", "runs/mine", "--resume", "--steps", "3")
    assert ended.code != 0
    assert "'MyRate'" in ended.err
    assert "known only after its module was imported: train from the .py recipe that does so" in " ".join(ended.err.split())


def test_a_prompt_that_is_not_utf8_is_named(trained: Path) -> None:
    process = warm.Program(["-m", "glassformer", "generate", str(trained), "-"], stdin="déjà".encode("latin-1"))
    _, err = process.communicate()
    assert process.returncode != 0
    assert "Standard input is not UTF-8 text (byte 1 is 0xe9): convert it first." in " ".join(err.split())


def test_generate_streams_the_prompt_and_its_continuation(run, trained: Path) -> None:
    ended = run("generate", trained, "ROMEO:", "--max-new-tokens", "12", "--seed", "3")
    assert ended.code == 0
    assert ended.out.startswith("ROMEO:")
    assert len(ended.out) == len("ROMEO:") + 12 + 1
    assert run("generate", trained, "ROMEO:", "-n", "12", "--seed", "3").out == ended.out


def test_generate_shows_probabilities(run, trained: Path) -> None:
    lines = run("generate", trained, "ROMEO:", "-n", "3", "--logprobs", "2").out.splitlines()
    assert len(lines) == 3
    assert all(line.count("%") == 3 for line in lines)


def test_evaluate_prints_standard_errors_and_json(run, trained: Path) -> None:
    (Path.cwd() / "t.txt").write_text("Good morrow, cousin. " * 20)
    ended = run("evaluate", trained, "--data", "t.txt", "--context", "16")
    assert [line.split("  ")[0] for line in ended.out.splitlines()[:3]] == ["loss", "perplexity", "bits per byte"]
    found = json.loads(run("evaluate", trained, "--data", "t.txt", "--context", "16", "--json").out)
    assert f"{found['loss']:.4f} ± {found['standard_error']:.4f} nats per token" in ended.out
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / 0.6931471805599453)  # one byte per token here


def test_look_writes_a_page(run, trained: Path) -> None:
    ended = run("look", "To be", "--model", trained, "--out", "look.html")
    assert (ended.code, ended.err) == (0, "")
    assert "<html" in Path("look.html").read_text()
    assert ended.out.startswith("wrote look.html (")


def test_params_and_dimensions_of_presets_and_runs(run, trained: Path) -> None:
    assert "124,439,808" in run("params", "gpt2").out
    assert "blocks" in run("params", trained).out
    assert "b=1 t=3" in run("dimensions", trained, "car").out
    assert "d=32" in run("dimensions", "tiny", "The car is red", "--set", "d_model=32").out


# Mistakes: exit code 2, one sentence with the remedy, no traceback

MISTAKES = {
    "an unknown command": (["tran"], r"No such command 'tran'.*See 'glassformer --help'"),
    "an unknown option": (["train", "shakespeare_quick", "--step", "3"], r"No such option: --step.*See 'glassformer train --help'"),
    "a text like an option": (["generate", "nowhere", "-1"], r"No such option: -1\. A text or number that begins with '-' .* stands last, behind '--'"),
    "a missing argument": (["generate"], r"Missing argument 'MODEL'.*See 'glassformer generate --help'"),
    "a word for a number": (["train", "shakespeare_quick", "--steps", "many"], r"'--steps'.*See 'glassformer train --help'"),
    "an unknown recipe": (["train", "shakespear_quick"], r"No recipe is named 'shakespear_quick'\. Did you mean 'shakespeare_quick'"),
    "a recipe file that is not there": (["train", "mine.yaml"], r"There is no recipe file 'mine.yaml'\. Check the path"),
    "a set without a value": (["train", "shakespeare_quick", "--set", "batch"], r"--set takes path=value, but 'batch' was given"),
    "a set of what is not there": (["train", "shakespeare_quick", "--set", "bach=3"], r"--set bach=3: Recipe has no field 'bach'\. Did you mean 'batch'"),
    "a set of a wrong type": (
        ["train", "shakespeare_quick", "--set", "batch=many"],
        r"--set batch=many: Recipe\.batch is a whole number, but 'many' was given",
    ),
    "a set through a number": (["train", "shakespeare_quick", "--set", "batch.x=3"], r"the path cannot go on with 'x'"),
    "an unknown part": (["train", "shakespeare_quick", "--set", "optimizer=AdamV"], r"No part of kind Optimizer is named 'AdamV'\. Did you mean 'AdamW'"),
    "a value that is not YAML": (["train", "shakespeare_quick", "--set", "batch=[1"], r"the value '\[1' is not YAML"),
    "a budget of nothing": (["train", "shakespeare_quick", "--steps", "0"], r"A budget is above zero; --steps 0 was given\."),
    "windows of nothing": (["evaluate", "nowhere", "--data", "tinyshakespeare", "--context", "0"], r"--context.*See 'glassformer evaluate --help'"),
    "text that is not there": (["train", "shakespeare_quick", "--data", "nowhere.txt"], r"There is no file or folder 'nowhere.txt'.*tinyshakespeare"),
    "a device that is not there": (["train", "shakespeare_quick", "--device", "tpu"], r"There is no device 'tpu' here\. There is: .*cpu"),
    "a run that is not there": (["generate", "nowhere", "Hi"], r"There is no model at 'nowhere'.*glassformer train shakespeare_quick --out nowhere"),
    "a preset for a run": (["generate", "gpt2", "Hi"], r"A preset has no trained weights: train one first"),
    "an unknown preset": (["params", "gtp2"], r"'gtp2' is neither a folder with a model nor a preset\. Did you mean 'gpt2'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_remedy(run, what: str) -> None:
    args, expected = MISTAKES[what]
    ended = run(*args)
    assert ended.code == 2
    assert ended.out == ""
    lines = ended.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in ended.err
    assert re.search(expected, lines[-1]), lines[-1]


RECIPES = {
    "no_function.py": ("x = 1\n", r"no_function.py has no function recipe\(\)\. Write one"),
    "wrong_type.py": ("def recipe():\n    return 3\n", r"recipe\(\) in .*wrong_type.py returned a whole number, but a glassformer.Recipe is needed"),
    "raises.py": ("def recipe():\n    return 1 / 0\n", r"raises.py, line 2: ZeroDivisionError: division by zero\. Mend the recipe"),
    "syntax.py": ("def recipe(:\n", r"syntax.py, line 1: .*Mend the recipe"),
    "empty.yaml": ("", r"empty.yaml holds nothing, but a recipe is a mapping of fields"),
    "list.yaml": ("- 1\n", r"list.yaml holds a list, but a recipe is a mapping"),
    "broken.yaml": ("a: [1\n", r"broken.yaml, line 2: not YAML"),
    "binary.yaml": ("\xb8", r"binary.yaml is not UTF-8 text \(byte 0\), so it is no recipe"),
    "field.yaml": ("model: tiny\nstep: 3\n", r"Recipe: Recipe has no field 'step'\. Did you mean 'steps'"),
    "budget.yaml": ("model: tiny\n", r"A recipe needs a budget: steps=2000, seconds=100, or both"),
    "no_model.yaml": ("steps: 3\n", r"Recipe needs model"),
    "preset.yaml": ("model: tinny\nsteps: 3\n", r"No preset is named 'tinny'\. Did you mean 'tiny'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe_is_named_with_its_line(run, name: str) -> None:
    content, expected = RECIPES[name]
    Path(name).write_bytes(content.encode("latin-1"))
    ended = run("train", name)
    assert ended.code == 2
    assert re.search(expected, ended.err), ended.err
    assert "Traceback" not in ended.err


def test_a_run_is_never_overwritten(run, trained: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    ended = run("train", "shakespeare_quick", "--out", trained)
    assert ended.code == 2
    assert "already holds a run: go on with it (--resume) or choose another folder (--out)" in ended.err
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_run_in_progress_is_opened_with_a_word_and_goes_on_with_one(run, trained: Path, tmp_path: Path) -> None:
    newest = sorted((trained / "checkpoints").glob("step-*"))[-1]
    going = tmp_path / "going" / "checkpoints" / newest.name
    shutil.copytree(newest, going)
    ended = run("generate", "going", "A", "-n", "1")
    assert ended.code == 0
    assert ended.err.endswith(f"the run in going is not finished; this is its checkpoint {newest.name}\n")
    about = json.loads((going / "model.json").read_text())
    (going / "model.json").write_text(json.dumps(about | {"extra": {"step": 0}}))
    assert run("generate", "going", "A", "-n", "1").err.endswith(f"{newest.name}, which has learnt nothing yet\n")
    shutil.copytree(trained, tmp_path / "run")
    assert f"going on from step {int(newest.name[5:])}\n" in run("train", tmp_path / "run", "--resume", "--steps", "9").err


def test_a_model_without_its_tokenizer_says_what_is_missing(run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    for command in (["generate", "bare", "A"], ["look", "A", "--model", "bare"], ["evaluate", "bare", "--data", "tinyshakespeare"]):
        ended = run(*command)
        assert ended.code == 2
        assert "bare has no tokenizer.json, so text means nothing to its model: put the one that it was trained with into that folder." in ended.err


def test_a_character_that_the_model_does_not_know_says_what_to_do(run, trained: Path) -> None:
    ended = run("generate", trained, "Ä")
    assert ended.code == 2
    assert re.search(r"the character 'Ä' \(U\+00C4\) at position 0 .* knows: leave it out, or train a tokenizer that can read it: kinds bpe", ended.err)


def test_a_text_of_one_window_is_evaluated_without_an_error_bar(run, trained: Path) -> None:
    Path("short.txt").write_text("To be, or")
    out = run("evaluate", trained, "--data", "short.txt").out
    assert "±" not in out and "nan" not in out
    assert "in one window: too little text to say how sure this is" in out
    assert json.loads(run("evaluate", trained, "--data", "short.txt", "--json").out)["standard_error"] is None


def test_what_stands_in_the_way_is_said_with_what_to_do(run) -> None:
    Path("taken").write_text("mine")
    Path("a.txt").write_text("some words to learn from")
    ended = run("tokenizer", "train", "a.txt", "--kind", "characters", "--out", "taken")
    assert (ended.code, Path("taken").read_text()) == (2, "mine")
    assert "The tokenizer could not be written to taken: File exists. Move what is in the way, or choose another place." in ended.err
    ended = run("train", "nowhere", "--resume")
    assert ended.code == 2
    assert "There is no run in 'nowhere' to go on with, and no recipe of that name: check the folder." in ended.err


def test_too_much_for_the_memory_is_a_sentence(run, trained: Path) -> None:
    ended = run("generate", trained, "A", "-n", "100000000000000")
    assert ended.code == 1
    assert "there is not so much memory: make what is asked for smaller" in ended.err


def test_a_saved_model_has_fixed_sizes(run, trained: Path) -> None:
    ended = run("params", trained, "--set", "d_model=8")
    assert ended.code == 2
    assert "is a saved model, whose sizes are fixed" in ended.err


def test_impossible_sampling_is_refused_before_anything_is_printed(run, trained: Path) -> None:
    ended = run("generate", trained, "ROMEO:", "--top-p", "3")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")


# Ends


def test_an_interrupt_ends_with_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import models

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "open_shape", interrupted)
    ended = run("params", "gpt2")
    assert (ended.code, ended.out) == (130, "")
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_control_c_saves_the_run_and_says_how_to_go_on(run, tmp_path: Path) -> None:
    process = warm.Program(
        ["-m", "glassformer", "train", "shakespeare_quick", "--steps", "100000", "--out", str(tmp_path / "run"), "--set", "compile=false", *SMALL]
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping after this step (a compilation ends first) and saving; again: stop at once, with the last save" in err
    found = re.search(r"stopped after step ([\d,]+) and saved\. Go on with: glassformer train (\S+) --resume", out)
    assert found is not None, out
    step = int(found[1].replace(",", ""))
    assert f"trained {step + 1:,} steps" in run("train", found[2], "--resume", "--steps", str(step + 1)).out


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(fresh("params", "gpt2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


def test_a_fault_of_ours_shows_its_traceback_and_asks_for_a_report(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import models

    def broken(*_: object) -> None:
        raise ZeroDivisionError("one by nought")

    monkeypatch.setattr(models, "open_shape", broken)
    ended = run("params", "gpt2")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "Please report it" in ended.err


def test_a_full_disk_is_a_failure_and_not_a_fault(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import models

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere/model")

    monkeypatch.setattr(models, "open_shape", full)
    ended = run("params", "gpt2")
    assert (ended.code, ended.err.splitlines()) == (
        1,
        ["error: No space left on device: 'somewhere/model'. Check the path, its permissions and the free space."],
    )


def test_debug_adds_the_traceback_to_a_mistake(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSFORMER_DEBUG", "1")
    ended = run("params", "gtp2")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: ")


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")})
    run("--version")
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "10000")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | {"OMP_WAIT_POLICY": "ACTIVE"})
    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in os.environ


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(fresh("--version"), capture_output=True, text=True, check=True, env=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.stdout == f"glassformer {glassformer.__version__}\n"


@pytest.mark.parametrize("group", ["look", "tokenizer"])
def test_a_group_by_itself_lists_its_commands(group: str, run) -> None:
    done = run(group)
    assert done.code == 2
    assert done.err.startswith(f"Usage: glassformer {group} [OPTIONS] COMMAND")
    assert "error" not in done.err


def test_a_text_without_a_command_is_a_page(run) -> None:
    assert run("look", "some text").err == "error: Missing option '--model' / '-m'. See 'glassformer look page --help'.\n"
    assert run("look", "--model", "lens", "text").err.startswith("error: There is no model at 'lens'"), "options may stand before the text"


# Ends of another kind: streams, signals, alphabets


def test_a_stream_that_is_closed_is_an_empty_one(run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        ended = run("generate", trained, "-")
        assert (ended.code, ended.out) == (2, "") and ended.err.startswith("error: The prompt is empty")
        patch.setattr(sys, "stdin", None)
        assert run("chat", trained).code == 0
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert cli.main(["generate", str(trained), "A", "-n", "2"]) == 0
            patch.setattr(sys, name, None)
            assert cli.main(["generate", "nowhere", "A"]) == 2


def test_an_interrupted_text_ends_its_line(run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer import infer

    def interrupted(*args: object, **options: object):
        yield from (infer.Token(0, 1, letter, -1.0) for letter in "bc")
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "stream", interrupted)
    ended = run("generate", trained, "A")
    assert (ended.code, ended.out) == (130, "Abc\n") and "Traceback" not in ended.err


def test_a_chat_speaks_of_its_settings_by_their_names(run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/set temperature x\n/set top_k 3\n")))
    ended = run("chat", trained)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines()[0] == "error: temperature='x': it is a number, but a text was given."


def test_what_an_alphabet_lacks_is_a_question_mark(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", small)
    assert cli.main(["look", "sampling", "To be", "--model", str(trained)]) == 0
    assert small.buffer.getvalue().startswith(b"After ?To be?: ")  # type: ignore[attr-defined]


def test_an_interrupt_while_the_libraries_are_read_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from glassformer import __main__ as door

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "glassformer.cli.app")
        patch.setattr("builtins.__import__", interrupted)
        code = door.run()
    assert (code, capsys.readouterr().err) == (130, "interrupted\n")


NARROW = {"COLUMNS": "40", "NO_COLOR": "1"}


def test_a_narrow_terminal_without_colours_shows_the_same(run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("look", "sampling", "To be", "--model", trained)
    for name, value in NARROW.items():
        monkeypatch.setenv(name, value)
    assert run("look", "sampling", "To be", "--model", trained).out == wide.out, "through a pipe nothing is cut"
    assert "\x1b" not in wide.out
    assert run("generate", "--help").code == 0


BAD = {
    "no name": (["generate", "", "Hi"], r"The model's name is empty: give a trained model's folder"),
    "a folder without a model": (["generate", ".", "Hi"], r"\. holds no model: neither model\.json"),
    "no prompt": (["generate", "MODEL", ""], r"The prompt is empty, and the tokenizer has no beginning-of-text token"),
    "a token that is not there": (["generate", "MODEL", "Hi", "--set", "suppress=[999]"], r"Suppress names token 999, but the vocabulary has 65 tokens"),
    "what only Python can say": (["generate", "MODEL", "Hi", "--set", "allowed=3"], r"allowed is written in Python"),
    "a schema that is no JSON": (["generate", "MODEL", "Hi", "--json-schema", "{x"], r"is no JSON .* Give --json-schema a file, or the schema itself\."),
    "a type that is none": (
        ["generate", "MODEL", "Hi", "--json-schema", '{"properties": {"age": {"type": "strng"}}}'],
        r"properties\.age\.type is 'strng'\. Did you mean 'string'\?",
    ),
    "no chat template": (["generate", "MODEL", "Hi", "--chat"], r"has no chat template.* Leave --chat out, or put"),
    "a source for a decoder": (["look", "sampling", "Hi", "--model", "MODEL", "--source", "x"], r"--source is what an encoder reads"),
    "an unwritable trace": (["generate", "MODEL", "Hi", "--trace", "nowhere/t.html"], r"'nowhere/t\.html' cannot be written: the folder"),
    "an unwritable tree": (["generate", "MODEL", "Hi", "--num-beams", "2", "--beam-tree", "nowhere/t.json"], r"'nowhere/t\.json' cannot be written"),
    "edits that are not there": (["generate", "MODEL", "Hi", "--edits", "e.json"], r"There is no file of edits at 'e\.json'"),
    "memory that is no size": (["serve", "MODEL", "--memory", "lots"], r"error: --memory lots: a number of bytes, or a text such as '2 GB'"),
    "a cache of no type": (["serve", "MODEL", "--cache-dtype", "int99"], r"error: --cache-dtype int99: 'bfloat16' or 'int8'; leave --cache-dtype out"),
    "a chat that cannot be": (["chat", "MODEL", "--top-p", "5"], r"top-p is a probability above 0 and up to 1, but 5 was given"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_sentence_and_2_with_nothing_printed(run, trained: Path, what: str) -> None:
    args, expected = BAD[what]
    ended = run(*[str(trained) if a == "MODEL" else a for a in args])
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.strip().splitlines()) == 1 and ended.err.startswith("error: ")
    assert re.search(expected, ended.err), ended.err
