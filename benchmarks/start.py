"""How soon: import, help, and the first token of a 124M model from disk, each in a fresh process.

    python benchmarks/start.py

The first token is timed from the start of the process (interpreter and torch included) and from the moment that torch is imported.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORT = "import time; t = time.perf_counter(); import glassformer; print((time.perf_counter() - t) * 1e3)"
FIRST = """
import time; start = time.perf_counter()
import torch; torch_done = time.perf_counter()
import glassformer as gf
model = gf.load({folder!r}).model
out = gf.generate(model, [464, 3290], max_new_tokens=1, temperature=0)
assert len(out.ids) == 1
print(time.perf_counter() - torch_done, torch_done - start)
"""


def timed(args: list[str], n: int = 5) -> tuple[float, list[list[float]]]:
    """Median wall seconds of ``n`` runs after one warm-up, and what each printed."""
    walls, printed = [], []
    for i in range(n + 1):
        begin = time.perf_counter()
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        if i:
            walls.append(time.perf_counter() - begin)
            printed.append([float(x) for x in done.stdout.split()] if "-c" in args else [])
    return statistics.median(walls), printed


def main() -> None:
    import torch

    import glassformer as gf

    print(f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of 5\n")
    _, inside = timed([sys.executable, "-c", IMPORT])
    print(f"import glassformer (no torch): {statistics.median(x[0] for x in inside):.1f} ms")
    wall, _ = timed([sys.executable, "-m", "glassformer", "--help"])
    print(f"glassformer --help, whole process: {wall:.3f} s")
    bare, _ = timed([sys.executable, "-c", "pass"])
    print(f"(the interpreter alone: {bare:.3f} s)")
    with tempfile.TemporaryDirectory() as folder:
        gf.save(gf.preset("gpt2").build(seed=0), Path(folder))
        wall, inside = timed([sys.executable, "-c", FIRST.format(folder=folder)])
        after, of_torch = (statistics.median(column) for column in zip(*inside, strict=True))
        print(f"first token of a 124M model from disk: {after:.2f} s after torch is imported; {wall:.2f} s whole process, of which torch {of_torch:.2f} s")


if __name__ == "__main__":
    main()
