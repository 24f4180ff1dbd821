"""Factored matrices: a product that is not multiplied out.

    W = A B          A [.. m r]   B [.. r n]   r much smaller than m and n

A head's W_V W_O has rank ``d_head`` in a stream of width ``d_model``, and W_E W_V W_O W_U has it between two vocabularies: the
whole would be [v v]. Sum of eigenvalues, eigenvalues, singular values, norms and single rows need the factors only. Factors of fewer bits than
float32 stay so, but decompositions are computed, and returned, in float32.
"""

# ruff: noqa: N802  (matrices are named as the field names them)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.numerics import wide


class FactoredMatrix:
    """``A B``; leading axes before the last two count matrices (one for each layer and head) and broadcast."""

    def __init__(self, A: Tensor, B: Tensor):
        for name, x in (("A", A), ("B", B)):
            if not isinstance(x, Tensor) or x.ndim < 2:
                shape = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else described(type(x))
                raise InputError(f"FactoredMatrix: {name} is {shape}, but a factor is a tensor with at least two axes.")
        if A.shape[-1] != B.shape[-2]:
            raise InputError(f"FactoredMatrix: A has {A.shape[-1]} columns and B {B.shape[-2]} rows, but they meet in one axis: make them equal.")
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise InputError(f"FactoredMatrix: the leading axes {tuple(A.shape[:-2])} and {tuple(B.shape[:-2])} do not fit each other.") from error
        self.A, self.B = A.expand(*leading, *A.shape[-2:]), B.expand(*leading, *B.shape[-2:])

    # What it is

    @property
    def shape(self) -> torch.Size:
        """Of the product."""
        return torch.Size((*self.A.shape[:-1], self.B.shape[-1]))

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return self.A.ndim

    @property
    def ldim(self) -> int:
        """Rows of the product."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """The rank that the factors allow."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns of the product."""
        return self.B.shape[-1]

    @property
    def AB(self) -> Tensor:
        """The product itself, formed: [.. m n]."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:
        """``B A`` [.. r r], which has the product's eigenvalues but for zeros. Raises :class:`InputError` if the product is not square."""
        self._square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __repr__(self) -> str:
        return f"FactoredMatrix({tuple(self.shape)}, rank at most {self.mdim})"

    # Products

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Any:
        """A factored matrix, whose rank is the smaller of the two; a vector gives a vector."""
        rows = other.ldim if isinstance(other, FactoredMatrix) else _meeting(other, 0)
        if rows != self.rdim:
            raise InputError(f"A factored matrix with {self.rdim} columns was multiplied by what has {rows} rows: make them equal.")
        if isinstance(other, FactoredMatrix):
            inner = self.B @ other.A
            return FactoredMatrix(self.A, inner @ other.B) if self.mdim <= other.mdim else FactoredMatrix(self.A @ inner, other.B)
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> Any:
        if (columns := _meeting(other, -1)) != self.ldim:
            raise InputError(f"A factored matrix with {self.ldim} rows was multiplied from the left by what has {columns} columns: make them equal.")
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, by: float | Tensor) -> FactoredMatrix:
        if not isinstance(by, int | float | Tensor):
            raise InputError(f"A factored matrix is multiplied by a number (by a matrix with @), but {described(type(by))} was given.")
        return FactoredMatrix(self.A * by, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Indexed as the product is: leading axes, then rows of ``A``, then columns of ``B``. A single row or column stays a matrix."""
        items = index if isinstance(index, tuple) else (index,)
        given = sum(i is not None and i is not Ellipsis for i in items)
        if given > self.ndim or sum(i is Ellipsis for i in items) > 1:
            raise InputError(f"A factored matrix of {self.ndim} axes was indexed by {given}: give at most one index for each axis.")
        if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items = (*items[:at], *(slice(None),) * (self.ndim - given), *items[at + 1 :])
        leading, rest = items[: self.ndim - 2], [*items[self.ndim - 2 :], slice(None), slice(None)][:2]
        for i, n in zip(rest, self.shape[-2:], strict=True):
            if isinstance(i, int) and not -n <= i < n:
                raise InputError(f"Row or column {i} was asked for of a factored matrix of {self.ldim} x {self.rdim}.")
        rows, columns = (slice(i, None if i == -1 else i + 1) if isinstance(i, int) else i for i in rest)
        try:
            A, B = (self.A[leading], self.B[leading]) if leading else (self.A, self.B)
            return FactoredMatrix(A[..., rows, :], B[..., :, columns])
        except (IndexError, TypeError) as error:
            raise InputError(f"A factored matrix of shape {tuple(self.shape)} cannot be indexed by {index!r}: {error}.") from error

    def unsqueeze(self, axis: int) -> FactoredMatrix:
        """A new leading axis of size one."""
        if not 0 <= axis <= self.ndim - 2:
            raise InputError(f"A leading axis stands at 0 to {self.ndim - 2} of this factored matrix, but {axis} was given.")
        return FactoredMatrix(self.A.unsqueeze(axis), self.B.unsqueeze(axis))

    # What is known without forming it

    @property
    def eigenvalues(self) -> Tensor:
        """The ``r`` eigenvalues that may differ from zero, complex [.. r]: those of ``B A``."""
        return torch.linalg.eigvals(_regular(self.BA))

    def trace(self) -> Tensor:
        """The sum of the diagonal, which is that of the eigenvalues."""
        self._square("trace()")
        return (self.A * self.B.mT).sum((-2, -1))

    def norm(self) -> Tensor:
        """The Frobenius norm."""
        return (self._triangle(self.A) @ wide(self.B)).norm(dim=(-2, -1))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U [.. m r]``, ``S [.. r]``, ``V [.. n r]`` with ``A B = U diag(S) V^T``, S falling: two QR decompositions and an SVD of [r r], O((m + n) r^2)."""
        qa, ra = torch.linalg.qr(_regular(self.A))
        qb, rb = torch.linalg.qr(_regular(self.B.mT))
        u, s, vh = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
        return qa @ u, s, qb @ vh.mT

    @property
    def U(self) -> Tensor:
        """Left singular vectors as columns."""
        return self.svd()[0]

    @property
    def S(self) -> Tensor:
        """Singular values, the largest first."""
        return torch.linalg.svdvals(self._triangle(self.A) @ self._triangle(self.B.mT).mT)

    @property
    def Vh(self) -> Tensor:
        """Right singular vectors as columns [.. n r] (TransformerLens' name for them; of ``A B = U diag(S) Vh^T``)."""
        return self.svd()[2]

    def make_even(self) -> FactoredMatrix:
        """The same product with its size shared by both factors: ``U sqrt(S)`` and ``sqrt(S) V^T``."""
        u, s, v = self.svd()
        root = s.sqrt()[..., None, :]
        return FactoredMatrix(u * root, (v * root).mT)

    def collapse_l(self) -> Tensor:
        """[.. r n] with the product's ``W^T W``: what stands left of it is turned away."""
        _, s, v = self.svd()
        return s[..., None] * v.mT

    def collapse_r(self) -> Tensor:
        """[.. m r] with the product's ``W W^T``."""
        u, s, _ = self.svd()
        return u * s[..., None, :]

    def get_corner(self, k: int = 3) -> Tensor:
        """The first ``k`` rows and columns of the product."""
        return self[..., :k, :k].AB

    @staticmethod
    def _triangle(x: Tensor) -> Tensor:
        """``R`` of ``x = Q R``: as long as ``x`` in every direction, and [r r]."""
        return torch.linalg.qr(_regular(x), mode="r")[1]

    def _square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise InputError(f"{what} is asked of a square matrix, but this one is {self.ldim} x {self.rdim}: svd() and norm() hold for every shape.")


def _meeting(x: Any, axis: int) -> int:
    """The size of the axis in which a vector or a matrix meets a factored one."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise InputError(f"A factored matrix is multiplied by a vector, a matrix or another of its kind, but {described(type(x))} was given.")
    return x.shape[-1] if x.ndim == 1 else x.shape[-2 if axis == 0 else -1]


def _regular(x: Tensor) -> Tensor:
    """``x`` as a decomposition takes it. Raises :class:`InputError` for NaN and infinities, which have none."""
    x = wide(x)
    if not bool(x.isfinite().all()):
        raise InputError("A factor holds NaN or infinities, of which there are no eigenvalues and singular values.")
    return x
