"""Speculative decoding: the text of plain generation where the rule promises it, its distribution where it promises that."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.cache import Cache, Clock
from glassformer.core.errors import CacheError, InputError, SamplerError
from glassformer.core.mask import Window
from glassformer.core.tap import Record
from glassformer.infer import XTC, Chain, Draw, Greedy, Link, Mirostat2, Penalties, Session, Temperature, TopK, generate, stream
from glassformer.infer.guessing import DraftModel, Guesses, PromptLookup
from glassformer.infer.gumbel import Gumbel
from glassformer.infer.speculative import Speculative, reject
from glassformer.infer.state import Own, State
from glassformer.parts.rotary import DynamicNTKScaling, LongRope
from infer.fake import Bigram, Bytes
from look import zoo

torch.set_num_threads(1)

PROMPTS = [zoo.ids(9), [3], zoo.ids(4, 1), zoo.ids(6, 2)]
SAMPLERS = {
    "greedy": Chain((Greedy(),)),
    "drawn": Penalties(1.2, window=6) | TopK(12) | XTC(0.3) | Temperature(1.1) | Draw(3),
    "mirostat": Mirostat2(2.0, 0.3) | Draw(3),
    "gumbel": TopK(20) | Temperature(0.9) | Gumbel() | Greedy(),
}


def made(name: str):
    """A model of the zoo, or one of the kinds that it has not; its weights are large."""
    extra = {
        "window": gf.Decoder(
            zoo.V,
            zoo.D,
            tuple(zoo.block(attention=gf.Attention(4, position=gf.Rotary(), mask=m), norm=gf.RMSNorm()) for m in (Window(4), gf.Causal(), Window(3))),
        ),
        "latent": gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.LatentAttention(4, kv_lora_rank=6, d_nope=4, d_rope=4, d_value=4), norm=gf.RMSNorm()),) * 2),
    }
    return zoo.model(name) if name in zoo.SPECS else louder(extra[name].build(seed=0).eval())


def louder(model):
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) * (1.5 / p.shape[-1] ** 0.5))
    return model


def alike(model, noise: float = 0.15):
    """A model that is nearly that one."""
    other = model.spec.build(seed=0).eval()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q + noise * q.std().nan_to_num(0.0) * torch.randn(q.shape, generator=draw))
    return other


def hold_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
        assert [[c.id for c in row] for row in a.top] == [[c.id for c in row] for row in b.top]


# The text is that of plain generation


FEW, MOST = ["gpt2", "window", "latent"], [n for n in zoo.DECODERS if n not in ("gpt2", "llama")]


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in MOST)])
def test_coupled_is_plain(name: str) -> None:
    model = made(name)
    draft = alike(model)
    for sampler in (SAMPLERS["drawn"], SAMPLERS["mirostat"]):
        plain = generate(model, PROMPTS[:3], sampler=sampler, seed=5, max_new_tokens=8, logprobs=3)
        hold_same(generate(model, PROMPTS[:3], sampler=sampler, seed=5, max_new_tokens=8, logprobs=3, draft=draft, draft_tokens=3, draft_rule="coupled"), plain)
    hold_same(generate(model, PROMPTS[:3], max_new_tokens=8, draft=PromptLookup(2)), generate(model, PROMPTS[:3], max_new_tokens=8))


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_however_many_are_guessed(name: str, n: int) -> None:
    model = zoo.model("llama")
    plain = generate(model, PROMPTS[:3], sampler=SAMPLERS[name], seed=5, max_new_tokens=8)
    for draft, cache in ((alike(model), None), (zoo.model("llama", seed=9), False)):
        options = {"draft": draft, "draft_tokens": n, "draft_rule": "coupled", "cache": cache}
        hold_same(generate(model, PROMPTS[:3], sampler=SAMPLERS[name], seed=5, max_new_tokens=8, **options), plain)


def test_a_model_that_guesses_for_itself_is_always_right() -> None:
    model = zoo.model("llama")
    for sampler in SAMPLERS.values():  # by rejection too: p / q is 1
        out = generate(model, PROMPTS[0], sampler=sampler, seed=1, max_new_tokens=25, draft=model, draft_tokens=5)
        assert out.guesses == Guesses(forwards=5, tokens=25, guessed=20, accepted=20)  # 1 of the prefill, then 6 at a time
        assert out.ids == generate(model, PROMPTS[0], sampler=sampler, seed=1, max_new_tokens=25).ids
    assert str(out.guesses) == "25 tokens in 5 forward passes of the model, 5.00 each: 20 of 20 guesses accepted"


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_angles_that_change_with_the_length(kind: str) -> None:
    scaling = LongRope((1.0, 1.2), (1.5, 4.0), 12) if kind == "longrope" else DynamicNTKScaling(3.0, 12)
    spec = gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary(scaling=scaling)), norm=gf.RMSNorm()),) * 2)
    model = louder(spec.build(seed=0).eval())
    plain = generate(model, PROMPTS, max_new_tokens=20)
    hold_same(generate(model, PROMPTS, max_new_tokens=20, draft=alike(model), draft_tokens=4), plain)
    session = Speculative(model, PROMPTS[:2], Greedy(), draft=model, room=20)
    first = [session.step().ids for _ in range(15)]
    session.rewind(13)
    assert [session.step().ids for _ in range(13)] == first[2:]


def test_encoder_decoders() -> None:
    model = zoo.model("t5")
    sources = [zoo.ids(7), zoo.ids(3, 4), zoo.ids(5, 6)]
    for sampler, draft in zip((*SAMPLERS.values(), Greedy()), (alike(model), zoo.model("llama"), alike(model), PromptLookup(), PromptLookup()), strict=True):
        plain = generate(model, sources, sampler=sampler, seed=2, max_new_tokens=8)
        hold_same(generate(model, sources, sampler=sampler, seed=2, max_new_tokens=8, draft=draft, draft_rule="coupled"), plain)


def test_lookup_reads_the_source_too() -> None:
    class Seen:
        def __init__(self) -> None:
            self.ids: list[list[int]] = []

        def propose(self, ids, n):
            self.ids.append(list(ids))
            return []

    seen, model = Seen(), zoo.model("t5")
    out = generate(model, [7, 8, 9], draft=seen, max_new_tokens=4)
    start = model.spec.start
    assert seen.ids == [[7, 8, 9, *([start] if isinstance(start, int) else start), *out.ids[:k]] for k in (1, 2)]  # of the last token nothing is left to guess


# Its distribution: chi-square


V = 8


class Counting(Bigram):
    """A bigram model whose cache may be wound back."""

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> Cache:
        return Cache(Clock(batch), [], capacity)


def pair(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(V, V, generator=draw) * 1.5
    return Counting(table), Counting(table + torch.randn(V, V, generator=draw))


def surprise(seen: np.ndarray, expected: np.ndarray) -> float:
    """The chi-square statistic as a number of standard deviations (Wilson and Hilferty); rare cells together."""
    rare = expected < 5
    seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    x = float(((seen - expected) ** 2 / expected).sum())
    return ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))


def joint(session, n: int) -> np.ndarray:
    drawn = [session.step().ids for _ in range(3)]
    return np.bincount(np.array(drawn[1]) * V + np.array(drawn[2]), minlength=V * V).astype(float)


def truth(model, sampler: Chain, n: int) -> np.ndarray:
    """n times p(second, third), by NumPy."""
    p = np.stack([step.probabilities for step in [list(Chain(sampler.links[:-1]).steps(model.table.detach()))[-1]]])[0].astype(np.float64)
    p /= p.sum(1, keepdims=True)
    second = p[1] @ p
    return n * (second[:, None] * p).ravel()


ROWS = 2000
CHAIN = TopK(6) | Temperature(0.9) | Draw(0)


def law(rule: str, draft, sampler: Chain = CHAIN) -> float:
    target, _ = pair()
    session = Speculative(target, [[1]] * ROWS, sampler, draft=draft, draft_tokens=2, rule=rule, room=4, seeds=range(ROWS), seed=11)
    return surprise(joint(session, ROWS), truth(target, CHAIN, ROWS))


def test_plain_draws_pass_the_test_themselves() -> None:
    target, _ = pair()
    assert abs(surprise(joint(Session(target, [[1]] * ROWS, CHAIN, room=4, seeds=range(ROWS), seed=11), ROWS), truth(target, CHAIN, ROWS))) < 3


@pytest.mark.parametrize("who", ["model", "lookup"])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_two_tokens_have_the_distribution_of_plain_sampling(rule: str, who: str) -> None:
    class Always:
        def propose(self, ids, n):
            return [(ids[-1] * 3 + 1) % V, 2][:n]

    draft = DraftModel(pair()[1]) if who == "model" else Always()
    assert abs(law(rule, draft)) < 3


def test_gumbel_has_the_distribution_too() -> None:
    assert abs(law("coupled", DraftModel(pair()[1]), TopK(6) | Temperature(0.9) | Gumbel() | Greedy())) < 3


@pytest.mark.parametrize("fault", ["Accept", "Rest"])
def test_a_broken_rule_fails_the_test(fault: str, monkeypatch) -> None:
    plain = Own.uniform

    def broken(self, device):
        u = plain(self, device)
        return u * 0.6 if self.stream == "Accept" == fault else u * 0.5 if self.stream == "Rest" == fault else u

    monkeypatch.setattr(Own, "uniform", broken)
    assert law("rejection", DraftModel(pair()[1])) > 6


def test_without_the_rest_it_fails_too(monkeypatch) -> None:
    def careless(chain, logits, history, state, offered, q, passed=None):
        """Where a guess is refused, draw from p and not from what q has left of it."""
        return reject(chain, logits, history, state, offered, q if q is None else q * 0 + q.mean(), passed)

    monkeypatch.setattr("glassformer.infer.speculative.reject", careless)
    assert law("rejection", DraftModel(pair()[1])) > 6


def test_rejection_accepts_what_no_rule_can_pass() -> None:
    """The share of accepted first guesses is the sum of min(p, q), of the coupled draws less."""
    target, draft = pair()
    p, q = ((m.table.detach() / 1.0).softmax(-1).double().numpy() for m in (target, draft))
    best = float(p[1] @ np.minimum(p, q).sum(1))
    shares = {}
    for name, sampler in (("rejection", Chain((Draw(0),))), ("coupled", Chain((Draw(0),))), ("gumbel", Gumbel() | Greedy())):
        rule = "rejection" if name == "rejection" else "coupled"
        session = Speculative(target, [[1]] * ROWS, sampler, draft=DraftModel(draft), draft_tokens=1, rule=rule, room=4, seeds=range(ROWS), seed=1)
        session.step(), session.step()
        shares[name] = session.accepted
    assert shares["rejection"] == pytest.approx(best, abs=3 * np.sqrt(0.25 / ROWS))
    assert shares["coupled"] < shares["gumbel"] < shares["rejection"]
    least = float(p[1] @ (np.minimum(p, q).sum(1) / (2 - np.minimum(p, q).sum(1))))
    assert shares["gumbel"] > least - 0.02  # (1 - D) / (1 + D)


def test_gumbel_is_its_numpy_version() -> None:
    def mixed(x: int) -> int:
        word = 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = ((x ^ (x >> shift)) * factor) % word
        return x ^ (x >> 31)

    state = State(7, [3, 4], [0, 5], [])
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = float("-inf")
    noisy = Gumbel().apply(logits, None, Own(state, None, "Gumbel"))
    keys = [int(u * 2**53) << 10 for u in Own(state, None, "Gumbel").uniform(torch.device("cpu")).tolist()]
    for row, key in enumerate(keys):
        u = np.array([((mixed((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) + 0.5) * 2.0**-53 for i in range(50)])
        np.testing.assert_allclose(noisy[row].numpy(), logits[row].double().numpy() - np.log(-np.log(u)), rtol=1e-6, atol=1e-6)
    with pytest.raises(SamplerError, match="Gumbel needs a state"):
        Gumbel().apply(logits)


# As a session


def test_fork_rewind_and_select_as_if_nothing_had_been_guessed() -> None:
    model = zoo.model("llama")
    for name in ("drawn", "mirostat"):
        plain = Session(model, PROMPTS, SAMPLERS[name], room=40, seed=1)
        ours = Speculative(model, PROMPTS, SAMPLERS[name], draft=alike(model), rule="coupled", room=40, seed=1)
        for _ in range(7):
            assert plain.step().ids == ours.step().ids
        twins, theirs = ours.fork(2, seeds=range(8)), plain.fork(2, seeds=range(8))
        for session in (ours, plain):
            session.rewind(4)
        few, fewer = ours.select([2, 0]), plain.select([2, 0])
        for a, b in ((twins, theirs), (ours, plain), (few, fewer)):
            for _ in range(6):
                assert a.step().ids == b.step().ids
            assert a.ids == b.ids and a.drawn == b.drawn and a.lengths == b.lengths
        ours.rewind(ours.drawn)
        plain.rewind(plain.drawn)
        assert [ours.step().ids for _ in range(5)] == [plain.step().ids for _ in range(5)]


def test_a_ring_is_wound_back_or_read_anew() -> None:
    model = made("window")
    ours, plain = Speculative(model, PROMPTS, Greedy(), draft=alike(model), room=30), Session(model, PROMPTS, Greedy(), room=30, cache=False)
    for _ in range(12):
        assert ours.step().ids == plain.step().ids
    for session in (ours, plain):
        session.rewind(9)
    for _ in range(12):
        assert ours.step().ids == plain.step().ids


def test_a_cache_of_yours_holds_all_but_the_last_token() -> None:
    model = zoo.model("llama")
    cache = model.cache(batch=4, capacity=64)
    out = generate(model, PROMPTS, cache=cache, draft=model, draft_tokens=4, max_new_tokens=10, eos_id=generate(model, PROMPTS[0], max_new_tokens=10).ids[4])
    assert cache.lengths == [len(p) + len(o.ids) - 1 for p, o in zip(PROMPTS, out, strict=True)]
    assert len({len(o.ids) for o in out}) > 1
    again = generate(model, [[o.ids[-1]] for o in out], cache=cache, max_new_tokens=5, draft=model)
    whole = generate(model, [p + o.ids for p, o in zip(PROMPTS, out, strict=True)], max_new_tokens=5)
    assert [o.ids for o in again] == [o.ids for o in whole]
    with pytest.raises(CacheError, match=r"ring of 4 places for a window of 4: make it with model\.cache\(\.\.\., rewind=5\)"):
        generate(made("window"), [1, 2], cache=made("window").cache(capacity=40), draft=PromptLookup(), max_new_tokens=9)


def test_a_cache_that_is_just_large_enough() -> None:
    model = zoo.model("gpt2")  # 64 learned positions
    exact = generate(model, PROMPTS[0], max_new_tokens=56, draft=model)
    assert exact.ids == generate(model, PROMPTS[0], max_new_tokens=56).ids and exact.guesses.forwards < 15
    ragged = generate(model, PROMPTS, max_new_tokens=56, draft=alike(model), draft_tokens=8)
    assert [o.ids for o in ragged] == [o.ids for o in generate(model, PROMPTS, max_new_tokens=56)]
    cache = model.cache(capacity=len(PROMPTS[0]) + 9)
    assert generate(model, PROMPTS[0], max_new_tokens=10, draft=model, cache=cache).ids == exact.ids[:10]
    short = gf.Decoder(zoo.V, zoo.D, (zoo.block(),), position=gf.Learned(16)).build(seed=0)
    assert generate(model, PROMPTS[0], max_new_tokens=40, draft=short).ids == exact.ids[:40]  # it guesses as far as its positions go


# In generate


def test_everything_else_works_as_without() -> None:
    model = Counting(torch.randn(257, 257, generator=torch.Generator().manual_seed(3)) * 3)
    options = {"tokenizer": Bytes(), "max_new_tokens": 30, "temperature": 1.0, "seed": 4, "stop": ["e"], "logprobs": 2, "trace": 3}
    plain, ours = (generate(model, ["ab", "a longer one"], **options, **more) for more in ({}, {"draft": PromptLookup(), "draft_tokens": 3}))
    for a, b in zip(plain, ours, strict=True):
        assert (a.text, a.ids, a.finish_reason, a.top) == (b.text, b.ids, b.finish_reason, b.top)
        assert [str(c) for c in a.trace] == [str(c) for c in b.trace] and [c.step for c in b.trace] == list(range(len(b.ids)))
        assert a.guesses is None and b.guesses.tokens == len(b.ids)
    events = list(stream(model, "ab", **options, assistant_model=model, num_assistant_tokens=4))
    assert [e.id for e in events] == plain[0].ids and [e.guesses is None for e in events] == [True] * (len(events) - 1) + [False]
    assert generate(model, "ab", **options, prompt_lookup_num_tokens=3).guesses == ours[0].guesses


def test_a_row_runs_on_while_others_wait() -> None:
    """Forwards are those of the slowest row, not of all together."""
    model, seen = zoo.model("llama"), Record("logits")
    draft = alike(model, 0.3)
    session = Speculative(model, PROMPTS[:3], Greedy(), draft=draft, draft_tokens=4, room=20, tap=seen)
    for _ in range(20):
        session.step()
    alone = [generate(model, p, max_new_tokens=20, draft=draft, draft_tokens=4).guesses.forwards for p in PROMPTS[:3]]
    assert session.forwards == max(alone) < sum(alone)
    assert len(seen) <= session.forwards


def test_taps_see_the_model_or_the_draft() -> None:
    model, target, other = zoo.model("llama"), Record("blocks.2.attn.z"), Record("blocks.0.resid_post")
    small = gf.Decoder(zoo.V, zoo.D, (zoo.block(norm=gf.RMSNorm()),)).build(seed=0)
    generate(model, [1, 2, 3], draft=DraftModel(small, tap=other), draft_tokens=3, max_new_tokens=6, tap=target)
    assert target.paths[0] == "step.0.blocks.2.attn.z" and target[target.paths[0]].shape[1] == 3  # the prompt
    assert target[target.paths[1]].shape[1] == 4  # the last token and three guesses
    assert other.paths[:3] == [f"step.{n}.blocks.0.resid_post" for n in range(3)] and other[other.paths[0]].shape[1] == 4


def test_a_link_that_ends_a_row() -> None:
    class Enough(Link):
        ends = True

        def apply(self, logits, history=None, state=None):
            return logits

        def ended(self, rows, history, state=None):
            return [int(row[-1]) % 5 == 0 for row in history]

    model, chain = zoo.model("llama"), Chain((Enough(), Draw(0)))
    plain = generate(model, PROMPTS, sampler=chain, seed=3, max_new_tokens=30)
    assert {o.finish_reason for o in plain} == {"stop"}
    hold_same(generate(model, PROMPTS, sampler=chain, seed=3, max_new_tokens=30, draft=model, draft_rule="coupled"), plain)


def test_nothing_left_is_said_when_it_comes() -> None:
    table = torch.zeros(V, V)
    table[:, 0] = 9.0
    table[0] = float("nan")
    model = Counting(table)
    ends_before = generate(model, [1], draft=model, eos_id=0, max_new_tokens=5)
    assert (ends_before.ids, ends_before.finish_reason) == ([0], "eos")
    with pytest.raises(SamplerError, match="NaN logits in row 0 at step 1"):
        generate(model, [1], draft=model, max_new_tokens=5)
    with pytest.raises(SamplerError, match="NaN logits in row 0 at step 1"):
        generate(model, [1], draft=model, max_new_tokens=5, temperature=1.0, draft_rule="rejection")


# Guesses from the text


def test_prompt_lookup() -> None:
    look = PromptLookup(3).propose
    assert look([1, 2, 3, 9, 8, 1, 2, 3], 2) == [9, 8]
    assert look([5, 2, 3, 7, 1, 2, 3, 9, 8, 5, 2, 3], 3) == [7, 1, 2]  # three ids beat two, though they lie further back
    assert look([1, 4, 1, 6, 1], 2) == [6, 1]  # the latest place
    assert look([7, 7], 4) == [7, 7, 7, 7] and look([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # a copy of itself
    assert look([1, 2, 3], 4) == [] and look([1], 4) == [] and PromptLookup(3, 2).propose([1, 4, 1], 2) == []


def test_prompt_lookup_is_its_slow_twin() -> None:
    def slow(ids, n, longest, shortest):
        for size in range(min(longest, len(ids) - 1), shortest - 1, -1):
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == ids[-size:]:
                    grown = list(ids)
                    for k in range(n):
                        grown.append(grown[start + size + k])
                    return grown[len(ids) :]
        return []

    draw = np.random.default_rng(0)
    for _ in range(500):
        ids, longest = draw.integers(0, 4, draw.integers(1, 15)).tolist(), int(draw.integers(1, 5))
        shortest, n = int(draw.integers(1, longest + 1)), int(draw.integers(1, 7))
        assert PromptLookup(longest, shortest).propose(ids, n) == slow(ids, n, longest, shortest)


# What is refused


def test_errors() -> None:
    model = zoo.model("llama")
    other = gf.Decoder(40, zoo.D, (zoo.block(),)).build(seed=0)
    cases = {
        "a vocabulary of 40 tokens and the model one of 31": (InputError, {"draft": other}),
        "the class PromptLookup, not one of its kind": (InputError, {"draft": PromptLookup}),
        "draft_tokens is 0": (SamplerError, {"draft": model, "draft_tokens": 0}),
        "draft_tokens=3 was given without a draft": (SamplerError, {"draft_tokens": 3}),
        "draft_rule='coupled' was given without a draft": (SamplerError, {"draft_rule": "coupled"}),
        "no rule 'couple' for guesses. Did you mean 'coupled'": (SamplerError, {"draft": model, "draft_rule": "couple"}),
        "picks without any: use Draw": (SamplerError, {"draft": model, "draft_rule": "rejection"}),
        "is short for draft=PromptLookup": (SamplerError, {"draft": model, "prompt_lookup_num_tokens": 3}),
        "two names of one thing": (SamplerError, {"draft": model, "assistant_model": model}),
        "Generation needs a model": (InputError, {"draft": 5}),
        "an encoder-decoder, which reads a source": (InputError, {"draft": zoo.model("t5")}),
        "combines several passes in each step": (InputError, {"draft": model, "guidance_scale": 1.5}),
    }
    for words, (kind, options) in cases.items():
        with pytest.raises(kind, match=re.escape(words)):
            generate(model, [1, 2, 3], max_new_tokens=3, **options)
    for longest, shortest in ((0, 1), (2, 3), (1, 0)):
        with pytest.raises(SamplerError, match="looks for 1 token or more"):
            PromptLookup(longest, shortest)
    with pytest.raises(InputError, match="needs a draft"):
        Speculative(model, [[1]], Greedy(), draft=None)
    t5 = zoo.model("t5")
    with pytest.raises(InputError, match="give sources="):
        Speculative(t5, [[0]], Greedy(), draft=t5, source=None)

    class Odd:
        def propose(self, ids, n):
            return "abc"

    with pytest.raises(InputError, match=r"Odd\.propose\(ids, n\) gave 'abc'"):
        generate(model, [1, 2, 3], draft=Odd(), max_new_tokens=5)
    session = Speculative(model, [[1]], Greedy(), draft=model)
    with pytest.raises(InputError, match="0 tokens were drawn, so 1 cannot be forgotten"):
        session.rewind(1)


def test_guesses_out_of_the_vocabulary_are_said() -> None:
    class Far:
        def propose(self, ids, n):
            return [zoo.V + 3]

    with pytest.raises(InputError, match="guessed the token 34, but the model's 31 tokens are 0 to 30"):
        generate(zoo.model("llama"), [1, 2, 3], draft=Far(), max_new_tokens=5)


# What it stands on: rows wound back each by itself


@pytest.mark.parametrize("name", ["llama", "window"])
def test_a_cache_forgets_row_by_row(name: str) -> None:
    model, ids = made(name), torch.randint(1, zoo.V, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = model.cache(batch=3, capacity=20, rewind=6)
    model(ids, cache=cache)
    cache.rewind([5, 0, 2])
    assert cache.lengths == [7, 12, 10]
    new = torch.randint(1, zoo.V, (3, 4), generator=torch.Generator().manual_seed(1))
    got = model(new, cache=cache)
    for row, n in enumerate((7, 12, 10)):
        alone = model(torch.cat([ids[row, :n], new[row]])[None])[0, -4:]
        torch.testing.assert_close(got[row], alone, atol=2e-4, rtol=1e-4)
    for wrong, words in (
        ([1, 2], "has 3 rows, but 2 numbers"),
        ([0, 0, 99], "Cannot forget 99 tokens of a row that holds 14"),
        ([-1, 0, 0], "Cannot forget -1"),
    ):
        with pytest.raises(CacheError, match=words):
            cache.rewind(wrong)


def test_a_state_forgets_row_by_row() -> None:
    chain = Mirostat2(2.0, 0.5) | Draw(0)
    draw = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 20, generator=draw) * 3 for _ in range(6)]
    state = chain.state(3)
    seen = []
    for logits in steps:
        seen.append([*state.memory])
        chain(logits, None, state)
    now = state.memory[0].clone()
    state.rewind([4, 0, 1])
    assert state.steps == [2, 6, 5]
    assert state.memory[0].tolist() == [float(seen[2][0][0]), float(now[1]), float(seen[5][0][2])]
    state.rewind([2, 6, 5])
    assert state.memory[0].tolist() == seen[0][0].tolist() and state.steps == [0, 0, 0]
    few = state.select([2, 0])
    chain(steps[0][[2, 0]], None, few)
    state.put([2, 0], few)
    assert state.steps == [1, 0, 1]
    whole = chain.state(3)
    chain(steps[0], None, whole)
    assert state.memory[0].tolist() == [float(whole.memory[0][0]), float(seen[0][0][1]), float(whole.memory[0][2])]
    with pytest.raises(SamplerError, match="3 rows, but 1 numbers"):
        state.rewind([1])
    with pytest.raises(SamplerError, match="has drawn 0 tokens, so it cannot be wound back by 1"):
        state.rewind([1, 1, 1])


# On the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where, tokenizer = tmp_path_factory.mktemp("models"), gf.text.train("characters", texts=["a cab, a bed, a face: 'abc'\n"])
    spec = gf.preset("tiny", vocab_size=tokenizer.vocab_size)
    other = gf.text.train("characters", texts=["z czb, z bed, z fzce: 'zbc'\n"])
    small = spec.replace(blocks=spec.blocks[:1])
    model, draft = spec.build(seed=0), small.build(seed=1)
    return [gf.save(m, where / str(i), t) for i, (m, t) in enumerate(((model, tokenizer), (draft, tokenizer), (draft, other)))]


def test_drafts_on_the_command_line(folders, capsys) -> None:
    def run(*args):
        code = main(["generate", str(folders[0]), "a cab", "-n", "12", "--seed", "3", *map(str, args)])
        return code, *capsys.readouterr()

    code, plain, err = run("-t", 0)
    assert code == 0 and err == ""
    for how in (("--draft", folders[1]), ("--draft", folders[0], "--draft-tokens", 3), ("--prompt-lookup", 4)):
        code, out, err = run("-t", 0, *how)
        assert (code, out) == (0, plain)
        assert re.fullmatch(r"12 tokens in \d+ forward passes of the model, \d\.\d\d each: \d+ of \d+ guesses accepted\n", err)
    assert run("--draft", folders[1])[0] == 0
    for how, words in (
        (("--draft", folders[2]), "The draft has another tokenizer than the model: token"),
        (("--draft", "nowhere"), "There is no model at 'nowhere'"),
        (("--draft-tokens", 3), "--draft-tokens 3 was given without a draft"),
        (("--draft", folders[1], "--num-beams", 2), "draft"),
        (("--prompt-lookup", 2, "--num-beams", 2), "--prompt-lookup does not go with --num-beams"),
    ):
        code, _, err = run(*how)
        assert code == 2 and words in err and err.count("\n") == 1


def test_noise_is_finite_for_every_bit_pattern(monkeypatch: pytest.MonkeyPatch):
    state = State(0, [0], [0], [None])
    for bits in (0, -1, 2**63 - 1, -(2**63)):
        monkeypatch.setattr("glassformer.infer.gumbel._mixed", lambda x, bits=bits: torch.full_like(x, bits))
        assert Gumbel().apply(torch.zeros(1, 5), None, Own(state, None, "Gumbel")).isfinite().all()
