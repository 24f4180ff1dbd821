"""The fast ways through a chain on a CPU: they leave the tokens that the plain way leaves, and write into nothing that is not theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from glassformer.infer import (
    DRY,
    XTC,
    Draw,
    Epsilon,
    Eta,
    Greedy,
    LogitBias,
    MinP,
    Mirostat2,
    NoRepeatNGram,
    Penalties,
    Temperature,
    TopA,
    TopH,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    sampler,
)
from glassformer.infer.sampler import Passed, spread
from glassformer.infer.state import Room
from glassformer.infer.thinning import at_least, columns_of, likely, masses

THIN = [TopNSigma(1.0), TopNSigma(50.0), Typical(0.3), Typical(0.9), TopP(0.2), TopP(0.95), MinP(0.05), MinP(1e-9), TopA(0.3), Epsilon(1e-3), Eta(1e-3)]
V = 3000


def logits(b=5, v=V, seed=0):
    x = torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * 3
    x[1] *= 0.01  # nearly flat
    x[2, 7] += 40  # nearly certain
    x[3] += 1e4
    return x


@pytest.mark.parametrize("link", THIN, ids=repr)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0, 2, 4], [2], [1]], ids=str)
def test_thin_is_apply(link, rows):
    x = logits()[rows]
    before, plain = x.clone(), link.apply(x)
    thinned = link.thin(x, Room())
    assert torch.equal(x, before)
    if thinned is not None:
        left, columns = thinned
        assert torch.equal(left if columns is None else spread(left, columns, V), plain)
        if columns is not None:
            assert (columns.diff(dim=1) > 0).all()


def test_few_are_left_where_few_survive():
    x = logits()[[0, 2, 4]] * 3
    for link in (TopNSigma(1.0), Typical(0.3), TopP(0.2), MinP(0.05), TopA(0.3), Epsilon(5e-3), Eta(0.05)):
        left, columns = link.thin(x, Room())
        assert columns is not None and left.shape[1] < V / 8, link
    assert TopNSigma(50.0).thin(x, Room()) == (x, None)
    for link in (Typical(0.3, min_keep=2), TopP(0.2, 2), MinP(0.1, 2), TopA(0.1, 2), Epsilon(0.1, 2), Eta(0.1, 2), TopP(1.0), TopK(3), Mirostat2()):
        assert link.thin(x, Room()) is None


odd = st.sampled_from([0.0, 1.0, 1.0, -3.0, 2.5, 30.0, -200.0, -math.inf, math.inf, math.nan])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(odd, min_size=12, max_size=12), min_size=1, max_size=3), st.sampled_from(THIN))
def test_odd_logits_go_the_plain_way_or_the_same(rows, link):
    x = torch.tensor(rows)
    thinned = link.thin(x, Room())
    if thinned is not None:
        left, columns = thinned
        got, want = left if columns is None else spread(left, columns, 12), link.apply(x)
        assert torch.equal(got, want)
        assert x.isfinite().any(dim=1).all() and not x.isnan().any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_columns_of_what_stays(rows):
    stay = np.array(rows)
    k = int(stay.sum(axis=1).max())
    columns = columns_of(stay, k)
    assert columns.shape == (len(rows), k) and (columns.diff(dim=1) > 0).all()
    for row, found in zip(stay, columns.tolist(), strict=True):
        assert set(np.flatnonzero(row)) <= set(found)


def test_masses_are_those_of_a_soft_max():
    x = logits()
    p = x.double().softmax(-1)
    top, total, nats = masses(x, Room())
    assert torch.equal(top, x.amax(1, keepdim=True))
    assert torch.allclose(total[:, 0].double(), (x.double() - top).exp().sum(1), rtol=1e-5)
    assert torch.allclose(nats[:, 0].double(), torch.special.entr(p).sum(1), atol=1e-4)
    p = (x[[0, 4]].double() * 3).softmax(-1)
    few, columns, *_ = likely(x[[0, 4]] * 3, 0.9, Room())
    assert (p.gather(1, columns) * (few > -math.inf)).sum(1).min() > 0.95
    assert likely(x, 1.0, Room()) is None and likely(x[[1]], 0.9, Room()) is None
    assert at_least(x, torch.full((5, 1), math.nan), top, Room()) is None


CHAINS = [
    Penalties(1.3, 0.1, 0.2, window=8) | DRY(0.8) | TopNSigma(1.5) | TopK(40) | Typical(0.95) | TopP(0.95) | MinP(0.05) | XTC(0.5) | Temperature(0.8),
    Penalties(1.3) | DRY(0.8) | TopNSigma(50.0) | Typical(0.9) | TopP(0.95) | MinP(0.01) | XTC(0.5, 0.05) | Temperature(0.8),
    Temperature(0.7) | TopNSigma(3.5) | TopP(0.99) | Penalties(1.2) | Temperature(1.3) | Epsilon(1e-4) | Eta(1e-3),
    LogitBias({3: 2.0}) | NoRepeatNGram(2) | Temperature(2.0) | TopA(0.1) | Penalties(1.2),
    Temperature(0.5) | Mirostat2(3.0) | Temperature(1.5),
    MinP(1e-4) | Temperature(0.9) | TopH(0.5) | Penalties(0.9),
]


@pytest.mark.parametrize("wide", [8, 2048, 10**9])
@pytest.mark.parametrize("final", [Draw(3), Greedy()], ids=repr)
@pytest.mark.parametrize("chain", CHAINS, ids=[str(i) for i in range(len(CHAINS))])
def test_a_chain_draws_what_its_steps_draw_and_leaves_its_logits_alone(chain, final, wide, monkeypatch):
    monkeypatch.setattr(sampler, "WIDE", wide)
    chain = chain | final
    state, plain = chain.state(5), chain.state(5)
    history = torch.randint(0, 40, (5, 12), generator=torch.Generator().manual_seed(1))
    history[1, :9], history[4] = -1, -1  # shorter rows, and an empty one
    for step in range(4):
        x = logits(seed=step)
        before = x.clone()
        *_, last = chain.steps(x, history, plain)
        watched: list[Passed] = []
        twin = chain.state(5)
        twin.steps, twin.memory = list(state.steps), list(state.memory)
        assert chain(x, history, twin, watched).tolist() == last.chosen
        chosen = chain(x, history, state)
        assert chosen.tolist() == last.chosen and torch.equal(x, before)
        for passed, each in zip(watched, chain.replace(links=tuple(link for link in chain.links if not link.off)).steps(x, history, plain), strict=False):
            width = passed.after.shape[1]
            whole = passed.after if passed.after_ids is None else spread(passed.after, passed.after_ids, V)
            assert (whole > -math.inf).equal(each.logits > -math.inf), (passed.link, width)
        chain(x, history, plain)
        history = torch.cat([history, chosen[:, None]], dim=1)


def test_penalties_and_dry_written_in_place_are_those_applied():
    x = logits()
    history = torch.randint(0, 9, (5, 30), generator=torch.Generator().manual_seed(2))
    history[2, :20], history[3] = -1, -1
    history[0, 3] = V  # no token of this vocabulary: as if it were none
    for link in (Penalties(1.3), Penalties(0.7, 0.1, -0.2, window=5), Penalties(1.0, 0.5), DRY(0.8), DRY(0.5, 1.2, window=9, breakers=((3,),))):
        want = link.apply(x, history)
        assert not torch.equal(want, x)
        assert torch.equal(link.write(x.clone(), history), want)
        assert torch.equal(link.write(x.clone(), None), x)
    assert torch.equal(Temperature(0).write(x.clone()), Temperature(0).apply(x))


def test_a_room_hands_out_places_once_in_a_step():
    room, x = Room(), torch.ones(2, 3)
    a, b = room.copy(x), room.copy(x)
    a.zero_()
    assert b.sum() == 6 and room.borrowed == 2
    room.borrowed = 0
    assert room.copy(2 * x) is a and room.copy(torch.ones(1, 3)).shape == (1, 3)
    assert room.scratch(x, 0).shape == room.scratch(x, 1).shape == (2, 3) and room.marks(x).shape == (2, 3)


def test_logits_with_gradients_are_only_looked_at():
    x = logits().requires_grad_()
    chain = Temperature(0.8) | TopP(0.9) | MinP(0.1) | Greedy()
    assert chain(x).tolist() == chain(x.detach()).tolist()
