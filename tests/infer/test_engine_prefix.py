"""Beginnings that another row has read already: taken over, counted, and never a different text."""

from __future__ import annotations

import random
from typing import Any

import pytest

import glassformer as gf
from infer import engine_kit as kit

SYSTEM = kit.ids(24, 7)


def made(engine: gf.Engine, prompt: list[int], **options: Any) -> gf.Generated:
    options = {"max_new_tokens": 6} | options
    ticket = engine.submit(gf.Request(prompt, **options))
    result = ticket.result()
    alone = {name: value for name, value in options.items() if name != "user"}
    if "tap" not in options:
        kit.same(result, gf.generate(engine.model, prompt, **alone))
    return result


@pytest.mark.parametrize("name", ["learned", "grouped", "alibi", "latent", "experts"])
def test_a_prompt_that_goes_on_from_an_earlier_one_reads_only_what_is_new(name: str) -> None:
    engine = gf.Engine(kit.model(name), slots=3, capacity=96)
    first = made(engine, SYSTEM)
    again = [*SYSTEM, *first.ids, 3, 4, 5]
    made(engine, again)
    s = engine.stats()
    assert s.prefix_tokens == 24 + 5  # the last of the six was never read
    assert s.prompt_tokens == 24 + len(again) - 29
    made(engine, SYSTEM)  # the same again: all but the last token
    assert engine.stats().prefix_tokens == 29 + 23


def test_another_row_still_at_work_gives_its_beginning_and_keeps_its_own() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=3, capacity=96)
    one = engine.submit(gf.Request([*SYSTEM, 1, 2], max_new_tokens=20, temperature=1.0, seed=1))
    for _ in range(5):
        engine.step()
    two = engine.submit(gf.Request([*SYSTEM, 9], max_new_tokens=20, temperature=1.0, seed=2))
    kit.same(two.result(), gf.generate(model, [*SYSTEM, 9], max_new_tokens=20, temperature=1.0, seed=2))
    kit.same(one.result(), gf.generate(model, [*SYSTEM, 1, 2], max_new_tokens=20, temperature=1.0, seed=1))
    assert engine.stats().prefix_tokens == 24


def test_equal_prompts_that_come_together_are_read_once() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=4, capacity=96, prefill_chunk=8)
    prompt = kit.ids(60)
    tickets = [engine.submit(gf.Request(prompt, sample=i, temperature=1.0, seed=3, max_new_tokens=5)) for i in range(4)]
    rows = gf.generate(model, [prompt] * 4, temperature=1.0, seed=3, max_new_tokens=5)
    assert [t.result().ids for t in tickets] == [r.ids for r in rows]
    s = engine.stats()
    assert s.prompt_tokens + s.prefix_tokens == 4 * 60
    assert s.prompt_tokens == 60 + 3


def test_whom_one_waits_for_may_leave() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=96, prefill_chunk=8)
    one, two = (engine.submit(gf.Request(kit.ids(60), max_new_tokens=3)) for _ in range(2))
    engine.step()
    one.cancel()
    kit.same(two.result(), gf.generate(model, kit.ids(60), max_new_tokens=3))
    assert engine.stats().prefix_tokens <= 16


def test_what_was_left_longest_ago_is_given_up_first() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=3, capacity=96)
    talks = [kit.ids(30, seed) for seed in range(3)]
    for talk in talks:
        made(engine, talk)
    before = engine.stats().prefix_tokens
    made(engine, kit.ids(30, 99))  # takes the place of talk 0
    for talk in talks[1:]:
        made(engine, talk)
    assert engine.stats().prefix_tokens == before + 2 * 29
    made(engine, talks[0])
    assert engine.stats().prefix_tokens == before + 2 * 29


def test_a_ring_gives_only_while_nothing_was_overwritten() -> None:
    model = kit.model("window")  # a window of 8
    engine = gf.Engine(model, slots=2, capacity=96)
    long = kit.ids(40)
    out = made(engine, long)
    made(engine, [*long[:20], 5, 6])  # its ring has gone on: read anew
    assert engine.stats().prefix_tokens == 0
    held = [*long, *out.ids[:5]]
    made(engine, [*held, 7, 8])  # row 0 or 1 holds just this beginning, if nothing took its place
    assert engine.stats().prefix_tokens in (0, len(held))


def test_edits_and_looks_neither_give_nor_take() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=96)
    edited = made(engine, SYSTEM, tap=gf.Edit("blocks.0.attn.z", lambda z: 0 * z))
    assert edited.ids == gf.generate(model, SYSTEM, max_new_tokens=6, tap=gf.Edit("blocks.0.attn.z", lambda z: 0 * z)).ids
    made(engine, SYSTEM)
    seen = gf.Record("blocks.0.resid_post")
    made(engine, SYSTEM, tap=seen)
    assert engine.stats().prefix_tokens == 0
    assert seen["step.0.blocks.0.resid_post"].shape[1] == 24  # every token was read


def test_rotary_positions_that_look_at_the_length_share_within_their_reach_only() -> None:
    model = kit.model("longrope")  # other angles beyond 24 tokens
    engine = gf.Engine(model, slots=2, capacity=96)
    made(engine, kit.ids(20), max_new_tokens=12)  # grows beyond, and is read anew
    made(engine, kit.ids(20), max_new_tokens=2)
    assert engine.stats().prefix_tokens == 0
    made(engine, [*kit.ids(20), 4])
    assert engine.stats().prefix_tokens == 20
    made(engine, [*kit.ids(20), 4, 5, 6, 7, 8, 9, 10])
    assert engine.stats().prefix_tokens == 20


def test_off_is_off_and_encoder_decoders_share_nothing() -> None:
    for engine in (gf.Engine(kit.model("grouped"), slots=2, capacity=96, prefix=False), gf.Engine(kit.model("t5"), slots=2, capacity=96)):
        for _ in range(2):
            made(engine, SYSTEM)
        assert engine.stats().prefix_tokens == 0


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_sharing_changes_no_text(seed: int) -> None:
    rng = random.Random(seed)
    model = kit.model(("grouped", "window", "latent", "longrope")[seed])
    trunk = [kit.ids(n, n) for n in (17, 20, 40)]
    engine = gf.Engine(model, slots=4, capacity=96, prefill_chunk=rng.choice([5, 16, 64]))
    asked, shared = [], 0
    for _ in range(40):
        if rng.random() < 0.5:
            prompt, options = kit.asked(rng, longest=8)
            prompt = [*rng.choice(trunk)[: rng.randint(16, 40)], *prompt]
            asked.append((engine.submit(gf.Request(prompt, **options)), prompt, options))
        if rng.random() < 0.2 and asked:
            rng.choice(asked)[0].cancel()
        engine.step()
    for ticket, prompt, options in asked:
        if ticket.cancelled:
            continue
        try:
            kit.same(ticket.result(), gf.generate(model, prompt, **options))
        except gf.Cancelled:
            continue
    shared = engine.stats().prefix_tokens
    assert shared > 0
