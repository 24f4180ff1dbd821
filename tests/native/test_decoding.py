"""The compiled norms, rotations and activations of a decode step, and whole generations with and without compiled code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import glassformer as gf
from glassformer.core import native
from glassformer.core.flow import Pass
from glassformer.core.tap import Record
from glassformer.infer.session import Source
from glassformer.parts import decoding
from glassformer.parts.feedforward import ACTIVATIONS
from look import zoo

pytestmark = pytest.mark.skipif(not native.wait(), reason="no compiler here, or GLASSFORMER_NATIVE=0")

NOBODY = Pass(positions=torch.arange(3), index=torch.arange(3))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@contextlib.contextmanager
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with GLASSFORMER_NATIVE=0."""
    with monkeypatch.context() as m:
        m.setattr(native, "library", lambda: None)
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("d", [1, 7, 16, 40, 768])
@pytest.mark.parametrize(
    "norm", [gf.LayerNorm(), gf.LayerNorm(bias=False, eps=1e-3), gf.RMSNorm(), gf.RMSNorm(offset=1.0, cast="late"), gf.RMSNorm(offset=0.5)]
)
def test_norms_are_those_of_torch(norm: Any, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer = norm.build(d)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(draw(d, seed=i + 1))
        layer.to(dtype)
        x = 3 * draw(2, 3, d, seed=9, dtype=dtype) + 1
        y = layer(x, NOBODY)
        assert decoding.norm(x, layer.weight, None, 1e-5) is not None
        with without(monkeypatch):
            expected = layer(x, NOBODY)
    assert y.dtype == expected.dtype
    assert torch.allclose(y.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("ragged", [False, True])
def test_rotations_are_those_of_torch(layout: str, fraction: float, ragged: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer = gf.Rotary(layout=layout, fraction=fraction).build(32, 2, 12 if fraction == 1 else 8)
    positions = torch.tensor([[3, 4, 5], [700, 701, 702]]) if ragged else torch.tensor([90, 91, 92])
    tables = layer.tables(positions)
    x = draw(2, 3, 5 * layer.d_head, dtype=dtype).view(2, 3, 5, layer.d_head)[:, :, 1:4]  # heads within a projection's output
    with torch.no_grad():
        y = layer.rotate(x, tables)
        assert decoding.turn(x, tables, layout == "half") is not None
        with without(monkeypatch):
            expected = layer.rotate(x, tables)
    assert torch.allclose(y.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", ["gelu_tanh", "silu", "relu", "relu2"])
@pytest.mark.parametrize("n", [1, 15, 16, 35])
def test_activations_are_those_of_torch(name: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    both = 4 * draw(2, 3, 2 * n, dtype=dtype)
    both[0, 0, :1] = -200.0
    both[1, 2, n - 1 : n] = 200.0
    gate, up = both.chunk(2, -1)
    with torch.no_grad():
        alone, met = decoding.bend(name, gate), decoding.bend(name, gate, up)
        with without(monkeypatch):
            expected = ACTIVATIONS[name](gate)
    assert alone is not None
    assert met is not None
    assert torch.allclose(alone.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.allclose(met.double(), (expected * up).double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activations_near_zero_and_far_from_it_are_exact_to_a_few_ulp(name: str):
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.logspace(-30, 0, 300), -torch.logspace(-30, 0, 300)])
    with torch.no_grad():
        y = decoding.bend(name, x[None, None])
    d = x.double()
    exact = d * torch.sigmoid(d if name == "silu" else 2 * math.sqrt(2 / math.pi) * (d + 0.044715 * d**3))  # 1 + tanh(u) = 2 sigmoid(2u)
    assert y is not None
    seen = exact.abs() > 1e-30
    # An angle in the exponent is off by half an ulp of itself, and so is what comes out of it by that much.
    slack = 2**-24 * (8 + 2 * x.double().abs().pow(3 if name == "gelu_tanh" else 1).clamp(max=200))
    assert (((y[0, 0].double() - exact) / exact).abs() < slack)[seen].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_come_out_as_torch_has_them(bad: float, monkeypatch: pytest.MonkeyPatch):
    x = draw(1, 2, 20)
    x[0, 0, 3] = bad
    with torch.no_grad():
        for name in ("gelu_tanh", "silu", "relu", "relu2"):
            y, expected = decoding.bend(name, x), ACTIVATIONS[name]
            with without(monkeypatch):
                assert torch.allclose(y, expected(x), equal_nan=True, atol=1e-6), name
        weight, bias = draw(20, seed=1), draw(20, seed=2)
        assert torch.allclose(decoding.norm(x, weight, bias, 1e-5), F.layer_norm(x, (20,), weight, bias), equal_nan=True, atol=1e-6)
        assert torch.allclose(decoding.norm(x, weight, None, 1e-5, rms=True), F.rms_norm(x, (20,), weight, 1e-5), equal_nan=True, atol=1e-6)


def test_the_sum_over_a_row_of_logits():
    x = 5 * draw(3, 50_257)
    x[1] -= 300
    x[2, 7] = 90.0
    with torch.no_grad():
        y = decoding.logsumexp(x)
        assert torch.allclose(y.double(), x.double().logsumexp(-1, keepdim=True), rtol=2e-7, atol=0)
        assert torch.equal(decoding.logsumexp(x[1:2]), y[1:2])
        inf = math.inf
        for row in ([1.0, -inf], [-inf, -inf], [inf, 1.0], [inf, math.nan], [math.nan, 1.0], [-inf, math.nan], [2.0]):
            for n in (1, 17):
                odd = torch.tensor([row * n])
                assert torch.equal(decoding.logsumexp(odd).isnan(), odd.logsumexp(-1, keepdim=True).isnan()), row
                assert torch.allclose(decoding.logsumexp(odd), odd.logsumexp(-1, keepdim=True), equal_nan=True), row
    assert decoding.logsumexp(x) is None


def test_what_is_left_to_torch():
    x, weight = draw(1, 2, 16), draw(16)
    assert decoding.norm(x, weight, None, 1e-5) is None  # gradients may be asked for
    assert decoding.bend("silu", x) is None
    with torch.no_grad():
        assert decoding.norm(draw(1, 9, 16), weight, None, 1e-5) is None  # more places than a step has
        assert decoding.norm(x.double(), weight.double(), None, 1e-5) is None
        assert decoding.norm(x, weight.bfloat16(), None, 1e-5) is None
        assert decoding.norm(x.transpose(0, 1)[..., ::2], weight[:8], None, 1e-5) is None
        assert decoding.bend("gelu", x) is None
        assert torch.equal(torch.vmap(lambda y: y if decoding.bend("silu", y) is None else y * 0)(x[None])[0], x)


# Whole models

WINDOWED = gf.Attention(4, n_kv_heads=2, position=gf.Rotary(), mask=gf.Window(5))
LATENT = gf.LatentAttention(4, kv_lora_rank=12, d_nope=8, d_rope=4)
MORE = {
    "windowed": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=WINDOWED, norm=gf.RMSNorm()), zoo.block(attention=gf.Attention(4, position=gf.Rotary()))) * 2),
    "alibi": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.ALiBi())),) * 2),
    "sink": gf.Decoder(
        zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary(fraction=0.5), normaliser=gf.SoftmaxSink(), qk_norm=gf.RMSNorm())),) * 2
    ),
    "latent": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=LATENT, norm=gf.RMSNorm()),) * 2),
}


