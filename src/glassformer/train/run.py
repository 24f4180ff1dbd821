"""A run's folder: who holds it, what the run is, where it can go on.

run/
  run.json          settings, decisions, the machine's matrix peak
  checkpoints/      see checkpoint.py
  model.safetensors, model.json, tokenizer.json     when the run is finished
  metrics.jsonl, tensorboard/, loss.png             see log.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glassformer.core.errors import CheckpointError

from . import checkpoint
from .checkpoint import Checkpoint

FILE = "run.json"


class Run:
    """The folder of a run, held by this process until :meth:`close`.

    ``found``: the newest whole checkpoint when resuming (None: killed before the first). ``record``: what ``run.json``
    says. ``notes``: what the user should know. Raises :class:`CheckpointError` if the folder holds a run and
    ``resume`` is False, or holds none and it is True, or if every checkpoint is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], resume: bool = False, keep: int = 2):
        self.folder, self.keep = Path(folder), keep
        self.notes: list[str] = []
        self.found: Checkpoint | None = None
        self.record: dict[str, Any] = {}
        if resume and not self._began():  # before anything is made there
            raise CheckpointError(f"There is no run to resume in {self.folder}: check the folder, or leave out --resume.")
        self._lock = checkpoint.lock(self.folder)
        try:
            if self._began() and not resume:
                raise CheckpointError(f"{self.folder} already holds a run: go on with it (resume=True, --resume) or choose another folder.")
            self.found, wrong = checkpoint.newest(self.folder)
            if wrong and self.found is not None:
                self.notes.append(f"{wrong[0]} Going on from the one before it, step {self.found.step}.")
            if (self.folder / FILE).exists():
                self.record = checkpoint.read_json(self.folder / FILE)
        except BaseException:
            self.close()
            raise

    def _began(self) -> bool:
        return (self.folder / FILE).exists() or bool(checkpoint.list_steps(self.folder))

    def write(self, **record: Any) -> None:
        """Put entries into ``run.json``."""
        self.record |= record
        checkpoint.write_json(self.folder / FILE, self.record)

    def save(self, step: int, write_model: Callable[[Path], object], optimiser: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint (see :func:`checkpoint.save`)."""
        return checkpoint.save(self.folder, step, write_model, optimiser, {**state, "made_with": made_with()}, keep=self.keep)

    def is_empty(self) -> bool:
        """Whether there is no checkpoint yet."""
        return not checkpoint.list_steps(self.folder)

    def publish(self, write_model: Callable[[Path], object]) -> None:
        """Put the finished model's files into the folder itself."""
        checkpoint.publish(self.folder, write_model)

    def unpublish(self) -> None:
        """Remove a finished model's files: the run goes on, and its checkpoints are newer."""
        for name in ("model.json", checkpoint.MODEL, "tokenizer.json"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def closed(self) -> bool:
        """Whether other processes may have the folder."""
        return self._lock.closed

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()


def check_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` naming every setting that differs between a checkpoint and its continuation."""
    changed = [_changed(name, saved.get(name), checkpoint.plain(value)) for name, value in now.items() if saved.get(name) != checkpoint.plain(value)]
    if changed:
        shown = "; ".join(c if len(c) < 300 else c[:297] + "..." for c in changed)
        raise CheckpointError(f"The checkpoint belongs to a run with other settings: {shown}. Use the same settings, or start in a new folder.")


def _changed(name: str, old: Any, new: Any) -> str:
    """``model.d_model was 128 and is 64``: of plain data the innermost places that differ, three at most."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        inside = [_changed(name if key == "of" else f"{name}.{key}", old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        at = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return _changed(f"{name}.{at}", old[at], new[at])
    return f"{name} was {old!r} and is {new!r}"


def made_with() -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    from glassformer import __version__

    return {"glassformer": __version__, "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def versions_note(saved: dict[str, Any]) -> str | None:
    """A sentence if a checkpoint was made under other conditions, so that the run cannot go on bit for bit."""
    changed = ", ".join(f"{k} {saved.get(k)} -> {v}" for k, v in made_with().items() if v != saved.get(k))
    return f"The checkpoint was made with other versions or threads ({changed}): the run goes on, but not bit for bit." if changed else None
