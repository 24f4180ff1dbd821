"""An engine with a thread of its own: many who ask at once, callbacks, coroutines, and how it ends."""

from __future__ import annotations

import asyncio
import random
import threading
import warnings
from contextlib import suppress
from time import sleep

import pytest

import glassformer as gf
from infer import engine_kit as kit
from look import zoo


def test_fifty_who_ask_at_once_and_some_who_leave() -> None:
    model = kit.model("grouped")
    asked = [kit.asked(random.Random(i), longest=20, new=8) for i in range(50)]
    expected = [gf.generate(model, prompt, **options) for prompt, options in asked]
    wrong: list[str] = []
    with gf.Engine(model, slots=4, capacity=48, queue=8, prefill_chunk=16) as engine:
        assert engine.start() is engine and engine.running  # twice is once

        def ask(i: int) -> None:
            try:
                ask_for(i)
            except BaseException as error:
                wrong.append(f"{i}: {error!r}")

        def ask_for(i: int) -> None:
            prompt, options = asked[i]
            while True:
                try:
                    ticket = engine.submit(gf.Request(prompt, user=f"user {i % 7}", **options))
                    break
                except gf.QueueFull:
                    sleep(0.02)
            if i % 10 == 3:
                ticket.cancel()
                got = [t.id for t in ticket]
                if got != expected[i].ids[: len(got)]:
                    wrong.append(f"{i}: {got}")
            elif i % 2:
                if [t.id for t in ticket] != expected[i].ids:
                    wrong.append(f"{i}: {ticket.tokens}")
            elif ticket.result(timeout=60).ids != expected[i].ids:
                wrong.append(f"{i}: {ticket.result()}")

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not wrong
    stats = engine.stats()
    assert (stats.submitted, stats.running, stats.waiting, stats.failed) == (50, 0, 0, 0)
    assert stats.finished + stats.cancelled == 50
    assert not engine.running


def test_stopping_drains_or_cancels() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=64).start()
    tickets = [engine.submit(gf.Request(kit.ids(4, i), max_new_tokens=20)) for i in range(6)]
    engine.stop()
    assert all(t.done and t.error is None for t in tickets) and not engine.running
    with pytest.raises(gf.EngineError, match="stopping and takes no more requests: start"):
        engine.submit(gf.Request([1], max_new_tokens=2))
    engine.start()
    tickets = [engine.submit(gf.Request(kit.ids(4, i), max_new_tokens=60)) for i in range(6)]
    engine.stop(drain=False)
    assert all(t.done for t in tickets) and any(t.cancelled for t in tickets)
    engine.start()
    tickets = [engine.submit(gf.Request(kit.ids(4, i), max_new_tokens=60)) for i in range(6)]
    engine.stop(timeout=0.0)
    assert all(t.done for t in tickets) and any(t.cancelled for t in tickets)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_stopping_without_a_thread_makes_the_steps_itself() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    tickets = [engine.submit(gf.Request([1, 2], max_new_tokens=5)) for _ in range(3)]
    engine.stop()
    assert all(len(t.result().ids) == 5 for t in tickets)
    engine.start()
    engine.stop()
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    tickets = [engine.submit(gf.Request([1, 2], max_new_tokens=5)) for _ in range(3)]
    engine.step()
    engine.stop(drain=False)
    assert [t.cancelled for t in tickets] == [True] * 3
    with pytest.raises(gf.Cancelled, match="cancelled after 0 of at most 5"):
        tickets[2].result()


def test_leaving_with_an_error_cancels() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    tickets = []

    def work() -> None:
        with engine:
            tickets.append(engine.submit(gf.Request([1, 2], max_new_tokens=60)))
            raise KeyError

    with pytest.raises(KeyError):
        work()
    (ticket,) = tickets
    assert ticket.done and not engine.running


def test_callbacks_get_every_token_once_and_the_end() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    ticket = engine.submit(gf.Request([1, 2], max_new_tokens=6))
    engine.step()
    seen: list[int] = []
    ends: list[gf.Ticket] = []
    ticket.on_token(lambda token: seen.append(token.id))
    ticket.on_done(ends.append)
    assert len(seen) == 2  # what had come
    assert seen == ticket.result().ids and ends == [ticket]
    ticket.on_done(ends.append)
    ticket.on_token(lambda token: seen.append(token.id))
    assert ends == [ticket, ticket] and seen == ticket.result().ids * 2
    assert ticket.submitted <= ticket.first <= ticket.finished
    assert repr(ticket) == "Ticket(finished, 6 tokens)"


