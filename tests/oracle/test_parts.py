"""Each part against its paper (``papers.py``), in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glassformer.core.flow import Ledger, Pass
from glassformer.core.mask import Causal, Everything, SameDocument, Window, resolve
from glassformer.core.tap import Record
from glassformer.models import Block, Decoder
from glassformer.models.init import BERT_INIT, GPT2_INIT, XAVIER_INIT, FanIn, Normal, ResidualNormal, Xavier
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, InverseSqrtWidth, SqrtWidth, Times
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import ACTIVATIONS, Gated, Plain, activation
from glassformer.parts.kernels import Rule, Sigmoid, Softmax, SoftmaxPlusOne, SoftmaxSink, explicit, pattern_of, scores_of
from glassformer.parts.norm import DynamicTanh, LayerNorm, RMSNorm
from glassformer.parts.position import ALiBi, Learned, Sinusoidal, T5Buckets
from glassformer.parts.readout import Classifier, Dense, First, LanguageModel, Last, Mean, Vector
from glassformer.parts.rotary import LinearScaling, Llama3Scaling, NTKScaling, Rotary, YaRNScaling
from oracle import papers
from tools import draw, fresh, tokens

F64 = torch.float64


def here(t: int = 4, tap: Any = None, **fields: Any) -> Pass:
    index = torch.arange(t)
    return Pass(positions=index, index=index, tap=tap, **fields)


def close(ours: Tensor, theirs: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=atol, rtol=atol)


def randomise(module: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        for i, x in enumerate(module.parameters()):
            x.copy_(draw(x.shape, seed + i) * 0.5)
    return module.double()


# Attention

CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "everything": {"mask": Everything(), "visible": lambda i, j: True},
    "window": {"mask": Causal() & Window(3), "visible": lambda i, j: 0 <= i - j < 3},
    "around": {"mask": Window(2), "visible": lambda i, j: abs(i - j) < 2},
    "documents": {
        "mask": Causal() & SameDocument(torch.tensor([[0, 0, 1, 1, 1, 2]])),
        "visible": lambda i, j: j <= i and [0, 0, 1, 1, 1, 2][i] == [0, 0, 1, 1, 1, 2][j],
    },
    "groups": {"g": 2},
    "one-group": {"g": 1},
    "values": {"value": 3},
    "scale": {"scale": 0.9},
    "cap": {"cap": 1.5},
    "sink": {"normaliser": SoftmaxSink(), "theirs": "sink"},
    "plus-one": {"normaliser": SoftmaxPlusOne(), "theirs": "plus-one"},
    "sigmoid": {"normaliser": Sigmoid(), "theirs": "sigmoid"},
    "sigmoid-bias": {"normaliser": Sigmoid(-2.0), "theirs": "sigmoid", "sigmoid_bias": -2.0},
    "cap-and-sink": {"cap": 1.5, "normaliser": SoftmaxSink(), "theirs": "sink", "g": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_attention(case):
    c = {"mask": Causal(), "visible": lambda i, j: j <= i, "g": 4, "value": 5, "normaliser": Softmax(), "theirs": "softmax"} | CASES[case]
    t, h, k = 6, 4, 5
    q, key, v = draw((1, h, t, k), 1), draw((1, c["g"], t, k), 2), draw((1, c["g"], t, c["value"]), 3)
    layer, sink = c["normaliser"].build(h).double(), draw((h,), 4)
    if case.endswith("sink"):
        layer.sinks.data.copy_(sink)
    index = torch.arange(t)
    rule = Rule(c.get("scale", k**-0.5), c.get("cap"), None, resolve(c["mask"], index, index, rows=1), layer)
    rows = [x[0].transpose(0, 1).numpy() for x in (q, key, v)]
    out, pattern = papers.attention(
        *rows, c["visible"], scale=c.get("scale"), cap=c.get("cap"), normaliser=c["theirs"], sink=sink.numpy(), sigmoid_bias=c.get("sigmoid_bias")
    )
    close(explicit(q, key, v, rule)[0].transpose(0, 1), out)
    close(pattern_of(scores_of(q, key, rule), rule)[0], pattern)


@pytest.mark.parametrize("n", [1, 2, 4, 6, 8, 12, 16])
def test_alibi(n):
    layer = ALiBi().build(n * 4, n, 4)
    np.testing.assert_allclose(layer.slopes(), papers.alibi_slopes(n), rtol=1e-15)
    index = torch.arange(5)
    bias = layer.bias(index, index)
    want = np.array([[[-slope * abs(i - j) for j in range(5)] for i in range(5)] for slope in papers.alibi_slopes(n)])
    close(bias[0].double(), want, atol=1e-6)  # slopes are held in float32


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (10, 50)])
def test_t5_buckets(bidirectional, buckets, distance):
    layer = randomise(T5Buckets(buckets, distance, bidirectional).build(16, 3, 4))
    q, k = torch.arange(60), torch.arange(0, 60, 3)
    table, bias = layer.table.detach().numpy(), layer.bias(q, k)[0].detach().numpy()
    for i in range(60):
        for column, j in enumerate(range(0, 60, 3)):
            bucket = papers.t5_bucket(j - i, bidirectional, buckets, distance)
            np.testing.assert_array_equal(bias[:, i, column], table[bucket], err_msg=f"offset {j - i}")


def test_a_biased_layer_adds_its_bias():
    model = fresh(Decoder(31, 16, (Block(Attention(4, position=ALiBi()), Plain(8)),)), F64)
    tap, ids = Record("**"), tokens(1, 6)
    model(ids, tap=tap)
    q, k, v = (tap[f"blocks.0.attn.{n}"][0].numpy() for n in ("q_rot", "k_rot", "v"))
    out, pattern = papers.attention(q, k, v, lambda i, j: j <= i, bias=lambda h, i, j: -papers.alibi_slopes(4)[h] * (i - j))
    close(tap["blocks.0.attn.z"][0], out, atol=1e-7)  # slopes are held in float32
    close(tap["blocks.0.attn.pattern"][0], pattern, atol=1e-7)


# Rotary positions

SCALINGS: dict[str, tuple[Any, Any]] = {
    "plain": (None, lambda b, d: papers.rope_frequencies(b, d)),
    "linear": (LinearScaling(4.0), lambda b, d: papers.linear_frequencies(b, d, 4.0)),
    "ntk": (NTKScaling(4.0), lambda b, d: papers.ntk_frequencies(b, d, 4.0)),
    "yarn": (YaRNScaling(8.0, 256), lambda b, d: papers.yarn_frequencies(b, d, 8.0, 256, 32.0, 1.0)),
    "yarn-4": (YaRNScaling(4.0, 4096, beta_fast=16.0, beta_slow=2.0), lambda b, d: papers.yarn_frequencies(b, d, 4.0, 4096, 16.0, 2.0)),
    "llama3": (Llama3Scaling(), lambda b, d: papers.llama3_frequencies(b, d, 8.0, 1.0, 4.0, 8192)),
    "llama3-32": (Llama3Scaling(32.0, 1.0, 4.0, 8192), lambda b, d: papers.llama3_frequencies(b, d, 32.0, 1.0, 4.0, 8192)),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("base", "dim"), [(10_000.0, 64), (500_000.0, 128), (100.0, 8)])
def test_rotary_frequencies(name, base, dim):
    scaling, theirs = SCALINGS[name]
    spec = Rotary(base=base) if scaling is None else Rotary(base=base, scaling=scaling)
    ours = spec.build(dim, 1, dim).frequencies(torch.device("cpu"))
    # Frequencies are float32: their relative error is some 2^-24 per operation, a power and a blend have a few.
    np.testing.assert_allclose(ours.double().numpy(), theirs(base, dim), rtol=3e-6)


def test_yarn_scales_the_rotated_vectors():
    """sqrt(1/t) = 0.1 ln(s) + 1 (arXiv 2309.00071, equation 22), on queries and on keys."""
    assert YaRNScaling(8.0, 256).magnitude == pytest.approx(0.1 * math.log(8) + 1)
    assert YaRNScaling(1.0, 256).magnitude == 1.0
    assert YaRNScaling(8.0, 256, attention_factor=1.25).magnitude == 1.25
    x, layer = draw((1, 3, 1, 8)), Rotary(scaling=YaRNScaling(8.0, 256)).build(8, 1, 8)
    turned = layer.rotate(x, layer.tables(torch.arange(3)))
    close(turned.norm(dim=-1), x.norm(dim=-1).numpy() * (0.1 * math.log(8) + 1), atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_rotation(layout, fraction):
    layer = Rotary(base=100.0, fraction=fraction, layout=layout).build(16, 1, 16)
    x, positions = draw((2, 5, 3, 16)), torch.tensor([[0, 1, 2, 3, 4], [7, 3, 0, 40, 2]])
    ours = layer.rotate(x, layer.tables(positions))
    frequencies = papers.rope_frequencies(100.0, int(16 * fraction))
    for b, t, h in np.ndindex(2, 5, 3):
        want = papers.rotate(x[b, t, h].numpy(), float(positions[b, t]), frequencies, layout)
        close(ours[b, t, h], want, atol=1e-5)  # angles are float32: position 40 is rounded by up to 2e-6


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotated_scores_depend_on_differences_only(layout):
    """With exact (float64) angles the law is exact; the layer's own tables are float32, see test_rotation."""
    layer = Rotary(base=100.0, layout=layout).build(8, 1, 8)
    f = layer.frequencies(torch.device("cpu")).double()

    def tables(p: Tensor) -> tuple[Tensor, Tensor]:
        angles = p.double()[:, None] * f
        angles = torch.cat([angles, angles], -1) if layout == "half" else angles.repeat_interleave(2, -1)
        return angles.cos(), angles.sin()

    q, k = draw((1, 6, 2, 8), 1), draw((1, 6, 2, 8), 2)
    at = lambda shift: torch.einsum("bthk,bshk->bhts", *(layer.rotate(x, tables(torch.arange(6) + shift)) for x in (q, k)))
    torch.testing.assert_close(at(0), at(1234), atol=1e-11, rtol=1e-11)
    assert (at(0) - torch.einsum("bthk,bshk->bhts", q, k)).abs().max() > 0.1


