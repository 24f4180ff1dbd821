"""What an engine does for many: fair turns, a queue that is bounded, errors that stay where they are, limits that are said."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.infer.engine import BOUNDS
from infer import engine_kit as kit
from infer.engine_kit import empty, run

# What is fair


def test_a_flood_by_one_user_does_not_starve_another() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=2, capacity=32, queue=32)
    flood = [engine.submit(gf.Request(kit.ids(3, i), user="ann", max_new_tokens=4)) for i in range(20)]
    engine.step()
    ben = engine.submit(gf.Request([1, 2, 3], user="ben", max_new_tokens=4))
    steps = 0
    while not ben.done:
        engine.step()
        steps += 1
    assert steps <= 2 * 4 + 1  # one request of ann's has to end, then ben is next
    assert sum(t.done for t in flood) <= 6
    run(engine)
    assert all(t.done for t in flood)


def test_users_take_turns_and_each_is_served_in_order() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=32, queue=32)
    order: list[str] = []
    for user, n in (("ann", 4), ("ben", 1), ("cy", 2)):
        for i in range(n):
            engine.submit(gf.Request([1, 2], user=user, max_new_tokens=2)).on_done(lambda _, name=f"{user}{i}": order.append(name))
    run(engine)
    assert order == ["ann0", "ben0", "cy0", "ann1", "cy1", "ann2", "ann3"]


def test_a_full_queue_says_how_many_wait() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=32, queue=4)
    for _ in range(4):
        engine.submit(gf.Request([1, 2], max_new_tokens=2))
    with pytest.raises(gf.QueueFull, match="4 requests are waiting and the queue holds 4"):
        engine.submit(gf.Request([1, 2], max_new_tokens=2))
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=32, queue=4)
    for _ in range(3):
        engine.submit(gf.Request([1, 2], user="ann", max_new_tokens=2))
    with pytest.raises(gf.QueueFull, match="3 requests of 'ann' are waiting, and one user has at most 3 of the 4 places"):
        engine.submit(gf.Request([1, 2], user="ann", max_new_tokens=2))
    engine.submit(gf.Request([1, 2], user="ben", max_new_tokens=2))
    assert engine.stats().refused == 1
    run(engine)
    empty(engine)


def test_waiting_for_a_place_is_not_being_refused() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=32, queue=1)
    assert len(engine.generate([[1, 2]] * 6, max_new_tokens=2)) == 6
    assert engine.stats().refused == 0
    with engine:
        engine.generate([[1, 2]] * 6, max_new_tokens=8)
    assert engine.stats().refused == 0


def test_equal_prompts_take_work_in_step_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed is worked out once, and not again for each equal prompt behind it."""
    engine, made = gf.Engine(kit.model("grouped"), slots=4, capacity=32), []
    digest = hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda *args, **rest: (made.append(1), digest(*args, **rest))[1])
    got = engine.generate([[1, 2]] * 20, max_new_tokens=3, temperature=1.0, seed=4)
    assert len(made) == 20 + 20 * 3  # and one number for every token
    alone = gf.generate(kit.model("grouped"), [[1, 2]] * 20, max_new_tokens=3, temperature=1.0, seed=4)
    assert [r.ids for r in got] == [r.ids for r in alone]


def test_a_long_prompt_costs_the_others_a_chunk_per_step_and_no_more() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=4, capacity=256, prefill_chunk=8)
    running = engine.submit(gf.Request([1, 2, 3], max_new_tokens=40))
    engine.step()
    long = engine.submit(gf.Request(kit.ids(200), max_new_tokens=2))
    read: list[int] = []
    ask = engine._rows.read

    def counted(job: Any, n: int) -> Any:
        read.append(n)
        return ask(job, n)

    engine._rows.read = counted  # type: ignore[method-assign]
    for step in range(20):
        tokens, read[:] = len(running.tokens), []
        if step == 5:
            short = engine.submit(gf.Request([7, 8, 9], max_new_tokens=2))
        engine.step()
        assert len(running.tokens) == tokens + 1  # a token in every step
        assert sum(read) <= 8
        if step == 5:
            assert short.tokens  # who asks for little behind the long one gets a token in the first step
    assert not long.tokens
    assert long.result().ids == gf.generate(model, kit.ids(200), max_new_tokens=2).ids


