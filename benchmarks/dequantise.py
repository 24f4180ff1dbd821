"""Unpacking quantised numbers: gigabytes of float32 a second for every type, ours and the reference's in the same run.

    python benchmarks/dequantise.py [--megabytes 64] [--threads 2]

Then one layer both ways: a matrix of 4096 x 4096 held in float32 and held packed, for one token and for 64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gguf
import torch
from torch import nn

from glassformer.core.blocks import FORMATS, UNPACK, dequantise
from glassformer.parts.packed import PackedLinear, Piece


def best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs: what others do on the machine only adds."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def types(megabytes: int) -> None:
    """Every type on random bytes with scales of one."""
    print(f"{'type':<8} {'bits':>5} {'GB/s':>7} {'gguf':>7} {'times':>6}")
    rows = 256
    for name in UNPACK:
        form = FORMATS[name]
        per_row = max(1, megabytes * 10**6 // 4 // form.numbers // rows)
        raw = torch.randint(0, 60, (rows, per_row * form.bytes), dtype=torch.uint8)  # small bytes: no scale is infinite
        size = 4 * rows * per_row * form.numbers / 1e9
        ours = size / best(lambda raw=raw, name=name: dequantise(raw, name))  # type: ignore[misc]
        theirs = size / best(lambda raw=raw, name=name: gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]), 2)  # type: ignore[misc]
        print(f"{name:<8} {8 * form.bytes / form.numbers:>5.2f} {ours:>7.2f} {theirs:>7.2f} {ours / theirs:>6.1f}")


def layers() -> None:
    """Memory and time of a linear layer, dense and packed."""
    print(f"\n{'held as':<8} {'MB':>7} {'1 token, ms':>12} {'64 tokens, ms':>14}")
    n = 4096
    dense = nn.Linear(n, n, bias=False)
    with torch.no_grad():
        for name in ("F32", "Q8_0", "Q6_K", "Q4_K", "Q4_0"):
            form = FORMATS[name]
            raw = torch.randint(0, 60, (n, n // form.numbers * form.bytes), dtype=torch.uint8)
            layer = dense if name == "F32" else PackedLinear([Piece(raw, name)])
            taken = [1e3 * best(lambda layer=layer, x=x: layer(x)) for x in (torch.randn(1, n), torch.randn(64, n))]  # type: ignore[misc]
            print(f"{name:<8} {raw.numel() / 1e6:>7.1f} {taken[0]:>12.1f} {taken[1]:>14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    types(options.megabytes)
    layers()


if __name__ == "__main__":
    main()
