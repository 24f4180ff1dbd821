"""Deterministic mode: a row's bits are the same in any batch, padded on any side, cached or not, in pieces, in an engine."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import glassformer as gf
from glassformer.core import native
from glassformer.core.mask import Padding, Visible, resolve
from glassformer.core.modes import is_deterministic
from glassformer.infer import PromptLookup, Session
from glassformer.parts import kernels, linear, steady, steady_attention
from glassformer.parts.feedforward import Gated, Plain
from infer import engine_kit as kit
from look import zoo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT = kit.ids(19, 5)


def _block(attention: Any, **changes: Any) -> gf.Block:
    base: dict[str, Any] = {"attention": attention, "feedforward": Gated(24), "norm": gf.RMSNorm()}
    return gf.Block(**(base | changes))


def _decoder(*blocks: gf.Block, **changes: Any) -> gf.Decoder:
    return gf.Decoder(kit.V, kit.D, blocks, final_norm=gf.RMSNorm(), **changes)


MORE: dict[str, Any] = {
    "sinks": _decoder(*(_block(gf.Attention(4, position=gf.Rotary(), normaliser=gf.SoftmaxSink(), cap=15.0)),) * 2),
    "plus one": _decoder(_block(gf.Attention(2, position=gf.Rotary(fraction=0.5), normaliser=gf.SoftmaxPlusOne()), feedforward=Plain(24, "relu2"))),
    "windows": _decoder(*(_block(gf.Attention(4, n_kv_heads=1, position=gf.ALiBi(), mask=gf.Window(w))) for w in (5, 9))),
    "t5 bias": _decoder(*(_block(gf.Attention(4)),) * 2, position=gf.T5Buckets(bidirectional=False)),
    "sines": _decoder(*(_block(gf.Attention(4, qk_norm=gf.RMSNorm()), norm=gf.DynamicTanh()),) * 2, position=gf.Sinusoidal()),
    "deepseek": _decoder(
        _block(gf.LatentAttention(4, kv_lora_rank=8, d_nope=4, d_rope=4, q_lora_rank=6)),
        _block(
            gf.LatentAttention(4, kv_lora_rank=8, d_nope=4, d_rope=4),
            feedforward=gf.Experts(8, 3, Gated(12), routing=gf.SigmoidRouting(groups=gf.Groups(4, 2, 2), wide=True), shared=Gated(12)),
        ),
    ),
    "gpt-oss": _decoder(_block(gf.Attention(4, n_kv_heads=2, position=gf.Rotary(), out_bias=True), feedforward=gf.Experts(4, 2, gf.ClampedGated(12)))),
}
SPECS: dict[str, Any] = {
    **{name: spec for name, spec in kit.SPECS.items() if name != "t5"},
    **{f"zoo {name}": spec for name, spec in zoo.SPECS.items() if name not in ("t5", "experts", "llama")},
    **MORE,
}


def build(spec: Any, dtype: str = "float32") -> Any:
    """The model, its weights large enough that all that it sees counts."""
    made = spec.build(seed=1).eval()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for path, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * (1.5 / p.shape[-1] ** 0.5) if p.ndim > 1 else p + 0.2 * torch.randn(p.shape, generator=draw))
            assert path
    return made.to(DTYPES[dtype])


def bits(x: Tensor) -> str:
    """A hash of a tensor's bytes."""
    return hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def rows(batch: int) -> tuple[list[list[int]], int]:
    """Texts of odd lengths with ``PROMPT`` among them, and where it is."""
    texts = [kit.ids(3 + 7 * i % 29, i) for i in range(batch)]
    texts[batch // 3] = PROMPT
    return texts, batch // 3


def right(texts: list[list[int]]) -> tuple[Tensor, list[int]]:
    width = max(map(len, texts))
    return torch.tensor([t + [0] * (width - len(t)) for t in texts]), [len(t) for t in texts]


def ways(model: Any, batch: int) -> Iterator[tuple[str, Tensor]]:
    """Logits [t v] of ``PROMPT`` among others, in every way to compute them."""
    texts, slot = rows(batch)
    tokens, lengths = right(texts)
    n, width = len(PROMPT), tokens.shape[1]
    yield "padded on the right", model(tokens, lengths=lengths)[slot, :n]
    seen = torch.tensor([[False] * (width - k) + [True] * k for k in lengths])
    left = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    yield "padded on the left", model(left, mask=Visible(seen), positions=(seen.cumsum(-1) - 1).clamp(min=0))[slot, width - n :]
    if not isinstance(model.spec, gf.Decoder):
        return
    yield "prefill", model(tokens, lengths=lengths, cache=model.cache(batch, 64))[slot, :n]
    for name, cuts in {"token by token": range(n + 1), "in pieces": (0, 5, 6, 15, n)}.items():
        cache = model.cache(batch, 40 + batch)
        pieces = itertools.pairwise(cuts)
        yield name, torch.cat([model(tokens[:, a:e], cache=cache)[slot] for a, e in pieces])
    cache, made = model.cache(batch, 50), []
    for at in range(0, n, 4):  # rows that are at different places, some of them waiting
        made.append(model(tokens[:, at : at + 4], lengths=[max(0, min(4, k - at)) for k in lengths], cache=cache)[slot, : n - at])
    yield "in ragged pieces", torch.cat(made)


def check(model: Any, batches: tuple[int, ...] = (1, 2, 8, 32)) -> None:
    with gf.deterministic():
        alone = model(torch.tensor([PROMPT]))[0]
        for batch in batches:
            for name, logits in ways(model, batch):
                assert bits(logits) == bits(alone), f"{name}, {batch} rows: off by {(logits - alone).abs().max():.1e}"
    with torch.no_grad():
        near = model(torch.tensor([PROMPT]))[0]
    close = {"atol": 1e-4, "rtol": 1e-4} if alone.dtype == torch.float32 else {"atol": 0.4, "rtol": 0.1}
    torch.testing.assert_close(alone, near, **close)


@pytest.mark.parametrize("name", SPECS)
def test_logits_have_the_same_bits_in_every_way(name: str) -> None:
    check(build(SPECS[name]), (1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_more_batches(name: str, dtype: str) -> None:
    check(build(SPECS[name], dtype), (2, 32))


@pytest.mark.parametrize("name", ["grouped", "window", "alibi", "latent", "experts"])
def test_bfloat16(name: str) -> None:
    check(build(SPECS[name], "bfloat16"), (2, 8, 32))


def some(names: list[str], quick: int) -> list[Any]:
    """All of them; those after the first ``quick`` are slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if i >= quick else ()) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", some(["window", "experts", "sinks", "learned", "alibi", "latent", "deepseek", "zoo bert"], 3))
def test_without_compiled_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    check(build(SPECS[name]), (8,))
    check(build(SPECS[name], "bfloat16"), (2,))


def test_float64_goes_through_torch() -> None:
    model = build(SPECS["grouped"]).double()
    check(model, (2, 8))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed(kind: str) -> None:
    from glassformer.weights.holding import hold

    attention = gf.Attention(4, position=gf.Rotary(), n_kv_heads=2)
    model = build(gf.Decoder(kit.V, 64, (_block(attention, feedforward=Gated(96)),) * 2, final_norm=gf.RMSNorm()))
    hold(model, kind)
    check(model)


def test_with_threads() -> None:
    before = torch.get_num_threads()
    model = build(gf.Decoder(kit.V, 192, (_block(gf.Attention(4, position=gf.Rotary()), feedforward=Plain(300, "gelu")),) * 2, final_norm=gf.LayerNorm()))
    try:
        torch.set_num_threads(2)
        check(model, (8,))
        with gf.deterministic():
            two = model(torch.tensor([PROMPT]))
            torch.set_num_threads(1)
            one = model(torch.tensor([PROMPT]))
        assert bits(one) == bits(two) or native.library() is None
    finally:
        torch.set_num_threads(before)


def test_encoder_decoder_with_padded_sources() -> None:
    model = build(kit.SPECS["t5"])
    source = kit.ids(11, 3)
    with gf.deterministic():
        alone = model(torch.tensor([source]), torch.tensor([PROMPT]))[0]
        for batch in (1, 2, 8, 32):
            texts, slot = rows(batch)
            sources = [kit.ids(2 + 5 * i % 17, 50 + i) for i in range(batch)]
            sources[slot] = source
            (s, s_lengths), (t, t_lengths) = right(sources), right(texts)
            whole = model(s, t, source_lengths=s_lengths, lengths=t_lengths)
            assert bits(whole[slot, : len(PROMPT)]) == bits(alone)
            memory, cache = model.encode(s, s_lengths), model.cache(batch, 64)
            cuts = (0, 4, 5, 14, len(PROMPT))
            pieces = [model.decode(t[:, a:e], memory, source_lengths=s_lengths, cache=cache)[slot] for a, e in itertools.pairwise(cuts)]
            assert bits(torch.cat(pieces)) == bits(alone)


# Whole generations


def told(one: gf.Generated) -> tuple[Any, ...]:
    """Tokens, log-probabilities to the bit, and what else a caller sees of them."""
    numbers = [*one.logprobs, *(c.logprob for top in one.top for c in top)]
    return one.ids, struct.pack(f"{len(numbers)}d", *numbers), [[c.id for c in top] for top in one.top], one.finish_reason


GENERATED = ["grouped", "window", "t5", "learned", "alibi", "latent", "experts", "longrope", "sinks"]


@pytest.mark.parametrize("name", some(GENERATED, 3))
def test_whole_generations(name: str) -> None:
    model = build((kit.SPECS | MORE)[name])
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.1, "top_k": 9, "repetition_penalty": 1.2, "seed": 3, "logprobs": 4}
    run = lambda prompts, **more: gf.generate(model, prompts, deterministic=True, **(options | more))
    alone = run(PROMPT)
    assert told(run(PROMPT, cache=False)) == told(alone)
    for batch in (2, 8, 32):
        texts, slot = rows(batch)
        assert told(run(texts)[slot]) == told(alone)
        if batch == 8:
            assert told(run(texts, cache=False)[slot]) == told(alone)
    assert told(run(PROMPT, draft=PromptLookup(), draft_tokens=3)) == told(alone)
    assert told(run(rows(8)[0], draft=model, draft_tokens=4)[rows(8)[1]]) == told(alone)
    streamed = [t.id for t in gf.stream(model, PROMPT, deterministic=True, **options)]
    assert streamed == alone.ids
    assert not is_deterministic()


@pytest.mark.parametrize("name", some(["grouped", "window", "experts", "latent", "alibi", "t5"], 3))
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_engines_with_random_schedules(name: str, seed: int) -> None:
    """Prefix sharing, prompts in pieces, requests that come and go: what each gets is what it gets alone."""
    model, rng = build(kit.SPECS[name]), random.Random(seed)
    beginning = kit.ids(20, 7)
    wanted = []
    for _ in range(10):
        ids, options = kit.asked(rng, longest=24)
        options.pop("trace", None)
        wanted.append((beginning + ids if rng.random() < 0.5 else ids, options | {"logprobs": 3}))
    engine = gf.Engine(model, slots=rng.randint(2, 6), capacity=96, prefill_chunk=rng.choice([3, 7, 32]), deterministic=True)
    tickets = []
    for ids, options in wanted:
        tickets.append(engine.submit(gf.Request(ids, **options)))
        for _ in range(rng.randint(0, 4)):
            engine.step()
    kit.run(engine)
    for (ids, options), ticket in zip(wanted, tickets, strict=True):
        assert told(ticket.result()) == told(gf.generate(model, ids, deterministic=True, **options))


def test_beams_do_not_depend_on_the_batch() -> None:
    model = build(SPECS["grouped"])
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10, "deterministic": True}
    alone = gf.generate(model, PROMPT, **options)
    texts, slot = rows(4)
    found = gf.generate(model, texts, **options)[slot]
    assert [(told(a), a.score) for a in found.beams] == [(told(a), a.score) for a in alone.beams]


def test_sessions_fork_and_rewind() -> None:
    model = build(SPECS["window"])
    session = Session(model, [PROMPT], gf.TopK(9) | gf.Draw(seed=1), room=40, top=3, deterministic=True)
    session.cache = model.cache(1, 80, rewind=8)
    first = [session.step() for _ in range(9)]
    session.rewind(5)
    twins = session.fork(3)
    again = [twins.step() for _ in range(5)]
    assert [d.ids for d in again] == [d.ids * 3 for d in first[4:]]
    assert [d.logprobs for d in again] == [d.logprobs * 3 for d in first[4:]]


# That it is needed


def test_without_the_mode_bits_differ() -> None:
    """At GPT-2-like widths torch's products sum in another order for another number of rows."""
    spec = gf.Decoder(101, 768, (_block(gf.Attention(12, position=gf.Rotary()), feedforward=Plain(3072, "gelu_tanh"), norm=gf.LayerNorm()),) * 2)
    model = spec.build(seed=0).eval()
    with torch.no_grad():
        alone = model(torch.tensor([PROMPT]))[0]
        found = {name for batch in (2, 8) for name, logits in ways(model, batch) if bits(logits) != bits(alone)}
    if not found:
        pytest.skip("this build of torch happens to give the same bits here")
    check(model, (2, 8))


# Its pieces


def test_values_one_by_one_sums_and_products() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=draw) for s in ((75, 300), (40, 300), (40,)))
    with gf.deterministic():
        for f in (torch.exp, torch.tanh, torch.sigmoid, torch.nn.functional.gelu, torch.nn.functional.silu, torch.cos):
            whole = steady.each(f, x)
            assert all(bits(steady.each(f, x[i, a:e])) == bits(whole[i, a:e]) for i, a, e in ((0, 0, 1), (3, 5, 70), (74, 0, 300)))
            torch.testing.assert_close(whole, f(x), atol=1e-6, rtol=1e-5)
        for product in (linear.product, steady.tiles):
            whole = product(x, w, b)
            assert all(bits(product(x[a:e], w, b)) == bits(whole[a:e]) for a, e in ((0, 1), (5, 6), (31, 75), (3, 35)))
            torch.testing.assert_close(whole, x @ w.T + b, atol=1e-4, rtol=1e-4)
    assert bits(steady.total(torch.cat([x, torch.zeros(75, 77)], 1))) == bits(steady.total(x))
    torch.testing.assert_close(steady.total(x, 0), x.sum(0, keepdim=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steady.softmax(x), x.softmax(-1))
    torch.testing.assert_close(steady.logsumexp(x), x.logsumexp(-1, keepdim=True))
    assert steady.logsumexp(torch.tensor([[float("-inf")] * 3, [float("inf"), 1.0, 2.0]])).flatten().tolist() == [float("-inf"), float("inf")]
    torch.testing.assert_close(steady.layer_norm(x, w[0], w[1], 1e-5), torch.nn.functional.layer_norm(x, (300,), w[0], w[1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steady.rms_norm(x, 1e-5), torch.nn.functional.rms_norm(x, (300,), eps=1e-5))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [(2, 6, 2, 70, 64, 64), (1, 4, 4, 9, 20, 12), (2, 8, 1, 33, 16, 37)])
def test_attention_is_that_of_float64(compiled: bool, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    b, h, g, s, d, dv = size
    draw = torch.Generator().manual_seed(1)
    t = s // 2
    q, k, v = (torch.randn(*x, generator=draw) for x in ((b, h, t, d), (b, g, s, d), (b, g, s, dv)))
    index = torch.arange(s)
    masks = {
        "all": resolve(gf.Everything(), index[:t] + s - t, index, rows=b),
        "causal": resolve(gf.Causal(), index[:t] + s - t, index, rows=b),
        "window": resolve(gf.Causal() & gf.Window(7), index[:t] + s - t, index, rows=b),
        "padding": resolve(Padding(torch.tensor([s, s - 5][:b])), index[:t], index, rows=b),
        "holes": resolve(Visible(torch.rand(b, s, generator=draw) < 0.6), index[:t], index, rows=b),
        "none": resolve(Padding(torch.tensor([s, 0][:b])), index[:t], index, rows=b),
    }
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    for name, mask in masks.items():
        for cap, bias in ((None, None), (9.0, torch.randn(1, h, t, s, generator=draw))):
            for normaliser in (gf.Softmax(), gf.SoftmaxSink(), gf.Sigmoid()):
                rule = kernels.Rule(d**-0.5, cap, bias, mask, normaliser.build(h))
                with gf.deterministic():
                    z = steady_attention.attend(q, k, v, rule)
                with torch.no_grad():
                    exact = kernels.explicit(q.double(), k.double(), v.double(), rule)
                torch.testing.assert_close(z.double(), exact, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# The mode itself


def test_the_mode_is_of_one_thread_and_nests() -> None:
    seen: list[bool] = []
    with gf.deterministic():
        with gf.deterministic(), gf.deterministic(False):
            assert is_deterministic()
        assert is_deterministic()
        assert not torch.is_grad_enabled()
        other = threading.Thread(target=lambda: seen.append(is_deterministic()))
        other.start()
        other.join()
    assert seen == [False]
    assert not is_deterministic()
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), gf.deterministic():
        _ = 1 / 0
    assert not is_deterministic()


def test_a_stream_leaves_its_caller_alone() -> None:
    events = gf.stream(build(SPECS["grouped"]), PROMPT, max_new_tokens=3, deterministic=True)
    next(events)
    assert not is_deterministic()
    assert torch.is_grad_enabled()
    assert len(list(events)) == 2


def test_what_cannot_be_had_is_said() -> None:
    model = build(SPECS["grouped"])
    tokens = torch.tensor([PROMPT])
    with gf.deterministic():
        with torch.enable_grad(), pytest.raises(gf.InputError, match="makes no gradients, but they were switched on inside it"):
            model(tokens)
        for site, what in (("pattern", "Scores and patterns"), ("result", "Single heads' results")):
            with pytest.raises(gf.InputError, match=f"{what}.* cannot be edited in deterministic mode"):
                model(tokens, tap=gf.Edit(f"blocks.0.attn.{site}", lambda x: x * 0.5))
        with pytest.raises(gf.InputError, match="A norm's scale cannot be edited in deterministic mode"):
            model(tokens, tap=gf.Edit("blocks.0.norm1.scale", lambda x: x * 0.5))
    stretched = gf.Rotary(scaling=gf.DynamicNTKScaling(factor=2.0, original_context=16))
    grows = build(_decoder(_block(gf.Attention(4, position=stretched))))
    with gf.deterministic(), pytest.raises(gf.InputError, match="DynamicNTKScaling turns keys beyond 16 places by how long the call is"):
        grows(tokens)
    with gf.deterministic():
        assert grows(tokens[:, :16]).isfinite().all()
    with pytest.raises(gf.InputError, match=r"Engine\(deterministic=True, cache_dtype='int8'\): layers with a window"):
        gf.Engine(build(SPECS["window"]), slots=2, capacity=32, cache_dtype="int8", deterministic=True)
    with pytest.raises(gf.InputError, match="was compiled by torch.compile"):
        gf.generate(torch.compile(model), PROMPT, max_new_tokens=2, deterministic=True)
    with pytest.raises(gf.SamplerError, match="deterministic"):
        gf.generate(model, PROMPT, determinstic=True)  # type: ignore[call-overload]


def test_taps_see_the_same_bits() -> None:
    model = build(SPECS["grouped"])
    with gf.deterministic():
        plain = model(torch.tensor([PROMPT]))
        tap = gf.Record("**")
        assert bits(model(torch.tensor([PROMPT]), tap=tap)) == bits(plain)


def test_packed_caches_do_not_depend_on_the_schedule() -> None:
    model = build(SPECS["grouped"])
    given = []
    for chunk, slots in ((64, 1), (5, 4)):
        engine = gf.Engine(model, slots=slots, capacity=64, prefill_chunk=chunk, cache_dtype="int8", deterministic=True)
        given.append([told(one) for one in engine.generate(rows(6)[0], max_new_tokens=8, logprobs=2)])
    assert given[0] == given[1]


def test_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from glassformer.cli.app import main

    words = gf.text.train("words", texts=["a man saw the old fox"] * 3, vocab_size=kit.V)
    folder = gf.save(build(SPECS["grouped"].replace(vocab_size=words.vocab_size)), tmp_path / "model", words)
    texts = []
    for more in ([], ["--prompt-lookup", "3"]):
        assert main(["generate", str(folder), "the old man", "-n", "12", "--seed", "1", "--deterministic", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with pytest.raises(gf.GlassformerError, match="deterministic"):
        gf.Request(PROMPT, deterministic=True)
