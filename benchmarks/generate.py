"""Generation on a CPU: a GPT-2 124M shape with random weights, beside llama.cpp and transformers, in one run.

    python benchmarks/generate.py                      everything
    python benchmarks/generate.py --only decode        decode | context | prefill | batch
    python benchmarks/generate.py --turns 5 --json out.json

All contenders stand in one process with the same weights and take turns; a figure is the median of the turns, with the least and the largest in
brackets, a ratio the median of the turns' ratios. The memory limit is how often all weights could be read in a second by compiled code that does
nothing else, measured before and after in the same run. llama.cpp comes through llama-cpp-python and transformers from its package; whichever is
not installed is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # as the command line does
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")

import numpy as np
import torch

import glassformer as gf

THREADS = os.cpu_count() or 1
PROMPT = [(7 * i) % 50_000 for i in range(16)]
LONG = [(11 * i) % 50_000 for i in range(880)]
NEW = 128
TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}

Turn = Callable[[], float]


# The contenders


class Ours:
    """One glassformer model in one form of weights."""

    def __init__(self, folder: Path, weights: str):
        self.model = gf.load(folder, weights=weights).model

    def decode(self, prompt: list[int], new: int) -> float:
        session = gf.Session(self.model, [prompt], gf.Greedy(), room=new + 1)
        session.step()
        begun = time.perf_counter()
        for _ in range(new):
            session.step()
        return new / (time.perf_counter() - begun)

    def prefill(self, tokens: int) -> float:
        ids = torch.arange(tokens)[None] % 50_000
        begun = time.perf_counter()
        with torch.no_grad():
            self.model(ids, cache=self.model.cache(batch=1, capacity=tokens + 1), keep=1)
        return tokens / (time.perf_counter() - begun)

    def batch(self, rows: int, new: int) -> float:
        engine = gf.Engine(self.model, slots=rows, capacity=256, prefix=False)
        tickets = [engine.submit(gf.Request([i + 1, *PROMPT], max_new_tokens=new + 1)) for i in range(rows)]
        while engine.stats().tokens < rows:
            engine.step()
        begun, before = time.perf_counter(), engine.stats().tokens
        while engine.step():
            pass
        made = engine.stats().tokens - before
        assert all(len(t.result().ids) == new + 1 for t in tickets)
        return float(made / (time.perf_counter() - begun))


class LlamaCpp:
    """One GGUF file in llama.cpp."""

    def __init__(self, file: Path):
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        self.vocab = 50_257

    def context(self, tokens: int, rows: int = 1) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = rows, THREADS, THREADS
        return self.lib.llama_init_from_model(self.model, params)

    def run(self, context: Any, batch: Any, ids: list[int], places: list[int], rows: list[int], asked: Callable[[int], bool]) -> None:
        batch.n_tokens = len(ids)
        for i, (token, place, row) in enumerate(zip(ids, places, rows, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, asked(i)
            batch.seq_id[i][0] = row
        if self.lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(self, context: Any, i: int) -> int:
        pointer = self.lib.llama_get_logits_ith(context, i)
        return int(np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,)).argmax())

    def read(self, context: Any, batch: Any, ids: list[int]) -> None:
        for at in range(0, len(ids), 512):
            part = ids[at : at + 512]
            self.run(context, batch, part, list(range(at, at + len(part))), [0] * len(part), partial(operator.eq, len(part) - 1))

    def decode(self, prompt: list[int], new: int) -> float:
        context, batch = self.context(len(prompt) + new + 8), self.lib.llama_batch_init(512, 0, 1)
        self.read(context, batch, prompt)
        token = self.best(context, -1)
        begun = time.perf_counter()
        for n in range(new):
            self.run(context, batch, [token], [len(prompt) + n], [0], lambda i: True)
            token = self.best(context, -1)
        took = time.perf_counter() - begun
        self.close(context, batch)
        return new / took

    def prefill(self, tokens: int) -> float:
        context, batch = self.context(tokens + 8), self.lib.llama_batch_init(512, 0, 1)
        begun = time.perf_counter()
        self.read(context, batch, [i % 50_000 for i in range(tokens)])
        self.best(context, -1)
        took = time.perf_counter() - begun
        self.close(context, batch)
        return tokens / took

    def batch(self, rows: int, new: int) -> float:
        context, batch = self.context(256 * rows, rows), self.lib.llama_batch_init(512, 0, 1)
        prompts = [[i + 1, *PROMPT] for i in range(rows)]
        ends, flat = [], []
        for row, ids in enumerate(prompts):
            flat += [(t, p, row) for p, t in enumerate(ids)]
            ends.append(len(flat) - 1)
        self.run(context, batch, [f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat], lambda i: i in ends)
        tokens = [self.best(context, i) for i in ends]
        begun = time.perf_counter()
        for n in range(new):
            self.run(context, batch, tokens, [len(PROMPT) + 1 + n] * rows, list(range(rows)), lambda i: True)
            tokens = [self.best(context, i) for i in range(rows)]
        took = time.perf_counter() - begun
        self.close(context, batch)
        return rows * new / took

    def close(self, context: Any, batch: Any) -> None:
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)


class Transformers:
    """The same weights in transformers' GPT-2."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import GPT2LMHeadModel

        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def _steps(self, ids: torch.Tensor, new: int) -> float:
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        begun = time.perf_counter()
        for _ in range(new):
            out = self.model(token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        return ids.shape[0] * new / (time.perf_counter() - begun)

    def decode(self, prompt: list[int], new: int) -> float:
        return self._steps(torch.tensor([prompt]), new)

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        ids = torch.arange(tokens)[None] % 50_000
        begun = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1)
        return tokens / (time.perf_counter() - begun)

    def batch(self, rows: int, new: int) -> float:
        return self._steps(torch.tensor([[i + 1, *PROMPT] for i in range(rows)]), new)


