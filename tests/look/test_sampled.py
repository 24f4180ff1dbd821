"""``look.sampling``: what it shows is what the chain does, at the right place, with the text as history."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.errors import InputError, SamplerError
from glassformer.infer import DRY, Chain, Draw, Greedy, LogitBias, MinP, Penalties, Temperature, TopK, generate
from glassformer.look import Sampling, sampling
from look import zoo


def distribution(name: str, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = zoo.model(name)(torch.tensor([ids]))[0, -1].double()
    return logits


def test_every_stage_is_the_softmax_of_what_the_link_leaves() -> None:
    ids = list(zoo.ids(9))
    logits = distribution("llama", ids)
    found = sampling(zoo.model("llama"), ids, Temperature(0.5) | TopK(5) | MinP(0.2), k=10)
    heated = (logits / 0.5).softmax(-1)
    five = torch.where(heated >= heated.topk(5).values[-1], heated, 0.0)
    last = torch.where(five >= 0.2 * five.max(), five, 0.0)
    for s, p in enumerate((logits.softmax(-1), heated, five / five.sum(), last / last.sum())):
        torch.testing.assert_close(found.p[s].double(), p[found.ids], atol=1e-6, rtol=1e-4)
    assert found.left[1:3] == (len(logits), 5)
    assert found.left[3] == int((last > 0).sum())
    assert found.removed[2].item() == pytest.approx(1 - float(five.sum()), abs=1e-5)
    assert found.removed[3].item() == pytest.approx(1 - float(last.sum() / five.sum()), abs=1e-5)
    alive = last[last > 0] / last.sum()
    assert found.entropy[3].item() == pytest.approx(float(-(alive * alive.log2()).sum()), abs=1e-4)
    assert found.drawn is None


def test_the_drawn_token_is_the_one_that_generation_draws() -> None:
    ids = list(zoo.ids(7))
    for seed in range(5):
        chain = TopK(20) | Draw(seed=seed)
        found = sampling(zoo.model("llama"), ids, chain, seed=seed)
        state = chain.state(1, seed=seed)
        (token,) = chain(distribution("llama", ids)[None].float(), [ids], state).tolist()
        assert found.drawn == str(token) or str(token) in (found.drawn or "")


def test_greedy_agrees_with_generate() -> None:
    ids = list(zoo.ids(7))
    out = generate(zoo.model("llama"), ids, max_new_tokens=1)
    assert str(out.ids[0]) in (sampling(zoo.model("llama"), ids, Greedy()).drawn or "")


def test_the_text_up_to_the_position_is_the_history() -> None:
    ids = [5, 6, 7, 8, 5, 6]
    model = zoo.model("llama")
    found = sampling(model, ids, Penalties(presence=100.0) | Greedy(), position=3, k=200)
    gone = {int(i) for i, p in zip(found.ids, found.p[-1], strict=True) if p < 1e-20}
    assert gone == {5, 6, 7, 8}
    repeated = sampling(model, ids, DRY(100.0, allowed_length=2), k=200)
    assert [int(i) for i, p in zip(repeated.ids, repeated.p[-1], strict=True) if p < 1e-20] == [7]


def test_a_token_that_is_lifted_is_shown() -> None:
    ids = list(zoo.ids(5))
    worst = int(distribution("llama", ids).argmin())
    found = sampling(zoo.model("llama"), ids, LogitBias({worst: 30.0}), k=4)
    assert worst in found.ids.tolist()
    assert found.best(1)[0][1] > 0.99


def test_links_that_are_off_have_no_stage_and_settings_build_the_chain() -> None:
    found = sampling(zoo.model("llama"), list(zoo.ids(5)), top_k=3, min_p=0.0, seed=1)
    assert found.stages == ("model", "TopK(k=3)")
    assert "3 tokens left" in str(found)


@pytest.mark.parametrize("dark", [False, True])
def test_it_draws_a_panel_per_stage(dark: bool) -> None:
    found = sampling(zoo.model("llama"), list(zoo.ids(5)), temperature=0.5, top_k=8, order=["top_k", "temperature"])
    figure = found.plot(dark)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["model", "TopK(k=8)", "Temperature(t=0.5)"]


def test_what_several_passes_make_of_the_numbers_is_a_stage_of_its_own() -> None:
    """Guidance and contrast by hand, DoLa by its own first step; the links come behind."""
    ids, other = list(zoo.ids(6)), [3, 5]
    c, u = (distribution("llama", row).log_softmax(-1) for row in (ids, other))
    found = sampling(zoo.model("llama"), ids, guidance_scale=1.5, negative_prompt=other, top_k=4, k=12)
    assert found.stages == ("model", "guidance_scale=1.5, negative_prompt=[3, 5]", "TopK(k=4)")
    torch.testing.assert_close(found.p[0].double(), c.exp()[found.ids], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.p[1].double(), (u + 1.5 * (c - u)).softmax(-1)[found.ids], atol=1e-6, rtol=1e-4)
    amateur = zoo.model("llama").spec.at("final_norm.eps").set(1.0).build(seed=3)
    found = sampling(zoo.model("llama"), ids, Greedy(), contrast=amateur, contrast_alpha=0.1)
    assert found.stages == ("model", "contrast, contrast_alpha=0.1")
    want = generate(zoo.model("llama"), ids, contrast=amateur, contrast_alpha=0.1, max_new_tokens=1)
    assert str(want.ids[0]) in (found.drawn or "")
    deep = sampling(zoo.model("llama"), ids, dola_layers="low", position=3)
    traced = generate(zoo.model("llama"), ids[:4], dola_layers="low", max_new_tokens=1, trace=True).trace
    assert traced is not None
    assert float(deep.entropy[1]) == pytest.approx(traced[0].stages[0].entropy, abs=1e-4)
    with pytest.raises(InputError, match="guidance_scale is shown for a decoder as it is: leave tap out"):
        sampling(zoo.model("llama"), ids, guidance_scale=2.0, tap=gf.Record("resid_final"))


def test_mistakes_are_said() -> None:
    model, ids = zoo.model("llama"), list(zoo.ids(4))
    with pytest.raises(SamplerError, match="were both given: put what you want into the sampler"):
        sampling(model, ids, TopK(3), top_p=0.5)
    with pytest.raises(InputError, match="The chain has no links"):
        sampling(model, ids, Chain(()))
    with pytest.raises(SamplerError, match="did you mean 'temperature'|Did you mean"):
        sampling(model, ids, temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="at least 1 token is listed"):
        sampling(model, ids, top_k=3, k=0)


def test_the_command_says_what_generate_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gf.save(zoo.model("llama"), tmp_path / "m", zoo.words())
    out = tmp_path / "s.json"
    assert main(["look", "sampling", "the fox", "--model", str(folder), "--out", str(out)]) == 0
    assert "Temperature(t=0.8)" in capsys.readouterr().out
    assert out.exists()
    assert main(["look", "sampling", "the fox", "--model", str(folder), "--top-k", "3", "--set", "top_a=0.2"]) == 0
    said = capsys.readouterr().out
    assert "TopK(k=3): 3 tokens left" in said
    assert "Temperature" not in said
    assert main(["look", "sampling", "the fox", "--model", str(folder), "--guidance-scale", "1.5", "--amateur", str(folder)]) == 2
    assert "choose one" in capsys.readouterr().err
    assert main(["look", "sampling", "the fox", "--model", str(folder), "--dola-layers", "0,1"]) == 0
    assert "dola_layers=[0, 1]: " in capsys.readouterr().out
    assert main(["look", "sampling", "the fox", "--model", str(folder), "--top-k", "3", "--set", "top_k=4"]) == 2
    assert "top_k was given twice" in capsys.readouterr().err
    assert isinstance(sampling(gf.load(folder), "the fox", top_k=2), Sampling)
