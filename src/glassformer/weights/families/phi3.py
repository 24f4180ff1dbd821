"""Phi-3, Phi-3.5 and Phi-4-mini (arXiv 2404.14219): Llama with its projections fused, rotation of a part of each head, LongRoPE for long contexts."""

from __future__ import annotations

from typing import Any

from glassformer.models import Decoder

from ..config import Config
from ..family import Family
from ..rules import Rule
from .llama import EMBEDDING, IGNORED, LAYER, NORMS, TIED, common, window_fields
from .mistral import windowed

RULES = (
    *EMBEDDING,
    *NORMS,
    Rule("blocks.{i}.attn.qkv.weight", f"{LAYER}.self_attn.qkv_proj.weight"),
    Rule("blocks.{i}.attn.out.weight", f"{LAYER}.self_attn.o_proj.weight"),
    Rule("blocks.{i}.ffn.gate_up.weight", f"{LAYER}.mlp.gate_up_proj.weight"),
    Rule("blocks.{i}.ffn.down.weight", f"{LAYER}.mlp.down_proj.weight"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    c.defaults(max_position_embeddings=4_096, original_max_position_embeddings=4_096)
    c.only("lm_head_bias", False)
    for key in ("full_attn_mod", "interpolate_factor"):  # every layer sees all, and positions are not squeezed but by the rotation's own table
        c.only(key, 1)
    return windowed(c, c("sliding_window", None), 1e-5)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **common(spec),
        "partial_rotary_factor": a.position.fraction,
        "sliding_window": window_fields(spec)["sliding_window"],
    }


PHI3 = Family("Phi-3", ("phi3",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
