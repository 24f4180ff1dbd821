"""Gemma 2 (arXiv 2408.00118): norms on both sides of every sublayer, scores and logits capped, every other layer sees a window."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.embed import Embedding, SqrtWidth
from glassformer.parts.feedforward import Gated
from glassformer.parts.readout import LanguageModel
from glassformer.parts.wiring import Sandwich

from ..config import Config, rotary
from ..family import Family
from ..rules import Rule
from .gemma import act_config, act_of, causal_only, norm_of
from .llama import ATTENTION, EMBEDDING, FEEDFORWARD, IGNORED, LAYER, TIED, attention, common, decoder, layers, window_fields, windows

NORMS = (
    Rule("blocks.{i}.norm1.weight", f"{LAYER}.input_layernorm.weight"),
    Rule("blocks.{i}.norm1_post.weight", f"{LAYER}.post_attention_layernorm.weight"),
    Rule("blocks.{i}.norm2.weight", f"{LAYER}.pre_feedforward_layernorm.weight"),
    Rule("blocks.{i}.norm2_post.weight", f"{LAYER}.post_feedforward_layernorm.weight"),
)


def factor(scalar: float) -> float:
    """What a ``query_pre_attn_scalar`` multiplies scores by."""
    return float(scalar) ** -0.5


def scale_of(c: Config, k: int) -> float | None:
    """What scores are multiplied by; None where that follows from the size ``k`` of a head."""
    scalar = c.number("query_pre_attn_scalar", 256)
    return None if scalar == k else factor(scalar)


def scale_config(spec: Decoder) -> dict[str, Any]:
    """The ``query_pre_attn_scalar`` that is read as this scale, a whole number where one is."""
    a: Any = spec.blocks[0].attention
    if a.scale is None:
        return {"query_pre_attn_scalar": a.sizes(spec.d_model)[2]}
    exact = a.scale**-2
    near = max(1, round(exact))
    return {"query_pre_attn_scalar": near if factor(near) == a.scale else exact}


def spec(c: Config) -> Decoder:
    """From config.json."""
    c.defaults(head_dim=256)
    c.ignore("cache_implementation", "sliding_window_size")
    causal_only(c)
    norm, biased, size = norm_of(c), c.flag("attention_bias", False), c.nullable("sliding_window", 4_096)
    heads = attention(c, rotary(c), cap=c.nullable("attn_logit_softcapping", 50.0), qkv_bias=biased, out_bias=biased)
    block = Block(
        heads.replace(scale=scale_of(c, c("head_dim"))),
        Gated(c.whole("intermediate_size"), act=act_of(c)),
        norm=norm,
        wiring=Sandwich(),
    )
    kinds = c("layer_types", None) or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers(c))]
    return decoder(
        c,
        [block.at("attention.mask").set(mask) for mask in windows(c, kinds, size)],
        final_norm=norm,
        embedding=Embedding(scale=SqrtWidth()),
        tied=True,
        readout=LanguageModel(cap=c.nullable("final_logit_softcapping", 30.0)),
    )


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    readout: Any = spec.readout
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **common(spec),
        **act_config(spec),
        **window_fields(spec),
        **scale_config(spec),
        "attention_bias": a.qkv_bias,
        "attn_logit_softcapping": a.cap,
        "final_logit_softcapping": readout.cap,
    }


GEMMA2 = Family("Gemma 2", ("gemma2",), spec, config, (*EMBEDDING, *ATTENTION, *NORMS, *FEEDFORWARD), tied=TIED, ignored=IGNORED, prefix="model.")
