"""How few units of feed-forward layers speak at a time, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.text import Tokenizer

from .figure import Theme, lines
from .moments import Moments
from .result import Grid, Result
from .unit_places import unit_sites
from .windows import Batch, Reading, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Sparsity(Result):
    """How few units speak at a time, layer by layer [l]. ``positive``: share above zero. ``active``: the effective share of units per token,
    ``(sum_i x_i^2)^2 / (f sum_i x_i^4)``, 1 if all are equally large and 1/f if one alone speaks, averaged over tokens. ``silent``: share of units that
    never are above zero. ``kurtosis``: median over units of their kurtosis over tokens."""

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    positive: Tensor
    active: Tensor
    silent: Tensor
    kurtosis: Tensor
    tokens: int

    @property
    def title(self) -> str:
        return f"Sparsity of feed-forward units over {self.tokens:,} tokens"

    def grid(self) -> Grid:
        columns = ("layer", "units", "positive", "active", "silent", "kurtosis")
        numbers = zip(self.layers, self.widths, self.positive.tolist(), self.active.tolist(), self.silent.tolist(), self.kurtosis.tolist(), strict=True)
        note = "positive: share above zero; active: effective share of units per token; silent: never above zero; kurtosis: median over units"
        return Grid(columns, tuple(tuple(r) for r in numbers), note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        named = {"above zero": self.positive, "effective share per token": self.active, "never above zero": self.silent}
        lines(axes, theme, self.layers, named, title=self.title, x_name="layer", y_name="share")
        axes.set_xticks(self.layers)
        axes.set_ylim(-0.02, 1.02)


def sparsity(
    model: Any, texts: Texts, *, tokens: int | None = 200_000, context: int | None = None, source: Any = None, tokenizer: Tokenizer | None = None
) -> Sparsity:
    """How sparse the hidden units of every feed-forward layer are over many texts (see :class:`Sparsity`).

    Arguments as in :func:`~glassformer.look.units.neurons`.
    """
    reading = Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    paths = unit_sites(reading, None)
    moments = {p: Moments() for p in paths}
    above, active = {p: torch.zeros(()) for p in paths}, dict.fromkeys(paths, 0.0)

    def look(path: str, x: Tensor, batch: Batch) -> None:
        values = x[batch.real].float().cpu()
        moments[path].add(values)
        above[path] = above[path] + (values > 0).sum(0)
        squares = values.double().square()
        fourth = squares.square().sum(1)
        active[path] += float((squares.sum(1).square() / (fourth * values.shape[1]).clamp_min(torch.finfo(torch.float64).tiny)).sum())

    reading.run(list(paths), look)
    n = moments[next(iter(paths))].n
    kurtosis = [m.kurtosis() for m in moments.values()]
    return Sparsity(
        tuple(paths.values()),
        tuple(len(k) for k in kurtosis),
        torch.stack([above[p].mean(dtype=torch.float32) / n for p in paths]),
        torch.tensor([active[p] / n for p in paths]),
        torch.stack([(above[p] == 0).float().mean() for p in paths]),
        torch.stack([k.median().float() for k in kurtosis]),
        n,
    )
