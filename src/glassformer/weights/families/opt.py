"""OPT (arXiv 2205.01068): GPT-2 with ReLU, positions that begin at row 2; the 350m one has its norms after, and a table narrower than its stream."""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, LiftTokens, NoLift
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm, NoNorm
from glassformer.parts.position import Learned
from glassformer.parts.readout import Dense, LanguageModel
from glassformer.parts.wiring import PostNorm, PreNorm

from ..config import Config
from ..family import Family
from ..rules import Rule
from .llama import act_name, act_named, no_pair

D = "model.decoder"
H = f"{D}.layers.{{i}}"
RULES = (
    Rule("embed.weight", f"{D}.embed_tokens.weight"),
    Rule("embed.lift_tokens.weight", f"{D}.project_in.weight"),
    Rule("position.table", f"{D}.embed_positions.weight"),
    Rule("final_norm.{w}", f"{D}.final_layer_norm.{{w}}"),
    Rule("readout.transform.linear.weight", f"{D}.project_out.weight"),
    Rule("readout.matrix", "lm_head.weight"),
    Rule("blocks.{i}.norm1.{w}", f"{H}.self_attn_layer_norm.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{H}.final_layer_norm.{{w}}"),
    Rule("blocks.{i}.attn.qkv.{w}", f"{H}.self_attn.q_proj.{{w}}", f"{H}.self_attn.k_proj.{{w}}", f"{H}.self_attn.v_proj.{{w}}"),
    Rule("blocks.{i}.attn.out.{w}", f"{H}.self_attn.out_proj.{{w}}"),
    Rule("blocks.{i}.ffn.up.{w}", f"{H}.fc1.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{H}.fc2.{{w}}"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    d, before, biased = c.whole("hidden_size"), c.flag("do_layer_norm_before", True), c.flag("enable_bias", True)
    no_pair(c)
    for key, understood in {"layer_norm_elementwise_affine": True, "learned_embeddings": True, "scale_embeddings": False}.items():
        c.only(key, understood)
    no_final = c.flag("_remove_final_layer_norm", False)
    width = c.whole("word_embed_proj_dim", d)
    norm = LayerNorm(eps=1e-5)
    block = Block(
        Attention(c.whole("num_attention_heads"), qkv_bias=biased, out_bias=biased),
        Plain(c.whole("ffn_dim"), act=act_named(c, "activation_function", "relu"), bias=biased),
        norm=norm,
        wiring=PreNorm() if before else PostNorm(),
    )
    return Decoder(
        c.whole("vocab_size"),
        d,
        (block,) * c.whole("num_hidden_layers"),
        final_norm=norm if before and not no_final else NoNorm(),
        tied=c.flag("tie_word_embeddings", True),
        embedding=Embedding(lift=NoLift() if width == d else LiftTokens(width)),
        position=Learned(c.whole("max_position_embeddings", 2_048), offset=2),
        readout=LanguageModel(transform=None if width == d else Dense("identity", bias=False, width=width)),
    )


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    position: Any = spec.position
    before = isinstance(block.wiring, PreNorm)
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "word_embed_proj_dim": spec.embedding.lift.widths(spec.d_model)[0],
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": block.attention.n_heads,
        "ffn_dim": block.feedforward.d_ff,
        "activation_function": act_name(block.feedforward.act),
        "max_position_embeddings": position.max_positions,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and isinstance(spec.final_norm, NoNorm),
        "enable_bias": block.attention.qkv_bias,
        "tie_word_embeddings": spec.tied,
    }


OPT = Family("OPT", ("opt",), spec, config, RULES, tied={"lm_head.weight": f"{D}.embed_tokens.weight"}, prefix="model.")
