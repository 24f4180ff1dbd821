"""Routing, shared experts, the clamped unit and latent attention against their papers, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glassformer.core.errors import SpecError
from glassformer.core.flow import Ledger
from glassformer.core.mask import Causal
from glassformer.core.tap import Edit, Record
from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import ClampedGated, Gated
from glassformer.parts.latent import LatentAttention
from glassformer.parts.position import Learned
from glassformer.parts.rotary import Rotary
from glassformer.parts.routing import Groups, SigmoidRouting, SoftmaxRouting
from glassformer.weights import own
from oracle import papers
from oracle.test_parts import close, here, randomise
from tools import ALL, VOCAB, D, built, draw, fresh, same, tokens

Array = NDArray[np.float64]
F64 = torch.float64


# Routing, from the papers


def limited(scores: Array, n: int, keep: int, best: int) -> list[int]:
    """The experts that device-limited routing leaves (arXiv 2405.04434, section 2.2.2; V3, arXiv 2412.19437: the best two are summed)."""
    size = len(scores) // n
    rank = sorted(range(n), key=lambda g: -sum(sorted(scores[g * size : (g + 1) * size])[-best:]))
    return [e for g in rank[:keep] for e in range(g * size, (g + 1) * size)]


def route(logits: Array, routing: Any, k: int, normalise: bool, correction: Array) -> dict[int, float]:
    """The weight of each chosen expert of one token."""
    sigmoid = isinstance(routing, SigmoidRouting)
    scores = papers.sigmoid(logits) if sigmoid else papers.softmax(logits)
    judged = scores + correction if sigmoid else scores
    g = routing.groups
    left = limited(judged, g.n, g.keep, g.best) if isinstance(g, Groups) else list(range(len(logits)))
    chosen = sorted(left, key=lambda e: -judged[e])[:k]
    total = sum(scores[e] for e in chosen) if normalise else 1.0
    return {e: routing.scale * scores[e] / total for e in chosen}


ROUTINGS = {
    "mixtral": (SoftmaxRouting(), 2, True),
    "raw": (SoftmaxRouting(), 3, False),
    "gpt-oss": (SoftmaxRouting(bias=True), 4, True),
    "deepseek-v2": (SoftmaxRouting(groups=Groups(4, 2), scale=16.0), 3, False),
    "deepseek-v3": (SigmoidRouting(groups=Groups(4, 2, best=2), scale=2.5), 4, True),
    "one-group-of-all": (SigmoidRouting(groups=Groups(1, 1, best=2)), 5, False),
    "all-experts": (SigmoidRouting(), 12, True),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("shared", [None, Gated(5)], ids=["routed", "shared"])
def test_routing_is_its_paper(name, shared):
    routing, k, normalise = ROUTINGS[name]
    layer = randomise(Experts(12, k, Gated(7), normalise=normalise, routing=routing, shared=shared).build(6))
    x, tap = draw((2, 9, 6), 5), Record("**")
    out = layer(x, here(9, tap, path="experts"))
    w = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    correction = w.get("routing.correction", np.zeros(12))

    def unit(v: Array, name: str) -> Array:
        gate, up = np.split(w[f"{name}.gate_up.weight"] @ v, 2)
        return w[f"{name}.down.weight"] @ (papers.ACTIVATIONS["silu"](gate) * up)

    used: set[int] = set()
    for b, t in np.ndindex(2, 9):
        v = x[b, t].numpy()
        weights = route(w["router.weight"] @ v + w.get("router.bias", 0.0), routing, k, normalise, correction)
        want = sum(c * unit(v, f"experts.{e}") for e, c in weights.items())
        close(out[b, t], want + (0 if shared is None else unit(v, "shared")))
        assert set(tap["experts.chosen"][b, t].tolist()) == set(weights)
        used |= set(weights)
    assert len(used) > k or k == 12, "the tokens of this test are not all of one mind"


def test_softmax_over_the_chosen_logits_is_the_chosen_of_the_softmax_made_one():
    """GPT-OSS takes the soft-max of the chosen logits only."""
    layer = randomise(Experts(8, 3, Gated(4), routing=SoftmaxRouting(bias=True)).build(6))
    x, tap = draw((1, 7, 6)), Record("**")
    layer(x, here(7, tap, path="e"))
    logits = layer.router(x)
    top = logits.topk(3, -1)
    assert torch.equal(top.indices, tap["e.chosen"])
    given = tap["e.router"].gather(-1, tap["e.chosen"])
    same((given / given.sum(-1, keepdim=True)).detach(), top.values.softmax(-1).detach())


def test_the_correction_changes_the_choice_and_not_the_weight_and_learns_nothing():
    layer = randomise(Experts(6, 2, Gated(4), routing=SigmoidRouting(), normalise=False).build(5))
    x, before, after = draw((1, 8, 5)), Record("**"), Record("**")
    layer(x, here(8, before, path="e"))
    with torch.no_grad():
        layer.routing.correction[3] += 10.0
    layer(x, here(8, after, path="e")).sum().backward()
    assert torch.equal(before["e.router"], after["e.router"])
    assert (after["e.chosen"][..., 0] == 3).all() and not (before["e.chosen"][..., 0] == 3).all()
    assert layer.routing.correction.grad is None and layer.router.weight.grad.abs().sum() > 0


def test_the_correction_stays_in_float32(tmp_path):
    spec = Decoder(VOCAB, D, (Block(Attention(4), Experts(4, 2, Gated(8), routing=SigmoidRouting())),))
    for model in (spec.build(dtype="bf16", seed=0), spec.build(seed=0).to(torch.bfloat16), spec.build(seed=0).half(), spec.build(dtype="bf16", device="meta")):
        layer = model.blocks[0].experts
        assert layer.routing.correction.dtype == torch.float32 and layer.router.weight.dtype != torch.float32
        assert layer.routing.correction.device == layer.router.weight.device and isinstance(layer.routing.correction, nn.Parameter)
    model = spec.build(seed=0)
    with torch.no_grad():
        model.blocks[0].experts.routing.correction.copy_(torch.tensor([7.001, 7.002, 7.003, 7.004]))
    narrow = model.to(torch.bfloat16)
    assert narrow.blocks[0].experts.routing.correction.tolist() == pytest.approx([7.001, 7.002, 7.003, 7.004], abs=1e-6)
    assert narrow(tokens()).dtype == torch.bfloat16
    own.save(narrow, tmp_path / "m")
    again = own.load(tmp_path / "m").model
    assert torch.equal(again.blocks[0].experts.routing.correction, narrow.blocks[0].experts.routing.correction)
    assert model.double().blocks[0].experts.routing.correction.dtype == torch.float64


def test_sigmoid_experts_are_balanced_by_scores_that_sum_to_one():
    layer, ledger = randomise(Experts(4, 2, Gated(4), balance=0.5, routing=SigmoidRouting()).build(5)), Ledger()
    x, tap = draw((2, 8, 5)), Record("**")
    layer(x, here(8, tap, aux=ledger, path="e"))
    s = tap["e.router"].flatten(0, 1)
    share = torch.bincount(tap["e.chosen"].flatten(), minlength=4) / 32
    want = 0.5 * 4 * (share * (s / s.sum(-1, keepdim=True)).mean(0)).sum()  # arXiv 2412.19437, equations 17 to 20, over the batch
    same(ledger.total().detach(), want.detach())


# Visiting


def visited(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    for e, expert in enumerate(layer.experts):
        forward = expert.forward
        monkeypatch.setattr(expert, "forward", lambda x, p, e=e, forward=forward: (seen.append(e), forward(x, p))[1])
    return seen


def test_experts_that_nobody_chose_are_not_visited(monkeypatch):
    """Neither at inference; where gradients are made, all are, to the same bits."""
    layer = randomise(Experts(32, 2, Gated(4)).build(6))
    x = draw((1, 3, 6))
    want = layer(x, here(3))
    tap, seen = Record("**"), visited(layer, monkeypatch)
    with torch.no_grad():
        got = layer(x, here(3, tap, path="e"))
    assert torch.equal(got, want)
    assert seen == sorted(set(tap["e.chosen"].flatten().tolist())) and len(seen) <= 6
    seen.clear()
    layer(x, here(3)).sum().backward()
    assert seen == list(range(32)) and all(m.down.weight.grad is not None for m in layer.experts)


def test_every_place_is_visited_once_in_the_order_of_tokens():
    layer = Experts(5, 2, Gated(4)).build(6)
    chosen = torch.tensor([[[4, 1], [1, 0], [4, 3]]])
    with torch.no_grad():
        visits = {e: places.tolist() for e, places in layer.visits(chosen)}
    assert visits == {0: [3], 1: [1, 2], 3: [5], 4: [0, 4]}


# The clamped unit


def test_the_clamped_unit():
    """GPT-OSS (the published model code): the gate held from above, the other part on both sides."""
    layer, x = randomise(ClampedGated(7, limit=0.8, alpha=1.3).build(5)), draw((2, 6, 5)) * 3
    w = {n: v.detach().numpy() for n, v in layer.named_parameters()}
    hidden = x.numpy() @ w["gate_up.weight"].T + w["gate_up.bias"]
    gate, up = np.minimum(hidden[..., :7], 0.8), np.clip(hidden[..., 7:], -0.8, 0.8)
    assert (hidden > 0.8).any() and (hidden[..., :7] < -0.8).any(), "the limits are met"
    close(layer(x, here(6)), ((up + 1) * gate * papers.sigmoid(1.3 * gate)) @ w["down.weight"].T + w["down.bias"])


# Latent attention


def mla(x: Array, w: dict[str, Array], spec: LatentAttention, frequencies: Array, layout: str, scale: float) -> tuple[Array, Array]:
    """arXiv 2405.04434, equations 37 to 47 (appendix C), of one row: what the layer returns and its patterns."""
    h, n, r, v = spec.n_heads, spec.d_nope, spec.d_rope, spec.d_value or spec.d_nope
    norm = lambda y, name: papers.rms_norm(y, w[f"{name}.weight"], 1e-6)
    out, patterns = np.zeros_like(x), []
    c_kv = [norm(w["kv_down.weight"][: spec.kv_lora_rank] @ y, "kv_norm") for y in x]
    shared = [papers.rotate(w["kv_down.weight"][spec.kv_lora_rank :] @ y, t, frequencies, layout) for t, y in enumerate(x)]
    queries = [w["q.weight"] @ y if spec.q_lora_rank is None else w["q_up.weight"] @ norm(w["q_down.weight"] @ y, "q_norm") for y in x]
    for head in range(h):
        up = w["kv_up.weight"][head * (n + v) : (head + 1) * (n + v)]
        keys = np.array([np.concatenate([up[:n] @ c, s]) for c, s in zip(c_kv, shared, strict=True)])
        values = np.array([up[n:] @ c for c in c_kv])
        pattern = np.zeros((len(x), len(x)))
        for t, q in enumerate(queries):
            q = q[head * (n + r) : (head + 1) * (n + r)]
            q = np.concatenate([q[:n], papers.rotate(q[n:], t, frequencies, layout)])
            pattern[t, : t + 1] = papers.softmax(keys[: t + 1] @ q * scale)
        out += pattern @ values @ w["out.weight"][:, head * v : (head + 1) * v].T
        patterns.append(pattern)
    return out, np.array(patterns)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("q_rank", [None, 9])
@pytest.mark.parametrize("value", [None, 5])
def test_latent_attention_is_its_paper(layout, q_rank, value):
    spec = LatentAttention(3, 8, d_nope=4, d_rope=6, d_value=value, q_lora_rank=q_rank, position=Rotary(base=50.0, layout=layout), scale=0.7)
    layer, x, tap = randomise(spec.build(12)), draw((1, 7, 12)), Record("**")
    out = layer(x, here(7, tap, mask=Causal(), path="attn"))
    w = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    want, pattern = mla(x[0].numpy(), w, spec, papers.rope_frequencies(50.0, 6), layout, 0.7)
    close(out[0], want, atol=1e-6)  # angles are held in float32
    close(tap["attn.pattern"][0], pattern, atol=1e-6)
    default = spec.replace(scale=None).build(12)
    assert default.scale == pytest.approx(10**-0.5)


def test_the_latent_is_what_keys_and_values_are_made_of():
    layer, x, tap = randomise(LatentAttention(2, 6, d_nope=4, d_rope=2).build(8)), draw((2, 5, 8)), Record("**")
    layer(x, here(5, tap, mask=Causal(), path="a"))
    made = layer.kv_up(tap["a.latent"]).view(2, 5, 2, 8)
    same(tap["a.k"][..., :4], made[..., :4].detach())
    same(tap["a.v"], made[..., 4:].detach())
    turning = tap["a.k"][..., 4:]
    assert torch.equal(turning[:, :, 0], turning[:, :, 1]), "one rotated key for all heads"
    torch.testing.assert_close(tap["a.k_rot"][..., 4:].norm(dim=-1), turning.norm(dim=-1), atol=1e-6, rtol=1e-6)  # angles are held in float32
    assert "a.q_latent" not in tap and tap["a.latent"].shape == (2, 5, 6)


# Its cache


def test_the_cache_holds_the_latent_and_one_rotated_key():
    model, ids = built("latent"), tokens(2, 9)
    cache = model.cache(batch=2, capacity=None)
    tap = Record("**.latent")
    with torch.no_grad():
        model(ids, cache=cache, tap=tap)
    slot = cache.slot(0)
    assert slot.keys.shape == (2, 1, 9, 10) and slot.values.shape == (2, 1, 9, 4)
    assert torch.equal(slot.keys[:, 0], tap["blocks.0.attn.latent"])
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer["attn"].tensors().values())
    assert held == 2 * 9 * model.bytes().cache_per_token and model.bytes().cache_per_token == 2 * (10 + 4) * 4


@pytest.mark.parametrize("name", ["latent", "latent-window", "latent-sink"])
def test_the_absorbed_step_is_the_expanded_one(name, monkeypatch):
    """Decoding attends in the latent space; made to expand its keys, it gives the same."""
    model, ids = built(name, F64), tokens(2, 9)

    def decode(tap: Any = None) -> Tensor:
        cache = model.cache(batch=2, capacity=16)
        with torch.no_grad():
            model(ids[:, :5], cache=cache)
            return torch.cat([model(ids[:, i : i + 1], cache=cache, tap=tap) for i in range(5, 9)], 1)

    calls: list[int] = []
    layer = type(model.blocks[0].attn)
    absorbed = layer.absorbed
    monkeypatch.setattr(layer, "absorbed", lambda self, *args: (calls.append(1), absorbed(self, *args))[1])
    fast = decode()
    assert len(calls) == 8
    seen = Record("blocks.1.attn.{k,v,scores,pattern,z}".replace("{k,v,scores,pattern,z}", "*"))
    assert torch.equal(decode(seen), fast)
    calls.clear()
    slow = decode(Edit("**.v", lambda v: v.clone()))
    assert not calls, "an edit of keys or values is an edit of what is attended to"
    same(slow, fast)
    with torch.no_grad():
        same(fast, model(ids)[:, 5:])


@pytest.mark.parametrize("site", ["k", "v", "k_rot"])
@pytest.mark.parametrize("name", ["latent", "latent-window"])
def test_an_edit_in_a_cached_call_is_the_edit_in_the_whole(name, site):
    """Of the tokens of this call; the ring of a window, rows of unlike lengths and several tokens at once included."""
    model, ids = built(name, F64), tokens(2, 9)
    where = f"blocks.1.attn.{site}"
    twice = lambda x: torch.cat([x[:, :-2], 2.0 * x[:, -2:]], 1)
    with torch.no_grad():
        cache = model.cache(batch=2, capacity=16)
        model(ids[:, :7], cache=cache)
        got = model(ids[:, 7:], cache=cache, tap=Edit(where, twice))
        same(got, model(ids, tap=Edit(where, twice))[:, 7:])
        ragged = model.cache(batch=2, capacity=16)
        model(ids[:, :7], cache=ragged, lengths=[7, 4])
        new = torch.stack([ids[0, 7:9], ids[1, 4:6]])
        got = model(new, cache=ragged, tap=Edit(where, twice))
        for row, n in enumerate((9, 6)):
            same(got[row : row + 1], model(ids[row : row + 1, :n], tap=Edit(where, twice))[:, -2:])


def test_one_rows_latents_are_decoded_at_unlike_lengths():
    model, ids = built("latent", F64), tokens(2, 9)
    cache = model.cache(batch=2, capacity=16)
    with torch.no_grad():
        model(ids[:, :6], cache=cache, lengths=[6, 3])
        got = model(torch.stack([ids[0, 6:7], ids[1, 3:4]]), cache=cache)
        same(got[:1], model(ids[:1, :7])[:, -1:])
        same(got[1:], model(ids[1:, :4])[:, -1:])


# Anatomy


def test_parameters_and_operations_of_latent_attention():
    spec = LatentAttention(4, 10, d_nope=6, d_rope=4, d_value=5, q_lora_rank=12)
    d = 24
    parts = {"q_down": 12 * d, "q_up": 4 * 10 * 12, "kv_down": (10 + 4) * d, "kv_up": 4 * (6 + 5) * 10, "out": d * 4 * 5}
    model = Decoder(VOCAB, d, (Block(spec, Gated(8)),)).build(device="meta")
    sizes = {r.part.split(".")[3]: r.size for r in model.params().rows if ".attn." in r.part and "norm" not in r.part}
    assert sizes == parts
    rest = Decoder(VOCAB, d, (Block(Attention(4), Gated(8)),)).build(device="meta")
    matrices = model.flops_per_token(1) - rest.flops_per_token(1)
    assert matrices == 2 * (sum(parts.values()) - 4 * d * d) + 2 * 4 * (10 + 5) - 4 * d
    assert model.flops_per_token(9) - model.flops_per_token(1) == 4 * 2 * 4 * (10 + 5)


def test_operations_of_shared_experts_are_those_of_every_token():
    make = lambda ff: Decoder(VOCAB, D, (Block(Attention(4), ff),)).build(device="meta").flops_per_token(8)
    assert make(Experts(4, 2, Gated(16), shared=Gated(8))) == make(Experts(4, 2, Gated(16))) + 2 * 3 * D * 8


def test_a_shared_expert_has_sites_of_its_own():
    model, tap = built("experts-shared"), Record("**")
    model(tokens(1, 4), tap=tap)
    assert tap["blocks.1.experts.shared.post"].shape == (1, 4, 20)
    cut = Edit("blocks.1.experts.shared.out", torch.zeros_like) | Record("blocks.1.experts.out")
    with torch.no_grad():
        model(tokens(1, 4), tap=cut)
    found = {s.path for s in model.sites()}
    assert {f"blocks.0.experts.shared.{n}" for n in ("in", "pre", "gate", "post", "out")} <= found


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [("latent", True), ("experts-sigmoid", False)])
def test_compiled_it_is_the_same(name, whole):
    """Latent attention is one graph; experts are visited outside of it."""
    torch._dynamo.reset()
    spec: Any = ALL[name]
    model, ids, tap, plain = fresh(spec.replace(blocks=spec.blocks[:1])), tokens(), Record("**"), Record("**")
    run = torch.compile(model, backend="eager", fullgraph=whole)
    with torch.no_grad():
        same(run(ids, tap=tap), model(ids, tap=plain))
        for path in plain.paths:
            same(tap[path], plain[path], what=path)
        cache, step = model.cache(batch=2, capacity=16), torch.compile(model, backend="eager")
        same(torch.cat([step(ids[:, a:b], cache=cache) for a, b in ((0, 8), (8, 9))], 1), model(ids))
    torch._dynamo.reset()


# By name


def test_plain_data_without_a_type_means_the_usual_attention():
    assert Block.from_dict({"attention": {"n_heads": 4}}) == Block(Attention(4))
    latent = Block(LatentAttention(4, 10, d_nope=6, d_rope=4), Gated(8))
    assert Block.from_dict(latent.to_dict()) == latent
    with pytest.raises(SpecError, match=r"Block\.attention: LatentAttention has no field 'n_kv_heads'"):
        Block.from_dict({"attention": {"type": "LatentAttention", "n_kv_heads": 4}})
    with pytest.raises(SpecError, match="attention is a SelfAttention, but the class LatentAttention itself was given"):
        Block(LatentAttention)


# What cannot be


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Groups(2, 3), r"Groups\(n=2, keep=3\): keep at least 1 group and at most all\."),
        (lambda: Groups(2, 1, best=0), r"Groups\(best=0\): a group is judged by at least 1 of its experts\."),
        (lambda: Experts(5, 1, routing=SoftmaxRouting(groups=Groups(2, 1))), r"5 experts do not stand in 2 equal groups: make n_experts a multiple"),
        (
            lambda: Experts(4, 1, routing=SigmoidRouting(groups=Groups(4, 2, best=2))),
            r"by more experts than the 1 that it has \(4 experts in 4 groups\)",
        ),
        (lambda: Experts(8, 5, routing=SigmoidRouting(groups=Groups(4, 2))), r"top_k=5 experts cannot be chosen from 2 groups of 2: keep more groups\."),
        (lambda: ClampedGated(0), r"ClampedGated\(d_ff=0\): a feed-forward layer is at least 1 wide\."),
        (lambda: ClampedGated(4, limit=0.0), r"ClampedGated\(limit=0\.0\): values are held within a limit above 0\."),
        (lambda: LatentAttention(4, 0, 4, 4), r"LatentAttention\(kv_lora_rank=0\): it is at least 1\."),
        (lambda: LatentAttention(4, 4, 4, 4, cap=-1.0), r"LatentAttention\(cap=-1\.0\): a soft-cap is above zero"),
        (lambda: LatentAttention(4, 4, 4, 4, position=Learned(8)), r"Learned adds to the embedding: give it to the model"),
        (lambda: LatentAttention(4, 4, 4, 3).build(16), r"Rotary turns pairs, but fraction 1\.0 of d_head 3 is 3 features"),
    ],
)
def test_what_cannot_be_is_said(make, said):
    with pytest.raises(SpecError, match=said):
        make()


def test_a_wide_router_chooses_in_bfloat16_as_in_float32():
    """Where the product is rounded, some tokens go elsewhere; where it is not, the model's type changes no choice."""
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def choices(wide: bool, dtype: torch.dtype) -> Tensor:
        layer = Experts(64, 4, Gated(8), routing=SoftmaxRouting(wide=wide)).build(64)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for y in layer.parameters():
                y.copy_((torch.randn(y.shape, generator=g) / 8).bfloat16())
            layer = layer.to(dtype)
            return layer.routing.choose(layer.routing(layer.logits(x.to(dtype))), 4).sort(-1).values

    exact = choices(False, torch.float32)
    assert torch.equal(choices(True, torch.bfloat16), exact) and torch.equal(choices(True, torch.float32), exact)
    assert not torch.equal(choices(False, torch.bfloat16), exact)
