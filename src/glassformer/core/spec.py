"""Specs: every choice is a frozen, printable, comparable dataclass.

The *type* of a sub-spec is the choice (``RMSNorm()`` or ``LayerNorm()``). A Spec is a tree of
Specs, tuples and plain values; this file gives every Spec the same verbs:

    spec.replace(d_model=64)                       a changed copy
    spec.at("blocks.*.attention.position").get()   every value that the path meets
    spec.at("blocks.*.attention.position").set(x)  a changed copy, deep inside
    spec.diff(other)                               the lines in which two Specs differ
    spec.to_dict() / Spec.from_dict(d)             plain data, for JSON and YAML
    print(spec)                                    a tree; equal neighbours in a tuple are counted, not repeated

Paths are field names and tuple indices joined by dots; ``*`` meets every item of a tuple.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, dataclass_transform

from . import fields
from .errors import GlassformerError, SpecError, did_you_mean

S = TypeVar("S", bound="Spec")
T = TypeVar("T")

_REGISTRY: dict[str, type[Spec]] = {}


@dataclass_transform(frozen_default=True)
def part(cls: type[T]) -> type[T]:
    """Make a Spec class a frozen dataclass and register it under its own name.

    The kind of a part is its abstract base class (``Norm``, ``Position``…), so that
    :func:`registered` can list all parts of a kind. Two parts of one name are an error.
    """
    own = "__init__" in vars(cls)
    made: Any = dataclass(frozen=True, repr=False)(cls)
    if made._checks_fields and not own:
        _check_fields_of(made)
    name = made.__name__
    old = _REGISTRY.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (made.__module__, made.__qualname__):
        raise SpecError(f"A part named {name!r} is already registered by {old.__module__}; choose another name for the one in {made.__module__}.")
    _REGISTRY[name] = made
    return cls


def _check_fields_of(cls: Any) -> None:
    """Let ``cls(...)`` refuse unknown names, missing ones and values of the wrong type before anything is computed from them."""
    make = cls.__init__
    known = {n: p for n, p in inspect.signature(make).parameters.items() if n != "self"}
    needed = [n for n, p in known.items() if p.default is p.empty]

    @functools.wraps(make)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        if not _is_compiling():
            name, first = cls.__name__, dict(zip(known, args, strict=False))
            for key in given:
                if key not in known:
                    raise SpecError(_no_field(name, key, known))
                if key in first:
                    raise SpecError(f"{name} was given {key} twice: {first[key]!r} by its place and {given[key]!r} by its name.")
            if len(args) > len(known):
                raise SpecError(f"{name} has {len(known)} fields ({', '.join(known)}), but {len(args)} values were given.")
            if missing := [n for n in needed if n not in first and n not in given]:
                raise SpecError(f"{name} needs {', '.join(missing)}.")
            fields.check(name, first | given, fields.hints(cls), cls._error)
        make(self, *args, **given)

    cls.__init__ = checked


def _is_compiling() -> bool:
    """Whether torch is tracing: then only what it can trace. Asked without importing torch."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def _no_field(owner: str, name: str, known: typing.Collection[str]) -> str:
    return f"{owner} has no field {name!r}.{did_you_mean(name, known)} It has: {', '.join(known) or 'none'}."


_WHEN_ASKED: list[Callable[[], None]] = []


def when_asked(register: Callable[[], None]) -> None:
    """Call ``register`` once, before the registry is next asked for all parts, or for one that it does not know."""
    _WHEN_ASKED.append(register)


def registered(kind: type | None = None) -> dict[str, type[Spec]]:
    """All registered parts by name, or those that are a ``kind``."""
    while _WHEN_ASKED:
        _WHEN_ASKED.pop()()
    return {n: c for n, c in sorted(_REGISTRY.items()) if kind is None or issubclass(c, kind)}


def check_dropout(name: str, rate: float) -> None:
    """Raise :class:`SpecError` for a rate at which nothing, or less than nothing, would be left."""
    if not 0 <= rate < 1:
        raise SpecError(f"{name}(dropout={rate}): a dropout rate lies in [0, 1).")


def part_named(name: str, kind: type | None = None) -> type[Spec]:
    """The registered part of that name; :class:`SpecError` names the nearest ones."""
    found = _REGISTRY.get(name)
    if found is not None and (kind is None or issubclass(found, kind)):
        return found
    known = registered(kind)
    if name not in known:
        of = "" if kind is None else f" of kind {kind.__name__}"
        raise SpecError(f"No part{of} is named {name!r}.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}.")
    return known[name]


