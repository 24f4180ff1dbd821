"""The kinds of edits: what happens to a value, at which positions, in which steps (see :mod:`~glassformer.look.edits`)."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.tap import Pattern

LARGEST = 3.4e38  # of float32
Where = str | int | slice | Iterable[int] | None
"""Positions or steps: ``"7:"``, ``"3:9"``, ``"0,4,8:"``, a number, a slice, several numbers; None: all."""


@dataclass(frozen=True, eq=False)
class Change:
    """Base of all edits: what happens at the sites that the pattern ``site`` meets.

    ``positions``: of the whole row, counted from 0, also in a cached generation; None: all. ``steps``: of a generation, 0 is the prompt;
    None: all, and calls that are no generation too. Raises :class:`InputError` or :class:`SiteError` for what cannot be read.
    """

    site: str
    positions: Where = dataclasses.field(default=None, kw_only=True)
    steps: Where = dataclasses.field(default=None, kw_only=True)

    TENSOR: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if Pattern.read(self.site).segments[0] == "step":
            raise SiteError(f"{self.site!r} begins with 'step.': give the path without it, and steps='{self.site.split('.')[1]}'.")
        for name in ("positions", "steps"):
            object.__setattr__(self, name, _where(getattr(self, name), name))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == self.TENSOR:
                object.__setattr__(self, f.name, _tensor(value, self.words, f.name))
            elif f.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
                    raise InputError(f"{self.words}: {f.name} is a finite number, but {str(value)[:40]} was given.")
                object.__setattr__(self, f.name, float(value))

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        """The value that goes on; ``own``: the edit's tensor in the type and place of ``x``."""
        raise NotImplementedError

    @property
    def tensor(self) -> Tensor | None:
        """The tensor of this edit, if it has one."""
        return None if self.TENSOR is None else getattr(self, self.TENSOR)

    @property
    def words(self) -> str:
        """``Zero('blocks.5.attn.z[1]')``."""
        return f"{type(self).__name__}({self.site!r})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a tensor as (nested) lists of numbers."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__} | {n: v.tolist() if isinstance(v, Tensor) else v for n, v in fields.items() if v is not None}

    def __str__(self) -> str:
        said = {"positions": "position", "steps": "step"}
        when = [f"at {word if str(w).isdigit() else name} {w}" for name, word in said.items() if (w := getattr(self, name)) is not None]
        return f"{self.site}: {', '.join([self.does(), *when])}"

    def does(self) -> str:
        """What happens, in words."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Zero(Change):
    """Set to zero: at ``z[1]`` head 1 says nothing, at ``pattern[1]`` it looks nowhere, at ``scores[1]`` it looks at all that it may see alike."""

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    def does(self) -> str:
        return "set to zero"


@dataclass(frozen=True, eq=False)
class Scale(Change):
    """Multiply: ``by * x``."""

    by: float = 1.0

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        return x * self.by

    def does(self) -> str:
        return f"multiplied by {self.by:g}"


@dataclass(frozen=True, eq=False)
class Add(Change):
    """Add ``strength * vector`` (``vector``: [d], or whatever axes of the site come last; one number for all)."""

    vector: Any = None
    strength: float = 1.0
    TENSOR: ClassVar[str | None] = "vector"

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        assert own is not None
        return x + self.strength * own

    def does(self) -> str:
        assert self.tensor is not None
        return f"{self.strength:+g} times a vector of norm {self.tensor.norm():.4g}"


@dataclass(frozen=True, eq=False)
class Set(Change):
    """Put ``value`` there (a mean, for a mean ablation; axes as in :class:`Add`)."""

    value: Any = None
    TENSOR: ClassVar[str | None] = "value"

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        assert own is not None
        return own.expand_as(x)

    def does(self) -> str:
        assert self.tensor is not None
        return f"set to {self.tensor.item():g}" if self.tensor.numel() == 1 else f"set to a value of norm {self.tensor.norm():.4g}"


@dataclass(frozen=True, eq=False)
class Remove(Change):
    """Take out what lies along ``direction``: ``x - (x · u) u`` with ``u = direction / |direction|`` (directional ablation, arXiv 2406.11717)."""

    direction: Any = None
    TENSOR: ClassVar[str | None] = "direction"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction.ndim == 0 or not (self.direction.norm(dim=-1) > 0).all():
            raise InputError(f"{self.words}: a direction is a vector that is not zero, but one of shape {tuple(self.direction.shape)} and norm "
                             f"{self.direction.norm():g} was given.")  # fmt: skip

    def apply(self, x: Tensor, own: Tensor | None) -> Tensor:
        assert own is not None
        unit = own / own.norm(dim=-1, keepdim=True)
        return x - (x * unit).sum(-1, keepdim=True) * unit

    def does(self) -> str:
        return "what lies along a direction is taken out"


KINDS: dict[str, type[Change]] = {k.__name__: k for k in (Zero, Scale, Add, Set, Remove)}


def _tensor(value: Any, owner: str, name: str) -> Tensor:
    if value is None:
        raise InputError(f"{owner} needs {name}: a tensor, or numbers.")
    try:
        made = torch.as_tensor(value).detach().to("cpu", torch.float32).clone().contiguous()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{owner}: {name} is a tensor or numbers, but {described(type(value))} was given ({error}).") from error
    if not made.numel() or not torch.isfinite(made).all():
        raise InputError(f"{owner}: {name} of shape {tuple(made.shape)} holds nothing, or what is no number.")
    return made


Spans = list[tuple[int, int | None]] | None
_SPAN = re.compile(r"([0-9]{1,12})|([0-9]{0,12}):([0-9]{0,12})")


def _where(given: Any, name: str) -> str | None:
    """Positions in their one written form."""
    if given is None:
        return None
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise InputError(f"{name} are runs without gaps, but {given} was given: write them as '0,2,4'.")
        given = f"{'' if given.start is None else given.start}:{'' if given.stop is None else given.stop}"
    elif isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    elif not isinstance(given, str):
        try:
            given = ",".join(str(operator.index(i)) for i in given)
        except (TypeError, ValueError):
            raise InputError(f"{name} are written as '7:', '3:9' or '0,4', but {described(type(given))} was given.") from None
    text = given.replace(" ", "")
    if "-" in text:
        raise InputError(
            f"{name} are counted from the beginning of the row, because its end moves while it grows, but {given!r} was given: write '7:' or '3:9'."
        )
    for piece in text.split(","):
        found = _SPAN.fullmatch(piece)
        if not found or (found[3] and int(found[2] or 0) >= int(found[3])):
            raise InputError(f"{name} are written as '7:' (from 7 on), '3:9' (3 to 8), '5', or several with commas, but {given!r} was given.")
    return str(text)


def spans_of(text: Any) -> Spans:
    if text is None:
        return None
    found: list[tuple[int, int | None]] = []
    for piece in str(text).split(","):
        low, colon, high = piece.partition(":")
        found.append((int(low or 0), (int(high) if high else None) if colon else int(low) + 1))
    return found


def within(spans: Spans, n: int | None) -> bool:
    return spans is None or (n is not None and any(low <= n and (high is None or n < high) for low, high in spans))
