"""Rows of a cache that come and go, views of it, and keys and values in fewer bits."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import glassformer as gf
from glassformer.core.cache import Cache
from glassformer.core.packed_cache import FORMS, pack, packed, scratch, unpack
from infer import engine_kit as kit

KINDS = ["grouped", "window", "latent"]


def whole(name: str, form: str | None = None, rows: int = 4) -> tuple[Any, Cache]:
    """A model and its cache, whose memory is there and which holds nothing."""
    model = kit.model(name)
    cache = model.cache(batch=rows, capacity=32)
    if form:
        packed(cache, form)
    with torch.no_grad():
        model(torch.zeros(rows, 1, dtype=torch.long), cache=cache)
    for row in range(rows):
        cache.clear_row(row, wipe=True)
    return model, cache


def feed(model: Any, cache: Cache, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), cache=cache)[:, -1]


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("name", KINDS)
def test_rows_hold_their_own_through_views_swaps_copies_and_cuts(name: str, form: str | None) -> None:
    model, cache = whole(name, form)
    held = cache.bytes
    texts = [kit.ids(n, n) for n in (6, 3, 9, 5)]
    for row, text in enumerate(texts):
        feed(model, cache.view(row, row + 1), text)
    assert cache.lengths == [6, 3, 9, 5]
    cache.swap_rows(0, 2)
    cache.swap_rows(1, 1)
    texts[0], texts[2] = texts[2], texts[0]
    cache.copy_row(2, 3, 4)
    texts[3] = texts[2][:4]
    cache.trim_row(2, 5)
    texts[2] = texts[2][:5]
    assert cache.lengths == [9, 3, 5, 4]
    # One call for all rows, of different lengths, goes on as each would have alone.
    new = [[11], [12], [13], [14]]
    with torch.no_grad():
        logits = model(torch.tensor(new), cache=cache.view(0, 4), lengths=[1, 1, 0, 1])[:, -1]
    assert cache.lengths == [10, 4, 5, 5]
    for row in (0, 1, 3):
        alone = model.cache(capacity=32)
        if form:
            packed(alone, form)
        feed(model, alone, texts[row])
        torch.testing.assert_close(logits[row], feed(model, alone, new[row])[0], atol=2e-4, rtol=1e-3)
    cache.clear_row(1)
    assert cache.lengths == [10, 0, 5, 5]
    alone = model.cache(capacity=32)
    if form:
        packed(alone, form)
    feed(model, alone, texts[2])
    torch.testing.assert_close(feed(model, cache.view(2, 3), [7, 8]), feed(model, alone, [7, 8]), atol=2e-4, rtol=1e-3)
    assert cache.bytes == held


def test_what_was_wiped_spreads_no_nan() -> None:
    model, cache = whole("grouped")
    view = cache.view(0, 1)
    with torch.no_grad():
        model(torch.tensor([kit.ids(9)]), cache=view, tap=gf.Edit("blocks.0.attn.v", lambda v: v * float("nan")))
    cache.clear_row(0, wipe=True)
    feed(model, cache.view(1, 2), kit.ids(9))
    feed(model, cache.view(0, 1), [3])
    with torch.no_grad():
        assert model(torch.tensor([[1], [2]]), cache=cache.view(0, 2)).isfinite().all()


def test_a_ring_whose_places_were_overwritten_gives_all_or_nothing() -> None:
    model, cache = whole("window")
    feed(model, cache.view(0, 1), kit.ids(20))
    assert cache.keeps(0, 20) and not cache.keeps(0, 15) and not cache.keeps(0, 21)
    cache.copy_row(0, 1, 20)
    alone = model.cache(capacity=32)
    feed(model, alone, kit.ids(20))
    torch.testing.assert_close(feed(model, cache.view(1, 2), [5]), feed(model, alone, [5]), atol=2e-4, rtol=1e-3)
    with pytest.raises(gf.CacheError, match="Row 0 holds 20 tokens, and of its first 15 not all is there any more, so they cannot be copied"):
        cache.copy_row(0, 1, 15)
    with pytest.raises(gf.CacheError, match="so it cannot be cut to them"):
        cache.trim_row(0, 15)


def test_an_encoders_keys_lie_on_a_shelf() -> None:
    model = kit.model("t5")
    cache = model.cache(batch=3, capacity=16)
    cache.shelve(12)
    with torch.no_grad():
        model.decode(torch.zeros(3, 1, dtype=torch.long), model.encode(torch.zeros(3, 1, dtype=torch.long)), cache=cache)
        for row in range(3):
            cache.clear_row(row, wipe=True)
        held, alone = cache.bytes, []
        for row, n in enumerate((5, 12, 3)):
            source, view, own = torch.tensor([kit.ids(n, n)]), cache.view(row, row + 1), model.cache(capacity=16)
            view.begin(n)
            memory = model.encode(source)
            torch.testing.assert_close(model.decode(torch.tensor([[0]]), memory, cache=view), model.decode(torch.tensor([[0]]), memory, cache=own))
            alone.append(model.decode(torch.tensor([[4]]), memory, cache=own))
        cache.swap_rows(0, 1)
        assert cache.clock.sources == [12, 5, 3]
        cache.copy_row(0, 2, 1)
        logits = model.decode(torch.tensor([[4]] * 3), None, source_lengths=cache.clock.sources, cache=cache.view(0, 3))
    for got, expected in zip(logits, (alone[1], alone[0], alone[1]), strict=True):
        torch.testing.assert_close(got, expected[0], atol=1e-4, rtol=1e-3)
    assert cache.bytes == held
    assert cache.select([2, 1]).clock.sources == [12, 5]


def test_errors_say_what_to_do() -> None:
    model = kit.model("grouped")
    cache = model.cache(batch=2, capacity=8)
    with pytest.raises(gf.CacheError, match="no memory yet, so nothing can be viewed"):
        cache.view(0, 1)
    _, cache = whole("grouped", rows=2)
    for ask, said in (
        (lambda: cache.view(1, 3), "rows 0 to 1, so there is no view of rows 1 to 2"),
        (lambda: cache.swap_rows(0, 5), "has 2 rows, so there is no row 5"),
        (lambda: cache.copy_row(0, 1, 4), "Row 0 holds 0 tokens"),
        (lambda: packed(cache, "int8"), "holds tokens already: pack it before the first call"),
        (lambda: packed(model.cache(), "int4"), "bfloat16 or int8; 'int4' was given"),
        (lambda: packed(model.cache(capacity=None), "int8"), "Only a cache of fixed capacity can be packed"),
    ):
        with pytest.raises(gf.CacheError, match=said):
            ask()


# In fewer bits


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_packed_comes_back_within_its_bounds(numbers: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(numbers).to(dtype)
    parts = pack(x, "int8")
    assert parts[0].dtype == torch.int8
    off = (parts[0].double() * parts[1].double() - x.double()).abs().max()
    hypothesis.assume(x.abs().max() == 0 or x.abs().max() > 1e-30)
    assert off <= x.double().abs().max() / 254 * (1 + 1e-5)
    assert unpack(parts, dtype).dtype == dtype
    half = unpack(pack(x.float(), "bfloat16"), torch.float32)
    assert ((half.double() - x.double()).abs() <= x.double().abs() / 256 + 1e-37).all()


def test_nothing_that_is_no_number_is_hidden() -> None:
    bad = torch.tensor([[1.0, float("nan")], [2.0, 3.0], [0.0, 0.0], [float("inf"), 1.0]])
    back = unpack(pack(bad, "int8"), torch.float32)
    assert not back[0].isfinite().any() and not back[3].isfinite().all()
    assert back[1].isfinite().all() and (back[2] == 0).all()


@pytest.mark.parametrize(("form", "bound", "bytes_of"), [("bfloat16", 0.08, lambda k: 2 * k), ("int8", 0.15, lambda k: k + 4)])
@pytest.mark.parametrize("name", ["learned", *KINDS, "t5"])
def test_an_engine_of_fewer_bits_is_near_and_smaller(name: str, form: Any, bound: float, bytes_of: Any) -> None:
    model = kit.model(name)
    exact, short = (gf.Engine(model, slots=3, capacity=64, cache_dtype=d, prefill_chunk=16) for d in (None, form))
    if name in ("learned", "grouped"):  # heads of 4 features, all of it dense
        assert short.bytes * 4 * 4 == exact.bytes * bytes_of(4)
    prompts = [kit.ids(6 + 7 * i, i) for i in range(5)]
    options: dict[str, Any] = {"max_new_tokens": 8}
    forced = [gf.generate(model, p, **options).ids for p in prompts]
    worst = 0.0
    for prompt, ids in zip(prompts, forced, strict=True):  # the same tokens in both, to compare what they weigh
        a, b = (e.generate([prompt], forced_first=ids, **options)[0] for e in (exact, short))
        assert a.ids == b.ids == ids
        worst = max(worst, max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)))
    assert 0 < worst < bound
    assert short.bytes == gf.Engine(model, slots=3, capacity=64, cache_dtype=form).bytes


@pytest.mark.parametrize("form", FORMS)
def test_requests_get_what_they_get_alone_with_such_a_cache(form: Any) -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=3, capacity=64, cache_dtype=form, prefill_chunk=64)
    prompts = [kit.ids(5 + 6 * i, i) for i in range(5)]
    tickets = [engine.submit(gf.Request(p, max_new_tokens=10, temperature=1.0, seed=1)) for p in prompts]
    for ticket, prompt in zip(tickets, prompts, strict=True):
        alone = gf.generate(model, prompt, max_new_tokens=10, temperature=1.0, seed=1, cache=packed(model.cache(capacity=64), form))
        kit.same(ticket.result(), alone)


class Made(TorchDispatchMode):
    """Adds up the bytes that are taken while it is on: outputs that lie in none of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_what_a_call_unpacks_is_within_what_is_counted(name: str, form: str, dtype: torch.dtype) -> None:
    model, cache = kit.SPECS[name].build(seed=1).to(dtype).eval(), None
    cache = packed(model.cache(batch=3, capacity=32), form)
    assert scratch(cache) == scratch(model.cache(batch=3, capacity=32)) == 0
    with torch.no_grad():
        model(torch.zeros(3, 31, dtype=torch.long), cache=cache)
        cache.clock.lengths = [32] * 3
        largest = 0
        for layer in cache.layers:
            with Made() as made:
                kept = layer["attn"].keys, layer["attn"].values
            assert kept[0].dtype == dtype
            # Both in the model's own type, and at most one of them in float32 on the way.
            own = sum(x.nbytes for x in kept) if form == "int8" or dtype != torch.bfloat16 else 0
            between = max(x.numel() * 4 for x in kept) if form == "int8" and dtype != torch.float32 else 0
            assert made.bytes == own + (sum(x.numel() * 4 for x in kept) if between else 0)
            largest = max(largest, own + between)
    assert scratch(cache) == largest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_memory_holds_the_cache_and_what_is_unpacked_of_it(name: str, form: Any) -> None:
    model = kit.model(name)
    one = gf.Engine(model, slots=1, capacity=64, cache_dtype=form)
    each = one.bytes + scratch(one._rows.cache)
    assert scratch(one._rows.cache) > 0
    engine = gf.Engine(model, capacity=64, cache_dtype=form, memory=5 * each + each // 2)
    assert engine.slots == 5
    assert engine.bytes + scratch(engine._rows.cache) <= 5 * each + each // 2
    with pytest.raises(gf.InputError, match=f"One slot takes {each:,} bytes, but memory={each - 1} is"):
        gf.Engine(model, capacity=64, cache_dtype=form, memory=each - 1)
