"""Edits that hold in every run of a question (``tap=``): each answer against a direct pass with both taps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.tap import Edit, Tap
from glassformer.infer.generate import generate
from glassformer.look.ablation import ablate, ablate_heads
from glassformer.look.attribution import decompose, direct_logit_attribution
from glassformer.look.edits import Add, Intervention, Scale, Zero
from glassformer.look.patching import activation_patch, attribution_patch
from glassformer.look.paths import edge_attribution, path_patch
from glassformer.look.steering import SteeringVector, steer, steering_vector
from glassformer.look.subject import read
from glassformer.look.tracing import causal_trace
from look import zoo
from look.once import commands_built_once  # noqa: F401  (a fixture)

TARGET = (3, 7)
TEXT, OTHER = zoo.ids(7, 0), zoo.ids(7, 5)
KINDS = ["gpt2", "sandwich", "parallel", "bert", "t5"]


def given(name: str) -> dict[str, Any]:
    return {"source": zoo.ids(6, 1)} if name == "t5" else {}


def edited(name: str) -> tuple[Any, Tap, str]:
    """A model, edits at several layers and some positions, and what its sites' paths begin with."""
    model, half = zoo.model(name).double(), "decoder." if name == "t5" else ""
    push = torch.randn(zoo.D, generator=torch.Generator().manual_seed(3))
    made = Intervention(
        "base", (Zero(f"{half}blocks.0.attn.z[1]"), Add(f"{half}blocks.1.resid_pre", push, 0.7, positions="2:5"), Scale(f"{half}blocks.1.attn.pattern", 0.8))
    )
    return model, made.tap(model), half


def diff(model: Any, text: list[int], name: str, tap: Tap | None) -> float:
    with torch.no_grad():
        logits = model(*read(model, text, **given(name)).inputs, tap=tap)
    return float(logits[0, -1, TARGET[0]] - logits[0, -1, TARGET[1]])


