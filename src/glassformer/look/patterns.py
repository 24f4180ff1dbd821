"""Attention patterns of many texts, handed over layer by layer and kept by nobody.

    Reading ──► batch ──► layer 0: pattern [b h t s] ──► take(...) ──► dropped ──► layer 1: ...

What is held at any time is some heads of one layer of one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glassformer.core.modes import evaluating

from .subject import n_heads, n_layers
from .windows import Batch, Enough, Reading, Watch

AT_ONCE = 64 * 2**20
"""Bytes of float64 weights that are handed over at once; heads are taken in groups that fit (one head at least)."""

Take = Callable[[int, slice, Tensor, Tensor, Batch], None]
"""``take(layer, heads, pattern [b h t s], visible [b|1 t s], batch)``: weights of these heads in float64 on the CPU, and what the mask lets be seen."""


def each_pattern(reading: Reading, take: Take) -> None:
    """Hand every self-attention layer's pattern on every batch to ``take``. Rows and columns of padding are handed over too (``batch.real``)."""
    paths = reading.sites("blocks.*.attn.pattern")
    with torch.no_grad(), evaluating(reading.model):
        for batch in reading.batches():
            reading.watched(batch, _Handing(reading, paths, take, batch))


def head_names(stack: object) -> tuple[str, ...]:
    """``"0.0"``, ``"0.1"``, … of all layers."""
    return tuple(f"{i}.{h}" for i in range(n_layers(stack)) for h in range(n_heads(stack, i)))


class _Handing(Watch):
    """Hands over patterns in groups of heads; the pass ends after the last."""

    def __init__(self, reading: Reading, paths: list[str], take: Take, batch: Batch):
        super().__init__(paths, lambda path, x: None)
        self._heads = {p: n_heads(reading.stack, int(p.split(".")[-3])) for p in paths}
        self._causal, self._give, self._batch = reading.subject.causal, take, batch
        self._visible: dict[str, Tensor] = {}

    def visit(self, path: str, x: Tensor) -> Tensor:
        # A foreign model shows its patterns as finished values.
        if path in self.left:
            self.offer(path, lambda heads: x if heads is None else x[:, list(heads)])
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        pattern = path.removesuffix("scores") + "pattern"
        if path.endswith(".scores") and pattern in self.left:
            self._visible[pattern] = ~compute((0,))[:, 0].isneginf().cpu()  # the mask is the same for all heads of a layer
        elif path in self.left:
            self._hand(path, compute)
            self.left.discard(path)
            if not self.left:
                raise Enough

    def _hand(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        b, t = self._batch.tokens.shape
        visible = self._visible.pop(path, None)
        if visible is None:  # scores that are not shown: the model's kind says who sees whom
            seen = torch.ones(t, t, dtype=torch.bool).tril() if self._causal else torch.ones(t, t, dtype=torch.bool)
            visible = seen & self._batch.real.cpu()[:, None, :]
        n, layer = self._heads[path], int(path.split(".")[-3])
        step = max(1, AT_ONCE // (8 * b * t * t))
        for first in range(0, n, step):
            heads = range(first, min(first + step, n))
            some = compute(None if len(heads) == n else tuple(heads))
            self._give(layer, slice(heads.start, heads.stop), some.cpu().double(), visible, self._batch)
