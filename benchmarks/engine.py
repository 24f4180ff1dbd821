"""The engine on a CPU: a GPT-2 124M shape with random weights, many requests at once beside one after the other, in one run.

    python benchmarks/engine.py                   everything, about five minutes on two cores
    python benchmarks/engine.py --requests 16 --new 64 --turns 3 --json out.json

``one``      one request at a time through generate()
``engine``   all of them at once through Engine(slots=requests)
``int8``     the same with keys and values in int8
``beginning`` all with one long beginning in common, with and without taking it over
``load``     three times as many requests as slots, coming at random: seconds to the first token, median and 95th percentile

Contenders take turns; a figure is the median of the turns, with the least and the largest in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # as the command line does
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")

import torch

import glassformer as gf

PROMPT = 32


def prompts(n: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(1, 50_000, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def one(model: Any, n: int, new: int) -> float:
    """Tokens per second, one request after the other (a quarter of them, for time's sake)."""
    some = prompts(max(1, n // 4), PROMPT)
    begun = time.perf_counter()
    for prompt in some:
        gf.generate(model, prompt, max_new_tokens=new)
    return len(some) * new / (time.perf_counter() - begun)


def at_once(engine: gf.Engine, n: int, new: int) -> float:
    """Tokens per second of all requests at once, reading of the prompts included."""
    begun = time.perf_counter()
    engine.generate(prompts(n, PROMPT), max_new_tokens=new)
    return n * new / (time.perf_counter() - begun)


def beginning(engine: gf.Engine, n: int, new: int) -> float:
    """Requests per second whose prompts begin with the same 256 tokens."""
    same = prompts(1, 256, seed=9)[0]
    begun = time.perf_counter()
    engine.generate([[*same, *own] for own in prompts(n, 8, seed=random.randrange(10**6))], max_new_tokens=new)
    return n / (time.perf_counter() - begun)


def load(engine: gf.Engine, n: int, new: int) -> dict[str, float]:
    """Seconds to the first token where requests of 8 to 200 tokens keep coming: one every eighth of the time that one takes."""
    draw = random.Random(0)
    tickets = []
    with engine:
        for i in range(n):
            tickets.append(engine.submit(gf.Request(prompts(1, draw.randint(8, 200), i)[0], max_new_tokens=draw.randint(4, new))))
            time.sleep(draw.expovariate(8.0))
        for ticket in tickets:
            ticket.result()
    waits = sorted(t.first - t.submitted for t in tickets if t.first is not None)
    return {"median": statistics.median(waits), "p95": waits[int(0.95 * (len(waits) - 1))], "tokens/s": engine.stats().tokens / engine.stats().seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    n, new = told.requests, told.new
    model = gf.preset("gpt2").replace(blocks=gf.preset("gpt2").blocks[: told.layers]).build(seed=0)
    make: Callable[..., gf.Engine] = lambda **more: gf.Engine(model, slots=n, capacity=512, queue=4 * n, **more)
    engines = {"engine": make(), "int8": make(cache_dtype="int8"), "shared": make(), "unshared": make(prefix=False)}
    contenders: dict[str, Callable[[], float]] = {
        "one": lambda: one(model, n, new),
        "engine": lambda: at_once(engines["engine"], n, new),
        "int8": lambda: at_once(engines["int8"], n, new),
        "beginning": lambda: beginning(engines["shared"], n, 4),
        "beginning, read anew": lambda: beginning(engines["unshared"], n, 4),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(told.turns):
        for name, turn in contenders.items():
            found[name].append(turn())
    print(f"{torch.get_num_threads()} threads, {n} requests of {PROMPT} tokens, {new} new ones each")
    for name, figures in found.items():
        unit = "requests/s" if "beginning" in name else "tokens/s"
        print(f"  {name:22s} {statistics.median(figures):8.1f} {unit}   [{min(figures):.1f} – {max(figures):.1f}]")
    median = {name: statistics.median(figures) for name, figures in found.items()}
    print(f"  all at once over one by one: {median['engine'] / median['one']:.2f}")
    print(f"  a beginning taken over, over reading it anew: {median['beginning'] / median['beginning, read anew']:.2f}")
    print(f"  cache: {engines['engine'].bytes / 2**20:.0f} MiB, in int8 {engines['int8'].bytes / 2**20:.0f} MiB")
    waits = load(make(), 3 * n, new)
    print(f"  to the first token under load: median {waits['median']:.2f} s, 95th percentile {waits['p95']:.2f} s, at {waits['tokens/s']:.0f} tokens/s")
    if told.json:
        told.json.write_text(json.dumps({**found, "load": waits}, indent=1))


if __name__ == "__main__":
    main()
