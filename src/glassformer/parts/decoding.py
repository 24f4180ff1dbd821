"""What a decode step does between its products, on a CPU, by compiled code (core/native/attention.cpp, elementwise.cpp).

    q [b h t k], t <= 8 ──────────────────────────┐
    keys, values [b g s k], views of a buffer ────┼──► attend ──► z [b h t kv]
    new keys and values [b t g k] ──► written ──► ┤
    how many keys each query sees, ends [b t] ────┘

    norm, turn (rotary), bend (activation): one call each in place of several of torch's, each of which takes longer than its work

:func:`attend` is the same function as :func:`glassformer.parts.kernels.explicit`, in float32 whatever the keys and values are held
in. It reads each key and value once, those that nobody sees not at all, and forms no mask: rows of different lengths cost what they
hold. The bits of a row depend on that row alone: not on the batch, the cache's capacity or the number of threads.

Every function here returns None where torch's operations are to be used: while gradients are recorded, inside a compiled program or
a transform, on other devices and types, and where the compiled code is not there (yet).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glassformer.core import modes, native
from glassformer.core.mask import FEW

if TYPE_CHECKING:
    from .kernels import Rule

# What the compiled code is told, in the order of its structs. Whole numbers and addresses are 64 bits wide.
_CALL = struct.Struct("=8q7q19q4q2d")
_NORM = struct.Struct("=8q2dq")
_TURN = struct.Struct("=15q")
_SUM = struct.Struct("=5q")
_BEND = struct.Struct("=8q")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTS = {"gelu_tanh": 0, "silu": 1, "relu": 2, "relu2": 3}


def library(x: Tensor) -> Any:
    """The compiled code, if it may compute with ``x`` [b t ..]: few places per row, and nobody between this program and its tensors."""
    if torch.is_grad_enabled() or x.ndim < 3 or (x.shape[1] > FEW and not modes.is_deterministic()) or x.dtype not in _TYPES or not x.is_cpu:
        return None
    return native.library() if type(x) is Tensor and is_free() else None


def is_free() -> bool:
    """Whether nobody stands between this program and its tensors: no compiler, transform, dispatch mode, forward derivative or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() != 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def takes(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float) -> Any:
    """The compiled code, if it computes the attention of this call (q [b h t k]); else None."""
    return library(q.transpose(1, 2)) if fits(k, v, rule, dropout) else None


def fits(k: Tensor, v: Tensor, rule: Rule, dropout: float) -> bool:
    """Whether keys, values and what is done with scores are of a kind that the compiled code knows."""
    if rule.bias is not None or dropout or not (rule.mask.ends is not None or rule.mask.everything):
        return False
    return k.dtype in _TYPES and v.dtype == k.dtype and rule.normaliser.fused