@pytest.mark.parametrize("name", KINDS)
def test_ablation(name: str) -> None:
    model, tap, half = edited(name)
    found = ablate(model, TEXT, ["1.2", "0.1"], target=TARGET, tap=tap, **given(name))
    without = Edit(f"{half}blocks.1.attn.z[2]", torch.zeros_like)
    assert found.logit_before == pytest.approx(diff(model, TEXT, name, tap), abs=1e-5)
    assert found.logit_before != pytest.approx(diff(model, TEXT, name, None), abs=1e-3)
    assert float(found.logit[0]) == pytest.approx(diff(model, TEXT, name, tap | without), abs=1e-5)
    assert float(found.logit[1]) == pytest.approx(found.logit_before, abs=1e-5)  # that head is off already
    heads = ablate_heads(model, TEXT, target=TARGET, tap=tap, memory=1, **given(name))
    assert heads["1.2"] == pytest.approx(float(found.logit[0]) - found.logit_before, abs=1e-5)
    mean = ablate(model, TEXT, "1.2", how="mean", reference=[OTHER], target=TARGET, tap=tap, **given(name))
    pool = read(model, OTHER, tap=tap, **given(name)).run("blocks.1.attn.z")[0][f"{half}blocks.1.attn.z"][0, :, 2].mean(0)
    put = Edit(f"{half}blocks.1.attn.z[2]", lambda x: pool.expand_as(x))
    assert float(mean.logit[0]) == pytest.approx(diff(model, TEXT, name, tap | put), abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_patching(name: str) -> None:
    model, tap, half = edited(name)
    found = activation_patch(model, TEXT, OTHER, "resid_mid" if name != "parallel" else "resid_post", target=TARGET, normalise=False, tap=tap, **given(name))
    site = f"{half}blocks.1.{found.site}"
    clean, _ = read(model, TEXT, tap=tap, **given(name)).run(found.site.join(["blocks.1.", ""]))
    put = Edit(site, lambda x: torch.cat([x[:, :3], clean[site][:, 3:4], x[:, 4:]], 1))
    assert found.clean == pytest.approx(diff(model, TEXT, name, tap), abs=1e-5)
    assert found.corrupted == pytest.approx(diff(model, OTHER, name, tap), abs=1e-5)
    assert float(found.values[1, 3]) == pytest.approx(diff(model, OTHER, name, tap | put), abs=1e-5)


def test_the_estimate_of_patching_is_that_of_the_edited_model() -> None:
    model, tap, _ = edited("gpt2")
    near = list(TEXT)
    with torch.no_grad():
        model.embed.weight[2] = model.embed.weight[TEXT[4]] + 1e-4 * torch.randn(zoo.D, dtype=torch.float64)
    near[4] = 2
    found = attribution_patch(model, TEXT, near, "z", target=TARGET, normalise=False, exact=True, tap=tap)
    assert found.exact is not None and found.pearson is not None and found.pearson > 0.999
    torch.testing.assert_close(found.values, found.exact, rtol=2e-2, atol=2e-7)
    assert found.values[0, 1] == 0  # the head that is off is off in both runs


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tracing(name: str) -> None:
    model, tap, half = edited(name)
    found = causal_trace(model, TEXT, [1, 2], target=3, samples=1, kinds="attn", seed=4, tap=tap, **given(name))
    s = read(model, TEXT, tap=tap, **given(name))
    clean, _ = s.run("blocks.1.attn.out")
    table = s.stack.embed
    noise = 3.0 * float(table.weight.detach().float().std()) * float(table.factor) * torch.randn(2, zoo.D, generator=torch.Generator().manual_seed(4)).double()
    noisy = Edit(f"{half}embed", lambda x: torch.cat([x[:, :1], x[:, 1:3] + noise, x[:, 3:]], 1))
    site = f"{half}blocks.1.attn.out"
    restored = Edit(site, lambda x: torch.cat([x[:, :4], clean[site][:, 4:5], x[:, 5:]], 1))

    def probability(tap: Tap) -> float:
        with torch.no_grad():
            return float(model(*s.inputs, tap=tap)[0, -1].softmax(-1)[3])

    assert found.clean == pytest.approx(probability(tap), abs=1e-6)
    assert found.corrupted == pytest.approx(probability(tap | noisy), abs=1e-6)
    assert float(found.values[0, 1, 4]) == pytest.approx(probability(tap | noisy | restored), abs=1e-6)


def test_steering() -> None:
    model, tap, _ = edited("gpt2")
    vector = SteeringVector(torch.randn(zoo.D, generator=torch.Generator().manual_seed(0)), 1)
    found = steer(model, TEXT, vector, 5.0, max_new_tokens=5, eos_id=(), tap=tap)
    assert found.ids[0] == tuple(generate(model, TEXT, max_new_tokens=5, eos_id=(), tap=tap).ids)
    assert found.ids[1] == tuple(generate(model, TEXT, max_new_tokens=5, eos_id=(), tap=tap | vector.tap(5.0)).ids)
    with torch.no_grad():
        p, q = (model(torch.tensor([TEXT]), tap=t)[0, -1].log_softmax(-1) for t in (tap, tap | vector.tap(5.0)))
        log = model(torch.tensor([[*TEXT, *found.ids[1]]]), tap=tap)[0].log_softmax(-1)
    assert float(found.kl[1]) == pytest.approx(float((p.exp() * (p - q)).sum() / torch.tensor(2.0).log()), rel=1e-5)
    mean = sum(float(log[len(TEXT) - 1 + i, token]) for i, token in enumerate(found.ids[1])) / 5
    assert float(found.logprob[1]) == pytest.approx(mean, rel=1e-4)
    made = steering_vector(model, TEXT, OTHER, 2, tap=tap).vector
    a, b = (read(model, t, tap=tap).run("blocks.2.resid_pre")[0]["blocks.2.resid_pre"][0, -1] for t in (TEXT, OTHER))
    torch.testing.assert_close(made, (a - b).float())


def test_paths_take_no_edits() -> None:
    model, tap, _ = edited("gpt2")
    for function in (path_patch, edge_attribution):
        with pytest.raises(InputError, match=r"edits of a tap would not be seen: leave tap out, or use activation_patch\(tap=\.\.\.\)"):
            function(model, TEXT, OTHER, target=TARGET, tap=tap)


# A logit as a sum

INSIDE: dict[str, Any] = {
    "a head": Zero("blocks.1.attn.z[2]"),
    "patterns": Scale("blocks.*.attn.pattern[1]", 0.5),
    "queries": Add("blocks.0.attn.q", 0.3),
    "units": Scale("blocks.1.ffn.post", 1.5),
    "embedding": Scale("embed", 0.9),
    "a feed-forward": Scale("blocks.0.ffn.out", 0.5),
}
BESIDE: dict[str, Any] = {
    "stream": Scale("blocks.1.resid_post", 2.0, positions="3:"),
    "scaled stream": Scale("resid_final", 1.1),
    "attention's sum": Scale("blocks.1.attn.out", 0.7),
    "logits": Scale("logits", 1.2),
}


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "bert"])
def test_parts_sum_to_the_edited_logit(name: str, what: str) -> None:
    model = zoo.model(name)
    tap = Intervention(what, (INSIDE[what],)).tap(model)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([TEXT]), tap=tap)[0, 5]
    want = logits if name != "sandwich" else 30 * torch.atanh(logits / 30)  # its read-out has a soft-cap of 30
    for by in ("head", "layer"):
        found = direct_logit_attribution(model, TEXT, target=TARGET, positions=5, by=by, tap=tap)
        assert found.sum == pytest.approx(float(want[3] - want[7]), abs=1e-4) and found.actual == pytest.approx(found.sum, abs=1e-4)
    if what == "a head":
        assert direct_logit_attribution(model, TEXT, target=TARGET, tap=tap)["1.2"] == 0
    assert decompose(model, TEXT, position=5, tap=tap).logits(TARGET).sum == pytest.approx(found.sum, abs=1e-4)


