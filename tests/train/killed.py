"""A training run in a process of its own, for tests that kill it: ``python killed.py FOLDER STEPS COMPILE [--slow-disk] [--body]``.

Prints a line after every step, and with ``--slow-disk`` one before every file of a checkpoint is flushed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from glassformer.core import files
from glassformer.train import Constant
from train import small


def run(folder: str, steps: int, compile: bool, body: float = 0.0) -> list[float]:
    """Train; dropout, so that the random generators matter too. One layer is compiled in half the time of two."""
    again = (Path(folder) / "run.json").exists()
    spec = small.spec(dropout=0.1)
    model = spec.replace(blocks=spec.blocks[:1] if compile else spec.blocks).build(seed=0)
    trainer = small.trainer(model, folder=folder, steps=steps, compile=compile, schedule=Constant(), save_every=5, accumulate=2, resume=again)
    found = []
    for step in trainer:
        found.append(step.loss)
        print("step", step.number, flush=True)
        time.sleep(body)
    print("stopped", trainer.stopped, trainer.number, flush=True)
    return found


def slow_flush(path: Path) -> None:
    print("writing", path.parent.name, path.name, flush=True)
    time.sleep(0.2)
    fast_flush(path)


fast_flush = files.flush

if __name__ == "__main__":
    if "--slow-disk" in sys.argv:
        files.flush = slow_flush
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", 0.3 if "--body" in sys.argv else 0.0)
