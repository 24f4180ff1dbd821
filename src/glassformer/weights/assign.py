"""Who fills whom: the table of a family against the tensors of a file, settled by name and shape before anything is read.

    model (on the meta device) ─ parameters ─┐
                                             ├─► Plan: each parameter, its tensors, the form between
    files ─ headers ─ tensors ───────────────┘      + what is left over, and why that is no harm

Loading is total: a parameter that no tensor fills, a tensor that no parameter claims, or a shape that does not fit is an
error that names both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import GlassformerError, WeightsError, did_you_mean
from glassformer.parts.experts import Experts

from .family import Family
from .rules import Form, Place, Rule, any_matches
from .stored import Stored, shown


@dataclass(frozen=True)
class Filling:
    """One parameter and where it comes from."""

    path: str
    form: Form
    stored: tuple[Stored, ...]
    place: Place


@dataclass(repr=False)
class Plan:
    """Every parameter's source, and every tensor that is not one: ``left`` says why for each."""

    fillings: list[Filling] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"{f.path} = {type(f.form).__name__}({', '.join(s.name for s in f.stored)})" for f in self.fillings]
        return "\n".join([*lines, *(f"{copy} repeats {one}" for copy, one in self.tied.items()), *(f"left over: {n} ({why})" for n, why in self.left.items())])


