"""What the sampler costs: every link alone, chains of eight, and the trace, beside the decode step that they follow.

    python benchmarks/sampler.py                 (16, 50,257) logits of the usual shape; a GPT-2-124M of random weights at batch 16
    python benchmarks/sampler.py --rows 1 --no-model
    python benchmarks/sampler.py --busy          (one thread, by its processor time: for a machine that others use too)

Times are the least and the median of many calls, in milliseconds: on a shared machine the least is what the work takes. A chain draws through its own pass
(``chain(logits, history, state)``) and goes on from step to step; a step is ``Session.step`` with a prompt of 128 tokens in the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import glassformer as gf
from glassformer.infer import Chain, Link, Session, build_chain

V = 50257


def logits_like_a_model_s(rows: int, seed: int = 0) -> torch.Tensor:
    """Most tokens far down, some hundreds that count: about what a trained model says (entropy near 3.5 nats)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, V, generator=draw) * 2.2 - 60
    strong = torch.randint(V, (rows, 400), generator=draw)
    return x.scatter_add(1, strong, torch.rand(rows, 400, generator=draw) ** 4 * 14 + 4)


clock = time.perf_counter


def milliseconds(call: Callable[[], Any], seconds: float = 1.5, least: int = 8) -> tuple[float, float]:
    """The least and the median time of a call."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        start = clock()
        call()
        times.append(1e3 * (clock() - start))
    return min(times), statistics.median(times)


def show(name: str, times: tuple[float, float], beside: str = "") -> None:
    print(f"{name:58} {times[0]:8.2f} {times[1]:8.2f}  {beside}", flush=True)


LINKS: tuple[Link, ...] = (
    gf.Penalties(1.1),
    gf.Penalties(1.1, 0.1, 0.1, window=64),
    gf.DRY(0.8),
    gf.NoRepeatNGram(3),
    gf.Temperature(0.8),
    gf.DynamicTemperature(0.8, 0.3),
    gf.TopNSigma(2.0),
    gf.TopK(40),
    gf.Typical(0.95),
    gf.TopP(0.95),
    gf.MinP(0.05),
    gf.TopA(0.2),
    gf.TopH(0.4),
    gf.Epsilon(3e-4),
    gf.Eta(3e-4),
    gf.XTC(0.5, 0.1),
    gf.Mirostat1(),
    gf.Mirostat2(),
)

MILD = {"repetition_penalty": 1.1, "dry_multiplier": 0.8, "top_n_sigma": 10.0, "typical_p": 0.98, "top_p": 0.97, "min_p": 1e-4, "xtc_probability": 0.5}


def chains() -> dict[str, Chain]:
    """What people run, and what costs most: filters that see the whole vocabulary, one after the other."""
    usual: dict[str, Any] = MILD | {"top_n_sigma": 2.0, "temperature": 0.8, "seed": 0}
    return {
        "llama.cpp's order, nine links, top-k 40": build_chain(**usual, top_k=40, order="llama.cpp"),
        "the same without top-k": build_chain(**usual, order="llama.cpp"),
        "the same, filters too mild to remove much": build_chain(**(usual | MILD), order="llama.cpp"),
        "transformers' order, top-k 50": build_chain(**usual, top_k=50, order="hf"),
        "transformers' order, without top-k": build_chain(**usual, order="hf"),
        "temperature, top-p": build_chain(temperature=0.8, top_p=0.95, seed=0),
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("--rows", type=int, default=16)
    asked.add_argument("--history", type=int, default=256)
    asked.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    asked.add_argument("--rounds", type=int, default=40, help="steps of each session")
    asked.add_argument("--no-model", action="store_true", help="no decode step to compare with")
    asked.add_argument("--no-links", action="store_true", help="chains only")
    asked.add_argument("--busy", action="store_true", help="one thread, measured by its own processor time")
    given = asked.parse_args()
    if given.busy:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    logits = logits_like_a_model_s(given.rows)
    history = torch.randint(V, (given.rows, given.history), generator=torch.Generator().manual_seed(1))
    print(f"{torch.get_num_threads()} threads, logits ({given.rows}, {V})\n{'':58} {'least':>8} {'median':>8}  ms")

    def time_chain(chain: Chain, watched: bool = False) -> tuple[float, float]:
        state = chain.state(given.rows)
        return milliseconds(lambda: chain(logits, history, state, [] if watched else None), given.seconds)

    if not given.no_links:
        nothing = time_chain(Chain((gf.Greedy(),)))
        show("Greedy", nothing)
        show("Draw", time_chain(Chain((gf.Draw(0),))))
        for link in LINKS:
            show(f"{link!r} | Greedy"[:57], time_chain(link | gf.Greedy()))
    for name, chain in chains().items():
        show(name, time_chain(chain))
    if not given.no_model:
        decode(given.rows, given.rounds)


def decode(rows: int, rounds: int) -> None:
    """A decode step of a GPT-2 of 124M random weights with a greedy choice, and what chains and traces add to it.

    All sessions take their steps in turns, and a ratio is the median of the turns' ratios: what else the machine does meets all alike.
    """
    model = gf.preset("gpt2").build(seed=0).eval()
    # Of random weights everything is as probable as everything: spread what is said, as a trained model does.
    with torch.no_grad():
        model.embed.weight.mul_(4)
    prompt = torch.randint(V, (rows, 128), generator=torch.Generator().manual_seed(2)).tolist()
    sessions = {
        (name, trace): Session(model, prompt, chain, room=rounds + 4, trace=trace)
        for name, chain in {"greedy": Chain((gf.Greedy(),)), **chains()}.items()
        for trace in (0, 10)
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for turn in range(rounds + 3):
        for key, session in sessions.items():
            start = clock()
            session.step()
            if turn >= 3:
                times[key].append(1e3 * (clock() - start))

    def ratio(one: tuple[str, int], other: tuple[str, int]) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    for name in {name: 0 for name, _ in sessions}:
        beside = "" if name == "greedy" else f"{100 * (ratio((name, 0), ('greedy', 0)) - 1):5.1f} % more than a greedy step"
        show(f"a step, {name}", (min(times[name, 0]), statistics.median(times[name, 0])), beside)
        show("  with a trace", (min(times[name, 10]), statistics.median(times[name, 10])), f"{ratio((name, 10), (name, 0)):.2f} x")


if __name__ == "__main__":
    main()
