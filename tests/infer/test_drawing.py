"""Links that act by chance or steer by what was drawn: their rules over many steps, forked, wound back, and their streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glassformer.core.errors import SamplerError
from glassformer.infer import XTC, AdaptiveP, Chain, Draw, Greedy, MinP, Mirostat1, Mirostat2, Session, Temperature, TopK
from glassformer.infer.state import Own, State, uniform
from infer import links_in_numpy as rules
from infer.fake import Bigram

B, V = 5, 120


def logits(b=B, v=V, seed=0, scale=2.5):
    x = torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * scale
    x[1, 4:60] = -math.inf
    x[2] *= 0.05
    x[3, 7] += 15
    return x


def own(seeds, steps, memory=None, seed=11, stream="XTC"):
    return Own(State(seed, list(seeds), list(steps), []), memory, stream)


# XTC


@pytest.mark.parametrize("settings", [(1.0, 0.1), (0.5, 0.05), (0.5, 0.005), (1.0, 0.0), (1.0, 0.02, 50), (1.0, 0.004, 110)])
def test_xtc_is_its_rule_and_its_chance_is_that_of_the_row_and_step(settings):
    link, acted = XTC(*settings), 0
    for step in range(6):
        x, seeds = logits(seed=step), [8, 0, 3, 9, 2**63]
        got = link.apply(x, None, own(seeds, [step] * B)).double().numpy()
        for row, (l, seed) in enumerate(zip(x.double().numpy(), seeds, strict=True)):
            want = rules.xtc(l, uniform(11, seed, step, "XTC"), *settings)
            assert np.array_equal(got[row], want), (step, row)
            acted += not np.array_equal(want, l)
    assert acted > 0


def test_xtc_leaves_the_weakest_of_the_strong_and_of_equals_the_lowest_id():
    p = torch.tensor([[0.4, 0.05, 0.25, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2], [0.9, 0.04, 0.03, 0.02, 0.01]])
    (step,) = Chain((XTC(1.0, 0.15),)).steps(p.log())
    assert step.removed == [[0, 2], [1, 2, 3, 4], []]


def test_xtc_acts_as_often_as_it_says():
    n = 4000
    x = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(n, -1)
    (step,) = Chain((XTC(0.3, 0.1),)).steps(x, None, Chain((XTC(0.3), Draw(5))).state(n))
    acted = (step.support == 1).sum().item()
    assert abs(acted - 0.3 * n) < 3.3 * math.sqrt(n * 0.3 * 0.7)  # exceeded once in a thousand


def test_the_chance_of_xtc_is_independent_of_the_number_of_draw():
    n, p = 6000, [0.5, 0.3, 0.15, 0.05]
    x = torch.tensor([p]).log().expand(n, -1)
    chain = XTC(0.5, 0.25) | Draw(3)
    drawn = chain(x, None, chain.state(n)).numpy()
    acted = np.array([uniform(3, row, 0, "XTC") <= 0.5 for row in range(n)])
    for group, weights in ((drawn[~acted], p), (drawn[acted], [0, 0.3, 0.15, 0.05])):
        expected = np.array(weights) / sum(weights) * len(group)
        counts, live = np.bincount(group, minlength=4), expected > 0
        assert counts[~live].sum() == 0
        assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 16.3  # up to 3 degrees of freedom: exceeded once in a thousand
    numbers = np.array([[uniform(3, row, 0, stream) for stream in ("XTC", "Draw")] for row in range(n)])
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.043  # 3.3 standard errors


def test_the_chance_of_a_row_does_not_depend_on_the_other_rows():
    chain, x = XTC(0.5, 0.02) | Draw(8), logits()
    state = chain.state(B, seeds=[5, 6, 7, 8, 9])
    together = [chain(x, None, state).tolist() for _ in range(12)]
    for row in range(B):
        alone = chain.state(1, seeds=[5 + row])
        assert [chain(x[row : row + 1], None, alone).item() for _ in range(12)] == [step[row] for step in together]


@pytest.mark.parametrize("link", [XTC(0.0), XTC(1.0, 0.51), AdaptiveP(-1.0), AdaptiveP(-0.2)], ids=repr)
def test_off_values_do_nothing(link):
    x = logits()
    assert link.off
    assert torch.equal(link.apply(x), x)
    chain = link | Draw(3)
    state = chain.state(B)
    assert torch.equal(chain(x, None, state), Chain((Draw(3),))(x))
    assert state.memory == [None, None]


# Mirostat


def bigram_logits(step):
    return logits(seed=100 + step, scale=1.5 + step % 3)


@pytest.mark.parametrize(("tau", "eta", "m"), [(3.0, 0.1, 100), (5.0, 0.5, 100), (1.0, 1.0, 20), (2.0, 0.0, 3)])
def test_mirostat_1_is_its_rule_over_many_steps(tau, eta, m):
    chain = Temperature(0.9) | Mirostat1(tau, eta, m) | Draw(2)
    state, mu = chain.state(B), [2 * tau] * B
    for step in range(25):
        x = bigram_logits(step)
        *_, cut, _ = chain.steps(x, None, state)
        chosen = chain(x, None, state)
        for row, l in enumerate((x / 0.9).double().numpy()):
            kept, _ = rules.mirostat1(l, mu[row], m)
            assert np.array_equal(np.isfinite(cut.logits[row].numpy()), np.isfinite(kept)), (step, row)
            mu[row] = rules.steered(mu[row], kept, chosen[row].item(), tau, eta)
        assert state.memory[1].tolist() == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize(("tau", "eta"), [(3.0, 0.1), (5.0, 0.5), (0.5, 1.0), (2.0, 0.0)])
@pytest.mark.parametrize("before", [Temperature(0.9), TopK(30)], ids=repr)
def test_mirostat_2_is_its_rule_over_many_steps(before, tau, eta):
    chain = before | Mirostat2(tau, eta) | Draw(2)
    state, mu = chain.state(B), [2 * tau] * B
    for step in range(25):
        x = bigram_logits(step)
        first, cut, _ = chain.steps(x, None, state)
        chosen = chain(x, None, state)
        for row, l in enumerate(first.logits.double().numpy()):
            kept = rules.mirostat2(l, mu[row])
            assert np.array_equal(np.isfinite(cut.logits[row].numpy()), np.isfinite(kept)), (step, row)
            mu[row] = rules.steered(mu[row], kept, chosen[row].item(), tau, eta)
        assert state.memory[1].tolist() == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize("link", [Mirostat1, Mirostat2])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_surprise_of_a_text_comes_to_what_was_asked_for(link, tau):
    chain, x = link(tau, 0.2) | Draw(4), torch.randn(16, 500, generator=torch.Generator().manual_seed(0)) * 2  # 5.9 bits each
    state, total = chain.state(16), torch.zeros(16)
    for step in range(200):
        *_, cut, _ = chain.steps(x, None, state)
        chosen = chain(x, None, state)
        if step >= 50:
            total += -cut.logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0] / math.log(2)
    assert (total / 150).mean().item() == pytest.approx(tau, abs=0.15)


def test_mirostat_1_where_its_formula_has_no_value():
    equal = torch.zeros(1, 64)  # s = 0: all or one
    zipf = -torch.arange(1, 65, dtype=torch.float64).log().float()[None]  # s = 1: e / (1 - V^-e) is 1 / ln V
    for x, mu, kept in ((equal, 7.0, 64), (equal, 5.0, 64), (zipf, 4.0, int(16 / math.log(64))), (torch.zeros(1, 1), 3.0, 1)):
        ordered = x.sort(descending=True).values
        k = Mirostat1().kept(ordered, torch.tensor([[mu]]))
        left = Mirostat1().apply(x, None, own([0], [0], torch.tensor([mu])))
        assert 1 <= k.item() <= x.shape[1]
        assert (left > -math.inf).sum() == kept
    assert Mirostat1().kept(equal, torch.tensor([[5.0]])).item() == 1 and Mirostat1().kept(equal, torch.tensor([[7.0]])).item() == 64


# Adaptive-p


@pytest.mark.parametrize(("target", "decay"), [(0.5, 0.9), (0.2, 0.99), (0.9, 0.5), (0.0, 0.9), (1.0, 0.0)])
@pytest.mark.parametrize("before", [Temperature(0.9), TopK(12)], ids=repr)
def test_adaptive_p_is_its_rule_over_many_steps(before, target, decay):
    chain = before | AdaptiveP(target, decay) | Draw(2)
    state, mean = chain.state(B), [target] * B
    for step in range(25):
        x = bigram_logits(step)
        first, bent, _ = chain.steps(x, None, state)
        chosen = chain(x, None, state)
        for row, l in enumerate(first.logits.double().numpy()):
            np.testing.assert_allclose(bent.logits[row].numpy(), rules.adaptive_p(l, target, mean[row]), rtol=1e-3, atol=1e-3)
            mean[row] = decay * mean[row] + (1 - decay) * rules.softmax(l)[chosen[row]]
        assert state.memory[1].tolist() == pytest.approx(mean, abs=1e-4)


def test_adaptive_p_draws_tokens_of_the_probability_it_aims_at():
    x = torch.tensor([[0.5, 0.25, 0.12, 0.08, 0.05]]).log().expand(32, -1)
    for target in (0.15, 0.3, 0.45):
        chain = AdaptiveP(target) | Draw(1)
        state, total = chain.state(32), 0.0
        for _ in range(100):
            total += x.exp().gather(1, chain(x, None, state)[:, None]).mean().item()
        plain = (x[0].exp() ** 2).sum().item()
        assert abs(total / 100 - target) < 0.5 * abs(plain - target) + 0.03


# Memory


STEERED = [Mirostat1(3.0, 0.4), Mirostat2(3.0, 0.4), AdaptiveP(0.3), Mirostat2(3.0) | AdaptiveP(0.3), TopK(40) | Mirostat1(2.0, 0.3) | TopK(9) | AdaptiveP(0.2)]


def run(chain, state, begin, n, rows=None):
    return [chain(bigram_logits(t) if rows is None else bigram_logits(t)[rows], None, state).tolist() for t in range(begin, begin + n)]


@pytest.mark.parametrize("links", STEERED, ids=repr)
def test_forked_selected_and_wound_back_it_goes_on_as_if_nothing_had_happened(links):
    chain = links | Draw(6)
    state = chain.state(B)
    first = run(chain, state, 0, 6)
    twins = [row for row in range(B) for _ in range(2)]
    fork, some = state.fork(2), state.select([3, 0])
    kept = [None if m is None else m.clone() for m in fork.memory]
    straight = run(chain, state, 6, 6)
    assert all(m is None or torch.equal(m, k) for m, k in zip(fork.memory, kept, strict=True))  # what the source does does not reach it
    assert run(chain, fork, 6, 6, twins) == [[row[r] for r in twins] for row in straight]
    assert run(chain, some, 6, 6, [3, 0]) == [[row[3], row[0]] for row in straight]
    state.rewind(9)
    assert run(chain, state, 3, 9) == first[3:] + straight
    fork.rewind(12)
    assert run(chain, fork, 0, 6, twins) == [[row[r] for r in twins] for row in first]


@pytest.mark.parametrize("links", STEERED, ids=repr)
def test_the_memory_matters_and_is_of_the_row_alone(links):
    chain = links | Draw(6)
    state = chain.state(B)
    together = run(chain, state, 0, 10)
    assert any(m is not None and len(set(m.tolist())) == B for m in state.memory)
    for row in range(B):
        alone = chain.state(1, seeds=[row])
        assert run(chain, alone, 0, 10, [row]) == [[step[row]] for step in together]


def test_a_row_with_nothing_drawn_remembers_what_it_did():
    for link in (Mirostat1(), Mirostat2(), AdaptiveP(0.4)):
        chain, x = link | Draw(0), logits()
        x[0], x[2, 3] = -math.inf, math.nan
        state = chain.state(B)
        begin = state.memory[0].clone()
        chosen = chain(x, None, state)
        assert (chosen < 0).tolist() == [True, False, True, False, False]
        assert (state.memory[0] == begin).tolist() == [True, False, True, False, False] and state.memory[0].isfinite().all()


def test_they_steer_with_greedy_too():
    chain = Mirostat2(2.0, 0.5) | Greedy()
    state = chain.state(B)
    assert chain(logits(), None, state).tolist() == logits().argmax(-1).tolist()
    assert (state.memory[0] != 4.0).all()


def test_a_session_with_them_forks_and_rewinds():
    sampler = MinP(0.001) | XTC(0.4, 0.05) | Mirostat2(2.0, 0.3) | AdaptiveP(0.3) | Draw(9)
    session = Session(Bigram.random(), [[3], [5]], sampler, room=20)
    begin = [session.step().ids for _ in range(4)]
    twin = session.fork(2)
    straight = [session.step().ids for _ in range(5)]
    assert [twin.step().ids for _ in range(5)] == [[a, a, b, b] for a, b in straight]
    session.rewind(7)
    assert [session.step().ids for _ in range(7)] == begin[2:] + straight


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: XTC(1.5), "acts with a probability from 0 to 1, but 1.5"),
        (lambda: XTC(0.5, -0.1), "threshold of XTC is a probability from 0 to 1, but -0.1"),
        (lambda: XTC(0.5, 0.1, 0), "min_keep is 1 or more, but 0"),
        (lambda: XTC(0.5).apply(logits()), r"XTC needs a state, .* \(XTC\(0.5\) \| Draw\(seed=0\)\)"),
        (lambda: Mirostat1(0.0), "above 0 bits, but tau=0.0"),
        (lambda: Mirostat2(math.inf), "above 0 bits, but tau=inf"),
        (lambda: Mirostat1(3.0, 1.5), "from 0 to 1, but eta=1.5"),
        (lambda: Mirostat2(3.0, -0.1), "from 0 to 1, but eta=-0.1"),
        (lambda: Mirostat1(3.0, m=1), "from 2 tokens or more, but m=1"),
        (lambda: Mirostat1().apply(logits()), r"Mirostat1 needs a state, which remembers what was drawn. Use a chain: \(Mirostat1\(\) \| Draw"),
        (lambda: Mirostat2().apply(logits()), r"Mirostat2 needs a state, .* \(Mirostat2\(\) \| Draw\(seed=0\)\)"),
        (lambda: AdaptiveP(1.1), "a probability from 0 to 1, but target=1.1"),
        (lambda: AdaptiveP(math.nan), "a probability from 0 to 1, but target=nan"),
        (lambda: AdaptiveP(0.5, 1.0), "from 0 to 0.99, but 1.0"),
        (lambda: AdaptiveP(0.5).apply(logits()), r"AdaptiveP needs a state, .* \(AdaptiveP\(0.5\) \| Draw\(seed=0\)\)"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(make, words):
    with pytest.raises(SamplerError, match=words):
        make()
