"""How a loaded model holds its matrices: ``weights="float32" | "bfloat16" | "int8" | "int4" | "auto"``.

    float32, bfloat16    the type of everything
    int8                 Q8_0 blocks: 32 whole numbers of 8 bits and a float16 step      W ≈ step * q
    int4                 Q4_0 blocks: the same in 4 bits; tables of tokens (embedding, read-out) in Q8_0, where 4 bits cost most
    auto                 float32 or bfloat16, whichever decodes faster here; only of numbers that are bfloat16 in the file, which both hold exactly

Blocks are those of GGUF files and need no other package at run time; on a CPU a decode step multiplies them as they lie (parts/linear.py).
Routers of experts, norms, biases, position tables and matrices whose rows are no multiple of 32 keep their type.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from glassformer.core import native
from glassformer.core.blocks import FORMATS
from glassformer.core.errors import WeightsError, did_you_mean
from glassformer.core.files import replace
from glassformer.core.modes import evaluating
from glassformer.parts.linear import Linear
from glassformer.parts.packed import Packed, Piece, pack, packable

from . import quants

KINDS = ("float32", "bfloat16", "int8", "int4", "auto")
BLOCKS = {"int8": "Q8_0", "int4": "Q4_0"}
SECONDS = 0.6  # for each of the two types that are timed


def check(kind: str, dtype: Any, packed: bool, quantise: str | None) -> None:
    """Raise :class:`WeightsError` if ``kind`` is none, or if another argument says how the matrices are held too."""
    if kind not in KINDS:
        raise WeightsError(f"weights={kind!r} is no way of holding a model's matrices.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}.")
    if quantise is not None or packed:
        other = f"quantise={quantise!r}" if quantise is not None else "packed=True"
        raise WeightsError(f"weights={kind!r} and {other} both say how the matrices are held: leave one of them out.")
    if dtype is not None and kind not in BLOCKS:
        raise WeightsError(f"weights={kind!r} and dtype={str(dtype).removeprefix('torch.')!r} both say the type of the numbers: leave one of them out.")


def dtype_for(kind: str | None, dtype: Any) -> Any:
    """The type in which the file is read."""
    return kind if kind in ("float32", "bfloat16") else dtype


def hold(model: nn.Module, kind: str) -> int:
    """Hold the matrices of ``model`` in blocks, in place; gives the bytes that they take. Raises :class:`WeightsError` if there is none that fits."""
    size = 0
    for path, parameter in list(model.named_parameters()):
        if not packable(model, path) or path.endswith(".router.weight") or parameter.shape[1] % FORMATS["Q8_0"].numbers:
            continue
        linear = isinstance(model.get_submodule(path.rpartition(".")[0]), Linear)
        type = BLOCKS[kind] if linear else "Q8_0"
        raw = quants.quantise(parameter.data, type).to(parameter.device)
        pack(model, {path: [Piece(raw, type)]}, parameter.dtype)
        size += raw.numel()
    if not size:
        raise WeightsError(f"weights={kind!r}: this model has no matrix with rows of a multiple of 32 numbers to hold in blocks. Leave weights out.")
    return size


# By a short calibration


def faster(model: nn.Module, stored: torch.dtype) -> torch.dtype:
    """The type, of the two that hold the file's numbers exactly, in which one token takes less time; kept on disk for the next time."""
    now = next(model.parameters()).dtype
    if stored != torch.bfloat16 or any(isinstance(m, Packed) for m in model.modules()):
        return now
    device = next(model.parameters()).device
    kept = _kept(model, device)
    if kept is not None and (found := _read(kept)) is not None:
        return found
    native.wait(60.0)  # what is compared is what will run
    times = {}
    for kind in (torch.float32, torch.bfloat16):
        model.to(kind)
        times[kind] = _time(model, device)
    model.to(now)
    best = min(times, key=lambda t: times[t])
    if kept is not None:
        with suppress(OSError):  # the next time it is measured again
            replace(kept, json.dumps({str(t).removeprefix("torch."): s for t, s in times.items()}))
    return best


def _time(model: nn.Module, device: torch.device) -> float:
    run: Callable[[], Any] = lambda: model(torch.zeros(1, 1, dtype=torch.long, device=device))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + SECONDS
    with evaluating(model), torch.no_grad():
        run()
        while time.perf_counter() < end:
            start = time.perf_counter()
            run()
            wait()
            best = min(best, time.perf_counter() - start)
    return best


def _kept(model: nn.Module, device: torch.device) -> Any:
    folder = native.folder()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {native.processor()}"
    told = repr((getattr(model, "spec", None), name, torch.__version__, torch.get_num_threads(), native.library() is not None))
    return None if folder is None else folder / f"weights-{hashlib.sha256(told.encode()).hexdigest()[:20]}.json"


def _read(path: Any) -> torch.dtype | None:
    try:
        times = json.loads(path.read_text())
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[min(times, key=times.get)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
