"""Activation patching, its estimate by a gradient, ablation, causal tracing: against single edits, against the weights, and on the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.cli import app as cli
from glassformer.core.errors import InputError, SiteError
from glassformer.core.tap import Edit
from glassformer.look import patching
from glassformer.look.ablation import ablate, ablate_heads
from glassformer.look.patching import activation_patch, attribution_patch, correlations
from glassformer.look.subject import feedforward_of, read
from glassformer.look.tracing import causal_trace
from look import zoo
from look.once import commands_built_once  # noqa: F401  (a fixture)

TARGET = (3, 7)
CLEAN, BAD = zoo.ids(7, 0), zoo.ids(7, 5)


def given(name: str) -> dict[str, Any]:
    return {"clean": CLEAN, "corrupted": BAD, "target": TARGET} | ({"source": zoo.ids(6, 1)} if name == "t5" else {})


def diff(logits: Tensor) -> float:
    return float(logits.detach()[0, -1, TARGET[0]] - logits.detach()[0, -1, TARGET[1]])


# Activation patching


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "parallel", "experts", "bert", "t5"])
def test_a_patch_is_one_edit(name: str) -> None:
    """Heads, and positions of the stream: each value of the sweep is one forward pass with an edit."""
    model, rest = zoo.model(name).double(), given(name)
    a, b = (read(model, rest[k], source=rest.get("source")) for k in ("clean", "corrupted"))
    clean, _ = a.run("**")
    heads = activation_patch(model, **rest, site="z", normalise=False)
    stream = activation_patch(model, **rest, site="mlp_out", normalise=False)
    assert heads.by == ("layer", "head") and stream.by == ("layer", "position")
    for layer, inner in ((0, 1), (1, 3)):
        z = f"{a.prefix}blocks.{layer}.attn.z"
        out = f"{a.prefix}blocks.{layer}.{feedforward_of(a.stack, layer)}.out"

        def head(x: Tensor, path: str = z, i: int = inner) -> Tensor:
            return torch.cat([x[:, :, :i], clean[path][:, :, i : i + 1], x[:, :, i + 1 :]], 2)

        def place(x: Tensor, path: str = out, i: int = inner) -> Tensor:
            return torch.cat([x[:, :i], clean[path][:, i : i + 1], x[:, i + 1 :]], 1)

        with torch.no_grad():
            assert float(heads.values[layer, inner]) == pytest.approx(diff(model(*b.inputs, tap=Edit(z, head))), abs=1e-5)
            assert float(stream.values[layer, inner]) == pytest.approx(diff(model(*b.inputs, tap=Edit(out, place))), abs=1e-5)


def test_both_ends_of_the_scale() -> None:
    """Patching the whole last stream gives 1, patching what is equal gives 0; the noising direction runs the other way."""
    model = zoo.model("llama")
    whole = activation_patch(model, **given("llama"), site="resid_post", by="layer")
    assert float(whole.values[-1]) == pytest.approx(1.0, abs=1e-4)
    back = activation_patch(model, **given("llama"), site="resid_post", by="layer", direction="noise")
    assert float(back.values[-1]) == pytest.approx(0.0, abs=1e-4)
    half = list(CLEAN)
    half[-1] = BAD[-1]
    last = activation_patch(model, CLEAN, half, "resid_pre", target=TARGET)
    torch.testing.assert_close(last.values[0, :-1], torch.zeros(6), atol=1e-5, rtol=0)  # the texts differ at the last position only
    assert float(last.values[0, -1]) == pytest.approx(1.0, abs=1e-4)


def test_axes_sites_and_metrics() -> None:
    model, rest = zoo.model("llama"), given("llama")
    three = activation_patch(model, **rest, site="z", by="layer,position,head")
    assert three.values.shape == (3, 7, 4) and len(three.best(3)) == 3
    assert activation_patch(model, **rest, site="k").values.shape == (3, 2)  # key/value heads
    assert activation_patch(model, **rest, site="pattern", positions=[2, 6], by=("position", "head"), layers=[1]).values.shape == (2, 4)
    z, result = (activation_patch(model, **rest, site=s).values for s in ("z", "result"))
    torch.testing.assert_close(z, result, atol=1e-4, rtol=1e-4)
    for metric in ("logit", "prob", "logprob", "kl"):
        assert activation_patch(model, **rest, metric=metric).values.isfinite().all()
    own = activation_patch(model, **rest, site="z", metric=lambda x: x[:, 3] - x[:, 7])
    torch.testing.assert_close(own.values, z, atol=1e-4, rtol=1e-4)
    small = activation_patch(model, **rest, site="z", memory=1)  # one row at a time
    torch.testing.assert_close(small.values, z, atol=1e-4, rtol=1e-4)
    for shown in (three, small):
        assert "1 is the clean run" in str(shown) and shown.plot() is not None


def test_the_answer_says_which_number_it_is() -> None:
    """One target: its logit. Two: their difference, on the scale of the two runs."""
    model, rest = zoo.model("llama"), given("llama")
    pair = activation_patch(model, **rest, site="z")
    assert pair.metric == "logit difference of ‹3› − ‹7›" and pair.title.endswith("logit difference of ‹3› − ‹7›")
    assert pair.grid().columns[-1] == "logit difference, normalised"
    one = activation_patch(model, **(rest | {"target": 3}), site="z", normalise=False)
    assert one.title.endswith("(denoise): logit of ‹3›") and one.grid().columns[-1] == "logit"
    torch.testing.assert_close(one.values, activation_patch(model, **(rest | {"target": 3}), site="z", metric="logit", normalise=False).values)
    with torch.no_grad():
        ends = [diff(model(torch.tensor([t]))) for t in (BAD, CLEAN)]
    plain = activation_patch(model, **rest, site="z", normalise=False)
    torch.testing.assert_close(pair.values, (plain.values - ends[0]) / (ends[1] - ends[0]), atol=1e-4, rtol=1e-4)
    bits = activation_patch(model, **rest, site="resid_post", by="layer", metric="kl", normalise=False)
    assert bits.grid().columns[-1] == "KL from the clean run, bits"
    with torch.no_grad():
        p, q = (model(torch.tensor([t]))[0, -1].double().log_softmax(-1) for t in (CLEAN, BAD))
    assert bits.corrupted == pytest.approx(float((p.exp() * (p - q) / torch.tensor(2.0).double().log()).sum()), rel=1e-5)


def test_where_both_runs_give_the_same_number_the_reason_is_said() -> None:
    model, late = zoo.model("gpt2"), [*CLEAN[:4], BAD[4] if BAD[4] != CLEAN[4] else 1, *CLEAN[5:]]
    for change, says in (
        ({"corrupted": CLEAN}, "there is nothing to restore: give two texts that differ"),
        ({"corrupted": late, "position": 2}, "read at position 2, which does not see position 4, where the texts differ first: give position=4 or a later one"),
        ({"metric": lambda x: 0 * x[:, 0]}, "name a target that the texts decide differently, or give normalise=False"),
    ):
        with pytest.raises(InputError, match=says):
            activation_patch(model, **(given("gpt2") | change))


def test_known_names() -> None:
    model = zoo.model("gpt2")
    for name in (n for n in vars(patching) if n.startswith("get_act_patch")):
        found = getattr(patching, name)(model, CLEAN, BAD, target=TARGET)
        assert len(found.by) == found.values.ndim and found.values.isfinite().all()
    heads = patching.get_act_patch_attn_head_out_all_pos(model, CLEAN, BAD, target=TARGET)
    torch.testing.assert_close(heads.values, activation_patch(model, **given("gpt2"), site="z").values)


def test_cross_attention_is_patched_too() -> None:
    model, rest = zoo.model("t5"), given("t5")
    assert activation_patch(model, **rest, site="cross.z", by="layer,head").values.shape == (2, 4)
    other = activation_patch(model, **rest, corrupted_source=zoo.ids(6, 8), site="cross.v", by="layer,position")
    assert other.values.shape == (2, 6) and other.values.isfinite().all()


def test_the_estimate_is_the_slope() -> None:
    """Close texts (the embedding moved a little): the estimate of a patch is its exact change; and it says how well it does."""
    model = zoo.model("gpt2").double()
    with torch.no_grad():
        model.embed.weight[5] = model.embed.weight[4] + 1e-4 * torch.randn(zoo.D, dtype=torch.float64)
    one, two = [1, 4, 2, 4, 9, 3], [1, 5, 2, 5, 9, 3]
    for site in ("resid_pre", "z", "q", "k", "v", "pattern", "mlp_out"):
        found = attribution_patch(model, one, two, site, target=TARGET, exact=True, normalise=False)
        assert found.exact is not None and found.pearson is not None and found.pearson > 0.999
        torch.testing.assert_close(found.values, found.exact, rtol=2e-2, atol=2e-7)
    assert "Pearson" in str(found) and found.plot(dark=True) is not None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("direction", "nothing"), [("denoise", 0.0), ("noise", 1.0)])
def test_an_estimate_is_a_change_and_says_so(direction: str, nothing: float) -> None:
    """The exact value is the exact change plus what a patch gives that changes nothing; both tables and both figures name their number."""
    model, rest = zoo.model("llama"), given("llama") | {"site": "z", "direction": direction}
    value, change = activation_patch(model, **rest), attribution_patch(model, **rest, exact=True)
    assert change.exact is not None
    torch.testing.assert_close(value.values, change.exact + nothing, atol=1e-4, rtol=1e-4)
    assert value.grid().columns[-1] == "logit difference, normalised"
    assert f"a patch that changes nothing gives {nothing:g}" in value.grid().note
    assert change.grid().columns[-2:] == ("change of logit difference, normalised", "exact change")
    assert f"({direction}): change of logit difference of" in change.title and "(0: nothing changed)" in change.grid().note
    for result in (value, change):
        assert [a.get_ylabel() for a in result.plot().axes][-1] == "change, normalised"


def test_a_path_of_one_layer_is_refused() -> None:
    for site, name in (("blocks.9.resid_pre", "resid_pre"), ("blocks.*.attn.z", "attn.z"), ("decoder.blocks.0.resid_pre", "resid_pre")):
        with pytest.raises(SiteError, match=re.escape(f"every layer from 0 to 2 is asked: give the name within a block, {name!r}")):
            activation_patch(zoo.model("llama"), **given("llama"), site=site)


def test_a_sweep_asks_for_each_layers_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every one of its places."""
    from glassformer.look import patching_places

    asked: list[int] = []
    found = patching_places.site_path
    monkeypatch.setattr(patching_places, "site_path", lambda s, site, layer: asked.append(layer) or found(s, site, layer))
    activation_patch(zoo.model("gpt2"), zoo.ids(9), zoo.ids(9, 1), "z", by=("layer", "position", "head"))
    assert asked == [0, 1, 2]


