"""A head's matrices as circuits read them: out of one view of the weights, queries turned to a distance, norms on queries and keys folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.numerics import wide
from glassformer.parts.attention import AttentionLayer
from glassformer.parts.norm import JointLayer, NoNormLayer, RMSNormLayer

from .matrices import Weights, exact_folds, stack_of, weights
from .subject import is_causal

FURTHEST = 1 << 24
"""The largest distance: float32 counts positions no further."""


def view_of(model: Any, fold: bool | None) -> tuple[Weights, Any]:
    """The view that circuits are read off, and the stack whose heads are meant: a model's (``fold`` None: norms folded in where that is exact),
    or the view that is given in its place.

    Raises :class:`InputError` for a given view of cross-attention, and for ``fold`` that is not what has been done to a given view.
    """
    if not isinstance(model, Weights):
        w = weights(model, fold_norms=exact_folds(model)["fold_norms"] if fold is None else fold)
        return w, stack_of(w.origin)
    if model.kind != "attn":
        raise InputError("The circuits of a head are those of self-attention, but a view of cross-attention was given: give weights(model), without .cross.")
    if fold is not None and fold != model.fold_norms:
        raise InputError(f"fold={fold} was asked for, but the view of the weights that was given has fold_norms={model.fold_norms}: leave fold out.")
    return model, stack_of(model.origin)


def query_and_key(w: Weights, stack: Any, at: tuple[int, int], distance: int) -> tuple[Tensor, Tensor]:
    """[d k] each: the query's matrix of head ``at`` turned by ``distance``, the key's at position 0, QK-norm weights in both."""
    layer: Any = stack.blocks[at[0]].attn
    if isinstance(distance, bool) or not isinstance(distance, int) or abs(distance) > FURTHEST or (distance < 0 and is_causal(stack)):
        raise InputError(
            f"distance={distance!r}: a query of this model sees keys at its own position and before, so a distance is 0, 1, 2, ... up to {FURTHEST:,}."
        )
    q, key = wide(w.W_Q[at]), wide(w.W_K[at])
    for name, n in (("q_norm", layer.n_heads), ("k_norm", layer.n_kv_heads)):
        norm = getattr(layer, name, None)
        if norm is None or isinstance(norm, NoNormLayer):
            continue
        inner = norm.norm if isinstance(norm, JointLayer) else norm
        if not isinstance(inner, RMSNormLayer):
            raise InputError(
                f"The {'queries' if name == 'q_norm' else 'keys'} of layer {at[0]} go through a {type(inner).__name__}: scores are no bilinear form there."
            )
        weight = wide(inner.weight.detach()) + inner.offset
        if isinstance(norm, JointLayer):
            weight = weight.view(n, -1)[at[1] * n // layer.n_heads]
        q, key = (q * weight, key) if name == "q_norm" else (q, key * weight)
    return _turned(layer, q, key, distance) if layer.spec.position.rotates else (q, key)


def _turned(layer: Any, q: Tensor, key: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Query and key [d k] with rotary positions ``distance`` apart."""
    turn = layer.position.rotate
    places = torch.tensor([max(distance, 0), max(-distance, 0)], device=q.device)
    tables = [layer.position.tables(places[i : i + 1]) for i in range(2)]
    q, key = (turn(x[:, None, None], t)[:, 0, 0] for x, t in ((q, tables[0]), (key, tables[1])))
    return q, key


def check_plain_attention(layer: int, attention: Any, lost: str) -> None:
    """Raise :class:`InputError` for attention whose keys and values come by way of a latent; ``lost``: what there is not, then."""
    if not isinstance(attention, AttentionLayer):
        raise InputError(f"Layer {layer} has {type(attention.spec).__name__}, whose keys and values come out of a normed latent: {lost}.")
