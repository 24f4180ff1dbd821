"""Recipes at the door: a name, a Python file or a YAML file becomes a :class:`~glassformer.train.recipe.Recipe`.

A Python recipe has a function ``recipe()`` that returns one; a YAML recipe is the same tree as plain
data (``Recipe.to_dict``). ``--set path=value`` changes either, after it has been read::

    --set batch=16  --set optimizer.lr=3e-4  --set model.blocks.*.attention.position=ALiBi

Values are YAML, so numbers, lists, null, names of parts and ``{type: RMSNorm, eps: 1e-6}`` all work.
Every string stops here: what comes out holds only types.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Iterable
from importlib import resources
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml

from ..core.errors import GlassformerError, RecipeError, SpecError, did_you_mean
from ..core.fields import described
from ..core.spec import Spec
from ..models.presets import preset
from ..train.recipe import Recipe

S = TypeVar("S", bound=Spec)
PYTHON = "recipe.py"  # in the folder of a run: the Python recipe it was begun with


def built_in() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("glassformer.recipes")))
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in (".py", ".yaml") and not p.stem.startswith("_")}


def read_recipe(name: str, sets: Iterable[str] = ()) -> Recipe:
    """The recipe of that name or in that file, with the overrides applied. Raises :class:`RecipeError`."""
    path = Path(name)
    known = built_in()
    if path.suffix not in (".py", ".yaml", ".yml"):
        if name not in known:
            raise RecipeError(f"No recipe is named {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}; or give a .py or .yaml file.")
        path = known[name]
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {name!r}. Check the path, or use a built-in recipe: {', '.join(known)}.")
    found = _from_python(path) if path.suffix == ".py" else _from_yaml(path)
    return override(found, sets)


def read_run(folder: Path, sets: Iterable[str] = ()) -> Recipe:
    """The recipe of a run. Parts that are unknown here are looked for in the Python recipe that the run keeps. Raises :class:`RecipeError`."""
    name, python = str(folder / "recipe.yaml"), folder / PYTHON
    try:
        return read_recipe(name, sets)
    except RecipeError as error:
        if not (unknown_part(error.__cause__) and python.is_file()):
            raise
    _from_python(python)
    return read_recipe(name, sets)


def unknown_part(error: BaseException | None) -> bool:
    """Whether this error says that a part is not registered."""
    return isinstance(error, SpecError) and "is named" in str(error) and "No part" in str(error)


def override(spec: S, sets: Iterable[str]) -> S:
    """``spec`` with every ``path=value`` applied, in order. Raises :class:`RecipeError`."""
    for text in sets:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"--set takes path=value, but {text!r} was given. For example: --set batch=16.")
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"--set {text}: the value {value!r} is not YAML. Put text with special letters in quotes.") from None
        try:
            spec = _put(spec, path.strip(), _model_by_name(plain) if path.strip() == "model" else plain)
        except (SpecError, TypeError) as error:
            raise RecipeError(f"--set {text}: {error}") from error
    return spec


def _put(spec: S, path: str, plain: Any) -> S:
    """Set one field, read as its own type: the Spec that holds it is written as plain data, changed, and read back."""
    parent, _, field = path.rpartition(".")

    def change(holder: Any) -> Any:
        if isinstance(holder, Spec):
            known = [f.name for f in dataclasses.fields(holder)]
            if field not in known:
                raise SpecError(f"{type(holder).__name__} has no field {field!r}.{did_you_mean(field, known)} It has: {', '.join(known) or 'none'}.")
            return type(holder).from_dict(holder.to_dict() | {field: plain})
        if isinstance(holder, tuple) and holder and (field == "*" or field.lstrip("-").isdigit()):
            chosen = range(len(holder)) if field == "*" else [int(field)]
            return tuple(type(v).from_dict(plain) if i in {c % len(holder) for c in chosen} and isinstance(v, Spec) else v for i, v in enumerate(holder))
        raise SpecError(f"{parent or 'the top'} is {holder!r}, which has nothing inside: the path cannot go on with {field!r}.")

    return spec.at(parent).update(change)


def _model_by_name(plain: Any) -> Any:
    """``model: tiny`` means the preset of that name."""
    return preset(plain).to_dict() if isinstance(plain, str) else plain


def _from_python(path: Path) -> Recipe:
    try:
        loader = SourceFileLoader(f"glassformer_recipe_{path.stem}", str(path))
        module = ModuleType(loader.name)
        sys.modules[loader.name] = module  # dataclasses look their module up
        loader.exec_module(module)
        function = getattr(module, "recipe", None)
        if not callable(function):
            raise RecipeError(f"{path} has no function recipe(). Write one that returns a glassformer.Recipe.")
        found = function()
    except GlassformerError:
        raise
    except SyntaxError as error:
        raise RecipeError(f"{path}, line {error.lineno}: {error.msg}. Mend the recipe.") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        raise RecipeError(f"{path}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}. Mend the recipe.") from error
    if not isinstance(found, Recipe):
        raise RecipeError(f"recipe() in {path} returned {described(type(found))}, but a glassformer.Recipe is needed.")
    return found


def _from_yaml(path: Path) -> Recipe:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}), so it is no recipe. Check the path.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error}). Mend the recipe.") from error
    if not isinstance(plain, dict):
        raise RecipeError(f"{path} holds {'nothing' if plain is None else described(type(plain))}, but a recipe is a mapping of fields, such as 'batch: 16'.")
    try:
        return Recipe.from_dict(plain | {"model": _model_by_name(plain.get("model"))} if "model" in plain else plain)
    except SpecError as error:
        remedy = " A part of your own is known only after its module was imported: train from the .py recipe that does so." if unknown_part(error) else ""
        raise RecipeError(f"{path}: {error}{remedy}") from error
