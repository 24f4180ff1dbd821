"""Rows of a cache moved in place are the rows of a copy, bit for bit, in every kind of slot; and a ring writes no more than what is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import glassformer as gf
from glassformer.core.cache import Cache, Clock, Dense, Ring, Shelf
from glassformer.core.errors import CacheError
from glassformer.core.packed_cache import packed
from glassformer.parts.feedforward import Gated
from glassformer.parts.latent import LatentAttention
from tools import PAIRS, VOCAB, built, source, tokens

LATENT = gf.Decoder(VOCAB, 32, (gf.Block(LatentAttention(4, kv_lora_rank=8, d_nope=8, d_rope=4, d_value=8), Gated(24), gf.RMSNorm()),) * 2).build(seed=0)
KINDS = ["llama", "gemma2", "window", "alibi", "latent", "t5", "bfloat16", "int8", "bfloat16 window", "int8 window"]


def model_of(kind: str) -> Any:
    name = kind.split()[-1]
    return LATENT if name == "latent" else built("window" if name == "window" else "llama" if name in ("bfloat16", "int8") else name)


def filled(kind: str, rows: int, t: int, lengths: list[int] | None = None, capacity: int | None = 24) -> Cache:
    model = model_of(kind)
    cache = model.cache(batch=rows, capacity=capacity)
    cache = packed(cache, kind.split()[0]) if kind.split()[0] in ("bfloat16", "int8") else cache
    read(kind, cache, tokens(rows, t), lengths=lengths)
    return cache


def read(kind: str, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    model = model_of(kind)
    with torch.no_grad():
        return model(source(cache.batch), ids, cache=cache, **options) if kind in PAIRS else model(ids, cache=cache, **options)


def held(cache: Cache) -> list[Tensor]:
    """All that counts: what lies beyond a row's length does not."""
    found = []
    for slot in (slot for layer in cache.layers for slot in layer.values()):
        for row, n in enumerate(cache.lengths):
            found += [x.clone() for x in slot.of_row(row, n, cache.clock.sources[row])]
    return found


def same(a: Cache, b: Cache) -> None:
    assert a.lengths == b.lengths and a.clock.sources == b.clock.sources
    x, y = held(a), held(b)
    assert len(x) == len(y) and all(map(torch.equal, x, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[2, 0, 1, 3], [1, 0, 3, 2], [0, 0, 1, 2], [3, 3, 3, 3], [1, 2, 3, 0], [0, 1, 2, 3], [1, 2, 0, 0]], ids=str)
@pytest.mark.parametrize("lengths", [None, [9, 3, 5, 8]], ids=["even", "ragged"])
def test_reordered_in_place_is_selected(kind, rows, lengths):
    one, other = filled(kind, 4, 9, lengths), filled(kind, 4, 9, lengths)
    memory = [x.data_ptr() for layer in one.layers for slot in layer.values() for x in slot.tensors().values()]
    assert one.reorder(rows) is one
    chosen = other.select(rows)
    same(one, chosen)
    assert memory == [x.data_ptr() for layer in one.layers for slot in layer.values() for x in slot.tensors().values()]
    if kind not in PAIRS:
        for seed in (4, 5):
            ids = tokens(4, 1, seed=seed)
            assert torch.equal(read(kind, one, ids), read(kind, chosen, ids))


class Numbers(Dense):
    """A slot of single numbers that counts what is written."""

    def __init__(self, clock: Clock, values: Tensor):
        super().__init__(clock, values.shape[1])
        self.held = values

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.held[:, None, :, None]}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_order_of_rows_loses_nothing(data):
    """Rows with common beginnings as in a tree: only what differs may be written, and all comes out as if copied."""
    n = data.draw(st.integers(1, 7))
    held = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=n, max_size=n)))
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    clock = Clock(n)
    clock.lengths = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    cache = Cache(clock, [{"attn": Numbers(clock, held.clone())}], 4)
    shared = []
    for i, r in enumerate(rows):
        alike = (held[i] == held[r]).long().cumprod(0).sum().item()
        shared.append(data.draw(st.integers(0, min(int(alike), clock.lengths[i], clock.lengths[r]))))
    lengths = list(clock.lengths)
    now = cache.reorder(rows, shared).slot(0).held
    assert cache.lengths == [lengths[r] for r in rows]
    for i, r in enumerate(rows):
        assert now[i, : lengths[r]].tolist() == held[r, : lengths[r]].tolist()


def test_what_stays_is_not_written(monkeypatch):
    cache = filled("llama", 4, 9)
    written: list[int] = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda x, y: written.append(x.numel()) or copy(x, y))
    cache.reorder([0, 1, 2, 3])
    assert written == []
    one = cache.slot(0).keys[0].numel() // 9
    cache.reorder([0, 1, 1, 3])
    assert written == [9 * one] * 4, "keys and values of two layers, one row, the places that are filled"
    written.clear()
    cache.reorder([0, 1, 2, 2], [9, 9, 9, 7])
    assert written == [2 * one] * 4, "and of these only what the row does not have"


