"""The largest entries of a factored matrix between two vocabularies, without forming it.

    |a_i . b_j| <= |a_i| |b_j|

Rows and columns are taken by falling length. What has been found bounds what is still to be looked at: a row whose length times that of the longest
column is no larger than the ``k``-th entry found so far cannot enter the list, nor can a column that is too short for the longest row left.
The answer is that of the whole matrix; only the work is less, and how much less depends on how uneven the lengths are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glassformer.core.numerics import wide

from .factored import FactoredMatrix

AT_ONCE = 1 << 23
"""Entries of the matrix that stand in memory at a time (32 MB in float32)."""
FIRST = 256
"""Rows (or columns) of the first block, which sets the bound for the others."""
LONGER = 1 + 1e-4
"""Lengths count as this much longer, so that rounding never hides an entry that a bound would only just have let through."""


def largest_entries(matrix: FactoredMatrix, k: int) -> list[tuple[int, int, float]]:
    """The ``k`` rows whose largest entry stands furthest above the row's mean, and that entry: (row, column, value above the mean), falling.

    Cost: at worst the whole product, ``2 m n r`` operations in blocks of 32 MB (GPT-2's 50,257 x 50,257 at rank 64: 3 * 10^11, some ten seconds of a
    processor's core), less where lengths are uneven.
    """
    a, b = _even(matrix.A, matrix.B - matrix.B.mean(-1, keepdim=True))  # soft-max does not see what all entries of a row share
    (a, long_a, rows), (b, long_b, columns) = _falling(a), _falling(b)
    k = min(k, len(a))
    best, at = a.new_full((k,), -torch.inf), torch.zeros(k, dtype=torch.long, device=a.device)
    first, step = 0, max(FIRST, k)
    while first < len(a):
        needed = int((long_b * long_a[first] > best[-1]).sum()) if float(best[-1]) >= 0 else len(b)
        if not needed:
            break
        last = min(len(a), first + min(step, max(1, AT_ONCE // needed)))
        values = (a[first:last] @ b[:needed].T).amax(1)  # where it stands is asked of k rows only: amax takes half the time of max
        best, order = torch.cat([best, values]).topk(k)
        at = torch.cat([at, torch.arange(first, last, device=a.device)])[order]
        first, step = last, 2 * step
    found = torch.cat([(a[some] @ b.T).argmax(1) for some in at.split(max(1, AT_ONCE // len(b)))])
    return list(zip(rows[at].tolist(), columns[found].tolist(), best.tolist(), strict=True))


def share_on_diagonal(matrix: FactoredMatrix) -> float:
    """The share of rows whose diagonal entry is larger than every other entry of the row; an equal one elsewhere is enough against it.

    Columns are looked at by falling length, and a row is done with at the first entry that is as large as its own, or when no column that is left is
    long enough for one: few rows get far unless the matrix copies. Cost: at worst the whole product, as :func:`largest_entries`.
    """
    a, b = _even(matrix.A, matrix.B)
    own = (a * b).sum(-1)
    sorted_b, long_b, columns = _falling(b)
    place = columns.argsort()  # where a row's own column stands
    long_a = a.norm(dim=-1) * LONGER
    left, kept = torch.arange(len(a), device=a.device), 0
    first = 0
    while first < len(b) and len(left):
        safe = long_a[left] * long_b[first] < own[left]
        kept += int(safe.sum())
        left = left[~safe]
        last = min(len(b), first + max(FIRST, AT_ONCE // max(1, len(left))))
        going = []
        for some in left.split(max(1, AT_ONCE // (last - first))):
            block = a[some] @ sorted_b[first:last].T
            here = ((place[some] >= first) & (place[some] < last)).nonzero()[:, 0]
            block[here, place[some][here] - first] = -torch.inf
            going.append(some[block.amax(1) < own[some]])
        left = torch.cat(going) if going else left
        first = last
    return (kept + len(left)) / len(a)


def _even(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [m r] and [n r] of the same product whose columns are as long on either side, so that lengths bound the entries well."""
    u, s, v = FactoredMatrix(wide(A), wide(B)).svd()
    return u * s.sqrt(), v * s.sqrt()


def _falling(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by falling length, the lengths, and which row each was."""
    lengths = x.norm(dim=-1) * LONGER
    lengths, order = lengths.sort(descending=True)
    return x[order], lengths, order
