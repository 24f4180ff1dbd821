"""Cached = uncached, for every causal variant and every kind of slot: token by token, in chunks, in rows of different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glassformer.core.cache import Cache, Dense, Growing, Once, Ring
from glassformer.core.mask import SameDocument
from glassformer.core.tap import Record
from tools import CAUSAL, DECODERS, PAIRS, SOURCE_LENGTHS, VOCAB, T, built, call, each, fresh, half, same, source, tokens

F64 = torch.float64
WINDOWED = ["window", "window-biased", "gemma2", "plus-one", "sigmoid-bias", "unlike-halves"]


def cached(model: Any, ids: Tensor, cache: Cache, cuts: list[int], **options: Any) -> Tensor:
    """Logits of ``ids`` read in pieces of these sizes."""
    assert sum(cuts) == ids.shape[1]
    outs, at = [], 0
    for n in cuts:
        outs.append(call(model, ids[:, at : at + n], cache=cache, **options))
        at += n
    return torch.cat(outs, 1)


@each(CAUSAL)
@pytest.mark.parametrize("capacity", [16, None], ids=["dense", "growing"])
def test_cached_equals_uncached(name, capacity):
    """To 1e-5 in float32, whether the row comes token by token, in chunks, or as a prompt and then tokens."""
    model, ids = built(name), tokens()
    with torch.no_grad():
        whole = call(model, ids)
        for cuts in ([1] * T, [4, 1, 3, 1], [T]):
            cache = model.cache(batch=2, capacity=capacity)
            same(cached(model, ids, cache, cuts), whole, what=f"pieces {cuts}")
            assert cache.lengths == [T, T] and cache.length == T and cache.batch == 2


@each(CAUSAL)
@pytest.mark.parametrize("capacity", [20, None], ids=["dense", "growing"])
def test_ragged_rows_continue_each_at_its_own_length(name, capacity):
    """Prompts padded on the right, then tokens, then a ragged chunk, then tokens: each row as if it were alone."""
    model, ids = built(name, F64), tokens(3, 14)
    prompt, chunk = [6, 2, 4], [1, 3, 2]
    cache = model.cache(batch=3, capacity=capacity)
    place = [0, 0, 0]
    with torch.no_grad():
        whole = call(model, ids)

        def feed(widths: list[int]) -> None:
            t = max(widths)
            block = torch.full((3, t), 5)
            for i, n in enumerate(widths):
                block[i, :n] = ids[i, place[i] : place[i] + n]
            out = call(model, block, cache=cache, lengths=None if widths == [t] * 3 else widths)
            for i, n in enumerate(widths):
                same(out[i, :n], whole[i, place[i] : place[i] + n], what=f"row {i} at {place[i]}")
                place[i] += n

        for widths in (prompt, [1] * 3, [1] * 3, chunk, [1] * 3, [0, 1, 1], [2, 2, 2]):
            feed(widths)
            assert cache.lengths == place


@each(WINDOWED)
def test_a_window_is_cached_in_a_ring(name):
    model, ids = built(name, F64), tokens(2, 25)
    cache = model.cache(batch=2, capacity=64)
    rings = [s["attn"] for s in cache.layers if isinstance(s["attn"], Ring)]
    assert rings
    with torch.no_grad():
        same(cached(model, ids, cache, [7, 1, 1, 1, 4, 1, 9, 1]), call(model, ids))
    for ring in rings:
        assert ring.keys.shape[2] == ring.window == ring.capacity


def test_the_kinds_of_slots():
    model = built("gemma2")
    cache = model.cache(capacity=64)
    assert type(cache.slot(0)) is Ring and type(cache.slot(1)) is Dense
    assert type(model.cache(capacity=4).slot(0)) is Dense, "a window as wide as the cache needs no ring"
    assert type(model.cache(capacity=None).slot(0)) is Growing
    assert type(built("holes").cache(capacity=64).slot(0)) is Dense, "a mask that is no plain window is kept in full"
    pair = built("t5").cache()
    assert type(pair.slot(0, "cross")) is Once
    assert cache.slot(1).keys is None and cache.bytes == 0
    with torch.no_grad():
        model(tokens(1), cache=cache)
    assert cache.slot(1).keys.shape == (1, 2, T, 8) and cache.slot(1).values.shape == (1, 2, T, 8)
    assert cache.slot(0).keys.shape == (1, 2, 4, 8)
    assert cache.bytes == 4 * 2 * 2 * 8 * (64 + 4) + 8 * 4, "keys and values of both layers, and the ring's 4 places"
    assert repr(cache).startswith("Cache(1 rows, lengths [9], capacity 64, 2 layers, ")


def test_the_keys_in_a_cache_are_those_of_the_site():
    model, ids = built("llama"), tokens()
    cache, tap = model.cache(batch=2), Record("**.k_rot", "**.v")
    with torch.no_grad():
        model(ids, cache=cache, tap=tap)
    for i in range(2):
        same(cache.slot(i).keys, tap[f"blocks.{i}.attn.k_rot"].transpose(1, 2))
        same(cache.slot(i).values, tap[f"blocks.{i}.attn.v"].transpose(1, 2))


# Fork, select, rewind


@each(["gpt2", "llama", "gemma2", "window", "alibi", "t5-of-model", "sink", "experts", *PAIRS])
@pytest.mark.parametrize("capacity", [24, None], ids=["dense", "growing"])
def test_forked_rows_go_their_own_ways(name, capacity):
    model, ids = built(name, F64), tokens(2, 6)
    tails = tokens(4, 4, seed=8)
    src = source(2) if name in PAIRS else None
    with torch.no_grad():
        cache = model.cache(batch=2, capacity=capacity)
        read(model, ids, cache, src)
        before = cache.lengths
        forked = cache.fork(2)
        got = read(model, tails, forked, None if src is None else src.repeat_interleave(2, 0))
        full = torch.cat([ids.repeat_interleave(2, 0), tails], 1)
        want = read(model, full, None, None if src is None else src.repeat_interleave(2, 0))[:, 6:]
        same(got, want)
        assert cache.lengths == before and forked.lengths == [10] * 4, "the fork is a copy"
        # The original goes on undisturbed.
        more = tokens(2, 3, seed=9)
        same(read(model, more, cache, src), read(model, torch.cat([ids, more], 1), None, src)[:, 6:])


@each(["gpt2", "llama", "gemma2", "window", "t5-of-model", *PAIRS])
def test_selected_rows_keep_their_lengths(name):
    model, ids, lengths = built(name, F64), tokens(3, 8), [8, 3, 5]
    src = source(3) if name in PAIRS else None
    with torch.no_grad():
        cache = model.cache(batch=3, capacity=24)
        read(model, ids, cache, src, lengths=lengths)
        chosen = cache.select([2, 0, 2])
        assert chosen.lengths == [5, 8, 5]
        more = tokens(3, 2, seed=5)
        got = read(model, more, chosen, None if src is None else src[[2, 0, 2]])
        for i, row in enumerate([2, 0, 2]):
            alone = torch.cat([ids[row : row + 1, : lengths[row]], more[i : i + 1]], 1)
            want = read(model, alone, None, None if src is None else src[row : row + 1])
            same(got[i : i + 1], want[:, -2:], what=f"row {row}")


def read(model: Any, ids: Tensor, cache: Cache | None, src: Tensor | None, **options: Any) -> Tensor:
    return model(ids, cache=cache, **options) if src is None else model(src, ids, cache=cache, **options)


@each(["gpt2", "llama", "gemma2", "window", "alibi", "t5-of-model", "sink", *PAIRS])
@pytest.mark.parametrize("capacity", [32, None], ids=["dense", "growing"])
def test_rewound_is_as_if_never_read(name, capacity):
    model, ids, wrong = built(name, F64), tokens(2, 12), tokens(2, 3, seed=7)
    with torch.no_grad():
        cache = model.cache(batch=2, capacity=capacity, rewind=3)
        call(model, ids[:, :8], cache=cache)
        call(model, wrong, cache=cache)
        cache.rewind(3)
        assert cache.lengths == [8, 8]
        same(cached(model, ids[:, 8:], cache, [1, 3]), call(model, ids)[:, 8:])
        call(model, wrong[:, :2], cache=cache)
        cache.rewind(2)
        assert cache.length == 12
        cache.rewind(0)


@pytest.mark.parametrize("name", ["llama", "window"])
def test_ragged_rows_rewind_together(name):
    model, ids, lengths = built(name, F64), tokens(2, 8), [8, 5]
    with torch.no_grad():
        cache = model.cache(batch=2, capacity=32, rewind=2)
        model(ids, cache=cache, lengths=lengths)
        model(tokens(2, 2, seed=3), cache=cache)
        cache.rewind(2)
        more = tokens(2, 1, seed=4)
        got = model(more, cache=cache)
        for i, n in enumerate(lengths):
            same(got[i : i + 1], model(torch.cat([ids[i : i + 1, :n], more[i : i + 1]], 1))[:, -1:])


# Gradients


@each(CAUSAL)
def test_gradients_through_a_growing_cache_equal_those_of_the_parallel_pass(name):
    model, ids = fresh(name, F64), tokens()
    call(model, ids).square().sum().backward()
    want = {n: x.grad.clone() for n, x in model.named_parameters() if x.requires_grad}
    model.zero_grad()
    cached(model, ids, model.cache(batch=2, capacity=None), [4, 1, 1, 3]).square().sum().backward()
    for n, x in model.named_parameters():
        if n not in want:
            continue
        scale = want[n].abs().max().clamp(min=1.0)
        same(x.grad / scale, want[n] / scale, what=n)


def test_gradients_through_a_growing_cache_of_ragged_rows():
    model, ids = fresh("llama", F64), tokens(2, 7)
    loss = torch.stack([model(ids[:1])[0, -1].square().sum(), model(ids[1:, :4])[0, -1].square().sum()]).sum()
    loss.backward()
    want = {n: x.grad.clone() for n, x in model.named_parameters()}
    model.zero_grad()
    cache = model.cache(batch=2, capacity=None)
    model(torch.cat([ids[:, :6]]), cache=cache, lengths=[6, 3])
    last = model(torch.stack([ids[0, 6:7], ids[1, 3:4]]), cache=cache)
    last.square().sum().backward()
    for n, x in model.named_parameters():
        same(x.grad, want[n], what=n)


def test_a_dense_cache_is_a_constant_to_autograd():
    model, ids = fresh("llama"), tokens()
    cache = model.cache(batch=2)
    model(ids[:, :5], cache=cache)
    out = model(ids[:, 5:], cache=cache)
    assert out.requires_grad and not cache.slot(0).keys.requires_grad


# Together with masks and taps


def test_packed_documents_are_cached_like_any_row():
    model, ids = built("llama", F64), tokens(1)
    documents = SameDocument(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]))
    with torch.no_grad():
        same(cached(model, ids, model.cache(), [3, 1, 1, 4], mask=documents), model(ids, mask=documents))


@each(["llama", "gemma2", "window", "sink", "alibi", "t5", "unlike-halves"])
def test_recorded_patterns_of_cached_steps_are_rows_of_the_whole(name):
    model, ids = built(name, F64), tokens()
    where = half(model) + "blocks.0.attn.pattern"
    whole, tap = Record(where), Record(where)
    cache = model.cache(batch=2, capacity=None)
    with torch.no_grad():
        call(model, ids, tap=whole)
        call(model, ids[:, :5], cache=cache)
        call(model, ids[:, 5:6], cache=cache, tap=tap)
    same(tap[where], whole[where][:, :, 5:6, :6])


@each(DECODERS)
def test_recording_a_cached_step_changes_no_bit(name):
    model, ids = built(name), tokens()
    with torch.no_grad():
        a, b = model.cache(batch=2, capacity=16), model.cache(batch=2, capacity=16)
        for lo, hi in ((0, 5), (5, 6), (6, 9)):
            assert torch.equal(model(ids[:, lo:hi], cache=a), model(ids[:, lo:hi], cache=b, tap=Record("**")))


def test_an_encoder_decoder_reads_its_source_once():
    model, ids = built("t5", F64), tokens(2)
    cache, tap = model.cache(batch=2), Record("**.cross.k")
    with torch.no_grad():
        memory = model.encode(source(2), SOURCE_LENGTHS[:2])
        first = model.decode(ids[:, :4], memory, source_lengths=SOURCE_LENGTHS[:2], cache=cache, tap=tap)
        assert len(tap) == 2
        tap.clear()
        rest = model.decode(ids[:, 4:], None, source_lengths=SOURCE_LENGTHS[:2], cache=cache, tap=tap)
        assert len(tap) == 0, "keys of the memory are made on the first call only"
        same(torch.cat([first, rest], 1), call(model, ids))


def test_a_long_generation_in_a_ring_stays_right():
    model, ids = built("window", F64), torch.randint(0, VOCAB, (1, 90), generator=torch.Generator().manual_seed(2))
    cache = model.cache(capacity=100)
    with torch.no_grad():
        whole = model(ids)
        same(model(ids[:, :40], cache=cache), whole[:, :40])
        for i in range(40, 90):
            same(model(ids[:, i : i + 1], cache=cache), whole[:, i : i + 1], what=f"token {i}")
