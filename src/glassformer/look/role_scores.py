"""The scores of :mod:`.roles`: what each is, and the sums over queries that give it.

    pattern [h t s] of some heads on one text ──► some queries at a time ──► sums ──► scores

The targets of nine roles on a text of ``t`` tokens are ``9 t^2`` marks (2,000 tokens: 36 MB, and eight times as much where they are multiplied with
weights). So queries are taken in groups, and what stands beside the pattern itself is a few times :data:`AT_ONCE` numbers, however long the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .patterns import each_pattern
from .subject import n_heads, n_layers
from .windows import Batch, Reading

DEFINITIONS = {
    "previous": "weight on the position before (t-1)",
    "next": "weight on the position after (t+1), where the mask lets it be seen",
    "first": "weight on position 0, over queries after it (a sink)",
    "last": "weight on the last position, over queries before it, where the mask lets it be seen (a sink: [SEP])",
    "itself": "weight on the query's own position, over queries whose token stood earlier too",
    "local": "weight on the three positions before and the three after, the query's own not counted",
    "same": "weight on all positions that hold the query's token, its own among them, over queries whose token stands elsewhere too",
    "duplicate": "weight on earlier positions that hold the query's token",
    "induction": "weight on positions right after an earlier occurrence of the query's token (its own position not counted)",
    "positional": "R^2 of the weights against their mean by signed distance t-s (own position left out): what distance alone says of the pattern",
    "uniform": "entropy of the row over the logarithm of the number of visible positions: 1 is even",
}
"""What each score is; a mean over the queries that have a target and something else to see. Rows that sum to more than 1 are divided by their sum."""
ROLES = tuple(DEFINITIONS)
RELATIONS = ROLES[:9]
WINDOW = 3
AT_ONCE = 2**20
"""Numbers of a pattern, or of targets, that are summed at a time (8 MB in float64)."""
KEPT = 2**23
"""Bytes of targets that are kept from layer to layer."""


def relations(ids: Tensor, queries: slice = slice(None)) -> Tensor:
    """Which keys are the target of which query, for each of :data:`RELATIONS`: ids [t] -> [r q s], ``q`` counting the ``queries``."""
    t = len(ids)
    keys = torch.arange(t)
    at = keys[queries, None]
    d = at - keys
    same = ids[queries, None] == ids
    follows = torch.zeros_like(same)
    follows[:, 1:] = same[:, :-1]
    earlier = d > 0
    again = same & (d != 0)
    masks = {
        "previous": d == 1,
        "next": d == -1,
        "first": (keys == 0) & (at > 0),
        "last": (keys == t - 1) & (at < t - 1),
        "itself": (d == 0) & (same & earlier).any(-1, keepdim=True),
        "local": (d.abs() <= WINDOW) & (d != 0),
        "same": same & again.any(-1, keepdim=True),
        "duplicate": same & earlier,
        "induction": follows & earlier,
    }
    return torch.stack([masks[r] for r in RELATIONS])


class Tally:
    """Sums over queries for the heads of one layer."""

    def __init__(self, h: int, reach: int):
        f = torch.float64
        self.weight, self.count, self.even = torch.zeros(h, len(RELATIONS), dtype=f), torch.zeros(len(RELATIONS), dtype=f), torch.zeros(len(RELATIONS), dtype=f)
        self.of_rows = {k: torch.zeros(h, dtype=f) for k in ("entropy", "distance", "uniform", "entropy_rest", "distance_rest", "rest")}
        self.rows, self.choices = 0, 0
        # By signed distance, for each head and (last) the even head: number, sum, sum of squares.
        self.reach = reach
        self.n, self.sum, self.square = (
            torch.zeros(2 * reach + 1, dtype=f),
            torch.zeros(h + 1, 2 * reach + 1, dtype=f),
            torch.zeros(h + 1, 2 * reach + 1, dtype=f),
        )

    def add(self, heads: slice, pattern: Tensor, visible: Tensor, targets: Callable[[slice], Tensor], fresh: int) -> None:
        """Weights [h t s] of some heads on one text, some queries at a time.

        ``targets(queries)``: the :func:`relations`; ``fresh``: how many positions from the first on make up the profile by distance.
        """
        h, t = pattern.shape[:2]
        step = max(1, AT_ONCE // (max(h, len(RELATIONS)) * t))
        for first in range(0, t, step):
            queries = slice(first, min(first + step, t))
            self._add(heads, pattern[:, queries], visible[queries], targets(queries), torch.arange(t)[queries], fresh)

    def _add(self, heads: slice, pattern: Tensor, visible: Tensor, masks: Tensor, at: Tensor, fresh: int) -> None:
        """[h q s], [q s], [r q s], and the queries' positions [q]."""
        seen = visible.sum(-1)
        once = heads.start == 0  # what is the same for all heads is counted with the first group
        reach = masks & visible
        counted = reach.any(-1) & (visible & ~reach).any(-1)
        # Sigmoid attention may give away more than 1: its rows are divided by their sum.
        pattern = pattern / pattern.sum(-1, keepdim=True).clamp_min(1.0)
        self.weight[heads] += pattern.flatten(1) @ (reach & counted[..., None]).flatten(1).double().T
        if once:
            self.count += counted.sum(-1)
            self.even += (reach.sum(-1) / seen.clamp_min(1) * counted).sum(-1)
            self.rows, self.choices = self.rows + len(at), self.choices + int((seen > 1).sum())
        self._rows(heads, pattern, seen, at)
        self._profile(heads, pattern, visible, seen, at, fresh, once)

    def _rows(self, heads: slice, pattern: Tensor, seen: Tensor, at: Tensor) -> None:
        far = (at[:, None] - torch.arange(pattern.shape[-1])).abs().double()
        share = pattern.abs()
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
        bits = torch.special.entr(share).sum(-1) / math.log(2)
        self.of_rows["entropy"][heads] += bits.sum(-1)
        self.of_rows["distance"][heads] += (share * far).sum((-1, -2))
        choice = seen > 1
        self.of_rows["uniform"][heads] += (bits[:, choice] / seen[choice].double().log2()).sum(-1)
        later = at > 0
        rest = share[:, later, 1:]
        left = rest.sum(-1)
        kept = left > 1e-3
        rest = rest / left.clamp_min(1e-3)[..., None]
        self.of_rows["entropy_rest"][heads] += (torch.special.entr(rest).sum(-1) / math.log(2) * kept).sum(-1)
        self.of_rows["distance_rest"][heads] += ((rest * far[later, 1:]).sum(-1) * kept).sum(-1)
        self.of_rows["rest"][heads] += kept.sum(-1)

    def _profile(self, heads: slice, pattern: Tensor, visible: Tensor, seen: Tensor, at: Tensor, fresh: int, once: bool) -> None:
        keys = torch.arange(pattern.shape[-1])
        d = at[:, None] - keys
        pairs = visible & (d != 0) & (at[:, None] < fresh) & (keys < fresh)
        index = d[pairs] + self.reach
        values = pattern[:, pairs]
        self.sum[:-1][heads] += torch.zeros_like(self.sum[:-1][heads]).index_add_(1, index, values)
        self.square[:-1][heads] += torch.zeros_like(self.sum[:-1][heads]).index_add_(1, index, values**2)
        if once:
            even = (1 / seen.clamp_min(1).double())[:, None].expand_as(d)[pairs]
            self.n.index_add_(0, index, torch.ones_like(even))
            self.sum[-1].index_add_(0, index, even)
            self.square[-1].index_add_(0, index, even**2)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores [h r] and those of the even head [r], in the order of :data:`ROLES`."""
        explained = self._explained()
        uniform = self.of_rows["uniform"] / self.choices if self.choices else torch.full_like(self.of_rows["uniform"], torch.nan)
        scores = torch.cat([self.weight / self.count, explained[:-1, None], uniform[:, None]], -1)
        return scores, torch.cat([self.even / self.count, explained[-1:], explained.new_zeros(1)])

    def _explained(self) -> Tensor:
        """R^2 by distance for every head and the even head; 0 where there is nothing to explain."""
        n = self.n.sum()
        total = self.square.sum(-1) - self.sum.sum(-1) ** 2 / n
        within = (self.square - self.sum**2 / self.n.clamp_min(1)).sum(-1)
        return torch.where(total > 1e-10 * n, 1 - within / total.clamp_min(1e-300), torch.zeros_like(total)) if n else torch.full_like(total, torch.nan)

    def figures(self) -> dict[str, Tensor]:
        """Entropy and distance [h], of whole rows and of what is left of them without the first position."""
        o = self.of_rows
        return {k: o[k] / self.rows for k in ("entropy", "distance")} | {k: o[k] / o["rest"] for k in ("entropy_rest", "distance_rest")}


class _Targets:
    """The :func:`relations` of a batch's rows: kept for the next layer while they are few, made again where they are many."""

    def begin(self, batch: Batch) -> None:
        """Another batch."""
        self._ids = [torch.tensor(w.ids) for w in batch.windows]
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        self._keep = len(RELATIONS) * sum(len(i) ** 2 for i in self._ids) <= KEPT

    def __call__(self, row: int, queries: slice) -> Tensor:
        key = (row, queries.start, queries.stop)
        found = self._kept.get(key)
        if found is None:
            found = relations(self._ids[row], queries)
            if self._keep:
                self._kept[key] = found
        return found


