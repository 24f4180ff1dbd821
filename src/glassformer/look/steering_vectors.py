"""Directions that are added to the stream: how they are made, kept as files, and added in any call.

vector = steering_vector(model, positive texts, negative texts, layer=3)
vector.save("glad.safetensors")                     SteeringVector.load("glad.safetensors", model)
vector.intervention(4.0).save("glad.json")          the same as an edit
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.tap import Pattern, Tap

from . import tensor_files
from .changes import Add
from .edits import Intervention, half_of
from .subject import Subject, Text, check_layer, feedforward_of, note_length, read

KEY, VERSION = "glassformer.steering", 1
_NUMBER, _TEXT = (int | float, "a finite number"), (str, "a text")
SAVED: dict[str, Any] = {"layer": (int, "a whole number of at least 0"), "site": _TEXT, "label": _TEXT, "norm": _NUMBER, "prefix": _TEXT}
At = int | Sequence[int] | slice | None
"""Where a vector is added, counted in the whole row: from a position on (int), at some positions, in a slice, or everywhere (None)."""


class AddVector(Tap):
    """Add ``vector`` [d] (or rows [n d], one per position) times ``strength`` to the values at ``site``.

    ``positions`` are counted in the whole row, in cached generation too: an int means from there on. Rows [n d] stand at as many positions from there.
    """

    def __init__(self, site: str, vector: Tensor, strength: float = 1.0, positions: At = None):
        if not isinstance(vector, Tensor):
            raise InputError(f"The vector is a tensor [d], or [n d], but {described(type(vector))} was given: use torch.tensor(...).")
        if vector.ndim not in (1, 2) or not vector.is_floating_point():
            raise InputError(f"The vector has shape {tuple(vector.shape)}, but one direction [d] is added, or one for each of several positions [n d].")
        self.pattern, self.vector, self.strength = Pattern.read(site), vector, number(strength)
        if (positions is not None and not isinstance(positions, int | slice | Sequence)) or isinstance(positions, str):
            raise InputError(f"positions={positions!r}: a number (from there on), several numbers, a slice, or None for everywhere.")
        given = [positions] if isinstance(positions, int) else positions if isinstance(positions, slice) or positions is None else list(positions)
        ends = [given.start or 0, given.stop or 0] if isinstance(given, slice) else given or []
        if any(isinstance(p, bool) or not isinstance(p, int) or p < 0 for p in ends):
            raise InputError(f"positions={positions!r}: places in a row that still grows are counted from 0, not from the end.")
        if isinstance(positions, slice) and positions.step is not None and (not isinstance(positions.step, int) or positions.step < 1):
            raise InputError(f"positions={positions!r}: a slice goes forward, by steps of at least 1.")
        if vector.ndim == 2 and not (positions is None or isinstance(positions, int)):
            raise InputError(f"positions={positions!r}: the rows of the vector stand one after another, so give the first of their positions only.")
        self.chosen = positions
        self._index: dict[str, Tensor] = {}  # of the running pass, for each half of an encoder-decoder

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        self._index[half_of(path)] = index

    def visit(self, path: str, x: Tensor) -> Tensor:
        if not self.pattern.meets(path):
            return x
        if x.shape[-1] != self.vector.shape[-1]:
            raise InputError(
                f"The vector has {self.vector.shape[-1]} numbers, but the value at {path!r} has {x.shape[-1]}: it was made for another model or site."
            )
        place = self._place(path, x)
        add = self.strength * self.vector.to(x)
        if add.ndim == 2:
            start = self.chosen if isinstance(self.chosen, int) else 0
            at = place - start
            inside = (at >= 0) & (at < add.shape[0])
            return x + torch.where(inside[..., None], add[at.clamp(0, add.shape[0] - 1)], 0.0)
        return x + torch.where(self._chosen(place)[..., None], add, torch.zeros((), dtype=x.dtype, device=x.device))

    def _place(self, path: str, x: Tensor) -> Tensor:
        """The place in its row of every position of ``x`` [b t d]: [t] or [b t]."""
        index = self._index.get(half_of(path))
        if index is None or index.shape[-1] != x.shape[1]:
            return torch.arange(x.shape[1], device=x.device)
        return index

    def _chosen(self, place: Tensor) -> Tensor:
        where = self.chosen
        if where is None:
            return torch.ones_like(place, dtype=torch.bool)
        if isinstance(where, int):
            return place >= where
        if isinstance(where, slice):
            step = where.step or 1
            start = where.start or 0
            inside = (place >= start) & ((place - start) % step == 0)
            return inside if where.stop is None else inside & (place < where.stop)
        return torch.isin(place, torch.tensor(list(where), device=place.device))

    def edits(self, path: str) -> bool:
        return self.pattern.meets(path)

    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction [d] (or one per position [n d]) and where it is added: ``site`` of block ``layer``.

    ``norm``: the mean length of the vectors it was made from, to judge a strength by.
    """

    vector: Tensor
    layer: int
    site: str = "resid_pre"
    label: str = ""
    norm: float = 0.0
    prefix: str = ""

    @property
    def path(self) -> str:
        """The full path of the site."""
        return f"{self.prefix}blocks.{self.layer}.{self.site}"

    def __repr__(self) -> str:
        rows = f"{self.vector.shape[0]} vectors" if self.vector.ndim == 2 else "a vector"
        made = f", from {self.label}" if self.label else ""
        there = f"; what it was made from has length {self.norm:.4g}" if self.norm else ""
        return f"SteeringVector: {rows} of {self.vector.shape[-1]} numbers at {self.path}, length {float(self.vector.norm(dim=-1).mean()):.4g}{made}{there}"

    def tap(self, strength: float = 1.0, positions: At = None) -> AddVector:
        """What adds ``strength`` times the vector in a call or while generating (see :class:`AddVector`)."""
        return AddVector(self.path, self.vector, strength, positions)

    def __mul__(self, by: float) -> SteeringVector:
        return SteeringVector(self.vector * by, self.layer, self.site, self.label, self.norm, self.prefix)

    __rmul__ = __mul__

    # As an edit, and as a file

    def intervention(self, strength: float = 1.0, positions: At = None, name: str | None = None) -> Intervention:
        """The same addition as an edit: ``.save`` writes it as a file that ``--edits`` reads. ``positions`` as in :meth:`tap`.

        Rows [n d] become one edit for each position. Raises :class:`InputError` for a slice with gaps.
        """
        tap = self.tap(strength, positions)  # what it refuses is refused here too
        start = positions if isinstance(positions, int) else 0
        if self.vector.ndim == 2:
            made = tuple(Add(self.path, row, tap.strength, positions=start + i) for i, row in enumerate(self.vector))
        else:
            made = (Add(self.path, self.vector, tap.strength, positions=f"{positions}:" if isinstance(positions, int) else positions),)
        return Intervention(name or (f"steering along {self.label}" if self.label else "steering"), made)

    def check(self, model: Any) -> None:
        """Raise :class:`SiteError` or :class:`InputError` if the model lacks the site, or a value there has another width."""
        self.intervention().check(model)

    def _check_finite(self, where: str) -> None:
        if wrong := self.vector[~self.vector.isfinite()].tolist():
            raise InputError(f"{where}: the vector holds {wrong[0]}, but finite numbers are needed: make the vector again.")
        if not math.isfinite(self.norm):
            raise InputError(f"{where}: norm is {self.norm}, but {_NUMBER[1]} is needed: make the vector again.")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one ``.safetensors`` file: the vector, where it is added and what it was made from. Raises :class:`InputError` if it cannot."""
        target = check_saved(path)
        self._check_finite(target.name)
        plain = {"version": VERSION} | {name: getattr(self, name) for name in SAVED}
        with files.saving(target):
            tensor_files.write(target, {"vector": self.vector.detach().cpu().contiguous()}, KEY, plain)
        return target

    @staticmethod
    def load(path: str | os.PathLike[str], model: Any = None) -> SteeringVector:
        """The vector of a file that :meth:`save` wrote; ``model``: what it must fit (see :meth:`check`). Raises :class:`InputError` for any other file."""
        file = _path(path)
        if not file.is_file():
            raise InputError(f"There is no steering vector at {str(file)!r}: check the path.")
        tensors, plain = tensor_files.read(file, KEY)
        if not isinstance(plain, dict) or set(tensors) != {"vector"}:
            raise InputError(f"{file.name} holds no steering vector: SteeringVector.save writes one.")
        if plain.get("version") != VERSION:
            raise InputError(f"{file.name}: version {plain.get('version')!r} was given, and version {VERSION} is read here: make the vector again.")
        made = SteeringVector(tensors["vector"].read(), **_fields(plain, file.name))
        AddVector(made.path, made.vector)  # refuses what is no vector
        made._check_finite(file.name)
        if model is not None:
            made.check(model)
        return made


def check_saved(path: str | os.PathLike[str]) -> Path:
    """The path, if a vector can be saved under such a name. Raises :class:`InputError` otherwise."""
    target = _path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"{target.name!r} ends in {target.suffix or 'nothing'!r}, but a steering vector is saved as .safetensors.")
    return target


def _path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise InputError(f"A file is named by its path, but {described(type(given))} was given.")
    return Path(given)


def _fields(plain: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file says of its vector, checked."""
    for name, (kind, words) in SAVED.items():
        value = plain.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (name == "layer" and value < 0):
            raise InputError(f"{where}: {name} is {repr(value)[:40]}, but {words} is needed: make the vector again.")
    return {name: plain[name] for name in SAVED}