def test_correlations() -> None:
    x = torch.tensor([1.0, 2, 3, 4])
    assert correlations(x, 2 * x + 1) == (pytest.approx(1), pytest.approx(1))
    assert correlations(x, x**5)[1] == pytest.approx(1) and correlations(x, x**5)[0] < 0.95
    assert correlations(torch.tensor([1.0, 1, 2]), torch.tensor([3.0, 1, 2]))[1] == pytest.approx(0.0, abs=1e-9)  # ties share their rank


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"corrupted": BAD[:-1]}, InputError, "the first has 7 tokens .* and the second 6"),
        ({"site": "resid_prx"}, SiteError, "meets no site of this model"),
        ({"by": "layers"}, InputError, "'layers' is no axis of a sweep"),
        ({"site": "resid_pre", "by": "head"}, InputError, "'resid_pre' has no heads to patch one by one"),
        ({"layers": [7]}, SiteError, "Layer 7 was asked for, but the model has 3 layers"),
        ({"metric": "logits"}, InputError, "'logits' is no metric"),
        ({"metric": lambda x: x.sum()}, InputError, "it gives one number per row"),
        ({"direction": "up"}, InputError, "'up' is no direction"),
        ({"corrupted": CLEAN}, InputError, "in both runs, so there is nothing to restore"),
        ({"memory": 0}, InputError, "memory=0: it is the number of bytes"),
        ({"positions": [9]}, InputError, "Position 9 was asked for, but the text has 7 tokens"),
    ],
)
def test_what_cannot_be_patched_is_said(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        activation_patch(zoo.model("gpt2"), **(given("gpt2") | change))


# Ablation


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "reordered", "parallel", "bert"])
def test_zero_ablation_is_zeroing_the_weights(name: str) -> None:
    """A head: its columns of the output projection; a unit: its column of the way down."""
    model = zoo.model(name).double()
    text = zoo.ids(7)
    found = ablate(model, text, ["1.2", "ffn 0.5"], target=TARGET)
    for i, (layer, matrix, columns) in enumerate(((1, "attn.out", slice(8, 12)), (0, "ffn.down", slice(5, 6)))):
        changed = zoo.model(name).double()
        with torch.no_grad():
            changed.blocks[layer].get_submodule(matrix).weight[:, columns] = 0
            want = diff(changed(torch.tensor([text])))
        assert float(found.logit[i]) == pytest.approx(want, abs=1e-5)
    both = zoo.model(name).double()
    with torch.no_grad():
        both.blocks[1].attn.out.weight[:, 8:12] = 0
        both.blocks[0].ffn.down.weight[:, 5] = 0
        assert float(found.logit[2]) == pytest.approx(diff(both(torch.tensor([text]))), abs=1e-5)
    heads = ablate_heads(model, text, target=TARGET)
    assert heads["1.2"] == pytest.approx(float(found.logit[0]) - found.logit_before, abs=1e-5)
    assert found.names == ("1.2", "ffn 0.5", "all of them") and "then first" in str(found)