def test_a_long_prompt_gets_on_while_short_ones_keep_coming() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=4, capacity=128, prefill_chunk=8, queue=201)
    long = engine.submit(gf.Request(kit.ids(80), max_new_tokens=1))
    for i in range(200):
        engine.submit(gf.Request(kit.ids(8, i), max_new_tokens=1))
    steps = 0
    while not long.done:
        engine.step()
        steps += 1
    assert steps <= 80 // 4 + 1


# What ends early


def test_cancelling_frees_the_slot_before_the_next_step() -> None:
    model = kit.model("window")
    engine = gf.Engine(model, slots=2, capacity=64)
    one, two = (engine.submit(gf.Request(kit.ids(5, i), max_new_tokens=20)) for i in range(2))
    three = engine.submit(gf.Request(kit.ids(6, 9), max_new_tokens=3))
    four = engine.submit(gf.Request([1], max_new_tokens=3))
    for _ in range(3):
        engine.step()
    four.cancel()  # waits still: ends at once
    assert four.done and four.cancelled and list(four) == []
    one.cancel()
    assert not one.done
    engine.step()
    assert one.done and len(one.tokens) == 4 and len(list(one)) == 4  # the first step reads the prompt, and decodes
    assert three.tokens  # in its place within the same step
    with pytest.raises(gf.Cancelled, match="cancelled after 4 of at most 20 new tokens"):
        one.result()
    one.cancel()  # nothing happens
    for ticket, prompt, n in ((two, kit.ids(5, 1), 20), (three, kit.ids(6, 9), 3)):
        kit.same(ticket.result(), gf.generate(model, prompt, max_new_tokens=n))
    empty(engine)


def test_what_goes_wrong_in_one_request_ends_no_other() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=5, capacity=64)

    class Angry(gf.Link):
        def apply(self, logits: torch.Tensor, history: Any = None, state: Any = None) -> torch.Tensor:
            if state is not None and max(state.state.steps) == 2:
                raise RuntimeError("not today")
            return logits

    def nothing(ids: list[int]) -> set[int] | None:
        return set() if len(ids) > 5 else None

    def nan(x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")

    def shout(token: gf.Token) -> None:
        raise KeyError("callback")

    bad = [
        engine.submit(gf.Request([1, 2], sampler=Angry() | gf.Greedy(), max_new_tokens=9)),
        engine.submit(gf.Request([3, 4], allowed=nothing, max_new_tokens=9)),
        engine.submit(gf.Request([5, 6], tap=gf.Edit("blocks.0.attn.v", nan), max_new_tokens=9)),
        engine.submit(gf.Request([7, 8], max_new_tokens=4)),
    ]
    bad[3].on_token(shout)
    good = [engine.submit(gf.Request(kit.ids(4 + i, i), max_new_tokens=12, temperature=1.0, seed=i)) for i in range(8)]
    run(engine)
    for ticket, kind, said in zip(
        bad, (RuntimeError, gf.SamplerError, gf.SamplerError, KeyError), ("not today", "No token is left", "NaN logits", "callback"), strict=True
    ):
        with pytest.raises(kind, match=said):
            ticket.result()
        with pytest.raises(kind, match=said):
            list(ticket)
    assert len(bad[0].tokens) == 2
    for i, ticket in enumerate(good):
        kit.same(ticket.result(), gf.generate(model, kit.ids(4 + i, i), max_new_tokens=12, temperature=1.0, seed=i))
    assert engine.stats().failed == 4
    empty(engine)


class Failing(gf.Link):
    """Fails when it is asked for a memory (``at`` 0), or at the token of this number."""

    def __init__(self, at: int):
        object.__setattr__(self, "at", at)

    def start(self, rows: int, device: torch.device) -> torch.Tensor | None:
        if self.at == 0:
            raise MemoryError("no room to remember")
        return None

    def apply(self, logits: torch.Tensor, history: Any = None, state: Any = None) -> torch.Tensor:
        if max(state.state.steps) + 1 == self.at:
            raise RuntimeError(f"not the token {self.at}")
        return logits


def test_a_link_that_fails_at_the_start_or_on_the_way_costs_no_slot() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=64)
    well = engine.submit(gf.Request([1, 2, 3], max_new_tokens=12))
    engine.step()
    with pytest.raises(MemoryError, match="no room to remember"):
        engine.submit(gf.Request([3, 4], sampler=Failing(0) | gf.Greedy(), max_new_tokens=9))
    third = engine.submit(gf.Request([3, 4], sampler=Failing(3) | gf.Greedy(), max_new_tokens=9))
    with pytest.raises(RuntimeError, match="not the token 3"):
        third.result()
    assert len(third.tokens) == 2 and engine.stats().running == 1
    again = engine.submit(gf.Request([3, 4], max_new_tokens=9))
    for ticket, prompt, n in ((well, [1, 2, 3], 12), (again, [3, 4], 9)):
        kit.same(ticket.result(), gf.generate(model, prompt, max_new_tokens=n))
    empty(engine)