def steering_vector(
    model: Any,
    positive: Text | Sequence[Text],
    negative: Text | Sequence[Text],
    layer: int,
    position: int | str | None = -1,
    *,
    site: str = "resid_pre",
    unit: bool = False,
    tokenizer: Any = None,
    source: Text | None = None,
    tap: Tap | None = None,
) -> SteeringVector:
    """The mean value at ``site`` of block ``layer`` over the positive texts, less that over the negative ones: [d].

    ``position``: where it is read (the last); None: the mean over all positions; ``"each"``: one vector per position [n d] of a single pair of texts
    (activation addition; the shorter text is filled with its last token). ``unit``: made to length one. ``tap``: edits that hold while they are read.
    Texts or lists of texts (or of ids).
    Raises :class:`SiteError` for a layer or site that the model has not, :class:`InputError` for no texts and for equal means.
    """
    texts = [_several(g, name) for g, name in ((positive, "positive"), (negative, "negative"))]
    subjects = [[read(model, t, tokenizer, source=source, tap=tap, note=False) for t in side] for side in texts]
    first = subjects[0][0]
    check_layer(first.stack, layer)
    if not isinstance(site, str):
        raise SiteError(f"A site is named by a text, such as 'resid_pre', but {described(type(site))} was given.")
    name = f"{feedforward_of(first.stack, layer)}.{site[4:]}" if site.startswith("ffn.") else site
    _check_position(position, texts)
    note_length(first.model, max(len(s) for side in subjects for s in side))
    if position == "each":
        longest = max(len(side[0]) for side in subjects)
        subjects = [[replace(s, ids=(*s.ids, *[s.ids[-1]] * (longest - len(s)))) for s in side] for side in subjects]
    sides = [torch.stack([_value(s, f"blocks.{layer}.{name}", position) for s in side]) for side in subjects]
    vector = sides[0].mean(0) - sides[1].mean(0)
    if not float(vector.norm()):
        raise InputError("The positive and the negative texts give the same mean there, so there is no direction: read another position or a later layer.")
    norm = float(torch.cat([x.reshape(-1, x.shape[-1]) for x in sides]).norm(dim=-1).mean())
    label = f"{_shown(texts[0])} − {_shown(texts[1])}"
    return SteeringVector((vector / vector.norm() if unit else vector).cpu(), layer, name, label, norm, first.prefix)


