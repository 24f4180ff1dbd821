"""A decode step on a CPU, and where its time goes: products, attention, the rest; with compiled code and with torch's operations.

    python benchmarks/decode_attention.py                      GPT-2 124M shape, float32 and bfloat16, 16 and 1,000 tokens of context
    python benchmarks/decode_attention.py --layers 2 --turns 5 --json out.json

One process, the same weights, the two ways in turns; a figure is the median of the turns. Floors: every matrix, and every key and value, is read once
at the bandwidth that is measured at the beginning. Shares come from steps of their own, in which products and attention stop a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # as the command line does
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")

import torch
from torch import nn

import glassformer as gf
from glassformer.core import native
from glassformer.parts import attention, kernels

WIDTH, HEADS, VOCABULARY = 768, 12, 50_257


def build(dtype: str, layers: int) -> Any:
    """The shape of GPT-2 with random weights."""
    block = gf.Block(gf.Attention(HEADS, qkv_bias=True, out_bias=True), gf.Plain(4 * WIDTH, act="gelu_tanh", bias=True))
    spec = gf.Decoder(VOCABULARY, WIDTH, (block,) * layers, final_norm=gf.LayerNorm(), tied=True, position=gf.Learned(2_048))
    return spec.build(seed=0, dtype=dtype).eval()


def bandwidth() -> float:
    """Bytes per second of reading memory, the best of some rounds."""
    x = torch.ones(1 << 26)
    return x.nbytes / min(timed(x.sum) for _ in range(8))


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Clock:
    """Seconds spent in calls of functions that are wrapped for the length of a ``with``."""

    def __init__(self, *places: tuple[Any, str]):
        self.places, self.kept, self.seconds, self.depth = places, [getattr(o, n) for o, n in places], 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **rest: Any) -> Any:
            begin = time.perf_counter()
            self.depth += 1
            try:
                return function(*args, **rest)
            finally:
                self.depth -= 1
                if self.depth == 0:  # a wrapped function that calls another counts once
                    self.seconds += time.perf_counter() - begin

        return run

    def __enter__(self) -> Clock:
        for (owner, name), function in zip(self.places, self.kept, strict=True):
            setattr(owner, name, self.wrap(function))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in zip(self.places, self.kept, strict=True):
            setattr(owner, name, function)


def products(model: Any) -> Clock:
    """A clock for everything that multiplies by a matrix."""
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)} | {type(model.readout)}
    return Clock(*((kind, "forward") for kind in kinds if "forward" in kind.__dict__))


def attentions() -> Clock:
    """A clock for attention, writing to the cache included where it is done in one go."""
    return Clock((attention.AttentionLayer, "at_once"), (kernels, "attend"))


def measure(dtype: str, context: int, layers: int, turns: int, steps: int, read: float) -> list[dict[str, Any]]:
    model = build(dtype, layers)
    prompt = [[(7 * i) % VOCABULARY for i in range(context)]]
    ways = {"compiled": native.library, "torch": lambda: None}
    sessions, found = {}, {way: {"step": [], "products": [], "attention": []} for way in ways}
    kept = native.library
    for way, library in ways.items():
        native.library = library
        sessions[way] = gf.Session(model, prompt, gf.Greedy(), room=(turns + 1) * 2 * steps + 1)
        for _ in range(steps + 1):
            sessions[way].step()
    for _ in range(turns):
        for way, library in ways.items():
            native.library = library
            step, seen = sessions[way].step, found[way]
            seen["step"].append(statistics.median(timed(step) for _ in range(steps)))
            with products(model) as a, attentions() as b:
                for _ in range(steps):
                    step()
            seen["products"].append(a.seconds / steps)
            seen["attention"].append(b.seconds / steps)
    native.library = kept
    size = model.embed.weight.element_size()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.position.table.numel()
    cached = 2 * layers * WIDTH * (context + turns * steps)
    rows = []
    for way, seen in found.items():
        ms = {name: 1e3 * statistics.median(values) for name, values in seen.items()}
        floors = {"products_floor": 1e3 * matrices * size / read, "attention_floor": 1e3 * cached * size / read}
        rest = {"rest": ms["step"] - ms["products"] - ms["attention"]}
        rows.append({"dtype": dtype, "context": context, "way": way, "layers": layers} | {n: round(x, 2) for n, x in (ms | rest | floors).items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 1_000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json")
    args = parser.parse_args()
    print(f"compiled code: {native.wait()}, threads: {torch.get_num_threads()}, load: {os.getloadavg()[0]:.1f}")
    read = bandwidth()
    print(f"memory is read at {read / 1e9:.1f} GB/s")
    print(f"{'dtype':9} {'context':>7} {'way':>9} {'step ms':>8} {'products':>8} (floor) {'attention':>9} (floor) {'rest':>6}")
    rows = []
    for dtype in args.dtypes:
        for context in args.contexts:
            for r in measure(dtype, context, args.layers, args.turns, args.steps, read):
                rows.append(r)
                at = f"{r['products']:8.2f} {r['products_floor']:7.2f} {r['attention']:9.2f} {r['attention_floor']:7.2f}"
                print(f"{dtype:9} {context:7} {r['way']:>9} {r['step']:8.2f} {at} {r['rest']:6.2f}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"bandwidth": read, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
