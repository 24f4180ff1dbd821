"""What PRESET_OR_DIR means: a saved model (a folder of ours or of the hub's format, a .gguf file, hf://owner/name), or the name of a preset."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import RecipeError, TokenizerError, WeightsError, did_you_mean
from ..core.numerics import device_named, devices
from ..models import presets
from ..weights import opened, own
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


def open_model(
    name: str, device: str | None = None, dtype: str | None = None, packed: bool = False, quantise: str | None = None, weights: str | None = None
) -> own.Loaded:
    """The saved model at ``name``, ready to run. Raises :class:`WeightsError` with the remedy for anything else."""
    if not name.strip():
        raise WeightsError("The model's name is empty: give a trained model's folder, a .gguf file, or hf://owner/name.")
    if not is_checkpoint(name):
        remedy = "A preset has no trained weights: train one first" if name in presets.names() else "Train one first"
        raise WeightsError(
            f"There is no model at {name!r}. {remedy}: glassformer train shakespeare_quick --out {name}; or give a folder from the hub, a .gguf file, or "
            "hf://owner/name."
        )
    loaded = _load(name, pick_device(device), dtype, packed, quantise, weights)
    if loaded.report is None and (path := own.find(Path(name))) != Path(name):
        untrained = ", which has learnt nothing yet" if loaded.extra.get("step") == 0 else ""
        print(f"note: the run in {name} is not finished; this is its checkpoint {path.name}{untrained}", file=sys.stderr)
    return loaded


def is_checkpoint(name: str) -> bool:
    """Whether something lies there that may be a model, rather than the name of a preset."""
    return name.startswith("hf://") or Path(name).expanduser().exists()


def _load(
    name: str, device: str = "cpu", dtype: str | None = None, packed: bool = False, quantise: str | None = None, weights: str | None = None
) -> own.Loaded:
    try:
        return opened.load(name, device, dtype, packed=packed, quantise=quantise, weights=weights)
    except WeightsError as error:
        if unknown_part(error.__cause__):
            raise WeightsError(
                f"{error} A part of your own is known only after its module was imported: in Python, import it, then glassformer.load({name!r})."
            ) from error
        raise


def tokenizer_of(loaded: own.Loaded, folder: str) -> Tokenizer:
    """The tokenizer beside a model. Raises :class:`TokenizerError` if there is none."""
    if loaded.tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer.json, so text means nothing to its model: put the one that it was trained with into that folder.")
    return loaded.tokenizer


def open_shape(name: str, sets: Iterable[str] = ()) -> Shape:
    """The preset of that name (changed by ``--set``) or the saved model in that folder."""
    if is_checkpoint(name):
        if list(sets):
            raise RecipeError(f"{name!r} is a saved model, whose sizes are fixed; --set changes presets only. Leave --set out, or name a preset.")
        found = opened.open(name)
        if found.family is None:
            loaded = _load(name)
            return Shape(loaded.model, loaded.tokenizer)
        return Shape(found.spec.build(device="meta"), found.tokenizer)
    known = presets.names()
    if name not in known:
        raise RecipeError(f"{name!r} is neither a folder with a model nor a preset.{did_you_mean(name, known)} Presets: {', '.join(known)}.")
    return Shape(override(presets.preset(name), sets).build(device="meta"), None)