def _check_position(position: Any, texts: Sequence[Sequence[Any]]) -> None:
    if position != "each" and not (position is None or (isinstance(position, int) and not isinstance(position, bool))):
        raise InputError(f"position={position!r}: a number, None for the mean over all positions, or 'each' for a vector per position.")
    if position == "each" and any(len(side) > 1 for side in texts):
        raise InputError(f"A vector per position is the difference of two texts, but {len(texts[0])} and {len(texts[1])} were given: use position=-1 or None.")


def _value(s: Subject, site: str, position: int | str | None) -> Tensor:
    """The value [d] at a position of a text, the mean over all, or every one [t d]."""
    value = s.run(site)[0][s.prefix + site][0].float()
    if value.ndim != 2:
        raise InputError(
            f"{site.split('.', 2)[2]!r} has shape {tuple(value.shape)} for a text, but a direction of the stream is added: "
            "choose a site with axes b t d or b t f."
        )
    if position is None:
        return value.mean(0)
    if isinstance(position, str):
        return value
    (i,) = s.positions(position)
    return value[i]


def _several(given: Any, name: str) -> list[Any]:
    single = isinstance(given, str | Tensor) or (
        isinstance(given, Iterable) and bool(given) and all(hasattr(i, "__index__") and not isinstance(i, str) for i in given)
    )
    found = [given] if single else list(given) if isinstance(given, Iterable) else [given]
    if not found:
        raise InputError(f"No {name} text was given: a direction is a difference of texts, at least one of each kind.")
    return found


def number(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise InputError(f"A strength is a finite number, but {strength!r} was given.")
    return float(strength)


def _shown(texts: Sequence[Any]) -> str:
    first = texts[0] if isinstance(texts[0], str) else "ids"
    return f"{first[:24]!r}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")
