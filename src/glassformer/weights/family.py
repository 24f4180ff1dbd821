"""A family: how one kind of published checkpoint says what glassformer says in Specs and parameter names.

    config.json ── spec ──► Spec ── config ──► config.json           two functions that undo each other
    tensors ─────── rules ─────────► parameters ── rules ──► tensors   one table, read from both sides

A family is found by what the file says of itself (``model_type``), never by the name of a folder or a model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from glassformer.core.errors import GlassformerError, WeightsError, did_you_mean
from glassformer.core.spec import Spec
from glassformer.models import EncoderDecoder, Transformer
from glassformer.parts.attention import Attention

from .config import Config
from .rules import Rule, Table, pattern


@dataclass(frozen=True)
class Variant:
    """What holds for some Specs of a family and not for others: ``rules`` asked before the family's own, more ``tied`` tensors, more ``unused`` ones."""

    rules: tuple[Rule, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """A table for one kind of checkpoint.

    ``spec`` reads a config, ``config`` writes one (``architectures`` and ``model_type`` among its fields; it may assume the Spec to be
    of this family: the result is checked). ``tied``: their tensors that repeat another one, ``{copy: original}``. ``ignored``: patterns
    of tensors that hold nothing learnt (masks, frequencies). ``unused``: patterns of heads that the opened model does not have.
    ``prefix``: what stands before every name, in files of the whole model; files of the bare stack lack it. ``strips``: what other programs
    put before it. ``by_spec``: what holds for some Specs only (one read-out's parameters have other names than another's).
    """

    name: str
    model_types: tuple[str, ...]
    spec: Callable[[Config], Any]
    config: Callable[[Any], dict[str, Any]]
    rules: tuple[Rule, ...]
    tied: Mapping[str, str] = None  # type: ignore[assignment]
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    prefix: str = ""
    strips: tuple[str, ...] = ()
    by_spec: Callable[[Any], Variant] | None = None

    def fitted(self, spec: Any) -> Family:
        """This family with what holds for ``spec``."""
        if self.by_spec is None:
            return self
        v = self.by_spec(spec)
        return replace(self, rules=(*v.rules, *self.rules), tied={**(self.tied or {}), **v.tied}, unused=(*self.unused, *v.unused), by_spec=None)

    def __repr__(self) -> str:
        return f"Family({self.name}: {', '.join(self.model_types)})"

    @cached_property
    def table(self) -> Table:
        """The rules, ready to be asked."""
        return Table(self.rules)

    @cached_property
    def nothing_learnt(self) -> list[Any]:
        """``ignored`` as patterns."""
        return [pattern(p) for p in self.ignored]

    @cached_property
    def other_heads(self) -> list[Any]:
        """``unused`` as patterns."""
        return [pattern(p) for p in self.unused]

    @cached_property
    def known_names(self) -> list[Any]:
        """All names that may stand in a file, as patterns."""
        return [pattern(n) for r in self.rules for n in r.theirs] + [pattern(n) for n in self.tied or {}] + self.nothing_learnt + self.other_heads

    def read(self, values: Mapping[str, Any], file: Any = "config.json", ignore: Sequence[str] = ()) -> Any:
        """The Spec of a config; every field is read, harmless, or an error."""
        c = Config(values, file)
        try:
            spec = self.spec(c)
        except WeightsError:
            raise
        except (GlassformerError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise WeightsError(f"{file} describes no {self.name} that can be built: {error}") from error
        c.finish(ignored=ignore)
        return spec


@cache
def families() -> dict[str, Family]:
    """Every family by each of its model types."""
    from . import families as room

    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(room.__path__):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        for family in vars(module).values():
            if isinstance(family, Family):
                found |= dict.fromkeys(family.model_types, family)
    return found


def family_of(values: Mapping[str, Any], file: Any) -> Family:
    """The family that a config belongs to. Raises :class:`WeightsError` naming the nearest one."""
    kind, known = values.get("model_type"), families()
    if isinstance(kind, str) and kind in known:
        return known[kind]
    if not isinstance(kind, str):
        raise WeightsError(f"{file} names no model_type, so the family of the model is unknown. Known: {', '.join(sorted(known))}.")
    raise WeightsError(
        f"{file}: the model type {str(kind)[:60]!r} is not supported.{did_you_mean(str(kind)[:60], known)} Known: {', '.join(sorted(known))}. "
        f"{_nearest(values, known)}"
    )


def _nearest(values: Mapping[str, Any], known: Mapping[str, Family]) -> str:
    """Which family reads this config with the fewest misunderstood fields, and which those are."""
    best: tuple[int, str, str] | None = None
    for kind, family in known.items():
        try:
            family.read(values)
            tried = (0, kind, "every field of this config.json is understood by it, but the names of the tensors may differ")
        except GlassformerError as error:
            c = Config(values)
            try:
                family.spec(c)
                unread = [k for k in values if k not in c.seen]
                words = ", ".join(unread[:12]) or str(error)
                tried = (1 + len(unread), kind, f"what it does not understand is {words}")
            except Exception:
                continue
        if best is None or tried[0] < best[0]:
            best = tried
    return "" if best is None else f"By its fields it is nearest to {best[1]!r}: {best[2]}"


def family_for(spec: Spec, first: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can say all of ``spec``, and its config; the one with the model type ``first`` is asked first.

    Raises :class:`WeightsError` with the nearest family and the lines in which it would be another model.
    """
    known = families()
    order = ([known[first]] if first in known else []) + list(dict.fromkeys(known.values()))
    wanted, nearest = _computed(in_full(spec).to_dict()), None
    for family in order:
        try:
            values = family.config(spec)
            again = in_full(family.read(values))
        except Exception:  # it cannot say this Spec: whatever its reason, another may
            continue
        if _computed(again.to_dict()) == wanted:
            return family, values
        lines = in_full(spec).diff(again)
        if nearest is None or len(lines) < len(nearest[1]):
            nearest = (family, lines)
    said = "" if nearest is None else f" The nearest, {nearest[0].name}, would make it another model:\n{nearest[1]}"
    raise WeightsError(f"No published family computes what this {type(spec).__name__} does, so it can be saved in glassformer's own format only.{said}")


def says(family: Family, values: Mapping[str, Any], spec: Spec) -> bool:
    """Whether ``family`` reads a config as ``spec``."""
    try:
        return bool(_computed(in_full(family.read(values)).to_dict()) == _computed(in_full(spec).to_dict()))
    except GlassformerError:
        return False


def in_full(spec: Any) -> Any:
    """The Spec with the sizes said that follow from others, so that two ways to say the same are equal."""
    if isinstance(spec, EncoderDecoder):
        return spec.replace(encoder=in_full(spec.encoder), decoder=in_full(spec.decoder))
    if not isinstance(spec, Transformer):
        return spec
    return spec.replace(blocks=tuple(b.replace(attention=_sizes(b.attention, spec.d_model), cross=_sizes(b.cross, spec.d_model)) for b in spec.blocks))


def _sizes(attention: Any, d: int) -> Any:
    if not isinstance(attention, Attention):
        return attention
    _, g, k, v = attention.sizes(d)
    return attention.replace(n_kv_heads=g, d_head=k, d_value=v, scale=k**-0.5 if attention.scale is None else attention.scale)


TRAINING_ONLY = ("dropout", "init", "balance")


def _computed(value: Any) -> Any:
    """A Spec as plain data without what matters in training only."""
    if isinstance(value, dict):
        return {k: _computed(v) for k, v in value.items() if k not in TRAINING_ONLY}
    return [_computed(v) for v in value] if isinstance(value, (list, tuple)) else value
