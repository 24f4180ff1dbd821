"""GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): attention and feed-forward side by side, a quarter of each head turned.

The rows of the fused projection go head by head: q, k, v of head 0, then of head 1, …
"""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm
from glassformer.parts.wiring import Parallel, PreNorm

from ..config import Config, context_config, rotary, rotary_config
from ..family import Family
from ..rules import PerHead, Rule
from .llama import act_name, act_named, no_pair

H = "gpt_neox.layers.{i}"
RULES = (
    Rule("embed.weight", "gpt_neox.embed_in.weight"),
    Rule("final_norm.{w}", "gpt_neox.final_layer_norm.{w}"),
    Rule("readout.matrix", "embed_out.weight"),
    Rule("readout.matrix", "lm_head.weight"),  # as some programs name it
    Rule("blocks.{i}.norm1.{w}", f"{H}.input_layernorm.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{H}.post_attention_layernorm.{{w}}"),
    Rule("blocks.{i}.attn.qkv.{w}", f"{H}.attention.query_key_value.{{w}}", form=PerHead()),
    Rule("blocks.{i}.attn.out.{w}", f"{H}.attention.dense.{{w}}"),
    Rule("blocks.{i}.ffn.up.{w}", f"{H}.mlp.dense_h_to_4h.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{H}.mlp.dense_4h_to_h.{{w}}"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm = LayerNorm(eps=c.number("layer_norm_eps", 1e-5))
    position = rotary(c, base=c.number("rotary_emb_base", 10_000.0), fraction=c.number("rotary_pct", 0.25))
    biased = c.flag("attention_bias", True)
    no_pair(c)
    block = Block(
        Attention(c.whole("num_attention_heads"), position=position, qkv_bias=biased, out_bias=biased),
        Plain(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "gelu"), bias=True),
        norm=norm,
        wiring=Parallel(norms=2) if c.flag("use_parallel_residual", True) else PreNorm(),
    )
    blocks = (block,) * c.whole("num_hidden_layers")
    return Decoder(c.whole("vocab_size"), c.whole("hidden_size"), blocks, final_norm=norm, tied=c.flag("tie_word_embeddings", False))


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    a, f, norm = block.attention, block.feedforward, block.norm
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": a.n_heads,
        "intermediate_size": f.d_ff,
        "hidden_act": act_name(f.act),
        "layer_norm_eps": norm.eps,
        "attention_bias": a.qkv_bias,
        "use_parallel_residual": isinstance(block.wiring, Parallel),
        "tie_word_embeddings": spec.tied,
        "rotary_pct": a.position.fraction,
        "rotary_emb_base": a.position.base,
        "rope_parameters": rotary_config(a.position) | {"partial_rotary_factor": a.position.fraction},
        **context_config(a.position),
    }


NEOX = Family(
    "GPT-NeoX",
    ("gpt_neox",),
    spec,
    config,
    RULES,
    tied={"embed_out.weight": "gpt_neox.embed_in.weight", "lm_head.weight": "gpt_neox.embed_in.weight"},
    ignored=(f"{H}.attention.bias", f"{H}.attention.masked_bias", "*.rotary_emb.inv_freq"),
    prefix="gpt_neox.",
)
