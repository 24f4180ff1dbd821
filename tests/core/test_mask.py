"""The algebra of masks, and its resolution against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from glassformer.core.errors import MaskError
from glassformer.core.mask import And, Causal, Everything, Mask, Not, Or, Padding, SameDocument, Visible, Window, resolve

B, T = 3, 6
IDS = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]])
KEYS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0]], dtype=torch.bool)
LENGTHS = [6, 2, 4]


def allowed(m: Mask, b: int, q: int, s: int) -> bool:
    """The rule once more, for one pair of places, in plain Python."""
    match m:
        case And(terms):
            return all(allowed(x, b, q, s) for x in terms)
        case Or(terms):
            return any(allowed(x, b, q, s) for x in terms)
        case Not(term):
            return not allowed(term, b, q, s)
        case Causal():
            return s <= q
        case Window(size):
            return abs(q - s) < size
        case SameDocument():
            return bool(IDS[b, q] == IDS[b, s])
        case Padding():
            return s < LENGTHS[b]
        case Visible():
            return bool(KEYS[b, s])
        case Everything():
            return True
    raise AssertionError(m)


def brute(m: Mask, q_index: Tensor, k_index: Tensor) -> Tensor:
    q, s = q_index.expand(B, -1), k_index.expand(B, -1)
    return torch.tensor([[[j >= 0 and allowed(m, b, i, j) for j in s[b].tolist()] for i in q[b].tolist()] for b in range(B)])


leaves: st.SearchStrategy[Mask] = st.one_of(
    st.just(Causal()),
    st.just(Everything()),
    st.builds(Window, st.integers(1, T + 1)),
    st.just(SameDocument(IDS)),
    st.just(Padding(torch.tensor(LENGTHS))),
    st.just(Visible(KEYS)),
)
masks = st.recursive(
    leaves,
    lambda m: st.one_of(st.builds(lambda a, b: a & b, m, m), st.builds(lambda a, b: a | b, m, m), st.builds(lambda a: ~a, m)),
    max_leaves=5,
)


def dense(m: Mask, q: Tensor, k: Tensor, **options: bool) -> Tensor:
    resolved = resolve(m, q, k, rows=B, **options)
    visible = resolved.tensor(q.shape[-1], k.shape[-1], q.device)
    whole = torch.ones(B, 1, q.shape[-1], k.shape[-1], dtype=torch.bool)
    return (whole if visible is None else whole & visible)[:, 0]


@settings(max_examples=80, deadline=None)
@given(masks, st.integers(1, T))
def test_a_resolved_mask_equals_brute_force(m, t):
    index = torch.arange(t)
    assert torch.equal(dense(m, index, index), brute(m, index, index))  # the row itself
    q = torch.arange(T)[T - t :]
    assert torch.equal(dense(m, q, torch.arange(T)), brute(m, q, torch.arange(T)))  # a cached prefix before it


@settings(max_examples=60, deadline=None)
@given(masks, st.data())
def test_a_resolved_mask_equals_brute_force_in_ragged_rows_and_rings(m, data):
    place = st.integers(0, T - 1)
    q = torch.tensor(data.draw(st.lists(st.lists(place, min_size=2, max_size=2), min_size=B, max_size=B)))
    k = torch.tensor(data.draw(st.lists(st.lists(st.integers(-1, T - 1), min_size=4, max_size=4), min_size=B, max_size=B)))
    assert torch.equal(dense(m, q, k), brute(m, q, k))
    assert torch.equal(dense(m, q, torch.arange(T)), brute(m, q, torch.arange(T)))


@settings(max_examples=60, deadline=None)
@given(masks)
def test_the_newest_query_sees_what_the_rule_says(m):
    """With ``newest`` no key lies beyond the query, so dropping what hides the future changes nothing."""
    q, k = torch.tensor([T - 1]), torch.arange(T)
    assert torch.equal(dense(m, q, k, newest=True), brute(m, q, k))


def test_what_a_kernel_need_not_be_told():
    index = torch.arange(T)
    assert (r := resolve(Causal() & Window(T), index, index, rows=1)).causal and r.dense is None
    assert (r := resolve(Causal() & Window(T - 1), index, index, rows=1)).dense is not None and not r.causal
    assert (r := resolve(Causal() & Window(T), index[-1:], index, rows=1, newest=True)).dense is None and not r.causal
    r = resolve(Everything(), index, index, rows=1)
    assert (r.causal, r.dense, r.tensor(T, T, index.device)) == (False, None, None)
    assert resolve(Causal(), index, index, rows=1).tensor(2, 3, index.device).tolist() == [[True, True, False], [True, True, True]]


def test_a_conjunction_is_flat_and_drops_what_says_nothing():
    documents = SameDocument(IDS)
    assert Causal() & Everything() == Causal() and Everything() & Everything() == Everything()
    assert Causal() & Causal() == Causal()
    assert (Causal() & Window(3)) & (Window(3) & Window(4)) == And((Causal(), Window(3), Window(4)))
    both = Causal() & documents & documents
    assert isinstance(both, And) and len(both.terms) == 2
    assert len((SameDocument(IDS) & SameDocument(IDS.clone())).terms) == 2  # told apart by identity, not by content
    assert isinstance(Causal() | Window(2), Or) and isinstance(~Causal(), Not)


def test_a_window_that_sees_nothing_is_refused():
    with pytest.raises(MaskError, match=r"Window\(size=0\) would hide everything; the size is at least 1\."):
        Window(0)


def test_padding_of_a_list():
    assert Padding.of([3, 1]).lengths.tolist() == [3, 1] and Padding.of([3, 1]).lengths.dtype == torch.long