def made(name: str) -> Any:
    if name not in MORE:
        return zoo.model(name)
    model = MORE[name].build(seed=0).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.ndim > 1:
                p.copy_(draw(*p.shape, seed=i) * (1.5 / p.shape[-1] ** 0.5))
    return model


def grown(model: Any, prompts: list[list[int]], n: int) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens, and the log-probabilities of what was drawn."""
    session = gf.Session(model, prompts, gf.Greedy(), room=n, seed=0)
    drawn = [session.step() for _ in range(n)]
    return session.ids, torch.tensor([d.logprobs for d in drawn])


@pytest.mark.parametrize("name", [*zoo.DECODERS, *MORE])
@pytest.mark.parametrize("ragged", [False, True])
def test_generation_with_compiled_code_gives_the_same_tokens(name: str, ragged: bool, monkeypatch: pytest.MonkeyPatch):
    model = made(name)
    prompts = [zoo.ids(9), zoo.ids(4 if ragged else 9, 1)]
    ids, logprobs = grown(model, prompts, 16)
    with without(monkeypatch):
        expected, exact = grown(model, prompts, 16)
    assert ids == expected
    assert torch.allclose(logprobs, exact, atol=2e-4)


def test_an_encoder_decoder_too(monkeypatch: pytest.MonkeyPatch):
    model = zoo.model("t5")
    sources, prompts = [zoo.ids(6), zoo.ids(3, 2)], [[1], [1, 5]]

    def run() -> list[list[int]]:
        session = gf.Session(model, prompts, gf.Greedy(), room=10, source=Source.read(model, sources))
        for _ in range(10):
            session.step()
        return session.ids

    ids = run()
    with without(monkeypatch):
        assert run() == ids


@pytest.mark.parametrize("name", ["gpt2", "llama", "sink", "windowed", "latent"])
@pytest.mark.parametrize("ragged", [False, True])
def test_looking_changes_no_bit(name: str, ragged: bool):
    model = made(name)
    prompts = [zoo.ids(9), zoo.ids(4 if ragged else 9, 1)]
    plain, seen = (gf.Session(model, prompts, gf.Greedy(), room=6, tap=tap) for tap in (None, Record("**")))
    for _ in range(6):
        a, b = plain.step(), seen.step()
        assert (a.ids, a.logprobs) == (b.ids, b.logprobs)
