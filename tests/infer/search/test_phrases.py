"""Phrases that must come: an occurrence is never overlooked, and what is needed never grows beyond the room that there was."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import SamplerError
from glassformer.infer.search import Phrases, read_phrases
from infer.fake import Pieces

ids = st.integers(0, 2)
alternatives = st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=3)


def holds(text: list[int], phrase: list[int]) -> bool:
    return any(text[i : i + len(phrase)] == phrase for i in range(len(text)))


@settings(max_examples=200, deadline=None)
@given(st.lists(alternatives, max_size=3), st.lists(ids, max_size=14))
def test_a_phrase_is_met_where_it_occurs(phrases, text):
    p = Phrases(phrases)
    state = p.start()
    for n, token in enumerate(text, 1):
        state = p.push(state, token)
        assert [begun is None for begun in state] == [any(holds(text[:n], a) for a in phrase) for phrase in phrases]
        assert p.met(state) == (p.need(state) == 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(alternatives, min_size=1, max_size=3), st.lists(ids, max_size=8), st.randoms())
def test_some_next_token_always_lowers_the_need(phrases, text, random):
    p = Phrases(phrases)
    state = p.start()
    assert p.need(state) == p.tokens == sum(min(map(len, phrase)) for phrase in phrases)
    for token in text:
        state = p.push(state, token)
        assert p.need(state) <= p.tokens
    while not p.met(state):
        need, nearer = p.need(state), [t for t in p.next(state) if p.need(p.push(state, t)) < p.need(state)]
        assert nearer
        state = p.push(state, random.choice(nearer))
        assert p.need(state) <= need - 1


def test_none_is_met_from_the_start():
    p = Phrases()
    assert p.met(p.start()) and p.need(p.start()) == 0 and p.next(p.start()) == [] and len(p) == 0


def test_texts_are_taken_as_they_are_spelled_at_a_line_s_start_and_behind_a_space():
    tokenizer = Pieces("a", "b", " a", " ", "ab")
    assert read_phrases(["a", [1, 0], ["b", [4]]], tokenizer).alternatives == (((0,), (2,)), ((1, 0),), ((1,), (3, 1), (4,)))
    assert read_phrases(" a", tokenizer).alternatives == (((2,),),)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        (5, "list of phrases"),
        ([5], r"write \[\[5\]\]"),
        ([[]], "no phrase"),
        ([True], "holds the number"),
        (["a"], "without a tokenizer"),
        ([None], "no phrase"),
    ],
)
def test_what_is_no_phrase(given_, says):
    with pytest.raises(SamplerError, match=says):
        read_phrases(given_)
