"""Edits as files: a change of a model's values that has a name, a hash, and a place on disk.

    quiet = Intervention("quiet", (
        Zero("blocks.5.attn.z[1]"),                                       head 5.1 says nothing
        Add("blocks.3.resid_post", direction, 4.0, positions="7:"),       +4 along a direction, from position 7 on
    ))
    quiet.save("quiet.json")                        readable; "quiet.safetensors" where the vectors are long
    tap = load_edits("quiet.json").tap(model)       checked against the model: names, heads, sizes
    gf.generate(model, prompt, tap=tap)             holds in every step; model(tokens, tap=tap), Trainer(..., tap=tap) too

An edit says what happens, not how: it holds no code, so a file is safe to open, and the same file means the same everywhere. The model itself is
never changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.fields import described
from glassformer.core.sites import HEAD_AXIS
from glassformer.core.tap import Pattern, Record, Tap
from glassformer.weights.own import Loaded

from . import tensor_files
from .changes import KINDS, Add, Change, Remove, Scale, Set, Spans, Zero, spans_of, within

FORMAT, VERSION = "glassformer.edits", 1
KEY = "glassformer.edits"  # of the text within a safetensors file
MOST = 64 << 20  # bytes of a readable file


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits under one name, applied in order. Two are equal if name and content are."""

    name: str
    edits: tuple[Change, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"An intervention has a name to be known by, but {self.name!r} was given.")
        try:
            self.name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"The name {self.name!r} cannot be written as text ({error.reason}): choose another.") from error
        given = (self.edits,) if isinstance(self.edits, Change) else self.edits
        edits = tuple(given) if isinstance(given, Iterable) else (given,)
        if not edits or (wrong := [e for e in edits if not isinstance(e, Change)]):
            what = described(type(wrong[0])) if edits else "none"
            raise InputError(f"An intervention holds one or more of {', '.join(KINDS)}, but {what} was given.")
        object.__setattr__(self, "edits", edits)

    @property
    def hash(self) -> str:
        """sha256 of what the edits do, whatever they are called and however they are saved."""
        plain = [e.to_dict() | ({} if e.tensor is None else {str(e.TENSOR): _digest(e.tensor)}) for e in self.edits]
        return hashlib.sha256(json.dumps([VERSION, plain], sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and (self.name, self.hash) == (other.name, other.hash)

    def __hash__(self) -> int:
        return hash((self.name, self.hash))

    def __str__(self) -> str:
        return "\n".join([f"{self.name} ({self.hash[:12]})", *(f"  {e}" for e in self.edits)])

    # Use

    def check(self, model: Any) -> None:
        """Raise :class:`SiteError` or :class:`InputError` if the model lacks a site or head, or a tensor has another size than the value there."""
        model = model.model if isinstance(model, Loaded) else model
        if not hasattr(model, "sites"):
            raise InputError(f"Edits are checked against a model, but {described(type(model))} was given: give one, or what gf.load gave.")
        known = {s.path: s.axes.split() for s in model.sites()}
        shapes = {r.path: r.shape for r in model.dimensions(2).rows} if hasattr(model, "dimensions") else {}
        for e in self.edits:
            Record(e.site).check(known)
            pattern = Pattern.read(e.site)
            for path in (p for p in known if pattern.meets(p)):
                _check_place(e, path, known[path])
                if path in shapes:
                    _check_sizes(e, pattern, path, known[path], shapes[path])

    def tap(self, model: Any) -> InterventionTap:
        """The edits as a tap, checked against the model (see :meth:`check`)."""
        self.check(model)
        model = model.model if isinstance(model, Loaded) else model
        return InterventionTap(self, {s.path: s.axes.split() for s in model.sites()})

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": FORMAT, "version": VERSION, "name": self.name, "hash": self.hash, "edits": [e.to_dict() for e in self.edits]}

    @staticmethod
    def from_dict(data: Any, where: str = "The edits") -> Intervention:
        """The inverse of :meth:`to_dict`; unknown names, other versions and a hash that does not fit are refused by :class:`InputError`."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InputError(f'{where}: this is no file of edits, which has "format": "{FORMAT}".')
        if data.get("version") != VERSION:
            raise InputError(
                f"{where}: version {data.get('version')!r} was given, and version {VERSION} is read here: save it again with this version of glassformer."
            )
        _only(data, ("format", "version", "name", "hash", "edits"), where)
        entries = data.get("edits")
        if not isinstance(entries, list):
            raise InputError(f'{where}: "edits" is a list of edits, but {described(type(entries))} was given.')
        made = Intervention(data.get("name", ""), tuple(_read(e, f"{where}, edit {i}") for i, e in enumerate(entries)))
        if data.get("hash") not in (None, made.hash):
            raise InputError(
                f'{where}: the content has the hash {made.hash[:12]}, but {str(data["hash"])[:12]} is written: it was changed; remove "hash" if that was meant.'
            )
        return made

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file: ``.json`` (readable, tensors as numbers) or ``.safetensors`` (tensors as they are). Raises :class:`InputError` if it cannot."""
        target = check_saved(path)
        plain = self.to_dict()
        if target.suffix == ".json":
            return files.save(target, _pretty(plain))
        with files.saving(target):
            _save_tensors(target, plain, {f"edits.{i}.{e.TENSOR}": e.tensor for i, e in enumerate(self.edits) if e.tensor is not None})
        return target


class InterventionTap(Tap):
    """What an :class:`Intervention` does in a call; made by :meth:`Intervention.tap`. One serves one running call at a time."""

    def __init__(self, intervention: Intervention, axes: Mapping[str, Sequence[str]]):
        self.intervention, self.axes = intervention, axes
        self.hash = intervention.hash
        self._changes = [(e, Pattern.read(e.site), spans_of(e.positions), spans_of(e.steps)) for e in intervention.edits]
        self._places: dict[str, Tensor] = {}
        self._own: dict[tuple[int, str], Tensor] = {}

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        self._places[_inside(path)[1]] = index

    def edits(self, path: str) -> bool:
        step = _inside(path)[0]
        return any(p.meets(path) and within(steps, step) for _, p, _, steps in self._changes)

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(p for _, p, _, _ in self._changes)

    def visit(self, path: str, x: Tensor) -> Tensor:
        for i, (change, pattern, spans, steps) in enumerate(self._changes):
            if pattern.meets(path) and within(steps, _inside(path)[0]):
                x = self._changed(i, change, pattern, spans, path, x)
        return x

    def _changed(self, i: int, change: Change, pattern: Pattern, spans: Spans, path: str, x: Tensor) -> Tensor:
        name = path.rsplit(".", 1)[-1]
        if pattern.heads is None:
            new = change.apply(x, self._tensor(i, change, x))
        else:
            heads = torch.tensor(pattern.heads, device=x.device)
            picked = x.index_select(HEAD_AXIS[name], heads)
            new = x.index_copy(HEAD_AXIS[name], heads, change.apply(picked, self._tensor(i, change, x)))
        if name == "scores":  # what is masked stays so, whatever the edit makes of -inf
            new = torch.where(x == float("-inf"), x, new)
        return new if spans is None else torch.where(self._mask(path, spans, x), new, x)

    def _tensor(self, i: int, change: Change, x: Tensor) -> Tensor | None:
        if change.tensor is None:
            return None
        if torch.compiler.is_compiling():
            return change.tensor.to(x)
        key = (i, f"{x.device} {x.dtype}")
        if key not in self._own:
            self._own[key] = change.tensor.to(x)
        return self._own[key]

    def _mask(self, path: str, spans: list[tuple[int, int | None]], x: Tensor) -> Tensor:
        """Which entries of ``x`` stand at the positions, in a shape that fits beside it."""
        _, half = _inside(path)
        bare = path.split(".", 2)[2] if path.startswith("step.") else path
        axis = _axis(self.axes[bare], x.ndim)
        index = self._places.get(half)
        if index is None or axis is None or index.shape[-1] != x.shape[axis]:
            n = "no positions" if index is None else f"{index.shape[-1]} positions"
            raise SiteError(
                f"Positions cannot be told apart at {path!r}: the call has {n}, and the value the shape {tuple(x.shape)}. Leave positions out there."
            )
        wanted = torch.zeros_like(index, dtype=torch.bool)
        for low, high in spans:
            wanted = wanted | ((index >= low) if high is None else (index >= low) & (index < high))
        shape = [1] * x.ndim
        shape[axis] = index.shape[-1]
        if index.ndim == 2:
            shape[0] = index.shape[0]
        return wanted.to(x.device).view(shape)


def load_edits(path: str | os.PathLike[str]) -> Intervention:
    """The intervention of a file that :meth:`Intervention.save` wrote. Raises :class:`InputError` naming the file and what is wrong with it."""
    file = _path(path)
    if not file.is_file():
        what = "is a folder: name the file of edits in it" if file.is_dir() else "does not exist: check the path"
        raise InputError(f"There is no file of edits at {str(file)!r}, which {what}.")
    if file.suffix == ".safetensors":
        return _load_tensors(file)
    if file.stat().st_size > MOST:
        raise InputError(f"{file.name} has {file.stat().st_size:,} bytes, and more than {MOST:,} of readable text are not read: save it as .safetensors.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name} is no JSON ({error}): a file of edits is written by Intervention.save.") from error
    except OSError as error:
        raise InputError(f"{file.name} cannot be read ({error.strerror}): check who may read it.") from error
    return Intervention.from_dict(data, file.name)


def _path(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise InputError(f"A file of edits is named by its path, but {described(type(given))} was given.")
    return Path(given)


# What an edit fits


def _check_place(e: Change, path: str, axes: list[str]) -> None:
    if axes and path.endswith(".chosen") and not isinstance(e, Set):
        raise SiteError(f"{e.words} meets {path!r}, which holds numbers of experts: only Set fits there.")
    if path.endswith(".pattern") and isinstance(e, Add | Set):
        raise SiteError(f"{e.words} would also look at what is masked: Zero or Scale the pattern, or edit 'scores', where what is masked stays so.")
    if e.positions is None:
        return
    if path == "logits" or path.endswith(".logits") or "readout." in path:
        raise SiteError(f"{e.words} has positions, but a call may read out some positions only, so they cannot be told apart at {path!r}: edit 'resid_final'.")
    if ".cross." in path and "t" not in axes:
        raise SiteError(f"{e.words} has positions, which count the decoder's own row, but {path!r} stands along the source: edit 'encoder.resid_final'.")
    if not {"t", "s"} & set(axes):
        raise SiteError(f"{e.words} has positions, but {path!r} has the axes {' '.join(axes)}, without any.")


def _check_sizes(e: Change, pattern: Pattern, path: str, axes: list[str], shape: tuple[int, ...]) -> None:
    name = path.rsplit(".", 1)[-1]
    shape_now = list(shape)
    if pattern.heads is not None:
        n = shape[HEAD_AXIS[name]]
        if not pattern.heads or max(pattern.heads) >= n:
            raise SiteError(f"{e.words} picks head {max(pattern.heads, default=-1)}, but {path!r} has {n} heads, 0 to {n - 1}.")
        shape_now[HEAD_AXIS[name]] = len(pattern.heads)
    if e.tensor is None or e.tensor.ndim == 0:
        return
    free = {"b", "t", "s"}
    fits = [size for a, size in zip(axes, shape_now, strict=False) if a not in free] if not ("t" in axes and "s" in axes) else []
    given = list(e.tensor.shape)
    if isinstance(e, Remove) and (not fits or given[-1] != fits[-1]):
        rest = f"it must be as long as the last axis, {fits[-1]}" if fits else "the axes there grow with the text, so no direction has their length"
        raise InputError(f"{e.words}: direction has shape {given}, but at {path!r} {rest}.")
    if not given or len(given) > len(fits) or any(g not in (1, f) for g, f in zip(reversed(given), reversed(fits), strict=False)):
        names = " ".join(a for a in axes if a not in free)
        want = f"[{', '.join(map(str, fits))}] ({names}), or the last of these axes" if fits else "a single number, because its other axes grow with the text"
        raise InputError(f"{e.words}: {e.TENSOR} has shape {given}, but at {path!r} it must be {want}.")


# How edits are read


def _read(entry: Any, where: str) -> Change:
    if not isinstance(entry, Mapping):
        raise InputError(f'{where}: an edit is a mapping with a "type", but {described(type(entry))} was given.')
    kind = entry.get("type")
    if kind not in KINDS:
        raise InputError(f"{where}: there is no edit {kind!r}.{did_you_mean(str(kind), KINDS)} Known: {', '.join(KINDS)}.")
    names = [f.name for f in dataclasses.fields(KINDS[kind])]
    _only(entry, ["type", *names], where)
    if "site" not in entry:
        raise InputError(f"{where}: it names no site.")
    return KINDS[kind](**{n: entry[n] for n in names if n in entry})


def _only(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in data:
        if name not in known:
            raise InputError(f"{where}: there is no field {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}.")


def check_saved(path: str | os.PathLike[str]) -> Path:
    """The path, if edits can be saved under such a name. Raises :class:`InputError` otherwise."""
    target = _path(path)
    if target.suffix not in (".json", ".safetensors"):
        raise InputError(f"{target.name!r} ends in {target.suffix or 'nothing'!r}, but edits are saved as .json or .safetensors.")
    return target


def half_of(path: str) -> str:
    """``"encoder"`` or ``"decoder"`` for a path within one, with or without a step before it; else ``""``."""
    return _inside(path)[1]


def _inside(path: str) -> tuple[int | None, str]:
    """The step that a path belongs to (None: no generation), and the half of an encoder-decoder."""
    names = path.split(".")
    step = int(names[1]) if names[0] == "step" else None
    rest = names[0] if step is None else names[2] if len(names) > 2 else ""
    return step, rest if rest in ("encoder", "decoder") else ""


def _axis(axes: Sequence[str], ndim: int) -> int | None:
    """Where positions stand: the axis of queries, or of keys where there is no other."""
    found = next((a for a in ("t", "s") if a in axes), None)
    return None if found is None else list(axes).index(found) + (ndim - len(axes))  # pos_embed may have rows


# Files


def _digest(x: Tensor) -> str:
    data: Any = x.numpy()
    return hashlib.sha256(repr(tuple(x.shape)).encode() + data.astype("<f4").tobytes()).hexdigest()


def _pretty(plain: dict[str, Any]) -> str:
    """One line for each edit."""
    head = json.dumps({k: v for k, v in plain.items() if k != "edits"}, indent=2, ensure_ascii=False)[:-2]
    return head + ',\n  "edits": [\n    ' + ",\n    ".join(json.dumps(e, ensure_ascii=False) for e in plain["edits"]) + "\n  ]\n}\n"


def _save_tensors(target: Path, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        _, i, field = name.split(".")
        plain["edits"][int(i)][field] = name
    tensor_files.write(target, tensors, KEY, plain)


def _load_tensors(file: Path) -> Intervention:
    tensors, plain = tensor_files.read(file, KEY)
    try:
        for entry in plain["edits"]:
            for name, value in list(entry.items()):
                if isinstance(value, str) and value in tensors:
                    entry[name] = tensors[value].read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file.name} holds tensors, but no edits: Intervention.save writes both.") from error
    return Intervention.from_dict(plain, file.name)


__all__ = ["Add", "Change", "Intervention", "InterventionTap", "Remove", "Scale", "Set", "Zero", "load_edits"]
