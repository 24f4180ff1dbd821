"""Links that rule by place: what they leave at every step, and that the place follows its row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from glassformer.core.errors import SamplerError
from glassformer.infer import Chain, Draw, ForceFirst, ForceLast, Greedy, MinNewTokens, SuppressFirst, TopK
from glassformer.infer.forcing import text_ids, token_bias, word_ids
from glassformer.infer.state import Own, State
from infer.fake import Bytes, Pieces

GONE = -math.inf
V = 6


def at(*steps):
    """What a link sees when its rows have drawn so many tokens."""
    return Own(State(0, list(range(len(steps))), list(steps), [None]), None, "")


def left(link, *steps, logits=None):
    x = torch.randn(len(steps), V, generator=torch.Generator().manual_seed(0)) if logits is None else torch.tensor(logits)
    return [[i for i in range(V) if row[i] > GONE] for row in link.apply(x, None, at(*steps)).tolist()]


def test_no_end_before_so_many_tokens():
    link = MinNewTokens(3, (0, 4))
    assert left(link, 0, 2, 3, 9) == [[1, 2, 3, 5], [1, 2, 3, 5], list(range(6)), list(range(6))]
    assert left(link, 0, logits=[[1.0, GONE, GONE, GONE, 2.0, GONE]]) == [[0, 4]]  # nothing else is left
    x = torch.randn(2, V)
    assert link.apply(x, None, at(3, 5)) is x


def test_tokens_are_suppressed_at_the_first_steps_only():
    assert left(SuppressFirst((1, 2)), 0, 1) == [[0, 3, 4, 5], list(range(6))]
    assert left(SuppressFirst((1,), 2), 1, 2) == [[0, 2, 3, 4, 5], list(range(6))]
    assert left(SuppressFirst(range(V)), 0) == [list(range(6))]


def test_tokens_are_forced_at_their_places_whatever_the_logits_say():
    assert left(ForceFirst((5, 1)), 0, 1, 2) == [[5], [1], list(range(6))]
    assert left(ForceLast((5, 1), 4), 0, 1, 2, 3, 4) == [list(range(6)), list(range(6)), [5], [1], list(range(6))]
    x = torch.tensor([[3.0, GONE, 1.0], [3.0, GONE, 1.0]])
    assert ForceFirst([1]).apply(x, None, at(0, 4)).tolist() == [[GONE, 0.0, GONE], [3.0, GONE, 1.0]]
    assert ForceFirst([1]).apply(x).tolist() == [[GONE, 0.0, GONE]] * 2  # without a state each call is a first step


def test_a_text_begins_and_ends_as_it_must():
    chain = MinNewTokens(4, (0,)) | ForceFirst((3, 2)) | ForceLast((1, 0), 8) | Draw(5)
    state = chain.state(20)
    texts = torch.stack([chain(torch.zeros(20, 4), None, state) for _ in range(8)], dim=1).tolist()
    assert all(t[:2] == [3, 2] and t[-2:] == [1, 0] and 0 not in t[2:4] for t in texts)
    assert any(0 in t[4:6] for t in texts)


LINKS = [MinNewTokens(2, (0,)), SuppressFirst((1, 3), 2), ForceFirst((2, 4)), ForceLast((5, 1), 4)]


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_the_place_forks_and_is_wound_back_with_the_row(link):
    chain, x = link | TopK(4) | Draw(3), torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    state = chain.state(3)
    whole = [chain(x, None, state).tolist() for _ in range(6)]
    again = chain.state(3)
    assert [chain(x, None, again).tolist() for _ in range(2)] == whole[:2]
    twins = again.fork(2)
    assert [chain(x.repeat_interleave(2, 0), None, twins).tolist()[::2] for _ in range(4)] == whole[2:]
    twins.rewind(5)
    assert [chain(x.repeat_interleave(2, 0), None, twins).tolist()[1::2] for _ in range(5)] == whole[1:]
    mixed = state.select([0, 1])
    mixed.steps = [0, 3]
    alone = [chain(x[i : i + 1], None, one).item() for i, one in enumerate((chain.state(1, seeds=[0]), chain.state(1, seeds=[1])))]
    mixed_now = chain(x[:2], None, mixed).tolist()
    assert mixed_now[0] == alone[0] == whole[0][0] and mixed_now[1] == whole[3][1]


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_the_narrowed_way_is_the_plain_way(link):
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(2))
    for final in (Greedy(), Draw(1)):
        chain = TopK(5) | link | TopK(2) | final
        state, kept = chain.state(5), x.clone()
        state.steps = [0, 1, 2, 3, 4]
        *_, last = chain.steps(x, None, state)
        assert last.chosen == chain(x, None, state).tolist()
        assert torch.equal(x, kept)


VALUES = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([GONE, 0.0, 3e38, math.nan]))


@pytest.mark.parametrize("link", LINKS, ids=repr)
@given(logits=st.lists(VALUES, min_size=V, max_size=V), step=st.integers(0, 5))
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_token_is_always_left(link, logits, step):
    x = torch.tensor([logits])
    got = link.apply(x, None, at(step))
    if not x.isnan().any() and (x > GONE).any():
        assert not got.isnan().any() and (got > GONE).any()


@pytest.mark.parametrize(
    "link", [MinNewTokens(0, (1,)), MinNewTokens(3, ()), SuppressFirst(()), SuppressFirst((1,), 0), ForceFirst(()), ForceLast((), 3)], ids=repr
)
def test_off_values_do_nothing(link):
    x = torch.zeros(2, V)
    assert link.off
    assert torch.equal(link.apply(x, None, at(0, 2)), x)


def test_links_are_plain_data_and_come_back():
    chain = MinNewTokens(3, [0]) | SuppressFirst([1], 2) | ForceFirst([2]) | ForceLast([0], 9) | Greedy()
    assert Chain.from_dict(json.loads(json.dumps(chain.to_dict()))) == chain == eval(repr(chain))
    assert hash(chain) == hash(eval(repr(chain)))


TOK = Pieces("no", " no", "a", " ", "n", "o")


def test_texts_become_ids():
    assert token_bias({3: -1.5, "no": False, "ao": 2}, TOK) == ((3, -1.5), (0, GONE), (2, 2.0), (5, 2.0))
    assert token_bias([(4, GONE)]) == ((4, GONE),)
    assert word_ids("no", TOK) == ((0,), (1,))
    assert word_ids(["no", " a", (4, 5), [5], 2], TOK) == ((0,), (1,), (3, 2), (4, 5), (5,), (2,))
    assert word_ids("é", Bytes()) == ((0xC3, 0xA9), (32, 0xC3, 0xA9))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MinNewTokens(-1, (0,)), "0 or more, but -1"),
        (lambda: SuppressFirst((1,), -1), "0 steps or more, but -1"),
        (lambda: ForceLast((1, 2, 3), 2), "3 tokens are forced at the end of 2"),
        (lambda: MinNewTokens(1, (9,)).apply(torch.zeros(1, V)), "MinNewTokens names token 9, but the vocabulary has 6"),
        (lambda: SuppressFirst((-1,)).apply(torch.zeros(1, V)), "SuppressFirst names token -1"),
        (lambda: ForceFirst((6,)).apply(torch.zeros(1, V)), "ForceFirst names token 6"),
        (lambda: ForceLast((6,), 1).apply(torch.zeros(1, V)), "ForceLast names token 6"),
        (lambda: token_bias({"no": 1.0}), "A logit bias names the text 'no', and without a tokenizer there are only ids"),
        (lambda: token_bias({"no": True}, TOK), "The bias of 'no' is True; give a number, or False"),
        (lambda: token_bias({1: "2"}, TOK), "The bias of 1 is '2'"),
        (lambda: word_ids(["no"]), "A bad word names the text 'no'"),
        (lambda: text_ids("", TOK, "A bad word"), "'', which has no tokens"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(make, words):
    with pytest.raises(SamplerError, match=words):
        make()
