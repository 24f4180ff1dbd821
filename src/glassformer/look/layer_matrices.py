"""One layer's matrices by what they do, whatever the layer holds them in: queries, keys and values of one product, a gate beside its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.parts.attention import AttentionLayer, CrossAttentionLayer, matrix_of
from glassformer.parts.feedforward import GatedLayer, PlainLayer


def projection(layer: Any, which: int) -> Tensor:
    """Queries, keys or values: [h d k]."""
    if isinstance(layer, AttentionLayer):
        rows = matrix_of(layer.qkv).split(layer.widths)[which]
    elif isinstance(layer, CrossAttentionLayer):
        rows = matrix_of(layer.q) if which == 0 else matrix_of(layer.kv).split(layer.widths)[which - 1]
    else:
        raise InputError(
            f"{type(layer.spec).__name__} makes {('queries', 'keys', 'values')[which]} by way of a normed latent, so that no one matrix stands for them."
        )
    return _per_head(layer, rows.detach(), which).mT


def projection_bias(layer: Any, which: int) -> Tensor:
    """What is added to them: [h k]; zeros where there is none."""
    if isinstance(layer, AttentionLayer):
        rows = bias_of(layer.qkv, sum(layer.widths)).split(layer.widths)[which]
    elif isinstance(layer, CrossAttentionLayer):
        rows = bias_of(layer.q, layer.q.out_features) if which == 0 else bias_of(layer.kv, sum(layer.widths)).split(layer.widths)[which - 1]
    else:
        raise InputError(f"{type(layer.spec).__name__} makes queries, keys and values by way of a normed latent: they have no bias by these names.")
    return _per_head(layer, rows, which)


def _per_head(layer: Any, rows: Tensor, which: int) -> Tensor:
    """[(n k) ..] -> [h k ..], key/value heads repeated for their query heads."""
    n = layer.n_heads if which == 0 else layer.n_kv_heads
    split = rows.view(n, -1, *rows.shape[1:])
    return split if n == layer.n_heads else split.repeat_interleave(layer.n_heads // n, 0)


def entry_of(layer: Any) -> Any:
    """The linear map by which a feed-forward layer reads the stream."""
    return layer.up if isinstance(layer, PlainLayer) else gated_of(layer).gate_up


def gated_of(layer: Any) -> Any:
    """The layer itself; raises :class:`InputError` for one without a gate."""
    if not isinstance(layer, GatedLayer):
        raise InputError(f"W_gate is of a gated feed-forward layer, but this model's is {type(layer.spec).__name__}, which has W_in and W_out only.")
    return layer


def rows_of(layer: Any, which: str) -> Tensor:
    """Rows [f d] of the hidden units' own map, or of the gate's."""
    if which == "in" and isinstance(layer, PlainLayer):
        return matrix_of(layer.up).detach()
    gate, up = matrix_of(gated_of(layer).gate_up).detach().chunk(2)
    return gate if which == "gate" else up


def bias_of(linear: Any, size: int) -> Tensor:
    """A linear map's bias [size]; zeros where there is none."""
    bias = linear.bias
    return torch.zeros(size, dtype=linear.weight.dtype, device=linear.weight.device) if bias is None else bias.detach()