# Added positions


@pytest.mark.parametrize("d", [8, 10, 7])
def test_sinusoids(d):
    layer, x = Sinusoidal().build(d, 1, d), torch.zeros(1, dtype=F64)
    positions = torch.tensor([[0, 1, 5], [2, 30, 99]])
    added = layer.add(positions, x)
    for b, t in np.ndindex(2, 3):
        close(added[b, t], papers.sinusoid(int(positions[b, t]), d), atol=2e-5)  # float32 angles: 99 is rounded by up to 4e-6, and the rates
    halves = Sinusoidal(layout="halves").build(d, 1, d).add(torch.arange(4), x)
    mixed = Sinusoidal().build(d, 1, d).add(torch.arange(4), x)
    close(halves, torch.cat([mixed[:, 0::2], mixed[:, 1::2]], -1).numpy())


def test_learned_positions():
    layer = randomise(Learned(6, offset=2).build(4, 1, 4))
    close(layer.add(torch.tensor([[0, 3]]), torch.zeros(1)), layer.table.detach().numpy()[[2, 5]][None])


# Norms


def test_norms():
    x, p = draw((2, 3, 8), 9) * 3 + 1, here(3)
    layer = randomise(LayerNorm(eps=1e-3).build(8))
    close(layer(x, p), papers.layer_norm(x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy(), 1e-3))
    layer = randomise(LayerNorm(eps=1e-3, bias=False).build(8))
    close(layer(x, p), papers.layer_norm(x.numpy(), layer.weight.detach().numpy(), 0.0, 1e-3))
    for cast in ("early", "late"):
        for offset in (0.0, 1.0):
            layer = randomise(RMSNorm(eps=1e-3, offset=offset, cast=cast).build(8))
            close(layer(x, p), papers.rms_norm(x.numpy(), layer.weight.detach().numpy(), 1e-3, offset))
    layer = randomise(DynamicTanh().build(8))
    w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
    close(layer(x, p), w["weight"] * np.tanh(w["alpha"] * x.numpy()) + w["bias"])