def attend(code: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``softmax(cap(scale q k^T)) v`` of a call that :func:`takes` accepts: q [b h t k], k [b g s k], v [b g s kv] -> [b h t kv].

    ``new``: keys and values [b t g k] of the queries' own places, to be written into ``k`` and ``v`` first.
    """
    b, h, t, d_key = q.shape
    _, g, s, d_value = v.shape
    q = _in_line(q)
    if new is None:  # else they are the cache's own memory, which is in line
        k, v = _in_line(k), _in_line(v)
    (qb, qh, qt, _), (kb, kg, ks, _), (vb, vg, vs, _) = q.stride(), k.stride(), v.stride()
    z = torch.empty(b, t, h, d_value, dtype=q.dtype)
    ends, sink = rule.mask.ends, rule.normaliser.sink()
    if ends is not None:
        ends = ends.contiguous()
    if sink is not None:
        sink = sink.float().contiguous()
    fresh: tuple[int, ...] = (0, 0)
    steps: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if new is not None:
        key, value = _in_line(new[0]), _in_line(new[1])
        fresh, steps = (key.data_ptr(), value.data_ptr()), (*key.stride()[:3], *value.stride()[:3])
    call = _CALL.pack(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), z.data_ptr(), *fresh),
        *(0 if ends is None else ends.data_ptr(), 0 if sink is None else sink.data_ptr()),
        *(b, h, g, t, s, d_key, d_value),
        *(qb, qh, qt, kb, kg, ks, vb, vg, vs, t * h * d_value, d_value, h * d_value, t if ends is not None and ends.ndim == 2 else 0, *steps),
        *(rule.mask.window, _TYPES[q.dtype], _TYPES[k.dtype], torch.get_num_threads()),
        *(rule.scale, rule.cap or 0.0),
    )
    code.glassformer_attend(call)
    return z.transpose(1, 2)


def _in_line(x: Tensor) -> Tensor:
    """The same numbers, those of the last axis side by side in memory."""
    return x if x.stride(3) == 1 else x.contiguous()


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, rms: bool = False, offset: float = 0.0, late: bool = False) -> Tensor | None:
    """LayerNorm or RMSNorm over the last axis of ``x`` [b t .. d]; weight and bias [d] of its type."""
    code = library(x)
    if code is not None and modes.is_deterministic():
        x = x.contiguous()
    if code is None or not x.is_contiguous() or not _beside(weight, x) or (bias is not None and not _beside(bias, x)):
        return None
    y = torch.empty_like(x)
    d = x.shape[-1]
    bias_at = 0 if bias is None else bias.data_ptr()
    code.glassformer_norm(_NORM.pack(x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr(), x.numel() // d, d, _TYPES[x.dtype], rms, eps, offset, late))
    return y


def _beside(w: Tensor, x: Tensor) -> bool:
    return w.dtype == x.dtype and w.is_cpu and w.is_contiguous()


def turn(x: Tensor, tables: tuple[Tensor, Tensor], half: bool) -> Tensor | None:
    """Pairs of features of ``x`` [b t n k] turned by the angles whose cosines and sines are ``tables`` [t dim] or [b t dim]."""
    code = library(x)
    if code is None or x.ndim != 4 or x.stride(3) != 1:
        return None
    cos, sin = (table.float().contiguous() for table in tables)
    b, t, n, k = x.shape
    y = torch.empty(b, t, n, k, dtype=x.dtype)
    dim = cos.shape[-1]
    steps = (*x.stride()[:3], t * dim if cos.ndim == 3 and cos.shape[0] > 1 else 0)
    code.glassformer_turn(_TURN.pack(x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr(), b, t, n, k, dim, *steps, half, _TYPES[x.dtype]))
    return y


def logsumexp(x: Tensor) -> Tensor | None:
    """``ln sum exp`` over the last axis of ``x`` [b v], float32 -> [b 1]; the bits of a row depend on that row alone."""
    code = library(x[:, None])
    if code is None or x.dtype != torch.float32 or x.stride(1) != 1:
        return None
    y = torch.empty(x.shape[0], 1)
    code.glassformer_logsumexp(_SUM.pack(x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], x.stride(0)))
    return y


def bend(name: str, x: Tensor, up: Tensor | None = None) -> Tensor | None:
    """The activation ``name`` of ``x`` [b t f], times ``up`` (of the same steps)."""
    code = library(x) if name in _ACTS else None
    if code is None or x.ndim != 3 or x.stride(2) != 1 or (up is not None and (up.stride() != x.stride() or up.dtype != x.dtype)):
        return None
    if modes.is_deterministic():
        x, up = x.contiguous(), None if up is None else up.contiguous()
    b, t, n = x.shape
    step = x.stride(1)
    if b > 1 and x.stride(0) != t * step:
        return None
    y = torch.empty(b, t, n, dtype=x.dtype)
    code.glassformer_bend(_BEND.pack(x.data_ptr(), 0 if up is None else up.data_ptr(), y.data_ptr(), b * t, n, step, _TYPES[x.dtype], _ACTS[name]))
    return y
