"""Fused = explicit = FlexAttention, for every mask, bias, normaliser, cap, group and value size; gradients too."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention

from glassformer import Attention, Block, Decoder, LayerNorm, Plain, Rotary
from glassformer.core.mask import And, Causal, Everything, Mask, Padding, Resolved, SameDocument, Visible, Window, resolve
from glassformer.parts import kernels
from glassformer.parts.kernels import Rule, Sigmoid, Softmax, SoftmaxPlusOne, SoftmaxSink
from tools import draw, same

B, H, K, S = 2, 4, 5, 7
NORMALISERS = {"softmax": Softmax(), "plus-one": SoftmaxPlusOne(), "sink": SoftmaxSink(), "sigmoid": Sigmoid(), "sigmoid-bias": Sigmoid(-1.5)}
MASKS: dict[str, Mask] = {
    "everything": Everything(),
    "causal": Causal(),
    "window": And((Causal(), Window(3))),
    "around": Window(2),
    "padding": And((Causal(), Padding(torch.tensor([4, 7])))),
    "left": And((Causal(), Visible(torch.arange(S)[None] >= torch.tensor([[0], [2]])))),
    "documents": And((Causal(), SameDocument(torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])))),
    "nothing": ~Everything(),
}
BIASES = {"none": None, "of-heads": (1, H), "of-rows": (B, H), "shared": (1, 1)}


def made(mask: str, bias: str, normaliser: str, *, g: int = H, value: int = K, cap: float | None = None, t: int = S, s: int = S, dtype=torch.float64):
    q, k, v = draw((B, H, t, K), 1, dtype), draw((B, g, s, K), 2, dtype), draw((B, g, s, value), 3, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    shape = BIASES[bias]
    b = None if shape is None else draw((*shape, t, s), 4, dtype)
    layer = NORMALISERS[normaliser].build(H).to(dtype)
    if normaliser == "sink":
        with torch.no_grad():
            layer.sinks.copy_(draw((H,), 5))
    k_index = torch.arange(s)
    q_index = k_index if t == s else k_index[s - t :]
    rule = Rule(0.7, cap, b, resolve(MASKS[mask], q_index, k_index, rows=B), layer)
    return q, k, v, rule


def gradients(out, *inputs):
    weights = draw(out.shape, 6, out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)


FUSED = ["softmax", "plus-one", "sink"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", BIASES)
def test_fused_equals_explicit(mask, bias):
    for normaliser, (g, value), t in itertools.product(FUSED, ((H, K), (2, K), (1, 3), (H, 9)), (S, 2, 1)):
        q, k, v, rule = made(mask, bias, normaliser, g=g, value=value, t=t)
        assert kernels.has_fused(rule, q.device)
        a, b = kernels.fused(q, k, v, rule), kernels.explicit(q, k, v, rule)
        assert a.shape == (B, H, t, value)
        what = f"{normaliser} g={g} value={value} t={t}"
        same(a, b, what=what)
        if t == S:
            for x, y in zip(gradients(a, q, k, v), gradients(b, q, k, v), strict=True):
                same(x, y, what=f"gradient, {what}")


@pytest.mark.parametrize("mask", MASKS)
def test_fused_equals_explicit_in_float32(mask):
    for normaliser, bias, g in itertools.product(FUSED, BIASES, (H, 2)):
        q, k, v, rule = made(mask, bias, normaliser, g=g, dtype=torch.float32)
        same(kernels.fused(q, k, v, rule), kernels.explicit(q, k, v, rule), what=f"{normaliser} {bias} {g}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cap", [None, 1.3])
def test_flex_equals_explicit(mask, cap, monkeypatch):
    """FlexAttention in plain steps (no kernel is compiled) is the same function, so the GPU's path has its twin on any machine."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    for bias, g, t in (("none", H, S), ("of-heads", 2, S), ("of-rows", 2, 3), ("shared", 1, 1)):
        q, k, v, rule = made(mask, bias, "softmax", g=g, cap=cap, t=t, dtype=torch.float32)
        same(kernels.flex(q.detach(), k.detach(), v.detach(), rule), kernels.explicit(q, k, v, rule).detach(), what=f"{bias} g={g} t={t}")


def test_a_capped_kernel_exists_on_an_accelerator_only():
    *_, capped = made("causal", "none", "softmax", cap=2.0)
    *_, sigmoid = made("causal", "none", "sigmoid")
    assert not kernels.has_fused(capped, torch.device("cpu")) and kernels.has_fused(capped, torch.device("cuda"))
    assert not kernels.has_fused(sigmoid, torch.device("cuda"))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("cap", [None, 1.3])
