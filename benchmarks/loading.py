"""Opening and loading checkpoints: seconds, GB/s, and memory at its highest.

    python benchmarks/loading.py [--megabytes 500]

A Llama-shaped folder of that size in float32 is written to a temporary place and read once, so that it is in the file cache.
Opened (headers only) and loaded by glassformer, transformers and safetensors' own ``load_file``, each in a process of its own that has
imported its library and torch before the clock starts; memory is the growth of the process's highest resident set over what it was
before loading, divided by the size of the model. Beside it a sparse file with the headers of a 14 GB model, opened but never read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from glassformer.models.presets import llama
from glassformer.parts.rotary import Rotary
from glassformer.weights import export_hf

CHILD = """
import sys, time, json
what, folder = sys.argv[1:]
import torch
def highest():  # of this process alone: getrusage would carry over its parent's
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))
if what.startswith("glassformer"):
    from glassformer import weights
    if what != "glassformer-open":
        weights.open(folder).plan  # what is loaded lazily is loaded before the clock starts
elif what == "transformers":
    import transformers
    from transformers import LlamaForCausalLM
else:
    from safetensors.torch import load_file
before = highest()
begin = time.perf_counter()
if what == "glassformer-open":
    opened = weights.open(folder); opened.plan
elif what == "glassformer":
    model, report = weights.open(folder).load()
elif what == "glassformer-bf16":
    model, report = weights.open(folder).load(dtype="bf16")
elif what == "transformers":
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sum(float(p.detach().view(-1)[::1024].sum()) for p in model.parameters())  # what is mapped only is not loaded yet: touch each page
else:
    tensors = load_file(folder + "/model.safetensors")
    sum(float(p.view(-1)[::1024].sum()) for p in tensors.values())
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "grown": highest() - before}))
"""


def run(what: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, what, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def hollow(folder: Path) -> None:
    """A folder with the headers of a Llama-2-7B in bfloat16 and nothing behind them (a sparse file)."""
    model = llama(32_000, 4_096, 32, 32, 32, 11_008, Rotary()).build(device="meta", dtype="bf16")
    from glassformer.weights import assign
    from glassformer.weights.family import family_for

    family, config = family_for(model.spec)
    header, at = {}, 0
    for name, x in assign.theirs(model, family):
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [at, at + 2 * x.numel()]}
        at += 2 * x.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--megabytes", type=int, default=500)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}, medians of {given.rounds}")
    with tempfile.TemporaryDirectory() as at:
        folder, empty = Path(at) / "real", Path(at) / "hollow"
        empty.mkdir()
        hollow(empty)
        layers = max(1, round((given.megabytes * 1e6 / 4 - 2 * 32_000 * 768) / (4 * 768 * 768 + 3 * 768 * 2_048)))
        model = llama(32_000, 768, layers, 12, 12, 2_048, Rotary()).build(seed=0)
        size = 4 * model.params().total
        export_hf(model, folder)
        del model
        (folder / "model.safetensors").read_bytes()
        print(f"\n| work | seconds | GB/s | memory / model ({size / 1e6:.0f} MB) |\n|---|---:|---:|---:|")
        whats = ("glassformer-open", "glassformer", "glassformer-bf16", "transformers", "safetensors")
        runs = {what: [run(what, folder) for _ in range(given.rounds)] for what in whats}
        runs["glassformer-open, 14 GB"] = [run("glassformer-open", empty) for _ in range(given.rounds)]
        for what, found in runs.items():
            seconds = statistics.median(f["seconds"] for f in found)
            memory = max(f["grown"] for f in found) / size
            rate = "" if "open" in what else f"{size / 1e9 / seconds:.2f}"
            print(f"| {what} | {seconds:.3f} | {rate} | {memory:.2f} |", flush=True)
        ours, theirs = (statistics.median(f["seconds"] for f in runs[w]) for w in ("glassformer", "transformers"))
        print(f"\nloading: {theirs / ours:.2f} x transformers")


if __name__ == "__main__":
    main()
