"""Work beside the engine's own: done once, within a time, and given up with its request."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest

from glassformer.web import Limits, Served, prepare
from glassformer.web.answers import Reply
from glassformer.web.problems import Problem
from glassformer.web.schemas import CompletionRequest
from glassformer.web.vectors import vectors
from web import serving


def test_a_prompt_is_scored_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Any] = []
    plain = Reply._score

    def counted(self: Reply, prompt: list[int]) -> dict[str, Any]:
        scored.append(prompt)
        return plain(self, prompt)

    monkeypatch.setattr(Reply, "_score", counted)
    with serving.running(serving.loaded()) as server:
        got = server.client.completions.create(model="tiny", prompt=["The sea", "A"], n=3, max_tokens=0, logprobs=1, echo=True)
    assert len(got.choices) == 6
    assert len(scored) == 2
    assert got.choices[0].logprobs == got.choices[2].logprobs != got.choices[3].logprobs


def test_scores_in_pieces_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving.running(serving.loaded()) as server:
        ask: Any = {"prompt": "The sea was calm, and é 漢 🙂 too", "max_tokens": 0, "logprobs": 2, "echo": True}
        whole = httpx.post(f"{server.url}/v1/completions", json=ask).json()["choices"][0]
        monkeypatch.setattr("glassformer.web.answers.ROWS", 3)
        pieces = httpx.post(f"{server.url}/v1/completions", json=ask).json()["choices"][0]
    assert pieces == whole
    offsets = whole["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[-1] < len(whole["text"])  # a character split over tokens is one character


def test_work_that_takes_too_long_is_a_504_and_ends_at_its_next_pass() -> None:
    served = Served(serving.loaded(), "x", limits=Limits(answer_seconds=0.2))
    free = threading.Event()
    for do in (served.work, served.prepare):
        with pytest.raises(Problem, match="not finished within 0.2 seconds") as told:
            asyncio.run(do(lambda: free.wait(20)))
        assert told.value.status == 504
    free.set()
    check = served.deadline()
    time.sleep(0.25)
    with pytest.raises(Problem, match="not finished"):
        vectors(served.model, [[1]], check)
    check = served.deadline()
    served.close()
    with pytest.raises(Problem, match="The server is stopping"):
        vectors(served.model, [[1]], check)


def test_answers_already_submitted_are_given_up_when_a_later_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving.running(serving.loaded()) as server:
        plan = prepare.completion(server.served, CompletionRequest(prompt="x", n=3, max_tokens=200))
        reply, submit, calls = Reply(server.served, plan), server.served.engine.submit, []

        def third(request: Any) -> Any:
            calls.append(request)
            if len(calls) == 3:
                raise MemoryError
            return submit(request)

        monkeypatch.setattr(server.served.engine, "submit", third)
        with pytest.raises(MemoryError):
            reply.submit()
        assert len(reply.tickets) == 2
        serving.idle(server.served)
        assert all(t.cancelled for t in reply.tickets)


def test_a_reply_that_was_left_submits_nothing_more() -> None:
    with serving.running(serving.loaded()) as server:
        reply = Reply(server.served, prepare.completion(server.served, CompletionRequest(prompt="x", n=3, max_tokens=200)))
        reply.leave()
        reply.submit()
        assert len(reply.tickets) == 1
        serving.idle(server.served)
        assert reply.tickets[0].cancelled


def test_the_time_of_an_answer_covers_what_follows_its_last_token() -> None:
    with serving.running(serving.loaded(), limits=Limits(answer_seconds=1.0)) as server:
        free = threading.Event()
        server.served.worker.submit(free.wait, 20)
        got = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2, "return_sites": ["blocks.0.resid_post"]}, timeout=20)
        assert got.status_code == 504
        with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}, timeout=20) as streamed:
            assert streamed.read().endswith(b"data: [DONE]\n\n")
        free.set()


def test_vectors_are_given_up_when_their_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits behind them is not held up by whoever has gone."""
    went, seen = threading.Event(), []

    def slow(model: Any, rows: Any, check: Any) -> Any:
        for _ in range(400):
            seen.append(1)
            time.sleep(0.02)
            try:
                check()
            except Problem:
                went.set()
                raise
        return vectors(model, rows)

    monkeypatch.setattr("glassformer.web.app.vectors", slow)
    with serving.running(serving.loaded()) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json={"input": ["The sea"]}, timeout=0.1)
        assert went.wait(5)
        assert len(seen) < 200
