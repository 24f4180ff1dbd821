"""Moments of many numbers, seen batch by batch: mean, deviation and kurtosis of every column, without holding the rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Central moments up to the fourth of every column, in float64; two batches are joined exactly (Pébay 2008, SAND2008-6212)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.m2 = self.m3 = self.m4 = torch.zeros(())
        self.smallest = self.largest = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Rows [n f]."""
        n = len(x)
        if not n:
            return
        # Sums of one batch in the type of the rows (torch adds pairwise), about nearly their mean; what is joined over batches is float64.
        near = x.mean(0)
        c = x - near
        square = c * c
        mean, s1, m2 = near.double(), c.sum(0).double(), square.sum(0).double()
        m4 = (square * square).sum(0).double()
        m3 = square.mul_(c).sum(0).double()
        mean, m2, m3, m4 = _shifted(n, mean, s1 / n, m2, m3, m4)
        if not self.n:
            self.n, self.mean, self.m2, self.m3, self.m4 = n, mean, m2, m3, m4
            self.smallest, self.largest = x.amin(0), x.amax(0)
            return
        a, b, whole = self.n, n, self.n + n
        d = mean - self.mean
        self.m4 = (
            self.m4
            + m4
            + d**4 * a * b * (a * a - a * b + b * b) / whole**3
            + 6 * d**2 * (a * a * m2 + b * b * self.m2) / whole**2
            + 4 * d * (a * m3 - b * self.m3) / whole
        )
        self.m3 = self.m3 + m3 + d**3 * a * b * (a - b) / whole**2 + 3 * d * (a * m2 - b * self.m2) / whole
        self.m2 = self.m2 + m2 + d**2 * a * b / whole
        self.mean, self.n = self.mean + d * b / whole, whole
        self.smallest, self.largest = torch.minimum(self.smallest, x.amin(0)), torch.maximum(self.largest, x.amax(0))

    def deviation(self) -> Tensor:
        """The standard deviation of every column [f]."""
        return (self.m2 / self.n).sqrt()

    def kurtosis(self) -> Tensor:
        """``mean((x - mean)^4) / var^2`` of every column [f]: 3 for a normal distribution, 0 where all values are equal."""
        tiny = self.m2 / self.n <= (1e-7 * self.mean.abs()).square()  # rounding alone
        return torch.where(tiny, torch.zeros_like(self.m2), self.n * self.m4 / self.m2.square().clamp_min(torch.finfo(torch.float64).tiny))


def _shifted(n: int, mean: Tensor, d: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments about ``mean`` as moments about the true mean, which lies ``d`` above it."""
    exact4 = m4 - 4 * d * m3 + 6 * d**2 * m2 - 3 * n * d**4
    exact3 = m3 - 3 * d * m2 + 2 * n * d**3
    return mean + d, m2 - n * d**2, exact3, exact4
