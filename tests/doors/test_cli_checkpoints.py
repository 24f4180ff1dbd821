"""The command line on checkpoints: inspect, convert, generate from any format, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import glassformer as gf
from glassformer import weights
from glassformer.cli import app as cli
from glassformer.models.presets import llama
from glassformer.parts.rotary import Rotary

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the hub's format, with a tokenizer, a chat template and generation settings."""
    at = tmp_path_factory.mktemp("checkpoints") / "llama"
    tokenizer = gf.Tokenizer(gf.text.train("bpe", texts=["the cat sat on the mat "] * 50, vocab_size=270).library, chat_template=TEMPLATE)
    model = llama(tokenizer.vocab_size, 32, 2, 4, 2, 64, Rotary(), tied=True).build(seed=0)
    weights.export_hf(model, at, tokenizer=tokenizer, config={"max_position_embeddings": 77}, generation={"eos_token_id": [5, 6], "temperature": 0.6})
    return at


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLASSFORMER_DEBUG", raising=False)

    def command(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in args])
        return (code, *capsys.readouterr())

    return command


def test_inspect_tells_what_it_is_and_what_fills_what(run, folder) -> None:
    code, out, _ = run("inspect", folder, "--tensors")
    assert code == 0
    assert out.startswith(f"{folder}: Llama, Hugging Face folder, 20 tensors") and "init" not in out
    assert "blocks.1.attn.qkv.weight" in out and "model.layers.1.self_attn.k_proj.weight [16, 32] F32" in out
    assert "none is missing" in out and "with a chat template" in out


def test_convert_there_and_back_keeps_everything(run, folder, tmp_path) -> None:
    assert run("convert", folder, tmp_path / "own", "--to", "own")[0] == 0
    code, out, _ = run("convert", tmp_path / "own", tmp_path / "back")
    assert code == 0 and out.startswith(f"wrote {tmp_path / 'back'} (")
    first, last = gf.load(folder), gf.load(tmp_path / "back")
    for x, y in zip(first.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert last.tokenizer == first.tokenizer and last.tokenizer is not None and last.tokenizer.chat_template == TEMPLATE
    assert last.extra["generation"] == {"eos_token_id": [5, 6], "temperature": 0.6} and last.eos_ids == (5, 6)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == 77


def test_convert_to_gguf_and_back(run, folder, tmp_path) -> None:
    assert run("convert", folder, tmp_path / "m.gguf", "--type", "F32")[0] == 0
    assert run("convert", tmp_path / "m.gguf", tmp_path / "back")[0] == 0
    first, last = gf.load(folder), gf.load(tmp_path / "back")
    for x, y in zip(first.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert first.tokenizer is not None and last.tokenizer is not None
    assert last.tokenizer.encode("a word, ü") == first.tokenizer.encode("a word, ü") and last.tokenizer.chat_template == TEMPLATE


def test_generate_from_a_folder_and_by_the_chat_template(run, folder) -> None:
    code, out, _ = run("generate", folder, "abc", "-n", 5, "--seed", 1)
    assert code == 0 and out.startswith("abc")
    loaded = gf.load(folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.chat([{"role": "user", "content": "abc"}])) == "[user]abc[assistant]"
    code, out, _ = run("generate", folder, "abc", "--chat", "-n", 5, "--seed", 1, "--dtype", "bf16")
    assert code == 0 and not out.startswith("abc")


def test_params_and_dimensions_read_no_tensors(run, folder, tmp_path) -> None:
    (tmp_path / "hollow").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "hollow" / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "hollow" / "model.safetensors").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert run("params", tmp_path / "hollow")[1] == run("params", folder)[1]
    assert "attn.pattern" in run("dimensions", tmp_path / "hollow", "a cat")[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("convert", "{folder}", "{folder}"), "exists already, and what is in it would be lost: choose another TARGET, or add --force."),
        (("convert", "{folder}", "x", "--type", "Q8_0"), "--type is of .gguf files"),
        (("convert", "{folder}", "x.gguf", "--dtype", "bf16"), "A .gguf file's numbers are chosen by --type"),
        (("convert", "{folder}", "x", "--to", "onnx"), "--to onnx is no format that is known here: it is one of hf, gguf, own."),
        (("convert", "nowhere", "x"), "There is no model at 'nowhere'"),
        (("generate", "nowhere", "x"), "There is no model at 'nowhere'"),
        (("convert", "gpt2", "x"), "A preset has no trained weights"),
        (("inspect", "nowhere"), "There is nothing at 'nowhere'"),
        (("generate", "{folder}", "a", "--quantise", "int3"), "int3"),
        (("generate", "{folder}", "a", "--packed"), "packed"),
    ],
)
def test_mistakes_are_one_sentence(run, folder, args, said) -> None:
    code, out, err = run(*(a.format(folder=folder) for a in args))
    assert code == 2 and out == "" and said in err and "Traceback" not in err


def test_convert_keeps_the_type_that_is_stored(run, folder, tmp_path) -> None:
    model, _ = weights.open(folder).load(dtype="fp16")
    weights.export_hf(model, tmp_path / "half")
    assert run("convert", tmp_path / "half", tmp_path / "again")[0] == 0
    assert {s.type for s in weights.open(tmp_path / "again").tensors.values()} == {"F16"}
    assert run("convert", folder, tmp_path / "again", "--force")[0] == 0
    assert {s.type for s in weights.open(tmp_path / "again").tensors.values()} == {"F32"}


def test_generate_goes_by_the_checkpoint_s_settings_where_nothing_else_is_said() -> None:
    from glassformer.cli.sampling import settings

    assert settings({}, {"min_p": None}) == {"temperature": 0.8, "top_k": 40}
    assert settings({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}, {"top_k": 7}) == {"temperature": 0.6, "top_k": 7, "top_p": 0.9}
    assert settings({"do_sample": False, "temperature": 0.6}, {})["temperature"] == 0.0
