"""The machine's matrix peak: what a large matrix product reaches here, measured, not taken from a data sheet."""

from __future__ import annotations

import time

import torch

FALLBACK_FLOPS = 2.0  # of a forward pass, for each parameter and token, where the model cannot say


def matrix_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int | None = None) -> float:
    """The best FLOP/s of a square product in a few tries; about a tenth of a second.

    ``2 size^3 / time``, with ``size`` 1024 on a CPU and 8192 elsewhere.
    """
    device = torch.device(device)
    n = size or (1024 if device.type == "cpu" else 8192)
    a = torch.ones(n, n, dtype=dtype, device=device)
    b, best = torch.ones_like(a), float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def training_flops_per_token(model: torch.nn.Module, context: int) -> float:
    """FLOPs to train on one token: three forward passes' worth (one forward, two backward)."""
    count = getattr(model, "flops_per_token", None)
    forward = float(count(context)) if callable(count) else FALLBACK_FLOPS * sum(p.numel() for p in model.parameters())
    return 3 * forward
