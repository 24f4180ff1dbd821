"""Weights by name, and views that fold and centre without touching the model."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look.matrices import exact_folds, weights
from look import zoo

SWITCHES = ("fold_norms", "centre_writing", "centre_readout", "fold_value_bias")


def digest(model: Any) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    tokens = torch.tensor([zoo.ids(9), zoo.ids(9, 3)])
    return (torch.tensor([zoo.ids(6, 1), zoo.ids(6, 2)]), tokens) if name == "t5" else (tokens,)


@pytest.mark.parametrize("name", zoo.SPECS)
def test_every_exact_view_computes_the_same_and_changes_nothing(name: str) -> None:
    model = zoo.model(name).double()
    before, x = digest(model), inputs(name)
    reference = model(*x).log_softmax(-1)
    possible = exact_folds(model)
    chosen = [s for s in SWITCHES if possible[s]]
    for switches in ([s] for s in chosen):
        view = weights(model, **dict.fromkeys(switches, True))
        assert (view.logits(*x).log_softmax(-1) - reference).abs().max() < 1e-9
    together = weights(model, **dict.fromkeys(chosen, True))
    assert (together.logits(*x).log_softmax(-1) - reference).abs().max() < 1e-9
    assert digest(model) == before
    for switch in SWITCHES:
        if not possible[switch]:
            with pytest.raises(InputError, match=switch):
                weights(model, **{switch: True})


def test_which_views_are_exact_where() -> None:
    assert all(exact_folds(zoo.model("gpt2")).values())
    assert exact_folds(zoo.model("llama")) == {"fold_norms": True, "fold_value_bias": True, "centre_writing": False, "centre_readout": True}
    assert not exact_folds(zoo.model("bert"))["fold_norms"] and not exact_folds(zoo.model("reordered"))["fold_norms"]
    assert not exact_folds(zoo.model("sigmoid"))["fold_value_bias"]
    assert not exact_folds(zoo.model("sandwich"))["centre_readout"]  # its logits are capped


@pytest.mark.parametrize("name", ["gpt2", "llama", "parallel", "experts", "sandwich"])
def test_a_folded_model_has_norms_that_only_divide(name: str) -> None:
    w = weights(zoo.model(name)).folded
    ones, zeros = w.final_norm
    assert torch.allclose(ones, torch.ones_like(ones)) and not zeros.any()
    assert all(torch.allclose(w.norm(i)[0], torch.ones(zoo.D)) for i in range(w.n_layers))


@pytest.mark.parametrize("name", zoo.SPECS)
def test_matrices_act_as_the_sites_say(name: str) -> None:
    model = zoo.model(name).double()
    w, stack = weights(model), getattr(model, "decoder", model)
    at = "decoder." if name == "t5" else ""
    tap = gf.Record("**")
    with torch.no_grad():
        model(*inputs(name), tap=tap)
    tokens = inputs(name)[-1]
    assert torch.allclose(w.W_E[tokens], tap[f"{at}embed"])
    for i, block in enumerate(stack.blocks):
        here = f"{at}blocks.{i}.attn."
        x = tap[here + "in"]
        for letter, site in (("Q", "q"), ("K", "k"), ("V", "v")):
            made = torch.einsum("btd,hdk->bthk", x, getattr(w, f"W_{letter}")[i]) + getattr(w, f"b_{letter}")[i]
            seen = tap[here + site]
            seen = seen.repeat_interleave(made.shape[2] // seen.shape[2], 2)
            assert torch.allclose(made, seen)
        assert torch.allclose(torch.einsum("bthk,hkd->btd", tap[here + "z"], w.W_O[i]) + w.b_O[i], tap[here + "out"])
        if "ffn" in block.order:
            here = f"{at}blocks.{i}.ffn."
            assert torch.allclose(tap[here + "in"] @ w.W_in[i] + w.b_in[i], tap[here + "pre"])
            assert torch.allclose(tap[here + "post"] @ w.W_out[i] + w.b_out[i], tap[here + "out"])
            if f"{here}gate" in tap:
                assert torch.allclose(tap[here + "in"] @ w.W_gate[i] + w.b_gate[i], tap[here + "gate"])
    if name not in ("bert", "sandwich"):  # a transform, a cap
        assert torch.allclose(tap[f"{at}resid_final"] @ w.W_U + w.b_U, tap[f"{at}logits"])
    if name in ("gpt2", "bert"):
        assert torch.allclose(w.W_pos[:9], tap["pos_embed"])


def test_a_view_says_in_one_line_what_it_is() -> None:
    w = weights(zoo.model("llama"))
    assert repr(w) == "Weights of a Decoder: 3 layers of 4 heads, d_model 16, 31 tokens (as the model has them)"
    assert repr(w.view(fold_norms=True, centre_readout=True)).endswith("(fold_norms, centre_readout)")
    assert repr(w.folded.plain) == repr(w) and str(w) == repr(w)
    cross = weights(zoo.model("t5")).cross
    assert "cross-attention" in repr(cross) and cross.folded.kind == "cross" and not torch.equal(cross.folded.W_Q[1], weights(zoo.model("t5")).folded.W_Q[1])


def test_cross_attention_has_the_same_names() -> None:
    model = zoo.model("t5").double()
    tap = gf.Record("decoder.blocks.*.cross.**")
    model(*inputs("t5"), tap=tap)
    w = weights(model)
    made = torch.einsum("btd,hdk->bthk", tap["decoder.blocks.1.cross.in"], w.cross.W_Q[1])
    assert torch.allclose(made, tap["decoder.blocks.1.cross.q"])
    with pytest.raises(InputError, match="no cross-attention"):
        _ = weights(zoo.model("gpt2")).cross
    assert torch.allclose(weights(model.encoder).W_Q[0], weights(model.encoder).W_Q.stack()[0])


def test_the_stream_of_a_centred_model_has_mean_zero() -> None:
    model = weights(zoo.model("gpt2").double(), centre_writing=True).model()
    tap = gf.Record("blocks.*.resid_post")
    model(*inputs("gpt2"), tap=tap)
    assert all(tap[p].mean(-1).abs().max() < 1e-12 for p in tap.paths)
    assert weights(zoo.model("gpt2").double(), centre_readout=True).W_U.mean(1).abs().max() < 1e-12
    assert not weights(zoo.model("gpt2"), fold_value_bias=True).b_V.stack().any()


def test_what_does_not_change_is_shared() -> None:
    model = zoo.model("llama")
    made = weights(model).folded.model()
    assert made.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert made.blocks[0].attn.out.weight.data_ptr() == model.blocks[0].attn.out.weight.data_ptr()
    assert made.blocks[0].attn.qkv.weight.data_ptr() != model.blocks[0].attn.qkv.weight.data_ptr()
    assert not any(p.requires_grad for p in made.parameters()) and all(p.requires_grad for p in model.parameters())


def test_switching_and_indexing() -> None:
    model = zoo.model("gpt2")
    w = weights(model)
    folded = w.folded
    assert folded.fold_norms and not w.fold_norms and folded.plain.model() is model
    both = folded.view(centre_readout=True)
    assert both.fold_norms and both.centre_readout
    assert w.W_Q.stack().shape == (3, 4, 16, 4) == w.W_Q.shape and len(w.W_Q) == 3
    assert torch.equal(w.W_Q[1, 2], w.W_Q.stack()[1, 2]) and torch.equal(w.W_Q[-1], w.W_Q[2])
    assert torch.equal(w.W_Q[1:, 2], w.W_Q.stack()[1:, 2]) and torch.equal(w.W_Q[:, 0, :, 1], w.W_Q.stack()[:, 0, :, 1])
    assert "W_Q" in repr(w.W_Q)
    with pytest.raises(InputError, match=r"W_Q\[3\].*3 layers, 0 to 2"):
        _ = w.W_Q[3]
    for wrong in ((0, 99), "a", 1.5):
        with pytest.raises(InputError, match=r"W_Q\[.*\] does not fit: its axes are l h d k, of one layer \(4, 16, 4\)"):
            _ = w.W_Q[wrong]
    with pytest.raises(InputError, match="but None was given"):
        weights(None)
    with pytest.raises(InputError, match="meta device"):
        weights(zoo.SPECS["gpt2"].build(device="meta"))
    assert weights(zoo.model("gpt2").double()).b_U.dtype == torch.float64
    with pytest.raises(InputError, match="no switch 'fold'"):
        w.view(fold=True)
    with pytest.raises(SiteError, match="Layer 7"):
        w.norm(7)


def test_layers_of_different_shapes() -> None:
    blocks = (zoo.block(attention=gf.Attention(4)), zoo.block(attention=gf.Attention(2)))
    w = weights(gf.Decoder(zoo.V, zoo.D, blocks).build(seed=0))
    assert w.W_Q[0].shape == (4, 16, 4) and w.W_Q[1].shape == (2, 16, 8)
    with pytest.raises(InputError, match=r"W_Q has layers of shapes \(4, 16, 4\) and \(2, 16, 8\)"):
        w.W_Q.stack()


def test_scale_and_lift_are_in_the_table() -> None:
    spec = gf.Decoder(zoo.V, zoo.D, (zoo.block(),), embedding=gf.Embedding(scale=gf.SqrtWidth(), lift=gf.LiftTokens(8)), tied=False)
    model = spec.build(seed=0)
    tap = gf.Record("embed")
    tokens = torch.tensor([zoo.ids(5)])
    model(tokens, tap=tap)
    assert torch.allclose(weights(model).W_E[tokens], tap["embed"], atol=1e-6)


def test_what_cannot_be_said() -> None:
    with pytest.raises(InputError, match="learned table of positions.*Rotary"):
        _ = weights(zoo.model("llama")).W_pos
    with pytest.raises(InputError, match="gated.*Plain"):
        _ = weights(zoo.model("gpt2")).W_gate[0]
    tagger = gf.Encoder(zoo.V, zoo.D, (zoo.block(),), readout=gf.Tagger(3)).build(seed=0)
    with pytest.raises(InputError, match="ends in Tagger"):
        _ = weights(tagger).W_U
    latent = gf.LatentAttention(n_heads=2, kv_lora_rank=4, d_nope=4, d_rope=4)
    model = gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=latent, norm=gf.RMSNorm()),)).build(seed=0)
    with pytest.raises(InputError, match="LatentAttention makes keys by way of a normed latent"):
        _ = weights(model).W_K[0]
    x = torch.tensor([zoo.ids(6)])
    assert torch.allclose(weights(model).folded.logits(x), model(x), atol=1e-5)
