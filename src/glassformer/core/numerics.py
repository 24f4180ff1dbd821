"""Numbers: data types and devices by name, seeds."""

from __future__ import annotations

import random

import numpy as np
import torch

from .errors import SpecError, did_you_mean

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype that people mean by ``"bf16"``, ``"float32"``…; raises :class:`SpecError` for others."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise SpecError(f"No data type is named {name!r}.{did_you_mean(name, DTYPES)} Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def devices() -> list[str]:
    """The kinds of devices that this machine has, the best first."""
    return [kind for kind, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)) if present]


def device_named(name: str | int | torch.device) -> torch.device:
    """The device of that name (``"cpu"``, ``"cuda:1"``); raises :class:`SpecError` if this machine has none such."""
    there = devices()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    missing = device is None or (device.type in ("cuda", "mps") and device.type not in there)
    if device is None or missing or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise SpecError(f"There is no device {str(name)!r} here. There is: {', '.join(there)}.")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global generator is what this function is about)
    torch.manual_seed(seed)


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or as it is where it is wider: the type for means, exponentials and sums."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