def test_some_heads_cost_and_give_those_heads_only(normaliser, cap, monkeypatch):
    for mask, bias, g in itertools.product(("causal", "padding"), BIASES, (H, 2, 1)):
        q, k, _, rule = made(mask, bias, normaliser, g=g, cap=cap)
        whole = kernels.scores_of(q, k, rule)
        some = kernels.scores_of(q, k, rule, (3, 1))
        assert some.shape == (B, 2, S, S)
        same(some, whole[:, [3, 1]])
        same(kernels.pattern_of(some, rule, (3, 1)), kernels.pattern_of(whole, rule)[:, [3, 1]])


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_unseen_has_no_weight_and_the_blind_see_nothing(normaliser, mask):
    q, k, _, rule = made(mask, "of-heads", normaliser)
    pattern = kernels.pattern_of(kernels.scores_of(q, k, rule), rule)
    visible = rule.mask.tensor(S, S, q.device)
    if visible is not None:
        assert pattern.masked_select(~visible).abs().sum() == 0
    assert torch.isfinite(pattern).all()
    if normaliser == "softmax" and mask not in ("nothing", "left"):
        same(pattern.sum(-1), torch.ones(B, H, S, dtype=torch.float64))
    if normaliser in ("plus-one", "sink"):
        assert (pattern.sum(-1) < 1).all()


def test_dropout_of_the_pattern_keeps_its_mean():
    q, k, v, rule = made("causal", "none", "softmax")
    torch.manual_seed(0)
    for way in (kernels.fused, kernels.explicit):
        dropped = torch.stack([way(q, k, v, rule, 0.3) for _ in range(400)])
        assert dropped.std(0).max() > 0.05
        assert (dropped.mean(0) - way(q, k, v, rule)).abs().max() < 0.25


def test_bfloat16_training_attention_on_a_cpu_is_the_float32_kernel() -> None:
    # Its backward pass is ten times faster there; the output and gradients are those of float32, rounded once.
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8).bfloat16().requires_grad_() for _ in range(3))
    rule = Rule(8**-0.5, None, None, Resolved(Causal(), True, None), Softmax().build(4))
    out = kernels.fused(q, k, v, rule)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    reference = kernels.fused(*wide, rule)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, reference.bfloat16())
    out.sum().backward()
    reference.sum().backward()
    for x, w in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(x.grad.float(), w.grad, atol=1e-2, rtol=1e-2)  # one rounding to bfloat16


def test_queries_that_were_normed_do_not_fall_into_the_bfloat16_kernel(monkeypatch) -> None:
    # Normed queries and keys arrive in float32; under autocast the kernel would still take everything in bfloat16.
    spec = Attention(n_heads=2, position=Rotary(), qk_norm=LayerNorm())
    model = Decoder(vocab_size=11, d_model=16, blocks=(Block(attention=spec, feedforward=Plain(d_ff=16)),) * 2).build(seed=0)
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, *args, **kw):
        seen.append({q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")})
        return kernel(q, k, v, *args, **kw)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(8)[None])
        assert seen == [{torch.float32, False}] * 2
        seen.clear()
        with torch.no_grad():  # the forward pass is as fast in bfloat16
            model(torch.arange(8)[None])
    assert all(True in s for s in seen) and len(seen) == 2


def test_a_soft_cap_with_a_sink_or_dropout_has_no_fused_kernel():
    cuda = torch.device("cuda")
    for normaliser, fits in (("softmax", True), ("plus-one", False), ("sink", False)):
        rule = made("causal", "none", normaliser, cap=3.0)[3]
        assert kernels.has_fused(rule, cuda) is fits and not kernels.has_fused(rule, cuda, 0.1)
    assert kernels.has_fused(made("causal", "none", "sink")[3], cuda, 0.1)


@torch.no_grad()
def test_without_gradients_the_numbers_are_those_with_them():
    """Without them scores are written over in place, and the passes for empty rows are left out where there are none."""
    for mask, bias, normaliser, cap in itertools.product(MASKS, BIASES, NORMALISERS, (None, 3.0)):
        q, k, _, rule = made(mask, bias, normaliser, cap=cap)
        with torch.enable_grad():
            scores = kernels.scores_of(q, k, rule)
            pattern = kernels.pattern_of(scores, rule)
        free = kernels.scores_of(q, k, rule)
        assert torch.equal(free, scores) and torch.equal(kernels.pattern_of(free, rule), pattern)
        assert torch.equal(free, scores)  # a pattern does not write into its scores


@torch.no_grad()
def test_under_transforms_and_modes():
    """In place of the plain arithmetic where somebody stands between: masks by vmap, tensors without numbers."""
    q, k, _, rule = made("causal", "none", "softmax", dtype=torch.float32)
    masks = torch.stack([torch.ones(S, S, dtype=torch.bool).tril(n) for n in (0, 1, -1)])

    def under(mask: torch.Tensor) -> torch.Tensor:
        asked = Rule(rule.scale, None, None, Resolved(Everything(), False, mask[None, None]), rule.normaliser)
        return kernels.pattern_of(kernels.scores_of(q, k, asked), asked)

    assert torch.equal(torch.func.vmap(under)(masks), torch.stack([under(m) for m in masks]))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(B, H, S, K)
        assert kernels.pattern_of(kernels.scores_of(fake, fake, rule), rule).shape == (B, H, S, S)