def test_a_block_away_is_a_model_without_it() -> None:
    """Whatever the wiring: the stream leaves the block as it came."""
    for name in ("gpt2", "sandwich", "bert", "parallel"):
        model, text = zoo.model(name).double(), zoo.ids(7)
        found = ablate(model, text, "block 1", target=TARGET)
        del model.blocks[1]
        assert float(found.logit[0]) == pytest.approx(diff(model(torch.tensor([text]))), abs=1e-5), name


def test_divergence_is_in_bits() -> None:
    model, text = zoo.model("gpt2"), zoo.ids(7)
    found = ablate(model, text, "attn 1", target=TARGET)
    with torch.no_grad():
        p, q = (model(torch.tensor([text]), tap=t)[0, -1].double().softmax(-1) for t in (None, Edit("blocks.1.attn.out", torch.zeros_like)))
    assert float(found.kl[0]) == pytest.approx(float((p * (p / q).log2()).sum()), rel=1e-4)
    assert "KL, bits" in found.grid().columns and "KL, bits" in ablate_heads(model, text).grid().columns


def test_means_and_samples() -> None:
    model, texts = zoo.model("llama").double(), [zoo.ids(6, 2), zoo.ids(8, 3)]
    text = zoo.ids(7)
    found = ablate(model, text, "1.2", how="mean", reference=texts, target=TARGET)
    pool = torch.cat([read(model, t).run("blocks.1.attn.z")[0]["blocks.1.attn.z"][0, :, 2] for t in texts])

    def put(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :2], pool.mean(0).expand(1, 7, 1, -1), x[:, :, 3:]], 2)

    with torch.no_grad():
        want = diff(model(torch.tensor([text]), tap=Edit("blocks.1.attn.z", put)))
    assert float(found.logit[0]) == pytest.approx(want, abs=1e-5)
    one, two, three = (ablate(model, text, "1.2", how="resample", reference=texts, seed=s).kl for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
    same = ablate(model, [4, 4, 4, 4], ["0.1", "block 0"], how="mean")  # without positions in play every position has the mean already
    assert float(same.kl[0]) < 1e-9


def test_notation_of_parts() -> None:
    model = zoo.model("gpt2")
    text = zoo.ids(7)
    said = ablate(model, text, ["L1H2", (1, 2), "ffn 1", "mlp 1", ("ffn", 1, 3), "attn 0", ("block", 2), "position -1"])
    assert said.names[:-1] == ("1.2", "1.2", "ffn 1", "ffn 1", "ffn 1.3", "attn 0", "block 2", "position 6")
    assert torch.equal(said.logit[0], said.logit[1])
    late = ablate(model, text, "1.2", positions=[0], target=TARGET)
    assert not torch.equal(late.logit, ablate(model, text, "1.2", target=TARGET).logit)
    assert ablate(zoo.model("t5"), text, "cross 1.2", source=zoo.ids(6)).kl[0] > 0
    assert ablate_heads(zoo.model("t5"), text, kind="cross", source=zoo.ids(6)).change.shape == (2, 4)
    assert ablate_heads(model, text).plot() is not None and said.plot(dark=True) is not None


@pytest.mark.parametrize(
    ("what", "how", "error", "says"),
    [
        ("0.9", "zero", SiteError, "Head 0.9 was asked for, but layer 0 has 4 heads, 0 to 3"),
        ("9.0", "zero", SiteError, "Layer 9 was asked for, but the model has 3 layers"),
        ("ffn 1.99", "zero", SiteError, "Unit 1.99 was asked for, but the feed-forward layer 1 has 24 units"),
        ("the third", "zero", SiteError, "'the third' names no part: write '2.0'"),
        ("cross 0.1", "zero", SiteError, "names cross-attention, but layer 0 of this model has none"),
        ([], "zero", InputError, "Nothing to take away was named"),
        ("0.1", "off", InputError, "'off' is no way to ablate"),
        ("position 9", "zero", InputError, "Position 9 was asked for"),
    ],
)
def test_what_cannot_be_taken_away_is_said(what: Any, how: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ablate(zoo.model("gpt2"), zoo.ids(7), what, how=how)


def test_units_of_experts_are_refused() -> None:
    with pytest.raises(SiteError, match="mixture of experts, whose units see only some tokens: 'ffn 1' takes it whole"):
        ablate(zoo.model("experts"), zoo.ids(7), "ffn 1.3")
    assert ablate(zoo.model("experts"), zoo.ids(7), "ffn 1").kl[0] > 0


# Causal tracing


@pytest.mark.parametrize("name", ["gpt2", "llama", "parallel", "t5", "bert"])
def test_tracing_is_its_loop(name: str) -> None:
    """Seeded noise on the subject, one state restored: the mean over samples, by plain forward passes."""
    model, text = zoo.model(name).double(), zoo.ids(6)
    source = {"source": zoo.ids(5, 1)} if name == "t5" else {}
    found = causal_trace(model, text, [1, 2], target=3, samples=2, window=2, noise=2.0, seed=4, **source)
    s = read(model, text, **source)
    clean, _ = s.run("**")
    draw = torch.Generator().manual_seed(4)
    table = s.stack.embed
    size = 2.0 * float(table.weight.float().std()) * float(table.factor)
    kind, layer, i = 1, 1, 3
    want, start = 0.0, 0.0
    for _ in range(2):
        noise = size * torch.randn(2, zoo.D, generator=draw).double()
        full = torch.zeros(1, 6, zoo.D, dtype=torch.float64)
        full[0, 1:3] = noise
        tap: Any = Edit(f"{s.prefix}embed", lambda x, n=full: x + n)
        with torch.no_grad():
            start += float(model(*s.inputs, tap=tap)[0, -1].softmax(-1)[3]) / 2
            for n in (0, 1):  # the window of layer 1

                def put(x: Tensor, n: int = n) -> Tensor:
                    return torch.cat([x[:, :i], clean[f"{s.prefix}blocks.{n}.attn.out"][:, i : i + 1], x[:, i + 1 :]], 1)

                tap = tap | Edit(f"{s.prefix}blocks.{n}.attn.out", put)
            want += float(model(*s.inputs, tap=tap)[0, -1].softmax(-1)[3]) / 2
    assert float(found.values[kind, layer, i]) == pytest.approx(want, abs=1e-6)
    assert found.corrupted == pytest.approx(start, abs=1e-6)
    assert found.values.shape == (3, s.layers, 6)
    last = -1 if s.causal else None
    if last is not None:
        assert float(found.values[0, -1, -1]) == pytest.approx(found.clean, abs=1e-6)  # the last stream at the last position is all that is read
    assert "* the subject" in str(found) and found.plot() is not None


def test_tracing_says_where_nothing_was_lost() -> None:
    """Noise that lowers no probability leaves nothing to restore: note and figure say so; one colour bar for all panels."""
    model, text = zoo.model("gpt2"), zoo.ids(6)
    found = causal_trace(model, text, [1, 2], samples=1)
    for clean, lost in ((found.corrupted + 0.1, False), (found.corrupted, True), (found.corrupted / 2, True)):
        made = replace(found, clean=clean)
        figure = made.plot()
        assert made.lowered is not lost and len(figure.axes) == len(made.kinds) + 1
        for shown in (made.grid().note, figure.get_suptitle()):
            assert ("The noise did not lower the probability, so there is nothing to restore" in shown) is lost


def test_tracing_says_what_is_missing() -> None:
    model = zoo.model("gpt2")
    with pytest.raises(InputError, match="The subject is missing"):
        causal_trace(model, zoo.ids(6), None)
    with pytest.raises(InputError, match="samples=0: a whole number of at least 1"):
        causal_trace(model, zoo.ids(6), 1, samples=0)
    with pytest.raises(InputError, match="'mlp' is no kind of state"):
        causal_trace(model, zoo.ids(6), 1, kinds=["mlp"])


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of words, saved."""
    from glassformer.weights import own

    path = tmp_path_factory.mktemp("model") / "small"
    own.save(zoo.model("gpt2"), path, tokenizer=zoo.words())
    return path


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args, says in (
        (["patch", "the old man saw Rome", "the old fox saw Paris", "--site", "z", "--by", "layer,head"], "activation patching of z"),
        (["patch", "the old man saw Rome", "the old fox saw Paris", "--site", "z", "--estimate", "--metric", "logit"], "Pearson"),
        (["ablate", "the old man saw", "--how", "mean"], "ablation (mean) of each head"),
        (["ablate", "the old man saw", "-w", "0.1", "-w", "ffn 1.3"], "all of them"),
        (["steer", "the old man", "-p", "a red fox", "-n", "a big dog", "--layer", "1", "--tokens", "3", "--from", "2"], "steering along"),
        (["trace", "the old man saw", "--subject", "old man", "--samples", "2"], "causal tracing"),
    ):
        file = tmp_path / f"{args[0]}.json"
        assert cli.main(["look", *args, "--model", str(folder), "--out", str(file)]) == 0, capsys.readouterr().err
        assert says in capsys.readouterr().out and file.stat().st_size > 100
    for args, says in (
        (["patch", "the old man", "the old"], "choose words of equally many tokens"),
        (["patch", "the old man", "the red fox", "--site", "zz"], "meets no site of this model"),
        (["ablate", "the old man", "-w", "7.1"], "Layer 7 was asked for"),
        (["trace", "the old man", "--subject", "Paris"], "'Paris' does not stand in the text"),
        (["steer", "the old man", "-p", "a", "-n", "a", "--layer", "1"], "the same mean there"),
    ):
        assert cli.main(["look", *args, "--model", str(folder)]) == 2
        assert says in capsys.readouterr().err
