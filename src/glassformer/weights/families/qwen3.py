"""Qwen3 (arXiv 2505.09388): Qwen2 without its biases, with a norm on every head's queries and keys."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from ..rules import Rule
from .llama import IGNORED, LAYER, RULES, TIED, act_named, attention, common, decoder
from .qwen2 import upper_windows, upper_windows_config

QK_NORM = (
    Rule("blocks.{i}.attn.q_norm.weight", f"{LAYER}.self_attn.q_norm.weight"),
    Rule("blocks.{i}.attn.k_norm.weight", f"{LAYER}.self_attn.k_norm.weight"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    c.defaults(head_dim=128)
    norm, biased = RMSNorm(eps=c.number("rms_norm_eps", 1e-6)), c.flag("attention_bias", False)
    c.only("use_mrope", False)
    c.only("use_qk_norm", True)
    c.only("qkv_bias", False)
    c.only("mlp_bias", False)
    block = Block(
        attention(c, rotary(c), qk_norm=norm, qkv_bias=biased, out_bias=biased),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu")),
        norm=norm,
    )
    return decoder(c, [block.at("attention.mask").set(mask) for mask in upper_windows(c)], final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common(spec), "attention_bias": a.qkv_bias, **upper_windows_config(spec)}


QWEN3 = Family("Qwen3", ("qwen3",), spec, config, (*RULES, *QK_NORM), tied=TIED, ignored=IGNORED, prefix="model.")
