"""The compiled attention of a decode step: against float64, against the explicit way, and bit for bit against itself in other company."""

from __future__ import annotations

import math

import pytest
import torch

from glassformer.core import native
from glassformer.core.mask import And, Causal, Resolved, Window, resolve
from glassformer.parts import decoding, kernels
from glassformer.parts.kernels import Rule, Softmax, SoftmaxPlusOne, SoftmaxSink

pytestmark = pytest.mark.skipif(not native.wait(), reason="no compiler here, or GLASSFORMER_NATIVE=0")

NORMALISERS = {"softmax": Softmax(), "plus-one": SoftmaxPlusOne(), "sink": SoftmaxSink()}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normaliser(name: str, heads: int) -> kernels.NormaliserLayer:
    layer = NORMALISERS[name].build(heads)
    if name == "sink":
        with torch.no_grad():
            layer.sinks.copy_(numbers(heads, seed=9))
    return layer


def buffers(b: int, g: int, s: int, k: int, kv: int, dtype: torch.dtype, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The filled part of a cache; what lies beyond must not be read, so it is NaN."""
    keys, values = (torch.full((b, g, capacity, n), math.nan, dtype=dtype) for n in (k, kv))
    keys[:, :, :s], values[:, :, :s] = numbers(b, g, s, k, seed=1, dtype=dtype), numbers(b, g, s, kv, seed=2, dtype=dtype)
    return keys[:, :, :s], values[:, :, :s]


def rule_for(ends: torch.Tensor | None, window: int = 0, cap: float | None = None, layer: kernels.NormaliserLayer | None = None, scale: float = 0.3) -> Rule:
    mask = Resolved(Causal(), False, ends=ends, window=window)
    return Rule(scale, cap, None, mask, layer or Softmax().build(1))


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> torch.Tensor:
    with torch.no_grad():
        code = decoding.takes(q, k, v, rule, 0.0)
        assert code is not None
        return decoding.attend(code, q, k, v, rule)


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The explicit way in float64, under the mask that ``ends`` and ``window`` stand for."""
    b, _, t, _ = q.shape
    s = k.shape[2]
    ends = torch.full((b, t), s) if rule.mask.ends is None else rule.mask.ends.expand(b, t)
    place = torch.arange(s)
    visible = place < ends[..., None]
    if rule.mask.window:
        visible &= place >= ends[..., None] - rule.mask.window
    layer = rule.normaliser
    mask = Resolved(rule.mask.rule, False, visible[:, None])
    with torch.no_grad():
        return kernels.explicit(q.double(), k.double(), v.double(), Rule(rule.scale, rule.cap, None, mask, layer))


CASES = [
    # keys, queries, normaliser, cap, ragged, window
    (1, 1, "softmax", None, False, 0),
    (15, 1, "plus-one", None, False, 0),
    (15, 3, "sink", None, True, 5),
    (256, 1, "softmax", 2.0, True, 0),
    (257, 1, "sink", None, False, 300),
    (257, 3, "softmax", None, True, 0),
    (300, 8, "plus-one", None, False, 5),
    (600, 1, "softmax", 2.0, True, 300),
    (600, 2, "sink", None, True, 0),
]


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(("g", "k", "kv"), [(4, 64, 64), (2, 16, 16), (1, 80, 80), (4, 5, 3), (2, 40, 24), (1, 96, 128), (4, 1, 1)])
def test_equals_float64(dtypes, g, k, kv):
    h, b = 4, 2
    for s, t, name, cap, ragged, window in CASES:
        q = numbers(b, h, t, k, seed=3, dtype=dtypes[0])
        keys, values = buffers(b, g, s, k, kv, dtypes[1], s + 3)
        ends = torch.arange(s - t, s) + 1
        if ragged:
            ends = torch.stack([ends, (ends - s // 2).clamp(min=1)])
        elif t == 1 and window == 0:
            ends = None
        rule = rule_for(ends, window, cap, normaliser(name, h))
        z, exact = run(q, keys, values, rule), truth(q, keys, values, rule)
        assert z.dtype == q.dtype
        assert z.shape == exact.shape
        error = (z.double() - exact).abs().max().item()
        assert error < (5e-6 if q.dtype == torch.float32 else 1.3e-2), (s, t, name, cap, ragged, window, error)


def test_exponential_is_off_by_an_ulp_at_most():
    # One key whose weight against a sink at 0 is e^x / (1 + e^x): values of 1 show the soft-max itself.
    x = torch.cat([torch.linspace(-86, 0, 4001), -torch.logspace(-6, 1.9, 2000)])
    layer = normaliser("plus-one", 1)
    q = x.view(-1, 1, 1, 1)
    ones = torch.ones(len(x), 1, 1, 1)
    z = run(q, ones, ones, rule_for(None, layer=layer, scale=1.0)).flatten().double()
    exact = x.double().sigmoid()
    assert ((z - exact) / exact).abs().max() < 4 * 2**-24  # the exponential, a sum, a quotient and a product


def test_scores_far_apart_and_extreme():
    keys = torch.tensor([[1000.0], [-1000.0], [999.0], [0.0]])[None, None]
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]])[None, None]
    q = torch.ones(1, 1, 1, 1)
    z = run(q, keys, values, rule_for(None, scale=1.0))
    assert torch.allclose(z, (1 + 3 * torch.tensor(-1.0).exp()) / (1 + torch.tensor(-1.0).exp()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("place", [0, 200, 300])
def test_nan_and_infinity_come_out_where_the_explicit_way_has_them(bad, where, place):
    q, (k, v) = numbers(2, 2, 1, 16, seed=4), buffers(2, 2, 310, 16, 16, torch.float32, 320)
    if where == "query":
        q[0, 1, 0, 3] = bad
    else:
        (k if where == "key" else v)[0, 1, place, 3] = bad
    rule = rule_for(None)
    z, exact = run(q, k, v, rule), truth(q, k, v, rule)
    assert torch.equal(z.isnan(), exact.isnan())
    assert torch.equal(z.isinf(), exact.isinf())
    assert not z[1].isnan().any()


def test_keys_at_minus_infinity_weigh_nothing_and_none_left_gives_zeros():
    q, (k, v) = torch.ones(1, 1, 1, 4), buffers(1, 1, 300, 4, 4, torch.float32, 300)
    k[0, 0, :299] = -math.inf
    assert torch.equal(run(q, k, v, rule_for(None)), v[:, :, 299:])
    k[...] = -math.inf
    assert torch.equal(run(q, k, v, rule_for(None)), torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("g", [1, 2, 8])
def test_the_bits_of_a_row_depend_on_that_row_alone(dtype, g):
    lengths, h, k = [1, 255, 256, 600, 1_111], 8, 64
    b, s = len(lengths), max(lengths)
    q, (keys, values) = numbers(b, h, 1, k, seed=5), buffers(b, g, s, k, k, dtype, s + 100)
    together = run(q, keys, values, rule_for(torch.tensor(lengths)[:, None]))
    for row, n in enumerate(lengths):
        # Alone, in a smaller buffer, after others, on one thread.
        own = [x[row : row + 1, :, :n].clone() for x in (keys, values)]
        assert torch.equal(run(q[row : row + 1], *own, rule_for(None)), together[row : row + 1])
    flipped = run(q.flip(0), keys.flip(0), values.flip(0), rule_for(torch.tensor(lengths[::-1])[:, None]))
    assert torch.equal(flipped.flip(0), together)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(run(q, keys, values, rule_for(torch.tensor(lengths)[:, None])), together)
    finally:
        torch.set_num_threads(threads)


def test_several_queries_have_the_bits_that_each_has_alone():
    h, g, k, s, t = 8, 2, 64, 700, 8
    q, (keys, values) = numbers(1, h, t, k, seed=6), buffers(1, g, s, k, k, torch.float32, s)
    ends = torch.arange(s - t, s) + 1
    together = run(q, keys, values, rule_for(ends))
    for i in range(t):
        n = int(ends[i])
        assert torch.equal(run(q[:, :, i : i + 1], keys[:, :, :n], values[:, :, :n], rule_for(None)), together[:, :, i : i + 1])


def test_views_of_any_steps():
    q = numbers(2, 3, 1, 4 * 16, seed=7).view(2, 3, 4, 16).transpose(1, 2)[:, :, :1]  # steps of a projection's output
    k, v = numbers(2, 300, 2, 16, seed=8).transpose(1, 2), numbers(2, 2, 16, 300, seed=9).transpose(2, 3)
    assert v.stride(3) != 1
    rule = rule_for(None)
    assert torch.allclose(run(q, k, v, rule).double(), truth(q, k, v, rule), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_new_keys_and_values_are_written_at_their_places(dtype, ragged):
    b, h, g, k, s, t = 2, 4, 2, 16, 20, 2
    q, (keys, values) = numbers(b, h, t, k, seed=10), buffers(b, g, s, k, k, dtype, 30)
    new = numbers(b, t, g, k, seed=11), numbers(b, t, g, k, seed=12)
    ends = torch.tensor([[19, 20], [7, 8]]) if ragged else torch.tensor([19, 20])
    written = keys.clone(), values.clone()
    for row in range(b):
        for i in range(t):
            place = int(ends.expand(b, t)[row, i]) - 1
            for x, n in zip(written, new, strict=True):
                x[row, :, place] = n[row, i].to(dtype)
    rule = rule_for(ends)
    expected = run(q, *written, rule)
    with torch.no_grad():
        z = decoding.attend(decoding.takes(q, keys, values, rule, 0.0), q, keys, values, rule, new)
    assert torch.equal(z, expected)
    assert torch.equal(keys, written[0])
    assert torch.equal(values, written[1])


def test_what_it_does_not_take():
    q, (k, v) = numbers(1, 2, 1, 8, seed=1), buffers(1, 2, 9, 8, 8, torch.float32, 9)
    rule = rule_for(None)
    assert decoding.takes(q, k, v, rule, 0.0) is None  # gradients may be asked for
    with torch.no_grad():
        assert decoding.takes(q, k, v, rule, 0.0) is not None
        assert decoding.takes(q, k, v, rule, 0.5) is None
        assert decoding.takes(q.double(), k.double(), v.double(), rule, 0.0) is None
        assert decoding.takes(numbers(1, 2, 9, 8, seed=1), k, v, rule, 0.0) is None
        assert decoding.takes(q, k, v, Rule(1.0, None, torch.zeros(1, 2, 1, 9), rule.mask, rule.normaliser), 0.0) is None
        assert decoding.takes(q, k, v, Rule(1.0, None, None, rule.mask, kernels.Sigmoid().build(2)), 0.0) is None
        dense = Resolved(Causal(), False, torch.ones(1, 1, 1, 9, dtype=torch.bool))
        assert decoding.takes(q, k, v, Rule(1.0, None, None, dense, rule.normaliser), 0.0) is None
        assert decoding.takes(q, k, v, Rule(1.0, None, None, Resolved(Causal(), True), rule.normaliser), 0.0) is None
        batched = torch.vmap(lambda x: decoding.attend(None, x, k, v, rule) if decoding.takes(x, k, v, rule, 0.0) else x)(q[None])
        assert torch.equal(batched[0], q)


def test_a_ragged_step_says_how_far_each_row_sees_and_makes_no_matrix():
    index, keys = torch.tensor([[6], [3]]), torch.arange(7)
    mask = resolve(And((Causal(), Window(4))), index, keys, rows=2, in_order=True)
    assert (mask.ends.tolist(), mask.window) == ([[7], [4]], 4)
    assert mask._dense is None
    assert mask.dense.squeeze().tolist() == [[False] * 3 + [True] * 4, [True] * 4 + [False] * 3]
    assert resolve(Causal(), index, keys, rows=2).ends is None  # nobody said that key j is the one at place j
    assert resolve(Causal(), torch.arange(9, 20)[None], torch.arange(20), rows=1, in_order=True).ends is None  # more queries than a step has


@pytest.mark.parametrize(("d", "window"), [(4, None), (20, None), (64, None), (64, 100), (20, 37)])
def test_a_query_has_the_same_bits_alone_and_among_others(d: int, window: int | None) -> None:
    """Whatever the tail of a head (fused everywhere) and whatever the windows of the other queries (a key keeps its lane)."""
    s, t = 150, 5
    mask = Causal() if window is None else Causal() & Window(window)
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(1, 2, t, d, generator=g), torch.randn(1, 2, s, d, generator=g), torch.randn(1, 2, s, d, generator=g)

        def run(begin: int, end: int, q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            seen = s - t + end
            resolved = resolve(mask, torch.arange(s - t + begin, seen), torch.arange(seen), rows=1, in_order=True)
            rule = Rule(d**-0.5, None, None, resolved, Softmax().build(2))
            with torch.no_grad():
                code = decoding.takes(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], rule, 0.0)
                assert code is not None
                return decoding.attend(code, q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], rule)

        together = run(0, t)
        assert all(torch.equal(run(i, i + 1)[:, :, 0], together[:, :, i]) for i in range(t))


def test_what_a_window_hides_is_never_mixed() -> None:
    """Keys that are scored only to keep lanes are left out of the sum: a NaN just outside the window does not spread."""
    q, (k, v) = numbers(1, 1, 1, 16, seed=0), buffers(1, 1, 50, 16, 16, torch.float32, 50)
    v[:, :, :30] = math.nan
    with torch.no_grad():
        rule = rule_for(torch.tensor([[50]]), window=20)
        code = decoding.takes(q, k, v, rule, 0.0)
        assert code is not None
        assert decoding.attend(code, q, k, v, rule).isfinite().all()
