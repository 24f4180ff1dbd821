"""A journey: every step follows from its inputs by its formula, agrees with the model's own pass, and says what its numbers say."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import glassformer as gf
from glassformer.core.errors import InputError, SamplerError, SiteError
from glassformer.core.tap import Record
from glassformer.infer.links import Draw, Greedy, MinP, Penalties, Temperature, TopK, TopP
from glassformer.look.journey_page import furthest, png
from glassformer.look.journey_picture import additions, stations, stream_lengths
from glassformer.look.journeys import Journey, journey
from glassformer.parts.embed import LiftSum, LiftTokens, SqrtWidth
from glassformer.parts.feedforward import ClampedGated, Gated, Plain
from glassformer.parts.kernels import SoftmaxPlusOne, SoftmaxSink
from glassformer.parts.latent import LatentAttention
from glassformer.parts.norm import DynamicTanh, Joint
from glassformer.parts.readout import Classifier, Mean, Tagger, Vector
from glassformer.parts.routing import Groups, SigmoidRouting
from look import zoo

V, D = zoo.V, zoo.D
block = zoo.block
MORE: dict[str, Any] = {
    "latent": gf.Decoder(V, D, (block(attention=LatentAttention(4, 8, 6, 4, d_value=5, q_lora_rank=10), norm=gf.RMSNorm()),) * 2),
    "latent_straight": gf.Decoder(V, D, (block(attention=LatentAttention(2, 8, 6, 4), norm=gf.RMSNorm()),)),
    "qk_normed": gf.Decoder(
        V,
        D,
        (
            block(attention=gf.Attention(4, n_kv_heads=1, d_value=6, position=gf.Rotary(fraction=0.5, layout="interleaved"), qk_norm=gf.RMSNorm())),
            block(attention=gf.Attention(4, position=gf.Rotary(), qk_norm=Joint(gf.LayerNorm()), scale=1.0, mask=gf.Window(3))),
            block(attention=gf.Attention(2, qk_norm=gf.RMSNorm(offset=1.0), normaliser=SoftmaxSink(), out_bias=True), wiring=gf.PreNorm(bare=("attn",))),
        ),
        tied=True,
        readout=gf.LanguageModel(bias=True, scale=gf.InverseSqrtWidth() if hasattr(gf, "InverseSqrtWidth") else SqrtWidth()),
    ),
    "odd": gf.Decoder(
        V,
        D,
        (
            block(
                attention=gf.Attention(4, normaliser=SoftmaxPlusOne(), position=gf.T5Buckets(bidirectional=False)),
                norm=DynamicTanh(),
                feedforward=ClampedGated(24),
            ),
            block(attention=gf.Attention(4, normaliser=gf.Sigmoid(bias=-1.0)), feedforward=Plain(24, "relu", bias=True), wiring=gf.Parallel(norms=2)),
        ),
        position=gf.ALiBi(),
        embedding=gf.Embedding(scale=SqrtWidth(), lift=LiftTokens(6)),
    ),
    "shared": gf.Decoder(
        V,
        D,
        (
            block(
                feedforward=gf.Experts(4, 2, Gated(12), normalise=False, routing=SigmoidRouting(scale=2.5, groups=Groups(2, 1, 2)), shared=Gated(20)),
                norm=gf.RMSNorm(),
            ),
        )
        * 2,
        position=gf.Sinusoidal(),
    ),
    "albert": gf.Encoder(
        V,
        D,
        (block(wiring=gf.PostNorm()),) * 2,
        final_norm=gf.NoNorm(),
        position=gf.Learned(64),
        embedding=gf.Embedding(n_types=2, norm=gf.LayerNorm(), lift=LiftSum(8)),
        readout=Classifier(3, transform=gf.Dense("tanh")),
    ),
    "tagger": gf.Encoder(V, D, (block(),), readout=Tagger(4, transform=gf.Dense("gelu"))),
    "vector": gf.Encoder(V, D, (block(),), readout=Vector(Mean(), normalise=True)),
    "vector_bare": gf.Encoder(V, D, (block(),), readout=Vector(Mean())),
    "bare": gf.Decoder(V, D, (), final_norm=gf.NoNorm()),
}


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the zoo or of those above, with weights far from even; each built once, for no journey changes it (a test below)."""
    if name in zoo.SPECS:
        return zoo.model(name).to(dtype)
    zoo.SPECS[name] = MORE[name]
    try:
        return zoo.model(name).to(dtype)
    finally:
        del zoo.SPECS[name]


words = cache(zoo.words)
NAMES = [*zoo.SPECS, *MORE]


def made(name: str, double: bool = True, **rest: Any) -> Journey:
    """A journey through that model; the plain one is shared by all tests that ask it."""
    dtype = torch.float64 if double else torch.float32
    return journey(model(name, dtype), **zoo.texts(name), tokenizer=words(), **rest) if rest else plain(name, dtype)


@cache
def plain(name: str, dtype: torch.dtype) -> Journey:
    return journey(model(name, dtype), **zoo.texts(name), tokenizer=words())


# Every step from its inputs


def norm_oracle(norm: Any, x: list[Tensor]) -> Tensor:
    norm = getattr(norm, "norm", norm)
    flat = x[0] if x[0].shape[-1] == norm.weight.shape[0] else x[0].flatten(-2)
    kind = type(norm).__name__
    if kind == "LayerNormLayer":
        y = norm.weight * (flat - x[1].view(*flat.shape[:-1], 1)) / x[2].view(*flat.shape[:-1], 1)
        y = y if norm.bias is None else y + norm.bias
    elif kind == "RMSNormLayer":
        y = (norm.offset + norm.weight) * flat / x[1].view(*flat.shape[:-1], 1)
    else:
        y = norm.weight * torch.tanh(norm.alpha * flat) + norm.bias
    return y.view_as(x[0])