def test_a_shared_beginning_means_a_shared_source():
    cache = filled("t5", 2, 5)
    before = cache.slot(0, "cross").keys.clone()
    cache.slot(0, "cross").keys[1] += 1
    cache.reorder([0, 0], [5, 3])
    assert torch.equal(cache.slot(0, "cross").keys[1], before[1] + 1)
    cache.reorder([0, 0], [5, 0])
    assert torch.equal(cache.slot(0, "cross").keys[1], before[0])
    clock = Clock(2)
    clock.sources, shelf = [2, 1], Shelf(clock, 4)
    shelf._keys, shelf._values = torch.arange(8.0).reshape(2, 1, 4, 1), torch.arange(8.0).reshape(2, 1, 4, 1)
    cache = Cache(clock, [{"cross": shelf}], 4)
    cache.reorder([1, 0])
    assert clock.sources == [1, 2] and shelf._keys[1, 0, :2, 0].tolist() == [0, 1] and shelf._keys[0, 0, :1, 0].tolist() == [4]


def test_where_rows_cannot_be_moved_in_place_they_are_copied():
    growing, whole = filled("llama", 2, 5, capacity=None), filled("llama", 3, 5)
    for cache, rows in ((growing, [1, 0]), (whole, [2, 0]), (whole.view(0, 2), [1, 0])):
        before = held(cache)
        made = cache.reorder(rows)
        assert made is not cache and all(map(torch.equal, before, held(cache)))
        same(made, cache.select(rows))
    with pytest.raises(CacheError, match=r"This cache has 3 rows, so there is no row 3\."):
        whole.reorder([0, 1, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_nearly_empty_cache_holds_what_counts(kind):
    cache = filled(kind, 3, 5, [5, 2, 4], capacity=64)
    chosen, again = cache.select([2, 0]), filled(kind, 3, 5, [5, 2, 4], capacity=64).select([2, 0])
    same(chosen, again)
    assert chosen.bytes <= cache.bytes
    assert [x.shape[1:] for x in chosen.slot(0).tensors().values()] == [x.shape[1:] for x in cache.slot(0).tensors().values()]


# The ring


def naive(ring: dict[int, int], held: int, new: int, most: int) -> None:
    for p in range(held, held + new):
        ring[p % most] = p


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_ring_holds_the_newest_token_of_every_place(data):
    """Against a dictionary, through even and ragged calls and rewinding; each key says which token it is."""
    window, slack, b = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    clock = Clock(b)
    ring, known = Ring(clock, window, slack), [dict[int, int]() for _ in range(b)]
    cache = Cache(clock, [{"attn": ring}], 1000)
    for _ in range(data.draw(st.integers(1, 8))):
        ks = data.draw(st.lists(st.integers(0, 3), min_size=b, max_size=b))
        allowed = all(
            k <= n and all(known[row].get(p % ring.capacity) == p for p in range(max(0, n - k - window + 1), n - k))
            for row, (k, n) in enumerate(zip(ks, clock.lengths, strict=True))
            if k
        )
        if all(k <= n for k, n in zip(ks, clock.lengths, strict=True)):
            if allowed:
                cache.rewind(ks)
            else:
                with pytest.raises(CacheError, match="can no longer be forgotten"):
                    cache.rewind(ks)
        t = data.draw(st.integers(1, 12))
        lengths = None if data.draw(st.booleans()) else data.draw(st.lists(st.integers(0, t), min_size=b, max_size=b))
        before = clock.lengths
        index = cache.open(b, t, lengths, torch.device("cpu"))
        k = index.expand(b, t)[:, :, None, None].double()
        keys, values, places = ring.update(k, -k, index)
        new = [t] * b if lengths is None else lengths
        seen = places.expand(b, -1)
        for row in range(b):
            there = {int(p): float(x) for p, x in zip(seen[row], keys[row, 0, :, 0], strict=True) if p >= 0}
            assert all(p == x for p, x in there.items())
            old = {p for p in known[row].values() if p < before[row]} if max(before) else set()
            assert set(there) == old | set(range(before[row], before[row] + t)) and torch.equal(keys, -values)
            naive(known[row], before[row], new[row], ring.capacity)
        cache.close()
        for row in range(b):
            assert {r: p for r, p in known[row].items() if p < clock.lengths[row]} == {
                r: int(ring.keys[row, 0, r, 0]) for r in range(ring.capacity) if 0 <= int(ring._index[row, r]) < clock.lengths[row]
            }


@pytest.mark.parametrize("lengths", [[40, 40], [40, 38]], ids=["even", "ragged"])
def test_a_ring_writes_the_new_tokens_only(lengths):
    """What one token leaves alone keeps even a wrong number."""
    cache = filled("window", 2, 40, lengths, capacity=64)
    ring = cache.slot(0)
    ring.keys.fill_(7.0)
    before = ring._index.clone()
    read("window", cache, tokens(2, 1, seed=3))
    assert [int(n) for n in (ring.keys != 7.0).flatten(2).any(1).reshape(2, ring.capacity, -1).any(2).sum(1)] == [1, 1]
    assert (ring._index != before).sum().item() == 2
