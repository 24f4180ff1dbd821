"""What PRESET_OR_DIR means: a folder with a saved model, or the name of a preset."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import RecipeError, TokenizerError, WeightsError, did_you_mean
from ..core.numerics import device_named, devices
from ..models import presets
from ..weights import own
from .recipe import override, unknown_part

if TYPE_CHECKING:
    from ..text import Tokenizer


class Shape(NamedTuple):
    """A model without its numbers (on the meta device), and its tokenizer if it has one."""

    model: Any
    tokenizer: Tokenizer | None


def pick_device(name: str | None) -> str:
    """The device of that name if it is there, or the best there is. Raises :class:`SpecError`."""
    return devices()[0] if name is None else str(device_named(name))


def open_model(folder: str, device: str | None = None) -> own.Loaded:
    """The saved model in ``folder``, ready to run. Raises :class:`WeightsError` with the remedy for anything else."""
    if not Path(folder).is_dir():
        remedy = "A preset has no trained weights: train one first" if folder in presets.names() else "Train one first"
        raise WeightsError(f"There is no folder {folder!r} with a model in it. {remedy}: glassformer train shakespeare_quick --out {folder}.")
    loaded = _load(folder, pick_device(device))
    if (path := own.find(Path(folder))) != Path(folder):
        untrained = ", which has learnt nothing yet" if loaded.extra.get("step") == 0 else ""
        print(f"note: the run in {folder} is not finished; this is its checkpoint {path.name}{untrained}", file=sys.stderr)
    return loaded


def _load(folder: str, device: str = "cpu") -> own.Loaded:
    try:
        return own.load(folder, device=device)
    except WeightsError as error:
        if unknown_part(error.__cause__):
            raise WeightsError(
                f"{error} A part of your own is known only after its module was imported: in Python, import it, then glassformer.load({folder!r})."
            ) from error
        raise


def tokenizer_of(loaded: own.Loaded, folder: str) -> Tokenizer:
    """The tokenizer beside a model. Raises :class:`TokenizerError` if there is none."""
    if loaded.tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer.json, so text means nothing to its model: put the one that it was trained with beside model.json.")
    return loaded.tokenizer


def open_shape(name: str, sets: Iterable[str] = ()) -> Shape:
    """The preset of that name (changed by ``--set``) or the saved model in that folder."""
    if Path(name).is_dir():
        loaded = _load(name)
        if list(sets):
            raise RecipeError(f"{name!r} is a saved model, whose sizes are fixed; --set changes presets only. Leave --set out, or name a preset.")
        return Shape(loaded.model, loaded.tokenizer)
    known = presets.names()
    if name not in known:
        raise RecipeError(f"{name!r} is neither a folder with a model nor a preset.{did_you_mean(name, known)} Presets: {', '.join(known)}.")
    return Shape(override(presets.preset(name), sets).build(device="meta"), None)
