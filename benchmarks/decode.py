"""Products of a decode step: how near compiled code comes to the time in which the matrix can be read at all.

    python benchmarks/decode.py                  every matrix of a GPT-2 124M, 1, 4, 8 and 16 rows, four types
    python benchmarks/decode.py --rows 1 --types int8 int4
    python benchmarks/decode.py --step           whole steps of the model too (random weights), tokens per second over 128 tokens

Each contender takes turns with reading as many bytes (a sum over a buffer); matrices are many enough that none stays in a cache. A figure is the best of
the turns; `share` is the time to read over the time of the product, `torch` how many times as long ``F.linear`` takes.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import glassformer as gf
from glassformer.core import native
from glassformer.core.blocks import row_bytes
from glassformer.models.presets import preset
from glassformer.parts import linear
from glassformer.weights import holding

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768))
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "Q8_0", "int4": "Q4_0"}
BYTES = 128_000_000
TURNS = 7


def best(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrices(n: int, k: int, kind: Any) -> list[Tensor]:
    """So many that they fill ``BYTES``."""
    size = n * (k * kind.itemsize if isinstance(kind, torch.dtype) else row_bytes(kind, k))
    count = max(2, BYTES // size)
    if isinstance(kind, torch.dtype):
        return [torch.randn(n, k).to(kind) for _ in range(count)]
    return [torch.randint(0, 120, (n, row_bytes(kind, k)), dtype=torch.uint8) for _ in range(count)]


def products(rows: list[int], types: list[str]) -> None:
    print(f"{'matrix':>14} {'type':>9} {'rows':>5} {'GB/s':>6} {'share':>6} {'torch':>6}")
    for n, k in SHAPES:
        for name in types:
            kind = TYPES[name]
            held = matrices(n, k, kind)
            size = sum(w.numel() * w.element_size() for w in held)
            buffer = torch.ones(size // 4)
            for m in rows:
                x = torch.randn(m, k, dtype=kind if isinstance(kind, torch.dtype) else torch.float32)
                if isinstance(kind, torch.dtype):
                    linear.ROWS[kind] = 32  # beyond the limit too, to see where it should be
                    ours: Callable[[], Any] = lambda x=x, held=held: [linear.product(x, w) for w in held]
                else:
                    ours = lambda x=x, held=held, kind=kind: [linear.packed_product(x, [w], [kind]) for w in held]
                theirs: Callable[[], Any] = lambda x=x, held=held: [F.linear(x, w) for w in held]
                turns = [(best(buffer.sum), best(ours), best(theirs) if isinstance(kind, torch.dtype) else float("nan")) for _ in range(TURNS)]
                read, own, other = (min(t) for t in zip(*turns, strict=True))
                print(f"{n:>7}x{k:<6} {name:>9} {m:>5} {size / own / 1e9:6.1f} {read / own:6.2f} {other / own:6.2f}", flush=True)


def steps(types: list[str]) -> None:
    made: Any = preset("gpt2", vocab_size=50_257)
    plain = made.build().eval()
    for name in types:
        model = copy.deepcopy(plain)
        if name in holding.BLOCKS:
            holding.hold(model, name)
        else:
            model.to(TYPES[name])
        size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
        buffer = torch.ones(size // 4)
        session = gf.Session(model, [[1, 2, 3, 4]], gf.Greedy(), room=160)
        session.step()
        took = best(lambda session=session: [session.step() for _ in range(128)])
        read = min(best(buffer.sum) for _ in range(TURNS))
        print(f"step {name:>9}: {128 / took:6.1f} tokens/s, {size / 1e6:6.0f} MB, share of the memory limit {read * 128 / took:.2f}", flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    asked.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    asked.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked.add_argument("--step", action="store_true", help="whole steps, and no single products")
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    if not native.wait():
        print("no compiled code here: what follows is torch alone")
    with torch.no_grad():
        (steps if given.step else lambda types: products(given.rows, types))(given.types)


if __name__ == "__main__":
    main()
