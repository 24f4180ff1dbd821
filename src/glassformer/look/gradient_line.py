"""The integral of a gradient along the straight line from a baseline to a text, interval by interval.

0 ─┬─┬──┬────┬──────────────── 1        nodes evenly on an interval [a, b] with b <= 2 a, and on [0, b]
   every 16th of the one after it       nodes evenly in ln a on a longer one: near zero vectors norms make the output change with ln a

Known on each interval is the error of the sum over all tokens, by the outputs at its ends. Errors of single tokens that cancel in the sum are not
seen; finer intervals (a smaller tolerance) show how much the tokens' own numbers still move.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from glassformer.core.modes import evaluating
from glassformer.core.numerics import wide

from .gradient_question import Asked, forward, gradients
from .subject import Subject

NODES = 8
"""Gauss-Legendre nodes of one interval: exact for polynomials of degree 15."""
NEAR = 16.0
"""An interval that begins at 0 is cut at this part of it: norms within norms, near zero vectors all happens at small powers of ten."""
MOST_POWERS = 24
"""Powers of it that are tried: the last is 1e-28."""
LEAST = 1e-30
"""No interval is cut below it, nor below the smallest normal number of the vectors' type."""
ROUNDING = 16.0
"""An interval's error of so many times the rounding of the largest output (its size times the type's epsilon) may be rounding alone."""
NOTABLE = 0.02
"""Part of the largest change from one power to the next, from which on an interval is cut at once."""


