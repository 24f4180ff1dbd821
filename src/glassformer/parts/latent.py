"""Latent attention: keys and values are kept as one short vector per token, and made from it when they are needed.

    x ──► q_down ──► norm ──► q_latent ──► q_up ──► q ─┬─ nope ──────────────────────► ┐
                                                       └─ rope ──(rotate)──────────────┴─► q_rot ─┐
    x ──► kv_down ─┬─► norm ──► latent ──► kv_up ─┬─► k nope ──────────────────────────► ┐        ├─► scores ──► pattern ─┐
                   │              │               │                                      ├─► k_rot ┘                       ├─► z ──► out
                   └─► rope ──────┼──(rotate)─────┼─► one for all heads ───────────────► ┘                                 │
                          │       │               └─► v ──────────────────────────────────────────────────────────────────┘
                          ▼       ▼
                        the cache holds these two: kv_lora_rank + d_rope numbers per token, whatever the number of heads

One query per row (decoding) need not make the keys: ``q · (W_k c) = (W_k^T q) · c``, so the query is carried into the
latent space instead, attends there to one shared key, and what it finds is carried back by ``W_v``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import SpecError
from glassformer.core.flow import Pass
from glassformer.core.mask import Everything, Mask
from glassformer.core.spec import check_dropout, part
from glassformer.core.tap import check_heads

from . import steady
from .attention import SelfAttention, _Attention, matrix_of
from .kernels import Normaliser, Softmax
from .linear import Linear, product
from .norm import NoNorm, Norm, RMSNorm
from .position import Position
from .rotary import Rotary


@part
class LatentAttention(SelfAttention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437).

    ``kv_lora_rank``: size of the latent that keys and values are made from. ``q_lora_rank``: the same for queries,
    None: they come straight from the stream. ``d_nope``, ``d_rope``: features of a head that ``position`` leaves alone, and
    those it turns (of the key: one vector for all heads). ``d_value``: None means ``d_nope``. ``norm``: on the latents.
    ``scale``: None means ``1 / sqrt(d_nope + d_rope)``. ``down_bias``: of the maps into the latents. Other fields as in :class:`Attention`.
    """

    n_heads: int
    kv_lora_rank: int
    d_nope: int
    d_rope: int
    d_value: int | None = None
    q_lora_rank: int | None = None
    position: Position = Rotary(layout="interleaved")
    norm: Norm = RMSNorm()
    mask: Mask = Everything()
    normaliser: Normaliser = Softmax()
    cap: float | None = None
    scale: float | None = None
    down_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_heads", "kv_lora_rank", "d_nope", "d_rope", "d_value", "q_lora_rank"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise SpecError(f"LatentAttention({name}={size}): it is at least 1.")
        if self.position.adds:
            raise SpecError(f"{type(self.position).__name__} adds to the embedding: give it to the model (Decoder(position=...)), not to LatentAttention.")
        if self.cap is not None and self.cap <= 0:
            raise SpecError(f"LatentAttention(cap={self.cap}): a soft-cap is above zero, or None for none.")
        check_dropout("LatentAttention", self.dropout)

    def sizes(self, d: int) -> tuple[int, int, int, int]:
        return self.n_heads, self.n_heads, self.d_nope + self.d_rope, self.d_value or self.d_nope

    def build(self, d: int) -> LatentAttentionLayer:
        return LatentAttentionLayer(self, d)