def test_a_callback_cannot_make_steps_and_its_error_at_the_end_is_told() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=2, capacity=64)
    one, two = (engine.submit(gf.Request([1, 2], max_new_tokens=3)) for _ in range(2))
    one.on_token(lambda _: two.result())
    with pytest.raises(gf.EngineError, match="from inside a step, by a callback"):
        one.result()
    assert len(two.result().ids) == 3
    three = engine.submit(gf.Request([1, 2], max_new_tokens=3))
    three.on_done(lambda _: 1 / 0)
    with pytest.warns(gf.GlassformerWarning, match="callback of on_done, .* raised ZeroDivisionError: division by zero. The request had ended"):
        assert len(three.result().ids) == 3
    assert three.error is None
    with pytest.warns(gf.GlassformerWarning, match="ZeroDivisionError"):  # the same for one that comes late
        three.on_done(lambda _: 1 / 0)


def test_a_callback_at_the_end_changes_no_answer_and_disturbs_no_other_even_where_warnings_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    engine = gf.Engine(kit.model("grouped"), slots=2, capacity=64)
    one, two = (engine.submit(gf.Request([1, 2], max_new_tokens=3)) for _ in range(2))
    ends: list[gf.Ticket] = []
    one.on_done(lambda _: 1 / 0)
    one.on_done(ends.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kit.run(engine)
    assert one.result().ids == two.result().ids and ends == [one]
    assert "division by zero" in capsys.readouterr().err


def test_a_callback_that_blocks_holds_up_nobody_who_asks_the_ticket() -> None:
    with gf.Engine(kit.model("grouped"), slots=1, capacity=64) as engine:
        inside, go_on = threading.Event(), threading.Event()
        ticket = engine.submit(gf.Request([1, 2], max_new_tokens=20))

        def block(_: gf.Token) -> None:
            inside.set()
            assert go_on.wait(20)

        ticket.on_token(block)
        assert inside.wait(20)
        heard: list[int] = []
        asker = threading.Thread(target=lambda: ticket.on_token(lambda token: heard.append(token.id)))
        asker.start()
        asker.join(5)
        free = not asker.is_alive()
        go_on.set()
        assert ticket.result(timeout=20).ids == heard
        asker.join(5)
    assert free


def test_every_token_once_and_in_order_for_callbacks_that_come_on_the_way() -> None:
    ticket = gf.Engine(kit.model("grouped"), slots=1, capacity=64).submit(gf.Request([1, 2], max_new_tokens=2))
    tokens = [gf.Token(row=0, id=i, text="", logprob=0.0) for i in range(400)]
    heard: list[list[int]] = [[] for _ in range(8)]

    def listen(own: list[int]) -> None:
        sleep(0.001 * random.Random(len(heard)).random())
        ticket.on_token(lambda token: (own.append(token.id), sleep(0.00001)))

    threads = [threading.Thread(target=listen, args=(own,)) for own in heard]
    for i, token in enumerate(tokens):
        if i % 50 == 10:
            threads[i // 50].start()
        ticket._push(token)
    for thread in threads:
        thread.join(20)
    assert heard == [list(range(400))] * 8


def test_a_callback_that_fails_keeps_no_token_from_the_others_and_its_replay_tells_who_asked() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    ticket = engine.submit(gf.Request([1, 2], max_new_tokens=4))
    heard: list[int] = []
    ticket.on_token(lambda _: 1 / 0)
    ticket.on_token(lambda token: heard.append(token.id))
    with pytest.raises(ZeroDivisionError):
        ticket.result()
    assert heard == [token.id for token in ticket.tokens] and len(heard) == 1
    ticket = engine.submit(gf.Request([1, 2], max_new_tokens=4))
    engine.step()
    with pytest.raises(ZeroDivisionError):
        ticket.on_token(lambda _: 1 / 0)
    assert len(ticket.result().ids) == 4


def test_waiting_has_a_limit() -> None:
    engine = gf.Engine(kit.model("grouped"), slots=1, capacity=64)
    ticket = engine.submit(gf.Request([1, 2], max_new_tokens=6))
    with pytest.raises(gf.EngineError, match="has not finished within 0 seconds; 0 tokens have come"):
        ticket.result(timeout=0)
    assert len(ticket.result(timeout=60).ids) == 6


def test_coroutines_get_the_tokens_and_leaving_cancels() -> None:
    model = kit.model("grouped")

    async def whole(engine: gf.Engine, i: int) -> list[int]:
        return [t.id async for t in engine.submit(gf.Request(kit.ids(4, i), max_new_tokens=9)).astream()]

    async def leaves(engine: gf.Engine) -> gf.Ticket:
        ticket = engine.submit(gf.Request([1, 2, 3], max_new_tokens=60))
        stream = ticket.astream()
        async for _ in stream:
            break
        await stream.aclose()
        return ticket

    async def fails(engine: gf.Engine) -> None:
        ticket = engine.submit(gf.Request([1, 2, 3], max_new_tokens=9, tap=gf.Edit("logits", lambda x: x[:, :, :3])))
        with pytest.raises(gf.SiteError, match="keep the shape"):
            async for _ in ticket.astream():
                pass

    async def all_of_it(engine: gf.Engine) -> None:
        *texts, left, _ = await asyncio.gather(*(whole(engine, i) for i in range(8)), leaves(engine), fails(engine))
        assert texts == [gf.generate(model, kit.ids(4, i), max_new_tokens=9).ids for i in range(8)]
        while not left.done:
            await asyncio.sleep(0.01)
        assert left.cancelled or len(left.tokens) == 60

    engine = gf.Engine(model, slots=3, capacity=64)
    with engine:
        asyncio.run(all_of_it(engine))

    async def nobody() -> None:
        async for _ in engine_at_rest.submit(gf.Request([1], max_new_tokens=2)).astream():
            pass

    engine_at_rest = gf.Engine(model, slots=1, capacity=64)
    with pytest.raises(gf.EngineError, match=r"engine.start\(\)"):
        asyncio.run(nobody())


def test_the_thread_survives_what_a_step_does_not_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("grouped")
    with gf.Engine(model, slots=2, capacity=64) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._rows, "pieces", lambda: 1 / 0)
            ticket = engine.submit(gf.Request([1, 2], max_new_tokens=3))
            with pytest.raises(ZeroDivisionError):
                ticket.result(timeout=60)
        assert engine.submit(gf.Request([1, 2], max_new_tokens=3)).result(timeout=60).ids == gf.generate(model, [1, 2], max_new_tokens=3).ids


def test_the_thread_survives_rows_that_cannot_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model("grouped")
    with gf.Engine(model, slots=2, capacity=64) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._rows, "_swap", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
            tickets = [engine.submit(gf.Request([1, 2 + i], max_new_tokens=3 + 30 * i)) for i in range(2)]
            for ticket in tickets:
                with suppress(MemoryError):  # the one that ended may have its answer
                    ticket.result(timeout=20)
        assert all(t.done for t in tickets) and tickets[1].error is not None and engine.running
        kit.same(engine.submit(gf.Request([1, 2], max_new_tokens=3)).result(timeout=20), gf.generate(model, [1, 2], max_new_tokens=3))


def test_a_callback_of_a_running_engine_cannot_wait_for_it() -> None:
    """It would wait for ever, in the very thread that makes the steps."""
    found: list[Exception] = []
    with gf.Engine(zoo.model("llama"), slots=2, capacity=32) as engine:

        def ask(token: object) -> None:
            try:
                engine.generate([[2]], max_new_tokens=1)
            except gf.EngineError as error:
                found.append(error)

        ticket = engine.submit(gf.Request([1], max_new_tokens=2))
        ticket.on_token(ask)
        assert len(ticket.result(timeout=20).ids) == 2
    assert found and "from inside a step, by a callback" in str(found[0])


def test_prompts_before_one_that_is_refused_are_not_left_running() -> None:
    engine = gf.Engine(zoo.model("llama"), slots=2, capacity=16)
    with pytest.raises(gf.InputError, match="16"):
        engine.generate([[1, 2], [3] * 40], max_new_tokens=4)
    engine.step()
    assert engine.stats().running == engine.stats().waiting == 0
