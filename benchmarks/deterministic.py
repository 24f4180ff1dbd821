"""What deterministic mode costs on a CPU: a decode step, steps of several rows, and a prompt of 512 tokens, with and without it.

    python benchmarks/deterministic.py                      GPT-2 124M shape, float32 and bfloat16
    python benchmarks/deterministic.py --layers 2 --turns 5 --json out.json

One process, the same weights, both ways in turns; a figure is the median of the turns, a ratio that of two medians. Says too whether the bits
without the mode differ here between a row alone and the same row in the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # as the command line does
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")

import torch

import glassformer as gf
from glassformer.core import native

WIDTH, HEADS, VOCABULARY = 768, 12, 50_257


def build(dtype: str, layers: int) -> Any:
    """The shape of GPT-2 with random weights."""
    block = gf.Block(gf.Attention(HEADS, qkv_bias=True, out_bias=True), gf.Plain(4 * WIDTH, act="gelu_tanh", bias=True))
    spec = gf.Decoder(VOCABULARY, WIDTH, (block,) * layers, final_norm=gf.LayerNorm(), tied=True, position=gf.Learned(2_048))
    return spec.build(seed=0, dtype=dtype).eval()


def once(model: Any, tokens: torch.Tensor, context: int, steady: bool) -> tuple[float, torch.Tensor]:
    """Seconds of one call of ``tokens`` after ``context`` others, and its logits."""
    with torch.no_grad(), gf.deterministic(steady):
        cache = model.cache(len(tokens), context + tokens.shape[1])
        if context:
            model(torch.full((len(tokens), context), 7), cache=cache, keep=1)
        begin = time.perf_counter()
        logits = model(tokens, cache=cache, keep=1)
        return time.perf_counter() - begin, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json")
    asked = parser.parse_args()
    native.wait()
    found: list[dict[str, Any]] = []
    print(f"{torch.get_num_threads()} threads, compiled code: {native.library() is not None}, {asked.layers} layers, medians of {asked.turns} turns")
    print(f"{'':36}{'without':>10}{'with':>10}{'ratio':>8}   bits without")
    for dtype in ("float32", "bfloat16"):
        model = build(dtype, asked.layers)
        for name, rows, new, context in (
            ("a token after 128", 1, 1, 128),
            ("a token after 1,000", 1, 1, 1000),
            ("a token for each of 16 rows", 16, 1, 128),
            ("a token for each of 32 rows", 32, 1, 128),
            ("a prompt of 512 tokens", 1, 512, 0),
        ):
            tokens = torch.randint(VOCABULARY, (rows, new), generator=torch.Generator().manual_seed(1))
            turns = asked.turns if context <= 128 and rows == 1 else max(3, asked.turns // 3)
            times: dict[bool, list[float]] = {False: [], True: []}
            logits: dict[bool, torch.Tensor] = {}
            for _ in range(turns):
                for steady in times:
                    seconds, logits[steady] = once(model, tokens, context, steady)
                    times[steady].append(seconds)
            alone = {steady: once(model, tokens[:1], context, steady)[1] for steady in times} if rows > 1 else logits
            assert torch.equal(alone[True][0], logits[True][0])
            same = torch.equal(alone[False][0], logits[False][0])
            a, b = (statistics.median(times[s]) * 1e3 for s in (False, True))
            note = "" if rows == 1 else "the same" if same else "differ"
            print(f"{dtype + ', ' + name:36}{a:>8.1f}ms{b:>8.1f}ms{b / a:>8.2f}   {note}", flush=True)
            found.append({"dtype": dtype, "what": name, "without_ms": a, "with_ms": b, "ratio": b / a, "same_without": same if rows > 1 else None})
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