def turn(x: Tensor, spec: Any, d_head: int) -> Tensor:
    """[t h k]: pairs as complex numbers, times e^(i position frequency)."""
    n = int(d_head * spec.fraction)
    frequency = 1.0 / spec.base ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    angle = (torch.arange(x.shape[0])[:, None].float() * frequency)[:, None]
    a, b = (x[..., : n // 2], x[..., n // 2 : n]) if spec.layout == "half" else (x[..., 0:n:2], x[..., 1:n:2])
    cos, sin = angle.cos().double(), angle.sin().double()
    first, second = a * cos - b * sin, a * sin + b * cos
    turned = torch.cat([first, second], -1) if spec.layout == "half" else torch.stack([first, second], -1).flatten(-2)
    return torch.cat([turned, x[..., n:]], -1)


def linear(module: Any, x: Tensor, rows: slice = slice(None)) -> Tensor:
    y = x @ module.weight[rows].T
    return y if module.bias is None else y + module.bias[rows]


def attention_oracle(stack: Any, layer: Any, last: str, x: list[Tensor], causal: bool) -> Tensor:
    h, g, k, kv = layer.n_heads, layer.n_kv_heads, layer.d_head, layer.d_value
    cross, latent = type(layer).__name__.startswith("Cross"), type(layer).__name__.startswith("Latent")
    if last in ("q", "k", "v") and not latent:
        of = {"q": (0, h, k), "k": (h * k, g, k), "v": (h * k + g * k, g, kv)}[last]
        module, begin = (layer.q, 0) if cross and last == "q" else (layer.kv, of[0] - h * k) if cross else (layer.qkv, of[0])
        return linear(module, x[0], slice(begin, begin + of[1] * of[2])).unflatten(-1, of[1:])
    if latent:
        nope, r = layer.d_nope, layer.rank
        if last in ("q_down", "kv_down"):
            return linear(getattr(layer, last), x[0])
        if last == "q":
            return linear(layer.q if layer.spec.q_lora_rank is None else layer.q_up, x[0]).unflatten(-1, (h, -1))
        if last == "kv_cut":
            return x[0][:, :r]
        up = layer.kv_up.weight.view(h, nope + kv, r)
        if last == "k":
            return torch.cat([torch.einsum("hkr,sr->shk", up[:, :nope], x[0]), x[1][:, None, r:].expand(-1, h, -1)], -1)
        if last == "v":
            return torch.einsum("hkr,sr->shk", up[:, nope:], x[0])
        if last in ("q_rot", "k_rot"):
            return torch.cat([x[0][..., :nope], turn(x[0][..., nope:], layer.spec.position, layer.d_rope)], -1)
    if last in ("q_rot", "k_rot"):
        return turn(x[0], layer.spec.position, k)
    if last == "products":
        return torch.stack([x[0][:, i] @ x[1][:, i // (h // g)].T for i in range(h)])
    if last == "scaled":
        return x[0] * (k**-0.5 if layer.spec.scale is None else layer.spec.scale)
    if last == "capped":
        return layer.spec.cap * torch.tanh(x[0] / layer.spec.cap)
    if last == "biased":
        return x[0] + x[1]
    if last == "scores":
        t, s = x[0].shape[1:]
        i, j = torch.arange(t)[:, None], torch.arange(s)[None]
        hidden = (j > i) if causal and not cross else torch.zeros(t, s, dtype=torch.bool)
        if isinstance(layer.spec.mask, gf.Window):
            hidden = hidden | ((i - j).abs() >= layer.spec.mask.size)
        return x[0].masked_fill(hidden, -math.inf)
    if last == "pattern":
        e, kind = x[0].exp(), type(layer.normaliser).__name__
        if kind == "SigmoidLayer":
            bias = layer.normaliser.bias if layer.normaliser.bias is not None else -(x[0] > -math.inf).sum(-1, keepdim=True).double().log()
            return 1 / (1 + (-(x[0] + bias)).exp())
        extra = {"SoftmaxPlusOneLayer": 1.0, "SoftmaxSinkLayer": getattr(layer.normaliser, "sinks", torch.zeros(h)).exp()[:, None, None]}.get(kind, 0.0)
        return e / (extra + e.sum(-1, keepdim=True))
    if last == "z":
        return torch.stack([x[0][i] @ x[1][:, i // (h // g)] for i in range(h)], 1)
    if last == "result":
        return torch.stack([x[0][:, i] @ layer.out.weight[:, i * kv : (i + 1) * kv].T for i in range(h)], 1)
    assert last == "out"
    return x[0].sum(1) + (0 if layer.out.bias is None else layer.out.bias)


ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "tanh": torch.tanh,
}


def ffn_oracle(layer: Any, last: str, x: list[Tensor]) -> Tensor:
    kind, f = type(layer).__name__, layer.spec.d_ff
    if last == "gate":
        return linear(layer.gate_up, x[0], slice(0, f))
    if last == "pre":
        return linear(layer.up, x[0]) if kind == "PlainLayer" else linear(layer.gate_up, x[0], slice(f, 2 * f))
    if last == "gate_act":
        if kind == "ClampedGatedLayer":
            g = x[0].clamp(max=layer.limit)
            return g / (1 + (-layer.alpha * g).exp())
        return ACTS[layer.spec.act](x[0])
    if last == "post":
        return ACTS[layer.spec.act](x[0]) if kind == "PlainLayer" else x[0] * ((x[1].clamp(-layer.limit, layer.limit) + 1) if kind.startswith("Cl") else x[1])
    assert last == "out"
    return linear(layer.down, x[0])


def experts_oracle(layer: Any, last: str, x: list[Tensor]) -> Tensor:
    spec = layer.spec
    sigmoid = isinstance(spec.routing, SigmoidRouting)
    if last == "logits":
        return linear(layer.router, x[0])
    if last == "router":
        return torch.sigmoid(x[0]) if sigmoid else x[0].softmax(-1)
    if last == "chosen":
        scores = x[0] + (layer.routing.correction if sigmoid else 0)
        if isinstance(spec.routing.groups, Groups):
            of_groups = scores.unflatten(-1, (2, -1)).sum(-1)  # both of two: best=2 of 2 experts
            scores = scores.masked_fill((of_groups < of_groups.amax(-1, keepdim=True)).repeat_interleave(2, -1), -math.inf)
        return scores.argsort(-1, descending=True)[:, : spec.top_k]
    if last == "weights":
        w = x[0].gather(-1, x[1])
        return (w / w.sum(-1, keepdim=True) if spec.normalise else w) * spec.routing.scale
    if last == "answers":

        def answer(e: int, row: Tensor) -> Tensor:
            expert = layer.experts[e]
            up = row @ expert.gate_up.weight.T
            f = expert.spec.d_ff
            return (ACTS["silu"](up[:f]) * up[f:]) @ expert.down.weight.T

        return torch.stack([torch.stack([answer(int(e), row) for e in chosen]) for row, chosen in zip(x[0], x[1], strict=True)])
    assert last == "out"
    return (x[0][..., None] * x[1]).sum(1) + (x[2] if len(x) == 3 else 0)


def oracle(stack: Any, name: str, x: list[Tensor], ids: Tensor, chain: Any) -> Tensor:
    """A step's numbers from its inputs' numbers, by the formula of its name and this model's parameters."""
    e, readout, causal = stack.embed, stack.readout, isinstance(stack.spec, gf.Decoder)
    parts = name.split(".")
    last = parts[-1]
    if name == "tokens":
        return ids
    if last in ("mean", "scale") and "norm" in parts[-2]:
        module: Any = stack.get_submodule(".".join(parts[:-1]))
        if hasattr(module, "norm"):
            x[0], module = x[0].flatten(-2), module.norm
        if last == "mean":
            return x[0].sum(-1, keepdim=True) / x[0].shape[-1]
        centred = x[0] - (x[1] if len(x) == 2 else 0)
        return (centred.pow(2).sum(-1, keepdim=True) / x[0].shape[-1] + module.eps).sqrt()
    if parts[0] == "blocks":
        b = stack.blocks[int(parts[1])]
        if parts[2] in ("attn", "cross") and len(parts) == 4:
            layer = getattr(b, parts[2])
            if last == "bias":
                return bias_oracle(stack, layer, ids)
            if last in ("q_normed", "k_normed") or (last in ("q_rot", "k_rot", "latent", "q_latent") and len(x) > 1):
                return norm_oracle(getattr(layer, {"latent": "kv_norm", "q_latent": "q_norm"}.get(last, f"{last[0]}_norm")), x)
            return attention_oracle(stack, layer, last, x, causal)
        if parts[2] == "ffn":
            return ffn_oracle(b.ffn, last, x)
        if parts[2] == "experts":
            return ffn_oracle(b.experts.shared, last, x) if parts[3] == "shared" else experts_oracle(b.experts, last, x)
        if last == "normed":
            return norm_oracle(getattr(b, parts[2]), x)
        if last.startswith("resid_") and name != "blocks.0.resid_pre":
            if isinstance(stack.spec.blocks[0].wiring, gf.PostNorm) and not last.endswith("_sum"):
                return norm_oracle(b.norm1 if last == "resid_mid" else b.norm2, x)
            return sum(x[1:], x[0])
    if name == "final_norm" or name == "resid_final":
        return norm_oracle(stack.final_norm, x)
    if parts[0] == "readout" and parts[1] == "transform":
        t = readout.transform
        return {"linear": lambda: linear(t.linear, x[0]), "act": lambda: ACTS[readout.spec.transform.act](x[0]), "normed": lambda: norm_oracle(t.norm, x)}[
            last
        ]()
    if name == "readout.pooled":
        return x[0][0] if type(readout.spec.pool).__name__ == "First" else x[0].mean(0)
    if name == "readout.scaled":
        return x[0] * readout.factor
    if name == "readout.scores" or (name == "logits" and type(readout).__name__ == "LanguageModelLayer" and readout.spec.cap is None):
        return x[0] @ readout.weight.T + (0 if readout.bias is None else readout.bias)
    if name == "logits":
        kind = type(readout).__name__
        return (
            readout.spec.cap * torch.tanh(x[0] / readout.spec.cap)
            if kind == "LanguageModelLayer"
            else (x[0] / x[0].norm() if kind == "VectorLayer" else linear(readout.linear, x[0]))
        )
    if name == "probabilities":
        return x[0].exp() / x[0].exp().sum(-1, keepdim=True)
    if name == "sampler.logits":
        return x[0][-1].float()
    if parts[0] == "sampler":
        return chain.links[int(parts[1])].apply(x[0][None].float())[0]
    if name == "next":
        return (x[0] > -math.inf).nonzero()[0, 0]
    return embedding_oracle(stack, e, name, x, ids)


def embedding_oracle(stack: Any, e: Any, name: str, x: list[Tensor], ids: Tensor) -> Tensor:
    if name == "pos_embed":
        if hasattr(stack.position, "table"):
            return stack.position.table[: len(ids)]
        rate = 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
        angle = torch.arange(len(ids)).double()[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
    if name == "embed.sum" or (name == "blocks.0.resid_pre" and len(x) == 2 and e.norm.__class__.__name__ == "NoNormLayer"):
        return x[0] + x[1]
    if name == "embed.normed" or (name == "blocks.0.resid_pre" and len(x) == 3):
        return norm_oracle(e.norm, x)
    if name == "blocks.0.resid_pre":
        return linear(e.lift_sum, x[0])
    if name == "embed.rows" or (name == "embed" and x[0].dtype == torch.int64):
        return e.weight[x[0]]
    if name == "embed.scaled":
        return x[0] * math.sqrt(e.width)
    if name == "embed" and e.spec.n_types:
        return x[0] + e.types[0]
    assert name == "embed"
    return linear(e.lift_tokens, x[0])


def bias_oracle(stack: Any, layer: Any, ids: Tensor) -> Tensor:
    """ALiBi by its slopes, T5's by its table, both added up where both are there."""
    n, h = len(ids), layer.n_heads
    total = torch.zeros(h, n, n, dtype=torch.float64)
    for position in (layer.position, stack.position):
        if type(position).__name__ == "ALiBiLayer":
            for i, q, s in ((i, q, s) for i in range(h) for q in range(n) for s in range(n)):
                total[i, q, s] -= 2.0 ** (-8.0 * (i + 1) / h) * abs(q - s)
        elif type(position).__name__ == "T5BucketsLayer":
            for q, s in ((q, s) for q in range(n) for s in range(n)):
                both = position.spec.bidirectional
                near = position.spec.buckets // (4 if both else 2)
                distance = abs(s - q) if both else max(q - s, 0)
                assert distance < near + 1  # the first of the far ones shares the logarithm's zero
                total[:, q, s] += position.table[distance + (position.spec.buckets // 2 if both and s > q else 0)]
    return total


@pytest.mark.parametrize("name", NAMES)
def test_every_step_follows_from_its_inputs_by_its_formula(name):
    """Each step, from the numbers of its inputs and the model's parameters alone, to 1e-6 (float32 tables of angles stand between)."""
    chain = Penalties(1.0) | TopK(9) | Temperature(0.7) | Greedy()
    way = made(name, sampler=chain)
    m = way._way.subject.model
    seen: set[str] = set()
    for step in way:
        half = way._way.half(step)
        assert set(step.inputs) <= seen, step.name  # in the order of computation
        short = step.name.removeprefix(half.prefix)
        with torch.no_grad():
            want = oracle(half.stack, short, [way.values(n) for n in step.inputs], torch.tensor(half.ids), chain)
        got = step.values
        assert tuple(got.shape) == step.shape == tuple(want.shape), step.name
        assert str(got.dtype) == f"torch.{step.dtype}", step.name
        assert len(step.axes.split()) == got.ndim
        torch.testing.assert_close(got, want.to(got.dtype), atol=1e-6, rtol=1e-6, msg=lambda text, n=step.name: f"{n}: {text}")
        seen.add(step.name)
    assert m is not None and len(seen) == len(way) > 3


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_models_own_numbers_and_every_site_is_one(name):
    m, given = model(name), zoo.texts(name)
    way = made(name, double=False)
    record = Record("**")
    inputs = [torch.tensor([given[k]]) for k in ("source", "text") if k in given]
    with torch.no_grad():
        m(*inputs, tap=record)
    sites = {s.path for s in m.sites()}
    assert sites and sites == set(record.paths)
    for path in sites:
        assert path in way, path
        value = record[path] if path.endswith("pos_embed") else record[path][0]
        torch.testing.assert_close(way.values(path), value, atol=1e-5, rtol=1e-5, msg=lambda text, p=path: f"{p}: {text}")


def test_the_order_is_the_wirings_own():
    def order(name: str) -> list[str]:
        names = [s.name for s in made(name, double=False) if s.layer == 0]
        marks = ("norm1.scale", "norm1_post.scale", "norm2.scale", "norm2_post.scale", "attn.out", "ffn.out", "resid_mid", "resid_mid_sum", "resid_post")
        return [n.removeprefix("blocks.0.") for n in names if n.removeprefix("blocks.0.") in marks]

    assert order("llama") == ["norm1.scale", "attn.out", "resid_mid", "norm2.scale", "ffn.out", "resid_post"]
    assert order("bert") == ["attn.out", "resid_mid_sum", "norm1.scale", "resid_mid", "ffn.out", "norm2.scale", "resid_post"]
    assert order("reordered") == ["attn.out", "norm1_post.scale", "resid_mid", "ffn.out", "norm2_post.scale", "resid_post"]
    assert order("sandwich")[:4] == ["norm1.scale", "attn.out", "norm1_post.scale", "resid_mid"]
    assert order("parallel") == ["norm1.scale", "attn.out", "ffn.out", "resid_post"]


# Parts, on demand


def test_parts_by_name_by_place_and_by_word():
    way = made("llama", double=False)
    whole = way["blocks.1.attn.pattern"].values
    assert torch.equal(way.values("blocks.1.attn.pattern", head=3), whole[3])
    assert torch.equal(way.values("blocks.1.attn.pattern", "3, -1, 0:4"), whole[3, -1, :4])
    assert torch.allclose(way.values("blocks.1.attn.pattern", head=[2, 0], position=slice(4, 6), key=1), whole[[2, 0], 4:6, 1])
    assert torch.allclose(way.values("blocks.1.attn.z", head=1, feature=0), way["blocks.1.attn.z"].values[:, 1, 0])
    assert torch.allclose(way.values("blocks.1.attn.result", head=1, position=2), way["blocks.1.attn.result"].values[2, 1])
    assert torch.allclose(way.values("logits", position=-1), way["logits"].values[-1], atol=1e-6)
    assert torch.equal(way.values("blocks.1.attn.k", head=3), way["blocks.1.attn.k"].values[:, 1])  # two query heads share one
    with pytest.raises(SiteError, match=r"Head 4 was asked for at blocks\.1\.attn\.k, whose layer has 4 heads, 0 to 3\."):
        way.values("blocks.1.attn.k", head=4)
    spoken = text_way()
    assert torch.allclose(spoken.values("blocks.0.attn.pattern", head=0, position="dog", key="fox"), spoken["blocks.0.attn.pattern"].values[0, 5, 2])
    assert spoken.labels("blocks.0.attn.pattern") == {"position": list(spoken.pieces), "key": list(spoken.pieces)}


def test_only_what_is_asked_for_is_computed(monkeypatch):
    from glassformer.parts import kernels

    way = made("llama", double=False)
    asked: list[Any] = []
    scores = kernels.scores_of

    def watched(q: Tensor, k: Tensor, rule: Any, heads: Any = None) -> Tensor:
        asked.append((heads, q.shape[2]))
        return scores(q, k, rule, heads)

    monkeypatch.setattr(kernels, "scores_of", watched)
    way.values("blocks.0.attn.pattern", head=2)
    way.values("blocks.0.attn.pattern", head=[1, 3], position=4)
    assert asked == [((2,), 9), ((1, 3), 1)]


def test_little_is_held_for_a_long_text():
    m = zoo.model("llama")
    t = 1500
    way = journey(m, zoo.ids(t), tokenizer=words())
    streams = 4 * t * D * 4
    assert way.bytes <= 1.5 * streams + 1  # three streams and the last, no layer's insides
    assert way.values("blocks.2.attn.pattern", head=1, position=t - 1).shape == (t,)
    assert way.bytes < 4 * t * t * 4  # less than one head's pattern in each layer would take


def test_blocks_held_are_bounded(monkeypatch):
    from glassformer.look import journey_run

    way = journey(model("gpt2"), zoo.ids())
    monkeypatch.setattr(journey_run, "KEPT", 1)
    for i in (0, 1, 2, 0):
        assert way.values(f"blocks.{i}.attn.z").shape == (9, 4, 4)
        assert list(way._way.main.half._blocks) == [i]


def test_slices_for_json():
    way = made("llama", double=False)
    given = way.slice_of("blocks.1.attn.scores", "3, 0:2, :")
    assert json.loads(json.dumps(given, allow_nan=False)) == given
    assert given["axes"] == "t s" and given["shape"] == [2, 9] and given["index"] == {"head": 3, "position": [0, 1]} and given["dtype"] == "float32"
    assert given["values"][0][1:] == [None] * 8 and given["values"][0][0] == pytest.approx(float(way.values("blocks.1.attn.scores", "3, 0, 0")))
    assert way.slice_of("next")["values"] == way.next
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.scores holds 324 numbers, but at most 300 are given at once: narrow it, or set most="):
        way.slice_of("blocks.1.attn.scores", most=300)


def test_a_journey_is_json_without_its_numbers():
    way = made("t5", double=False)
    read = json.loads(way.to_json())
    assert read["pieces"] == list(way.pieces) and read["source_ids"] == list(way.source_ids) and len(read["steps"]) == len(way)
    first = next(s for s in read["steps"] if s["name"] == "decoder.blocks.0.cross.pattern")
    assert set(first) == {"name", "layer", "title", "formula", "axes", "shape", "inputs", "dtype", "kind", "side", "meaning"}
    assert first["shape"] == [4, 9, 6] and first["inputs"] == ["decoder.blocks.0.cross.scores"] and first["layer"] == 0
    assert way["blocks.0.cross.pattern"] is way["decoder.blocks.0.cross.pattern"]
    with pytest.raises(InputError, match="where=3 is no text: write a number or a range for each axis"):
        way.values("blocks.0.cross.pattern", 3)
    assert "probabilities" in way and "decoder.next" in way and "encoder.probabilities" not in way
    assert len(way.plot().axes) == 4, "lengths, their colours, what is added, what is expected"
    assert way.labels("blocks.0.cross.pattern")["key"] == list(way.source_pieces)


# Sentences


def said(way: Journey, name: str, **where: Any) -> str:
    return way.meaning(name, **where)


def numbers(text: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"(?<![\w'])−?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)]


def text_way(name: str = "llama", **rest: Any) -> Journey:
    return journey(model(name), SPOKEN, tokenizer=words(), **rest) if rest else spoken_way(name)


SPOKEN = "the old fox saw the dog"


@cache
def spoken_way(name: str) -> Journey:
    return journey(model(name), SPOKEN, tokenizer=words())


def test_sentences_of_attention_are_what_the_numbers_say():
    way = text_way()
    for head in range(4):
        pattern = way.values("blocks.1.attn.pattern", head=head).double()
        row = pattern[-1]
        best = row.argsort(descending=True)[:3]
        text = said(way, "blocks.1.attn.pattern", head=head)
        entropy = float(-(pattern.clamp(min=1e-30).log2() * pattern).sum(-1).mean())
        assert text.startswith(f"Head {head} of layer 1: 'dog' gives {100 * row[best[0]]:.0f} % to ")
        assert numbers(text)[-2:] == pytest.approx([2**entropy, entropy], rel=6e-3)
        words = re.findall(r"to '(\w+)'", text)
        assert words == [way.pieces[int(i)].strip("·") for i in best]
        row = way.values("blocks.1.attn.products", head=head, position=-1)
        assert numbers(said(way, "blocks.1.attn.products", head=head))[-2:] == pytest.approx([float(row.max()), float(row.min())], rel=6e-3)
        z, v = way.values("blocks.1.attn.z", head=head, position=-1), way.values("blocks.1.attn.v", head=head)
        whole = (pattern[-1] * v.norm(dim=-1)).sum()
        assert numbers(said(way, "blocks.1.attn.z", head=head))[1:3] == pytest.approx([float(whole), float(z.norm())], rel=6e-3)
    rows = way.values("blocks.1.attn.pattern", position=-1).double()
    narrow = int((-(rows.clamp(min=1e-30).log2() * rows).sum(-1)).argmin())
    assert said(way, "blocks.1.attn.pattern").startswith(f"Head {narrow} of layer 1, the narrowest of 4 here: ")
    assert "'fox' sees 3 of 6 tokens, and of all 36 pairs 21 are visible" in said(way, "blocks.1.attn.scores", position="fox")
    at = said(way, "blocks.1.attn.pattern", position=0)
    assert "'the'₀ gives 100 % to 'the'₀;" in at  # it sees nothing else


def test_sentences_of_norms_units_and_sums_are_what_the_numbers_say():
    way = text_way()
    scale = way.values("blocks.1.norm1.scale")[:, 0]
    low, high = int(scale.argmin()), int(scale.argmax())
    text = said(way, "blocks.1.norm1.scale")
    assert numbers(text) == pytest.approx([float(scale[high]), float(scale[low]), float(scale[-1])], rel=6e-3)
    assert f"divides '{way.pieces[high].strip('·')}'" in text and text.endswith(f"'dog' by {float(scale[-1]):.3g}.")
    pre = way.values("blocks.1.ffn.gate", position=-1)
    text = said(way, "blocks.1.ffn.gate")
    assert f"gate {int(pre.argmax())} is the most active" in text and f"{100 * float((pre < 0).float().mean()):.0f} % of 24 gates are below zero" in text
    before, added, after = (way.values(n, position=-1) for n in ("blocks.1.resid_mid", "blocks.1.ffn.out", "blocks.1.resid_post"))
    angle = math.degrees(math.acos(float(F.cosine_similarity(before, after, dim=0))))
    told = numbers(said(way, "blocks.1.resid_post"))
    assert told[:3] == pytest.approx([float(added.norm()), float(before.norm()), float(after.norm())], rel=6e-3)
    assert told[3] == pytest.approx(angle, abs=0.6)
    post = way.values("blocks.1.ffn.post", position=-1).double().pow(2).sort(descending=True).values
    need = int((post.cumsum(0) < 0.5 * post.sum()).sum()) + 1
    assert f"lies in {need} of 24 units" in said(way, "blocks.1.ffn.post")
    relu = made("odd", double=False)
    zeros = (relu.values("blocks.1.ffn.post", position=-1) == 0).float().mean()
    assert f"{100 * float(zeros):.0f} % are exactly zero" in said(relu, "blocks.1.ffn.post")


def test_sentences_of_rotation_experts_and_cross_attention():
    way = text_way()
    assert "Position 0 turns the query of 'the'₀ in head 1 by 0°; its length stays" in said(way, "blocks.0.attn.q_rot", position=0, head=1)
    experts = text_way("experts")
    chosen = experts.values("blocks.0.experts.chosen", position=-1).tolist()
    assert f"'dog' goes to experts {chosen[0]} and {chosen[1]};" in said(experts, "blocks.0.experts.chosen")
    weights = experts.values("blocks.0.experts.weights", position=-1)
    assert numbers(said(experts, "blocks.0.experts.weights"))[1::2] == pytest.approx(weights.tolist(), rel=6e-3)
    pair = journey(model("t5"), "old fox", source="the dog ran home", tokenizer=words())
    text = said(pair, "blocks.0.cross.pattern", head=2)
    assert pair.position == 2 and set(re.findall(r"to '(\w+)'", text)) <= {"the", "dog", "ran", "home"}
    assert said(pair, "encoder.tokens").startswith("The source is 4 tokens, 4 different; at position 3 stands 'home'")


def test_links_of_the_sampler_and_the_next_token():
    chain = TopK(7) | TopP(0.8) | MinP(0.1) | Temperature(0.5) | Draw(seed=3)
    way = text_way(sampler=chain)
    logits = way.values("logits", position=-1)
    names = [s.name for s in way][-6:]
    assert names == ["sampler.0.TopK", "sampler.1.TopP", "sampler.2.MinP", "sampler.3.Temperature", "sampler.4.Draw", "next"]
    for step, name in zip(chain.steps(logits[None], [list(way.ids)]), names, strict=False):
        assert torch.equal(way.values(name), step.logits[0])
    assert way.next == int(chain(logits[None], [list(way.ids)])[0]) == int(way.values("sampler.4.Draw").argmax())
    p = logits.double().softmax(-1)
    top = p.sort(descending=True).values
    text = said(way, "sampler.0.TopK")
    assert f"removes {V - 7} tokens with {100 * float(top[7:].sum()):.0f} % of the probability and leaves 7" in text
    assert numbers(text)[-2] == pytest.approx(float(-(p * p.log2()).sum()), rel=6e-3)
    assert "Temperature(t=0.5) removes no token and leaves" in said(way, "sampler.3.Temperature")
    assert f"the model gives it {100 * float(p[way.next]):.0f} %" in said(way, "next")
    assert f"Expected after 'dog': '{way._way.subject.piece(int(p.argmax())).strip('·')}' {100 * float(top[0]):.0f} %" in said(way, "probabilities")
    early = text_way(position="fox", sampler=TopK(1) | Greedy())
    assert early.position == 2 and early.next == int(early.values("logits", position=2).argmax())
    assert "changes nothing" in said(text_way(sampler=Temperature(1) | Greedy()), "sampler.0.Temperature")


@pytest.mark.parametrize("name", NAMES)
def test_every_sentence_names_this_texts_tokens_and_no_number_is_missing(name):
    way = made(name, double=False)
    words = {p.strip("·") for p in (*way.pieces, *way.source_pieces)}
    for step in way:
        text = step.meaning
        assert text.endswith(".") and "nan" not in text and "no number" not in text, (step.name, text)
        quoted = set(re.findall(r"'([^']+)'", text))
        assert quoted <= words or step.kind in ("logits", "probabilities", "sampler.logits", "sampler.link", "next"), (step.name, text)
        assert numbers(text), (step.name, text)


def test_one_token_alone():
    for name in ("llama", "bert", "experts"):
        way = journey(model(name), [3])
        assert len(way.ids) == 1 and all(s.meaning for s in way)
    assert way.plot().axes


@pytest.mark.parametrize("name", ["llama", "t5", "shared", "odd"])
def test_a_model_in_bfloat16(name):
    rough, fine = journey(model(name, torch.bfloat16), **zoo.texts(name), tokenizer=words()), made(name, double=False)
    for step in rough:
        assert step.meaning and str(step.values.dtype) == f"torch.{step.dtype}", step.name
    assert torch.allclose(rough.values("blocks.0.resid_post"), fine.values("blocks.0.resid_post"), atol=0.5, rtol=0.1)


# Showing


def test_it_shows_itself(tmp_path):
    way = text_way(layer=1)
    assert {s.layer for s in way.shown} == {1} and len(way.shown) < len(way)
    assert "blocks.1.attn.pattern" in str(way) and "blocks.0.attn" not in str(way)
    assert str(way).startswith("The way of 'the old fox saw the dog', said of 'dog' at 5, layer 1")
    for kind in ("png", "html", "json", "csv"):
        assert way.save(tmp_path / f"way.{kind}").stat().st_size > 1000
    page = (tmp_path / "way.html").read_text(encoding="utf-8")
    assert page.count('<section class="overview">') == 1 and "Layer 1" in page and "Layer 0" not in page
    overview = page[page.index("<section") : page.index("</section>")]
    lengths = torch.stack([way.values(name).norm(dim=-1) for _, name in stations(way)])
    assert [float(x) for x in re.findall(r'title="([^"]+)"', overview)] == pytest.approx(lengths.flatten().tolist(), rel=6e-3)
    assert re.findall(r"<span>([^<]+)</span>", overview) == list(way.pieces)
    p = way.values("probabilities", position=-1).sort(descending=True).values[:8]
    added = additions(way)
    bars = [float(x) for x in re.findall(r'<td class="n">([^<]+)</td>', overview)]
    assert bars[:2] == pytest.approx([float(added["attention"][0]), float(added["feed-forward"][0])], rel=6e-3)
    assert bars[-8:] == pytest.approx((100 * p).tolist(), rel=6e-3)


@pytest.mark.parametrize("name", ["gpt2", "t5", "parallel", "albert", "bare", "latent"])
def test_the_page_is_a_chapter_of_every_step(name):
    way = made(name, double=False)
    page = way.to_html()
    assert len(page) < 250_000 and page.count("<h3>") == len(way) and "<script" not in page
    assert page.count("<img") == sum("<figure>" in part for part in page.split("<h3>"))
    if name == "t5":
        assert page.index("Encoder, layer 1") < page.index("Decoder, embedding") < page.index("Decoder, read-out")


def test_stations_and_additions_of_the_figure():
    way = text_way("gpt2")
    assert [n for _, n in stations(way)][:3] == ["blocks.0.resid_pre", "blocks.0.resid_mid", "blocks.0.resid_post"]
    assert torch.allclose(stream_lengths(way)[1], way.values("blocks.0.resid_mid").norm(dim=-1))
    assert torch.allclose(additions(way)["attention"][2], way.values("blocks.2.attn.out", position=-1).norm())
    sandwich = text_way("sandwich")  # what is added there is what the second norm gives
    assert torch.allclose(additions(sandwich)["feed-forward"][1], sandwich.values("blocks.1.norm2_post.normed", position=-1).norm())


def test_small_pictures():
    import io

    import numpy as np
    from matplotlib.image import imread

    x = torch.tensor([[1.0, -1.0], [0.0, -math.inf]])
    seen = imread(io.BytesIO(png(x)), format="png")
    assert seen.shape == (2, 2, 4) and np.allclose(seen[0, :, 3], 1) and np.allclose(seen[1, :, 3], 0)
    assert seen[0, 0, 0] > seen[0, 0, 2] and seen[0, 1, 2] > seen[0, 1, 0]  # orange above zero, blue below
    assert furthest(torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0]]), 2).tolist() == [[-3.0, 2.0, 4.0]]


# What cannot be


def test_a_text_that_is_no_text():
    with pytest.raises(InputError, match=r"The text has 0 tokens, but at least 1 is looked at: give some text\."):
        journey(zoo.model("llama"), "", tokenizer=words())
    with pytest.raises(InputError, match=r"The text has 65 tokens, but this model has positions for 64: give a shorter one"):
        journey(zoo.model("gpt2"), zoo.ids(65))


def test_a_step_a_head_or_a_layer_that_is_not_there():
    way = text_way()
    with pytest.raises(SiteError, match=r"'blocks\.1\.attn\.patern' is no step of this journey\. Did you mean 'blocks\.1\.attn\.pattern'"):
        _ = way["blocks.1.attn.patern"]
    for ask in (way.values, way.meaning, way.slice_of):
        with pytest.raises(SiteError, match=r"Head 9 was asked for at blocks\.1\.attn\.pattern, which has 4 heads, 0 to 3\."):
            ask("blocks.1.attn.pattern", head=9)
    with pytest.raises(SiteError, match=r"Head 9 was asked for, but the model has 4 heads, 0 to 3\."):
        text_way(head=9)
    with pytest.raises(SiteError, match=r"Layer 7 was asked for, but the model has 3 layers, 0 to 2\."):
        text_way(layer=7)


@pytest.mark.parametrize(
    ("where", "axes", "text"),
    [
        ("0, 1, 2, 3", {}, r"'0, 1, 2, 3' indexes 4 axes, but blocks\.0\.attn\.pattern has 3: h t s\."),
        ("a", {}, r"'a' is no index: write a number or a range for each axis, such as '3, 0:4, :', but 'a' stands there\."),
        (None, {"unit": 1}, r"blocks\.0\.attn\.pattern has no axis 'unit'\..*its axes are head, position, key\."),
        (None, {"position": 6}, r"6 was asked for along the axis 'position' of blocks\.0\.attn\.pattern, which has 6 places: 0 to 5\."),
        (None, {"position": slice(6, 9)}, r"holds none of the 6 places of the axis 'position'"),
        (None, {"key": 1.5}, r"key=1\.5 of blocks\.0\.attn\.pattern is no index: give a number, a slice, or a list of numbers\."),
        (None, {"head": "fox"}, r"'fox' names a word, but the axis 'head' of blocks\.0\.attn\.pattern counts no positions: give a number, 0 to 3\."),
        ("1", {"head": 1}, r"The axis 'head' of blocks\.0\.attn\.pattern is asked for twice: by where='1' and by head=1\."),
    ],
)
def test_parts_that_are_not_there(where, axes, text):
    with pytest.raises(InputError, match=text):
        text_way().values("blocks.0.attn.pattern", where, **axes)


def test_samplers_and_models_that_do_not_do():
    with pytest.raises(InputError, match=r"sampler= is a chain of links such as TopK\(40\) \| Greedy\(\), but int was given\."):
        text_way(sampler=3)
    with pytest.raises(SamplerError, match="ends without a link that picks the token"):
        text_way(sampler=TopK(3))
    with pytest.raises(InputError, match=r"One position is spoken of at a time, but \[1, 2\] was given"):
        text_way().meaning("blocks.0.attn.pattern", position=[1, 2])


def test_a_journey_changes_nothing():
    m = zoo.model("llama").train()
    before = {n: p.clone() for n, p in m.named_parameters()}
    way = journey(m, zoo.ids())
    assert all(s.values is not None for s in way)
    assert m.training and all(torch.equal(p, before[n]) and p.grad is None for n, p in m.named_parameters())
    assert not way["logits"].values.requires_grad and dataclasses.is_dataclass(way)


class Theirs(torch.nn.Module):
    """As much of a model of transformers as is asked before it is run: importing the library takes longer than all other tests of this file."""

    config = SimpleNamespace(hidden_size=D, vocab_size=V, num_hidden_layers=1, num_attention_heads=2, is_decoder=True, architectures=None)

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.h = torch.nn.Embedding(V, D), torch.nn.ModuleList([torch.nn.ModuleDict({"attn": torch.nn.Linear(D, D)})])

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.wte


def test_a_model_that_lends_only_its_activations():
    from glassformer.look import foreign

    lent = foreign(Theirs())
    with pytest.raises(InputError, match=r"A journey reads the model's matrices, .* open its checkpoint with gf\.load\(folder\)\."):
        journey(lent, [1, 2, 3])


# Command line


def test_command(tmp_path, capsys):
    from glassformer.cli.app import main

    zoo_model = zoo.model("llama")
    gf.save(zoo_model, tmp_path / "m", tokenizer=words())
    out = tmp_path / "way.csv"
    main(["look", "journey", "the old fox", "--model", str(tmp_path / "m"), "--layer", "1", "--head", "2", "--top-k", "5", "--seed", "1", "--out", str(out)])
    shown = capsys.readouterr().out
    assert "blocks.1.attn.pattern" in shown and "Head 2 of layer 1" in shown and "blocks.0." not in shown
    assert "Head 2 of layer 1" in out.read_text(encoding="utf-8")
    for wrong, text in ((["--layer", "9"], "Layer 9 was asked for, but the model has 3 layers"), (["--head", "9"], "Head 9 was asked for")):
        assert main(["look", "journey", "the old fox", "--model", str(tmp_path / "m"), *wrong]) == 2
        assert text in capsys.readouterr().err