@dataclass(frozen=True, eq=False)
class Measured:
    """What all layers' heads did with one input."""

    tallies: list[Tally]
    tokens: int

    def scores(self) -> tuple[Tensor, Tensor]:
        """[n r] of all heads and of the even head in their layers."""
        found = [t.scores() for t in self.tallies]
        return torch.cat([s for s, _ in found]).float(), torch.cat([e.expand_as(s) for s, e in found]).float()

    @property
    def figures(self) -> list[dict[str, Tensor]]:
        return [t.figures() for t in self.tallies]


def measure(reading: Reading, fresh: list[int] | None) -> Measured:
    """Read everything once; ``fresh``: for every row, how many positions hold no repetition (None: profiles take all positions)."""
    stack = reading.stack
    tallies = [Tally(n_heads(stack, i), reading.context) for i in range(n_layers(stack))]
    targets = _Targets()
    tokens = 0

    def take(layer: int, heads: slice, pattern: Tensor, visible: Tensor, batch: Batch) -> None:
        nonlocal tokens
        if layer == 0 and heads.start == 0:
            targets.begin(batch)
            tokens += int(batch.real.sum())
        for row, window in enumerate(batch.windows):
            n = len(window.ids)
            own = visible[row % len(visible), :n, :n]
            tallies[layer].add(heads, pattern[row, :, :n, :n], own, partial(targets, row), n if fresh is None else fresh[batch.number + row])

    each_pattern(reading, take)
    return Measured(tallies, tokens)
