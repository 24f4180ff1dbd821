"""What a cache says when it cannot. (That a cached pass equals an uncached one is in tests/laws.)"""

from __future__ import annotations

import pytest
import torch

from glassformer.core.cache import NO_CACHE, Cache, Clock
from glassformer.core.errors import CacheError
from glassformer.core.tap import Edit
from tools import built, tokens


def filled(name: str = "llama", t: int = 9, **options: object) -> Cache:
    model = built(name)
    cache = model.cache(batch=2, **options)
    with torch.no_grad():
        model(tokens(2, t), cache=cache)
    return cache


def test_a_full_cache_says_how_full():
    model, cache = built("llama"), filled(capacity=10)
    with pytest.raises(CacheError, match=r"The cache holds 10 tokens; 9 are filled and 2 more came\. Make it with a larger capacity\."):
        model(tokens(2, 2), cache=cache)
    assert cache.lengths == [9, 9], "a refused call leaves the cache as it was"
    model(tokens(2, 1), cache=cache)
    assert cache.lengths == [10, 10]


def test_a_cache_for_other_rows():
    model, cache = built("llama"), built("llama").cache(batch=2)
    with pytest.raises(CacheError, match=r"This cache was made for 2 rows, but 3 came: make it with model\.cache\(batch=3\), or fork or select rows\."):
        model(tokens(3), cache=cache)


def test_forgetting_too_much():
    cache = filled()
    for k in (10, -1):
        with pytest.raises(CacheError, match=rf"Cannot forget {k} tokens: the shortest row holds 9\."):
            cache.rewind(k)
    cache.rewind(9)
    assert cache.lengths == [0, 0]


def test_a_ring_cannot_give_back_what_it_overwrote():
    cache = filled("window", capacity=64)
    with pytest.raises(
        CacheError,
        match=r"This cache has a ring of 4 places for a window of 4, so 2 tokens of a row of 9 can no longer be forgotten\. "
        r"Make the cache with rewind=2 or more\.",
    ):
        cache.rewind(2)
    assert cache.lengths == [9, 9]
    cache.rewind(1)  # the next query needs the three places before it, and they are there
    filled("window", capacity=64, rewind=2).rewind(2)
    filled("window", t=3, capacity=64).rewind(3)


def test_rows_and_layers_that_are_not_there():
    cache = filled()
    with pytest.raises(CacheError, match=r"fork\(0\) would leave no rows; n is at least 1\."):
        cache.fork(0)
    with pytest.raises(CacheError, match=r"This cache has 2 rows, so there is no row 2\."):
        cache.select([0, 2])
    with pytest.raises(CacheError, match=r"This cache has 2 rows, so there is no row -1\."):
        cache.select([-1])
    with pytest.raises(CacheError, match=r"This cache has 2 layers, so there is no layer 2\."):
        cache.slot(2)
    with pytest.raises(CacheError, match=r"Layer 0 has no 'cross' slot; it has attn\."):
        cache.slot(0, "cross")
    assert cache.slot(-1) is cache.slot(1)


def test_an_encoder_has_nothing_to_cache():
    with pytest.raises(CacheError, match=r"An encoder sees the whole text at once, so it has nothing to cache: call it without a cache\."):
        built("bert").cache()


def test_no_cache_hands_its_arguments_back():
    k, v, index = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.arange(2)
    keys, values, places = NO_CACHE.update(k, v, index)
    assert keys.shape == (1, 3, 2, 4) and values.shape == (1, 3, 2, 4) and places is index
    assert NO_CACHE.once(lambda: (k, v)) == (k, v) and not NO_CACHE.newest and NO_CACHE.tensors() == {}


def test_forks_do_not_share_memory():
    cache = filled(capacity=16)
    fork = cache.fork(1)
    fork.slot(0).keys.zero_()
    assert cache.slot(0).keys.abs().sum() > 0
    assert fork.bytes == cache.bytes


def test_a_clock_is_uniform_when_all_rows_march_together():
    clock = Clock(2)
    clock.new, clock.width = [3, 3], 3
    assert clock.uniform
    clock.new = [3, 2]
    assert not clock.uniform


def test_a_call_that_failed_midway():
    def fail(_):
        raise RuntimeError("midway")

    for name in ("llama", "window"):
        model, cache = built(name), filled(name, capacity=64)
        with torch.no_grad(), pytest.raises(RuntimeError, match="midway"):
            model(tokens(2, 3), cache=cache, tap=Edit("resid_final", fail))
        if name == "llama":
            assert torch.allclose(model(tokens(2, 2, seed=1), cache=cache), model(tokens(2, 2, seed=1), cache=filled(name, capacity=64)))
            continue
        for use in (lambda: model(tokens(2, 1), cache=cache), lambda: cache.rewind(1), lambda: cache.fork(2)):  # noqa: B023
            with pytest.raises(CacheError, match=r"failed midway and has overwritten part of its rings: make a new cache with model\.cache\(\.\.\.\)\."):
                use()
