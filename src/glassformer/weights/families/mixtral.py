"""Mixtral (arXiv 2401.04088): Llama's stack with a sparse mixture of experts in every block.

… post_attention_layernorm ─► gate ─► 2 of 8 experts (w1 gate, w3 up, w2 down) ─► + …
"""

from __future__ import annotations

from typing import Any

from glassformer.core.mask import Everything, Window
from glassformer.models import Block, Decoder
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm

from ..config import Config, rotary
from ..family import Family
from ..rules import Rule
from .llama import ATTENTION, EMBEDDING, IGNORED, LAYER, NORMS, TIED, act_name, act_named, attention, common, decoder, layers

MOE = f"{LAYER}.block_sparse_moe"
RULES = (
    *EMBEDDING,
    *ATTENTION,
    *NORMS,
    Rule("blocks.{i}.experts.router.weight", f"{MOE}.gate.weight"),
    Rule("blocks.{i}.experts.experts.{e}.gate_up.weight", f"{MOE}.experts.{{e}}.w1.weight", f"{MOE}.experts.{{e}}.w3.weight"),
    Rule("blocks.{i}.experts.experts.{e}.down.weight", f"{MOE}.experts.{{e}}.w2.weight"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    window, norm = c.whole("sliding_window", None), RMSNorm(eps=c.number("rms_norm_eps", 1e-5))
    for key in ("attention_bias", "mlp_bias"):
        c.only(key, False)
    expert = Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu"))
    experts = Experts(c.whole("num_local_experts", 8), c.whole("num_experts_per_tok", 2), expert)
    block = Block(attention(c, rotary(c, base=1e6), mask=Window(window) if window else Everything()), experts, norm=norm)
    return decoder(c, (block,) * layers(c), final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    experts: Any = block.feedforward
    sizes = {"intermediate_size": experts.expert.d_ff, "num_local_experts": experts.n_experts, "num_experts_per_tok": experts.top_k}
    more = {"hidden_act": act_name(experts.expert.act), "sliding_window": getattr(block.attention.mask, "size", None)}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **common(spec), **sizes, **more}


MIXTRAL = Family("Mixtral", ("mixtral",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