@pytest.mark.parametrize("where", ["swap_rows", "clear_row", "copy_row"])
def test_what_fails_while_a_request_is_admitted_ends_that_one(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=3, capacity=64)
    first = engine.submit(gf.Request(kit.ids(20), max_new_tokens=30))
    for _ in range(3):
        engine.step()
    cache, times = engine._rows.cache, []

    def full(*_: Any) -> None:
        times.append(where)
        if len(times) == 1:
            raise MemoryError("full")
        return ask(*_)

    ask = getattr(cache, where)
    engine._rows.used[1] = 9  # so that row 2 is taken, and swapped
    prompt = [*kit.ids(20), 5, 6] if where == "copy_row" else [7, 8]
    bad = engine.submit(gf.Request(prompt, max_new_tokens=5))
    with monkeypatch.context() as patch:
        patch.setattr(cache, where, full)
        engine.step()
    assert times and bad.done
    with pytest.raises(MemoryError, match="full"):
        bad.result()
    again = engine.submit(gf.Request(prompt, max_new_tokens=5))
    for ticket, text, n in ((first, kit.ids(20), 30), (again, prompt, 5)):
        kit.same(ticket.result(), gf.generate(model, text, max_new_tokens=n))
    assert engine.stats().failed == 1
    empty(engine)


def test_links_that_cannot_be_compared_are_called_one_by_one() -> None:
    model = kit.model("grouped")

    class Odd(gf.Link):
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("more than one value is ambiguous")

        __hash__ = None  # type: ignore[assignment]

        def apply(self, logits: torch.Tensor, history: Any = None, state: Any = None) -> torch.Tensor:
            return logits

    engine = gf.Engine(model, slots=2, capacity=64)
    tickets = [engine.submit(gf.Request([1, 2 + i], sampler=Odd() | gf.Greedy(), max_new_tokens=5)) for i in range(2)]
    run(engine)
    for i, ticket in enumerate(tickets):
        assert ticket.result().ids == gf.generate(model, [1, 2 + i], max_new_tokens=5).ids


def test_an_answer_that_cannot_be_made_ends_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=64)
    jobs = [engine.submit(gf.Request([1, 2 + i], max_new_tokens=5)) for i in range(2)]
    engine.step()
    monkeypatch.setattr(engine._rows.jobs[0].row, "result", lambda: 1 / 0)
    run(engine)
    with pytest.raises(ZeroDivisionError):
        jobs[0].result()
    kit.same(jobs[1].result(), gf.generate(model, [1, 3], max_new_tokens=5))
    empty(engine)


def test_a_call_that_fails_for_all_leaves_an_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("window")
    engine = gf.Engine(model, slots=3, capacity=64)
    tickets = [engine.submit(gf.Request(kit.ids(12, i), max_new_tokens=8)) for i in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[1]), "forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        engine.step()
    assert all(isinstance(t.error, MemoryError) for t in tickets)
    again = engine.submit(gf.Request(kit.ids(12, 1), max_new_tokens=8))
    kit.same(again.result(), gf.generate(model, kit.ids(12, 1), max_new_tokens=8))
    empty(engine)


# What is refused before anything runs


