"""TransformerLens' names for the sites of one model.

hook_resid_pre ◄──► resid_pre          attn.hook_q       ◄──► attn.q           mlp.hook_pre         ◄──► ffn.pre, of a gated layer ffn.gate
hook_attn_out  ◄──► attn.out           attn.hook_pattern ◄──► attn.pattern     mlp.hook_pre_linear  ◄──► ffn.pre of a gated layer
hook_mlp_out   ◄──► ffn.out            attn.hook_rot_q   ◄──► attn.q_rot       ln1.hook_normalized  ◄──► attn.in
"""

from __future__ import annotations

import re
from typing import Any

from glassformer.core.errors import InputError
from glassformer.core.fields import described

from ..subject import feedforward_of

ATTENTION = {
    "hook_q": "q",
    "hook_k": "k",
    "hook_v": "v",
    "hook_rot_q": "q_rot",
    "hook_rot_k": "k_rot",
    "hook_attn_scores": "scores",
    "hook_pattern": "pattern",
    "hook_z": "z",
    "hook_result": "result",
}
ADDED = "+"
"""Ends the path of a stream where not the stream is meant but what was added to it since the site before."""


def names_of(model: Any) -> dict[str, str]:
    """Every name of theirs that this model has a value for, with the path of our site, in the order of computation."""
    known = {s.path for s in model.sites()}
    wanted: dict[str, str] = {"hook_embed": "embed", "hook_pos_embed": "pos_embed"}
    for i, block in enumerate(model.blocks):
        ours, theirs, ff = f"blocks.{i}", f"blocks.{i}", feedforward_of(model, i)
        gated = f"{ours}.{ff}.gate" in known
        wanted[f"{theirs}.hook_resid_pre"] = f"{ours}.resid_pre"
        wanted[f"{theirs}.ln1.hook_scale"] = f"{ours}.norm1.scale"
        if hasattr(block, "norm1") and block.steps[0][1] == "norm1":
            wanted[f"{theirs}.ln1.hook_normalized"] = f"{ours}.attn.in"
        wanted |= {f"{theirs}.attn.{a}": f"{ours}.attn.{b}" for a, b in ATTENTION.items()}
        wanted[f"{theirs}.hook_attn_out"] = f"{ours}.attn.out"
        wanted[f"{theirs}.hook_resid_mid"] = f"{ours}.resid_mid"
        wanted[f"{theirs}.ln2.hook_scale"] = f"{ours}.norm2.scale"
        if block.steps[-1][1]:
            wanted[f"{theirs}.ln2.hook_normalized"] = f"{ours}.{ff}.in"
        wanted[f"{theirs}.mlp.hook_pre"] = f"{ours}.{ff}.{'gate' if gated else 'pre'}"
        if gated:
            wanted[f"{theirs}.mlp.hook_pre_linear"] = f"{ours}.{ff}.pre"
        wanted[f"{theirs}.mlp.hook_post"] = f"{ours}.{ff}.post"
        wanted[f"{theirs}.hook_mlp_out"] = f"{ours}.{ff}.out"
        wanted[f"{theirs}.hook_resid_post"] = f"{ours}.resid_post"
    wanted["ln_final.hook_scale"] = "final_norm.scale"
    wanted["ln_final.hook_normalized"] = "resid_final"
    for i, block in enumerate(model.blocks):
        if hasattr(block, "norm1_post"):  # their attn_out is what is added to the stream, after the norm behind the sublayer
            wanted[f"blocks.{i}.hook_attn_out"] = f"blocks.{i}.resid_mid{ADDED}"
            wanted[f"blocks.{i}.hook_mlp_out"] = f"blocks.{i}.resid_post{ADDED}"
    return {a: b for a, b in wanted.items() if b.removesuffix(ADDED) in known}


_STEP = re.compile(r"^step\.\d+\.")


def without_step(path: str) -> str:
    """A path of a generation without its step."""
    return _STEP.sub("", path)


LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
WORDS = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v", "mlp_pre": "pre", "mlp_mid": "mid", "mlp_post": "post"}
IN_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
IN_MLP = ("pre", "post", "mid", "pre_linear")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of an activation: ``get_act_name("k", 6) == "blocks.6.attn.hook_k"``, ``get_act_name("pre5")``, ``get_act_name("scale", 4, "ln1")``."""
    if not isinstance(name, str):
        raise InputError(f"An activation is named by a text, such as 'pattern' or 'blocks.5.attn.hook_pattern', but {described(type(name))} was given.")
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    found = re.match(r"([a-z]+)(\d+)([a-z]?.*)", name)
    if found is not None:
        name, layer, layer_type = found[1], found[2], found[3]
    name = WORDS.get(name, name)
    if name in IN_ATTENTION:
        layer_type = "attn"
    elif name in IN_MLP:
        layer_type = "mlp"
    else:
        layer_type = LAYER_TYPES.get(layer_type or "", layer_type)
    block = "" if layer is None else f"blocks.{layer}."
    full = f"{block}{layer_type + '.' if layer_type else ''}hook_{name}"
    return f"ln_final.{full}" if layer is None and name in ("scale", "normalized") else full