class Line:
    """The integral along the line, interval by interval: ``parts[(a, b)]`` holds the attributions [t] of each input on it, and the error of their sum."""

    def __init__(self, s: Subject, starts: list[Tensor], ends: list[Tensor], asked: Asked, batch: int):
        self.s, self.starts, self.ends, self.asked, self.batch = s, starts, ends, asked, batch
        self.parts: dict[tuple[float, float], tuple[list[Tensor], float]] = {}
        self.outputs: dict[float, float] = {}
        self.used, self.size = 0, 0.0  # gradients made; the largest output seen
        self.finfo = torch.finfo(ends[0].dtype)
        self.floor = max(LEAST, self.finfo.tiny)
        self.from_zero = not any(x.any() for x in starts)
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        self.nodes, self.weights = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)  # on [0, 1]

    def integrate(self, steps: int, most: int, tolerance: float) -> None:
        """Halve the worst intervals until their errors sum to less than ``tolerance`` of the difference, and ``steps`` gradients were made.

        An error of an interval that may be rounding alone is left: halving does not lessen it.
        """
        room = max(1, most // NODES)  # whole intervals
        n = min(-(-steps // NODES), room)
        cuts = self._from_zero(room, tolerance) if self.from_zero else [i / n for i in range(n + 1)]
        self.add(list(itertools.pairwise(cuts)))
        whole, size = abs(self.output(1.0) - self.output(0.0)), max(abs(self.output(1.0)), abs(self.output(0.0)))
        allowed = tolerance * max(whole, 1e-3 * size)
        while bad := self._bad(allowed, steps)[: (most - self.used) // (2 * NODES)]:
            for key in bad:
                del self.parts[key]
            self.add([half for a, b in bad for half in ((a, _middle(a, b)), (_middle(a, b), b))])

    def _bad(self, allowed: float, steps: int) -> list[tuple[float, float]]:
        """The intervals to halve, the worst first: those with notable errors; where there are none, as many as reach ``steps``."""
        total = sum(error for _, error in self.parts.values())
        worst = sorted((key for key in self.parts if self._divides(*key)), key=lambda key: -self.parts[key][1])
        if total > allowed:
            notable = max(allowed / len(self.parts), total / 64, ROUNDING * self.finfo.eps * self.size)
            if bad := [key for key in worst if self.parts[key][1] > notable]:
                return bad
        return worst[: -(-max(0, steps - self.used) // (2 * NODES))]

    def _divides(self, a: float, b: float) -> bool:
        """Whether an interval may be cut; what is narrower is a jump."""
        return b - a > 1e-3 * b and _middle(a, b) > self.floor

    def _from_zero(self, room: int, tolerance: float) -> list[float]:
        """Cuts of the line where the output changes, as passes without gradients show: at powers of 4 there, at powers of 16 elsewhere.

        If these are more intervals than there is room for: cuts of those on which the output moves most.
        """
        powers = [p for k in range(MOST_POWERS) if (p := NEAR**-k) > self.floor][::-1]
        values = self._outputs([0.0, *powers])
        moved = [abs(b - a) for a, b in itertools.pairwise(values)]
        first = next((i for i, m in enumerate(moved) if m > tolerance * max(moved)), 0)  # below it all is as at 0
        cuts = [0.0]
        for a, b, m in zip([0.0, *powers][first:], powers[first:], moved[first:], strict=False):
            cuts += [math.sqrt(a * b), b] if a > 0 and m > NOTABLE * max(moved) else [b]
        if len(cuts) - 1 <= room:
            return cuts
        cuts = [0.0, 1.0]
        while len(cuts) - 1 < room:
            ends = self._outputs(cuts)
            i = max((i for i in range(len(cuts) - 1) if self._divides(*cuts[i : i + 2])), key=lambda i: abs(ends[i + 1] - ends[i]))
            cuts.insert(i + 1, _middle(*cuts[i : i + 2]))
        return cuts

    def _outputs(self, ends: Sequence[float]) -> list[float]:
        """The number asked about at these places, each computed once."""
        new = [p for p in dict.fromkeys(ends) if p not in self.outputs]
        for i in range(0, len(new), self.batch):
            with torch.no_grad(), evaluating(self.s.model):
                made = forward(self.s, self.points(new[i : i + self.batch]), self.asked.keep)
                found = self.asked.of(made)
            self.size = max(self.size, *(float(x.nan_to_num(0, 0, 0).abs().max()) for x in (made, found)))
            self.outputs.update(zip(new[i : i + self.batch], found.double().tolist(), strict=True))
        return [self.outputs[p] for p in ends]

    def add(self, intervals: list[tuple[float, float]]) -> None:
        """Integrate over new intervals."""
        placed = [self._placed(a, b) for a, b in intervals]
        at = [p for points, _ in placed for p in points.tolist()]
        self._outputs([p for interval in intervals for p in interval])
        made: list[list[Tensor]] = [[] for _ in self.ends]
        for i in range(0, len(at), self.batch):
            _, grads = gradients(self.s, self.points(at[i : i + self.batch]), self.asked)
            for into, grad, start, end in zip(made, grads, self.starts, self.ends, strict=True):
                into.append((wide(grad) * wide(end - start)).sum(-1).double())
        self.used += len(at)
        joined = [torch.cat(m).unflatten(0, (len(intervals), NODES)) for m in made]  # [intervals nodes t]
        for i, (a, b) in enumerate(intervals):
            parts = [torch.einsum("n,nt->t", placed[i][1].to(m), m[i]) for m in joined]
            self.parts[a, b] = parts, abs(sum(float(p.sum()) for p in parts) - (self.outputs[b] - self.outputs[a]))

    def _placed(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        """Nodes on [a, b] and their weights."""
        if not _by_ratio(a, b):
            return a + (b - a) * self.nodes, (b - a) * self.weights
        points = a * (b / a) ** self.nodes
        return points, math.log(b / a) * points * self.weights

    def points(self, at: Sequence[float]) -> list[Tensor]:
        """The inputs at these places of the line [b t w]."""
        return [a + torch.tensor(at, dtype=b.dtype, device=b.device)[:, None, None] * (b - a) for a, b in zip(self.starts, self.ends, strict=True)]

    def output(self, at: float) -> float:
        """The number at an end of an interval."""
        return self.outputs[at]

    def values(self) -> list[Tensor]:
        """The whole integral for each input [t]."""
        found = [torch.stack(list(p)).sum(0) for p in zip(*(parts for parts, _ in self.parts.values()), strict=True)]
        return [f.to(wide(e).dtype).cpu() for f, e in zip(found, self.ends, strict=True)]


def _by_ratio(a: float, b: float) -> bool:
    return a > 0 and b > 2 * a


def _middle(a: float, b: float) -> float:
    return b / NEAR if a == 0 else math.sqrt(a * b) if _by_ratio(a, b) else (a + b) / 2
