"""GPT-2 (Radford et al. 2019): learned positions, layer norms, matrices stored input by output."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm
from glassformer.parts.position import Learned

from ..config import Config
from ..family import Family
from ..rules import Rule, Transposed
from .llama import act_named, no_pair

H = "transformer.h.{i}"
RULES = (
    Rule("embed.weight", "transformer.wte.weight"),
    Rule("position.table", "transformer.wpe.weight"),
    Rule("final_norm.{w}", "transformer.ln_f.{w}"),
    Rule("readout.matrix", "lm_head.weight"),
    Rule("blocks.{i}.norm1.{w}", f"{H}.ln_1.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{H}.ln_2.{{w}}"),
    Rule("blocks.{i}.attn.qkv.{w}", f"{H}.attn.c_attn.{{w}}", form=Transposed()),
    Rule("blocks.{i}.attn.out.{w}", f"{H}.attn.c_proj.{{w}}", form=Transposed()),
    Rule("blocks.{i}.ffn.up.{w}", f"{H}.mlp.c_fc.{{w}}", form=Transposed()),
    Rule("blocks.{i}.ffn.down.{w}", f"{H}.mlp.c_proj.{{w}}", form=Transposed()),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    d, n = c.whole("n_embd"), c.whole("n_head")
    norm = LayerNorm(eps=c.number("layer_norm_epsilon", 1e-5))
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    no_pair(c)
    c.ignore("reorder_and_upcast_attn")  # another order of the same arithmetic
    c.ignore("predict_special_tokens", "n_special")  # of the first program; no class reads them
    c.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")  # of a head for multiple choice
    block = Block(
        Attention(n, qkv_bias=True, out_bias=True),
        Plain(c.whole("n_inner", 4 * d), act=act_named(c, "activation_function", "gelu_new"), bias=True),
        norm=norm,
    )
    tied = c.flag("tie_word_embeddings", True)
    blocks = (block,) * c.whole("n_layer")
    return Decoder(c.whole("vocab_size"), d, blocks, final_norm=norm, tied=tied, position=Learned(c.whole("n_positions", 1_024)))


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    position: Any = spec.position
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.d_model,
        "n_layer": len(spec.blocks),
        "n_head": block.attention.n_heads,
        "n_inner": block.feedforward.d_ff,
        "n_positions": position.max_positions,
        "layer_norm_epsilon": block.norm.eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(block.feedforward.act, block.feedforward.act),
        "tie_word_embeddings": spec.tied,
    }


GPT2 = Family(
    "GPT-2",
    ("gpt2",),
    spec,
    config,
    RULES,
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),
    prefix="transformer.",
)