class Spec:
    """Base of all Specs; subclasses are made with the :func:`part` decorator."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _checks_fields: ClassVar[bool] = True
    _error: ClassVar[type[GlassformerError]] = SpecError  # for a field of the wrong type
    _usual: ClassVar[str]  # of an abstract kind: the part that plain data without a type means

    @classmethod
    def _choices(cls) -> list[str]:
        return list(registered(cls))

    def replace(self: S, **changes: Any) -> S:
        """A copy with some fields changed. Raises :class:`SpecError` for a field that does not exist."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise SpecError(_no_field(type(self).__name__, name, known))
        changed: S = dataclasses.replace(self, **changes)
        return changed

    def at(self: S, path: str) -> Selection[S]:
        """Every value that ``path`` meets, to read or to change."""
        if not isinstance(path, str):
            raise SpecError(f"A path is a text, such as 'blocks.*.attention.position', but {fields.described(type(path))} was given.")
        return Selection(self, tuple(path.split(".")) if path else ())

    def diff(self, other: Spec) -> str:
        """The lines in which ``self`` differs from ``other`` (``path: other's value -> own value``), or ''."""
        if not isinstance(other, Spec):
            raise SpecError(f"diff compares two Specs, but {fields.described(type(other))} was given.")
        rows: dict[tuple[str, str, str], list[int]] = {}
        for path, a, b in _differences("", other, self):
            head, number, tail = _first_index(path)
            rows.setdefault((f"{head}#{tail}" if number is not None else path, _short(a), _short(b)), []).append(-1 if number is None else number)
        return "\n".join(f"{path.replace('#', ranges(ns), 1) if ns[0] >= 0 else path}: {a} -> {b}" for (path, a, b), ns in rows.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``{"type": "RMSNorm", "eps": 1e-05}``; runs of equal items become ``{"repeat": n, "of": item}``."""
        return {"type": type(self).__name__} | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[S], data: Mapping[str, Any] | str) -> S:
        """The Spec that plain data describes; the inverse of :meth:`to_dict`. A bare name means all defaults."""
        spec: S = _unplain(data, cls, cls.__name__)
        return spec

    def __repr__(self) -> str:
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.default is not dataclasses.MISSING and value == f.default and type(value) is type(f.default):
                continue
            shown.append(f"{f.name}={_repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __str__(self) -> str:
        return "\n".join(_tree(self, ""))


class Selection(typing.Generic[S]):
    """The values that a path meets inside a Spec (made by :meth:`Spec.at`)."""

    def __init__(self, spec: S, path: tuple[str, ...]):
        self._spec, self._path = spec, path

    def get(self) -> list[Any]:
        """The values met, in order."""
        found: list[Any] = []

        def note(value: Any) -> Any:
            found.append(value)
            return value

        _edit(self._spec, self._path, note, ())
        return found

    def set(self, value: Any) -> S:
        """A copy of the whole Spec with ``value`` at every place met."""
        return self.update(lambda _: value)

    def update(self, fn: Callable[[Any], Any]) -> S:
        """A copy of the whole Spec with ``fn(old)`` at every place met."""
        changed: S = _edit(self._spec, self._path, fn, ())
        return changed


# How paths are followed


def _edit(node: Any, path: tuple[str, ...], fn: Callable[[Any], Any], done: tuple[str, ...]) -> Any:
    if not path:
        return fn(node)
    step, rest = path[0], path[1:]
    here = ".".join(done) or "the top"
    if isinstance(node, tuple):
        if step != "*" and not step.lstrip("-").isdigit():
            raise SpecError(f"{here} is a tuple of {len(node)} items: go on with an index or '*', not {step!r}.")
        if step != "*" and not -len(node) <= int(step) < len(node):
            raise SpecError(f"{here} has {len(node)} items, so index {step} is outside it.")
        chosen = range(len(node)) if step == "*" else [int(step) % len(node)]
        return tuple(_edit(v, rest, fn, (*done, str(i))) if i in chosen else v for i, v in enumerate(node))
    if isinstance(node, Spec):
        known = [f.name for f in dataclasses.fields(node)]
        if step not in known:
            raise SpecError(_no_field(f"{type(node).__name__} (at {here})", step, known))
        return node.replace(**{step: _edit(getattr(node, step), rest, fn, (*done, step))})
    raise SpecError(f"{here} is {node!r}, which has nothing inside: the path cannot go on with {step!r}.")


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if a == b and type(a) is type(b):
        return
    if isinstance(a, Spec) and type(a) is type(b):
        for f in dataclasses.fields(a):
            yield from _differences(f"{path}.{f.name}".lstrip("."), getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(f"{path}.{i}", x, y)
    else:
        yield path, a, b


def _first_index(path: str) -> tuple[str, int | None, str]:
    parts = path.split(".")
    for i, word in enumerate(parts):
        if word.isdigit():
            return "".join(w + "." for w in parts[:i]), int(word), "".join("." + w for w in parts[i + 1 :])
    return path, None, ""


def ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# How Specs are printed


def _runs(items: tuple[Any, ...]) -> list[tuple[int, Any]]:
    runs: list[tuple[int, Any]] = []
    for item in items:
        if runs and runs[-1][1] == item and type(runs[-1][1]) is type(item):
            runs[-1] = (runs[-1][0] + 1, item)
        else:
            runs.append((1, item))
    return runs


def _repr(value: Any) -> str:
    if isinstance(value, tuple):
        if not value:
            return "()"
        if not all(isinstance(v, Spec) for v in value):
            return repr(value)
        return " + ".join(f"({v!r},)" + (f" * {n}" if n > 1 else "") for n, v in _runs(value))
    return repr(value)


def _short(value: Any) -> str:
    text = _repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _tree(value: Any, indent: str) -> list[str]:
    if isinstance(value, Spec):
        lines = [type(value).__name__]
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if isinstance(inner, Spec) and any(isinstance(getattr(inner, g.name), (Spec, tuple)) for g in dataclasses.fields(inner)):
                sub = _tree(inner, indent + "  ")
                lines += [f"{indent}  {f.name}: {sub[0]}", *sub[1:]]
            elif isinstance(inner, tuple) and inner and all(isinstance(v, Spec) for v in inner):
                for n, v in _runs(inner):
                    sub = _tree(v, indent + "  ")
                    lines += [f"{indent}  {f.name}: {n} x {sub[0]}", *sub[1:]]
            else:
                lines.append(f"{indent}  {f.name}: {_repr(inner)}")
        return lines
    return [_repr(value)]


# How Specs become plain data and come back


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(v) if n == 1 else {"repeat": n, "of": _plain(v)} for n, v in _runs(value)]
    return value


def _unplain(data: Any, kind: Any, where: str) -> Any:
    """Read plain data as ``kind`` (a type annotation), naming ``where`` in errors."""
    if isinstance(kind, type) and issubclass(kind, Spec):
        return _unplain_spec(data, kind, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        last: SpecError | None = None
        for k in kinds:
            try:
                return _unplain(data, k, where)
            except SpecError as error:
                last = error
        raise last or SpecError(f"{where} cannot be read from {data!r}.")
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise SpecError(f"{where} is a list, but {data!r} was given.")
        runs = [(_repeats(x["repeat"], where), x["of"]) if isinstance(x, Mapping) and set(x) == {"repeat", "of"} else (1, x) for x in data]
        items: list[Any] = []
        if len(args) == 2 and args[1] is Ellipsis:
            for n, item in runs:
                items += [_unplain(item, args[0], f"{where}.{len(items)}")] * n if n else []
            return tuple(items)
        flat = [item for n, item in runs for _ in range(n)]
        if len(flat) != len(args):
            raise SpecError(f"{where} has {len(args)} items, but {data!r} has {len(flat)}.")
        return tuple(_unplain(item, a, f"{where}.{i}") for i, (item, a) in enumerate(zip(flat, args, strict=True)))
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if kind is float and isinstance(data, str):  # YAML reads 1e-5 as a string
        try:
            return float(data)
        except ValueError:
            pass
    if kind in (int, float, str, bool):
        if type(data) is kind:
            return data
        raise SpecError(f"{where} is {fields.described(kind)}, but {data!r} was given.")
    return data


def _repeats(n: Any, where: str) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise SpecError(f"{where}: 'repeat' is a whole number of times, but {n!r} was given.")
    return n


def _unplain_spec(data: Any, kind: type[S], where: str) -> S:
    if isinstance(data, kind):
        return data
    if isinstance(data, str):
        data = {"type": data}
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} is a {kind.__name__} (a name, or fields with a 'type'), but {data!r} was given.")
    name = data.get("type", vars(kind).get("_usual", kind.__name__))
    cls = part_named(str(name), kind)
    hints = fields.hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == "type":
            continue
        if key not in known:
            raise SpecError(f"{where}: {_no_field(name, key, known)}")
        values[key] = _unplain(value, hints.get(key, Any), f"{where}.{key}")
    try:
        return typing.cast(S, cls(**values))
    except SpecError as error:
        if str(error).startswith(f"{name} needs "):
            raise SpecError(f"{where}: {error}") from None
        raise
