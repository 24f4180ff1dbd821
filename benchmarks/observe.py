"""What observation costs: sites that nobody looks at, and a record of every site.

    python benchmarks/observe.py

Unobserved: the forward pass as it is, against the same pass with ``Pass.see`` and ``Pass.offer`` taken out, taking turns.
A call of ``see`` is also timed by itself, so that the share can be computed as well as measured (it is below the noise).
Everything recorded: a GPT-2-124M-shaped forward of 16 rows of 256 tokens, plain and with ``Record("**")``, and with all patterns only.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import resource
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable

import torch

from glassformer import Record, preset
from glassformer.core.flow import Pass
from glassformer.core.sites import RESID_PRE
from glassformer.models.presets import gpt2
from glassformer.parts.position import Learned


def unobserved(rounds: int) -> None:
    see, offer, edits = Pass.see, Pass.offer, Pass.edits
    print("\n| shape | see calls | ns a call | share, computed | time with / without sites, measured (quartiles) |")
    print("|---|---:|---:|---:|---:|")
    for label, layers, d, heads, b, t, n in (
        ("4 x 128, 12 x 64 tokens", 4, 128, 4, 12, 64, rounds),
        ("12 x 768, 1 x 64 tokens", 12, 768, 12, 1, 64, rounds // 4),
    ):
        model = gpt2(layers, d, heads).replace(vocab_size=65, position=Learned(t)).build(seed=0).eval()
        tokens = torch.randint(65, (b, t))
        calls = _count_calls(model, tokens)
        times: dict[str, list[float]] = {"with": [], "without": []}
        with torch.no_grad():
            for i in range(2 * n):
                which = "with" if i % 2 else "without"
                if which == "without":
                    Pass.see, Pass.offer, Pass.edits = (lambda self, site, x: x), (lambda self, site, c: None), (lambda self, site: False)  # type: ignore[method-assign]
                begin = time.perf_counter()
                model(tokens)
                times[which].append(time.perf_counter() - begin)
                Pass.see, Pass.offer, Pass.edits = see, offer, edits  # type: ignore[method-assign]
        ns = _see_ns()
        ratios = sorted(a / b for a, b in zip(times["with"], times["without"], strict=True))
        median = statistics.median(times["with"])
        print(
            f"| {label} | {calls} | {ns:.0f} | {calls * ns * 1e-9 / median:.2%} | "
            f"{statistics.median(ratios):.4f} ({ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}) |",
            flush=True,
        )


def _see_ns() -> float:
    p, x = Pass(torch.arange(1), torch.arange(1)), torch.zeros(1)
    return min(timeit.repeat(lambda: p.see(RESID_PRE, x), number=100_000, repeat=5)) / 100_000 * 1e9


def _count_calls(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    n = [0]
    originals = Pass.see, Pass.offer, Pass.edits

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(self: Pass, *args: object) -> object:
            n[0] += 1
            return original(self, *args)

        return call

    Pass.see, Pass.offer, Pass.edits = (counted(o) for o in originals)  # type: ignore[method-assign, assignment]
    model(tokens)
    Pass.see, Pass.offer, Pass.edits = originals  # type: ignore[method-assign]
    return n[0]


WHAT = {"plain": (), "all patterns": ("**.pattern",), "every site": ("**",)}


def recorded_once(what: str) -> None:
    """One measurement in a process of its own, because peak memory is a property of a process."""
    spec = preset("gpt2")
    model = spec.build(seed=0).eval()
    tokens = torch.randint(50_257, (16, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times, held = [], 0
        for _ in range(3):
            tap = Record(*WHAT[what]) if WHAT[what] else None
            begin = time.perf_counter()
            model(tokens, tap=tap)
            times.append(time.perf_counter() - begin)
            held = tap.bytes if tap is not None else 0
            n = len(tap) if tap is not None else 0
            del tap
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{min(times):.2f} {statistics.median(times):.2f} {peak / 2**20:.2f} {held / 2**30:.2f} {n}")


def recorded() -> None:
    print("\nGPT-2 124M shape, 16 x 256 tokens, float32, no gradients:\n")
    print("| recorded | sites | seconds (best, median of 3) | peak memory above the model, GiB | held by the record, GiB |")
    print("|---|---:|---:|---:|---:|")
    for what in WHAT:
        done = subprocess.run([sys.executable, __file__, "--once", what], capture_output=True, text=True, check=True)
        best, median, peak, held, n = done.stdout.split()
        print(f"| {what} | {n} | {best}, {median} | {peak} | {held} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", choices=list(WHAT))
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    if args.once:
        recorded_once(args.once)
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    unobserved(args.rounds)
    recorded()


if __name__ == "__main__":
    main()
