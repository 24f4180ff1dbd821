"""A logit as a sum of parts, as an answer: what each part adds, and, of heads, by the token that was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, did_you_mean

from . import figure as drawing
from .linear import Part
from .result import Grid, Result


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """A logit as a sum. ``values`` [n]: one number for each of ``parts`` (means over positions); ``each`` [p n]; ``wholes`` [p]: the logits themselves."""

    target: str
    place: str
    parts: tuple[Part, ...]
    values: Tensor
    each: Tensor
    wholes: Tensor
    remark: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names: ``embed``, ``3.1`` (layer and head), ``3.cross.1``, ``3.ffn``, ``3.attn.bias``, ``final_norm.bias``…"""
        return tuple(p.name for p in self.parts)

    @property
    def sum(self) -> float:
        """What the parts sum to."""
        return float(self.values.sum())

    @property
    def actual(self) -> float:
        """The logit (or difference) that the model computed."""
        return float(self.wholes.mean())

    @property
    def error(self) -> float:
        """The largest difference between sum and logit at any position."""
        return float((self.each.sum(-1) - self.wholes).abs().max())

    def __getitem__(self, name: str) -> float:
        if name not in self.names:
            raise InputError(f"{name!r} is no part of this sum.{did_you_mean(name, self.names)} Parts are, for example, {', '.join(self.names[:4])}.")
        return float(self.values[self.names.index(name)])

    def best(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` parts that add or take away most."""
        return [(self.names[i], float(self.values[i])) for i in largest(self.values)[:k]]

    @property
    def title(self) -> str:
        return f"Direct logit attribution of {self.target} at {self.place}"

    def grid(self) -> Grid:
        rows = tuple((self.parts[i].name, self.parts[i].kind, float(self.values[i])) for i in largest(self.values))
        return Grid(("part", "kind", "logits"), rows, self.note)

    @property
    def note(self) -> str:
        """What the parts sum to, and what was held."""
        return f"{len(self.parts):,} parts sum to {self.sum:.4f}; the model computed {self.actual:.4f} (largest difference {self.error:.1e}). {self.remark}"

    def size(self) -> tuple[float, float]:
        return size_of(self.parts)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        draw_parts(figure, theme, self.parts, self.values, self.title, "logits")


@dataclass(frozen=True, eq=False)
class BySource(Attribution):
    """An :class:`Attribution` whose heads are split: ``split`` [n s] of the self-attention heads, in the order of ``parts``, by the token that
    is read; ``cross_split`` [n s] of the cross-attention heads by the encoder's token (None without)."""

    pieces: tuple[str, ...]
    split: Tensor
    source_pieces: tuple[str, ...]
    cross_split: Tensor | None

    def total(self) -> Tensor:
        """What comes from each token of the text through all self-attention heads [s]."""
        return self.split.sum(0)

    def layers(self) -> Tensor:
        """The same by layer [l s] (tokens of the encoder's text follow those of the decoder's)."""
        heads = [[p.layer for p in self.parts if p.kind == kind] for kind in ("head", "cross head")]
        made = [_per_layer(self.split, heads[0])]
        if self.cross_split is not None:
            made.append(_per_layer(self.cross_split, heads[1]))
        return torch.cat(made, 1)

    @property
    def _tokens(self) -> list[str]:
        return [*_numbered(self.pieces), *(f"source {p}" for p in _numbered(self.source_pieces))]

    def grid(self) -> Grid:
        rows: list[tuple[Any, ...]] = []
        split = [(self.split, "head", _numbered(self.pieces))]
        if self.cross_split is not None:
            split.append((self.cross_split, "cross head", [f"source {p}" for p in _numbered(self.source_pieces)]))
        for values, kind, tokens in split:
            names = [p.name for p in self.parts if p.kind == kind]
            for i, token in enumerate(tokens):
                h = int(values[:, i].abs().argmax())
                rows.append((token, float(values[:, i].sum()), names[h], float(values[h, i])))
        rows += [(p.name, float(self.values[i]), None, None) for i, p in enumerate(self.parts) if p.kind not in ("head", "cross head")]
        note = f"{self.note} A token's row sums what all heads read from it; rows without a head are parts that read no other position."
        return Grid(("token or part", "logits", "largest head", "its logits"), tuple(sorted(rows, key=lambda r: -abs(float(r[1] or 0)))), note)

    def size(self) -> tuple[float, float]:
        return (min(16.0, 7.5 + 0.22 * len(self._tokens)), max(4.5, 0.3 * (1 + max(p.layer or 0 for p in self.parts)) + 2.5))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        values = self.layers()
        drawing.heatmap(left, theme, values, [str(i) for i in range(len(values))], self._tokens, title=self.title, x="token read", y="layer", signed=True)
        total = values.sum(0)
        chosen = largest(total)[:16]
        drawing.bars(right, theme, [self._tokens[i] for i in chosen], total[chosen], title="through all heads, the largest", x="logits")


# How parts are shown


def _per_layer(split: Tensor, layers: list[int | None]) -> Tensor:
    index = torch.tensor(layers)
    return split.new_zeros(int(index.max()) + 1, split.shape[1]).index_add(0, index, split)


def _numbered(pieces: Sequence[str]) -> list[str]:
    return [p if pieces.count(p) == 1 else f"{p} {i}" for i, p in enumerate(pieces)]


def largest(values: Tensor) -> list[int]:
    order: list[int] = values.abs().argsort(descending=True, stable=True).tolist()
    return order


_COLUMNS = {"attention": "attn", "cross-attention": "cross", "feed-forward": "ffn", "unit": "ffn", "other units": "ffn"}


def _table(parts: Sequence[Part], values: Tensor) -> tuple[Tensor, list[str]]:
    """Values by layer and column (heads, cross heads, sublayers); NaN where a layer has none."""

    def column(p: Part) -> str:
        return f"{'x' if p.kind == 'cross head' else ''}{p.head}" if p.head is not None else _COLUMNS[p.kind]

    cells = [(p.layer, column(p), float(v)) for p, v in zip(parts, values, strict=True) if p.layer is not None and p.kind != "bias"]
    order = {"attn": (0, 0), "cross": (2, 0), "ffn": (4, 0)}
    names = sorted({c for _, c, _ in cells}, key=lambda c: order.get(c) or ((3, int(c[1:])) if c[0] == "x" else (1, int(c))))
    made = torch.full((1 + max(layer for layer, _, _ in cells), len(names)), torch.nan)
    for layer, name, value in cells:
        at = layer, names.index(name)
        made[at] = value + (0.0 if made[at].isnan() else float(made[at]))
    return made, names


def size_of(parts: Sequence[Part]) -> tuple[float, float]:
    layers, columns = _table(parts, torch.zeros(len(parts)))[0].shape
    return (min(16.0, 8.0 + 0.3 * columns), max(4.8, 0.3 * layers + 2.0))


def draw_parts(figure: Any, theme: drawing.Theme, parts: Sequence[Part], values: Tensor, title: str, what: str) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    table, columns = _table(parts, values)
    rows = [str(i) for i in range(len(table))]
    drawing.heatmap(left, theme, table, rows, columns, title=title, x="head, and feed-forward (ffn)", y="layer", label=what, signed=True)
    chosen = largest(values)[:16]
    drawing.bars(right, theme, [parts[i].name for i in chosen], values[chosen], title="the largest parts", x=what)
