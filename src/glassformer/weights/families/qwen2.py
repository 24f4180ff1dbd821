"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values, and windows in the upper layers where they are used."""

from __future__ import annotations

from typing import Any

from glassformer.core.mask import Mask
from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from .llama import IGNORED, RULES, TIED, act_named, attention, common, decoder, layers, window_fields, windows


def upper_windows(c: Config) -> list[Mask]:
    """The mask of each layer: ``layer_types``, or in older files a window in all layers from ``max_window_layers`` on."""
    size = c.nullable("sliding_window", 4_096) if c.flag("use_sliding_window", False) else None
    first = c("max_window_layers", 28)
    kinds = c("layer_types", None) or ["sliding_attention" if size and i >= first else "full_attention" for i in range(layers(c))]
    c.ignore("sliding_window")  # a size that is not used
    return windows(c, kinds, size)


def upper_windows_config(spec: Decoder) -> dict[str, Any]:
    """The fields that :func:`upper_windows` reads, the older ones among them."""
    fields = window_fields(spec)
    kinds = fields["layer_types"]
    lower = next((i for i, kind in enumerate(kinds) if kind == "sliding_attention"), len(kinds))
    return {**fields, "use_sliding_window": "sliding_attention" in kinds, "max_window_layers": lower}


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm = RMSNorm(eps=c.number("rms_norm_eps", 1e-6))
    c.only("use_mrope", False)
    c.only("qkv_bias", True)
    c.ignore("attention_bias")  # no class of this family reads it; whether there are biases is in the tensors
    c.only("mlp_bias", False)
    block = Block(
        attention(c, rotary(c), qkv_bias=True),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu")),
        norm=norm,
    )
    return decoder(c, [block.at("attention.mask").set(mask) for mask in upper_windows(c)], final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **common(spec), **upper_windows_config(spec)}


QWEN2 = Family("Qwen2", ("qwen2",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