@pytest.mark.parametrize("what", BESIDE)
def test_edits_beside_the_parts_are_refused(what: str) -> None:
    model = zoo.model("gpt2")
    tap = Intervention(what, (BESIDE[what],)).tap(model)
    for by in ("head", "layer", "neuron", "source"):
        with pytest.raises(InputError, match=r"With these edits the parts sum to -?[0-9.]+, but the model computes .* ask by ablate\(tap=\.\.\.\)"):
            direct_logit_attribution(model, TEXT, target=TARGET, by=by, tap=tap)
    with pytest.raises(InputError, match="With these edits the parts sum to"):
        decompose(model, TEXT, tap=tap).logits(TARGET)
    with pytest.raises(InputError, match="With these edits the parts sum to"):  # what heads read no longer makes what they give
        direct_logit_attribution(model, TEXT, target=TARGET, by="source", tap=Intervention("z", (Scale("blocks.1.attn.z", 2.0),)).tap(model))


# The command line


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import glassformer as gf
    from glassformer.cli import app as cli

    model = zoo.model("gpt2")
    gf.save(model, tmp_path / "m", tokenizer=zoo.words())
    Intervention("off", (Zero("blocks.1.attn.z[2]"),)).save(tmp_path / "off.json")
    Intervention("beside", (Scale("blocks.1.resid_post", 2.0),)).save(tmp_path / "beside.json")

    def look(*words: str, edits: str = "off.json") -> tuple[int, str, str]:
        code = cli.main(["look", *words, "--model", str(tmp_path / "m"), "--edits", str(tmp_path / edits)])
        said = capsys.readouterr()
        return code, said.out, said.err

    text, other = "the old man saw", "the old fox ran"
    for words, title in (
        (["ablate", text, "-w", "1.2"], "ablation (zero)"),
        (["patch", text, other, "--memory", "1"], "activation patching of resid_pre"),
        (["trace", text, "--subject", "old", "--samples", "1"], "causal tracing of old"),
    ):
        code, out, err = look(*words)
        assert code == 0 and out.startswith(title), err
    off = ablate(model, text, "1.2", tokenizer=zoo.words(), tap=Intervention("off", (Zero("blocks.1.attn.z[2]"),)).tap(model))
    assert f"before {off.logit_before:.4g}" in look("ablate", text, "-w", "1.2")[1]
    assert look("attribute", text)[0] == 0
    assert "With these edits the parts sum to" in look("attribute", text, edits="beside.json")[2]
    code, _, err = look("attribute", text, "--by", "rollout")
    assert code == 2 and "use --edits with --by head, layer, neuron or source" in err
    code, out, err = look("steer", text, "-p", "a red fox", "-n", "a big dog", "-l", "1", "-s", "2", "--tokens", "2")
    assert code == 0 and "steering along" in out, err


def test_a_vector_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import glassformer as gf
    from glassformer.cli import app as cli
    from glassformer.look.edits import load_edits

    model = zoo.model("gpt2")
    gf.save(model, tmp_path / "m", tokenizer=zoo.words())
    vector, edits = tmp_path / "v.safetensors", tmp_path / "v.json"

    def steered(*words: str) -> tuple[int, str, str]:
        code = cli.main(["look", "steer", "the old man", "--model", str(tmp_path / "m"), "--tokens", "2", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    made = ["-p", "a red fox", "-n", "a big dog", "-l", "1"]
    code, first, err = steered(*made, "-s", "3", "--from", "1", "--save-vector", str(vector), "--save-edits", str(edits))
    assert code == 0 and f"wrote {vector}" in first and f"wrote {edits}" in first, err
    want = steering_vector(model, "a red fox", "a big dog", 1, tokenizer=zoo.words())
    assert torch.equal(SteeringVector.load(vector).vector, want.vector) and load_edits(edits) == want.intervention(3, 1)
    again = steered("--vector", str(vector), "-s", "3", "--from", "1")[1]
    assert again.strip() == first.split("wrote ")[0].strip()
    narrow = SteeringVector(torch.ones(5), 1).save(tmp_path / "narrow.safetensors")
    for words, says in (
        (["--vector", str(vector), *made], "leave --positive, --negative and --layer out"),
        (["-p", "a red fox"], "A direction is needed: give --positive, --negative and --layer, or a saved one by --vector"),
        (["--vector", str(narrow)], "vector has shape [5]"),
        (["--vector", str(tmp_path / "none.safetensors")], "There is no steering vector at"),
        ([*made, "--save-edits", str(edits)], "--save-edits keeps the vector at one strength, but 0 were given"),
        ([*made, "--save-vector", str(tmp_path / "x.json")], "a steering vector is saved as .safetensors"),
        ([*made, "-s", "1", "--save-edits", str(tmp_path / "x.txt")], "'x.txt' ends in '.txt', but edits are saved as .json or .safetensors"),
    ):
        code, out, err = steered(*words)
        assert code == 2 and says in err and not out, "said before anything is written or shown"
