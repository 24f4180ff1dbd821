"""GPT-J (Wang and Komatsuzaki 2021): one norm before attention and feed-forward side by side, neighbouring features turned in pairs."""

from __future__ import annotations

import math
from typing import Any

from glassformer.core.errors import WeightsError
from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm
from glassformer.parts.readout import LanguageModel
from glassformer.parts.rotary import Rotary
from glassformer.parts.wiring import Parallel

from ..config import Config
from ..family import Family
from ..rules import Rule
from .llama import act_named, no_pair

H = "transformer.h.{i}"
RULES = (
    Rule("embed.weight", "transformer.wte.weight"),
    Rule("final_norm.{w}", "transformer.ln_f.{w}"),
    Rule("readout.matrix", "lm_head.weight"),
    Rule("readout.bias", "lm_head.bias"),
    Rule("blocks.{i}.norm1.{w}", f"{H}.ln_1.{{w}}"),
    Rule("blocks.{i}.attn.qkv.weight", f"{H}.attn.q_proj.weight", f"{H}.attn.k_proj.weight", f"{H}.attn.v_proj.weight"),
    Rule("blocks.{i}.attn.out.weight", f"{H}.attn.out_proj.weight"),
    Rule("blocks.{i}.ffn.up.{w}", f"{H}.mlp.fc_in.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{H}.mlp.fc_out.{{w}}"),
)


def fraction_of(turned: int, k: int) -> float:
    """The fraction of ``k`` features that is exactly ``turned`` of them, rounded down."""
    f = turned / k
    return f if int(f * k) == turned else math.nextafter(f, 1.0)


def spec(c: Config) -> Decoder:
    """From config.json."""
    d, n = c.whole("n_embd"), c.whole("n_head")
    turned, k = c.whole("rotary_dim", 64), d // n
    if turned > k:
        raise WeightsError(f"{c.file}: rotary_dim is {turned}, but a head has {k} features (n_embd={d}, n_head={n}).")
    norm = LayerNorm(eps=c.number("layer_norm_epsilon", 1e-5))
    no_pair(c)
    for key in ("scale_attn_weights", "rotary"):
        c.only(key, True)
    c.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")  # of a head for multiple choice
    block = Block(
        Attention(n, position=Rotary(fraction=fraction_of(turned, k), layout="interleaved")),
        Plain(c.whole("n_inner", 4 * d), act=act_named(c, "activation_function", "gelu_new"), bias=True),
        norm=norm,
        wiring=Parallel(),
    )
    tied = c.flag("tie_word_embeddings", False)
    return Decoder(c.whole("vocab_size"), d, (block,) * c.whole("n_layer"), final_norm=norm, tied=tied, readout=LanguageModel(bias=True))


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.d_model,
        "n_layer": len(spec.blocks),
        "n_head": block.attention.n_heads,
        "n_inner": block.feedforward.d_ff,
        "rotary_dim": int(block.attention.position.fraction * (spec.d_model // block.attention.n_heads)),
        "layer_norm_epsilon": block.norm.eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(block.feedforward.act, block.feedforward.act),
        "tie_word_embeddings": spec.tied,
    }


GPTJ = Family(
    "GPT-J",
    ("gptj",),
    spec,
    config,
    RULES,
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=(f"{H}.attn.bias", f"{H}.attn.masked_bias", f"{H}.attn.embed_positions"),
    prefix="transformer.",
)
