"""Attention in deterministic mode: the bits of a query's result depend on it and on its visible keys in their order, and on nothing else.

    mask, places of the keys ──► per query the list of its visible keys, first place first ─┐
                                                                                            ├──► scores, weights, mix by place on the list
    q, k, v, bias ──────────────────────────────────────────────────────────────────────────┘

Padding on either side, the order in a ring, other rows, pieces of a prompt: none of them is on the list. Compiled code does it on a CPU in float32
and bfloat16 (core/native/steady.cpp); elsewhere, and for other normalisers than soft-max, torch does, every product and sum written out.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glassformer.core import native
from glassformer.core.errors import InputError
from glassformer.core.numerics import wide

from . import steady

if TYPE_CHECKING:
    from glassformer.core.mask import Resolved

    from .kernels import Rule

AT_ONCE = 1 << 22  # numbers in one piece of torch's way
_CALL = struct.Struct("=8q6q12q6q3q2d")  # addresses, sizes, steps of what is read and written, of lists, counts and bias, types, scale and cap
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Seen(NamedTuple):
    """Columns of the keys in order, [b|1 t|1 n] (None: 0, 1, 2…), and of how many of them each query sees, [b|1 t]."""

    list: Tensor | None
    counts: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """``normalise(cap(scale q k^T) + bias) v``: q [b h t k], k [b g s k], v [b g s kv] -> [b h t kv]."""
    mask = rule.mask
    if mask.seen is None:
        mask.seen = seen(mask, q.shape[2], k.shape[2], q.device)
    code = native.library() if _is_for_compiled(q, k, v, rule) else None
    return _by_torch(q, k, v, rule, mask.seen) if code is None else _compiled(code, q, k, v, rule, mask.seen)


def _is_for_compiled(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> bool:
    plain = q.is_cpu and all(type(x) is Tensor for x in (q, k, v)) and torch._C._len_torch_dispatch_stack() == 0
    return plain and q.dtype in _TYPES and k.dtype in _TYPES and v.dtype == k.dtype and rule.normaliser.fused


# Who is seen


def seen(mask: Resolved, t: int, s: int, device: torch.device) -> Seen:
    """Every query's visible keys, from the resolved mask."""
    places = mask.places
    sorted_already = places is None or places.ndim == 1
    if mask.everything and sorted_already:
        return Seen(None, torch.full((1, t), s, device=device))
    if mask.ends is not None and not mask.window:
        return Seen(None, (mask.ends if mask.ends.ndim == 2 else mask.ends[None]).clamp(0, s).contiguous())
    visible = mask.tensor(t, s, device)
    visible = torch.ones(1, t, s, dtype=torch.bool, device=device) if visible is None else visible.reshape(-1, t, s) if visible.ndim == 2 else visible[:, 0]
    order = None
    if not sorted_already:
        assert places is not None
        order = places.argsort(dim=-1, stable=True)  # [b s]
        visible = visible.expand(len(order), t, s).gather(-1, order[:, None].expand(-1, t, -1))
    visible = visible.expand(-1, t, -1)
    counts = visible.sum(-1)
    columns = torch.arange(s, device=device)
    if order is None and torch.equal(visible, columns < counts[..., None]):
        return Seen(None, counts)
    anyone = visible.any(1)  # [b s]
    rank = anyone.cumsum(-1) - 1
    if torch.equal(visible, anyone[:, None] & (rank[:, None] < counts[..., None])):
        lists = (~anyone).to(torch.uint8).argsort(dim=-1, stable=True)[:, None]
    else:
        lists = (~visible).to(torch.uint8).argsort(dim=-1, stable=True)
    lists = lists[..., : max(1, int(counts.max()))]
    return Seen(lists if order is None else order[:, None].expand(-1, lists.shape[1], -1).gather(-1, lists), counts)


# Compiled code


