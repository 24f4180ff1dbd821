"""A decode step's blocks as one call: the bits of the blocks called one by one, whatever happens between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import glassformer as gf
from glassformer.core import native
from glassformer.core.tap import Record
from glassformer.weights import holding
from look import zoo

pytestmark = pytest.mark.skipif(not native.wait(), reason="no compiler here, or GLASSFORMER_NATIVE=0")

ROPE = gf.Attention(4, n_kv_heads=2, position=gf.Rotary())
MADE: dict[str, Any] = {
    "gpt2": gf.Decoder(
        zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, qkv_bias=True, out_bias=True), feedforward=gf.Plain(24, act="gelu_tanh", bias=True)),) * 2
    ),
    "llama": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=ROPE, feedforward=gf.Gated(24), norm=gf.RMSNorm()),) * 2),
    "window": gf.Decoder(
        zoo.V,
        zoo.D,
        (
            zoo.block(
                attention=gf.Attention(4, mask=gf.Window(64), cap=5.0, position=gf.Rotary(fraction=0.5, layout="interleaved")),
                feedforward=gf.Gated(24, act="gelu_tanh"),
            ),
        )
        * 2,
    ),
    "sandwich": gf.Decoder(
        zoo.V, zoo.D, (zoo.block(attention=ROPE, feedforward=gf.Gated(24, act="relu2"), norm=gf.RMSNorm(offset=1.0, cast="late"), wiring=gf.Sandwich()),) * 2
    ),
    "post": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=ROPE, feedforward=gf.Gated(24), wiring=gf.PostNorm()),) * 2),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = MADE[name].build(seed=0).eval()
    with torch.no_grad():
        for i, w in enumerate(model.parameters()):
            w.add_(0.2 * torch.randn(w.shape, generator=torch.Generator().manual_seed(i)))
    return model.to(dtype)


def begun(model: Any, lengths: list[int], planned: bool) -> Any:
    cache = model.cache(batch=len(lengths), capacity=32)
    if not planned:
        cache.plan = False
    tokens = torch.tensor([zoo.ids(max(lengths), i) for i in range(len(lengths))])
    with torch.no_grad():
        model(tokens, cache=cache, lengths=lengths)
    return cache


def on(model: Any, cache: Any, at: int, **rest: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(torch.tensor([[(at + row) % 20] for row in range(cache.batch)]), cache=cache, **rest)
        return y


def both(model: Any, lengths: list[int], between: Callable[[Any], Any] | None = None, back: Callable[[], None] | None = None) -> Any:
    """Steps with and without a plan give the same bits; ``between`` two of them something happens. Gives the cache with the plan."""
    seen = []
    for planned in (True, False):
        cache = begun(model, lengths, planned)
        out = [on(model, cache, at) for at in range(3)]
        if between is not None:
            cache = between(cache) or cache
            cache.plan = cache.plan if planned else False
        seen.append([*out, *(on(model, cache, at) for at in range(3))])
        if back is not None:
            back()
        if planned:
            kept = cache
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    return kept


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[6], [6, 2, 9, 1, 4], [3, 3]])
@pytest.mark.parametrize("name", list(MADE))
def test_one_call_gives_the_bits_of_many(name: str, lengths: list[int], dtype: torch.dtype, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache = both(made(name, dtype), lengths)
    finally:
        torch.set_num_threads(before)
    assert cache.plan.steps == 6


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("lengths", [[6], [6, 2, 9]])
def test_packed_matrices_take_part(kind: str, lengths: list[int]):
    block = zoo.block(attention=ROPE, feedforward=gf.Gated(64), norm=gf.RMSNorm())
    model = gf.Decoder(zoo.V, 64, (block,) * 2).build(seed=0).eval()
    holding.hold(model, kind)
    assert both(model, lengths).plan.steps == 6


@pytest.mark.parametrize("name", zoo.DECODERS)
@pytest.mark.parametrize("lengths", [[6], [6, 2, 9, 1, 4]])
def test_every_decoder_gives_the_bits_that_it_gave(name: str, lengths: list[int]):
    both(zoo.model(name), lengths)


def test_other_kinds_of_models_go_their_own_way():
    for block in (zoo.block(attention=gf.Attention(4, position=gf.ALiBi())), zoo.block(feedforward=gf.Experts(4, 2, gf.Plain(24)))):
        model = gf.Decoder(zoo.V, zoo.D, (block,)).build(seed=0).eval()
        assert both(model, [5]).plan is False


@pytest.mark.parametrize(
    "between",
    [lambda c: c.fork(2), lambda c: c.select([2, 0]), lambda c: c.rewind(2), lambda c: c.view(1, 3), lambda c: copy.deepcopy(c), lambda c: c.swap_rows(0, 2)],
)
def test_caches_that_change_hands(between: Callable[[Any], Any]):
    assert both(made("llama"), [6, 2, 9], between).plan.steps >= 3


def test_frozen_rows_and_chosen_positions():
    model = made("llama")
    out = []
    for planned in (True, False):
        cache = begun(model, [6, 2], planned)
        out.append([on(model, cache, 0, lengths=[1, 0]), on(model, cache, 1, lengths=[1, 1], keep=torch.tensor([0, 0])), on(model, cache, 2, keep=1)])
        assert cache.lengths == [9, 4]
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


def test_parameters_that_change_between_two_steps():
    model = made("gpt2")
    weight = model.blocks[0].attn.out.weight
    start, other = weight.detach().clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))

    def written(cache: Any) -> None:
        with torch.no_grad():
            weight.mul_(2)

    def swapped(cache: Any) -> None:
        weight.data = other.clone()

    def turned(cache: Any) -> None:
        weight.data = weight.data.t()

    def replaced(cache: Any) -> None:
        model.blocks[0].attn.out.weight = torch.nn.Parameter(other)

    def restored() -> None:
        weight.data = start.clone()
        model.blocks[0].attn.out.weight = weight

    assert both(model, [4], written, restored).plan.steps == 6
    for change in (swapped, replaced):
        assert both(model, [4], change, restored).plan.steps == 3
    assert both(model, [4], turned, restored).plan is False


def test_taps_and_hooks_find_the_blocks_called():
    model = made("llama")
    cache, plain = begun(model, [5], True), begun(model, [5], False)
    with torch.no_grad():
        on(model, cache, 0), on(model, plain, 0)
        taps = Record("blocks.1.attn.z"), Record("blocks.1.attn.z")
        on(model, cache, 1, tap=taps[0]), on(model, plain, 1, tap=taps[1])
        assert torch.equal(taps[0]["blocks.1.attn.z"], taps[1]["blocks.1.attn.z"])
        assert cache.plan.steps == 1
        assert torch.equal(on(model, cache, 2), on(model, plain, 2))
        assert cache.plan.steps == 2
        called: list[int] = []
        handle = model.blocks[1].attn.register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(on(model, cache, 3), on(model, plain, 3))
        handle.remove()
    assert len(called) == 2


def test_what_comes_out_is_the_callers_own():
    model = made("llama")
    cache = begun(model, [5], True)
    with torch.no_grad():
        first = model.states(torch.tensor([[1]]), cache=cache)
        kept = first.clone()
        model.states(torch.tensor([[2]]), cache=cache)
    assert cache.plan.steps == 2
    assert torch.equal(first, kept)


def test_without_compiled_code_nothing_is_planned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "library", lambda: None)
    model = made("llama")
    cache = begun(model, [5], True)
    on(model, cache, 0)
    assert cache.plan is None


def test_gradients_go_through_the_blocks():
    model = made("llama")
    cache = begun(model, [5], True)
    on(model, cache, 0)
    y = model(torch.tensor([[1]]), cache=cache)
    y.sum().backward()
    assert cache.plan.steps == 1
    assert model.final_norm.weight.grad is not None
