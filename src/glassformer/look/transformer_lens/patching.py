"""Activation patching by TransformerLens' names: a metric for every activation that is brought from one run into another.

    get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)          [layer, position]
    get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, clean_cache, metric)  [layer, head]

Each patched run begins at the layer that it changes, from the corrupted run's own stream. :func:`glassformer.look.activation_patch` runs whole
sweeps in batches; here ``metric(logits)`` is called with the logits of one run at a time, as their notebooks expect.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described

from .names import get_act_name

Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]

SIZES: dict[str, Callable[[Any, Tensor], int]] = {
    "layer": lambda model, tokens: model.cfg.n_layers,
    "pos": lambda model, tokens: tokens.shape[-1],
    "src_pos": lambda model, tokens: tokens.shape[-1],
    "dest_pos": lambda model, tokens: tokens.shape[-1],
    "head_index": lambda model, tokens: model.cfg.n_heads,
    "head": lambda model, tokens: model.cfg.n_heads,
}


def layer_pos_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Index (layer, position)."""
    corrupted[:, index[1]] = clean[:, index[1]]
    return corrupted


def layer_pos_head_vector_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Index (layer, position, head) of q, k, v, z or result."""
    corrupted[:, index[1], index[2]] = clean[:, index[1], index[2]]
    return corrupted


def layer_head_vector_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Index (layer, head) of q, k, v, z or result."""
    corrupted[:, :, index[1]] = clean[:, :, index[1]]
    return corrupted


def layer_head_pattern_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Index (layer, head) of scores or pattern."""
    corrupted[:, index[1]] = clean[:, index[1]]
    return corrupted


def layer_head_pos_pattern_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Index (layer, head, query position) of scores or pattern."""
    corrupted[:, index[1], index[2]] = clean[:, index[1], index[2]]
    return corrupted


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Callable[[Tensor], Any],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str],
    **others: Any,
) -> Tensor:
    """The metric of every patched run, one axis for each of ``index_axis_names``, of which the first is the layer."""
    if wanted := [n for n, v in others.items() if v]:
        raise InputError(f"{wanted[0]} is not made here: the answer is a tensor of the metric of the logits, its axes index_axis_names in that order.")
    if not index_axis_names or index_axis_names[0] != "layer" or any(a not in SIZES for a in index_axis_names):
        raise InputError(f"index_axis_names={list(index_axis_names)!r} begins with 'layer' and goes on with {', '.join(n for n in SIZES if n != 'layer')}.")
    tokens = model._ids(corrupted_tokens, None)
    sizes = [SIZES[a](model, tokens) for a in index_axis_names]
    with torch.no_grad():
        _, begun = model.run_with_cache(tokens, return_type=None, names_filter=lambda n: n.endswith("hook_resid_pre"))
    made = torch.zeros(sizes, device=model.cfg.device)
    for index in itertools.product(*map(range, sizes)):
        name = get_act_name(activation_name, index[0])
        if name not in clean_cache:
            raise InputError(f"The clean cache holds no {name!r}, which is brought into the other run: make it with run_with_cache(clean_tokens).")
        clean = clean_cache[name]
        if clean.ndim > 1 and clean.shape[1] != tokens.shape[1] and clean.shape[-1] != tokens.shape[1]:
            raise InputError(
                f"The clean cache's {name!r} has shape {tuple(clean.shape)}, but the corrupted run {tokens.shape[1]} positions: use texts of equal length."
            )
        hook = lambda x, hook, i=index, c=clean: patch_setter(x, i, c)
        logits = model.run_with_hooks(begun["resid_pre", index[0]], start_at_layer=index[0], fwd_hooks=[(name, hook)])
        value = patching_metric(logits)
        if not isinstance(value, int | float) and (not isinstance(value, Tensor) or value.numel() != 1):
            got = tuple(value.shape) if isinstance(value, Tensor) else described(type(value))
            raise InputError(f"The metric gave {got}, but one number for each run is kept: reduce it, for example with .mean().")
        made[index] = float(value.detach() if isinstance(value, Tensor) else value)
    return made