class LatentAttentionLayer(_Attention):
    """``c = norm(W_down x)``, ``[k_h; v_h] = W_up,h c``, ``k_h <- [k_h; rotate(W_rope x)]``, then attention; [b t d] -> [b t d].

    Rows of ``kv_down``: the latent, then the rotated key. Rows of ``q``, ``q_up``: per head, nope then rope; of ``kv_up``: per head, key then value.
    """

    NORMS = (("q_norm", "b t"), ("kv_norm", "b s"))
    MATRICES = ("kv_up",)  # with a cache each token takes these apart as matrices: held in few bits they would be unpacked for every token

    def __init__(self, spec: LatentAttention, d: int):
        super().__init__(spec, d)
        self.rank, self.d_nope, self.d_rope = spec.kv_lora_rank, spec.d_nope, spec.d_rope
        self.cached = self.rank + self.d_rope
        if spec.q_lora_rank is None:
            self.q = Linear(d, self.n_heads * self.d_head, bias=False)
            self.SITES = tuple(s for s in sites.TABLE["latent"] if s is not sites.Q_LATENT) + sites.TABLE["attention"]
        else:
            self.q_down = Linear(d, spec.q_lora_rank, bias=spec.down_bias)
            self.q_up = Linear(spec.q_lora_rank, self.n_heads * self.d_head, bias=False)
            self.SITES = sites.TABLE["latent"] + sites.TABLE["attention"]
        self.kv_down = Linear(d, self.rank + self.d_rope, bias=spec.down_bias)
        self.kv_up = Linear(self.rank, self.n_heads * (self.d_nope + self.d_value), bias=False)

    def build_norms(self, d: int) -> None:
        spec = self.spec
        self.q_norm = NoNorm().build(d) if spec.q_lora_rank is None else spec.norm.build(spec.q_lora_rank)
        self.kv_norm = spec.norm.build(spec.kv_lora_rank)
        self.position = spec.position.build(d, self.n_heads, spec.d_rope)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.ATTN_IN, x)
        tables = self.tables(p)
        latent, rope = self.kv_down(x).split((self.rank, self.d_rope), -1)
        latent = p.see(sites.LATENT, self.kv_norm(latent, p.at("kv_norm")))
        rope = rope[:, :, None]  # [b t 1 k]
        q = p.see(sites.Q, self.split(self.queries(x, p), self.n_heads))
        q = p.see(sites.Q_ROT, torch.cat([q[..., : self.d_nope], self.position.rotate(q[..., self.d_nope :], tables)], -1))
        newest = p.slot.newest
        latents, turned, places = p.slot.update(latent[:, :, None], self.position.rotate(rope, tables), p.index)
        mask, bias = self.sight(x.shape[0], places, newest, p)
        alone = p.slot.layout == "none"
        edited = any(p.edits(s) for s in (sites.K, sites.V, sites.K_ROT))
        fresh = self.fresh(latent, rope, tables, p) if alone or p.tap is not None else None
        if not edited and (steady.on() or (not alone and x.shape[1] == 1)):
            up = matrix_of(self.kv_up).view(self.n_heads, self.d_nope + self.d_value, self.rank)
            return self.attend(*self.absorbed(q, latents, turned, up), mask, bias, p, lambda z: self.lift(z, up))
        if alone and fresh is not None:
            k, v = (y.transpose(1, 2) for y in fresh)
        else:
            k, v = (y.transpose(1, 2) for y in self.expand(latents[:, 0], turned.transpose(1, 2)))
            if edited and fresh is not None:
                k, v = (_placed(old, new, places, p.index) for old, new in zip((k, v), fresh, strict=True))
        if (narrower := self.d_head - self.d_value) > 0:
            # Fused kernels want values as wide as keys: with zeros beside them they take a quarter of the time (a processor, 1,024 tokens, 192 to 128).
            return self.attend(q, k, F.pad(v, (0, narrower)), mask, bias, p, lambda z: z[..., : self.d_value])
        return self.attend(q, k, v, mask, bias, p)

    def queries(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t hk"]:
        """Queries of all heads, straight from the stream or by way of a latent."""
        if self.spec.q_lora_rank is None:
            direct: Tensor = self.q(x)
            return direct
        latent = p.see(sites.Q_LATENT, self.q_norm(self.q_down(x), p.at("q_norm")))
        made: Tensor = self.q_up(latent)
        return made

    def expand(self, latent: Float[Tensor, "b s r"], rope: Float[Tensor, "b s 1 k"]) -> tuple[Float[Tensor, "b s h k2"], Float[Tensor, "b s h kv"]]:
        """Keys and values of every head; ``rope`` is the part of the key that all heads share."""
        nope, v = self.split(self.kv_up(latent), self.n_heads).split((self.d_nope, self.d_value), -1)
        return torch.cat([nope, rope.expand(-1, -1, self.n_heads, -1)], -1), v

    def fresh(self, latent: Tensor, rope: Tensor, tables: Any, p: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values [b t h k] of the tokens of this call, as they are shown.

        They are made from the latent anew in every call, so with a cache an edit of them lasts for one call; an edit of ``latent`` lasts.
        """
        k, v = self.expand(latent, self.position.rotate(rope, tables))
        unturned = lambda: torch.cat([k[..., : self.d_nope], rope.expand(-1, -1, self.n_heads, -1)], -1)
        if p.edits(sites.K):
            shown = p.see(sites.K, unturned())
            k = torch.cat([shown[..., : self.d_nope], self.position.rotate(shown[..., self.d_nope :], tables)], -1)
        else:
            p.offer(sites.K, lambda heads: unturned() if heads is None else _heads(unturned(), heads))
        return p.see(sites.K_ROT, k), p.see(sites.V, v)

    # Attention in the latent space

    def absorbed(
        self, q: Float[Tensor, "b t h k"], latents: Float[Tensor, "b 1 s r"], turned: Float[Tensor, "b 1 s k2"], up: Float[Tensor, "h kv r"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, one key and one value in the latent space whose scores are those of the expanded ones; ``up`` is ``kv_up`` by heads."""
        w = up[:, : self.d_nope].to(q.dtype)  # [h k r]
        inside = _by_heads(q[..., : self.d_nope], w)
        return torch.cat([inside, q[..., self.d_nope :]], -1), torch.cat([latents, turned], -1), latents

    def lift(self, z: Float[Tensor, "b t h r"], up: Float[Tensor, "h kv r"]) -> Float[Tensor, "b t h k"]:
        """A mix of latents as the mix of values that it stands for."""
        w = up[:, self.d_nope :].to(z.dtype)
        return _by_heads(z, w.transpose(1, 2))


def _by_heads(x: Tensor, w: Tensor) -> Tensor:
    """Every head's vectors [b t h k] times its own matrix [h k r]: [b t h r]."""
    if steady.on():
        return torch.stack([product(x[:, :, i], w[i].T.contiguous()) for i in range(len(w))], 2)
    return (x.transpose(1, 2) @ w).transpose(1, 2)


def _heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    check_heads(heads, x.shape[2], "the keys of a layer")
    return x[:, :, list(heads)]


def _placed(old: Tensor, new: Tensor, places: Tensor, index: Tensor) -> Tensor:
    """``old`` [b h s k] with this call's tokens ``new`` [b t h k] where they stand."""
    b, t = new.shape[:2]
    column = (places.expand(b, -1)[:, None] == index.expand(b, t)[..., None]).long().argmax(-1)  # [b t]
    rows = torch.arange(b, device=new.device)[:, None]
    return old.transpose(1, 2).index_put((rows, column), new).transpose(1, 2)