def skeleton(spec: Any, tensors: Mapping[str, Stored], file: Any) -> Any:
    """The model without memory. Raises :class:`WeightsError` if it cannot be built, or has more blocks or experts than there are tensors to fill them."""
    blocks = [b for s in (spec, getattr(spec, "encoder", None), getattr(spec, "decoder", None)) for b in getattr(s, "blocks", ())]
    if len(blocks) > len(tensors):
        raise WeightsError(
            f"{file}: by its config the model has {len(blocks)} blocks, but there are {len(tensors)} tensors in all: they belong to different models."
        )
    experts = sum(b.feedforward.n_experts for b in blocks if isinstance(getattr(b, "feedforward", None), Experts))
    if experts > (most := len(tensors) + sum(slices(s) for s in tensors.values())):
        raise WeightsError(
            f"{file}: by its config the model has {experts} experts, but there are no more than {most} tensors and slices of tensors in all: "
            "they belong to different models."
        )
    try:
        return spec.build(device="meta")
    except (GlassformerError, RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{file}: the model that its config describes cannot be built: {str(error)[:500]}") from error


def slices(stored: Stored | None) -> int:
    """How many experts' matrices a tensor may hold: it is [e out in] then, and is not empty."""
    return stored.shape[0] if stored is not None and len(stored.shape) > 2 and stored.nbytes else 0


def place_of(model: Any, path: str) -> Place:
    """Where a parameter stands: ``blocks.3.attn.qkv.weight`` is the layer ``qkv`` of the part ``blocks.3.attn``."""
    parts = path.split(".")
    return Place(model.get_submodule(".".join(parts[:-2])), parts[-2] if len(parts) > 1 else "")


def _places(model: Any) -> Callable[[str], Place]:
    """:func:`place_of` for every parameter of a model: its modules are listed once."""
    modules = dict(model.named_modules())

    def place(path: str) -> Place:
        parts = path.rsplit(".", 2)
        return Place(modules[parts[0] if len(parts) == 3 else ""], parts[-2] if len(parts) > 1 else "")

    return place


def plan(model: Any, family: Family, tensors: Mapping[str, Stored], file: Any) -> Plan:
    """Settle who fills whom. Raises :class:`WeightsError` with the first disagreements."""
    family = family.fitted(model.spec)
    names = _canonical(family, tensors)
    made, missing = Plan(), []
    claimed: set[str] = set()
    taken: dict[str, int] = {}
    place = _places(model)
    checked: set[Any] = set()
    for path, parameter in model.named_parameters():
        rules = family.table.rules_for(path)
        if not rules:
            raise WeightsError(f"No rule of the family {family.name} says where the parameter {path!r} comes from: this is a fault of the family's table.")
        for rule in rules:
            holes = rule.match(path) or {}
            theirs = rule.names(holes)
            if all(t in names for t in theirs):
                stored = tuple(names[t] for t in theirs)
                if rule.stacked:
                    stored = tuple(_slice(s, int(holes["e"])) for s in stored)
                    taken |= {t: taken.get(t, 0) + 1 for t in theirs}
                made.fillings.append(Filling(path, rule.form, stored, place(path)))
                if (alike := _alike(made.fillings[-1], parameter)) not in checked:
                    _check_shape(made.fillings[-1], parameter, file)
                    checked.add(alike)
                claimed.update(theirs)
                break
        else:
            first = rules[0].names(rules[0].match(path) or {})
            missing.append((path, next(t for t in first if t not in names)))
    for name, n in taken.items():
        if n != names[name].shape[0]:
            raise WeightsError(
                f"{file}: {names[name].name!r} has {names[name].shape[0]} slices, but by its config the model takes {n}: some would be left out."
            )
    left = [n for n in names if n not in claimed]
    for name in list(left):
        if (why := _why_left(family, name, names, claimed)) is not None:
            left.remove(name)
            if why.startswith("= "):
                made.tied[names[name].name] = names[why[2:]].name
            else:
                made.left[names[name].name] = why
    if missing or left:
        raise WeightsError(_disagreement(family, file, missing, left))
    return made


def _canonical(family: Family, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors by the names that the family's table knows: files of the bare stack lack its prefix, some have another one before it."""
    patterns = list(family.known_names)

    def known_name(name: str) -> bool:
        for k, p in enumerate(patterns):
            if p.fullmatch(name):
                if k > 2:
                    patterns.insert(0, patterns.pop(k))  # the next names are of the same kinds: thousands of experts
                return True
        return False

    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        known = next((n for n in (name, family.prefix + name, *(name.removeprefix(p) for p in family.strips if name.startswith(p))) if known_name(n)), name)
        if known in found:
            raise WeightsError(
                f"{stored.file}: {shown(found[known].name)} and {shown(name)} both mean {known!r} in the family {family.name}: nobody can say which is right. "
                "Remove the one that does not belong there."
            )
        found[known] = stored
    return found


def _slice(stored: Stored, e: int) -> Stored:
    if not stored.shape or e >= stored.shape[0]:
        raise WeightsError(
            f"{stored.file}: {stored.name!r} has shape {stored.shape}, but the model needs its slice {e}: the config asks for more experts than there are."
        )
    return stored.item(e)


def _alike(filling: Filling, parameter: Tensor) -> Any:
    """What the check of shapes depends on: equal for the same matrix of equal layers, so that a deep model is checked once and not layer by layer."""
    part, name = filling.place.part, filling.place.name
    own = vars(part)  # asking a module for what it lacks is slow, and most lack these
    sizes = tuple(own.get(n) for n in ("n_heads", "n_kv_heads", "widths", "d_head"))
    return id(filling.form), name, sizes, tuple(s.shape for s in filling.stored), tuple(s.dtype for s in filling.stored), parameter.shape


def _check_shape(filling: Filling, parameter: Tensor, file: Any) -> None:
    shapes = " and ".join(f"{s.name!r} {s.shape}" for s in filling.stored)
    try:
        theirs = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in filling.stored]
        got: tuple[int, ...] | None = tuple(filling.form.ours(theirs, filling.place).shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise WeightsError(f"{file}: {shapes} cannot become {filling.path!r} of shape {tuple(parameter.shape)}: {str(error).splitlines()[0]}") from error
    if got != tuple(parameter.shape):
        raise WeightsError(
            f"{file}: {shapes} would make {filling.path!r} of shape {got}, but by its config the model needs {tuple(parameter.shape)}: config and tensors "
            "belong to different models."
        )
    # The sum may be right and the parts wrong (queries as wide as the keys should be): the way back says what each must have been.
    try:
        back = [tuple(x.shape) for x in filling.form.theirs(torch.empty(parameter.shape, device="meta"), filling.place)]
    except WeightsError:  # a form that is read only
        return
    if back != [s.shape for s in filling.stored]:
        raise WeightsError(
            f"{file}: {shapes} together have the size of {filling.path!r}, but by its config they must be {' and '.join(map(str, back))}: config and "
            "tensors belong to different models."
        )


def _why_left(family: Family, name: str, names: Mapping[str, Stored], claimed: Iterable[str]) -> str | None:
    """Why a tensor that no parameter claims is no harm (``= other`` for a copy of another); None if it is."""
    copy_of = (family.tied or {}).get(name)
    if copy_of is not None and copy_of in claimed:
        return f"= {copy_of}"
    if any_matches(family.nothing_learnt, name):
        return "holds nothing learnt"
    if any_matches(family.other_heads, name):
        return "belongs to a head that this model does not have"
    return None


def _disagreement(family: Family, file: Any, missing: list[tuple[str, str]], left: list[str]) -> str:
    said = []
    if missing:
        path, wanted = missing[0]
        said.append(f"the parameter {path!r} needs the tensor {wanted!r}, which is not there.{_near(wanted, left)}")
    if left:
        wanted_names = [m[1] for m in missing]
        said.append(f"the tensor {shown(left[0])} is claimed by no parameter.{_near(left[0], wanted_names)}")
    return f"{file} does not fit the family {family.name} ({len(missing)} missing, {len(left)} left over): {' And '.join(said)}"


def _near(name: str, names: list[str]) -> str:
    """The most similar of the names, looked for among those with the same numbers first: a model of experts has fifty thousand names, of a dozen kinds."""
    if len(name) > 200:
        return ""
    numbers = re.findall("[0-9]+", name)
    kinds = {re.sub("[0-9]+", "0", n): n for n in names if len(n) < 200}
    kinds |= {re.sub("[0-9]+", "0", n): n for n in names if len(n) < 200 and re.findall("[0-9]+", n) == numbers}
    return did_you_mean(name, kinds.values())


def theirs(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint that ``model`` would be, by the family's names: the table read from right to left."""
    family = family.fitted(model.spec)
    stacks: dict[str, dict[int, Tensor]] = {}
    experts = _expert_counts(model, family)
    for path, parameter in model.named_parameters():
        rule, holes = _canonical_rule(family, path)
        names = rule.names(holes)
        made = rule.form.theirs(parameter.detach(), place_of(model, path))
        if not rule.stacked:
            yield from zip(names, made, strict=True)
            continue
        for name, x in zip(names, made, strict=True):
            stacks.setdefault(name, {})[int(holes["e"])] = x
            if len(stacks[name]) == experts[name]:
                slices = stacks.pop(name)
                yield name, torch.stack([slices[e] for e in range(len(slices))])


def _canonical_rule(family: Family, path: str) -> tuple[Rule, dict[str, str]]:
    rules = family.table.rules_for(path)
    if not rules:
        raise WeightsError(f"No rule of the family {family.name} says what the parameter {path!r} is called there.")
    return rules[0], rules[0].match(path) or {}


def _expert_counts(model: Any, family: Family) -> dict[str, int]:
    """How many slices each stacked tensor has."""
    counts: dict[str, int] = {}
    for path, _ in model.named_parameters():
        rule, holes = _canonical_rule(family, path)
        for name in rule.names(holes) if rule.stacked else ():
            counts[name] = counts.get(name, 0) + 1
    return counts
