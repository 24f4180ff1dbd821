"""The engine: whatever else is in the batch, every request gets what generate gives it alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

import glassformer as gf
from infer import engine_kit as kit
from infer.engine_kit import empty, run

MODELS = list(kit.SPECS)


@pytest.mark.parametrize("name", MODELS)
def test_every_request_gets_what_it_gets_alone(name: str) -> None:
    rng = random.Random(MODELS.index(name))
    model = kit.model(name)
    engine = gf.Engine(model, slots=3, capacity=64, prefill_chunk=7)
    held = engine.bytes
    asked = [kit.asked(rng) for _ in range(9)]
    tickets = [engine.submit(gf.Request(prompt, **options)) for prompt, options in asked]
    run(engine)
    for ticket, (prompt, options) in zip(tickets, asked, strict=True):
        kit.same(ticket.result(), gf.generate(model, prompt, **options))
        assert [t.id for t in ticket.tokens] == ticket.result().ids
    empty(engine)
    assert engine.bytes == held


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_random_schedules_of_asking_cancelling_and_stepping(seed: int) -> None:
    rng = random.Random(seed)
    model = kit.model(("grouped", "window", "learned", "t5")[seed % 4])
    engine = gf.Engine(model, slots=rng.randint(1, 4), capacity=64, queue=6, prefill_chunk=rng.randint(1, 20), prefix=bool(seed % 2))
    held, asked, refused, before = engine.bytes, [], 0, engine.stats()
    pointers = [x.data_ptr() for slot in engine._rows.cache._slots() for x in slot.tensors().values()]
    for _ in range(120):
        deed = rng.random()
        if deed < 0.3:
            prompt, options = kit.asked(rng)
            try:
                asked.append((engine.submit(gf.Request(prompt, user=rng.choice(["", "a", "b"]), **options)), prompt, options))
            except gf.QueueFull:
                refused += 1
        elif deed < 0.4 and asked:
            rng.choice(asked)[0].cancel()
        else:
            engine.step()
        stats = engine.stats()
        for name, value in vars(stats).items():
            if name not in ("waiting", "running"):
                assert value >= getattr(before, name), name  # all counters only grow
        assert stats.running <= stats.slots and stats.waiting <= 6
        before = stats
    run(engine)
    empty(engine)
    for ticket, prompt, options in asked:
        assert ticket.done
        alone = gf.generate(model, prompt, **options)
        if ticket.cancelled:
            assert [t.id for t in ticket.tokens] == alone.ids[: len(ticket.tokens)]
        else:
            kit.same(ticket.result(), alone)
    assert engine.stats().refused == refused
    assert engine.bytes == held
    assert pointers == [x.data_ptr() for slot in engine._rows.cache._slots() for x in slot.tensors().values()]


def test_it_is_the_sampler_of_the_request_with_its_own_memory_in_a_shared_call() -> None:
    model = kit.model("grouped")
    options: dict[str, Any] = {"max_new_tokens": 12, "mirostat": 2, "mirostat_tau": 2.0}
    engine = gf.Engine(model, slots=4, capacity=64)
    tickets = []
    for i in range(4):
        tickets.append(engine.submit(gf.Request(kit.ids(4 + i, i), seed=i, **options)))
        engine.step()  # they come in one by one, so that their steps differ
    run(engine)
    for i, ticket in enumerate(tickets):
        assert ticket.result().ids == gf.generate(model, kit.ids(4 + i, i), seed=i, **options).ids


def test_texts_stop_strings_and_events_are_those_of_generate() -> None:
    model, letters = kit.model("grouped"), kit.Letters()
    engine = gf.Engine(model, letters, slots=2, capacity=64)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    whole = gf.generate(model, "once upon", tokenizer=letters, **options)
    stop = whole.text[6:8]
    ticket = engine.submit(gf.Request("once upon", stop=stop, **options))
    assert list(ticket) == list(gf.stream(model, "once upon", tokenizer=letters, stop=stop, **options))
    assert ticket.result().finish_reason == "stop"
    assert ticket.result().text == whole.text[: whole.text.index(stop)]


def test_a_constraint_ends_a_request() -> None:
    pytest.importorskip("llguidance")
    model, letters = kit.model("grouped"), kit.Letters()
    letters.vocab_size = len(letters.alphabet)  # type: ignore[attr-defined]
    try:
        alone = gf.generate(model, "once", tokenizer=letters, choices=["abc", "xyz"], max_new_tokens=9)
    except gf.GlassformerError as error:
        pytest.skip(f"a constraint needs more of a tokenizer: {error}")
    engine = gf.Engine(model, letters, slots=2, capacity=64)
    other = engine.submit(gf.Request("other", max_new_tokens=9))
    ticket = engine.submit(gf.Request("once", choices=["abc", "xyz"], max_new_tokens=9))
    assert ticket.result().text == alone.text and ticket.result().finish_reason == alone.finish_reason
    kit.same(other.result(), gf.generate(model, "other", tokenizer=letters, max_new_tokens=9))


def test_generate_is_a_batch_of_generate_however_many_there_are() -> None:
    model = kit.model("learned")
    prompts = [kit.ids(1 + i % 7, i % 5) for i in range(20)]  # some are equal, and go different ways
    for seed in (7, list(range(20))):
        engine = gf.Engine(model, slots=3, capacity=32, queue=4)
        made = engine.generate(prompts, max_new_tokens=6, temperature=1.0, seed=seed)
        assert [g.ids for g in made] == [g.ids for g in gf.generate(model, prompts, max_new_tokens=6, temperature=1.0, seed=seed)]
        empty(engine)
    with pytest.raises(gf.SamplerError, match="2 seeds were given for 20 prompts"):
        engine.generate(prompts, seed=[1, 2])


def test_samples_of_one_prompt_differ_as_rows_of_a_batch_do() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=3, capacity=64)
    tickets = [engine.submit(gf.Request([3, 4, 5], sample=i, seed=1, temperature=1.5, max_new_tokens=8)) for i in range(3)]
    rows = gf.generate(model, [[3, 4, 5]] * 3, seed=1, temperature=1.5, max_new_tokens=8)
    assert [t.result().ids for t in tickets] == [r.ids for r in rows]
    assert len({tuple(r.ids) for r in rows}) > 1


def test_the_engines_seed_stands_in_and_makes_nobody_draw() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=64, seed=11)
    drawn = engine.submit(gf.Request([3, 4], temperature=1.0, max_new_tokens=8))
    greedy = engine.submit(gf.Request([3, 4], max_new_tokens=8))
    assert drawn.result().ids == gf.generate(model, [3, 4], temperature=1.0, seed=11, max_new_tokens=8).ids
    assert greedy.result().ids == gf.generate(model, [3, 4], max_new_tokens=8).ids