def contenders(place: Path) -> Iterator[tuple[str, str, Any]]:
    """(who, weights, contender), each made from one random model."""
    model = gf.preset("gpt2").build(seed=0)
    gf.save(model, place / "own")
    for weights in TYPES:
        yield "glassformer", weights, Ours(place / "own", weights)
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python is not installed: left out", file=sys.stderr)
    else:
        for weights, kind in TYPES.items():
            yield "llama.cpp", weights, LlamaCpp(gf.weights.export_gguf(model, place / f"{kind}.gguf", kind))
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
    else:
        gf.weights.export_hf(model, place / "hub")
        for weights in ("float32", "bfloat16"):
            yield "transformers", weights, Transformers(place / "hub", getattr(torch, weights))


# The measurements


READ = """
#include <stddef.h>
float total(const float *x, ptrdiff_t n, int threads) {
    float s = 0;
#pragma omp parallel for simd reduction(+:s) num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < n; ++i) s += x[i];
    return s;
}
"""


def bandwidth(folder: Path) -> float:
    """Bytes a second that all cores read together: the median of 15 sums over 512 MB in compiled code (0.0: no C compiler is here)."""
    source, made = folder / "read.c", folder / "read.so"
    source.write_text(READ)
    try:
        subprocess.run(["cc", "-Ofast", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    except (OSError, subprocess.CalledProcessError):
        print("no C compiler: the memory limit is left out", file=sys.stderr)
        return 0.0
    total = ctypes.CDLL(str(made)).total
    total.restype, total.argtypes = ctypes.c_float, [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
    x = torch.ones(128 * 2**20)
    total(x.data_ptr(), x.numel(), THREADS)
    return 4 * x.numel() / statistics.median(_timed(lambda: total(x.data_ptr(), x.numel(), THREADS)) for _ in range(15))


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(
    all_of: list[tuple[str, str, Any]], run: Callable[[Any], float], turns: int, skip: set[tuple[str, str]] = frozenset()
) -> dict[tuple[str, str], list[float]]:  # type: ignore[assignment]
    """Every contender's figures, turn by turn; the first turn is warming up and does not count."""
    found: dict[tuple[str, str], list[float]] = {(who, w): [] for who, w, _ in all_of if (who, w) not in skip}
    for turn in range(turns + 1):
        for who, weights, one in all_of:
            if (who, weights) not in skip:
                figure = run(one)
                if turn:
                    found[who, weights].append(figure)
    return found


def table(title: str, found: dict[tuple[str, str], list[float]]) -> None:
    """Tokens a second, and what ours are as a multiple of each peer at the same weights."""
    print(f"\n## {title}\n")
    names = sorted({who for who, _ in found})
    print("| weights | " + " | ".join(names) + " | ours / llama.cpp | ours / transformers |")
    print("| --- |" + " ---: |" * (len(names) + 2))
    for weights in TYPES:
        own = found["glassformer", weights]
        cells = []
        for who in names:
            x = found.get((who, weights))
            cells.append("" if not x else f"{statistics.median(x):,.0f} ({min(x):,.0f} to {max(x):,.0f})")
        for who in ("llama.cpp", "transformers"):
            x = found.get((who, weights))
            cells.append("" if not x else f"{statistics.median(map(operator.truediv, own, x)):.2f}")
        print(f"| {weights} | " + " | ".join(cells) + " |")


def limits(read: float, everyone: list[tuple[str, str, Any]], found: dict[tuple[str, str], list[float]]) -> None:
    """Our tokens a second as a share of how often all weights could be read in one."""
    if not read:
        return
    print(f"\nMemory is read at {read / 1e9:.1f} GB/s:\n\n| weights | bytes | limit, tokens/s | ours / limit |\n| --- | ---: | ---: | ---: |")
    for who, weights, one in everyone:
        if who == "glassformer":
            held = sum(x.numel() * x.element_size() for x in (*one.model.parameters(), *one.model.buffers()))
            own = statistics.median(found[who, weights])
            print(f"| {weights} | {held / 1e6:,.0f} MB | {read / held:,.0f} | {own / (read / held):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["decode", "context", "prefill", "batch"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    wanted = given.only or ["decode", "context", "prefill", "batch"]
    torch.set_num_threads(THREADS)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        everyone = list(contenders(Path(folder)))
        print(f"{THREADS} threads, torch {torch.__version__}")
        for name, title, run in (
            ("decode", f"Decode, batch 1, {NEW} tokens after {len(PROMPT)}: tokens/s", lambda one: one.decode(PROMPT, NEW)),
            ("context", f"Decode, batch 1, {NEW} tokens after {len(LONG)}: tokens/s", lambda one: one.decode(LONG, NEW)),
            ("prefill", "Prefill of 512 tokens: tokens/s", lambda one: one.prefill(512)),
            ("batch", "16 requests at once, 64 tokens each: tokens/s in all", lambda one: one.batch(16, 64)),
        ):
            if name in wanted:
                reads = [bandwidth(Path(folder))] if name == "decode" else []
                found = measure(everyone, run, given.turns)
                table(title, found)
                if reads:
                    reads.append(bandwidth(Path(folder)))  # before and after: neighbours come and go
                    limits(statistics.mean(reads), everyone, found)
                    kept["read_bytes_a_second"] = reads
                kept[name] = {f"{who} {w}": x for (who, w), x in found.items()}
    if given.json:
        given.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
