"""Doors: packages whose names are fetched from their rooms when they are first asked for, so that to import the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def door(
    package: str, names: Mapping[str, Sequence[str]], *, rooms: Sequence[str] = (), opened: Callable[[], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package`` (PEP 562): ``names`` are those of each module below it, ``rooms`` modules that are attributes themselves.

    A module and a name in it must be called differently, since a module that is imported becomes an attribute of its package.
    ``opened`` is called after each fetch. An unknown name is an AttributeError with the nearest.
    """
    room_of = {name: room for room, inside in names.items() for name in inside}
    here = sys.modules[package]

    def fetch(name: str) -> Any:
        if name in room_of:
            value = getattr(importlib.import_module(f"{package}.{room_of[name]}"), name)
        elif name in rooms:
            value = importlib.import_module(f"{package}.{name}")
        else:
            from .errors import did_you_mean

            raise AttributeError(f"{package} has no name {name!r}.{did_you_mean(name, [*room_of, *rooms])}")
        setattr(here, name, value)
        if opened is not None:
            opened()
        return value

    def names_here() -> list[str]:
        return sorted({*vars(here), *room_of, *rooms})

    return fetch, names_here
