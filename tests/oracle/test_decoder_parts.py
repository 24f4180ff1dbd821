"""Parts that decoders after Llama brought, against their papers in float64: scalings that follow the length of a pass, a norm of all
heads at once, norms inside the residual, sublayers without one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glassformer.core.errors import SpecError
from glassformer.core.tap import Edit, Record
from glassformer.models import Block, Decoder, Encoder, EncoderDecoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.norm import Joint, LayerNorm, NoNorm, RMSNorm
from glassformer.parts.rotary import DynamicNTKScaling, LongRope, NTKScaling, Rotary
from glassformer.parts.wiring import Parallel, PreNorm, ReorderedNorm
from oracle import papers
from shapes import check_shapes
from tools import VOCAB, D, a_pass, built, draw, fresh, same, tokens

F64 = torch.float64
SHORT, LONG = (1.0, 1.2, 1.5, 2.0), (1.0, 2.5, 6.0, 9.0)
LONGROPE = LongRope(SHORT, LONG, original_context=12, factor=4.0)
DYNAMIC = DynamicNTKScaling(3.0, original_context=12)


# The papers' formulas


def longrope_frequencies(base: float, dim: int, n: int) -> Any:
    """arXiv 2402.13753, equation 2: every frequency is divided by a factor of its own; which list, the length decides."""
    return np.array([base ** (-2 * i / dim) / (LONG if n > 12 else SHORT)[i] for i in range(dim // 2)])


def dynamic_frequencies(base: float, dim: int, n: int) -> Any:
    """arXiv 2309.00071, definition 1 with the scale s = factor n / context - (factor - 1), at least 1."""
    return papers.ntk_frequencies(base, dim, max(1.0, 3.0 * n / 12 - 2.0))


ORACLES: dict[str, tuple[Any, Any]] = {"longrope": (LONGROPE, longrope_frequencies), "dynamic": (DYNAMIC, dynamic_frequencies)}


def angles(layer: Any, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The angle of every position and frequency, read off the layer's cosines and sines."""
    cos, sin = layer.tables(positions, lengths)
    return torch.atan2(sin, cos)[..., : layer.dim // 2]


def turned(n: int, frequencies: Any) -> Any:
    return np.angle(np.exp(1j * np.arange(n)[:, None] * frequencies))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("n", [1, 5, 12, 13, 31])
def test_a_scaling_that_follows_the_length(name, n):
    scaling, oracle = ORACLES[name]
    layer = Rotary(base=100.0, scaling=scaling).build(8, 1, 8)
    want = turned(n, oracle(100.0, 8, n))
    difference = np.angle(np.exp(1j * (angles(layer, torch.arange(n)).numpy() - want)))
    assert np.abs(difference).max() < 1e-5  # angles are float32: position 30 is rounded by up to 1e-6, and a power stands before it


@pytest.mark.parametrize("name", ORACLES)
def test_each_row_follows_its_own_length(name):
    """Neither the rows beside it nor what pads it decide how a row is turned."""
    scaling, _ = ORACLES[name]
    layer = Rotary(base=100.0, scaling=scaling).build(8, 1, 8)
    alone = {n: angles(layer, torch.arange(n)) for n in (9, 20)}
    both = angles(layer, torch.stack([torch.arange(11, 20), torch.arange(9)]))
    same(both[0], alone[20][11:])
    same(both[1], alone[9])
    padded = angles(layer, torch.arange(20), torch.tensor([9, 20]))
    same(padded[0, :9], alone[9])
    same(padded[1], alone[20])
    assert (padded[0, :9] - alone[20][:9]).abs().max() > 1e-2


def test_within_the_context_a_dynamic_scaling_changes_no_bit():
    plain, dynamic = (Rotary(base=100.0, **s).build(8, 1, 8).tables(torch.arange(12)) for s in ({}, {"scaling": DYNAMIC}))
    assert torch.equal(plain[0], dynamic[0]) and torch.equal(plain[1], dynamic[1])
    # At twice the context the scale is 3 * 2 - 2 = 4: the static scaling of that factor.
    static = Rotary(base=100.0, scaling=NTKScaling(4.0)).build(8, 1, 8)
    same(angles(Rotary(base=100.0, scaling=DYNAMIC).build(8, 1, 8), torch.arange(24)), angles(static, torch.arange(24)))
    assert Rotary(scaling=DYNAMIC).build(2, 1, 2).tables(torch.arange(20))[0].isfinite().all(), "two features have one frequency, which stays"


def test_longrope_scales_the_rotated_vectors():
    """sqrt(1 + ln s / ln L) (arXiv 2402.13753, section 3.3; the published code)."""
    assert LONGROPE.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(12)))
    assert LongRope(SHORT, LONG, 12).magnitude == 1.0 and LongRope(SHORT, LONG, 12, attention_factor=1.25).magnitude == 1.25
    x, layer = draw((1, 20, 1, 8), dtype=torch.float32), Rotary(base=100.0, scaling=LONGROPE).build(8, 1, 8)
    for n in (3, 20):
        y = layer.rotate(x[:, :n], layer.tables(torch.arange(n)))
        same(y.norm(dim=-1), x[:, :n].norm(dim=-1) * LONGROPE.magnitude, atol=1e-5)


