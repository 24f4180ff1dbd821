"""Each link against the same rule written again in NumPy, float64, one row and one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glassformer.infer import Chain, Draw, Greedy, LogitBias, MinP, Penalties, Suppress, Temperature, TopK, TopP
from glassformer.infer.state import uniform

V, B = 37, 5


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def temperature(x, t):
    if t == 0:
        return np.where(np.arange(len(x)) == x.argmax(), x, -np.inf)
    return x / t


def top_k(x, k):
    order = np.argsort(-x)
    y = np.full_like(x, -np.inf)
    y[order[: k or len(x)]] = x[order[: k or len(x)]]
    return y


def top_p(x, p, min_keep=1):
    y, total, prob = np.full_like(x, -np.inf), 0.0, softmax(x)
    for i, token in enumerate(np.argsort(-x)):
        if total >= p and i >= min_keep:
            break
        y[token] = x[token]
        total += prob[token]
    return y


def min_p(x, p, min_keep=1):
    if p == 0:
        return x
    strong = set(np.argsort(-x)[:min_keep])
    return np.array([l if l >= x.max() + math.log(p) or i in strong else -np.inf for i, l in enumerate(x)])


def penalties(x, history, repetition=1.0, frequency=0.0, presence=0.0, window=None):
    y = x.copy()
    recent = history if window is None else history[len(history) - min(window, len(history)) :]
    for token in set(recent):
        y[token] = y[token] * repetition if y[token] <= 0 else y[token] / repetition
        y[token] -= recent.count(token) * frequency + presence
    return y


def bias(x, table):
    return np.array([l + table.get(i, 0.0) for i, l in enumerate(x)])


def suppress(x, ids):
    return np.array([-np.inf if i in ids else l for i, l in enumerate(x)])


def draw(x, u):
    total = 0.0
    for token, p in enumerate(softmax(x)):
        total += p
        if total > u:
            return token
    raise AssertionError


@pytest.fixture
def logits():
    x = torch.randn(B, V, generator=torch.Generator().manual_seed(3)) * 3
    x[1, 4:20] = float("-inf")  # some tokens are gone already
    return x


HISTORY = [[3, 3, 3, 9], [1], [], [36, 0, 36, 5, 5, 2, 2, 2], [7, 7]]

CASES = [
    (Temperature(0.7), lambda x, h: temperature(x, 0.7)),
    (Temperature(2.5), lambda x, h: temperature(x, 2.5)),
    (Temperature(0), lambda x, h: temperature(x, 0)),
    (TopK(1), lambda x, h: top_k(x, 1)),
    (TopK(6), lambda x, h: top_k(x, 6)),
    (TopK(30), lambda x, h: top_k(x, 30)),
    (TopK(1000), lambda x, h: x),
    (TopP(0.1), lambda x, h: top_p(x, 0.1)),
    (TopP(0.8), lambda x, h: top_p(x, 0.8)),
    (TopP(0.999), lambda x, h: top_p(x, 0.999)),
    (TopP(0.3, min_keep=4), lambda x, h: top_p(x, 0.3, 4)),
    (MinP(0.05), lambda x, h: min_p(x, 0.05)),
    (MinP(0.9), lambda x, h: min_p(x, 0.9)),
    (MinP(1.0), lambda x, h: min_p(x, 1.0)),
    (MinP(0.9, min_keep=5), lambda x, h: min_p(x, 0.9, 5)),
    (Penalties(1.3), lambda x, h: penalties(x, h, 1.3)),
    (Penalties(0.5), lambda x, h: penalties(x, h, 0.5)),
    (Penalties(1.1, 0.4, 0.7), lambda x, h: penalties(x, h, 1.1, 0.4, 0.7)),
    (Penalties(1.2, 0.4, 0.7, window=2), lambda x, h: penalties(x, h, 1.2, 0.4, 0.7, 2)),
    (Penalties(frequency=-0.5), lambda x, h: penalties(x, h, frequency=-0.5)),
    (LogitBias({2: -1.5, 30: 4.0, 8: float("-inf")}), lambda x, h: bias(x, {2: -1.5, 30: 4.0, 8: -np.inf})),
    (Suppress((0, 7, 36)), lambda x, h: suppress(x, {0, 7, 36})),
    (Greedy(), lambda x, h: temperature(x, 0)),
]


@pytest.mark.parametrize(("link", "rule"), CASES, ids=[repr(link) for link, _ in CASES])
def test_each_link_is_its_rule(link, rule, logits):
    (step,) = (Chain((link,))).steps(logits, HISTORY)
    want = np.stack([rule(x, h) for x, h in zip(logits.double().numpy(), HISTORY, strict=True)])
    np.testing.assert_allclose(step.logits.numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_u(step, logits):
    chain = Chain((Draw(seed=11),))
    state = chain.state(B, seeds=[5, 0, 2, 9, 2**63])
    state.steps = [step] * B
    want = [draw(x, uniform(11, seed, step, "Draw")) for x, seed in zip(logits.double().numpy(), [5, 0, 2, 9, 2**63], strict=True)]
    assert chain(logits, None, state).tolist() == want


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.25, 0.05, 0.2])
    n = 20_000
    counts = torch.bincount(Chain((Draw(seed=1),))(p.log().expand(n, -1)), minlength=5)
    expected = p * n
    live = p > 0
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < 16.3  # 3 degrees of freedom: exceeded once in a thousand
    assert counts[1] == 0


def test_entropy_support_and_probabilities_of_a_step(logits):
    (step,) = Chain((TopP(0.7),)).steps(logits)
    for row, x in enumerate(logits.double().numpy()):
        kept = top_p(x, 0.7)
        p = softmax(kept)
        np.testing.assert_allclose(step.probabilities[row], p, atol=1e-6)
        assert step.support[row] == np.isfinite(kept).sum()
        assert step.entropy[row].item() == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum(), abs=1e-5)
        assert step.removed[row] == np.flatnonzero(np.isfinite(x) & ~np.isfinite(kept)).tolist()
