"""Attention followed through the layers, and attention with what it carries.

    rollout               R = Â_l ... Â_1, Â = (1 - r) mean_h A_h + r I      arXiv 2005.00928     weights only
    value_contribution    || A_h[t, s] v_s W_O^h ||                         arXiv 2004.10102     weights and values
                          || norm( sum_h A_h[t, s] v_s W_O^h + [s = t] x_t ) ||    2109.07152    and residual and norm

A weight says how a head mixes values, not what they hold nor what is made of them: a head may put most of its weight on a token whose value is
near zero. The rollout knows no values at all. The second measure knows one layer, and not what later layers do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.core.numerics import wide
from glassformer.core.tap import Pattern, Tap
from glassformer.parts.attention import matrix_of

from . import figure as drawing
from .linear import Rows, Walk, last_only, steps_of
from .result import Grid, Result
from .subject import Positions, Text, check_layer, choose, n_heads, read, with_weights

HEADS = ("mean", "max", "min")


def attention_rollout(
    model: Any,
    text: Text,
    *,
    residual: float = 0.5,
    heads: str = "mean",
    layer: int | None = None,
    position: Positions = None,
    tokenizer: Any = None,
    source: Text | None = None,
) -> Rollout:
    """Attention rollout [t s]: the product over layers of ``(1 - residual) A + residual I``, each row divided by its sum (arXiv 2005.00928).

    ``A``: the ``mean`` (or ``max``, ``min``) over heads. ``layer``: the last that counts (None: all). ``position``: the one whose row is printed
    (None: the last); all rows are in ``weights``. Of an encoder-decoder: its decoder's self-attention. Holds one head's pattern at a time.
    Raises :class:`InputError` for a ``residual`` outside 0 to 1.
    """
    s = read(model, text, tokenizer, source=source)
    choose(heads, HEADS, "way to join heads")
    if isinstance(residual, bool) or not isinstance(residual, int | float) or not 0 <= residual <= 1:
        raise InputError(f"residual={residual!r} is the identity's share in each layer: a number from 0 to 1, as a rule 0.5.")
    row, last = s.position(position), s.layers - 1 if layer is None else check_layer(s.stack, layer)
    tap = _Roll([s.path(f"blocks.{i}.attn.pattern") for i in range(last + 1)], [n_heads(s.stack, i) for i in range(last + 1)], heads, residual)
    with torch.no_grad(), evaluating(s.model):
        s.model(*s.inputs, tap=tap, **last_only(s))
    assert tap.rolled is not None
    return Rollout(tap.rolled.cpu(), s.pieces, row, float(residual), heads, last)


class _Roll(Tap):
    """Multiplies each layer's pattern onto what is there already."""

    def __init__(self, paths: list[str], counts: list[int], heads: str, residual: float):
        self.counts, self.heads, self.residual = dict(zip(paths, counts, strict=True)), heads, residual
        self.rolled: Tensor | None = None

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern.read(p) for p in self.counts)

    def visit(self, path: str, x: Tensor) -> Tensor:
        if path in self.counts:  # a model that forms its patterns anyway
            self._join(wide(x.detach()[0, h]) for h in range(x.shape[1]))
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if path in self.counts:
            self._join(wide(compute((h,))[0, 0]) for h in range(self.counts[path]))

    def _join(self, patterns: Any) -> None:
        joined: Tensor | None = None
        n = 0
        ways: dict[str, Callable[..., Tensor]] = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}
        join = ways[self.heads]
        for a in patterns:
            n += 1
            joined = a if joined is None else join(joined, a)
        assert joined is not None
        joined = joined / n if self.heads == "mean" else joined
        mixed = (1 - self.residual) * joined + self.residual * torch.eye(len(joined), dtype=joined.dtype, device=joined.device)
        mixed = mixed / mixed.sum(-1, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
        self.rolled = mixed if self.rolled is None else mixed @ self.rolled


@dataclass(frozen=True, eq=False)
class Rollout(Result):
    """``weights`` [t s]: how much of position ``s`` of the text would reach ``t`` if layers only mixed by their attention weights; rows sum to 1."""

    weights: Tensor
    pieces: tuple[str, ...]
    position: int
    residual: float
    heads: str
    layer: int

    @property
    def values(self) -> Tensor:
        """The row of ``position`` [s]."""
        return self.weights[self.position]

    @property
    def title(self) -> str:
        return f"Attention rollout to {self.pieces[self.position]} (position {self.position}), layers 0 to {self.layer}"

    def grid(self) -> Grid:
        order = self.values.argsort(descending=True, stable=True).tolist()
        rows = tuple((self.pieces[i], i, float(self.values[i])) for i in order)
        note = f"{self.heads} over heads, residual {self.residual:g}. Rollout knows attention weights only: neither values nor feed-forwards enter it."
        return Grid(("token", "position", "share"), rows, note)

    def size(self) -> tuple[float, float]:
        side = min(9.0, 4.0 + 0.12 * len(self.pieces))
        return (side + 4.5, side)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        names = [f"{p} {i}" for i, p in enumerate(self.pieces)]
        drawing.heatmap(left, theme, self.weights, names, names, title=self.title, x="from", y="to")
        chosen = self.values.argsort(descending=True, stable=True).tolist()[:16]
        drawing.bars(right, theme, [names[i] for i in chosen], self.values[chosen], title=f"into {names[self.position]}", x="share")


# Attention with its values


def value_contribution(model: Any, text: Text, layer: int, *, kind: str = "attn", tokenizer: Any = None, source: Text | None = None) -> ValueContribution:
    """How long the vectors are that attention moves in one layer: ``||A_h[t, s] v_s W_O^h||`` (arXiv 2004.10102).

    ``mixed`` is the same of the whole sublayer, with the residual stream on the diagonal and the norms that follow within the sublayer held at their
    scale (arXiv 2109.07152). ``kind``: ``"attn"``, or ``"cross"`` for what a decoder reads from its encoder. The values' bias is in, the output
    bias is not: it comes from no token. Raises :class:`InputError` for a layer without such attention, and for a foreign model.
    """
    s = read(model, text, tokenizer, source=source)
    stack: Any = with_weights(s.stack, "value_contribution()")
    check_layer(stack, layer)
    choose(kind, ("attn", "cross"), "kind of attention")
    block = stack.blocks[layer]
    if kind not in block.order:
        raise InputError(f"Layer {layer} has no cross-attention: only the decoder of an encoder-decoder has. Leave kind out for self-attention.")
    sites = [f"blocks.{layer}.{site.name}" for site in block.SITES] + [f"blocks.{layer}.{name}.out" for name in block.order]
    record = Rows(range(len(s)), *(s.path(p) for p in (*sites, f"blocks.{layer}.{kind}.pattern", f"blocks.{layer}.{kind}.v")))
    with torch.no_grad(), evaluating(s.model):
        s.model(*s.inputs, tap=record, **last_only(s))
        w = Walk(s, list(range(len(s))), record, [], [], [])
        pattern = w[f"blocks.{layer}.{kind}.pattern"]
        moved = _moved(w, layer, kind)
        summed, mixed, other = _mix(w, layer, kind, pattern, moved)
    norms = pattern.abs() * moved.norm(dim=-1)[:, None]
    keys = s.pieces if kind == "attn" else s.source_pieces
    return ValueContribution(layer, kind, s.pieces, keys, pattern.cpu(), norms.cpu(), summed.cpu(), mixed.cpu(), other.cpu())


def _moved(w: Walk, layer: int, kind: str) -> Tensor:
    """``v_s W_O^h``: [h s d]."""
    module = getattr(w.subject.stack.blocks[layer], kind)
    v = w[f"blocks.{layer}.{kind}.v"]
    out = wide(matrix_of(module.out)).view(module.d, module.n_heads, module.d_value)
    return torch.einsum("shk,dhk->hsd", v.repeat_interleave(module.n_heads // v.shape[1], 1), out)


def _mix(w: Walk, layer: int, kind: str, pattern: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the heads' sum [t s], of the same with residual and norms [t s], and the share of the context in each position's mixture [t]."""
    step = next(step for step in steps_of(w, w.subject.stack.blocks[layer], layer) if step.sublayer == kind)
    x = w[f"blocks.{layer}.{'resid_pre' if kind == 'attn' else 'resid_mid'}"]
    t, n = pattern.shape[1:]
    summed, mixed, share = pattern.new_empty(t, n), pattern.new_empty(t, n), pattern.new_empty(t)
    for i in range(t):  # [s d] at a time
        vectors = torch.einsum("hs,hsd->sd", pattern[:, i], moved)
        summed[i] = vectors.norm(dim=-1)
        own = x[i : i + 1]
        if step.out is not None:
            vectors = step.out.at(i)(vectors[:, None])[:, 0]
        if step.after is not None:
            vectors, own = step.after.at(i)(vectors[:, None])[:, 0], step.after.at(i)(own)
        if kind == "attn":  # a position's own value and its residual are one contribution
            vectors[i] += own[0]
            own = vectors[i : i + 1]
            context = (vectors.sum(0) - own[0]).norm()
        else:
            context = vectors.sum(0).norm()
        mixed[i] = vectors.norm(dim=-1)
        share[i] = context / (context + own.norm())
    return summed, mixed, share


@dataclass(frozen=True, eq=False)
class ValueContribution(Result):
    """Lengths of what attention moves: ``norms`` [h t s] by head (beside the weights, ``pattern`` [h t s]), ``summed`` [t s] of all heads together,
    ``mixed`` [t s] with the residual stream (self-attention: on the diagonal) and the norms that follow, ``mixing`` [t] the share of the context:
    ``|other tokens' sum| / (|other tokens' sum| + |own|)``."""

    layer: int
    kind: str
    pieces: tuple[str, ...]
    key_pieces: tuple[str, ...]
    pattern: Tensor
    norms: Tensor
    summed: Tensor
    mixed: Tensor
    mixing: Tensor

    @property
    def title(self) -> str:
        return f"What {'attention' if self.kind == 'attn' else 'cross-attention'} of layer {self.layer} moves: lengths of weighted values"

    @property
    def agreement(self) -> Tensor:
        """Correlation of weights and lengths over all pairs of positions that see each other, by head [h]; NaN where one of them is constant."""
        seen = self.pattern.amax(0) > 0
        if int(seen.sum()) < 2:
            return torch.full((len(self.pattern),), torch.nan)
        return torch.stack([torch.corrcoef(torch.stack([a[seen], b[seen]]))[0, 1] for a, b in zip(self.pattern, self.norms, strict=True)])

    def grid(self) -> Grid:
        first, held = self.pattern[..., 0].mean(-1), (self.norms[..., 0] / self.norms.sum(-1).clamp(min=1e-30)).mean(-1)
        rows = tuple((f"{self.layer}.{h}", float(self.agreement[h]), float(first[h]), float(held[h])) for h in range(len(self.norms)))
        note = (
            f"Context in the mixture of residual and attention: {float(self.mixing.mean()):.0%} (mean over positions). What later layers read of it is not in."
        )
        return Grid(("head", "correlation of weights and lengths", "weight on first token", "share of length there"), rows, note)

    def size(self) -> tuple[float, float]:
        side = min(8.0, 3.5 + 0.12 * len(self.key_pieces))
        return (2 * side + 1, side)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        left, right = figure.subplots(1, 2)
        rows, columns = ([f"{p} {i}" for i, p in enumerate(pieces)] for pieces in (self.pieces, self.key_pieces))
        drawing.heatmap(left, theme, self.pattern.mean(0), rows, columns, title=f"Layer {self.layer}: mean weight of heads", x="from", y="to")
        title = "length with values, residual and norms"
        drawing.heatmap(right, theme, self.mixed / self.mixed.sum(-1, keepdim=True), rows, columns, title=title, x="from", label="share of row")
