"""Which parts of a model carry the change of one number between two texts: heads, feed-forwards and the embedding, summing to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.numerics import wide
from glassformer.core.tap import Record
from glassformer.models.transformer import TransformerModel

from .lens_reading import norms_after, plain_pass
from .subject import Subject, Target, feedforward_of


@torch.no_grad()
def parts_of(s: Subject, records: tuple[Record, Record], at: tuple[int, int], aim: Target, change: float) -> dict[str, Any]:
    """What each part contributes to the change of the target: heads, cross [l h], attn, ffn [l], embedding, and the rest."""
    if not isinstance(s.stack, TransformerModel):
        return dict.fromkeys(("heads", "cross", "attn", "ffn", "embedding", "rest"))

    def both(site: str) -> Tensor:
        return torch.stack([record[s.path(site)][0, i] for record, i in zip(records, at, strict=True)])  # 2 ..

    def readout(h: Tensor) -> Tensor:
        return aim.of(s.stack.read(h[None].to(dtype), normed=False)[0])

    dtype = next(s.model.parameters()).dtype
    ends = both(f"blocks.{s.layers - 1}.resid_post")
    g = mean_gradient(readout, ends)
    attn, ffn = torch.zeros(s.layers), torch.zeros(s.layers)
    heads: dict[str, list[Tensor]] = {"attn": [], "cross": []}
    for layer in reversed(range(s.layers)):
        feed = feedforward_of(s.stack, layer)
        for kind in (feed, "cross", "attn"):
            if not s.has(f"blocks.{layer}.{kind}.out"):
                continue
            out_norm, sum_norm = norms_after(s.stack, layer, kind)
            out = both(f"blocks.{layer}.{kind}.out")
            block = s.stack.blocks[layer]
            if sum_norm:
                stream = both(_stream_before(s, layer, kind))
                g = _through(getattr(block, sum_norm), stream + (_apply(getattr(block, out_norm), out) if out_norm else out), g)
            own = _through(getattr(block, out_norm), out, g) if out_norm else g
            if kind == feed:
                ffn[layer] = float((wide(out[1]) - wide(out[0])).double() @ own)
                continue
            attn[layer] += float((wide(out[1]) - wide(out[0])).double() @ own)
            # Each head's output is made from z at this position only: that of all positions would be d_model / d_head times as large.
            z = both(f"blocks.{layer}.{kind}.z")
            result = getattr(block, kind).result((z[1] - z[0])[None, None], None)[0, 0].double()
            heads[kind].insert(0, (result @ own).float().cpu())
    first = both("blocks.0.resid_pre").double()
    embedding = float((first[1] - first[0]) @ g)
    rest = change - float(attn.double().sum() + ffn.double().sum()) - embedding
    return {"heads": _table(heads["attn"]), "cross": _table(heads["cross"]), "attn": attn, "ffn": ffn, "embedding": embedding, "rest": rest}


def _stream_before(s: Subject, layer: int, kind: str) -> str:
    """The site of the stream that a sublayer's output is added to."""
    order = list(s.stack.blocks[layer].order)
    before = order[: order.index(kind)]
    if before:
        return f"blocks.{layer}.{'resid_mid' if before[-1] == 'attn' else 'resid_mid_cross'}"
    return "blocks.0.resid_pre" if layer == 0 else f"blocks.{layer - 1}.resid_post"


def _apply(norm: Any, x: Tensor) -> Tensor:
    y: Tensor = norm(x, plain_pass(x))
    return y


def _through(norm: Any, ends: Tensor, g: Tensor) -> Tensor:
    """The mean gradient before a norm, of that behind it: both [d]."""
    return mean_gradient(lambda x: _apply(norm, x).double() @ g, ends)


def mean_gradient(f: Any, ends: Tensor, points: int = 32) -> Tensor:
    """``integral of grad f(x + s (y - x)) ds`` from 0 to 1 by Gauss and Legendre's rule: [d] in float64.

    ``f``: [n d] -> [n], row by row. ``ends``: x and y, [2 d]. ``g . (y - x) = f(y) - f(x)`` up to what the rule leaves over.
    """
    node, weight = (torch.tensor(v, dtype=torch.float64, device=ends.device) for v in np.polynomial.legendre.leggauss(points))
    x, y = ends.detach().double()
    line = x + (node[:, None] + 1) / 2 * (y - x)
    dtype = ends.dtype if ends.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        line = line.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(f(line).sum(), line)
    return (weight[:, None] / 2 * grad.double()).sum(0)


def _table(rows: list[Tensor]) -> Tensor | None:
    """[l h], NaN where a layer has fewer heads."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan) if rows else None
