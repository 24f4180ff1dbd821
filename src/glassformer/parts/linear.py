"""Products with a matrix: torch's own, and for the few rows of a decode step code that reads the matrix at the speed of memory.

    x [.. in] ──► few rows, on a CPU, nobody asks for gradients ──► core/native/products.cpp ──► y [.. out]
              ├─► some more, bfloat16, a matrix unit            ──► core/native/tiles.cpp ─────►
              └─► otherwise: torch                              ────────────────────────────►

The same function with other roundings: compiled code sums a number in an order that depends on the row's length and the type of W alone, so that a
row has the same bits in any batch of at most ``ROWS`` rows; torch's order changes with the number of rows. Training goes through torch alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from glassformer.core import native

from . import steady
from .kernels import _is_plain

ROWS = {torch.float32: 16, torch.bfloat16: 8}
"""Up to how many rows the compiled code multiplies a matrix of this type; above it torch's blocked products are faster (benchmarks/decode.py)."""
TILED_ROWS = 32
"""The same for bfloat16 on processors with a matrix unit (x86's AMX), whose sums have roundings of their own."""
PACKED_ROWS = 32
"""The same for matrices in blocks, which torch would have to unpack first."""
BLOCKS = {"Q8_0": 2, "Q4_0": 3}
"""Block formats that are multiplied as they lie, and their numbers in the compiled code."""

_CALL = struct.Struct("=4Q6q")  # the addresses of x, W, b and y; rows of x, rows of W, numbers per row, type of W, whether x is bfloat16, threads
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: [.. in], [out in], [out] -> [.. out], in the fastest way that there is for this call."""
    if steady.on():
        return _steadily(x, weight, bias)
    if torch.is_grad_enabled() or not _is_bare(x):
        return F.linear(x, weight, bias)
    n, k = weight.shape
    rows, kind = x.numel() // k if k else 0, _TYPES.get(weight.dtype)
    fits = kind is not None and 0 < rows <= TILED_ROWS and x.shape[-1] == k and x.dtype == weight.dtype and n > 0
    if not fits or not _is_held(weight) or (bias is not None and (bias.dtype != x.dtype or bias.shape != (n,) or not _is_held(bias))):
        return F.linear(x, weight, bias)
    code = native.library()
    name = None if code is None else kernel(code, weight.dtype, rows, k)
    if name is None:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    told = _CALL.pack(x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k, kind, kind, torch.get_num_threads())
    getattr(code, f"glassformer_{name}")(told)
    return y


def kernel(code: Any, dtype: torch.dtype, rows: int, k: int) -> str | None:
    """Which of the compiled code's functions multiplies so many rows of ``k`` numbers by a matrix of this type, if one does."""
    if rows <= ROWS[dtype]:
        return "linear"
    return "tiles" if dtype == torch.bfloat16 and rows <= TILED_ROWS and k % 32 == 0 and code.glassformer_has_tiles() else None


def _steadily(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in deterministic mode: compiled code whatever the number of rows, as many at a time as a core keeps by itself; elsewhere tiles."""
    (n, k), kind = weight.shape, _TYPES.get(weight.dtype)
    code = native.library() if _is_bare(x) and kind is not None and x.dtype == weight.dtype and x.shape[-1] == k and k * n else None
    if code is None or kind is None or not _is_held(weight) or (bias is not None and (bias.dtype != x.dtype or not _is_held(bias))):
        return steady.tiles(x, weight, bias)
    x, size, threads = x.contiguous(), x.element_size(), torch.get_num_threads()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    rows, step = x.numel() // k, max(PACKED_ROWS, (1 << 17) // k // 4 * 4)
    for at in range(0, rows, step):
        some, b = min(step, rows - at), 0 if bias is None else bias.data_ptr()
        told = _CALL.pack(x.data_ptr() + at * k * size, weight.data_ptr(), b, y.data_ptr() + at * n * size, some, n, k, kind, kind, threads)
        code.glassformer_linear(told)
    return y


def packed_product(x: Tensor, raws: Sequence[Tensor], types: Sequence[str], bias: Tensor | None = None) -> Tensor | None:
    """``x W^T + b`` with W in pieces of blocks (bytes [rows, bytes] and the format of each), or None where no compiled code does it."""
    if (torch.is_grad_enabled() and x.requires_grad) or not _is_bare(x) or x.dtype not in _TYPES:
        return None
    k = x.shape[-1]
    rows = x.numel() // k if k else 0
    if rows > PACKED_ROWS and steady.on():
        pieces = [packed_product(piece, raws, types, bias) for piece in x.reshape(-1, k).split(PACKED_ROWS)]
        done = [y for y in pieces if y is not None]  # all or none
        return torch.cat(done).view(*x.shape[:-1], -1) if done else None
    if not 0 < rows <= PACKED_ROWS or k % 32 or not all(t in BLOCKS and _is_held(r) for t, r in zip(types, raws, strict=True)):
        return None
    if bias is not None and (bias.dtype != x.dtype or not _is_held(bias)):
        return None
    code = native.library()
    if code is None:
        return None
    x = x.detach().contiguous()
    made, at, size = [], 0, x.element_size()
    for raw, kind in zip(raws, types, strict=True):
        y = torch.empty(*x.shape[:-1], len(raw), dtype=x.dtype)
        b = 0 if bias is None else bias.data_ptr() + at * size
        code.glassformer_linear(
            _CALL.pack(x.data_ptr(), raw.data_ptr(), b, y.data_ptr(), rows, len(raw), k, BLOCKS[kind], x.dtype == torch.bfloat16, torch.get_num_threads())
        )
        made.append(y)
        at += len(raw)
    return made[0] if len(made) == 1 else torch.cat(made, -1)


def _is_bare(x: Tensor) -> bool:
    # Numbers in this machine's memory, and nobody between them and this program.
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x) is Tensor
        and _is_plain()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _is_held(w: Tensor) -> bool:
    # A matrix in this machine's memory, row after row; not one of another library's types.
    return w.is_cpu and type(w) in (Tensor, nn.Parameter) and w.is_contiguous()


class Linear(nn.Linear):
    """``y = x W^T + b``; [.. in] -> [.. out]. ``nn.Linear`` in everything but the speed of a few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)