def model_of(scaling: Any) -> Any:
    return fresh(Decoder(VOCAB, D, (Block(Attention(3, position=Rotary(base=100.0, scaling=scaling)), Gated(32)),) * 2), F64)


@pytest.mark.parametrize("name", ORACLES)
def test_padding_is_invisible_on_both_sides_of_the_boundary(name):
    model, ids = model_of(ORACLES[name][0]), tokens(3, 20)
    with torch.no_grad():
        padded = model(ids, lengths=[20, 8, 13])
        for row, n in enumerate((20, 8, 13)):
            same(padded[row : row + 1, :n], model(ids[row : row + 1, :n]), what=f"row of {n}")


@pytest.mark.parametrize("name", ORACLES)
def test_a_cache_agrees_up_to_the_boundary_and_from_a_fresh_start_beyond(name):
    model, ids = model_of(ORACLES[name][0]), tokens(2, 20)
    with torch.no_grad():
        cache = model.cache(batch=2, capacity=32)
        got = torch.cat([model(ids[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 12))], 1)
        same(got, model(ids[:, :12]))
        # Keys that were turned for a short text do not fit queries of a long one …
        stale = model(ids[:, 12:13], cache=cache)
        assert (stale - model(ids[:, :13])[:, 12:]).abs().max() > 1e-3
        # … and what was read anew does.
        cache = model.cache(batch=2, capacity=32)
        same(model(ids[:, :13], cache=cache), model(ids[:, :13]))
    if name == "longrope":  # from here on the list of divisors is the same
        with torch.no_grad():
            got = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(13, 20)], 1)
            same(got, model(ids)[:, 13:])


@pytest.mark.parametrize("name", ORACLES)
def test_one_compiled_graph_serves_both_sides_of_the_boundary(name):
    model, graphs = model_of(ORACLES[name][0]), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for first in (0, 11):
            positions = torch.arange(first, first + 9)
            same(run(tokens(), positions=positions), model(tokens(), positions=positions))
    torch._dynamo.reset()
    assert len(graphs) == 1


# One norm of all heads


@pytest.mark.parametrize(("norm", "oracle"), [(RMSNorm(eps=1e-3), papers.rms_norm), (LayerNorm(eps=1e-3, bias=False), None)])
def test_joint_norms_all_heads_as_one_vector(norm, oracle):
    layer, x = Joint(norm).build_heads(3, 4).double(), draw((2, 5, 3, 4))
    weight = draw((12,), 1)
    layer.norm.weight.data.copy_(weight)
    flat = x.reshape(2, 5, 12).numpy()
    want = papers.layer_norm(flat, weight.numpy(), 0.0, 1e-3) if oracle is None else oracle(flat, weight.numpy(), 1e-3)
    np.testing.assert_allclose(layer(x, a_pass(5)).detach().numpy(), want.reshape(2, 5, 3, 4), atol=1e-12)


def test_joint_keeps_the_heads_apart_in_size_where_a_norm_per_head_makes_them_equal():
    x = draw((1, 2, 3, 4)) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    together, each = (n.build_heads(3, 4).double()(x, a_pass(2)).norm(dim=-1) for n in (Joint(RMSNorm(eps=0.0)), RMSNorm(eps=0.0)))
    assert (together[..., 2] > 20 * together[..., 0]).all()
    same(each, torch.full_like(each, 2.0))


def test_the_sites_of_a_joint_norm():
    """One scale per token, where a norm per head has one per head; keys have as many features as they have heads of their own."""
    model, ids = built("olmo2"), tokens()
    axes = {s.path: s.axes for s in model.sites()}
    assert axes["blocks.0.attn.q_norm.scale"] == "b t 1" and axes["blocks.1.attn.k_norm.scale"] == "b s 1"
    assert {s.path: s.axes for s in built("qk-norm").sites()}["blocks.0.attn.q_norm.scale"] == "b t h 1"
    assert model.blocks[0].attn.q_norm.norm.weight.shape == (20,) and model.blocks[0].attn.k_norm.norm.weight.shape == (10,)
    tap = Record("blocks.0.attn.*", "blocks.0.attn.k_norm.scale")
    with torch.no_grad():
        logits = model(ids, tap=tap)
        k = tap["blocks.0.attn.k"]
        same(tap["blocks.0.attn.k_norm.scale"], (k.flatten(-2).square().mean(-1, keepdim=True) + 1e-5).sqrt())
        doubled = model(ids, tap=Edit("blocks.0.attn.k_norm.scale", lambda s: s * 2))
        untouched = model(ids, tap=Edit("blocks.0.attn.k_norm.scale", lambda s: s))
    same(untouched, logits)
    assert (doubled - logits).abs().max() > 1e-3


