"""Kernels: from queries, keys and values to what each head returns.

    q, k, v ──► fused (SDPA, FlexAttention on a GPU; on a CPU a kernel of its own for a step of decoding) ──► z
        └─────► beside it, if someone looks: scores, pattern  (for the heads asked for, no others)

    q, k, v ──► explicit: scores ──► edit ──► pattern ──► edit ──► z     (only when edited,
                                                                          or where no fused kernel exists)

Shapes: ``kv`` is the size of a value, as a rule that of a key ``k``.

The two are the same function; a test holds them together for every mask, bias and normaliser.
The normaliser turns a row of scores into weights:

    Softmax          exp(s_j) / sum_i exp(s_i)
    SoftmaxPlusOne   exp(s_j) / (1 + sum_i exp(s_i))
    SoftmaxSink      exp(s_j) / (exp(sink_h) + sum_i exp(s_i))     sink learned per head
    Sigmoid          1 / (1 + exp(-(s_j + bias)))                  no competition between keys
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core.mask import Resolved
from glassformer.core.numerics import wide
from glassformer.core.spec import Spec, part
from glassformer.core.tap import check_heads

from . import blockwise, decoding, steady, steady_attention

# Normalisers


class Normaliser(Spec):
    """What turns scores into attention weights."""

    def build(self, n_heads: int) -> NormaliserLayer:
        """The module for ``n_heads`` heads."""
        return NormaliserLayer()


class NormaliserLayer(nn.Module):
    """``softmax(scores)`` over keys; masked scores are minus infinity. A row with no visible key is all zeros."""

    @property
    def fused(self) -> bool:
        """Whether scaled-dot-product kernels can compute it."""
        return True

    def sink(self) -> Tensor | None:
        """A score per head [h] that takes part in the soft-max and carries no value."""
        return None

    def forward(self, scores: Float[Tensor, "b h t s"], heads: Tensor | None = None) -> Float[Tensor, "b h t s"]:
        sink = self.sink()
        if sink is None:
            pattern = torch.softmax(scores, -1)
            if _may_look(scores) and not pattern[..., :1].isnan().any():
                return pattern  # a row with no visible key is 0 / 0 throughout: here there is none, and two passes over all numbers are saved
            return pattern.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
        sink = sink.to(scores) if heads is None else sink.to(scores)[heads]
        sink = sink[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]


def _is_plain() -> bool:
    # Nobody stands between this program and its tensors: no graph is made, no transform (vmap) or mode (fake tensors, tracing) is on.
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and torch._C._len_torch_dispatch_stack() == 0


def _may_look(x: Tensor) -> bool:
    # A program may branch on a value where there is one, and where to see it costs no wait.
    return x.device.type == "cpu" and _is_plain()


@part
class Softmax(Normaliser):
    """Exponentials that sum to one over the visible keys; every visible key gets a positive weight."""


@part
class SoftmaxPlusOne(Normaliser):
    """Soft-max with an extra one in the denominator, so that a head may attend to nothing (Miller 2023, "Attention is off by one")."""

    def build(self, n_heads: int) -> NormaliserLayer:
        return SoftmaxPlusOneLayer(n_heads)


class SoftmaxPlusOneLayer(NormaliserLayer):
    """``exp(s_j) / (1 + sum exp(s_i))``: a sink whose score is always zero."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def sink(self) -> Tensor:
        return torch.zeros(self.n_heads)


@part
class SoftmaxSink(Normaliser):
    """Soft-max with a learned sink score per head (GPT-OSS, arXiv 2508.10925; after StreamingLLM, arXiv 2309.17453)."""

    def build(self, n_heads: int) -> NormaliserLayer:
        return SoftmaxSinkLayer(n_heads)


