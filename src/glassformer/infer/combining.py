"""Combined models by the names that people know: what ``generate(guidance_scale=1.5)`` wraps around its model.

guidance_scale, negative_prompt            Guidance
contrast, contrast_alpha, contrast_beta    Contrast        one of them at a time
dola_layers                                DoLa
penalty_alpha, top_k                       ContrastiveSearch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassformer.core.errors import SamplerError

from .contrastive import Contrast
from .contrastive_search import ContrastiveSearch
from .dola import DoLa
from .guidance import Guidance

NAMES = ("guidance_scale", "negative_prompt", "contrast", "contrast_alpha", "contrast_beta", "dola_layers", "penalty_alpha")
_OFF = {"guidance_scale": 1, "penalty_alpha": 0}


def combine(model: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model that these options ask for, and the options that are left for the chain.

    Raises :class:`SamplerError` for options that disagree, and :class:`InputError` for a model that cannot be combined so.
    """
    said = {name: options[name] for name in NAMES if options.get(name) is not None}
    left = {name: value for name, value in options.items() if name not in NAMES}
    for name, master in (("negative_prompt", "guidance_scale"), ("contrast_alpha", "contrast"), ("contrast_beta", "contrast")):
        if name in said and master not in said:
            raise SamplerError(f"{name} was given without {master}, which is off if nothing is said: give {master} too, or leave {name} out.")
    asked = [name for name in ("guidance_scale", "contrast", "dola_layers", "penalty_alpha") if name in said and said[name] != _OFF.get(name, ())]
    if len(asked) > 1:
        raise SamplerError(f"{asked[0]} and {asked[1]} each combine the model in their own way, and both were given: choose one.")
    if asked == ["penalty_alpha"]:
        return _searching(model, said["penalty_alpha"], left)
    if asked == ["dola_layers"]:
        return DoLa(said["dola_layers"]).over(model), left
    if asked == ["contrast"]:
        chosen = {field: said[name] for name, field in (("contrast_alpha", "alpha"), ("contrast_beta", "beta")) if name in said}
        amateur = said["contrast"] if callable(said["contrast"]) else getattr(said["contrast"], "model", said["contrast"])  # load() gives more than a model
        return Contrast(**chosen).over(model, amateur), left
    if asked:
        return Guidance(said["guidance_scale"], _negative(said.get("negative_prompt"), options.get("tokenizer"))).over(model), left
    return model, left


def _searching(model: Any, alpha: float, left: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Contrastive search chooses by itself: nothing may draw."""
    if left.get("do_sample") or left.get("sampler") is not None:
        raise SamplerError(
            "Contrastive search (penalty_alpha) chooses the token by itself, so it does not draw: leave do_sample and sampler out, or penalty_alpha."
        )
    k = left.pop("top_k", None)
    return ContrastiveSearch(alpha, 4 if k is None else k).over(model), left | {"do_sample": False}


def _negative(given: Any, tokenizer: Any) -> tuple[int, ...] | None:
    """The ids of a negative prompt."""
    if given is None:
        return None
    if isinstance(given, str):
        if tokenizer is None:
            raise SamplerError(f"The negative prompt is a text ({given[:40]!r}), and without a tokenizer it cannot be read: give tokenizer=…, or ids.")
        given = getattr(tokenizer, "prompt", tokenizer.encode)(given)
    if not all(isinstance(i, int) for i in given):
        raise SamplerError("A negative prompt is one text or one list of ids, the same for every row: run rows that need others in calls of their own.")
    return tuple(given)
