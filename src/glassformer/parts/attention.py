"""Attention: every position asks, every visible position answers by how well its key fits.

    x ──► query ──► q ─(norm)─(rotate)──► q_rot ─┐
                                                 ├─► scores ──► pattern ─┐
    m ──► key ────► k ─(norm)─(rotate)──► k_rot ─┘                       ├─► z ──► out
      └─► value ──► v ───────────────────────────────────────────────────┘

``m`` is ``x`` itself in self-attention, the encoder's output in cross-attention (queries come from
the decoder, keys and values from the encoder). With ``n_kv_heads`` below ``n_heads``, groups of query
heads share a key/value head (grouped-query, arXiv 2305.13245; multi-query with one, arXiv 1911.02150).

The pattern depends on the input, so attention is not linear in it; it is linear in the values once the
pattern is fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import InputError, SpecError
from glassformer.core.flow import Pass
from glassformer.core.mask import Everything, Mask, Resolved, resolve
from glassformer.core.sites import Site
from glassformer.core.spec import Spec, check_dropout, part
from glassformer.core.tap import check_heads

from . import decoding, kernels, steady
from .kernels import Normaliser, Rule, Softmax
from .linear import Linear
from .norm import NoNorm, Norm
from .position import NoPosition, Position


class SelfAttention(Spec):
    """What stands in ``Block(attention=...)``: attention of a stream to itself."""

    _usual: ClassVar[str] = "Attention"

    n_heads: int
    mask: Mask

    def sizes(self, d: int) -> tuple[int, int, int, int]:
        """``(n_heads, n_kv_heads, d_head, d_value)`` in a stream of width ``d``."""
        raise NotImplementedError

    def build(self, d: int) -> _Attention:
        """The module in a stream of width ``d``."""
        raise NotImplementedError


@part
class Attention(SelfAttention):
    """Multi-head attention (arXiv 1706.03762) and its variants.

    ``n_kv_heads``: None means ``n_heads``. ``d_head``: None means ``d_model / n_heads``. ``d_value``:
    size of a value, None means ``d_head``. ``mask``: what this layer adds to the pass's mask
    (``Window(512)``). ``cap``: soft-cap ``c tanh(s / c)`` on scores (Gemma 2, arXiv 2408.00118).
    ``qk_norm``: a norm on each head's queries and keys (arXiv 2302.05442), or on all heads' together (``Joint(RMSNorm())``). ``scale``: None means
    ``1 / sqrt(d_head)``. ``dropout``: of attention weights, in training.
    """

    n_heads: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_value: int | None = None
    position: Position = NoPosition()
    mask: Mask = Everything()
    normaliser: Normaliser = Softmax()
    qk_norm: Norm = NoNorm()
    cap: float | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        g = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.n_heads < 1 or g < 1:
            raise SpecError(f"Attention has n_heads={self.n_heads} and n_kv_heads={g}: there is at least one of each.")
        if self.n_heads % g:
            raise SpecError(f"Attention has n_heads={self.n_heads} and n_kv_heads={g}: the first must be a multiple of the second.")
        if self.position.adds:
            raise SpecError(f"{type(self.position).__name__} adds to the embedding: give it to the model (Decoder(position=...)), not to Attention.")
        if self.cap is not None and self.cap <= 0:
            raise SpecError(f"Attention(cap={self.cap}): a soft-cap is above zero, or None for none.")
        for name in ("d_head", "d_value"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise SpecError(f"Attention({name}={size}): a head has at least 1 feature; None means the usual number.")
        check_dropout("Attention", self.dropout)

    def sizes(self, d: int) -> tuple[int, int, int, int]:
        """``(n_heads, n_kv_heads, d_head, d_value)`` in a stream of width ``d``."""
        g = self.n_kv_heads or self.n_heads
        if self.d_head is None and d % self.n_heads:
            raise SpecError(f"d_model={d} is no multiple of n_heads={self.n_heads}: change one of them, or give d_head.")
        k = self.d_head or d // self.n_heads
        return self.n_heads, g, k, self.d_value or k

    def build(self, d: int) -> AttentionLayer:
        """Self-attention in a stream of width ``d``."""
        return AttentionLayer(self, d)

    def build_cross(self, d: int, d_memory: int) -> CrossAttentionLayer:
        """Attention from a stream of width ``d`` to a memory of width ``d_memory``."""
        return CrossAttentionLayer(self, d, d_memory)


class _Attention(nn.Module):
    """What all attention shares: norms of q and k, the kernel, the output projection."""

    SITES: tuple[Site, ...] = sites.TABLE["attention"]
    NORMS: tuple[tuple[str, str], ...] = (("q_norm", "b t h"), ("k_norm", "b s g"))
    """Its norms by name, and the axes of what they norm but for the last."""
    cached = 0
    """How many numbers a cache holds per token (of cross-attention: none, its memory does not grow)."""

    def __init__(self, spec: Any, d: int):
        super().__init__()
        self.spec, self.d = spec, d
        self.n_heads, self.n_kv_heads, self.d_head, self.d_value = spec.sizes(d)
        self.scale = self.d_head**-0.5 if spec.scale is None else spec.scale
        self.build_norms(d)
        self.normed = not isinstance(getattr(spec, "qk_norm", None), NoNorm)
        self.normaliser = spec.normaliser.build(self.n_heads)
        self.out = Linear(self.n_heads * self.d_value, d, bias=spec.out_bias)
        # What is printed of a tensor is not all of it: a mask that holds one is never shared.
        self.mask_key = None if _holds_tensor(spec.mask) else repr(spec.mask)

    def build_norms(self, d: int) -> None:
        """Make the norms of queries and keys, and the position encoding."""
        self.q_norm = self.spec.qk_norm.build_heads(self.n_heads, self.d_head)
        self.k_norm = self.spec.qk_norm.build_heads(self.n_kv_heads, self.d_head)
        self.position = self.spec.position.build(d, self.n_heads, self.d_head)

    def split(self, x: Tensor, n: int) -> Tensor:
        """[b t (n k)] -> [b t n k]."""
        return x.view(*x.shape[:2], n, -1)

    def tables(self, p: Pass) -> Any:
        """What turns queries and keys at the places of this pass (see ``PositionLayer.tables``)."""
        key = self.position.key
        return self._shared(p, None if key is None else f"rotary:{key}", lambda: self.position.tables(p.positions, p.lengths))

    def sight(self, rows: int, places: Tensor, newest: bool, p: Pass) -> tuple[Resolved, Tensor | None]:
        """Who sees which of the keys that stand at ``places``, and the bias on their scores."""
        key = self.position.key
        mask = self._shared(
            p,
            None if self.mask_key is None else f"mask:{self.mask_key}:{p.slot.layout}",
            lambda: resolve(p.mask & self.spec.mask, p.index, places, rows=rows, newest=newest, in_order=p.slot.layout == "dense"),
        )
        bias = self._shared(p, None if key is None else f"bias:{key}:{p.slot.layout}", lambda: self.position.bias(p.index, places))
        if "position" in p.shared:  # a bias that all layers share (T5)
            of_model = self._shared(p, f"bias:model:{p.slot.layout}", lambda: p.shared["position"].bias(p.index, places))
            bias = of_model if bias is None else bias + of_model
        if steady.on():
            mask.places = places
        return mask, bias

    @staticmethod
    def _shared(p: Pass, key: str | None, make):  # type: ignore[no-untyped-def]
        """A value that all layers of one pass have in common, made by the first (key None: the layer's own)."""
        if key is None:
            return make()
        if key not in p.shared:
            p.shared[key] = make()
        return p.shared[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Resolved, bias: Tensor | None, p: Pass, lift: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """From q [b t h k] and k, v [b g s k] to the layer's output [b t d]; ``lift`` makes of a mix of ``v`` what a head returns."""
        rule = Rule(self.scale, self.spec.cap, bias, mask, self.normaliser)
        dropout = self.spec.dropout if self.training else 0.0
        q = q.transpose(1, 2)
        if p.tap is None:
            z = kernels.attend(q, k, v, rule, dropout)
        elif p.edits(sites.SCORES) or p.edits(sites.PATTERN):
            steady.refuse("Scores and patterns of attention cannot be edited")
            pattern = p.see(sites.PATTERN, kernels.pattern_of(p.see(sites.SCORES, kernels.scores_of(q, k, rule)), rule))
            z = kernels.mix(F.dropout(pattern, dropout) if dropout else pattern, v)
        else:
            made: dict[tuple[int, ...] | None, Tensor] = {}  # scores that somebody keeps: the pattern is made from those

            def scores(heads: tuple[int, ...] | None) -> Tensor:
                made[heads] = made[heads] if heads in made else kernels.scores_of(q, k, rule, heads)
                return made[heads]

            p.offer(sites.SCORES, scores)
            p.offer(sites.PATTERN, lambda heads: kernels.pattern_of(made[heads] if heads in made else kernels.scores_of(q, k, rule, heads), rule, heads))
            made.clear()  # who keeps them has them
            z = kernels.attend(q, k, v, rule, dropout)
        z = z.transpose(1, 2)
        z = p.see(sites.Z, z if lift is None else lift(z))
        return p.see(sites.ATTN_OUT, self.project(z, p))

    def project(self, z: Tensor, p: Pass) -> Tensor:
        """From heads back to the stream: [b t h k] -> [b t d]; per head (``result``) when asked."""
        if p.edits(sites.RESULT):
            steady.refuse("Single heads' results cannot be edited")
            out = p.see(sites.RESULT, self.result(z, None)).sum(2)
            return out if self.out.bias is None else out + self.out.bias
        p.offer(sites.RESULT, lambda heads: self.result(z, heads))
        joined: Tensor = self.out(z.flatten(2))
        return joined

    def result(self, z: Tensor, heads: tuple[int, ...] | None) -> Tensor:
        """Each head's own output in the stream's space, [b t h d]."""
        w = matrix_of(self.out).view(self.d, self.n_heads, self.d_value)
        if heads is not None:
            check_heads(heads, self.n_heads, "a result")
            z, w = z[:, :, list(heads)], w[:, list(heads)]
        # einsum "b t h k, d h k -> b t h d" as one product per head
        return (z.transpose(1, 2) @ w.permute(1, 2, 0).to(z.dtype)).transpose(1, 2)


class AttentionLayer(_Attention):
    """Self-attention: ``out = concat_h(softmax(q_h k_h^T / sqrt(k) + mask) v_h) W_out``; [b t d] -> [b t d].

    Queries, keys and values come from one projection ``qkv`` whose rows are ``h*k`` queries, then
    ``g*k`` keys, then ``g*d_value`` values.
    """

    def __init__(self, spec: Attention, d: int):
        super().__init__(spec, d)
        self.widths = (self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_value)
        self.cached = self.n_kv_heads * (self.d_head + self.d_value)
        self.qkv = Linear(d, sum(self.widths), bias=spec.qkv_bias)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.ATTN_IN, x)
        q, k, v = self.qkv(x).split(self.widths, -1)
        q = p.see(sites.Q, self.split(q, self.n_heads))
        k = p.see(sites.K, self.split(k, self.n_kv_heads))
        v = p.see(sites.V, self.split(v, self.n_kv_heads))
        tables = self.tables(p)
        q = p.see(sites.Q_ROT, self.position.rotate(self.q_norm(q, p.at("q_norm")) if self.normed else q, tables))
        k = p.see(sites.K_ROT, self.position.rotate(self.k_norm(k, p.at("k_norm")) if self.normed else k, tables))
        newest = p.slot.newest
        if p.tap is None and (z := self.at_once(q, k, v, newest, p)) is not None:
            return self.project(z, p)
        keys, values, places = p.slot.update(k, v, p.index)
        mask, bias = self.sight(x.shape[0], places, newest, p)
        return self.attend(q, keys, values, mask, bias, p)

    def at_once(self, q: Tensor, k: Tensor, v: Tensor, newest: bool, p: Pass) -> Tensor | None:
        """Heads' results [b t h k] of a decode step that writes its keys and values and attends in one go; None where that is not to be had."""
        if steady.on() or (code := decoding.library(q)) is None or (room := p.slot.reserve(k, v)) is None:
            return None
        keys, values = room
        places = self._shared(p, f"places:{p.slot.layout}", lambda: torch.arange(keys.shape[2], device=q.device))
        mask, bias = self.sight(q.shape[0], places, newest, p)
        rule = Rule(self.scale, self.spec.cap, bias, mask, self.normaliser)
        q = q.transpose(1, 2)
        if not decoding.fits(keys, values, rule, self.spec.dropout if self.training else 0.0):
            return None
        return decoding.attend(code, q, keys, values, rule, (k, v)).transpose(1, 2)


class CrossAttentionLayer(_Attention):
    """Attention to an encoder's output: queries from the stream, keys and values from the memory.

    Positions do not turn or bias cross-attention: the two rows have no common count.
    """

    def __init__(self, spec: Attention, d: int, d_memory: int):
        if spec.position.rotates or spec.position.biases:
            raise SpecError(f"Cross-attention takes no position encoding, but {type(spec.position).__name__} was given: use NoPosition().")
        super().__init__(spec, d)
        self.widths = (self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_value)
        self.q = Linear(d, self.n_heads * self.d_head, bias=spec.qkv_bias)
        self.kv = Linear(d_memory, sum(self.widths), bias=spec.qkv_bias)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.ATTN_IN, x)
        q = p.see(sites.Q, self.split(self.q(x), self.n_heads))
        q = p.see(sites.Q_ROT, self.q_norm(q, p.at("q_norm")))
        keys, values = p.slot.once(lambda: self._keys_and_values(p))
        if "cross" not in p.shared:
            p.shared["cross"] = _resolve_memory(p, x.shape[0], keys.shape[2])
        return self.attend(q, keys, values, p.shared["cross"], None, p)

    def _keys_and_values(self, p: Pass) -> tuple[Tensor, Tensor]:
        if p.memory is None:
            raise InputError("This decoder attends to an encoder's output, but none was given: call it with memory=encoder_states.")
        k, v = self.kv(p.memory).split(self.widths, -1)
        k = p.see(sites.K, self.split(k, self.n_kv_heads))
        v = p.see(sites.V, self.split(v, self.n_kv_heads))
        k = p.see(sites.K_ROT, self.k_norm(k, p.at("k_norm")))
        return k.transpose(1, 2), v.transpose(1, 2)


def matrix_of(linear: nn.Linear) -> Tensor:
    """The matrix [out in] that a linear layer multiplies by, in whichever way it is held."""
    w = linear.weight
    if not hasattr(w, "tensor_data_names"):
        return w
    # Held in few bits by torchao: some of its types can only multiply, so unit vectors are asked for the columns.
    columns: Tensor = F.linear(torch.eye(linear.in_features, dtype=w.dtype, device=w.device), w)
    return columns.T.contiguous()


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_holds_tensor(v) for v in value)
    if isinstance(value, Spec):
        return any(_holds_tensor(getattr(value, f.name)) for f in dataclasses.fields(value))
    return isinstance(value, Tensor)


def _resolve_memory(p: Pass, rows: int, s: int) -> Resolved:
    """The memory's own mask (padding of the source), the same for every query."""
    if isinstance(p.memory_mask, Everything):
        return Resolved(p.memory_mask, False, None)
    places = p.index.new_zeros(1).expand(1), p.index.new_ones(s).cumsum(0) - 1
    return resolve(p.memory_mask, places[0], places[1], rows=rows)
