"""What a journey holds of a pass, and how the rest is computed again when it is asked for.

    one pass ──► the stream that enters each block (and what the read-out reads)      held: layers * t * d numbers
                       │
                       ├─► block i run again on it ──► every value without an axis pair t s     held for the last blocks, up to ``KEPT`` bytes
                       └─► scores, patterns, results of the heads asked for                     never held

A block that is run again on the same stream gives the same numbers, to the bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glassformer.core.flow import Pass
from glassformer.core.mask import Everything, Resolved
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record, Tap
from glassformer.parts import kernels
from glassformer.parts.kernels import Rule

KEPT = 128 * 2**20
"""Bytes of blocks run again that are held at a time."""
_ON_DEMAND = ("scores", "pattern", "result")


class Pick(NamedTuple):
    """Which heads and which positions of a value are computed; None: all."""

    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None


ALL = Pick()


class _Small(Record):
    """Records all but what grows with the square of the text, or with heads times the stream."""

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if path.rsplit(".", 1)[-1] not in _ON_DEMAND:
            super().offer(path, compute)


class Half:
    """One stack of blocks and the row of tokens that it reads: a model, or the encoder or decoder of one.

    ``memory`` [1 s d]: what its cross-attention reads. ``side``: ``"text"`` or ``"source"``.
    """

    def __init__(self, model: Any, stack: Any, prefix: str, side: str, ids: tuple[int, ...], pieces: tuple[str, ...], memory: Tensor | None = None):
        self.model, self.stack, self.prefix, self.side = model, stack, prefix, side
        self.ids, self.pieces, self.memory = ids, pieces, memory
        self.device = next(stack.parameters()).device
        self.tokens = torch.tensor([ids], device=self.device)
        self.index = torch.arange(len(ids), device=self.device)
        record = Record(f"{prefix}resid_final", *([f"{prefix}blocks.*.resid_pre"] if len(stack.blocks) else []))
        with torch.no_grad(), evaluating(model):
            stack.states(self.tokens, memory=memory, tap=record, path=prefix.rstrip("."))
        self.streams = [record[f"{prefix}blocks.{i}.resid_pre"] for i in range(len(stack.blocks))]
        self.final = record[f"{prefix}resid_final"]
        self._blocks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._bytes: dict[int, int] = {}

    def aside(self, tap: Tap | None = None) -> Pass:
        """The side inputs of a pass over this row."""
        shared = {"position": self.stack.position} if self.stack.spec.position.biases else {}
        return Pass(positions=self.index, index=self.index, mask=self.stack.spec.mask, memory=self.memory, tap=tap, path=self.prefix.rstrip("."), shared=shared)

    def block(self, i: int) -> dict[str, Tensor]:
        """What was recorded in block ``i``, by the site's path within the block; run again if it is not held."""
        if i not in self._blocks:
            record = _Small("**")
            self.stack.blocks[i](self.streams[i], self.aside(record).layer(i))
            root = len(f"{self.prefix}blocks.{i}.")
            self._blocks[i] = {path[root:]: x for path, x in record.values.items()}
            self._bytes[i] = record.bytes
            while len(self._blocks) > 1 and sum(self._bytes.values()) > KEPT:
                gone, _ = self._blocks.popitem(last=False)
                del self._bytes[gone]
        self._blocks.move_to_end(i)
        return self._blocks[i]

    @property
    def bytes(self) -> int:
        """Bytes held: streams, and the blocks run last."""
        return sum(x.untyped_storage().nbytes() for x in (*self.streams, self.final)) + sum(self._bytes.values())

    # Attention, head by head

    def rule(self, i: int, kind: str) -> Rule:
        """What layer ``i`` does to query-key products."""
        layer = getattr(self.stack.blocks[i], kind)
        if kind == "cross":
            mask, bias = Resolved(Everything(), False, None), None
        else:
            p = self.aside()
            mask, bias = layer.sight(1, p.index, False, p)
        return Rule(layer.scale, layer.spec.cap, bias, mask, layer.normaliser)

    def scores(self, i: int, kind: str, pick: Pick, upto: str) -> Tensor:
        """[h t s] of the heads and query positions picked, as far as ``upto``: products, scaled, capped, bias, biased, scores, pattern."""
        own, rule = self.block(i), self.rule(i, kind)
        q, k = own[f"{kind}.q_rot"].transpose(1, 2), own[f"{kind}.k_rot"].transpose(1, 2)
        if pick.rows is not None:
            rows, visible = list(pick.rows), rule.mask.tensor(q.shape[2], k.shape[2], self.device)
            mask = rule.mask if visible is None else Resolved(rule.mask.rule, False, visible[..., rows, :].view(1, 1, len(rows), -1))
            rule = replace(rule, bias=None if rule.bias is None else rule.bias[..., rows, :], mask=mask)
            q = q[:, :, rows]
        if upto == "bias":
            assert rule.bias is not None
            whole = rule.bias.expand(1, q.shape[1], -1, -1)[0].to(q.dtype)
            return whole if pick.heads is None else whole[list(pick.heads)]
        if upto not in ("scores", "pattern"):
            rule = replace(rule, mask=Resolved(Everything(), False, None))
            rule = rule if upto == "biased" else replace(rule, bias=None)
            rule = rule if upto in ("biased", "capped") else replace(rule, cap=None)
            rule = replace(rule, scale=1.0) if upto == "products" else rule
        x = kernels.scores_of(q, k, rule, pick.heads)
        return kernels.pattern_of(x, rule, pick.heads)[0] if upto == "pattern" else x[0]


def quiet(model: Any, compute: Callable[[], Tensor]) -> Tensor:
    """A value computed without gradients, in evaluation mode."""
    with torch.no_grad(), evaluating(model):
        return compute()
