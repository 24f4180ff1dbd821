"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): latent attention, dense blocks first, then shared and routed experts.

V2   scores = softmax, groups judged by their best expert, rotary pairs side by side
V3   scores = sigmoid, chosen with a correction, groups judged by their best two, divided by their sum

kv_a_proj_with_mqa [(r + rope) d] = kv_down      kv_b_proj [h (nope + v) r] = kv_up      q_a_proj, q_b_proj = q_down, q_up
"""

from __future__ import annotations

import math
from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated
from glassformer.parts.latent import LatentAttention
from glassformer.parts.norm import RMSNorm
from glassformer.parts.rotary import YaRNScaling
from glassformer.parts.routing import Grouping, Groups, Routing, SigmoidRouting, SoftmaxRouting, Ungrouped

from ..config import Config, magnitude, rotary, rotary_config
from ..family import Family, Variant
from ..rules import Rule
from .llama import EMBEDDING, FEEDFORWARD, IGNORED, LAYER, NORMS, TIED, act_name, act_named, decoder, layers
from .qwen3_moe import EXPERTS

ATTN, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
RULES = (
    *EMBEDDING,
    *NORMS,
    *FEEDFORWARD,
    *EXPERTS,
    Rule("blocks.{i}.experts.routing.correction", f"{MLP}.gate.e_score_correction_bias"),
    Rule("blocks.{i}.experts.shared.gate_up.{w}", f"{MLP}.shared_experts.gate_proj.{{w}}", f"{MLP}.shared_experts.up_proj.{{w}}"),
    Rule("blocks.{i}.experts.shared.down.{w}", f"{MLP}.shared_experts.down_proj.{{w}}"),
    Rule("blocks.{i}.attn.q.weight", f"{ATTN}.q_proj.weight"),
    Rule("blocks.{i}.attn.q_down.{w}", f"{ATTN}.q_a_proj.{{w}}"),
    Rule("blocks.{i}.attn.q_norm.weight", f"{ATTN}.q_a_layernorm.weight"),
    Rule("blocks.{i}.attn.q_up.weight", f"{ATTN}.q_b_proj.weight"),
    Rule("blocks.{i}.attn.kv_down.{w}", f"{ATTN}.kv_a_proj_with_mqa.{{w}}"),
    Rule("blocks.{i}.attn.kv_norm.weight", f"{ATTN}.kv_a_layernorm.weight"),
    Rule("blocks.{i}.attn.kv_up.weight", f"{ATTN}.kv_b_proj.weight"),
    Rule("blocks.{i}.attn.out.{w}", f"{ATTN}.o_proj.{{w}}"),
)


# From config.json


def spec_v2(c: Config) -> Decoder:
    """DeepSeek-V2, V2-Lite."""
    method = c.only("topk_method", "greedy", "group_limited_greedy")
    c.only("scoring_func", "softmax")
    c.only("norm_topk_prob", False)  # the reference divides only where it does not scale
    groups: Grouping = Ungrouped()
    if method == "group_limited_greedy":
        groups = Groups(c.whole("n_group"), c.whole("topk_group"))
    c.ignore("n_group", "topk_group")
    return _decoder(c, SoftmaxRouting(wide=True, groups=groups, scale=c.number("routed_scaling_factor", 1.0)), "interleaved", False, c.flag("mlp_bias", False))


def spec_v3(c: Config) -> Decoder:
    """DeepSeek-V3, R1. The extra layer that predicts a second token is no part of it."""
    c.only("topk_method", "noaux_tc")
    c.only("scoring_func", "sigmoid")
    c.ignore("num_nextn_predict_layers", "num_mtp_layers")
    n, keep = c.whole("n_group", 1), c.whole("topk_group", 1)
    groups = Groups(n, keep, best=2) if n > 1 else Ungrouped()
    layout = "interleaved" if c.flag("rope_interleave", True) else "half"
    return _decoder(c, SigmoidRouting(wide=True, groups=groups, scale=c.number("routed_scaling_factor", 2.5)), layout, c.flag("norm_topk_prob", True), False)


def _decoder(c: Config, routing: Routing, layout: str, normalise: bool, bias: bool) -> Decoder:
    norm, act = RMSNorm(eps=c.number("rms_norm_eps", 1e-6)), act_named(c, "hidden_act", "silu")
    c.only("moe_layer_freq", 1)
    c.ignore("ep_size", "head_dim", "qk_head_dim", "intermediate_size", "n_shared_experts")  # sizes that follow from others, or are read where they are needed
    heads, width = _attention(c, layout), c.whole("moe_intermediate_size")
    shared = c("n_shared_experts", 0)
    experts = Experts(
        c.whole("n_routed_experts"),
        c.whole("num_experts_per_tok"),
        Gated(width, act=act),
        normalise=normalise,
        routing=routing,
        shared=Gated(width * shared, act=act, bias=bias) if shared else None,
    )
    n, first = layers(c), c("first_k_dense_replace", 0)
    blocks = [Block(heads, experts if i >= first else Gated(c.whole("intermediate_size"), act=act, bias=bias), norm=norm) for i in range(n)]
    return decoder(c, blocks, final_norm=norm)


def _attention(c: Config, layout: str) -> LatentAttention:
    h, biased, position = c.whole("num_attention_heads"), c.flag("attention_bias", False), rotary(c, layout=layout)
    c.only("num_key_value_heads", h)  # every head has keys of its own, all made from one latent
    nope, rope = c.whole("qk_nope_head_dim"), c.whole("qk_rope_head_dim")
    given = c("rope_parameters", None) or c("rope_scaling", {})
    all_dim = given.get("mscale_all_dim") or 0.0
    factor = position.scaling.factor if isinstance(position.scaling, YaRNScaling) else 1.0
    return LatentAttention(
        h,
        kv_lora_rank=c.whole("kv_lora_rank"),
        d_nope=nope,
        d_rope=rope,
        d_value=c.whole("v_head_dim"),
        q_lora_rank=c.whole("q_lora_rank", None),
        position=position,
        scale=scale_of(factor, float(all_dim), nope + rope) if all_dim else None,
        down_bias=biased,
        out_bias=biased,
    )


def scale_of(factor: float, all_dim: float, d_head: int) -> float:
    """The factor on scores: ``m^2 / sqrt(d_head)`` with YaRN's magnitude ``m = 0.1 all_dim ln(factor) + 1``."""
    m = magnitude(factor, all_dim)
    return d_head**-0.5 * m * m


