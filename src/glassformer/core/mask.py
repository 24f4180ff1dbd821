"""Masks: who may see whom, as an algebra that stays lazy until a kernel needs it.

    Causal() & Window(512) & SameDocument(ids) & Padding(lengths)

A mask is a rule over indices: ``allowed(b, q, s)`` says whether query place ``q`` of row ``b`` may
see key place ``s``. Indices count places in a row (0, 1, 2…), not the positions that a position
encoding is given: packed documents may restart their positions, their places go on.

    mask, q index, k index ──► resolve ──► nothing is hidden   → the kernel's plain path
                                       ──► the lower triangle  → the kernel's causal path
                                       ──► anything else       → one dense [b|1, 1, t, s] boolean
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import MaskError
from .spec import Spec, part


class Mask(Spec):
    """A rule of visibility. Combine with ``&`` (both), ``|`` (either), ``~`` (not)."""

    _checks_fields: ClassVar[bool] = False  # masks are made in every forward pass, inside a compiled one too

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        """Boolean of the broadcast shape of ``b`` (row), ``q`` (query place), ``s`` (key place)."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            raise MaskError(f"a & b joins two masks, but {other!r} was given: Causal() & Window(512), for example.")
        terms = [t for m in (self, other) for t in (m.terms if isinstance(m, And) else (m,))]
        kept: list[Mask] = []
        for t in terms:
            if not isinstance(t, Everything) and not any(t is k or (type(t) is type(k) and t == k) for k in kept):
                kept.append(t)
        return Everything() if not kept else kept[0] if len(kept) == 1 else And(tuple(kept))

    def __or__(self, other: Mask) -> Mask:
        return Or((self, other))

    def __invert__(self) -> Mask:
        return Not(self)


@part
class Everything(Mask):
    """Hide nothing."""

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return (q >= 0) & (s >= 0)


@part
class Causal(Mask):
    """A position sees itself and what came before it: ``s <= q``."""

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return s <= q


