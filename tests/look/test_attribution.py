"""A logit as a sum of parts: it sums up for every kind of model, agrees with hand-made oracles, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.core.errors import InputError, SiteError
from glassformer.look import attention_rollout, decompose, direct_logit_attribution, value_contribution
from glassformer.look.linear import Frozen
from glassformer.parts.feedforward import ClampedGated, Gated, Plain
from look import zoo
from look.once import commands_built_once  # noqa: F401  (a fixture)

MORE: dict[str, Any] = {
    "tanh": gf.Decoder(zoo.V, zoo.D, (zoo.block(norm=gf.DynamicTanh(0.7), wiring=gf.PostNorm()),) * 2, final_norm=gf.DynamicTanh()),
    "factorised": gf.Encoder(
        zoo.V,
        zoo.D,
        (zoo.block(wiring=gf.PostNorm()),) * 2,
        final_norm=gf.NoNorm(),
        position=gf.Learned(32),
        embedding=gf.Embedding(n_types=2, norm=gf.LayerNorm(), lift=gf.LiftSum(8)),
        readout=gf.LanguageModel(bias=True, transform=gf.Dense("sigmoid", gf.LayerNorm(), width=8)),
        tied=True,
    ),
    "shared": gf.Decoder(
        zoo.V,
        zoo.D,
        (
            zoo.block(
                attention=gf.Attention(4, normaliser=gf.SoftmaxSink(), qkv_bias=True),
                feedforward=gf.Experts(4, 2, ClampedGated(12), normalise=False, shared=Plain(8, bias=True)),
                norm=gf.RMSNorm(offset=1.0),
                wiring=gf.Sandwich(),
            ),
        )
        * 2,
    ),
    "latent": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.LatentAttention(2, 8, 4, 4), feedforward=Gated(12), norm=gf.RMSNorm()),) * 2),
}
KINDS = [*zoo.SPECS, *MORE]


def model(name: str, monkeypatch: pytest.MonkeyPatch | None = None) -> Any:
    if name in zoo.SPECS:
        return zoo.model(name)
    zoo.SPECS[name] = MORE[name]
    try:
        return zoo.model(name)
    finally:
        del zoo.SPECS[name]


# The law: parts sum to the whole


@pytest.mark.parametrize("name", KINDS)
def test_parts_sum_to_the_logit(name: str) -> None:
    made, given = model(name), zoo.texts(name)
    for by in ("head", "layer", "neuron", "source"):
        found = direct_logit_attribution(made, **given, by=by)
        assert found.error < 1e-4 and abs(found.sum - found.actual) < 1e-4
        assert len(set(found.names)) == len(found.names)
    made = made.double()
    logits = made(*(torch.tensor([given[k]]) for k in ("source", "text") if k in given))[0]
    if name == "sandwich":  # its read-out has a soft-cap of 30
        logits = 30 * torch.atanh(logits / 30)
    for by in ("head", "neuron", "source"):
        found = direct_logit_attribution(made, **given, by=by, target=(3, 5), positions=[1, 4, 8])
        assert found.error < 1e-9
        torch.testing.assert_close(found.wholes, (logits[:, 3] - logits[:, 5])[[1, 4, 8]].detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_vectors_sum_to_the_last_stream_and_read_alike(name: str) -> None:
    made, given = model(name).double(), zoo.texts(name)
    found = decompose(made, **given, position=4)
    assert found.error < 1e-9 and abs(float(found.along.sum()) - 1) < 1e-9
    grown = found.accumulated()[1]
    torch.testing.assert_close(grown[-1], found.final, atol=1e-9, rtol=0)
    forwards, backwards = found.logits((3, 5)), direct_logit_attribution(made, **given, positions=4, target=(3, 5))
    assert set(forwards.names) == set(backwards.names)
    for part in forwards.names:  # carried forwards and read backwards are two ways to one number
        assert forwards[part] == pytest.approx(backwards[part], abs=1e-9)


def test_heads_split_over_sources_sum_to_the_heads() -> None:
    for name in ("llama", "t5", "sigmoid", "shared"):
        made, given = model(name).double(), zoo.texts(name)
        found, heads = direct_logit_attribution(made, **given, by="source"), direct_logit_attribution(made, **given)
        torch.testing.assert_close(found.values, heads.values, atol=1e-9, rtol=0)
        at = [i for i, p in enumerate(found.parts) if p.kind == "head"]
        torch.testing.assert_close(found.split.sum(1), found.values[at], atol=1e-9, rtol=0)
        torch.testing.assert_close(found.layers().sum(), found.values[[i for i, p in enumerate(found.parts) if "head" in p.kind]].sum(), atol=1e-9, rtol=0)


# Oracles


def test_a_head_is_its_change_of_the_logit_at_a_frozen_scale() -> None:
    made, ids = zoo.model("gpt2").double(), zoo.ids()
    found = direct_logit_attribution(made, ids, target=7)
    whole, tap = gf.Record("final_norm.scale", "blocks.2.attn.result", "blocks.2.ffn.post", "blocks.2.resid_post"), torch.tensor([ids])
    made(tap, tap=whole)
    norm, read = made.final_norm, made.readout.weight[7]
    scale = whole["final_norm.scale"][0, -1]
    worth = lambda v: float((((v - v.mean()) / scale * norm.weight) @ read).detach())
    for h in range(4):
        assert found[f"2.{h}"] == pytest.approx(worth(whole["blocks.2.attn.result"][0, -1, h]), abs=1e-9)
    units = direct_logit_attribution(made, ids, target=7, by="neuron", top=24)
    down = made.blocks[2].ffn.down
    for f in range(24):
        assert units[f"2.ffn.{f}"] == pytest.approx(worth(whole["blocks.2.ffn.post"][0, -1, f] * down.weight[:, f]), abs=1e-9)
    assert units["2.ffn.rest"] == pytest.approx(0.0, abs=1e-12) and units["2.ffn.bias"] == pytest.approx(worth(down.bias), abs=1e-9)
    assert found["final_norm.bias"] == pytest.approx(float((norm.bias @ read).detach()), abs=1e-9)


def test_a_planted_writer_is_found() -> None:
    made, ids = zoo.model("llama", wide=False).double(), zoo.ids()
    with torch.no_grad():
        for block in made.blocks:
            block.attn.out.weight.zero_()
            block.ffn.down.weight.zero_()
        # one unit that fires here, and writes the read-out's direction of token 11
        post = gf.Record("blocks.1.ffn.post")
        made(torch.tensor([ids]), tap=post)
        unit = int(post["blocks.1.ffn.post"][0, -1].argmax())
        made.blocks[1].ffn.down.weight[:, unit] = 1000 * made.readout.weight[11]
    found = direct_logit_attribution(made, ids, target=11, by="neuron", top=2)
    assert found.best(1)[0][0] == f"1.ffn.{unit}" and found.best(1)[0][1] > 0
    others = [n for n in found.names if n not in (f"1.ffn.{unit}", "embed")]
    assert all(abs(found[n]) < 1e-9 for n in others)


def test_frozen_maps_and_their_transposes() -> None:
    draw = torch.Generator().manual_seed(0)
    m = Frozen("m", torch.rand(2, 5, generator=draw), True, torch.randn(5, 3, generator=draw))
    x, r = torch.randn(2, 3, generator=draw), torch.randn(2, 5, generator=draw)
    assert float((m(x) * r).sum()) == pytest.approx(float((x * m.back(r)).sum()), abs=1e-5)


# Rollout and values


def test_rollout_is_the_ten_line_oracle() -> None:
    for name, heads, r in (("gpt2", "mean", 0.5), ("bert", "max", 0.3), ("t5", "min", 0.5), ("sigmoid", "mean", 0.0)):
        made, given = zoo.model(name), zoo.texts(name)
        tap = gf.Record(("decoder." if name == "t5" else "") + "blocks.*.attn.pattern")
        made(*(torch.tensor([given[k]]) for k in ("source", "text") if k in given), tap=tap)
        rolled = None
        for path in tap.paths:
            a = tap[path][0].double().numpy()
            a = getattr(a, heads)(0) * (1 - r)
            for i in range(len(a)):
                a[i, i] += r
            a = a / a.sum(-1, keepdims=True)
            rolled = a if rolled is None else a @ rolled
        found = attention_rollout(made, **given, heads=heads, residual=r)
        torch.testing.assert_close(found.weights.double(), torch.tensor(rolled), atol=1e-5, rtol=0)
    one = attention_rollout(zoo.model("gpt2"), zoo.ids(), residual=1, layer=0)
    assert torch.equal(one.weights, torch.eye(9)) and float(one.values[-1]) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "bert", "t5", "latent"])
def test_value_contributions_equal_the_loop(name: str) -> None:
    made, given = model(name).double(), zoo.texts(name)
    root = "decoder." if name == "t5" else ""
    for kind in ("attn", "cross") if name == "t5" else ("attn",):
        found = value_contribution(made, **given, layer=1, kind=kind)
        tap = gf.Record(f"{root}blocks.1.**")
        made(*(torch.tensor([given[k]]) for k in ("source", "text") if k in given), tap=tap)
        get = lambda site, root=root, tap=tap: tap[f"{root}blocks.1.{site}"][0]
        block = (made.decoder if root else made).blocks[1]
        attn, a, v = getattr(block, kind), get(f"{kind}.pattern"), get(f"{kind}.v")
        w = attn.out.weight.view(zoo.D, attn.n_heads, -1)
        moved = [v[:, h // (attn.n_heads // v.shape[1])] @ w[:, h].T for h in range(attn.n_heads)]
        for h in range(attn.n_heads):
            expected = torch.stack([torch.stack([(a[h, t, s] * moved[h][s]).norm() for s in range(a.shape[2])]) for t in range(9)])
            torch.testing.assert_close(found.norms[h], expected, atol=1e-9, rtol=0)
        t = 8
        vectors = torch.stack([sum(a[h, t, s] * moved[h][s] for h in range(attn.n_heads)) for s in range(a.shape[2])])
        torch.testing.assert_close(found.summed[t], vectors.norm(dim=-1), atol=1e-9, rtol=0)
        if name == "sandwich":
            post = block.norm1_post
            vectors = vectors * post.weight / get("norm1_post.scale")[t]
        if kind == "attn":
            vectors[t] += get("resid_pre")[t]
        if name == "bert":
            vectors = (vectors - vectors.mean(-1, keepdim=True)) * block.norm1.weight / get("norm1.scale")[t]
        torch.testing.assert_close(found.mixed[t], vectors.norm(dim=-1), atol=1e-9, rtol=0)
        assert ((found.mixing >= 0) & (found.mixing <= 1)).all()


# Showing


@pytest.mark.parametrize("by", ["head", "layer", "neuron", "source"])
def test_answers_show_themselves(by: str, tmp_path: Path) -> None:
    for name in ("gpt2", "t5"):
        found = direct_logit_attribution(zoo.model(name), **zoo.texts(name), by=by)
        assert "parts sum to" in str(found) and "scale" in found.grid().note
        found.plot(dark=True)
        assert found.to_dict()["kind"] in ("Attribution", "BySource")
        assert found.save(tmp_path / "x.csv").read_text().count("\n") == 1 + len(found.grid().rows)


def test_other_answers_show_themselves() -> None:
    made, ids = zoo.model("gpt2"), zoo.ids()
    for found in (decompose(made, ids), decompose(made, ids).by_layer(), attention_rollout(made, ids), value_contribution(made, ids, 0)):
        assert found.title.splitlines()[0] in " ".join(str(found).split()) or found.title[:20] in str(found)
        found.plot()
        assert found.to_dict()["title"] == found.title
    assert "soft-cap of 30" in direct_logit_attribution(zoo.model("sandwich"), ids).remark
    assert "activation" in direct_logit_attribution(zoo.model("bert"), ids).remark


# What cannot be asked


def test_one_token_is_a_text_too() -> None:
    made = zoo.model("gpt2")
    assert attention_rollout(made, [3]).weights.tolist() == [[1.0]] and value_contribution(made, [3], 0).agreement.isnan().all()
    assert direct_logit_attribution(made, [3], by="source").error < 1e-4


def test_errors_say_what_to_do() -> None:
    made, ids = zoo.model("gpt2"), zoo.ids()
    with pytest.raises(InputError, match="'heads' is no way to split a logit. Did you mean 'head'"):
        direct_logit_attribution(made, ids, by="heads")
    with pytest.raises(InputError, match="top=0 units"):
        direct_logit_attribution(made, ids, by="neuron", top=0)
    with pytest.raises(InputError, match="2 positions were given without a target"):
        direct_logit_attribution(made, ids, positions=[1, 2])
    with pytest.raises(InputError, match="Position 99 was asked for"):
        direct_logit_attribution(made, ids, positions=99)
    with pytest.raises(InputError, match="Token id 400 was asked about"):
        direct_logit_attribution(made, ids, target=400)
    found = direct_logit_attribution(made, ids)
    with pytest.raises(InputError, match="'0.fnn' is no part of this sum. Did you mean"):
        found["0.fnn"]
    vector = gf.Encoder(zoo.V, zoo.D, (zoo.block(),), readout=gf.Vector()).build(seed=0)
    with pytest.raises(InputError, match="ends in Vector"):
        direct_logit_attribution(vector, ids)
    assert decompose(vector, ids).error < 1e-5
    with pytest.raises(InputError, match=r"ends in Vector"):
        decompose(vector, ids).logits(3)
    with pytest.raises(InputError, match="residual=2 is the identity's share"):
        attention_rollout(made, ids, residual=2)
    with pytest.raises(InputError, match="'median' is no way to join heads"):
        attention_rollout(made, ids, heads="median")
    with pytest.raises(SiteError, match="Layer 7 was asked for"):
        attention_rollout(made, ids, layer=7)
    with pytest.raises(InputError, match="Layer 0 has no cross-attention"):
        value_contribution(made, ids, 0, kind="cross")
    with pytest.raises(SiteError, match="Layer 3 was asked for"):
        value_contribution(made, ids, 3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gf.save(zoo.model("gpt2"), tmp_path / "m", tokenizer=zoo.words())
    base = ["look", "attribute", "the old man saw a red fox", "-m", str(tmp_path / "m")]
    for by in ("head", "layer", "neuron", "source", "gradient", "rollout"):
        assert cli.main([*base, "--by", by, "--position", "-1", "--rows", "5"]) == 0
        assert "more rows" in capsys.readouterr().out
    assert cli.main([*base, "--by", "integrated", "--baseline", "mean", "--out", str(tmp_path / "x.json")]) == 0
    assert "completeness error" in capsys.readouterr().out and (tmp_path / "x.json").exists()
    for wrong, said in (
        (["--by", "heads"], "'heads' is no way to attribute"),
        (["--by", "rollout", "--target", "old"], "knows no target"),
        (["--by", "source", "--baseline", "mean"], "use it with --by integrated"),
        (["--by", "integrated", "--baseline", "²"], "--baseline '²' is unknown"),
    ):
        assert cli.main([*base, *wrong]) == 2
        assert said in capsys.readouterr().err
