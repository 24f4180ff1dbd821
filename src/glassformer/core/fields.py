"""Annotations as promises: a value of the wrong type is named before anything is computed from it.

    Decoder(d_model="16", …)      Decoder(d_model='16'): d_model is a whole number, but a text was given.
    Attention(norm=RMSNorm)       Attention(norm=RMSNorm): norm is a Norm, but the class RMSNorm itself was given: write RMSNorm(...).

Specs check their own fields (``spec.part``); a function does it by ``@typed(InputError)``. An annotation that
says nothing testable, or that cannot be resolved, lets everything pass: this finds mistakes, it proves nothing.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import sys
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from .errors import GlassformerError

P = ParamSpec("P")
T = TypeVar("T")

LOOKED_AT = 64  # items of a list that are looked at: mistakes are in all of them, and lists may be long
WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None", list: "a list", tuple: "a tuple"}
OTHER_WORDS = {"Sequence": "a sequence", "Iterable": "a sequence", "Mapping": "a mapping", "ndarray": "an array", "Module": "a model", "PathLike": "a path"}


def typed(error: type[GlassformerError]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: arguments that do not fit their annotations raise ``error``, unknown and missing ones stay Python's own matter."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        names = [n for n, p in inspect.signature(function).parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        owner = function.__qualname__.removesuffix(".__init__").split(".")[-1]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            check(owner, {**dict(zip(names, args, strict=False)), **kwargs}, hints(function), error)
            return function(*args, **kwargs)

        return checked

    return decorate


def check(owner: str, given: Mapping[str, Any], kinds: Mapping[str, Any], error: type[GlassformerError]) -> None:
    """Raise ``error`` for the first value that does not fit the kind of its name."""
    for name, value in given.items():
        if not fits(value, kind := kinds.get(name, Any)):
            raise error(misfit(owner, name, value, kind))


def hints(of: Any) -> dict[str, Any]:
    """The annotations of a class or function as types; those that name what is known to type checkers only are left out."""
    return _hints(of)


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner in reversed(of.__mro__) if isinstance(of, type) else (of,):
        module = sys.modules.get(owner.__module__)
        names = {} if module is None else vars(module)
        for name, kind in getattr(owner, "__annotations__", {}).items() if owner is not object else ():
            written = kind.__forward_arg__ if isinstance(kind, typing.ForwardRef) else kind
            found.pop(name, None)
            if isinstance(written, str) and "<locals>" in owner.__qualname__:
                continue  # its names are a function's own, and may hide others
            with suppress(Exception):  # named for type checkers only, or no type at all: words, axes
                found[name] = eval(written, names, dict(vars(owner))) if isinstance(written, str) else written
    return found


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the annotated type; annotations that say nothing testable fit everything."""
    try:
        return _fits(value, kind)
    except Exception:  # a protocol that cannot be asked, an array that is no truth value: not for us to judge
        return True


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fits(value, args[0])
    if kind is None:
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, k) for k in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple and args:
        if not isinstance(value, tuple):
            return False
        each = _each(args, len(value))
        return len(each) != len(value) or all(fits(v, k) for v, k in zip(value, each, strict=True))  # lengths are for the owner to judge
    if origin is abc.Callable or kind is abc.Callable:
        return callable(value)
    if isinstance(origin, type):
        if not isinstance(value, origin) or isinstance(value, str):  # a text is a sequence of texts, but was never meant as one
            return False
        return not (args and issubclass(origin, abc.Sequence)) or all(fits(v, args[0]) for v in islice(typing.cast(abc.Sequence[Any], value), LOOKED_AT))
    if kind in (int, float):
        whole = numbers.Integral if kind is int else numbers.Real
        alone = getattr(value, "ndim", None) == 0 and hasattr(value, "__index__" if kind is int else "__float__")  # an array or tensor of one number
        return (isinstance(value, whole) or alone) and not isinstance(value, bool)
    if kind is bool:
        return type(value).__name__ in ("bool", "bool_")  # numpy's too
    return not isinstance(kind, type) or isinstance(value, kind)


def _each(args: tuple[Any, ...], n: int) -> Sequence[Any]:
    """The kinds of the ``n`` items of a ``tuple[X, Y]``, ``tuple[X, ...]`` or ``Sequence[X]``."""
    return [args[0]] * n if len(args) == 1 or args[-1] is Ellipsis else args


def misfit(owner: str, name: str, value: Any, kind: Any) -> str:
    """The sentence that says so, with the parts to choose from where a part is meant."""
    shown = value.__name__ if isinstance(value, type) else repr(value)
    said = f"{owner}({name}={shown if len(shown) <= 60 else shown[:57] + '...'}): {name} is {described(kind)}, "
    kinds = [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type)]
    if isinstance(value, type) and any(issubclass(value, k) for k in kinds):
        return f"{said}but the class {value.__name__} itself was given: write {value.__name__}(...)."
    choices = [c for k in kinds for c in getattr(k, "_choices", list)()]
    return f"{said}but {_given(value, kind)}.{' Known: ' + ', '.join(choices) + '.' if len(choices) > 1 else ''}"


def _given(value: Any, kind: Any) -> str:
    """What was given instead: of a sequence of the right kind, the item that is wrong."""
    for args, origin in ((typing.get_args(k), typing.get_origin(k)) for k in (kind, *typing.get_args(kind))):
        if isinstance(value, (list, tuple)) and isinstance(origin, type) and isinstance(value, origin):
            i, wrong = next((i, v) for i, (v, k) in enumerate(zip(value, _each(args, len(value)), strict=True)) if not fits(v, k))
            return f"item {i} is {f'the class {wrong.__name__}' if isinstance(wrong, type) else repr(wrong)}"
    if value is None or isinstance(value, bool):
        return f"{value} was given"
    if hasattr(value, "build") and described(kind) == "a model":
        return f"its description was given: {type(value).__name__}(...).build() makes one"
    return f"the class {value.__name__} was given" if isinstance(value, type) else f"{described(type(value))} was given"


def described(kind: Any) -> str:
    """A type in words: ``"a whole number or None"``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(k) for k in args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is abc.Callable:
        return "a function"
    if kind is None:
        return "None"
    plain = kind if origin is None else origin
    name = str(getattr(plain, "__name__", plain))
    word = WORDS.get(plain) or OTHER_WORDS.get(name) or f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    return f"{word} of {_many(args[0])}" if args and word in ("a sequence", "a tuple", "a list") else word


def _many(kind: Any) -> str:
    """``Block(...)`` for parts, ``texts`` for texts: what a sequence holds."""
    if hasattr(kind, "_choices"):
        return f"{kind.__name__}, as in ({kind.__name__}(...),) * 4"
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(kind) or described(kind).removeprefix("a ").removeprefix("an ")
