"""A decode step's blocks as one call: the bits of the blocks called one by one, whatever happens between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import glassformer as gf
from glassformer.core import native
from glassformer.core.tap import Record
from glassformer.models import program
from glassformer.models.transformer import TransformerModel
from glassformer.weights import holding
from look import zoo

pytestmark = pytest.mark.skipif(not native.wait(), reason="no compiler here, or GLASSFORMER_NATIVE=0")

ROPE = gf.Attention(4, n_kv_heads=2, position=gf.Rotary())
PLAIN = zoo.block(feedforward=gf.Plain(24, act="gelu_tanh"))
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
    "learned": gf.Decoder(zoo.V, zoo.D, (PLAIN,) * 2, position=gf.Learned(max_positions=32), tied=True),
    "scaled": gf.Decoder(
        zoo.V, zoo.D, (PLAIN,), embedding=gf.Embedding(scale=gf.SqrtWidth()), position=gf.Learned(max_positions=32), readout=gf.LanguageModel(bias=True)
    ),
    "post": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=ROPE, feedforward=gf.Gated(24), wiring=gf.PostNorm()),) * 2),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = MADE[name].build(seed=0).eval()
    with torch.no_grad():
        for i, w in enumerate(model.parameters()):
            w.add_(0.2 * torch.randn(w.shape, generator=torch.Generator().manual_seed(i)))
    return model.to(dtype)


def begun(model: Any, lengths: list[int], planned: bool, capacity: int = 32) -> Any:
    cache = model.cache(batch=len(lengths), capacity=capacity)
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


# From tokens to logits


def decodes(model: Any, lengths: list[int]) -> Any:
    """Steps by one call each, and by the forward pass: the same bits. Gives the cache of the former."""
    mine, plain = begun(model, lengths, True), begun(model, lengths, False)
    for at in range(5):
        tokens = torch.tensor([[(3 * at + row) % 20] for row in range(len(lengths))])
        with torch.no_grad():
            expected = model(tokens, cache=plain, keep=1)[:, -1]
            quick = program.decode(model, tokens, mine)
            assert (quick is None) == (at == 0)  # the first writes the calls down
            y = model(tokens, cache=mine, keep=1)[:, -1] if quick is None else quick
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        assert mine.lengths == plain.lengths
    return mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[6], [6, 2, 9, 1, 4], [3, 3]])
@pytest.mark.parametrize("name", list(MADE))
def test_a_step_is_one_call(name: str, lengths: list[int], dtype: torch.dtype):
    assert decodes(made(name, dtype), lengths).plan.steps == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_tables_are_read_row_by_row(kind: str, tied: bool, dtype: torch.dtype):
    block = zoo.block(attention=ROPE, feedforward=gf.Gated(64), norm=gf.RMSNorm())
    model = gf.Decoder(zoo.V, 64, (block,) * 2, tied=tied, position=gf.Learned(max_positions=32)).build(seed=0).eval().to(dtype)
    holding.hold(model, kind)
    decodes(model, [6, 2, 9])


def stepped(model: Any, cache: Any, token: int = 1) -> Tensor | None:
    with torch.no_grad():
        return program.decode(model, torch.tensor([[token]] * cache.batch), cache)


@pytest.mark.parametrize(
    "spec",
    [
        gf.Decoder(zoo.V, zoo.D, (PLAIN,), embedding=gf.Embedding(norm=gf.LayerNorm())),
        gf.Decoder(zoo.V, zoo.D, (PLAIN,), embedding=gf.Embedding(n_types=2)),
        gf.Decoder(zoo.V, zoo.D, (PLAIN,), embedding=gf.Embedding(lift=gf.LiftTokens(8))),
        gf.Decoder(zoo.V, zoo.D, (PLAIN,), readout=gf.LanguageModel(cap=5.0)),
        gf.Decoder(zoo.V, zoo.D, (PLAIN,), position=gf.Sinusoidal()),
    ],
    ids=["normed", "typed", "lifted", "capped", "sines"],
)
def test_other_tables_and_readouts_are_left_to_the_forward_pass(spec: Any):
    model = spec.build(seed=0).eval()
    cache = begun(model, [4], True)
    on(model, cache, 0)
    assert cache.plan.steps == 1
    assert stepped(model, cache) is None


def test_what_cannot_be_is_left_to_the_forward_pass_and_its_errors():
    model = gf.Decoder(zoo.V, zoo.D, (PLAIN,), position=gf.Learned(max_positions=16)).build(seed=0).eval()
    cache = begun(model, [4], True)
    on(model, cache, 0)
    assert stepped(model, cache, zoo.V) is None
    assert stepped(model, cache, -1) is None
    for at in range(11):
        assert stepped(model, cache, at) is not None
    assert cache.lengths == [16]
    assert stepped(model, cache) is None  # the model has 16 positions
    small = model.cache(batch=1, capacity=6)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=small)
    on(model, small, 0), stepped(model, small), stepped(model, small)
    assert small.lengths == [6]
    assert stepped(model, small) is None


class Doubled(TransformerModel):
    def forward(self, *args: Any, **rest: Any) -> Tensor:
        return 2 * super().forward(*args, **rest)


def test_changes_between_two_steps_are_seen():
    model = made("gpt2")
    cache = begun(model, [4], True, 64)
    on(model, cache, 0)
    assert stepped(model, cache) is not None
    other = model.embed.weight.detach().flip(0).clone()
    spec, act, steps = model.readout.spec, model.blocks[0].ffn.act, model.blocks[0].steps
    for change, undo in (
        (lambda: model.train(), lambda: model.eval()),
        (lambda: setattr(model.blocks[1], "training", True), lambda: model.eval()),
        (lambda: setattr(model.readout, "factor", 2.0), lambda: setattr(model.readout, "factor", 1.0)),
        (lambda: setattr(model.readout, "spec", replace(model.readout.spec, cap=1.0)), lambda: setattr(model.readout, "spec", spec)),
        (lambda: setattr(model.blocks[0].ffn, "act", torch.relu), lambda: setattr(model.blocks[0].ffn, "act", act)),
        (lambda: setattr(model.blocks[0], "steps", steps[:1]), lambda: setattr(model.blocks[0], "steps", steps)),
        (lambda: setattr(model, "__class__", Doubled), lambda: setattr(model, "__class__", TransformerModel)),
        (lambda: setattr(model.blocks[0].norm1, "eps", 0.1), lambda: setattr(model.blocks[0].norm1, "eps", 1e-5)),
        (lambda: setattr(model.embed.weight, "data", other), lambda: None),
        (lambda: setattr(model, "forward", lambda *a, **k: None), lambda: model.__dict__.pop("forward")),
    ):
        change()
        assert stepped(model, cache) is None
        undo()
        on(model, cache, 0)  # writes down what is so now
        assert stepped(model, cache) is not None
    model.train()
    on(model, cache, 0)  # a state that passes, not a kind of model
    model.eval()
    on(model, cache, 0)
    assert stepped(model, cache) is not None
    handles = [model.register_forward_hook(lambda *_: None), model.embed.register_forward_pre_hook(lambda *_: None)]
    for handle in handles:
        assert stepped(model, cache) is None
        on(model, cache, 0)
        handle.remove()
    on(model, cache, 0)
    assert stepped(model, cache) is not None


@pytest.mark.parametrize("part", ["attn.out.weight", "attn.qkv.weight", "ffn.up.bias", "embed.weight", "position.table"])
@pytest.mark.parametrize("by", [-4, 4])
def test_parameters_of_other_sizes_are_left_to_the_forward_pass(part: str, by: int):
    model = made("gpt2" if part == "ffn.up.bias" else "learned")
    cache, plain = begun(model, [4], True), begun(model, [4], False)
    on(model, cache, 0), on(model, plain, 0)
    owner, _, name = part.rpartition(".")
    holder = model.get_submodule(owner if owner in ("embed", "position") else f"blocks.0.{owner}")
    old = getattr(holder, name)
    rows = len(old) + by
    setattr(holder, name, torch.nn.Parameter(old.detach().repeat(2, *[1] * (old.ndim - 1))[:rows].clone()))

    def tried(cache: Any, token: int) -> Any:
        try:
            return on(model, cache, token)
        except (RuntimeError, IndexError) as error:
            return str(error)

    assert stepped(model, cache, 19) is None
    one, other = tried(cache, 19), tried(plain, 19)
    assert type(one) is type(other)
    assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_class_with_a_forward_pass_of_its_own_keeps_it():
    model = made("gpt2")
    model.__class__ = Doubled
    cache = begun(model, [4], True)
    on(model, cache, 0)
    assert cache.plan.steps == 1
    assert stepped(model, cache) is None


@pytest.mark.parametrize("lengths", [[5], [5, 2, 7]])
def test_sessions_and_engines_draw_the_same_either_way(lengths: list[int], monkeypatch: pytest.MonkeyPatch):
    model, prompts = made("llama"), [zoo.ids(n, n) for n in lengths]

    def drawn() -> Any:
        session = gf.Session(model, prompts, gf.TopK(8) | gf.Draw(seed=3), room=10)
        engine = gf.Engine(model, slots=4, capacity=32)
        tickets = [engine.submit(gf.Request(p, max_new_tokens=6)) for p in prompts]
        while engine.step():
            pass
        return [session.step() for _ in range(10)], [t.result().ids for t in tickets], session

    quick = drawn()
    assert quick[2].cache.plan.steps == 9
    monkeypatch.setattr(program, "decode", lambda *_: None)
    slow = drawn()
    assert quick[:2] == slow[:2]


def test_more_rows_in_bfloat16_take_tiles():
    block = zoo.block(attention=ROPE, feedforward=gf.Gated(64), norm=gf.RMSNorm())
    model = gf.Decoder(zoo.V, 32, (block,) * 2).build(seed=0).eval().to(torch.bfloat16)
    cache, plain = begun(model, [4] * 12, True), begun(model, [4] * 12, False)
    assert torch.equal(on(model, cache, 0), on(model, plain, 0))
    assert bool(cache.plan) == bool(native.library().glassformer_has_tiles())