def test_what_does_not_fit_is_said_with_both_numbers() -> None:
    engine = gf.Engine(kit.model("learned"), kit.Letters(), slots=1, capacity=500)
    assert engine.capacity == 96  # the model's positions
    with pytest.raises(gf.InputError, match="The prompt has 90 tokens, and with 10 new ones 99 have to be held .* holds 96 per request: .* at most 7 new"):
        engine.submit(gf.Request([1] * 90, max_new_tokens=10))
    engine.submit(gf.Request([1] * 90, max_new_tokens=7)).result()
    for request, said in (
        (lambda: gf.Request([1, 99]), "token 99, but the vocabulary has 31"),
        (lambda: gf.Request([]), "A prompt is a text"),
        (lambda: gf.Request("abc", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: gf.Request("abc", logprobs=-1), "logprobs is -1"),
        (lambda: gf.Request([[1], [2]]), "one prompt, but 2 were given"),
        (lambda: gf.Request([1], decoder_start=3), "decoder_start is for encoder-decoder"),
        (lambda: gf.Request([1], temperature=-1.0), "temperature"),
        (lambda: gf.Request([1], temprature=1.0), "no option 'temprature'.* Did you mean 'temperature'"),
        (lambda: gf.Request([1], num_beams=4), "A request has no option 'num_beams'; it is not what an engine does: generate"),
        (lambda: gf.Request([1], cache=False), "the engine's own"),
        (lambda: gf.Request([1], tap=gf.Record("blocks.9.attn.z"), max_new_tokens=2), "meets no site"),
    ):
        with pytest.raises(gf.GlassformerError, match=said):
            engine.submit(request())
    with pytest.raises(gf.InputError, match="submit.. takes a Request, but str was given"):
        engine.submit("abc")  # type: ignore[arg-type]
    with pytest.raises(gf.InputError, match="without a tokenizer there is only ids"):
        gf.Engine(kit.model("learned"), slots=1).submit(gf.Request([1], stop="a"))
    with pytest.raises(gf.InputError, match="The source has 70 tokens, but this engine holds 64"):
        gf.Engine(kit.model("t5"), slots=1, capacity=64).submit(gf.Request([1] * 70, max_new_tokens=3))
    assert engine.stats().submitted == 1


def test_engines_that_cannot_be() -> None:
    model = kit.model("grouped")
    for options, said in (
        ({"slots": 0}, "slots=0.: a whole number of 1 or more"),
        ({"prefill_chunk": 1.5}, "prefill_chunk=1.5"),
        ({"cache_dtype": "int4"}, "'bfloat16' or 'int8'"),
        ({"memory": "lots"}, "memory='lots'.: a number of bytes, or a text such as '2 GB'"),
        ({"memory": "1 KB"}, "One slot takes 262,144 bytes, but memory='1 KB' is 1,000"),
    ):
        with pytest.raises(gf.InputError, match=said):
            gf.Engine(model, **options)
    with pytest.raises(gf.InputError, match="predicts none|sees the whole text"):
        gf.Engine(gf.Encoder(kit.V, kit.D, (gf.Block(gf.Attention(4), gf.Plain(8)),)).build(seed=0))


def test_memory_chooses_the_slots() -> None:
    model = kit.model("grouped")
    each = gf.Engine(model, slots=1, capacity=128).bytes
    assert each == 2 * 2 * 2 * 128 * 4 * 4  # keys and values, blocks, heads, places, features, bytes
    engine = gf.Engine(model, capacity=128, memory=f"{3.5 * each / 2**10} KiB")
    assert (engine.slots, engine.bytes) == (3, 3 * each)
    assert gf.Engine(model, slots=2, capacity=128, memory="1 GB").slots == 2


def test_what_load_gives_brings_its_tokenizer_and_its_end() -> None:
    model = kit.model("grouped")
    whole = gf.generate(model, [3, 4], max_new_tokens=12).ids

    class Opened:
        eos_ids = (whole[4],)
        tokenizer = kit.Letters()

    Opened.model = model  # type: ignore[attr-defined]
    result = gf.Engine(Opened(), slots=1, capacity=64).submit(gf.Request([3, 4], max_new_tokens=12)).result()
    assert result.finish_reason == "eos" and result.ids == whole[: whole.index(whole[4]) + 1]
    assert result.text is not None


def test_stats_count_what_was_done() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=2, capacity=64, prefix=False)
    for i in range(3):
        engine.submit(gf.Request(kit.ids(5, i), max_new_tokens=4))
    run(engine)
    s = engine.stats()
    assert (s.submitted, s.finished, s.tokens, s.prompt_tokens, s.prefix_tokens) == (3, 3, 12, 15, 0)
    assert s.first_tokens == sum(s.first_token_counts) == 3
    assert len(s.first_token_counts) == len(BOUNDS) + 1
    assert s.first_token_seconds > 0
    assert s.seconds > 0
    assert "0 of 2 slots at work, 0 waiting, 64 tokens each" in repr(engine)
