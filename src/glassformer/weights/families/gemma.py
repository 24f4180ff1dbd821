"""Gemma (arXiv 2403.08295): Llama with embeddings scaled by the root of their width, norms that store their weight less 1, GeGLU; and what all Gemmas share."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.embed import Embedding, SqrtWidth
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from .llama import ACTS, IGNORED, RULES, TIED, act_named, attention, common, decoder, layers


def norm_of(c: Config) -> RMSNorm:
    """``(1 + weight) x / rms(x)``, multiplied before it returns to the input's type."""
    return RMSNorm(eps=c.number("rms_norm_eps", 1e-6), offset=1.0, cast="late")


def act_of(c: Config) -> str:
    """The activation, under its two names. Gemma's first files say ``gelu`` and mean its approximation by tanh."""
    c.ignore("hidden_act")
    if c("hidden_activation", None) is not None:
        return act_named(c, "hidden_activation", "gelu_pytorch_tanh")
    return {"gelu": "gelu_tanh"}.get(c.values.get("hidden_act") or "gelu", act_named(c, "hidden_act", "gelu_pytorch_tanh"))


def causal_only(c: Config) -> None:
    """Refuse what makes an encoder of it."""
    c.only("use_bidirectional_attention", False)


def act_config(spec: Decoder) -> dict[str, Any]:
    """The activation under both names."""
    feedforward: Any = spec.blocks[0].feedforward
    name = next(theirs for theirs in ("gelu_pytorch_tanh", *ACTS) if ACTS.get(theirs) == feedforward.act)
    return {"hidden_act": name, "hidden_activation": name}


def spec(c: Config) -> Decoder:
    """From config.json."""
    c.defaults(head_dim=256)
    causal_only(c)
    norm, biased = norm_of(c), c.flag("attention_bias", False)
    block = Block(attention(c, rotary(c), qkv_bias=biased, out_bias=biased), Gated(c.whole("intermediate_size"), act=act_of(c)), norm=norm)
    return decoder(c, (block,) * layers(c), final_norm=norm, embedding=Embedding(scale=SqrtWidth()), tied=True)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **common(spec), **act_config(spec), "attention_bias": a.qkv_bias}


GEMMA = Family("Gemma", ("gemma",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
