"""OLMo 2 (arXiv 2501.00656): norms after attention and feed-forward instead of before, and one norm over all heads' queries, one over their keys."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import Joint, RMSNorm
from glassformer.parts.wiring import ReorderedNorm

from ..config import Config, rotary
from ..family import Family
from ..rules import Rule
from .llama import ATTENTION, EMBEDDING, FEEDFORWARD, IGNORED, LAYER, TIED, act_named, attention, common, decoder, layers

RULES = (
    *EMBEDDING,
    *ATTENTION,
    *FEEDFORWARD,
    Rule("blocks.{i}.norm1_post.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blocks.{i}.norm2_post.weight", f"{LAYER}.post_feedforward_layernorm.weight"),
    Rule("blocks.{i}.attn.q_norm.norm.weight", f"{LAYER}.self_attn.q_norm.weight"),
    Rule("blocks.{i}.attn.k_norm.norm.weight", f"{LAYER}.self_attn.k_norm.weight"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm = RMSNorm(eps=c.number("rms_norm_eps", 1e-5), cast="late")
    biased = c.flag("attention_bias", False)
    block = Block(
        attention(c, rotary(c), qk_norm=Joint(norm), qkv_bias=biased, out_bias=biased),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu")),
        norm=norm,
        wiring=ReorderedNorm(),
    )
    return decoder(c, (block,) * layers(c), final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **common(spec), "attention_bias": a.qkv_bias}


OLMO2 = Family("OLMo 2", ("olmo2",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
