"""Mistral (arXiv 2310.06825): Llama whose layers see a window, all of them or none."""

from __future__ import annotations

from typing import Any

from glassformer.core.mask import Everything, Window
from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from .llama import IGNORED, RULES, TIED, act_named, attention, common, decoder, layers, window_fields


def windowed(c: Config, size: int | None, eps: float) -> Decoder:
    """The whole stack of a Llama whose layers all see ``size`` places, or everything where it is None; ``eps``: of the norms, where the file does not say."""
    norm = RMSNorm(eps=c.number("rms_norm_eps", eps))
    for key in ("attention_bias", "mlp_bias"):
        c.only(key, False)
    block = Block(
        attention(c, rotary(c), mask=Everything() if size is None else Window(size)),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu")),
        norm=norm,
    )
    return decoder(c, (block,) * layers(c), final_norm=norm)


def spec(c: Config) -> Decoder:
    """From config.json."""
    return windowed(c, c.nullable("sliding_window", 4_096), 1e-6)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    size = window_fields(spec)["sliding_window"]
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **common(spec), "sliding_window": size}


MISTRAL = Family("Mistral", ("mistral",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
