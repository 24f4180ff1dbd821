"""A part of a value: one number or a range along some of its axes, by the axis's name or by place.

values("blocks.2.attn.pattern", head=3, position="fox")         axes by name
values("blocks.2.attn.pattern", "3, 5, 0:4")                    axes by place, as tensors are indexed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from glassformer.core.errors import InputError, SiteError, did_you_mean

Index = int | slice | Sequence[int] | str
NAMES = {
    "t": "position",
    "s": "key",
    "h": "head",
    "g": "head",
    "k": "feature",
    "d": "feature",
    "w": "feature",
    "r": "feature",
    "f": "unit",
    "v": "token",
    "e": "expert",
    "c": "choice",
    "1": "one",
}
"""What each axis letter is called when a part is asked for."""


def axis_names(axes: str) -> list[str]:
    """The names of a step's axes, in order."""
    return [NAMES[a] for a in axes.split()]


def read_index(
    name: str, axes: str, shape: Sequence[int], where: str | None, given: dict[str, Index], group: int, word: Callable[[str, str], list[int]]
) -> list[int | list[int] | None]:
    """For each axis: one place (the axis goes), several, or None for all.

    ``group``: query heads that share a key/value head (``head=3`` of a key is the one that query head 3 reads). ``word(axis, text)``: where a word stands.
    Raises :class:`InputError` for an axis the step has not, :class:`SiteError` for a head that it has not.
    """
    letters, names = axes.split(), axis_names(axes)
    asked: list[Index | None] = [None] * len(letters)
    if where is not None and not isinstance(where, str):
        raise InputError(f"where={where!r} is no text: write a number or a range for each axis, such as '3, 0:4, :'.")
    if where is not None:
        parts = [p.strip() for p in where.split(",")] if where.strip() else []
        if len(parts) > len(letters):
            raise InputError(f"{where!r} indexes {len(parts)} axes, but {name} has {len(letters)}: {axes or 'none, it is one number'}.")
        asked[: len(parts)] = [_parsed(p, where) for p in parts]
    for key, index in given.items():
        if key not in names:
            has = f"its axes are {', '.join(names)}" if names else "it is one number"
            raise InputError(f"{name} has no axis {key!r}.{did_you_mean(key, names)} Its shape is ({', '.join(map(str, shape))}): {has}.")
        at = names.index(key)
        if asked[at] is not None:
            raise InputError(f"The axis {key!r} of {name} is asked for twice: by where={where!r} and by {key}={index!r}.")
        asked[at] = index // group if letters[at] == "g" and isinstance(index, int) and not isinstance(index, bool) and index >= 0 else index
    return [None if a is None else _places(name, letter, n, a, word) for letter, n, a in zip(letters, shape, asked, strict=True)]


def _parsed(part: str, where: str) -> Index | None:
    pieces = part.split(":")
    try:
        numbers = [int(p) if p.strip() else None for p in pieces]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or (len(numbers) == 1 and numbers[0] is None):
        raise InputError(f"{where!r} is no index: write a number or a range for each axis, such as '3, 0:4, :', but {part!r} stands there.")
    if len(numbers) == 1:
        return numbers[0]
    return None if numbers == [None, None] else slice(*numbers)


def _places(name: str, letter: str, n: int, index: Index, word: Callable[[str, str], list[int]]) -> int | list[int]:
    if isinstance(index, str):
        if letter not in "ts":
            raise InputError(f"{index!r} names a word, but the axis {NAMES[letter]!r} of {name} counts no positions: give a number, 0 to {n - 1}.")
        found = word(letter, index)
        return found[-1] if len(found) == 1 else found
    if isinstance(index, slice):
        chosen = list(range(n))[index]
        if not chosen:
            raise InputError(f"{index} holds none of the {n} places of the axis {NAMES[letter]!r} of {name}.")
        return chosen
    if isinstance(index, int) and not isinstance(index, bool):
        return _checked(name, letter, n, index)
    if isinstance(index, Sequence) and index and all(isinstance(i, int) and not isinstance(i, bool) for i in index):
        return [_checked(name, letter, n, int(i)) for i in index]
    raise InputError(f"{NAMES[letter]}={index!r} of {name} is no index: give a number, a slice, or a list of numbers.")


def _checked(name: str, letter: str, n: int, i: int) -> int:
    if letter in "hg" and not 0 <= i < n:
        what = "heads" if letter == "h" else "key/value heads"
        raise SiteError(f"Head {i} was asked for at {name}, which has {n} {what}, 0 to {n - 1}.")
    if not -n <= i < n:
        raise InputError(f"{i} was asked for along the axis {NAMES[letter]!r} of {name}, which has {n} places: 0 to {n - 1}.")
    return i % n


def plain_index(picked: Sequence[int | list[int] | None], axes: str) -> dict[str, Any]:
    """The index by axis names, as plain data."""
    return {NAMES[a]: p for a, p in zip(axes.split(), picked, strict=True) if p is not None}