class SoftmaxSinkLayer(NormaliserLayer):
    """``exp(s_j) / (exp(sink_h) + sum exp(s_i))``; ``sinks`` is [h]."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(n_heads))

    def sink(self) -> Tensor:
        return self.sinks


@part
class Sigmoid(Normaliser):
    """Each key weighed on its own (arXiv 2409.04431); ``bias`` None means ``-ln(number of keys)``."""

    bias: float | None = None

    def build(self, n_heads: int) -> NormaliserLayer:
        return SigmoidLayer(self.bias)


class SigmoidLayer(NormaliserLayer):
    """``sigmoid(s_j + bias)``, zero where masked."""

    def __init__(self, bias: float | None):
        super().__init__()
        self.bias = bias

    @property
    def fused(self) -> bool:
        return False

    def forward(self, scores: Float[Tensor, "b h t s"], heads: Tensor | None = None) -> Float[Tensor, "b h t s"]:
        if self.bias is not None:
            return torch.sigmoid(scores + self.bias)
        # The number of keys that a query sees, not the length of the row: cached = uncached.
        seen = (scores > -math.inf).sum(-1, keepdim=True).clamp(min=1)
        return torch.sigmoid(scores - seen.to(scores.dtype).log())


# The two ways


@dataclass(eq=False)  # not frozen: one is made per layer and token, and a frozen one takes five times as long
class Rule:
    """What a layer does to scores besides the product: scale, soft-cap ``c tanh(s / c)``, bias, mask, normaliser."""

    scale: float
    cap: float | None
    bias: Tensor | None
    mask: Resolved
    normaliser: NormaliserLayer


def scores_of(q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g s k"], rule: Rule, heads: tuple[int, ...] | None = None) -> Float[Tensor, "b h t s"]:
    """Masked scores, of all heads or of those asked for (then only their matrices are computed)."""
    n_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    chosen = list(range(n_heads)) if heads is None else list(heads)
    if heads is not None:
        check_heads(heads, n_heads, "the scores of a layer")
        q = q[:, chosen]
    if heads is not None or group > 1:
        k = k[:, [h // group for h in chosen]]
    scores = q @ k.transpose(-1, -2)
    free = not scores.requires_grad and _is_plain()  # nobody else holds it: what follows may write over it
    scores = scores.mul_(rule.scale) if free else scores * rule.scale
    if rule.cap is not None:
        scores = rule.cap * torch.tanh(scores / rule.cap)
    if rule.bias is not None:
        scores = scores + (rule.bias if heads is None or rule.bias.shape[1] == 1 else rule.bias[:, chosen]).to(scores.dtype)
    visible = rule.mask.tensor(q.shape[2], k.shape[2], q.device)
    if visible is None:
        return scores
    return scores.masked_fill_(~visible, -math.inf) if free else scores.masked_fill(~visible, -math.inf)


def pattern_of(scores: Float[Tensor, "b h t s"], rule: Rule, heads: tuple[int, ...] | None = None) -> Float[Tensor, "b h t s"]:
    """Attention weights from scores, the normaliser in float32."""
    chosen = None if heads is None else torch.tensor(heads, device=scores.device)
    return rule.normaliser(wide(scores), chosen).to(scores.dtype)


def mix(pattern: Float[Tensor, "b h t s"], v: Float[Tensor, "b g s kv"]) -> Float[Tensor, "b h t kv"]:
    """Pattern-weighted sums of values."""
    group = pattern.shape[1] // v.shape[1]
    return pattern @ (v if group == 1 else v.repeat_interleave(group, 1))


def has_fused(rule: Rule, device: torch.device, dropout: float = 0.0) -> bool:
    """Whether a fused kernel computes this rule on this device."""
    if rule.cap is None or not rule.normaliser.fused:
        return rule.normaliser.fused
    # Only FlexAttention knows a soft-cap, and it knows neither a sink nor dropout.
    return device.type == "cuda" and dropout == 0.0 and rule.normaliser.sink() is None


def has_extras(rule: Rule) -> bool:
    """Whether there is more to it than a scale and a triangular mask."""
    return rule.cap is not None or rule.bias is not None or rule.mask.dense is not None or rule.normaliser.sink() is not None


def _in_bfloat16(q: Tensor) -> bool:
    # Under autocast the kernel computes in bfloat16 whatever it is given: queries that were normed arrive in float32.
    return q.dtype == torch.bfloat16 or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and q.dtype != torch.float64)


def fused(
    q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g s k"], v: Float[Tensor, "b g s kv"], rule: Rule, dropout: float = 0.0
) -> Float[Tensor, "b h t kv"]:
    """Scaled-dot-product attention without ever forming the pattern."""
    if q.device.type == "cpu" and q.requires_grad and _in_bfloat16(q):
        # On a CPU the kernel's backward pass in bfloat16 takes ten times as long as in float32 (docs/log.md).
        with torch.autocast("cpu", enabled=False):
            if blockwise.pays(q, k, v) and dropout == 0.0 and not has_extras(rule):
                group = q.shape[1] // k.shape[1]
                q, k, v = (x.to(torch.bfloat16) for x in (q, *(y.repeat_interleave(group, 1) if group > 1 else y for y in (k, v))))
                z: Tensor = blockwise.BlockwiseAttention.apply(q, k, v, rule.mask.causal, rule.scale)
            else:
                z = fused(q.float(), k.float(), v.float(), rule, dropout)
            return z.to(torch.bfloat16)
    b, h, t, _ = q.shape
    g, s = k.shape[1], k.shape[2]
    sink = rule.normaliser.sink()
    if rule.cap is not None or (
        q.device.type == "cuda" and t > 1 and sink is None and dropout == 0.0 and (rule.bias is not None or rule.mask.dense is not None)
    ):
        return flex(q, k, v, rule)
    plain = rule.bias is None and sink is None
    if plain and t == 1 and g < h and rule.mask.dense is None:
        # One query per row that sees everything: the heads of a group are queries of one key/value head.
        return F.scaled_dot_product_attention(q.view(b, g, h // g, -1), k, v, dropout_p=dropout, scale=rule.scale).view(b, h, 1, -1)
    if g < h:
        k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
    if plain:
        return F.scaled_dot_product_attention(q, k, v, rule.mask.dense, dropout, rule.mask.causal, scale=rule.scale)
    # A bias (and a sink, as one more key with a value of zero) travels in the additive mask.
    add = torch.zeros(1, 1, t, s, dtype=q.dtype, device=q.device) if rule.bias is None else rule.bias.to(q.dtype)
    visible = rule.mask.tensor(t, s, q.device)
    if visible is not None:
        add = add.masked_fill(~visible, -math.inf) if add.shape[0] == visible.shape[0] else torch.where(visible, add, -math.inf)
    if sink is not None:
        add = torch.cat([add.expand(-1, h, -1, -1), sink.to(q)[None, :, None, None].expand(add.shape[0], h, t, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, add, dropout, scale=rule.scale)


def attend(
    q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g s k"], v: Float[Tensor, "b g s kv"], rule: Rule, dropout: float = 0.0
) -> Float[Tensor, "b h t kv"]:
    """The fastest way that there is for this call: all are the same function."""
    if steady.on():
        return steady_attention.attend(q, k, v, rule)
    code = decoding.takes(q, k, v, rule, dropout)
    if code is not None:
        return decoding.attend(code, q, k, v, rule)
    return (fused if has_fused(rule, q.device, dropout) else explicit)(q, k, v, rule, dropout)


def explicit(
    q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g s k"], v: Float[Tensor, "b g s kv"], rule: Rule, dropout: float = 0.0
) -> Float[Tensor, "b h t kv"]:
    """The same in the open: scores, pattern, mix (nobody editing)."""
    pattern = pattern_of(scores_of(q, k, rule), rule)
    return mix(F.dropout(pattern, dropout) if dropout else pattern, v)


def flex(q: Float[Tensor, "b h t k"], k: Float[Tensor, "b g s k"], v: Float[Tensor, "b g s kv"], rule: Rule) -> Float[Tensor, "b h t kv"]:
    """FlexAttention: cap, bias and mask inside the kernel (arXiv 2412.05496)."""
    from torch.nn.attention.flex_attention import flex_attention

    visible = rule.mask.tensor(q.shape[2], k.shape[2], q.device)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if rule.cap is not None:
            score = rule.cap * torch.tanh(score / rule.cap)
        if rule.bias is not None:
            score = score + rule.bias[b if rule.bias.shape[0] > 1 else 0, h if rule.bias.shape[1] > 1 else 0, i, j]
        if visible is not None:
            row = visible if visible.ndim == 2 else visible[b if visible.shape[0] > 1 else 0, 0]
            score = torch.where(row[i if row.shape[0] > 1 else 0, j], score, -math.inf)
        return score

    run: Any = _compiled_flex() if q.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    out: Tensor = run(q, k, v, score_mod=change, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


_FLEX: list[Any] = []


def _compiled_flex() -> Any:
    # Compiled once per process: uncompiled FlexAttention forms the whole matrix of scores.
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention))
    return _FLEX[0]
