"""How should torch's threads wait for each other: spinning, asleep (OMP_WAIT_POLICY=PASSIVE), or spinning for a moment first?

Small training steps on all cores, alone and beside as many busy processes as there are cores. Spinning threads keep the
core from the very thread that they wait for. ``python benchmarks/waiting_threads.py``
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

SECONDS = 4.0
BATCH, CONTEXT = 16, 64


def measure() -> float:
    """Tokens per second of a training step of the tiny preset."""
    import torch

    import glassformer as gf

    model = gf.preset("tiny", vocab_size=65).build(seed=0)
    optimisers = gf.AdamW().build(model)
    batch = gf.Batch(torch.randint(65, (BATCH, CONTEXT + 1)))

    def step() -> None:
        gf.NextToken().loss(model, batch).mean.backward()
        optimisers.step()
        optimisers.zero_grad()

    step()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        step()
        steps += 1
    return steps * BATCH * CONTEXT / (time.perf_counter() - begin)


WAYS = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "10,000 spins, then asleep": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
}
ROUNDS = 5


def in_process(way: dict[str, str]) -> float:
    """The same in a fresh process, where the policy is read."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | way
    return float(subprocess.run([sys.executable, __file__, "measure"], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    cores = os.cpu_count() or 1
    print(f"{cores} cores; tokens per second")
    for others in (0, cores):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            found = [{name: in_process(way) for name, way in WAYS.items()} for _ in range(ROUNDS)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        print(f"beside {others} busy processes, median of {ROUNDS} (lowest to highest):")
        for name in WAYS:
            rates = sorted(round_[name] for round_ in found)
            print(f"    {name:26} {statistics.median(rates):8,.0f}  ({rates[0]:,.0f} to {rates[-1]:,.0f})")


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(measure())
    else:
        main()