# To config.json


def _config(spec: Decoder) -> dict[str, Any]:
    a: Any = spec.blocks[0].attention
    experts: Any = next(b.feedforward for b in spec.blocks if isinstance(b.feedforward, Experts))
    dense: list[Any] = [b.feedforward for b in spec.blocks if not isinstance(b.feedforward, Experts)]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.n_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.d_nope,
        "qk_rope_head_dim": a.d_rope,
        "v_head_dim": a.d_value,
        "attention_bias": a.down_bias,
        "rope_parameters": _rope(a),
        "rope_theta": a.position.base,
        "rms_norm_eps": spec.blocks[0].norm.eps,  # type: ignore[attr-defined]
        "tie_word_embeddings": spec.tied,
        "hidden_act": act_name(experts.expert.act),
        "intermediate_size": dense[0].d_ff if dense else experts.expert.d_ff * experts.top_k,
        "first_k_dense_replace": len(dense),
        "moe_intermediate_size": experts.expert.d_ff,
        "n_routed_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "n_shared_experts": experts.shared.d_ff // experts.expert.d_ff if experts.shared else 0,
        "routed_scaling_factor": experts.routing.scale,
    }


def _rope(a: LatentAttention) -> dict[str, Any]:
    """The rotary fields, with the magnitude that the scale of the scores was made with."""
    position: Any = a.position
    made = rotary_config(position)
    if a.scale is None:
        return made
    factor, d = position.scaling.factor, a.d_nope + a.d_rope
    exact = (math.sqrt(a.scale * math.sqrt(d)) - 1.0) / (0.1 * math.log(factor))
    all_dim = next((x for x in (round(exact, 6), exact) if scale_of(factor, x, d) == a.scale), exact)
    if made.get("attention_factor") == 1.0:  # a ratio of one: said as other programs read it
        del made["attention_factor"]
        made["mscale"] = all_dim
    return made | {"mscale_all_dim": all_dim}


def config_v2(spec: Decoder) -> dict[str, Any]:
    """DeepSeek-V2."""
    experts: Any = spec.blocks[-1].feedforward
    groups = experts.routing.groups
    limited: dict[str, Any] = {"topk_method": "greedy"}
    if isinstance(groups, Groups):
        limited = {"topk_method": "group_limited_greedy", "n_group": groups.n, "topk_group": groups.keep}
    more = {"norm_topk_prob": experts.normalise, "mlp_bias": bool(experts.shared) and experts.shared.bias}
    return {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **_config(spec), **limited, **more}


def config_v3(spec: Decoder) -> dict[str, Any]:
    """DeepSeek-V3."""
    experts: Any = spec.blocks[-1].feedforward
    position: Any = spec.blocks[0].attention.position  # type: ignore[attr-defined]
    groups = experts.routing.groups
    n, keep = (groups.n, groups.keep) if isinstance(groups, Groups) else (1, 1)
    more = {"n_group": n, "topk_group": keep, "norm_topk_prob": experts.normalise, "rope_interleave": position.layout == "interleaved"}
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **_config(spec), **more}


MOST_AHEAD = 8


def ahead(spec: Decoder) -> Variant:
    """The layers that predict a second token and further ones: the published files hold them after those of the model (V3: layer 61, the 62nd)."""
    n = len(spec.blocks)
    return Variant(unused=tuple(f"model.layers.{i}.*" for i in range(n, n + MOST_AHEAD)))


V2 = Family("DeepSeek-V2", ("deepseek_v2",), spec_v2, config_v2, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
V3 = Family("DeepSeek-V3", ("deepseek_v3",), spec_v3, config_v3, RULES, tied=TIED, ignored=IGNORED, prefix="model.", by_spec=ahead)