@part
class Window(Mask):
    """A position sees the ``size`` nearest places up to itself and as many after it: ``|q - s| < size``.

    With :class:`Causal` this is the sliding window of Longformer and Mistral (arXiv 2004.05150, 2310.06825).
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not hasattr(self.size, "__index__"):
            raise MaskError(f"Window(size={self.size!r}): the size is a whole number of places.")
        if self.size < 1:
            raise MaskError(f"Window(size={self.size}) would hide everything; the size is at least 1.")

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return (q - s).abs() < self.size


@dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """A position sees only its own document in a packed row: ``ids[b, q] == ids[b, s]``; ``ids`` is [b t]."""

    ids: Tensor

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        last = self.ids.shape[1] - 1
        return self.ids[b, q.clamp(max=last)] == self.ids[b, s.clamp(min=0, max=last)]


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Keys beyond a row's length are invisible: ``s < lengths[b]``; ``lengths`` is [b]."""

    lengths: Tensor

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return s < self.lengths[b]

    @staticmethod
    def of(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Padding:
        """A padding mask from a list or tensor of row lengths."""
        return Padding(torch.as_tensor(lengths, dtype=torch.long, device=device))


@dataclass(frozen=True, eq=False)
class Visible(Mask):
    """Keys marked False are invisible, wherever they stand (left padding, holes): ``keys[b, s]`` is [b s] boolean."""

    keys: Tensor

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        last = self.keys.shape[1] - 1
        return self.keys[b, s.clamp(min=0, max=last)] | (s > last)


@part
class And(Mask):
    """All of the terms."""

    terms: tuple[Mask, ...]

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        result = self.terms[0].allowed(b, q, s)
        for term in self.terms[1:]:
            result = result & term.allowed(b, q, s)
        return result


@part
class Or(Mask):
    """Any of the terms."""

    terms: tuple[Mask, ...]

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        result = self.terms[0].allowed(b, q, s)
        for term in self.terms[1:]:
            result = result | term.allowed(b, q, s)
        return result


@part
class Not(Mask):
    """The opposite of a mask."""

    term: Mask

    def allowed(self, b: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return ~self.term.allowed(b, q, s)


# From a rule to what a kernel takes


class Resolved:
    """A mask for one call: ``dense`` None and ``causal`` False hide nothing, ``causal`` hides the upper triangle.

    ``dense``: [b|1, 1, t, s] boolean, True where the key is visible; made when it is first asked for.
    ``ends``: where it hides what is later, and keys lie in the order of their places, how many keys each query sees from key 0 on,
    [t] or [b t] (None: not that simple). ``window``: of those only the last so many (0: all). Who reads these two needs no dense mask.
    """

    def __init__(
        self,
        rule: Mask,
        causal: bool,
        dense: Tensor | None = None,
        *,
        make: Callable[[], Tensor] | None = None,
        ends: Tensor | None = None,
        window: int = 0,
    ):
        self.rule, self.causal, self._dense, self._make = rule, causal, dense, make
        self.ends, self.window = ends, window
        self.places: Tensor | None = None  # of the keys, [s] or [b s], and who sees which: for deterministic mode only
        self.seen: Any = None

    @property
    def dense(self) -> Tensor | None:
        """The boolean matrix (None: nothing hidden, or the upper triangle)."""
        if self._make is not None:
            self._dense, self._make = self._make(), None
        return self._dense

    @property
    def everything(self) -> bool:
        """Whether every query sees every key."""
        return self._dense is None and self._make is None and not self.causal

    def tensor(self, t: int, s: int, device: torch.device) -> Tensor | None:
        """The boolean form of whatever it is (None: nothing hidden)."""
        if self.causal:
            return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)
        return self.dense


FEW = 8
"""So many queries per row may have their mask as ``ends``: more are no decode step."""


def resolve(mask: Mask, q_index: Tensor, k_index: Tensor, *, rows: int, newest: bool = False, in_order: bool = False) -> Resolved:
    """Decide what a kernel must be told.

    ``q_index`` [t] or [b t] and ``k_index`` [s] or [b s] hold places; the same object means that
    queries and keys are the same row (no cache before them). ``newest``: one query per row, and no
    key lies beyond it, so causality hides nothing. ``in_order``: key ``j`` of a row is the one at place ``j``.
    Keys with a negative place do not exist.
    """
    terms = mask.terms if isinstance(mask, And) else (mask,)
    aligned, t = q_index is k_index, q_index.shape[-1]
    if aligned:
        terms = tuple(m for m in terms if not (isinstance(m, Window) and m.size >= t))
    causal = newest or any(isinstance(m, Causal) for m in terms)
    if newest:
        terms = tuple(m for m in terms if not isinstance(m, Causal))
        terms = tuple(m for m in terms if not (isinstance(m, Window) and m.size >= k_index.shape[-1]))
    terms = tuple(m for m in terms if not isinstance(m, Everything))
    holes = not (aligned or newest) and k_index.ndim == 2  # a ring may hold places not yet filled
    if not terms and not holes:
        return Resolved(mask, False, None)
    if aligned and len(terms) == 1 and isinstance(terms[0], Causal):
        return Resolved(mask, True, None)

    def make() -> Tensor:
        q = (q_index if q_index.ndim == 2 else q_index[None])[:, :, None]
        s = (k_index if k_index.ndim == 2 else k_index[None])[:, None, :]
        b = torch.arange(rows, device=q_index.device)[:, None, None]
        allowed = And(terms).allowed(b, q, s) if terms else torch.ones_like(s, dtype=torch.bool)
        if k_index.ndim == 2:
            allowed = allowed & (s >= 0)
        return allowed[:, None]

    if in_order and causal and t <= FEW and k_index.ndim == 1 and all(isinstance(m, (Causal, Window)) for m in terms):
        window = min((m.size for m in terms if isinstance(m, Window)), default=0)
        return Resolved(mask, False, make=make, ends=q_index + 1, window=window)
    return Resolved(mask, False, make())
