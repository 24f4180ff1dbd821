"""Models whose heads are set by hand to be exactly one thing each, in a stream where every feature has a place of its own.

    stream  = [ token one-hot V | position one-hot P | what the layers before wrote V ]

Scores are ``SHARP`` where a head is meant to look and 0 elsewhere, so its weight is all there; where nothing fits, a row is even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import glassformer as gf
from glassformer.parts.feedforward import Plain

V, P = 26, 60
SHARP = 60.0
KINDS = ("previous", "first", "itself", "same", "writes previous", "induction", "even", "local")


def planted(layers: list[list[str]], norm: Any = None, v: int = V, p: int = P) -> Any:
    """A decoder without feed-forward, whose layers have these heads (each a word of :data:`KINDS`), equally many in each layer."""
    d, k = 2 * v + p, max(v, p)
    norm = gf.NoNorm() if norm is None else norm
    blocks = tuple(
        gf.Block(attention=gf.Attention(n_heads=len(heads), d_head=k, d_value=k, scale=1.0), feedforward=Plain(d_ff=1), norm=norm) for heads in layers
    )
    model = gf.Decoder(v, d, blocks, final_norm=gf.NoNorm(), position=gf.Learned(p), tied=False).build(seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.embed.weight[:, :v] = torch.eye(v)
        model.position.table[:, v : v + p] = torch.eye(p)
        for block, heads in zip(model.blocks, layers, strict=True):
            block.attn.qkv.weight.copy_(torch.cat([torch.cat(m) for m in zip(*(_head(h, v, p, k) for h in heads), strict=True)]))
            for i, head in enumerate(heads):
                if head == "writes previous":  # its value, the token, goes to the last part of the stream
                    block.attn.out.weight[v + p :, i * k : i * k + v] = torch.eye(v)
                if head == "induction":  # the token that it finds goes straight to the logits
                    block.attn.out.weight[v + p :, i * k : i * k + v] = torch.eye(v)
        model.readout.weight[:, v + p :] = torch.eye(v) if hasattr(model.readout, "weight") else 0
    return model


def _head(kind: str, v: int, p: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value maps [k d] of a head."""
    d = 2 * v + p
    q, key, value = (torch.zeros(k, d) for _ in range(3))
    token, place, written = slice(0, v), slice(v, v + p), slice(v + p, d)
    value[:v, token] = torch.eye(v)
    if kind in ("previous", "writes previous", "itself", "local"):
        key[:p, place] = torch.eye(p)
    if kind in ("previous", "writes previous"):
        q[: p - 1, v + 1 : v + p] = SHARP * torch.eye(p - 1)  # position t asks for t - 1
    elif kind == "itself":
        q[:p, place] = SHARP * torch.eye(p)
    elif kind == "local":
        for back in (1, 2, 3):
            q[: p - back, v + back : v + p] += SHARP * torch.eye(p - back)
    elif kind == "first":
        q[0, place] = SHARP
        key[0, v] = 1.0
    elif kind == "same":
        q[:v, token], key[:v, token] = SHARP * torch.eye(v), torch.eye(v)
    elif kind == "induction":
        q[:v, token], key[:v, written] = SHARP * torch.eye(v), torch.eye(v)
    return q, key, value
