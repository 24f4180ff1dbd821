"""Many clients at once: no stream is lost or mixed up, whoever else leaves, sends rubbish, or reads slowly."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

import glassformer as gf
from web import serving

PROMPTS = ["Once upon", "The sea", "He said", "A long way", "In the night", "She went", "No one", "Then came"]


async def reading(http: httpx.AsyncClient, prompt: str, seed: int, pause: float = 0.0, leave_after: int | None = None) -> str | None:
    """The text of one stream; None if this client left early."""
    body = {"prompt": prompt, "max_tokens": 12, "seed": seed, "temperature": 0.9, "stream": True}
    text, n, done = "", 0, False
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            if line == "data: [DONE]":
                done = True
                break
            text += json.loads(line[6:])["choices"][0]["text"]
            n += 1
            if leave_after is not None and n >= leave_after:
                return None
            await asyncio.sleep(pause)
    assert done
    return text


async def rubbish(http: httpx.AsyncClient, i: int) -> int:
    bodies = [b"{", b"\xff\xfe", json.dumps({"prompt": "x", "n": "many"}).encode(), json.dumps({"prompt": [99999]}).encode(), b'{"prompt": "x", "top_p": 0}']
    return (await http.post("/v1/completions", content=bodies[i % len(bodies)], headers={"Content-Type": "application/json"})).status_code


@pytest.mark.slow
def test_forty_streams_with_leavers_rubbish_and_slow_readers() -> None:
    what = serving.loaded()
    wanted = [(PROMPTS[i % len(PROMPTS)], i) for i in range(40)]
    alone = [gf.generate(what.model, p, tokenizer=what.tokenizer, max_new_tokens=12, seed=s, temperature=0.9).text for p, s in wanted]
    rng = random.Random(0)

    async def all_of_them(url: str) -> tuple[list[str | None], list[int]]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200)) as http:
            good = [reading(http, p, s, pause=0.05 if i % 7 == 0 else 0.0) for i, (p, s) in enumerate(wanted)]
            leavers = [reading(http, rng.choice(PROMPTS), 1000 + i, leave_after=rng.randint(1, 6)) for i in range(12)]
            bad = [rubbish(http, i) for i in range(20)]
            done = await asyncio.gather(*good, *leavers, *bad)
        return done[: len(good)], done[len(good) + len(leavers) :]

    with serving.running(what, slots=8, queue=128) as server:
        before = server.served.engine.bytes
        texts, statuses = asyncio.run(all_of_them(server.url))
        serving.idle(server.served)
        stats = server.served.engine.stats()
        assert texts == alone
        assert set(statuses) == {400}
        assert stats.failed == 0
        assert stats.finished >= 40
        assert stats.submitted == stats.finished + stats.cancelled == 52
        assert server.served.engine.bytes == before
