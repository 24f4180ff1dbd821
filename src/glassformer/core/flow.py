"""The Pass: the typed, frozen side inputs of one forward pass.

Every layer is ``forward(self, x, p)``: ``x`` is the stream, ``p`` the Pass. It is handed on
unchanged or narrowed (``p.at("attn")``, ``p.layer(3)``). Observation is one method:

    def see(site, x):  x if nobody looks, else what the tap returns

so that an unobserved call, eager or compiled, does nothing for sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cache import NO_CACHE, Cache, Slot
from .mask import Everything, Mask
from .sites import Site
from .tap import Tap


@dataclass(frozen=True, eq=False)
class Pass:
    """Side inputs of a forward pass.

    ``positions``: [t] or [b t], what position encodings are given. ``index``: [t] or [b t], the
    place of each query in its row (what masks and caches count). ``mask``: who may see whom.
    ``slots``: the caches of this layer by sublayer. ``lengths``: [b], real tokens per row (None: all). ``memory``: an encoder's output [b s d].
    ``shared``: values that are the same in all layers (resolved masks, rotary tables, biases).
    """

    positions: Tensor
    index: Tensor
    mask: Mask = field(default_factory=Everything)
    cache: Cache | None = None
    slots: Mapping[str, Slot] = field(default_factory=dict)
    slot: Slot = NO_CACHE
    lengths: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Mask = field(default_factory=Everything)
    tap: Tap | None = None
    aux: Ledger | None = None
    path: str = ""
    shared: dict[str, Any] = field(default_factory=dict)

    def see(self, site: Site, x: Tensor) -> Tensor:
        """The whole mechanism of observation."""
        return x if self.tap is None else self.tap.visit(self.name(site), x)

    def offer(self, site: Site, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        """A value that exists only for observers: ``compute(heads)`` makes it if one of them wants it."""
        if self.tap is not None:
            self.tap.offer(self.name(site), compute)

    def edits(self, site: Site) -> bool:
        """Whether someone changes (or differentiates by) the value at this site."""
        return self.tap is not None and self.tap.edits(self.name(site))

    def name(self, site: Site) -> str:
        """The full path of a site here."""
        return f"{self.path}.{site.name}" if self.path else site.name

    def at(self, name: str) -> Pass:
        """This Pass inside the part called ``name``."""
        slot = self.slots.get(name, NO_CACHE)
        if self.tap is None:  # only a tap asks for paths
            return self if slot is self.slot else self._with(slot=slot)
        return self._with(path=f"{self.path}.{name}" if self.path else name, slot=slot)

    def layer(self, i: int) -> Pass:
        """This Pass inside block ``i``; the stack knows the number, the block never does."""
        if self.tap is None and self.cache is None:
            return self
        slots = self.cache.layers[i] if self.cache is not None else {}
        if self.tap is None:
            return self._with(slots=slots)
        return self._with(path=f"{self.path}.blocks.{i}" if self.path else f"blocks.{i}", slots=slots)

    def _with(self, **changed: Any) -> Pass:
        """A copy but for some fields."""
        if torch.compiler.is_compiling():
            return replace(self, **changed)
        new = object.__new__(Pass)  # `replace` takes ten times as long, and this runs several times per layer and token
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changed)
        return new


class Ledger:
    """Side losses that parts charge during a forward pass (load balancing of experts), held by the caller."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Tensor]] = {}

    def charge(self, name: str, value: Tensor) -> None:
        """Add a scalar under a name."""
        self.entries.setdefault(name, []).append(value)

    def total(self) -> Tensor | None:
        """The sum of all entries, or None if there are none."""
        values = [v for entry in self.entries.values() for v in entry]
        return sum(values[1:], values[0]) if values else None
