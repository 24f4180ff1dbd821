"""Qwen3-MoE (arXiv 2505.09388): normed queries and keys, and experts in the blocks that are not named dense.

… post_attention_layernorm ─┬─► gate ─► 8 of 128 experts ─► + …      most blocks
                            └─► one wide gated layer ─────► + …      mlp_only_layers, and all but every decoder_sparse_step-th
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
from .llama import ATTENTION, EMBEDDING, FEEDFORWARD, IGNORED, LAYER, NORMS, TIED, act_name, act_named, attention, common, decoder, layers

EXPERTS = (
    Rule("blocks.{i}.experts.router.weight", f"{LAYER}.mlp.gate.weight"),
    Rule("blocks.{i}.experts.experts.{e}.gate_up.weight", f"{LAYER}.mlp.experts.{{e}}.gate_proj.weight", f"{LAYER}.mlp.experts.{{e}}.up_proj.weight"),
    Rule("blocks.{i}.experts.experts.{e}.down.weight", f"{LAYER}.mlp.experts.{{e}}.down_proj.weight"),
)
QK_NORMS = (
    Rule("blocks.{i}.attn.q_norm.weight", f"{LAYER}.self_attn.q_norm.weight"),
    Rule("blocks.{i}.attn.k_norm.weight", f"{LAYER}.self_attn.k_norm.weight"),
)
RULES = (*EMBEDDING, *ATTENTION, *QK_NORMS, *NORMS, *FEEDFORWARD, *EXPERTS)


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm, act, biased = RMSNorm(eps=c.number("rms_norm_eps", 1e-6)), act_named(c, "hidden_act", "silu"), c.flag("attention_bias", False)
    window = c.whole("sliding_window", None) if c.flag("use_sliding_window", False) else None
    c.ignore("sliding_window", "max_window_layers", "intermediate_size")
    c.only("use_qk_norm", True)
    c.only("qkv_bias", False)
    c.only("mlp_bias", False)
    c.only("shared_expert_intermediate_size", 0)  # of an expert that every token would go through
    n = layers(c)
    heads = attention(c, rotary(c), qk_norm=norm, qkv_bias=biased, out_bias=biased, mask=Window(window) if window else Everything())
    count = c.whole("num_local_experts", None) or c.whole("num_experts", 128)
    c.ignore("num_experts")
    experts = Experts(
        count,
        c.whole("num_experts_per_tok", 8),
        Gated(c.whole("moe_intermediate_size", 768), act=act),
        normalise=c.flag("norm_topk_prob", False),
    )
    step, dense = c.whole("decoder_sparse_step", 1), set(c("mlp_only_layers", ()))
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(n)]
    blocks = [Block(heads, experts if s else Gated(c.whole("intermediate_size"), act=act), norm=norm) for s in sparse]
    return decoder(c, blocks, final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    a: Any = spec.blocks[0].attention
    experts: Any = next(b.feedforward for b in spec.blocks if isinstance(b.feedforward, Experts))
    dense: list[Any] = [b.feedforward for b in spec.blocks if not isinstance(b.feedforward, Experts)]
    window = getattr(a.mask, "size", None)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **common(spec),
        "hidden_act": act_name(experts.expert.act),
        "intermediate_size": dense[0].d_ff if dense else experts.expert.d_ff * experts.top_k,
        "moe_intermediate_size": experts.expert.d_ff,
        "num_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, b in enumerate(spec.blocks) if not isinstance(b.feedforward, Experts)],
        "attention_bias": a.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


QWEN3_MOE = Family("Qwen3-MoE", ("qwen3_moe",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
