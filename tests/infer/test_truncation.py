"""Links that remove tokens by the shape of the distribution: their rules, their edges, and transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import SamplerError
from glassformer.core.spec import registered
from glassformer.infer import (
    XTC,
    AdaptiveP,
    Chain,
    Draw,
    DynamicTemperature,
    Epsilon,
    Eta,
    Greedy,
    Link,
    Mirostat1,
    Mirostat2,
    Temperature,
    TopA,
    TopH,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)
from glassformer.infer.links import strongest, strongest_by_numpy
from glassformer.infer.thinning import _cut_by_adding
from glassformer.infer.truncation import _together, _together_by_numpy
from infer import links_in_numpy as rules

B, V = 6, 150


def logits(b=B, v=V, seed=0, scale=3.0):
    x = torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * scale
    x[1, 4:90] = -math.inf  # some tokens are gone already
    x[2] *= 0.05  # nearly flat
    x[3, 7] += 20  # nearly certain
    return x


CASES = [
    (Typical(0.2), lambda x: rules.typical(x, 0.2)),
    (Typical(0.9), lambda x: rules.typical(x, 0.9)),
    (Typical(0.999), lambda x: rules.typical(x, 0.999)),
    (Typical(0.1, min_keep=5), lambda x: rules.typical(x, 0.1, 5)),
    (TopNSigma(0.5), lambda x: rules.top_n_sigma(x, 0.5)),
    (TopNSigma(1.0), lambda x: rules.top_n_sigma(x, 1.0)),
    (TopNSigma(2.5), lambda x: rules.top_n_sigma(x, 2.5)),
    (TopH(0.1), lambda x: rules.top_h(x, 0.1)),
    (TopH(0.4), lambda x: rules.top_h(x, 0.4)),
    (TopH(0.95), lambda x: rules.top_h(x, 0.95)),
    (TopH(0.7, width=20), lambda x: rules.top_h(x, 0.7, 20)),
    (TopH(0.7, width=1000), lambda x: rules.top_h(x, 0.7, 1000)),
    (Epsilon(3e-4), lambda x: rules.epsilon(x, 3e-4)),
    (Epsilon(0.02), lambda x: rules.epsilon(x, 0.02)),
    (Epsilon(0.9), lambda x: rules.epsilon(x, 0.9)),
    (Epsilon(0.9, min_keep=4), lambda x: rules.epsilon(x, 0.9, 4)),
    (Eta(3e-4), lambda x: rules.eta(x, 3e-4)),
    (Eta(0.05), lambda x: rules.eta(x, 0.05)),
    (Eta(0.9, min_keep=3), lambda x: rules.eta(x, 0.9, 3)),
    (TopA(0.02), lambda x: rules.top_a(x, 0.02)),
    (TopA(0.5), lambda x: rules.top_a(x, 0.5)),
    (TopA(1.0, min_keep=2), lambda x: rules.top_a(x, 1.0, 2)),
]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("link", "rule"), CASES, ids=[repr(link) for link, _ in CASES])
def test_each_link_is_its_rule(link, rule, scale):
    x = logits(scale=scale)
    want = np.stack([rule(row) for row in x.double().numpy()])
    assert np.array_equal(link.apply(x).double().numpy(), want)
    assert torch.equal(x, logits(scale=scale))  # what was given is not written to


@pytest.mark.parametrize("v", [1, 2, 5])
@pytest.mark.parametrize(("link", "rule"), CASES, ids=[repr(link) for link, _ in CASES])
def test_a_link_is_its_rule_over_few_tokens(link, rule, v):
    x = torch.randn(20, v, generator=torch.Generator().manual_seed(v))
    assert np.array_equal(link.apply(x).double().numpy(), np.stack([rule(row) for row in x.double().numpy()]))


OFF = [Typical(1), TopNSigma(0), TopNSigma(-1), TopH(1), Epsilon(0), Eta(0), TopA(0)]


@pytest.mark.parametrize("link", OFF, ids=repr)
def test_off_values_do_nothing(link):
    x = logits()
    assert link.off
    assert torch.equal(link.apply(x), x)
    assert torch.equal((link | Draw(3))(x), Chain((Draw(3),))(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Typical(0.0), "typical sampling takes a probability above 0 and up to 1, but 0.0"),
        (lambda: Typical(1.1), "but 1.1 was given. Use 1 to keep all"),
        (lambda: Typical(0.5, min_keep=0), "min_keep is 1 or more, but 0"),
        (lambda: TopNSigma(math.nan), "a finite number of standard deviations, but nan"),
        (lambda: TopNSigma(math.inf), "a finite number of standard deviations, but inf"),
        (lambda: TopH(0.0), "a part of the entropy above 0 and up to 1, but 0.0"),
        (lambda: TopH(1.5), "up to 1, but 1.5"),
        (lambda: TopH(0.5, width=0), "1 token or more, but a width of 0"),
        (lambda: Epsilon(1.0), "epsilon is a probability from 0 to below 1, but 1.0"),
        (lambda: Epsilon(-0.1), "but -0.1 was given. Use 0 to keep all"),
        (lambda: Epsilon(0.1, min_keep=-2), "min_keep is 1 or more, but -2"),
        (lambda: Eta(1.0), "eta is a probability from 0 to below 1, but 1.0"),
        (lambda: Eta(0.1, min_keep=0), "min_keep is 1 or more, but 0"),
        (lambda: TopA(1.01), "a factor from 0 to 1 of the squared probability of the strongest token, but 1.01"),
        (lambda: TopA(-1.0), "but -1.0 was given. Use 0 to keep all"),
        (lambda: TopA(0.1, min_keep=0), "min_keep is 1 or more, but 0"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(make, words):
    with pytest.raises(SamplerError, match=words):
        make()


def test_the_links_are_registered_and_print_as_they_are_written():
    assert set(registered(Link)) >= {
        "Typical",
        "TopNSigma",
        "TopH",
        "Epsilon",
        "Eta",
        "TopA",
        "DynamicTemperature",
        "XTC",
        "Mirostat1",
        "Mirostat2",
        "AdaptiveP",
    }
    chain = TopNSigma(1.5) | Typical(0.9) | TopH(0.4) | Epsilon(0.01) | Eta(0.02) | TopA(0.2) | XTC(0.5) | DynamicTemperature(1.0, 0.5) | Mirostat2() | Draw(1)
    assert eval(repr(chain)) == chain
    assert Chain.from_dict(chain.to_dict()) == chain


# What is particular to one of them


def test_typical_can_remove_the_strongest_token():
    p = torch.tensor([[0.4] + [0.6 / 60] * 60])  # H = 3.3 bits above: 0.01 is nearer to it than 0.4
    left = Typical(0.3).apply(p.log())
    assert left[0, 0] == -math.inf and (left[0, 1:] > -math.inf).all()


def test_typical_keeps_equals_of_the_last_one_together():
    assert (Typical(0.5).apply(torch.zeros(2, 9)) == 0).all()


def test_top_n_sigma_does_not_depend_on_the_temperature_before_it():
    x = logits()
    kept = TopNSigma(1.2).apply(x) > -math.inf
    for t in (0.3, 2.0, 7.0):
        assert torch.equal((TopNSigma(1.2).apply(Temperature(t).apply(x))) > -math.inf, kept)


def test_top_n_sigma_of_a_small_spread_far_from_zero():
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(TopNSigma(1.0).apply(x.round(decimals=2)) > -math.inf, TopNSigma(1.0).apply(x.round(decimals=2) + 1000) > -math.inf)


def test_top_h_leaves_at_most_its_width():
    x = torch.zeros(2, 400)
    columns = TopH(0.999).narrow(x)[1]
    assert columns.tolist() == [list(range(100))] * 2
    assert (TopH(0.999).apply(x) > -math.inf).sum(-1).tolist() == [99, 99]
    assert (TopH(0.5, width=10).apply(x) > -math.inf)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_eta_is_epsilon_for_a_sure_model_and_lower_for_an_unsure_one():
    sure, unsure = logits(scale=5.0)[4:5], logits()[2:3]
    assert torch.equal(Eta(1e-4).apply(sure), Epsilon(1e-4).apply(sure))
    assert (Eta(0.02).apply(unsure) > -math.inf).sum() > (Epsilon(0.02).apply(unsure) > -math.inf).sum()


def test_pairs_are_sorted_alike_by_numpy_and_by_torch():
    key = torch.rand(5, 300, generator=torch.Generator().manual_seed(0))
    key[0], key[1, ::2], key[2, 3:90] = 0.0, 0.25, math.inf
    value = torch.rand(5, 300, generator=torch.Generator().manual_seed(1)).square()
    value[0], value[1, ::2], value[2, 3:90] = 0.5, 0.125, 0.0
    for a, b in zip(_together(key, value), _together_by_numpy(key, value), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_strongest_are_found_by_numpy_where_rows_have_too_few_or_equals_or_nan(k):
    x = torch.zeros(6, 40)
    x[:4, 30:32], x[0, 35], x[1, 32:34] = 1.0, math.nan, 1.0  # as many too few in one row as too many in the other
    assert torch.equal(strongest_by_numpy(x, k), strongest(x, k))
    x[2, 1:38], x[3], x[4, ::2] = -math.inf, -math.inf, -math.inf
    assert torch.equal(strongest_by_numpy(x, k), strongest(x, k))
    x = x.nan_to_num(0.5, neginf=-math.inf)
    assert torch.equal(strongest_by_numpy(x, k), strongest(x, k))
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(k)).masked_fill(
        torch.rand(6, 40, generator=torch.Generator().manual_seed(k)) < 0.9, -math.inf
    )
    assert torch.equal(strongest_by_numpy(x, k), strongest(x, k))


@pytest.mark.parametrize("most", [30.0, 1e-3, 3e38])
def test_cutting_by_adding_is_masking(most):
    x = (torch.rand(7, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1) * most
    x[1, :50], x[2], x[3, 4], x[4, 5] = -math.inf, -math.inf, math.nan, math.inf
    least = torch.stack([x[0, 7], x[1, 60], x[2, 0], x[3, 9], x[4, 9], torch.tensor(math.nan), torch.tensor(-math.inf)])[:, None]
    for bar in (least, torch.nextafter(least, torch.tensor(math.inf))):
        assert torch.equal(_cut_by_adding(x, bar).nan_to_num(99, neginf=-math.inf), x.masked_fill(x < bar, -math.inf).nan_to_num(99, neginf=-math.inf))


# Whatever the model gives

ANY = [
    Typical(0.3),
    TopNSigma(0.7),
    TopH(0.4),
    TopH(0.4, width=3),
    Epsilon(0.3),
    Eta(0.3),
    TopA(0.9),
    DynamicTemperature(0.7, 0.7),
    DynamicTemperature(1.0, 0.3, 2.0),
    XTC(1.0, 0.05),
    Mirostat1(1.0),
    Mirostat2(1.0),
    AdaptiveP(0.4),
]
NUMBERS = st.one_of(
    st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -1.0, -math.inf, -math.inf, math.inf, math.nan, 1e4, -1e4]), st.integers(-2, 2).map(float)
)


@pytest.mark.parametrize("link", ANY, ids=repr)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.lists(NUMBERS, min_size=48, max_size=48), width=st.integers(1, 12))
def test_some_token_is_always_left_and_rows_do_not_meet(link, data, width):
    x = torch.tensor(data).reshape(4, 12)[:, :width]
    (after,) = [step.logits for step in Chain((link,)).steps(x)]
    clean = ~(x.isnan().any(1) | (x == math.inf).any(1))
    assert after.shape == x.shape
    assert ((after > -math.inf).any(1) == (x > -math.inf).any(1))[clean].all()
    assert not after[clean].isnan().any() and (after[clean] < math.inf).all()
    assert not ((after > -math.inf) & (x == -math.inf)).any()  # what was gone stays gone
    assert ((after.isnan() | (after > -math.inf)).any(1) == (x.isnan() | (x > -math.inf)).any(1)).all()
    alone = next(step.logits for step in Chain((link,)).steps(x[:1]))
    assert torch.equal(alone.nan_to_num(99), after[:1].nan_to_num(99))
    chosen = (link | Draw(0))(x)
    unreadable = x.isnan().any(1) | (x == math.inf).any(1) | (x == -math.inf).all(1)
    assert (chosen[~unreadable] >= 0).all()


@pytest.mark.parametrize("link", ANY, ids=repr)
@pytest.mark.parametrize("before", [TopK(40), TopP(0.9), TopH(0.6), Temperature(0.8)], ids=repr)
def test_the_narrowed_way_is_the_plain_way(before, link):
    for chain in (before | link | Draw(5), link | before | Greedy(), before | link | before | link | Draw(2)):
        state = chain.state(B, seeds=[3, 1, 4, 1, 5, 9])
        for n in range(4):
            x = logits(seed=n)
            *_, last = chain.steps(x, None, state)
            assert last.chosen == chain(x, None, state).tolist(), chain
            assert min(last.chosen) >= 0


@pytest.mark.parametrize("link", ANY, ids=repr)
def test_half_precision_is_computed_in_float32(link):
    x = logits().bfloat16()
    (a,), (b,) = Chain((link,)).steps(x), Chain((link,)).steps(x.float())
    assert a.logits.dtype == torch.float32
    assert torch.equal(a.logits, b.logits)