def _compiled(code: object, q: Tensor, k: Tensor, v: Tensor, rule: Rule, who: Seen) -> Tensor:
    b, h, t, d_key = q.shape
    _, g, _, d_value = v.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    z = torch.empty(b, t, h, d_value, dtype=q.dtype)
    lists = None if who.list is None else who.list.contiguous()
    counts, sink, bias = who.counts.contiguous(), rule.normaliser.sink(), rule.bias
    sink = None if sink is None else sink.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    step = lambda x, axis: x.stride(axis) if x is not None and x.shape[axis] > 1 else 0
    address = lambda x: 0 if x is None else x.data_ptr()
    call = _CALL.pack(
        *map(address, (q, k, v, z, lists, counts, bias, sink)),
        *(b, h, g, t, d_key, d_value),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], t * h * d_value, d_value, h * d_value),
        *(step(lists, 0), step(lists, 1), step(counts, 0), step(bias, 0), step(bias, 1), step(bias, 2)),
        *(_TYPES[q.dtype], _TYPES[k.dtype], torch.get_num_threads()),
        *(rule.scale, rule.cap or 0.0),
    )
    code.glassformer_attend_steadily(call)  # type: ignore[attr-defined]
    return z.transpose(1, 2)


# By torch


def _by_torch(q: Tensor, k: Tensor, v: Tensor, rule: Rule, who: Seen) -> Tensor:
    b, h, t, _ = q.shape
    n = int(who.counts.max())
    if n == 0:
        return q.new_zeros(b, h, t, v.shape[-1])
    step = max(1, AT_ONCE // (b * h * n * k.shape[-1]))
    pieces = [_some(q, k, v, rule, who, n, at, min(at + step, t)) for at in range(0, t, step)]
    return torch.cat(pieces, 2)


def _some(q: Tensor, k: Tensor, v: Tensor, rule: Rule, who: Seen, n: int, first: int, last: int) -> Tensor:
    """Queries ``first`` to ``last`` (not included)."""
    (b, h, _, _), g, t = q.shape, k.shape[1], last - first
    counts = who.counts[:, first:last].expand(b, t)
    lists = torch.arange(n, device=q.device).expand(1, 1, n) if who.list is None else who.list
    lists = (lists[:, first:last] if lists.shape[1] > 1 else lists)[..., :n].expand(b, t, n)
    rows = torch.arange(b, device=q.device)[:, None, None]
    keys, values = (wide(x.transpose(1, 2)[rows, lists]) for x in (k, v))  # [b t n g k]
    there = torch.arange(n, device=q.device) < counts[..., None]  # [b t n]
    values = torch.where(there[..., None, None], values, 0.0)
    asked = wide(q[:, :, first:last]).transpose(1, 2).unflatten(2, (g, h // g))  # [b t g r k]
    scores = steady.total(asked[:, :, None] * keys[..., None, :])[..., 0].flatten(3) * rule.scale  # [b t n h]
    if rule.cap is not None:
        scores = rule.cap * steady.each(torch.tanh, scores / rule.cap)
    if rule.bias is not None:
        bias = wide(rule.bias).expand(b, h, -1, -1)[:, :, first:last].permute(0, 2, 3, 1)  # [b t s h]
        scores = scores + bias.gather(2, lists[..., None].expand(-1, -1, -1, h))
    weights = _weights(scores.masked_fill(~there[..., None], -torch.inf), counts, rule)
    mixed = steady.total(weights.unflatten(3, (g, h // g))[..., None] * values[..., None, :], 2)[:, :, 0]  # [b t g r kv]
    return mixed.flatten(2, 3).transpose(1, 2).to(q.dtype)


def _weights(scores: Tensor, counts: Tensor, rule: Rule) -> Tensor:
    """Weights [b t n h] of scores that are minus infinity behind the end."""
    from .kernels import SigmoidLayer

    if isinstance(rule.normaliser, SigmoidLayer):
        own = rule.normaliser.bias
        bias = -steady.each(torch.log, counts.clamp(min=1).to(scores.dtype))[..., None, None] if own is None else own
        return steady.each(torch.sigmoid, scores + bias)
    if not rule.normaliser.fused:
        raise InputError(f"{type(rule.normaliser).__name__} has no deterministic way to turn scores into weights: use Softmax, or leave the mode.")
    sink = rule.normaliser.sink()
    top = scores.amax(2, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink.to(scores))
    base = torch.where(top.isinf(), 0.0, top)
    e = steady.each(torch.exp, scores - base)
    sum = steady.total(e, 2)
    if sink is not None:
        sum = sum + steady.each(torch.exp, sink.to(scores) - base)
    return torch.where(sum == 0, 0.0, e / sum)
