"""Chains: composing, printing, validating, states, and the fast way against the plain one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import permutations

import pytest
import torch

from glassformer.core.errors import SamplerError
from glassformer.core.spec import Spec, registered
from glassformer.infer import Chain, Draw, Final, Greedy, Link, LogitBias, MinP, Narrowing, Penalties, Suppress, Temperature, TopK, TopP, build_chain
from glassformer.infer.links import descending, descending_by_numpy, strongest, strongest_by_numpy
from glassformer.infer.state import uniform

unregistered = dataclass(frozen=True, repr=False)  # links of the tests only: other tests enumerate the registry


def logits(b=4, v=300, seed=0):
    return torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * 3


# Composing and printing


def test_a_chain_prints_as_its_expression_and_reads_back():
    chain = Penalties(1.1) | TopK(40) | MinP(0.05) | Temperature(0.8) | Draw(seed=7)
    text = "Penalties(repetition=1.1) | TopK(k=40) | MinP(p=0.05) | Temperature(t=0.8) | Draw(seed=7)"
    assert repr(chain) == str(chain) == text
    assert eval(text) == chain
    assert hash(chain) == hash(eval(text))


def test_chains_join_from_both_sides():
    filters, rest = TopK(4) | TopP(0.9), Temperature(2) | Greedy()
    assert (filters | rest).links == (TopK(4), TopP(0.9), Temperature(2), Greedy())
    assert (MinP(0.1) | rest).links == (MinP(0.1), Temperature(2), Greedy())


def test_a_chain_becomes_plain_data_and_comes_back():
    chain = LogitBias({3: -1.0, 9: 2.0}) | Suppress([1, 2]) | Penalties(1.1, window=64) | TopK(40) | Draw()
    assert Chain.from_dict(json.loads(json.dumps(chain.to_dict()))) == chain
    assert chain.at("links.3.k").set(5).links[3] == TopK(5)


def test_every_link_is_registered():
    assert set(registered(Link)) >= {"Temperature", "TopK", "TopP", "MinP", "Penalties", "LogitBias", "Suppress", "Greedy", "Draw"}


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Temperature(-0.5), "temperature is a finite number of 0 or more, but -0.5"),
        (lambda: Temperature(math.nan), "temperature is a finite number of 0 or more, but nan"),
        (lambda: TopK(-1), "0 or more, but -1"),
        (lambda: TopP(0.0), "above 0 and up to 1, but 0.0"),
        (lambda: TopP(1.01), "above 0 and up to 1, but 1.01"),
        (lambda: TopP(0.5, min_keep=0), "min_keep is 1 or more, but 0"),
        (lambda: MinP(-0.1), "from 0 to 1 .* but -0.1"),
        (lambda: MinP(1.5), "from 0 to 1 .* but 1.5"),
        (lambda: Penalties(0.0), "above 0, but 0.0"),
        (lambda: Penalties(1.1, window=-1), "0 tokens or more, but -1"),
        (lambda: Penalties(frequency=math.inf), "finite numbers, but inf and 0.0"),
        (lambda: LogitBias({4: math.inf}), "bias of token 4 is inf"),
        (lambda: Greedy() | TopK(4), r"Greedy\(\) picks the token, so nothing can follow it, but TopK\(k=4\) does"),
        (lambda: Chain((TopK(4), 7)), "item 1 is 7"),
        (lambda: (TopK(4) | TopP(0.5)).final, "ends without a link that picks the token"),
        (lambda: (TopK(4) | TopP(0.5))(logits()), r"Add one: … \| Draw\(seed=0\), or … \| Greedy\(\)"),
        (lambda: LogitBias({300: 1.0}).apply(logits()), "token 300, but the vocabulary has 300 tokens"),
        (lambda: Suppress((-1,)).apply(logits()), "token -1, but the vocabulary has 300 tokens"),
        (lambda: (TopK(4) | Greedy())(torch.zeros(2, 3, 4)), r"shape \[b v\], but got \[2, 3, 4\]"),
        (lambda: (TopK(4) | Draw(0))(logits(4), None, (TopK(4) | Draw(0)).state(3)), "logits have 4 rows and the sampler's state has 3"),
        (lambda: (Penalties(2.0) | Greedy())(logits(4), [[1], [2]]), "history has 2 rows and the logits have 4"),
        (lambda: (TopK(4) | Draw(0)).state(3, seeds=[1, 2]), "2 row seeds were given for 3 rows"),
        (lambda: Draw(0).choose(logits()), "Draw needs a state"),
        (lambda: build_chain(order="vllm"), "no order of samplers named 'vllm'"),
        (lambda: build_chain(top_p=0.0), "above 0 and up to 1, but 0.0"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(make, words):
    with pytest.raises(SamplerError, match=words):
        make()


OFF = [Temperature(1), TopK(0), TopP(1), MinP(0), Penalties(), Penalties(2.0, window=0), LogitBias({}), Suppress(())]


@pytest.mark.parametrize("link", OFF, ids=repr)
def test_off_values_do_nothing(link):
    x = logits()
    assert link.off
    assert torch.equal(link.apply(x, torch.ones(4, 3, dtype=torch.long)), x)
    assert torch.equal((link | Draw(3))(x, [[1, 2]] * 4), Chain((Draw(3),))(x))


# What the links do to rows


def test_top_k_keeps_exactly_k_and_of_equals_the_lowest_ids():
    x = torch.tensor([[1.0, 1, 5, 1, 1, 7], [0, 0, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1], [-math.inf, 2, -math.inf, -math.inf, -math.inf, -math.inf]])
    (step,) = Chain((TopK(4),)).steps(x)
    assert step.removed == [[3, 4], [4, 5], [4, 5], []]
    assert step.support.tolist() == [4, 4, 4, 1]


def test_top_p_keeps_equals_of_the_last_one_together():
    (step,) = Chain((TopP(0.3),)).steps(torch.tensor([[2.0, 1.0, 1.0, 1.0]]))
    assert step.support.tolist() == [1]
    (step,) = Chain((TopP(0.6),)).steps(torch.tensor([[2.0, 1.0, 1.0, 1.0]]))
    assert step.support.tolist() == [4]


def test_greedy_takes_the_lowest_id_among_equals():
    assert Chain((Greedy(),))(torch.tensor([[0.0, 2.0, 2.0]])).tolist() == [1]


def test_logits_of_half_precision_are_computed_in_float32():
    x = logits().bfloat16()
    for step in (Temperature(0.7) | TopP(0.9) | MinP(0.01) | Draw(0)).steps(x):
        assert step.logits.dtype == torch.float32
    assert torch.equal((Temperature(0.7) | Draw(0))(x), (Temperature(0.7) | Draw(0))(x.float()))


def test_a_row_with_nothing_left_or_nan_is_minus_one():
    x = logits(3, 5)
    x[0], x[1, 2] = float("-inf"), float("nan")
    for final in (Draw(0), Greedy()):
        got = Chain((final,))(x).tolist()
        assert got[:2] == [-1, -1] and 0 <= got[2] < 5
        assert (TopK(3) | final)(x).tolist()[0] == -1
    assert next(Chain((Greedy(),)).steps(x)).chosen[0] == -1


def test_the_history_may_be_a_right_aligned_tensor():
    x, link = logits(2, 6), Penalties(1.5, 0.2, window=3)
    padded = torch.tensor([[-1, -1, 4], [1, 2, 1]])
    (a,), (b,) = Chain((link,)).steps(x, [[4], [1, 2, 1]]), Chain((link,)).steps(x, padded)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(x, logits(2, 6))  # the given logits are not written to


# The fast way and the plain way

FILTERS = [TopK(20), TopK(6), TopP(0.9), Temperature(0.8), Penalties(1.2, 0.1)]


@pytest.mark.parametrize("final", [Draw(5), Greedy()], ids=repr)
def test_the_call_and_the_steps_agree_in_every_order(final):
    x, history = logits(3, 200), [[1, 2, 3], [5], [9, 9]]
    for n, order in enumerate(permutations(FILTERS, 3)):
        chain = Chain((*order, final))
        state = chain.state(3)
        state.steps = [n] * 3
        *_, last = chain.steps(x, history, state)
        assert last.chosen == chain(x, history, state).tolist(), chain


@pytest.mark.parametrize("k", [1, 5, 59])
@pytest.mark.parametrize("kind", ["different", "equals", "gone", "nan"])
def test_the_fast_ways_to_order_on_a_cpu_agree_with_torch(kind, k):
    x = logits(6, 60)
    if kind == "equals":
        x = x.round()
    if kind == "gone":
        x = x.masked_fill(x < 2, -math.inf)
    if kind == "nan":
        x[2, 7] = x[2, 50] = x[4, 0] = math.nan
    assert torch.equal(strongest_by_numpy(x, k), strongest(x, k))
    assert torch.equal(descending_by_numpy(x).nan_to_num(99), descending(x).nan_to_num(99))


def test_links_after_a_narrowing_link_see_few_columns_or_all():
    widths = []

    @unregistered
    class WatchValues(Link):
        by_value = True

        def apply(self, logits, history=None, state=None):
            widths.append(logits.shape[1])
            return logits

    @unregistered
    class WatchTokens(Link):
        def apply(self, logits, history=None, state=None):
            widths.append(logits.shape[1])
            return logits

    (WatchValues() | TopK(7) | WatchValues() | WatchTokens() | TopK(5) | TopK(3) | WatchValues() | Greedy())(logits(2, 100))
    assert widths == [100, 7, 100, 3]
    assert issubclass(TopK, Narrowing)
    assert issubclass(Draw, Final)


def test_filters_leave_a_draw_alone_that_they_do_not_touch():
    x = torch.tensor([[3.0, 2.9, -20.0, -30.0]]).expand(50, -1)
    assert torch.equal(Chain((Draw(2),))(x), (TopK(2) | Draw(2))(x))


# The steps


def test_steps_tell_what_each_link_removed():
    x = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]))
    chain = TopK(4) | TopP(0.6) | Greedy()
    k, p, g = chain.steps(x)
    assert [s.name for s in (k, p, g)] == ["TopK", "TopP", "Greedy"]
    assert k.removed[0] == [4] and len(k.removed[1]) == 1
    assert p.removed[0] == [2, 3] and p.removed[1] == []
    assert g.support.tolist() == [1, 1] and g.entropy.tolist() == [0, 0]
    assert k.chosen is None and g.chosen[0] == 0
    assert k.entropy[1].item() == pytest.approx(2.0)
    assert str(k) == "TopK(k=4): 4 tokens left, 1.72 bits; 4 tokens left, 2.00 bits"


def test_steps_work_without_a_final_link_and_on_one_row():
    (step,) = Chain((TopK(2),)).steps(torch.arange(5.0))
    assert step.removed == [[0, 1, 2]]


def test_steps_do_not_advance_the_state():
    chain, x = Temperature(3.0) | Draw(4), logits()
    state = chain.state(4)
    looked = [list(chain.steps(x, None, state))[-1].chosen for _ in range(3)]
    assert looked[0] == looked[1] == looked[2] == chain(x, None, state).tolist()
    assert state.steps == [1] * 4
    assert list(chain.steps(x, None, state))[-1].chosen != looked[0]


# States


def test_a_stream_depends_on_seed_row_and_step_only():
    chain, x = Chain((Draw(seed=8),)), logits(4)
    state = chain.state(4, seeds=[10, 11, 12, 13])
    together = [chain(x, None, state).tolist() for _ in range(5)]
    for row in range(4):
        alone = chain.state(1, seeds=[10 + row])
        assert [chain(x[row : row + 1], None, alone).item() for _ in range(5)] == [step[row] for step in together]


def test_the_numbers_are_fixed_for_all_time():
    assert uniform(0, 0, 0, "Draw") == 0.9773113965581296
    assert uniform(2**64 - 1, -1, 3, "XTC") == uniform(-1, 2**64 - 1, 3, "XTC")


@pytest.mark.parametrize("axis", range(4))
def test_the_numbers_are_uniform_along_every_argument(axis):
    arguments = [[4, 4, 4, "Draw"] for _ in range(2000)]
    for n, a in enumerate(arguments):
        a[axis] = f"stream{n}" if axis == 3 else n
    x = torch.tensor([uniform(*a) for a in arguments], dtype=torch.float64)
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, bins=10, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 9 degrees of freedom: exceeded once in a thousand
    assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 0.08


def test_an_unseeded_draw_takes_its_seed_from_torch():
    chain = Chain((Draw(),))
    torch.manual_seed(0)
    a = chain.state(1).seed
    b = chain.state(1).seed
    torch.manual_seed(0)
    assert chain.state(1).seed == a != b
    assert chain.state(1, seed=77).seed == 77


@unregistered
class CountingTemperature(Link):
    """Remembers the sum of what was chosen, and heats by it: enough to see whether memory follows its row."""

    by_value = True

    def start(self, rows, device):
        return torch.zeros(rows, device=device)

    def apply(self, logits, history=None, state=None):
        return logits / (1 + 0.1 * state.memory[:, None])

    def learn(self, memory, probabilities, chosen):
        assert ((probabilities >= 0) & (probabilities <= 1)).all()
        return memory + chosen


def run(chain, x, state, n):
    return [chain(x, None, state).tolist() for _ in range(n)]


def test_memory_of_links_is_forked_selected_and_wound_back():
    chain, x = CountingTemperature() | TopK(50) | Draw(3), logits(3)
    state = chain.state(3)
    first = run(chain, x, state, 4)
    assert state.memory[0].tolist() == torch.tensor(first).sum(0).tolist()

    twins = state.fork(2)
    assert len(twins) == 6
    doubled = run(chain, x.repeat_interleave(2, 0), twins, 3)
    straight = run(chain, x, state, 3)
    assert doubled == [[t for t in row for _ in range(2)] for row in straight]

    state.rewind(3)
    assert run(chain, x, state, 3) == straight
    twins.rewind(7)
    assert [row[::2] for row in run(chain, x.repeat_interleave(2, 0), twins, 4)] == first

    state.rewind(5)
    other = state.select([2, 0])
    assert [row[::-1] for row in run(chain, x[[2, 0]], other, 2)] == [[row[0], row[2]] for row in (first[2:] + straight)[:2]]


def test_forked_states_share_nothing():
    chain, x = CountingTemperature() | Draw(3), logits(1)
    state = chain.state(1)
    run(chain, x, state, 2)
    twin = state.fork(1)
    kept = (twin.memory[0].clone(), list(twin.steps))
    run(chain, x, state, 5)
    state.rewind(6)
    assert torch.equal(twin.memory[0], kept[0]) and twin.steps == kept[1]
    twin.rewind(2)
    assert twin.memory[0].item() == 0


def test_a_state_cannot_be_wound_back_before_its_beginning():
    chain = TopK(3) | Draw(0)
    state = chain.state(2)
    run(chain, logits(2), state, 2)
    with pytest.raises(SamplerError, match="drawn 2 tokens, so it cannot be wound back by 3"):
        state.rewind(3)
    with pytest.raises(SamplerError, match="2 rows, so row 2 cannot be selected"):
        state.select([2])


# By known names


def test_known_names_make_a_chain_in_the_order_of_transformers():
    chain = build_chain(temperature=0.7, top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=3)
    assert chain == Penalties(1.2) | Temperature(0.7) | TopK(50) | TopP(0.9) | MinP(0.1) | Draw(3)
    other = build_chain(temperature=0.7, top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.2, penalty_window=64, order="llama.cpp")
    assert other == Penalties(1.2, window=64) | TopK(50) | TopP(0.9) | MinP(0.1) | Temperature(0.7) | Draw()


@pytest.mark.parametrize(
    ("settings", "chain"),
    [
        ({}, Chain((Greedy(),))),
        ({"do_sample": True}, Chain((Draw(),))),
        ({"seed": 4}, Chain((Draw(4),))),
        ({"temperature": 0, "top_k": 5}, Chain((Greedy(),))),
        ({"temperature": 0.5, "do_sample": False, "repetition_penalty": 1.1}, Penalties(1.1) | Greedy()),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, Chain((Draw(),))),
        ({"logit_bias": {4: 1.0}, "suppress": [2]}, LogitBias({4: 1.0}) | Suppress((2,)) | Greedy()),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.25}, Penalties(1.0, 0.5, 0.25) | Greedy()),
    ],
)
def test_known_names_say_greedy_or_not(settings, chain):
    assert build_chain(**settings) == chain
    assert isinstance(chain, Spec)


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_draw_never_takes_a_removed_token_even_at_the_ends_of_the_interval(u):
    class Fixed:
        def uniform(self, device):
            return torch.full((40,), u, dtype=torch.float64)

    x = logits(40, 5000)
    x[:, :3] = x[:, -3:] = x[:, 2500] = float("-inf")
    chosen = Draw(0).choose(x, Fixed())
    assert (x.gather(1, chosen[:, None]) > float("-inf")).all()
    equal = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(40, -1)
    assert set(Draw(0).choose(equal, Fixed()).tolist()) == {1 if u < 0.5 else 3}
