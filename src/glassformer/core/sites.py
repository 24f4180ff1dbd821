"""Sites: every value worth looking at has a name, axes, and one line of meaning.

This table is the only place where a site is declared. It feeds the documentation, the
"did you mean" of errors, ``model.sites()``, the shape checks in the tests and the web pages.

Axes: ``b`` batch, ``t`` query position, ``s`` key position, ``h`` head, ``g`` key/value head,
``k`` head size, ``d`` model width, ``f`` feed-forward width, ``v`` vocabulary or classes,
``e`` expert, ``c`` chosen expert, ``r`` rank of a latent, ``w`` width of a factorised embedding's table, ``1`` an axis of size one.

The full path of a site is where its part stands in the model plus its name:
``blocks.3.attn.pattern``, ``blocks.0.norm1.scale``, ``decoder.blocks.2.cross.z``.
"""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """A value that can be observed: its name within its part, its axes, its meaning."""

    name: str
    axes: str
    meaning: str


class SiteInfo(NamedTuple):
    """A site of one model: its full path, axes and meaning."""

    path: str
    axes: str
    meaning: str


# The model as a whole
EMBED = Site("embed", "b t d", "token embedding (with token types and scale, before positions; b t w if the finished sum is lifted to the stream)")
POS_EMBED = Site("pos_embed", "t d", "what the position encoding adds to the embedding (b t d if rows have positions of their own; w as in embed)")
RESID_FINAL = Site("resid_final", "b t d", "the stream after the last block, after the final norm: what the read-out reads")
LOGITS = Site("logits", "b t v", "scores over the vocabulary (or classes) before soft-max")

# A block
RESID_PRE = Site("resid_pre", "b t d", "the stream as it enters the block")
RESID_MID = Site("resid_mid", "b t d", "the stream after attention has been added")
RESID_MID_CROSS = Site("resid_mid_cross", "b t d", "the stream after cross-attention has been added")
RESID_POST = Site("resid_post", "b t d", "the stream as it leaves the block")

# An attention layer (attn and cross)
ATTN_IN = Site("in", "b t d", "what the attention layer reads (after the norm where the wiring has one before it)")
Q = Site("q", "b t h k", "queries: what each position asks, per head, before rotation")
K = Site("k", "b s g k", "keys: what each position offers to be found by, before rotation")
V = Site("v", "b s g k", "values: what each position hands over when it is attended to")
Q_ROT = Site("q_rot", "b t h k", "queries as they meet the keys (after QK-norm and rotation)")
K_ROT = Site("k_rot", "b s g k", "keys as they meet the queries (after QK-norm and rotation)")
SCORES = Site("scores", "b h t s", "scaled (capped, biased) query-key products; minus infinity where the mask forbids")
PATTERN = Site("pattern", "b h t s", "attention weights: the normaliser applied to the scores")
Z = Site("z", "b t h k", "pattern-weighted sum of values, per head")
RESULT = Site("result", "b t h d", "each head's own output in the stream's space (computed only when asked for); they and the bias sum to out")
ATTN_OUT = Site("out", "b t d", "what the attention layer returns")

# A latent attention layer has these too
LATENT = Site("latent", "b s r", "the vector that each position's keys and values are made from, and all that a cache keeps of it but the rotated key")
Q_LATENT = Site("q_latent", "b t r", "the vector that each position's queries are made from (where they are)")

# A feed-forward layer
FFN_IN = Site("in", "b t d", "what the feed-forward layer reads")
FFN_PRE = Site("pre", "b t f", "hidden units before the activation (gated: the values that the gate multiplies)")
FFN_GATE = Site("gate", "b t f", "gated layers: the gate before its activation")
FFN_POST = Site("post", "b t f", "hidden units as they are projected back")
FFN_OUT = Site("out", "b t d", "what the feed-forward layer returns")

# A mixture of experts
ROUTER = Site("router", "b t e", "routing probability of every expert")
CHOSEN = Site("chosen", "b t c", "indices of the experts that the token goes to, best first")
EXPERTS_IN = Site("in", "b t d", "what the router and the experts read")
EXPERTS_OUT = Site("out", "b t d", "weighted sum of the chosen experts' outputs")

# A norm
SCALE = Site("scale", "b t 1", "what the norm divides by")

TABLE: dict[str, tuple[Site, ...]] = {
    "model": (EMBED, POS_EMBED, RESID_FINAL, LOGITS),
    "block": (RESID_PRE, RESID_MID, RESID_MID_CROSS, RESID_POST),
    "attention": (ATTN_IN, Q, K, V, Q_ROT, K_ROT, SCORES, PATTERN, Z, RESULT, ATTN_OUT),
    "latent": (LATENT, Q_LATENT),
    "feedforward": (FFN_IN, FFN_PRE, FFN_GATE, FFN_POST, FFN_OUT),
    "experts": (EXPERTS_IN, ROUTER, CHOSEN, EXPERTS_OUT),
    "norm": (SCALE,),
}

HEAD_AXIS: dict[str, int] = {s.name: s.axes.split().index("h") for s in TABLE["attention"] if "h" in s.axes.split()} | {
    s.name: s.axes.split().index("g") for s in TABLE["attention"] if "g" in s.axes.split()
}
"""Which axis of an attention site counts heads (query heads, or key/value heads for k, v and k_rot)."""