def _sweep(activation: str, axes: tuple[str, ...], setter: Setter, doc: str) -> Callable[..., Tensor]:
    def run(model: Any, corrupted_tokens: Any, clean_cache: Any, patching_metric: Callable[[Tensor], Any], **rest: Any) -> Tensor:
        return generic_activation_patch(model, corrupted_tokens, clean_cache, patching_metric, setter, activation, axes, **rest)

    run.__doc__ = doc
    return run


_POSITION, _HEADS, _BY_POSITION = ("layer", "pos"), ("layer", "head"), ("layer", "pos", "head")
get_act_patch_resid_pre = _sweep("resid_pre", _POSITION, layer_pos_patch_setter, "The stream that enters a layer: [layer, position].")
get_act_patch_resid_mid = _sweep("resid_mid", _POSITION, layer_pos_patch_setter, "The stream between attention and feed-forward: [layer, position].")
get_act_patch_attn_out = _sweep("attn_out", _POSITION, layer_pos_patch_setter, "What attention adds: [layer, position].")
get_act_patch_mlp_out = _sweep("mlp_out", _POSITION, layer_pos_patch_setter, "What the feed-forward layer adds: [layer, position].")
get_act_patch_attn_head_out_all_pos = _sweep("z", _HEADS, layer_head_vector_patch_setter, "A head's output at all positions: [layer, head].")
get_act_patch_attn_head_q_all_pos = _sweep("q", _HEADS, layer_head_vector_patch_setter, "A head's queries at all positions: [layer, head].")
get_act_patch_attn_head_k_all_pos = _sweep("k", _HEADS, layer_head_vector_patch_setter, "A head's keys at all positions: [layer, head].")
get_act_patch_attn_head_v_all_pos = _sweep("v", _HEADS, layer_head_vector_patch_setter, "A head's values at all positions: [layer, head].")
get_act_patch_attn_head_pattern_all_pos = _sweep("pattern", _HEADS, layer_head_pattern_patch_setter, "A head's pattern at all positions: [layer, head].")
get_act_patch_attn_head_out_by_pos = _sweep("z", _BY_POSITION, layer_pos_head_vector_patch_setter, "A head's output: [layer, position, head].")
get_act_patch_attn_head_q_by_pos = _sweep("q", _BY_POSITION, layer_pos_head_vector_patch_setter, "A head's queries: [layer, position, head].")
get_act_patch_attn_head_k_by_pos = _sweep("k", _BY_POSITION, layer_pos_head_vector_patch_setter, "A head's keys: [layer, position, head].")
get_act_patch_attn_head_v_by_pos = _sweep("v", _BY_POSITION, layer_pos_head_vector_patch_setter, "A head's values: [layer, position, head].")
get_act_patch_attn_head_pattern_by_pos = _sweep(
    "pattern", ("layer", "head", "dest_pos"), layer_head_pos_pattern_patch_setter, "A head's pattern: [layer, head, query position]."
)


def get_act_patch_attn_head_all_pos_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Callable[[Tensor], Any]) -> Tensor:
    """Output, queries, keys, values and pattern of every head: [5, layer, head]."""
    kinds = ("out", "q", "k", "v", "pattern")
    return torch.stack([globals()[f"get_act_patch_attn_head_{kind}_all_pos"](model, corrupted_tokens, clean_cache, metric) for kind in kinds])


def get_act_patch_attn_head_by_pos_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Callable[[Tensor], Any]) -> Tensor:
    """The same at every position: [5, layer, position, head]."""
    parts = [globals()[f"get_act_patch_attn_head_{kind}_by_pos"](model, corrupted_tokens, clean_cache, metric) for kind in ("out", "q", "k", "v", "pattern")]
    return torch.stack([*parts[:-1], parts[-1].transpose(1, 2)])


def get_act_patch_block_every(model: Any, corrupted_tokens: Any, clean_cache: Any, metric: Callable[[Tensor], Any]) -> Tensor:
    """Stream, attention output and feed-forward output: [3, layer, position]."""
    sweeps = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([sweep(model, corrupted_tokens, clean_cache, metric) for sweep in sweeps])