def test_joint_norms_the_keys_of_a_memory_too():
    cross = Attention(4, n_kv_heads=2, qk_norm=Joint())
    encoder = Encoder(VOCAB, D, (Block(Attention(4), Plain(32)),))
    model = fresh(EncoderDecoder(encoder, Decoder(VOCAB, D, (Block(Attention(4), Plain(32), cross=cross),))))
    check_shapes(model, tokens(2, 5))
    assert {s.path: s.axes for s in model.sites()}["decoder.blocks.0.cross.k_norm.scale"] == "b s 1"


def test_joint_without_heads_is_the_norm_itself():
    assert type(Joint(LayerNorm()).build(5)) is type(LayerNorm().build(5))
    x = draw((1, 2, 3, 4))
    assert torch.equal(Joint(NoNorm()).build_heads(3, 4)(x, a_pass(2)), x)


# Wiring


def branches(block: Any, name: str, x: Tensor) -> Tensor:
    """A sublayer's output for a stream ``x`` (its own computation is tested by itself)."""
    y: Tensor = getattr(block, name)(x, a_pass(x.shape[1]))
    return y


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return torch.from_numpy(papers.rms_norm(x.detach().numpy(), weight.detach().numpy(), 1e-6))


def test_reordered_norms_what_is_added():
    """h = x + norm(attention(x)), y = h + norm(feed-forward(h)) (arXiv 2501.00656, section 3.2)."""
    block = fresh(Decoder(VOCAB, D, (Block(Attention(4), Plain(32), norm=RMSNorm(), wiring=ReorderedNorm()),)), F64).blocks[0]
    assert {n.split(".")[0] for n, _ in block.named_parameters()} == {"attn", "ffn", "norm1_post", "norm2_post"}
    x = draw((2, 5, D))
    with torch.no_grad():
        h = x + rms(branches(block, "attn", x), block.norm1_post.weight)
        want = h + rms(branches(block, "ffn", h), block.norm2_post.weight)
        same(block(x, a_pass(5)), want)


@pytest.mark.parametrize("bare", [("attn",), ("ffn",), ("attn", "ffn")])
def test_a_bare_sublayer_reads_the_stream_as_it_is(bare):
    block = fresh(Decoder(VOCAB, D, (Block(Attention(4), Plain(32), norm=RMSNorm(), wiring=PreNorm(bare=bare)),)), F64).blocks[0]
    assert ("attn" in bare) == (not hasattr(block, "norm1")) and ("ffn" in bare) == (not hasattr(block, "norm2"))
    x = draw((2, 5, D))
    with torch.no_grad():
        h = x + branches(block, "attn", x if "attn" in bare else rms(x, block.norm1.weight))
        want = h + branches(block, "ffn", h if "ffn" in bare else rms(h, block.norm2.weight))
        same(block(x, a_pass(5)), want)


# What cannot be


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RMSNorm(eps=-1e-6), r"RMSNorm\(eps=-1e-06\): eps stands under a square root and is 0 or more\."),
        (lambda: RMSNorm(eps=float("nan")), r"RMSNorm\(eps=nan\): eps stands under a square root"),
        (lambda: LayerNorm(eps=-1.0), r"LayerNorm\(eps=-1\.0\): eps stands under a square root and is 0 or more\."),
        (lambda: LongRope(SHORT, LONG[:3], 12), r"LongRope has 4 short and 3 long divisors: one of each per frequency\."),
        (lambda: LongRope((1.0, 0.0), (1.0, 2.0), 12), r"LongRope has the divisor 0\.0: frequencies are divided by numbers above 0\."),
        (lambda: LongRope(SHORT, LONG, 1), r"LongRope\(original_context=1\): the context that was trained has 2 places or more\."),
        (lambda: LongRope(SHORT, LONG, 12, factor=0.0), r"LongRope\(factor=0\.0\): a context is stretched by a factor above 0\."),
        (
            lambda: Rotary(scaling=LONGROPE).build(6, 1, 6),
            r"LongRope has 4 divisors, but 6 rotated features have 3 frequencies: one for each\.",
        ),
        (lambda: DynamicNTKScaling(-2.0, 12), r"DynamicNTKScaling\(factor=-2\.0\): a context is stretched by a factor above 0\."),
        (lambda: DynamicNTKScaling(2.0, 0), r"DynamicNTKScaling\(original_context=0\): the context that was trained has 2 places or more\."),
        (lambda: PreNorm(bare=("attention",)), r"PreNorm\(bare=\('attention',\)\): 'attention' is no sublayer\. .*They are: attn, cross, ffn, experts\."),
        (
            lambda: Decoder(VOCAB, D, (Block(Attention(4), wiring=PreNorm(bare=("cross",))),)).build(device="meta"),
            r"PreNorm\(bare=\('cross',\)\) names 'cross', but the block's sublayers are attn and ffn\.",
        ),
        (lambda: Parallel(norms=0), r"Parallel\(norms=0\): one norm for both branches, or two\."),
    ],
)
def test_a_spec_that_cannot_be(make, said):
    with pytest.raises(SpecError, match=said):
        make()
