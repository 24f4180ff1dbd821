"""What few bits cost and save: memory and speed of float32, bfloat16, int8 and int4.

    python benchmarks/quantised.py                          a GPT-2-124M shape with random weights, on the best device there is
    python benchmarks/quantised.py --model FOLDER           a checkpoint
    python benchmarks/quantised.py --only int8 --tokens 32  one row

Weights: bytes of all parameters, as the model says and as they are held. Peak: memory of the process (of the GPU, where there is one)
above what it was before the checkpoint was loaded; random weights are made in float32 first, so of them it says nothing.
Tokens per second: a prompt read at once, and one row written token by token with a cache. Error: of the logits of the prompt
against float32, in standard deviations of the logits. Each row runs in a process of its own, because peak memory is a property of a process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from glassformer import preset, weights
from glassformer.core.numerics import devices
from glassformer.models.anatomy import bytes_of

KINDS = ("float32", "bfloat16", "int8", "int4")


def made(name: str | None, kind: str, device: str) -> Any:
    """The model in that type; the same numbers before they are rounded."""
    quantised = kind in ("int8", "int4")
    dtype = ("bfloat16" if device == "cuda" or kind == "int4" else "float32") if quantised else kind
    if name is not None:
        return weights.open(name).load(dtype=dtype, device=device, quantise=kind if quantised else None)[0]
    model = preset("gpt2").build(seed=0).to(device, getattr(torch, dtype)).eval()
    return weights.quantise(model, kind) if quantised else model


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(run: Any, device: str) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


@torch.no_grad()
def once(name: str | None, kind: str, device: str, prompt: int, tokens: int) -> dict[str, Any]:
    """One row."""
    before = peak(device)
    model = made(name, kind, device)
    after = peak(device) - before
    ids = torch.randint(model.spec.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    cache = model.cache(batch=1, capacity=prompt + tokens, rewind=tokens)
    first = model(ids, cache=cache, keep=1)[:, -1].argmax(-1, keepdim=True)

    def write() -> None:
        last = first
        for _ in range(tokens):
            last = model(last, cache=cache, keep=1)[:, -1].argmax(-1, keepdim=True)
        cache.rewind(tokens)

    read = seconds(lambda: model(ids, keep=1), device)
    written = seconds(write, device)
    row = {"weights": model.bytes().weights, "held": sum(bytes_of(x) for x in model.parameters()), "peak": after}
    row |= {"read": prompt / read, "written": tokens / written}
    logits = model(ids).float().cpu()
    del model
    exact = made(name, "float32", device)(ids).float().cpu()
    return row | {"error": float((logits - exact).pow(2).mean().sqrt() / exact.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default random weights in the shape of GPT-2")
    parser.add_argument("--device", default=devices()[0])
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.model, args.only, args.device, args.prompt, args.tokens)))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{args.model or 'GPT-2 124M shape, random weights'}; prompt of {args.prompt} tokens, {args.tokens} written, one row\n")
    print("| type | weights, MB | peak above the start, MB | tokens/s read | tokens/s written | error of logits |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in (args.only,) if args.only else KINDS:
        command = [sys.executable, __file__, "--once", "--only", kind, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {kind} | {done.stderr.strip().splitlines()[-1]} |")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        assert row["weights"] == row["held"], "model.bytes() says something else than what is held"
        above = f"{row['peak'] / 1e6:,.1f}" if args.model else "–"
        print(f"| {kind} | {row['weights'] / 1e6:,.1f} | {above} | {row['read']:,.0f} | {row['written']:,.1f} | {row['error']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
