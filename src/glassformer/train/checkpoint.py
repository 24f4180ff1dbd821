"""Checkpoints: everything that decides the rest of a run, in one folder, whole or not there.

    run/
      run.json                          what the run is: settings and decisions
      checkpoints/
        step-00001000/
          model.safetensors, model.json, tokenizer.json     a model like any saved one
          optimizer.safetensors                             state by parameter name
          state.json                                        schedule, loader, random generators, hashes of all files

A checkpoint is written under a hidden name, flushed to the disk and renamed: after ``kill -9`` or a
full disk there is the new one or the old one, never half of one. The newest ``keep`` stay. Reading
checks every hash. Nothing is pickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glassformer.core import files
from glassformer.core.errors import CheckpointError, WeightsError

FORMAT = 1
STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint whose hashes are right. ``state``: what was given to :func:`save`."""

    folder: Path
    step: int
    state: dict[str, Any]

    def optimiser(self) -> dict[str, Tensor]:
        """The optimisers' state by ``parameter/key``."""
        return load_file(self.folder / OPTIMIZER)

    def load_model(self, model: nn.Module) -> None:
        """Copy the parameters and buffers into ``model``. Raises :class:`CheckpointError` if they are another model's."""
        load_parameters(model, self.folder / MODEL)


# Writing


def save(run: Path, step: int, write_model: Callable[[Path], object], optimiser: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``; returns its folder.

    ``write_model(folder)`` writes the model's own files. Raises :class:`CheckpointError` when it cannot be
    written; earlier checkpoints are then as they were.
    """
    parent = run / "checkpoints"
    target, draft = parent / f"step-{step:08d}", parent / f".step-{step:08d}.draft"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write_model(draft)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in optimiser.items()}, draft / OPTIMIZER)
        hashes = {p.name: file_hash(p) for p in sorted(draft.iterdir())}
        content = {"format": FORMAT, "step": step, "files": hashes, "state": state}
        (draft / STATE).write_text(json.dumps(content | {"seal": _seal(content)}))
        for path in draft.iterdir():
            files.flush(path)
        files.flush(draft)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
        draft.rename(target)
        files.flush(parent)
    except (OSError, SafetensorError, WeightsError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _unwritable(target, error, bool(list_steps(run))) from error
    for old in list_steps(run)[:-keep]:
        shutil.rmtree(parent / f"step-{old:08d}", ignore_errors=True)
    return target


def _unwritable(target: Path, error: Exception, others: bool) -> CheckpointError:
    reason, todo = files.trouble(error.__cause__ if isinstance(error, WeightsError) and error.__cause__ else error, movable=False)
    kept = " The checkpoints before it are untouched." if others else ""
    return CheckpointError(f"The checkpoint {target} could not be written: {reason}.{kept} {todo}, then go on with --resume.")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once. Raises :class:`CheckpointError` when it cannot be written."""
    try:
        files.replace(path, json.dumps(content, indent=1))
    except OSError as error:
        reason, todo = files.trouble(error, movable=False)
        raise CheckpointError(f"{path} could not be written: {reason}. {todo}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file. Raises :class:`CheckpointError` if it cannot be read."""
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is truncated or was edited.") from error


def plain(value: Any) -> Any:
    """A value as JSON would give it back."""
    return json.loads(json.dumps(value))


def publish(run: Path, write_model: Callable[[Path], object]) -> None:
    """Put the model's files into the run folder itself, each replaced at once."""
    draft = run / ".model.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write_model(draft)
        files.take_places(draft, run, last="model.json")
        shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError, WeightsError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _unwritable(run, error, True) from error


# Reading


def list_steps(run: Path) -> list[int]:
    """The steps of all checkpoints by name, ascending; whether they are whole is not looked at."""
    names = [p.name.removeprefix("step-") for p in (run / "checkpoints").glob("step-*") if p.is_dir()]
    return sorted(int(n) for n in names if n.isdigit())


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run (None if there is none at all), and what was wrong with newer ones.

    Raises :class:`CheckpointError` if there are checkpoints but every one is damaged.
    """
    wrong: list[str] = []
    for step in reversed(list_steps(run)):
        try:
            return read(run / "checkpoints" / f"step-{step:08d}"), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    if wrong:
        raise CheckpointError(f"{wrong[0]} No older checkpoint of this run is whole either: start again in a new folder.")
    return None, []


def read(folder: Path) -> Checkpoint:
    """Check a checkpoint against its hashes. Raises :class:`CheckpointError` naming the file that is missing or changed."""
    path = folder / STATE
    try:
        content = cast(dict[str, Any], json.loads(path.read_text()))
        seal = content.pop("seal")
        hashes, step, made = content["files"], content["step"], content["format"]
    except FileNotFoundError:
        raise CheckpointError(f"The checkpoint {folder} is not whole: {STATE} is missing.") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the checkpoint is truncated or was edited.") from error
    if made != FORMAT:
        raise CheckpointError(f"{path} has format {made}, but this version reads format {FORMAT}: go on with the version that wrote it.")
    if seal != _seal(content):
        raise CheckpointError(f"{path} was edited: its contents do not match its seal.")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"The checkpoint {folder} is not whole: {name} is missing.")
        found = file_hash(folder / name)
        if found != expected:
            raise CheckpointError(f"{folder / name} is truncated or was edited: its hash is {found[:12]}…, but {expected[:12]}… was saved.")
    return Checkpoint(folder, int(step), content["state"])


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_parameters(model: nn.Module, path: Path) -> None:
    """Copy a safetensors file into ``model``; tied tensors may be stored once. Raises :class:`CheckpointError` on any misfit."""
    saved, own = load_file(path), model.state_dict()
    places = {t.data_ptr() for name, t in own.items() if name in saved}
    missing = [n for n, t in own.items() if n not in saved and t.data_ptr() not in places]
    if missing or (strange := sorted(set(saved) - set(own))):
        name, what = (missing[0], "lacks") if missing else (strange[0], "also has")
        raise CheckpointError(f"{path} belongs to another model: it {what} the parameter {name!r}. Build the model that the run began with.")
    with torch.no_grad():
        for name, tensor in saved.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(f"{path} belongs to another model: {name!r} has shape {tuple(tensor.shape)}, but the model has {tuple(own[name].shape)}.")
            own[name].copy_(tensor)


def save_parameters(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers of ``model``; a tensor under several names is stored once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().cpu().contiguous()
    save_file(kept, path)


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# The state of random generators


def random_state() -> dict[str, Any]:
    """The global generators of torch (all devices), NumPy and Python, as plain data."""
    numpy_state = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002  (the global one is what others may draw from)
    return {
        "torch": _pack(torch.get_rng_state()),
        "cuda": [_pack(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], base64.b64encode(np.asarray(numpy_state[1], "<u4").tobytes()).decode(), *numpy_state[2:]],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to what :func:`random_state` gave."""
    torch.set_rng_state(_unpack(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unpack(s) for s in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), "<u4"), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextmanager
def same_randomness() -> Iterator[None]:
    """What happens inside draws from the global generators without moving them."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _pack(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# One process to a run


def lock(run: Path) -> IO[str]:
    """Hold the run folder for this process; the system lets go of it however the process ends.

    Raises :class:`CheckpointError` if another process holds it or the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("w")
    except OSError as error:
        reason, todo = files.trouble(error)
        raise CheckpointError(f"The run folder {run} cannot be written: {reason}. {todo}.") from error
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a system without such locks
        pass
    except OSError as error:
        handle.close()
        raise CheckpointError(f"Another process is training in {run}: wait for it, stop it, or choose another folder.") from error
    return handle
