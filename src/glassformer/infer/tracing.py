"""How a trace is measured: a few numbers of every stage of the chain's own pass, for all rows at once, on the device.

logits [b v] ── passed[0] ── passed[1] ── …        what the chain kept of its pass (Chain(…, watch=passed))
    │              │             │
  stage 0       stage 1       stage 2              exp(logit - top) once each; sums, counts and the k best of it
    └──────────────┴─────────────┴──► one transfer ──► a Choice per row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from .sampler import GONE, Link, Passed
from .trace import Choice, Names

LEAST = -80.0
"""What lies lower under the top than this counts as this: exp of what underflows, -inf too, takes a CPU a hundred times longer."""


@dataclass(frozen=True, eq=False)
class _Measured:
    """One stage while it is measured: logits ``[b c]`` and ids, which are left, probabilities, and what follows from them ``[b]`` (``top``: ``[b 1]``)."""

    logits: Tensor
    ids: Tensor | None
    alive: Tensor
    p: Tensor
    top: Tensor
    total: Tensor
    entropy: Tensor
    left: Tensor

    def at(self, ids: Tensor) -> Tensor:
        """The logits of tokens ``[b u]``; -inf where one is not left."""
        if self.ids is None:
            return self.logits.gather(1, ids)
        place = torch.searchsorted(self.ids, ids).clamp(max=self.ids.shape[1] - 1)
        return torch.where(self.ids.gather(1, place) == ids, self.logits.gather(1, place), GONE)

    def probability(self, logits: Tensor) -> Tensor:
        """Of logits of this stage; NaN where a token is not left."""
        return torch.where(logits > GONE, (logits - self.top).exp() / self.total, torch.nan)


class _Room:
    """Three wide tensors that the stages take in turn: a CPU takes as long for the memory of a new one as for what is done in it."""

    def __init__(self, like: Tensor):
        self.spare, self.scratch = [torch.empty_like(like), torch.empty_like(like)], torch.empty_like(like)

    def next(self, like: Tensor) -> Tensor:
        """A place for probabilities; it is taken again by the stage after the next."""
        if like.shape != self.scratch.shape:
            return torch.empty_like(like)
        self.spare.reverse()
        return self.spare[0]

    def draft(self, like: Tensor) -> Tensor:
        """A place for what is needed at once only."""
        return self.scratch if like.shape == self.scratch.shape else torch.empty_like(like)


def measure(logits: Tensor, passed: Sequence[Passed], links: tuple[Link, ...], chosen: Tensor, k: int, step: int = 0) -> list[Choice]:
    """The :class:`Choice` of every row, from the logits ``[b v]`` that the chain was given and what it did with them.

    ``links`` are all of the chain; ``chosen [b]`` what it drew. One transfer to the host; in float32, as the links are.
    """
    chosen, k = chosen.clamp(min=0)[:, None], min(k, logits.shape[1])
    first = passed[0].before if passed else logits.float()
    room = _Room(first)
    stages = [_stage(first, None, room)]
    lost = [_nothing(chosen, k)]
    for one in passed:
        same = one.after is stages[-1].logits
        now = stages[-1] if same else _stage(one.after, one.after_ids, room)
        lost.append(lost[0] if same else _lost(one, stages[-1], now, k, room))
        stages.append(now)
    followed = torch.cat([chosen, *(_candidates(s, k, chosen) for s, before in zip(stages, [None, *stages], strict=False) if s is not before)], dim=1)
    facts = []
    for stage, (removed, mass, _, _) in zip(stages, lost, strict=True):
        own = stage.at(chosen)
        rank = _count(stage.logits > own) + 1
        facts.append(torch.stack([stage.left, stage.entropy, stage.probability(own)[:, 0], rank, removed, mass], dim=1))
    parts = [torch.stack(facts, 1), torch.stack([s.probability(s.at(followed)) for s in stages], 1), followed]
    parts += [torch.stack([each[j] for each in lost], 1) for j in (2, 3)]
    return _rows(parts, (*(one.link for one in passed), links[-1]), step)


def _rows(parts: list[Tensor], links: tuple[Link, ...], step: int) -> list[Choice]:
    """Bring all numbers over at once (ids below 2^53 are exact in float64), and cut them into rows."""
    rows = torch.cat([p.flatten(1).double() for p in parts], dim=1).cpu().numpy()
    ends = np.cumsum([p[0].numel() for p in parts])
    facts, p, followed, gone, gone_p = (part.reshape(-1, *of.shape[1:]) for part, of in zip(np.split(rows, ends[:-1], axis=1), parts, strict=True))
    made = []
    for b in range(len(rows)):
        ids, first = np.unique(followed[b].astype(np.int64), return_index=True)
        numbers = p[b][:, first].astype(np.float32), gone[b].astype(np.int64), gone_p[b].astype(np.float32)
        made.append(Choice(int(followed[b, 0]), step, links, Names(), facts[b].copy(), ids, *numbers))
    return made


def _stage(logits: Tensor, ids: Tensor | None, room: _Room) -> _Measured:
    top = logits.amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    below = torch.sub(logits, top, out=room.draft(logits)).clamp_(min=LEAST)
    p = torch.exp(below, out=room.next(logits))
    total = p.sum(1, keepdim=True)
    p /= total
    entropy = (total.log()[:, 0] - torch.linalg.vecdot(p, below)) / log(2)
    alive = ~logits.isneginf()
    return _Measured(logits, None if ids is None else ids.contiguous(), alive, p, top, total, entropy.clamp(min=0), _count(alive))


def _count(mask: Tensor) -> Tensor:
    """How many in each row. On a CPU by NumPy row by row: only what lies in one piece is counted by vectors, ten times faster."""
    return mask.sum(1) if mask.device.type != "cpu" else torch.tensor([np.count_nonzero(row) for row in mask.numpy()])


def _candidates(stage: _Measured, k: int, chosen: Tensor) -> Tensor:
    """The ids of the ``k`` most probable tokens; where fewer are left, ``chosen [b 1]`` stands in."""
    columns, values = _best(stage.logits, k)
    return torch.where(values > GONE, columns if stage.ids is None else stage.ids.gather(1, columns), chosen)


def _nothing(chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`_lost` gives where nothing was removed."""
    ids = torch.full_like(chosen, -1).expand(-1, k)
    return torch.zeros_like(chosen[:, 0]), torch.zeros_like(chosen[:, 0], dtype=torch.float32), ids, torch.zeros_like(ids, dtype=torch.float32)


