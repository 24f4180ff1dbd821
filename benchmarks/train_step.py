"""Training step: glassformer against transformers' GPT2LMHeadModel and x-transformers, same shape, fused AdamW.

    python benchmarks/train_step.py                    all shapes, every contender in each of its modes
    python benchmarks/train_step.py --shape small      one shape

The contenders take turns, one step each, in one process; the figure is the median over the rounds, with the
spread (10th to 90th percentile). Data are random tokens: the work does not depend on them. A mode is a
number format (fp32, bf16 by autocast) and eager or compiled; the best mode of each contender counts.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from glassformer.train.speed import compiled as trainers_compiled


@dataclass(frozen=True)
class Shape:
    layers: int
    d: int
    heads: int
    context: int
    batch: int
    vocab: int
    rounds: int


SHAPES = {
    "smallest": Shape(4, 128, 4, 64, 12, 65, 200),
    "small": Shape(6, 384, 6, 256, 16, 65, 15),
    "gpt2": Shape(12, 768, 12, 512, 2, 50_257, 9),
}


def ours(s: Shape) -> tuple[torch.nn.Module, Callable[[Any, Any, Any], torch.Tensor]]:
    from glassformer.models.presets import gpt2
    from glassformer.parts.position import Learned
    from glassformer.tasks import Batch, NextToken

    model = gpt2(s.layers, s.d, s.heads).replace(vocab_size=s.vocab, position=Learned(s.context)).build(seed=0)
    task = NextToken()

    def loss(model: Any, tokens: Any, _: Any) -> torch.Tensor:
        return task.loss(model, Batch(tokens)).mean

    return model, loss


def hugging(s: Shape) -> tuple[torch.nn.Module, Callable[[Any, Any, Any], torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=s.vocab, n_positions=s.context, n_embd=s.d, n_layer=s.layers, n_head=s.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False
    )
    model = GPT2LMHeadModel(config)

    def loss(model: Any, tokens: Any, _: Any) -> torch.Tensor:
        logits = model(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss


def lucid(s: Shape) -> tuple[torch.nn.Module, Callable[[Any, Any, Any], torch.Tensor]]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=s.d, depth=s.layers, heads=s.heads, attn_dim_head=s.d // s.heads, attn_flash=True)
    model = TransformerWrapper(num_tokens=s.vocab, max_seq_len=s.context, tie_embedding=True, attn_layers=layers)

    def loss(model: Any, tokens: Any, _: Any) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss


CONTENDERS = {"glassformer": ours, "transformers": hugging, "x-transformers": lucid}


class Runner:
    """One contender in one mode: a model of its own, an optimiser, a step."""

    def __init__(self, name: str, shape: Shape, bf16: bool, compiled: bool):
        torch.manual_seed(0)
        self.model, loss = CONTENDERS[name](shape)
        self.model.train()
        self.loss = loss
        if compiled:  # ours as its trainer does it
            self.loss = trainers_compiled(loss, torch.device("cpu"))[0] if name == "glassformer" else torch.compile(loss, dynamic=False)
        self.bf16 = bf16
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.times: list[float] = []

    def step(self, tokens: torch.Tensor) -> float:
        begin = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, tokens, None)
        loss.backward()
        self.optimiser.step()
        value = float(loss)
        self.times.append(time.perf_counter() - begin)
        return value


def measure(shape: Shape, names: list[str], modes: list[tuple[bool, bool]], rounds: int) -> list[dict[str, Any]]:
    """Interleaved steps; a row per contender and mode."""
    tokens = torch.randint(shape.vocab, (shape.batch, shape.context + 1), generator=torch.Generator().manual_seed(0))
    runners: dict[tuple[str, bool, bool], Runner] = {}
    for bf16, compiled in modes:
        for name in names:
            torch._dynamo.reset()
            try:
                runners[name, bf16, compiled] = r = Runner(name, shape, bf16, compiled)
                r.step(tokens), r.step(tokens)
                r.times.clear()
            except Exception as error:  # a mode that a contender cannot run is reported, not hidden
                print(f"{name} bf16={bf16} compiled={compiled}: {type(error).__name__}: {str(error)[:200]}")
                runners.pop((name, bf16, compiled), None)
    for _ in range(rounds):
        for r in runners.values():
            r.step(tokens)
    rows = []
    parameters = {n: sum(p.numel() for p in r.model.parameters()) for (n, _, _), r in runners.items()}
    for (name, bf16, compiled), r in runners.items():
        t = sorted(r.times)
        median = statistics.median(t)
        count = shape.batch * shape.context
        flops = _flops(shape) * count
        rows.append(
            {
                "contender": name,
                "format": "bf16" if bf16 else "fp32",
                "mode": "compiled" if compiled else "eager",
                "tokens_per_second": count / median,
                "p10": count / t[int(0.9 * (len(t) - 1))],
                "p90": count / t[int(0.1 * (len(t) - 1))],
                "gflops": flops / median / 1e9,
                "parameters": parameters[name],
            }
        )
    return rows


def _flops(s: Shape) -> int:
    """Operations of a training step per token: three forwards of the shape's matrices and attention."""
    from glassformer.models.presets import gpt2

    return 3 * gpt2(s.layers, s.d, s.heads).replace(vocab_size=s.vocab).build(device="meta").flops_per_token(s.context)


def table(rows: list[dict[str, Any]]) -> str:
    best = {n: max((r for r in rows if r["contender"] == n), key=lambda r: r["tokens_per_second"]) for n in {r["contender"] for r in rows}}
    lines = ["| contender | format | mode | tokens/s (p10 to p90) | GFLOP/s |", "|---|---|---|---:|---:|"]
    for r in rows:
        mark = " *" if r is best[r["contender"]] else ""
        lines.append(
            f"| {r['contender']} | {r['format']} | {r['mode']}{mark} | {r['tokens_per_second']:,.0f} ({r['p10']:,.0f} to {r['p90']:,.0f}) | {r['gflops']:.0f} |"
        )
    if "glassformer" in best:
        own = best["glassformer"]["tokens_per_second"]
        for n, r in best.items():
            if n != "glassformer":
                lines.append(f"\nglassformer / {n}, each at its best: {own / r['tokens_per_second']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--contender", choices=list(CONTENDERS), action="append")
    parser.add_argument("--format", choices=["fp32", "bf16"], action="append")
    parser.add_argument("--mode", choices=["eager", "compiled"], action="append")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    names = args.contender or list(CONTENDERS)
    modes = [(f == "bf16", m == "compiled") for f in args.format or ["fp32", "bf16"] for m in args.mode or ["eager", "compiled"]]
    import transformers
    import x_transformers

    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"transformers {transformers.__version__}, x-transformers {getattr(x_transformers, '__version__', '?')}")
    found: dict[str, Any] = {}
    for key in args.shape or list(SHAPES):
        shape = SHAPES[key]
        print(
            f"\n### {key}: {shape.layers} layers, {shape.d} wide, {shape.heads} heads, context {shape.context}, batch {shape.batch}, vocabulary {shape.vocab}\n"
        )
        found[key] = measure(shape, names, modes, args.rounds or shape.rounds)
        print(table(found[key]), flush=True)
        gc.collect()
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
