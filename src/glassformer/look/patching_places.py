"""The places of a sweep: layers, positions and heads of a site, and the patch that each of them is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described

from .patching_question import ALIASES, HEAD_SITES, site_path
from .subject import Subject, choose
from .sweep import Patch

AXES = ("layer", "position", "head")


def places(s: Subject, site: str, by: Sequence[str], base: Mapping[str, Tensor], layers: Sequence[int], positions: Sequence[int] | None) -> Places:
    """Every patch that a sweep ``by`` these axes has, as names along its axes and as places."""
    paths = {n: site_path(s, site, n) for n in layers}
    first = base[paths[layers[0]]]
    axes = next(i.axes for i in s.model.sites() if i.path == s.prefix + paths[layers[0]]).split()
    heads = [0]
    if "head" in by:
        kind = next((axes.index(a) for a in ("h", "g") if a in axes), None)
        if kind is None:
            raise InputError(f"{site!r} has no heads to patch one by one: use by=('layer', 'position'), or a site of heads ({', '.join(HEAD_SITES)}).")
        heads = list(range(min(base[path].shape[kind] for path in paths.values())))
    place = next((axes.index(a) for a in ("t", "s") if a in axes), None)
    if place is None:
        raise InputError(f"{site!r} has no positions: patch a site with axes b t ...")
    cross = ".cross." in paths[layers[0]] and axes[place] == "s"
    labels = s.labels() if not cross else list(s.source_pieces)
    shown = list(range(first.shape[place])) if positions is None else list(positions)
    names = {"layer": tuple(str(n) for n in layers), "position": tuple(labels[p] for p in shown), "head": tuple(map(str, heads))}
    return Places(site, paths, tuple(by), axes, tuple(layers), tuple(shown), positions is not None, tuple(heads), tuple(names[b] for b in by))


@dataclass(frozen=True)
class Places:
    """The places of a sweep (see :func:`places`)."""

    site: str
    paths: dict[int, str]
    """The site's path in each layer."""
    by: tuple[str, ...]
    axes: list[str]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    limited: bool
    heads: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]

    def each(self) -> Iterator[dict[str, int]]:
        """Layer, position and head of every patch, in the order of the axes."""
        known = {"layer": self.layers, "position": self.positions, "head": self.heads}
        for combination in itertools.product(*(known[b] for b in self.by)):
            yield dict(zip(self.by, combination, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(map(len, self.names))

    def picked(self, values: Mapping[str, Tensor], place: Mapping[str, int]) -> list[Patch]:
        """The patches of one place: values [1 ..] of another run put in (a sweep without ``layer`` patches all layers at once)."""
        made = []
        for layer in (place["layer"],) if "layer" in place else self.layers:
            path = self.paths[layer]
            value, head = values[path][0], place.get("head")
            names = self.axes[1:]
            positions = (place["position"],) if "position" in place else self.positions if self.limited else None
            if head is not None:
                at = next(names.index(a) for a in ("h", "g") if a in names)
                value, names = value.select(at, head), names[:at] + names[at + 1 :]
            if positions is not None:
                along = next(names.index(a) for a in ("t", "s") if a in names)
                value = value.index_select(along, torch.tensor(positions, device=value.device))
            made.append(Patch(path, value, positions, head))
        return made


def read_by(s: Subject, site: str, by: Any) -> tuple[str, ...]:
    """The axes of a sweep; by default heads of every layer for sites of heads, positions for all others."""
    if not isinstance(site, str):
        raise SiteError(f"A site is named by a text, such as 'resid_pre' or 'z', but {described(type(site))} was given.")
    if by is None:
        return ("layer", "head") if ALIASES.get(site, site).rsplit(".", 1)[-1] in HEAD_SITES else ("layer", "position")
    given = tuple(x.strip() for x in by.split(",")) if isinstance(by, str) else tuple(by) if isinstance(by, Iterable) else (by,)
    for name in given:
        choose(name, AXES, "axis of a sweep")
    if not given or len(set(given)) != len(given):
        raise InputError(f"by={by!r}: name one or more of {', '.join(AXES)}, each once.")
    return given