def test_the_scale_of_a_norm_is_what_it_divides_by():
    x = draw((2, 3, 8), 9) * 3 + 1
    for spec, centred in ((LayerNorm(eps=1e-3), True), (RMSNorm(eps=1e-3), False), (RMSNorm(eps=1e-3, offset=1.0, cast="late"), False)):
        tap = Record("scale")
        spec.build(8).double()(x, here(3, tap))
        y = x - x.mean(-1, keepdim=True) if centred else x
        close(tap["scale"], np.sqrt((y**2).mean(-1, keepdim=True).numpy() + 1e-3))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_early_and_late_casts_in_bfloat16(offset):
    """Early: y is rounded, then multiplied (Llama). Late: multiplied in float32, then rounded (Gemma)."""
    x = draw((1, 4, 32), 3).to(torch.bfloat16)
    weight = (draw((32,), 4) * 0.3).to(torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    for cast, want in (("early", wide.to(torch.bfloat16) * (weight + offset)), ("late", (wide * (offset + weight.float())).to(torch.bfloat16))):
        layer = RMSNorm(offset=offset, cast=cast).build(32).to(torch.bfloat16)
        layer.weight.data.copy_(weight)
        ours = layer(x, here(4))
        assert ours.dtype == torch.bfloat16
        # One step of bfloat16 where the two ways of taking the root round differently.
        torch.testing.assert_close(ours, want, atol=0, rtol=2**-7)
        assert (ours != want).float().mean() < 0.05


# Feed-forward


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_feed_forward(act):
    x, t = draw((2, 4, 6), 5), papers.ACTIVATIONS[act]
    layer = randomise(Plain(10, act=act, bias=True).build(6))
    w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
    close(layer(x, here()), t(x.numpy() @ w["up.weight"].T + w["up.bias"]) @ w["down.weight"].T + w["down.bias"])
    layer = randomise(Gated(10, act=act, bias=True).build(6))
    w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
    hidden = x.numpy() @ w["gate_up.weight"].T + w["gate_up.bias"]
    close(layer(x, here()), (t(hidden[..., :10]) * hidden[..., 10:]) @ w["down.weight"].T + w["down.bias"])


def test_every_activation_has_an_oracle():
    assert papers.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts(normalise, k):
    layer = randomise(Experts(4, k, Plain(8, act="relu"), normalise=normalise, balance=0.5).build(6))
    x, ledger, tap = draw((2, 5, 6), 7), Ledger(), Record("**")
    out = layer(x, here(5, tap, aux=ledger, path="experts"))
    w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
    probability = papers.softmax(x.numpy().reshape(10, 6) @ w["router.weight"].T)
    want, share = np.zeros((10, 6)), np.zeros(4)
    for n, row in enumerate(x.numpy().reshape(10, 6)):
        best = np.argsort(-probability[n])[:k]
        total = probability[n, best].sum() if normalise else 1.0
        for e in best:
            share[e] += 1 / (10 * k)
            want[n] += probability[n, e] / total * (np.maximum(w[f"experts.{e}.up.weight"] @ row, 0) @ w[f"experts.{e}.down.weight"].T)
    close(out, want.reshape(2, 5, 6))
    close(tap["experts.router"].flatten(0, 1), probability)
    # Switch transformer (arXiv 2101.03961), equation 4: alpha N sum f_e P_e.
    assert ledger.total().item() == pytest.approx(0.5 * 4 * (share * probability.mean(0)).sum(), rel=1e-12)


def test_balanced_experts_are_charged_their_factor():
    layer = Experts(4, 4, Plain(8), balance=0.01).build(6).double()
    with torch.no_grad():
        layer.router.weight.zero_()
    ledger = Ledger()
    with torch.no_grad():
        for m in layer.experts.parameters():
            m.zero_()
    layer(draw((1, 3, 6)), here(3, aux=ledger))
    assert ledger.total().item() == pytest.approx(0.01)
    assert Ledger().total() is None


# Embedding and read-outs


def test_embedding_scales_types_and_positions():
    layer = randomise(Embedding(scale=SqrtWidth(), n_types=2, norm=LayerNorm(eps=1e-6)).build(7, 9))
    position = randomise(Learned(8).build(9, 1, 9), 20)
    ids, types = torch.tensor([[1, 6, 0]]), torch.tensor([[0, 1, 1]])
    w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
    summed = 3.0 * w["weight"][ids.numpy()] + w["types"][types.numpy()] + position.table.detach().numpy()[:3]
    close(layer(ids, None, types, position, here(3)), papers.layer_norm(summed, w["norm.weight"], w["norm.bias"], 1e-6))
    assert (Times(0.3).factor(9), InverseSqrtWidth().factor(9), SqrtWidth().factor(16)) == (0.3, 1 / 3, 4.0)


def test_language_read_out():
    embed = randomise(Embedding().build(7, 9))
    spec = LanguageModel(bias=True, scale=Times(0.5), cap=2.0, transform=Dense("tanh", LayerNorm(eps=1e-6)))
    h = draw((1, 4, 9), 8)
    for tied in (True, False):
        layer = randomise(spec.build(9, embed, tied), 30)
        w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
        x = np.tanh(h.numpy() @ w["transform.linear.weight"].T + w["transform.linear.bias"])
        x = 0.5 * papers.layer_norm(x, w["transform.norm.weight"], w["transform.norm.bias"], 1e-6)
        table = embed.weight.detach().numpy() if tied else w["matrix"]
        close(layer(h, here()), 2.0 * np.tanh((x @ table.T + w["bias"]) / 2.0))


def test_pooled_read_outs():
    h, lengths, embed = draw((2, 4, 6), 8), torch.tensor([4, 2]), Embedding().build(7, 6)
    rows = {First: h[:, 0], Last: torch.stack([h[0, 3], h[1, 1]]), Mean: torch.stack([h[0].mean(0), h[1, :2].mean(0)])}
    for pool, pooled in rows.items():
        layer = randomise(Classifier(3, pool=pool(), transform=Dense("tanh")).build(6, embed, False))
        w = {n: y.detach().numpy() for n, y in layer.named_parameters()}
        y = np.tanh(pooled.numpy() @ w["transform.linear.weight"].T + w["transform.linear.bias"])
        close(layer(h, here(lengths=lengths)), y @ w["linear.weight"].T + w["linear.bias"])
        vector = Vector(pool=pool(), normalise=True).build(6, embed, False)(h, here(lengths=lengths))
        close(vector, pooled.numpy() / np.linalg.norm(pooled.numpy(), axis=-1, keepdims=True))
    close(Vector(pool=Last()).build(6, embed, False)(h, here()), h[:, -1].numpy())
    close(Vector(pool=Mean()).build(6, embed, False)(h, here()), h.mean(1).numpy())


# Initialisation


def test_initial_spreads():
    """Mean and spread of each distribution, to what a sample of its size allows."""
    block = Block(Attention(4, qkv_bias=True), Gated(96))
    wide = Decoder(300, 64, (block,) * 8, init=GPT2_INIT).build(seed=0)
    for name, x in wide.named_parameters():
        std = {"norm": None, "bias": None}.get(name.split(".")[-1], 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02)
        if "norm" in name:
            assert (x == (0 if name.endswith("bias") else 1)).all()
        elif name.endswith("bias"):
            assert (x == 0).all()
        else:
            n = x.numel()
            assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(x.mean().item()) < 5 * std / math.sqrt(n), name
    g = torch.Generator().manual_seed(0)
    x = torch.empty(80, 120)
    fill = lambda how: how.fill(x, torch.nn.Identity(), "x", 8, g)
    assert fill(FanIn()).std().item() == pytest.approx(120**-0.5, rel=0.04)
    assert fill(Normal(0.3)).std().item() == pytest.approx(0.3, rel=0.04)
    assert fill(ResidualNormal(0.3)).std().item() == pytest.approx(0.3 / 4, rel=0.04)
    bound = math.sqrt(6 / 200)
    assert fill(Xavier()).abs().max().item() == pytest.approx(bound, rel=0.01) and fill(Xavier()).abs().max() <= bound
    assert fill(Xavier()).std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
    assert BERT_INIT != GPT2_INIT != XAVIER_INIT


# The whole


def test_a_whole_decoder_in_forty_lines_of_numpy():
    block = Block(Attention(4, qkv_bias=True, out_bias=True), Plain(32, act="gelu_tanh", bias=True), norm=LayerNorm())
    model = fresh(Decoder(31, 16, (block,) * 3, final_norm=LayerNorm(), tied=True, position=Learned(12)), F64)
    ids = tokens(1, 9)
    w = {n: x.detach().numpy() for n, x in model.named_parameters()}
    close(model(ids)[0], papers.gpt2(ids[0].tolist(), w, 3, 4), atol=1e-10)


def test_the_compiled_form_of_gelu_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-12, 12, 4_001, dtype=torch.float64)
    plain = activation("gelu_tanh")(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(activation("gelu_tanh")(x), plain, atol=1e-12, rtol=1e-9)
