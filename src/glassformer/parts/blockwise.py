"""Attention for compiled training in bfloat16 on a CPU: the fused kernel forward, blocks of keys backward.

torch's fused CPU kernel is fast forward in bfloat16, but its backward pass takes ten times as long as in float32,
and in float32 no matrix unit helps. Backward needs five products and one exponential per score; written out in
blocks of keys, the products run on the matrix unit and the compiler fuses the rest (docs/log.md has the numbers).

    forward    q, k, v ──► fused kernel ──► z, and per query  L = log sum_j exp(s_j)
    backward   per block of keys j, for the queries i that see it:
               P = exp(scale q k^T - L)        the pattern again, rather than kept
               dV = P^T dz                     dS = P * (dz V^T - D) * scale,   D = sum(dz * z)
               dK = dS^T q                     dq += dS k

Beside inputs and gradients it holds one block of scores and each block's share of dq (after arXiv 2205.14135, section 3).
The blocks are written out one by one in the compiled step, so contexts beyond LONGEST keep the fused kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from glassformer.core.numerics import wide

BLOCK = 128  # keys; on two cores with AMX blocks of 64 were slower at contexts of 256 and 512

LONGEST = 1024  # keys; at 2,048 compiling one layer takes twice as long as with the fused kernel

# The matrix unit is what makes it faster; without one the fused kernel in float32 is.
_MATRIX_UNIT = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())

# The operation behind torch's own scaled_dot_product_attention, which does not hand out L.
_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this way is the faster one for a step in bfloat16: a compiled training step on a CPU."""
    here = _KERNEL is not None and _MATRIX_UNIT and torch.compiler.is_compiling() and q.device.type == "cpu"
    return here and q.requires_grad and q.shape[-1] == v.shape[-1] and 1 < q.shape[-2] <= LONGEST and k.shape[-2] <= LONGEST


class BlockwiseAttention(torch.autograd.Function):
    """``softmax(scale q k^T) v``, causal or over all keys; q: [b h t k], k: [b h s k], v: [b h s k], t = s if causal."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        assert _KERNEL is not None
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the kernel takes it for granted
        z, log_sum = _KERNEL(q, k, v, 0.0, causal, scale=scale)
        ctx.save_for_backward(q, k, v, z, log_sum)
        ctx.causal, ctx.scale = causal, scale
        result: Tensor = z
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, z, log_sum = ctx.saved_tensors
        return *_gradients(q, k, v, z, log_sum[..., None], dz, ctx.causal, ctx.scale), None, None


def _gradients(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b h s k"],
    v: Float[Tensor, "b h s k"],
    z: Float[Tensor, "b h t k"],
    log_sum: Float[Tensor, "b h t 1"],
    dz: Float[Tensor, "b h t k"],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    t, s = q.shape[-2], k.shape[-2]
    mean = (wide(dz) * wide(z)).sum(-1, keepdim=True)
    dqs, dks, dvs, firsts = [], [], [], []
    for a in range(0, s, BLOCK):
        first = a if causal else 0  # earlier queries see nothing of this block
        q_, dz_, log_sum_, mean_ = (x[..., first:, :] for x in (q, dz, log_sum, mean))
        k_, v_ = k[..., a : a + BLOCK, :], v[..., a : a + BLOCK, :]
        pattern = torch.exp(wide(q_ @ k_.mT) * scale - log_sum_)
        if causal:
            keys, queries = torch.arange(a, a + k_.shape[-2]), torch.arange(first, t)
            pattern = torch.where(keys <= queries[:, None], pattern, 0.0)
        ds = (pattern * (wide(dz_ @ v_.mT) - mean_) * scale).to(q.dtype)
        dvs.append(pattern.to(q.dtype).mT @ dz_)
        dks.append(ds.mT @ q_)
        dqs.append(ds @ k_)
        firsts.append(first)
    dq = [_sum([wide(d[..., a - f : a - f + BLOCK, :]) for d, f in zip(dqs, firsts, strict=True) if f <= a]) for a in range(0, t, BLOCK)]
    return torch.cat(dq, -2).to(q.dtype), torch.cat(dks, -2), torch.cat(dvs, -2)


def _sum(terms: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)
