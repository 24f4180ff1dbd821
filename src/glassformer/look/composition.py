"""Between heads: how far each head reads what each earlier one writes (Elhage et al. 2021, transformer-circuits.pub)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.numerics import wide

from .bilinear import check_plain_attention, query_and_key, view_of
from .figure import Theme, heatmap
from .matrices import Weights
from .result import Grid, Result
from .subject import choose, n_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Composition(Result):
    """How far each head reads what each earlier one writes.

    ``scores`` [3 n n]: for queries, keys and values (``kinds``), row: the head that writes, column: the one that reads, both of ``heads``;
    ``||W_1 W_2|| / (||W_1|| ||W_2||) - 1 / sqrt(d)``, NaN where the second is not in a later layer. ``baseline``: the ``1 / sqrt(d)``.
    """

    heads: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: Tensor
    baseline: float
    folded: bool

    @property
    def title(self) -> str:
        return f"Composition between {len(self.heads)} heads, above chance"

    def __getitem__(self, kind: str) -> Tensor:
        """[n n] of ``"q"``, ``"k"`` or ``"v"``."""
        return self.scores[self.kinds.index(choose(kind, self.kinds, "kind of composition"))]

    def best(self, n: int = 10, kind: str | None = None) -> list[tuple[str, str, str, float]]:
        """The ``n`` largest: kind, head that writes, head that reads, score."""
        chosen = self.kinds if kind is None else (choose(kind, self.kinds, "kind of composition"),)
        flat = torch.stack([self[c] for c in chosen]).nan_to_num(-torch.inf).flatten()
        top = flat.topk(max(0, min(n, int((flat > -torch.inf).sum()))))
        m = len(self.heads)
        return [(chosen[i // (m * m)], self.heads[i // m % m], self.heads[i % m], v) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

    def grid(self) -> Grid:
        word = {"q": "queries", "k": "keys", "v": "values"}
        rows = tuple((a, b, word[kind], value) for kind, a, b, value in self.best(200))
        return Grid(
            ("writes", "reads", "into its", "above chance"),
            rows,
            f"||W1 W2|| / (||W1|| ||W2||) less 1/sqrt(d) = {self.baseline:.4f}, its root mean square when one of the two is turned at random; "
            f"norm weights {'folded in' if self.folded else 'not folded in'}",
        )

    def size(self) -> tuple[float, float]:
        return (13.5, 5.2)

    def draw(self, figure: Figure, theme: Theme) -> None:
        finite = self.scores[self.scores.isfinite()]
        limit = float(finite.abs().max()) if len(finite) else 1.0
        word = {"q": "queries", "k": "keys", "v": "values"}
        some = self.scores[0].isfinite()  # heads of the last layer are read by none, those of the first read none
        last, first = int(some.any(1).sum()), int((~some.any(0)).sum())
        for i, axes in enumerate(figure.subplots(1, len(self.kinds))):
            heatmap(
                axes,
                theme,
                self.scores[i, :last, first:],
                self.heads[:last],
                self.heads[first:],
                title=f"into {word[self.kinds[i]]}",
                x="head that reads",
                y="head that writes" if i == 0 else "",
                signed=True,
                limit=limit,
            )
            axes.tick_params(axis="x", rotation=90)


def composition_scores(model: Any, *, fold: bool | None = None, distance: int = 0) -> Composition:
    """Q-, K- and V-composition of every head with every head of a later layer (Elhage et al. 2021).

    ``||W_OV W_QK||_F / (||W_OV|| ||W_QK||)`` for queries, with ``W_QK^T`` for keys, ``||W_OV W_OV'||_F / ...`` for values, each less
    ``1 / sqrt(d)``: the root mean square of that ratio when one matrix is turned at random, whatever the singular values. Computed from the
    factors, [k k] for each pair. ``model``, ``fold``, ``distance`` as in :func:`~.circuits.qk_circuit`. Raises :class:`InputError` for a model of one layer.
    """
    w, stack = view_of(model, fold)
    count = [n_heads(stack, i) for i in range(w.n_layers)]
    if len(count) < 2:
        raise InputError(f"Heads compose with heads of later layers, but this model has {len(count)} layer.")
    heads = tuple(f"{i}.{h}" for i, n in enumerate(count) for h in range(n))
    writes, reads = _sides(w, stack, distance)
    d, n = stack.spec.d_model, len(heads)
    scores = torch.full((3, n, n), float("nan"))
    starts = [sum(count[:i]) for i in range(len(count) + 1)]
    for i in range(len(count) - 1):
        own = torch.cat(writes[i])  # [(h k) d]
        for j in range(i + 1, len(count)):
            for kind in range(3):
                each = (own @ torch.cat(reads[j][kind], 1)).square()  # [(h k) (h' k')]
                blocks = each.view(count[i], -1, count[j], each.shape[1] // count[j]).sum((1, 3)).sqrt()
                scores[kind, starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = blocks.float().cpu() - d**-0.5
    return Composition(heads, ("q", "k", "v"), scores, d**-0.5, w.fold_norms)


def _sides(w: Weights, stack: Any, distance: int) -> tuple[list[list[Tensor]], list[list[list[Tensor]]]]:
    """Every head's W_OV as a [k d] of norm 1 with the same products from the left, and W_QK, W_QK^T, W_OV as [d k] of norm 1 from the right."""
    writes: list[list[Tensor]] = []
    reads: list[list[list[Tensor]]] = []
    for i, block in enumerate(stack.blocks):
        check_plain_attention(i, block.attn, "composition is not defined")
        own_w: list[Tensor] = []
        own_r: list[list[Tensor]] = [[], [], []]
        V, O = wide(w.W_V[i]), wide(w.W_O[i])
        for h in range(block.attn.n_heads):
            q, key = query_and_key(w, stack, (i, h), distance)
            left = torch.linalg.qr(V[h], mode="r")[1] @ O[h]
            own_w.append(left / left.norm().clamp_min(1e-30))
            for slot, (a, b) in enumerate(((q, key), (key, q), (V[h], O[h].T))):
                right = a @ torch.linalg.qr(b, mode="r")[1].T
                own_r[slot].append(right / right.norm().clamp_min(1e-30))
        writes.append(own_w)
        reads.append(own_r)
    return writes, reads


__all__ = ["Composition", "composition_scores"]
