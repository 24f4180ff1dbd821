"""Phi-3, Phi-3.5 and Phi-4-mini (arXiv 2404.14219): Llama with its projections fused, rotation of a part of each head, LongRoPE for long contexts."""

from __future__ import annotations

from typing import Any

from glassformer.core.mask import Everything, Window
from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from ..rules import Rule
from .llama import EMBEDDING, IGNORED, LAYER, NORMS, TIED, act_named, attention, common, decoder, layers, window_fields

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
    norm, size = RMSNorm(eps=float(c("rms_norm_eps", 1e-5))), c("sliding_window", None)
    c.only("attention_bias", False)
    block = Block(
        attention(c, rotary(c), mask=Everything() if size is None else Window(size)),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu")),
        norm=norm,
    )
    return decoder(c, (block,) * layers(c), final_norm=norm)


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
