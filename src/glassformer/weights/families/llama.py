"""Llama 1 to 3.3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what its many descendants share.

model.embed_tokens ─► [ input_layernorm ─► q k v ─► rotary ─► o ─► + ─► post_attention_layernorm ─► gate up down ─► + ] ─► model.norm ─► lm_head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Mask, Window
from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import ACTIVATIONS, FeedForward, Gated
from glassformer.parts.norm import RMSNorm
from glassformer.parts.rotary import Rotary

from ..config import Config, context_config, rotary, rotary_config
from ..family import Family
from ..rules import Rule

ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}
"""Activations by their names in a config.json."""
ACT_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def act_named(c: Config, key: str, default: str) -> str:
    """Our name of the activation that the config asks for."""
    name = c(key, default)
    if name not in ACTS and name not in ACTIVATIONS:
        raise WeightsError(f"{c.file}: {key} is {name!r}, which is no activation known here: {', '.join(ACTS)}.")
    return ACTS.get(name, name)


def act_name(act: str) -> str:
    """The name of one of our activations in a config.json."""
    return ACT_NAMES.get(act, act)


# What Llama-like decoders have in common


def attention(c: Config, position: Any, **more: Any) -> Attention:
    """Heads, groups and sizes by their usual names."""
    n = c.whole("num_attention_heads")
    return Attention(n, n_kv_heads=c.whole("num_key_value_heads", n), d_head=c.whole("head_dim", c.whole("hidden_size") // n), position=position, **more)


def no_pair(c: Config) -> None:
    """Raise :class:`WeightsError` if the stack reads the states of another one."""
    c.only("add_cross_attention", False)
    c.ignore("is_decoder")  # a decoder without a pair says either


def decoder(c: Config, blocks: Sequence[Block], **more: Any) -> Decoder:
    """The stack around blocks, with the usual names; ``tie_word_embeddings`` is off unless ``tied`` says otherwise."""
    named = c.values.get("architectures") or []
    head = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "ForCausalLM"
    if not head.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise WeightsError(f"{c.file}: {head[:60]} is not a language model: of decoders only those that predict the next token (...ForCausalLM) are supported.")
    tied = c.flag("tie_word_embeddings", more.pop("tied", False))
    no_pair(c)
    return Decoder(c.whole("vocab_size"), c.whole("hidden_size"), tuple(blocks), tied=tied, **more)


def layers(c: Config) -> int:
    """How many blocks."""
    n: int = c.whole("num_hidden_layers")
    return n


def windows(c: Config, kinds: Sequence[str], size: int | None) -> list[Mask]:
    """The mask of each layer from ``layer_types``: ``sliding_attention`` sees ``size`` places, ``full_attention`` all."""
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise WeightsError(f"{c.file}: layer_types holds {kind!r}, but only 'full_attention' and 'sliding_attention' are supported.")
    if len(kinds) != layers(c):
        raise WeightsError(f"{c.file}: layer_types names {len(kinds)} layers, but num_hidden_layers is {layers(c)}.")
    return [Window(size) if kind == "sliding_attention" and size else Everything() for kind in kinds]


def common(spec: Decoder) -> dict[str, Any]:
    """The way back: the fields that all Llama-like configs share."""
    a: Any = spec.blocks[0].attention
    f = spec.blocks[0].feedforward
    n, g, k, _ = a.sizes(spec.d_model)
    made = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": n,
        "num_key_value_heads": g,
        "head_dim": k,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": getattr(spec.final_norm, "eps", 1e-6),
    }
    if isinstance(a.position, Rotary):
        made["rope_parameters"] = rotary_config(a.position)
        made["rope_theta"] = a.position.base
        made |= context_config(a.position)
    if isinstance(f, FeedForward) and hasattr(f, "act") and hasattr(f, "d_ff"):
        made |= {"intermediate_size": f.d_ff, "hidden_act": act_name(f.act)}
    return made


def window_fields(spec: Decoder) -> dict[str, Any]:
    """``layer_types`` and ``sliding_window`` from the blocks' masks."""
    masks = [b.attention.mask for b in spec.blocks]
    sizes = [m.size for m in masks if isinstance(m, Window)]
    kinds = ["sliding_attention" if isinstance(m, Window) else "full_attention" for m in masks]
    return {"layer_types": kinds, "sliding_window": sizes[0] if sizes else None}


LAYER = "model.layers.{i}"
EMBEDDING = (Rule("embed.weight", "model.embed_tokens.weight"), Rule("final_norm.weight", "model.norm.weight"), Rule("readout.matrix", "lm_head.weight"))
ATTENTION = (
    Rule("blocks.{i}.attn.qkv.{w}", f"{LAYER}.self_attn.q_proj.{{w}}", f"{LAYER}.self_attn.k_proj.{{w}}", f"{LAYER}.self_attn.v_proj.{{w}}"),
    Rule("blocks.{i}.attn.out.{w}", f"{LAYER}.self_attn.o_proj.{{w}}"),
)
NORMS = (Rule("blocks.{i}.norm1.weight", f"{LAYER}.input_layernorm.weight"), Rule("blocks.{i}.norm2.weight", f"{LAYER}.post_attention_layernorm.weight"))
FEEDFORWARD = (
    Rule("blocks.{i}.ffn.gate_up.{w}", f"{LAYER}.mlp.gate_proj.{{w}}", f"{LAYER}.mlp.up_proj.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{LAYER}.mlp.down_proj.{{w}}"),
)
RULES = (*EMBEDDING, *ATTENTION, *NORMS, *FEEDFORWARD)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = ("*.rotary_emb.inv_freq",)


# Llama itself


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm = RMSNorm(eps=c.number("rms_norm_eps", 1e-6))
    c.only("rope_interleaved", False)
    c.only("use_sliding_window", False)
    if "use_sliding_window" in c.values:
        c.ignore("sliding_window", "max_window_layers")  # of a window that is not used
    biased = c.flag("attention_bias", False)
    block = Block(
        attention(c, rotary(c), qkv_bias=biased, out_bias=biased),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu"), bias=c.flag("mlp_bias", False)),
        norm=norm,
    )
    return decoder(c, (block,) * layers(c), final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    biases = {"attention_bias": block.attention.qkv_bias, "mlp_bias": block.feedforward.bias}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common(spec), **biases}


LLAMA = Family("Llama", ("llama",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")