def _lost(one: Passed, was: _Measured, now: _Measured, k: int, room: _Room) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a link removed: how many ``[b]``, with what probability ``[b]``, and the ``k`` most probable: ids (-1: none) and probabilities ``[b k]``."""
    before, ids, kept = one.before, one.before_ids, now.alive
    if kept.shape != before.shape:
        assert now.ids is not None  # fewer columns have ids of their own
        columns = now.ids if ids is None else torch.searchsorted(ids.contiguous(), now.ids)
        kept = torch.zeros_like(before, dtype=torch.bool).scatter_(1, columns, kept)
    gone = (was.alive if before is was.logits else ~before.isneginf()) & ~kept
    count, nothing = _count(gone), _nothing(now.left[:, None], k)
    if not count.any():
        return nothing
    p = was.p if before is was.logits else was.probability(before).nan_to_num_(0.0)
    p = p.mul_(room.draft(p).copy_(gone))  # times 0 or 1: choosing by a mask takes thirty times longer
    columns, values = _best(p, k, 0.0)
    found = nothing[2].clone(), nothing[3].clone()
    found[0][:, : columns.shape[1]] = torch.where(values > 0, columns if ids is None else ids.gather(1, columns), -1)
    found[1][:, : columns.shape[1]] = values
    return count, p.sum(1), *found


def _best(x: Tensor, k: int, none: float = GONE) -> tuple[Tensor, Tensor]:
    """Columns and values of the ``k`` largest of each row (or all), largest first; of equals the first (of those equal to ``none`` any)."""
    if k >= x.shape[1]:
        values, columns = x.sort(dim=1, descending=True, stable=True)
        return columns, values
    values, columns = _largest(x, k + 1)
    columns = columns[:, :k].sort(dim=1).values
    for row in ((values[:, k] == values[:, k - 1]) & (values[:, k] > none)).nonzero()[:, 0].tolist():  # equals on both sides of the border
        least = values[row, k]
        above, equal = (x[row] > least).nonzero()[:, 0], (x[row] == least).nonzero()[:, 0]
        columns[row] = torch.cat([above, equal[: k - len(above)]]).sort().values
    values, order = x.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values


def _largest(x: Tensor, k: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """``x.topk(k)`` of a wide row: the k largest are in those k blocks of ``width`` whose largest are the largest, and in what no block holds."""
    b, c = x.shape
    n = c // width
    if n <= 4 * k:
        return x.topk(k, dim=1)
    blocks = x[:, : n * width].unflatten(1, (n, width)).amax(2)
    columns = (blocks.topk(k, dim=1).indices[:, :, None] * width + torch.arange(width, device=x.device)).flatten(1)
    rest = torch.arange(n * width, c, device=x.device).expand(b, -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)
