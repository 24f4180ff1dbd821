"""Numbers whose bits depend on nothing around them: what a layer computes with in deterministic mode (``gf.deterministic()``).

    values one by one     each      pieces of fixed size, so that none of them is the odd one at the end of a vector
    sums over an axis     total     neighbours in pairs, then pairs of pairs: zeros behind the end change nothing
    products              product   compiled code (parts/linear.py), or tiles of ``TILE`` rows, so that torch sees one shape only

torch's own operations are as exact, but the order of their sums, and which of their values go through vectors, change with the shape of
what they are given: with the batch, with padding, with the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core import modes
from glassformer.core.errors import InputError
from glassformer.core.numerics import wide

TILE = 32
"""Rows of a product by torch: always so many, the missing ones zeros."""
PIECE = 16_384
"""Values that an operation is given at once: fewer than torch shares out among threads."""
VECTOR = 64
"""A multiple of every number of values that a processor works on together."""


def on() -> bool:
    """Whether this is computed in deterministic mode. Raises :class:`InputError` where somebody asks for gradients in it."""
    if torch.compiler.is_compiling() or not modes.is_deterministic():
        return False
    if torch.is_grad_enabled():
        raise InputError("Deterministic mode makes no gradients, but they were switched on inside it: leave gf.deterministic() for what learns.")
    return True


def refuse(what: str) -> None:
    """Raise :class:`InputError` in deterministic mode: ``what`` cannot be had in it."""
    if on():
        raise InputError(f"{what} in deterministic mode: leave one of the two out.")


def each(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``f`` of every value of ``x``; in deterministic mode each value's bits are those that it has alone."""
    if not on() or not x.is_cpu or not x.numel():
        return f(x)
    flat = x.reshape(-1)
    n = flat.numel()
    if n <= PIECE and n % VECTOR == 0:
        return f(flat).view(x.shape)
    made = []
    for piece in flat.split(PIECE):
        more = -len(piece) % VECTOR
        made.append(f(F.pad(piece, (0, more)))[: len(piece)] if more else f(piece))
    return torch.cat(made).view(x.shape)


def total(x: Tensor, dim: int = -1) -> Tensor:
    """The sum over an axis, which stays with size 1; in pairs of neighbours, whatever the shape, so that zeros behind the end change nothing."""
    x = x.movedim(dim, -1)
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        x = x[..., ::2] + x[..., 1::2]
    return x.movedim(-1, dim)


def softmax(x: Tensor) -> Tensor:
    """``exp(x) / sum exp(x)`` over the last axis."""
    e = each(torch.exp, x - x.amax(-1, keepdim=True))
    return e / total(e)


def logsumexp(x: Tensor) -> Tensor:
    """``ln sum exp`` over the last axis, which stays with size 1."""
    top = x.amax(-1, keepdim=True)
    base = torch.where(top.isinf(), 0.0, top)
    return base + each(torch.log, total(each(torch.exp, x - base)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis of ``x`` [.. d]."""
    d = x.shape[-1]
    centred = wide(x) - total(wide(x)) / d
    y = centred / (total(centred * centred) / d + eps).sqrt() * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, in float32 or wider."""
    x = wide(x)
    return x / (total(x * x) / x.shape[-1] + eps).sqrt()


def tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` by torch, ``TILE`` rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    made = []
    for tile in rows.split(TILE):
        padded = tile if len(tile) == TILE else F.pad(tile, (0, 0, 0, TILE - len(tile)))
        made.append(F.linear(padded.contiguous(), weight, bias)[: len(tile)])
    y = torch.cat(made) if made else F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], -1) if y.numel() else F.linear(x, weight, bias)
