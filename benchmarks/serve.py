"""The server under load: many streaming clients for some seconds, some of whom leave, send rubbish, or read slowly.

    python benchmarks/serve.py                                    64 clients for 60 s, a GPT-2-124M shape with random weights
    python benchmarks/serve.py --clients 8 --seconds 5 --small    to see that it works
    python benchmarks/serve.py --model runs/books --slots 32

The server is a process of its own (``glassformer serve``), so that its memory is its own. Reported: tokens/s over all streams, the time to the
first token (median and 95th percentile), streams that were cut or mixed up, replies by kind, and the server's memory before and after. Every good stream
is asked for by a seed, some by the same one: equal requests must give equal texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("Once upon a time there was", "The sea was calm that day, and", "He opened the door and saw", "In the middle of the night", "She had never been")
RUBBISH = (b"{", b"\xff\xfe", b'{"prompt": "x", "n": "many"}', b'{"prompt": "x", "top_p": 0}', b'{"prompt": "x", "temprature": 1}', b"[]")


class Tally:
    """What came of it."""

    def __init__(self) -> None:
        self.tokens, self.finished, self.left = 0, 0, 0
        self.first: list[float] = []
        self.kinds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.texts: dict[tuple[str, int], set[str]] = {}


async def stream(http: httpx.AsyncClient, tally: Tally, new_tokens: int, rng: random.Random, kind: str) -> None:
    """One streamed answer: read to its end, slowly, or left in the middle."""
    prompt, seed = rng.choice(PROMPTS), rng.randrange(8)
    body = {"prompt": prompt, "max_tokens": new_tokens, "seed": seed, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    leave = rng.randrange(1, new_tokens) if kind == "leaves" else None
    begun, n, text, done = time.perf_counter(), 0, "", False
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        tally.kinds[f"{kind}: {reply.status_code}"] += 1
        if reply.status_code != 200:
            await reply.aread()
            await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
            return
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    tally.wrong.append(event["error"]["message"])
                    return
                if usage := event.get("usage"):
                    tally.tokens += usage["completion_tokens"]
                    if usage["completion_tokens"] != new_tokens:
                        tally.wrong.append(f"{usage['completion_tokens']} tokens of {new_tokens}")
                for choice in event["choices"]:
                    if n == 0:
                        tally.first.append(time.perf_counter() - begun)
                    n, text = n + 1, text + choice["text"]
                if leave is not None and n >= leave:
                    tally.left += 1
                    tally.tokens += n
                    return
                if kind == "slow":
                    await asyncio.sleep(0.05)
    if not done:
        tally.wrong.append("a stream ended without [DONE]")
    tally.finished += 1
    tally.texts.setdefault((prompt, seed), set()).add(text)


async def client(http: httpx.AsyncClient, tally: Tally, until: float, new_tokens: int, i: int) -> None:
    """One client until the time is over; three of four only read."""
    rng = random.Random(i)
    while time.monotonic() < until:
        kind = rng.choices(("reads", "leaves", "slow", "rubbish"), (75, 10, 5, 10))[0]
        try:
            if kind == "rubbish":
                status = (await http.post("/v1/completions", content=rng.choice(RUBBISH), headers={"Content-Type": "application/json"})).status_code
                tally.kinds[f"rubbish: {status}"] += 1
                if status != 400:
                    tally.wrong.append(f"rubbish was answered by {status}")
            else:
                await stream(http, tally, new_tokens, rng, kind)
        except httpx.HTTPError as error:
            tally.wrong.append(type(error).__name__)


def memory(pid: int) -> float:
    """Megabytes of a process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def random_model(folder: Path, small: bool) -> Path:
    """A GPT-2 shape with random weights, and the tokenizer of the tests, filled up to as many tokens."""
    import tokenizers

    import glassformer as gf
    from glassformer.models import presets

    spec = presets.preset("gpt2")
    spec = spec.replace(vocab_size=4096, blocks=spec.blocks[:2]) if small else spec
    library = tokenizers.Tokenizer.from_file(str(ROOT / "tests" / "data" / "books" / "tokenizer.json"))
    library.add_tokens([f" word{i}" for i in range(library.get_vocab_size(), spec.vocab_size)])
    return gf.save(spec.build(seed=0), folder / "random", gf.Tokenizer(library))


def begun(model: Path, slots: int, capacity: int, queue: int, more: list[str]) -> tuple[subprocess.Popen[str], str, Path]:
    """The server, its address, and the file of what it says."""
    said = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [sys.executable, "-m", "glassformer", "serve", str(model), "--port", "0", "--slots", str(slots)]
    command += ["--capacity", str(capacity), "--queue", str(queue), *more]
    with said.open("w") as out:
        server = subprocess.Popen(command, stderr=out, text=True, env=os.environ)
    while server.poll() is None:
        if found := re.search(r"at (http://\S+) \(", said.read_text()):
            return server, found[1], said
        time.sleep(0.1)
    raise SystemExit(said.read_text())


async def load(url: str, clients: int, seconds: float, new_tokens: int) -> tuple[Tally, float]:
    tally = Tally()
    limits = httpx.Limits(max_connections=2 * clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await stream(http, Tally(), new_tokens, random.Random(0), "reads")  # what is done once is not counted
        start = time.monotonic()
        await asyncio.gather(*(client(http, tally, start + seconds, new_tokens, i) for i in range(clients)))
        return tally, time.monotonic() - start


def report(tally: Tally, seconds: float, before: float, after: float) -> int:
    mixed = sum(len(texts) > 1 for texts in tally.texts.values())
    first = np.array(tally.first or [float("nan")])
    print(f"{tally.tokens / seconds:8.1f} tokens/s over {seconds:.1f} s; {tally.finished} streams finished, {tally.left} left by their clients")
    print(f"{np.quantile(first, 0.5):8.3f} s to the first token in the median, {np.quantile(first, 0.95):.3f} s at the 95th percentile")
    print(f"{mixed:8d} of {len(tally.texts)} requests gave two texts for one seed")
    print(f"{before:8.0f} MB before, {after:.0f} MB after")
    for kind, n in sorted(tally.kinds.items()):
        print(f"{n:8d} {kind}")
    for kind, n in Counter(tally.wrong).most_common(10):
        print(f"{n:8d} WRONG: {kind}")
    return 1 if tally.wrong or mixed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; by default one with random weights")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="two layers, to see that it works")
    parser.add_argument("more", nargs="*", help="further options of glassformer serve, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or random_model(Path(folder), given.small)
        server, url, said = begun(model, given.slots, given.capacity, 2 * given.clients, given.more)
        try:
            asyncio.run(load(url, 4, min(3.0, given.seconds), given.new_tokens))
            before = memory(server.pid)
            tally, seconds = asyncio.run(load(url, given.clients, given.seconds, given.new_tokens))
            after = memory(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(180)
    failed = report(tally, seconds, before, after)
    print(f"{code:8d} is the server's exit code after SIGTERM")
    said.unlink()
    return failed or code


if __name__ == "__main__":
    raise SystemExit(main())
