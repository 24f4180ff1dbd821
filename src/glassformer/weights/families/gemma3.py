"""Gemma 3 (arXiv 2503.19786), its text half: five layers that see a window and turn fast, then one that sees all and turns slowly; norms on queries and keys.

A file of the whole model holds it inside:

    config.json   text_config ─► this          vision_config, image tokens: left out
    tensors       language_model.… ─► this     vision_tower.…, multi_modal_projector.…: left out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glassformer.core.mask import Window
from glassformer.models import Block, Decoder
from glassformer.parts.embed import Embedding, SqrtWidth
from glassformer.parts.feedforward import Gated
from glassformer.parts.readout import LanguageModel
from glassformer.parts.rotary import Rotary
from glassformer.parts.wiring import Sandwich

from ..config import Config, rotary, rotary_config
from ..family import Family
from ..rules import Rule
from .gemma import act_config, act_of, causal_only, norm_of
from .gemma2 import NORMS, scale_config, scale_of
from .llama import ATTENTION, EMBEDDING, FEEDFORWARD, IGNORED, TIED, attention, common, decoder, layers, window_fields, windows
from .qwen3 import QK_NORM

GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0
TEXT = (*EMBEDDING, *ATTENTION, *QK_NORM, *NORMS, *FEEDFORWARD)
# Files of the whole model put it elsewhere, the published ones in one place, newer programs in another.
INSIDE = (
    Rule("readout.matrix", "language_model.lm_head.weight"),
    *(
        Rule(rule.ours, *(place + name.removeprefix("model.") for name in rule.theirs))
        for place in ("language_model.model.", "model.language_model.")
        for rule in TEXT
        if rule.theirs != ("lm_head.weight",)
    ),
)


def positions(c: Config) -> dict[str, Rotary]:
    """The rotation of each kind of layer: a table for each, or (always so in older files) one of those that see all, with the others' base beside it."""
    bases = {"full_attention": c.number("rope_theta", GLOBAL_BASE), "sliding_attention": c.number("rope_local_base_freq", LOCAL_BASE)}
    given = c("rope_parameters", None) or c("rope_scaling", {})
    c.ignore("rope_scaling")
    tables = given if isinstance(given, Mapping) and given.keys() & bases.keys() else {"full_attention": given}
    one = lambda kind: c.values | {"rope_theta": bases[kind], "rope_parameters": tables.get(kind) or {}, "rope_scaling": None}
    return {kind: rotary(Config(one(kind), c.file)) for kind in bases}


def whole(c: Config) -> Decoder:
    """From the config.json of a whole model, text and images."""
    inner = c.inner("text_config")
    inner.values |= {"tie_word_embeddings": c("tie_word_embeddings", inner.values.get("tie_word_embeddings", True))}
    c.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id", "vocab_size", "hidden_size")
    made = text(inner)
    inner.finish()
    return made


def text(c: Config) -> Decoder:
    """From the config.json of the text half."""
    c.defaults(vocab_size=262_208, hidden_size=2_304, intermediate_size=9_216, num_hidden_layers=26)
    c.defaults(num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    c.ignore("cache_implementation")
    causal_only(c)
    c.only("attn_logit_softcapping", None)
    norm, biased, size, n = norm_of(c), c.flag("attention_bias", False), c.nullable("sliding_window", 4_096), layers(c)
    every = c("sliding_window_pattern", c("_sliding_window_pattern", 6))
    kinds = c("layer_types", None) or ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    turns = positions(c)
    block = Block(
        attention(c, turns["full_attention"], qk_norm=norm, scale=scale_of(c, c("head_dim")), qkv_bias=biased, out_bias=biased),
        Gated(c.whole("intermediate_size"), act=act_of(c)),
        norm=norm,
        wiring=Sandwich(),
    )
    blocks = [block.at("attention.mask").set(mask) for mask in windows(c, kinds, size)]
    return decoder(
        c,
        [b.at("attention.position").set(turns[kind]) for b, kind in zip(blocks, kinds, strict=True)],
        final_norm=norm,
        embedding=Embedding(scale=SqrtWidth()),
        tied=True,
        readout=LanguageModel(cap=c.nullable("final_logit_softcapping", None)),
    )


def spec(c: Config) -> Decoder:
    """From config.json, of the text half or of the whole."""
    return whole(c) if "text_config" in c.values else text(c)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json, of the text half."""
    attentions: list[Any] = [b.attention for b in spec.blocks]
    readout: Any = spec.readout
    local = next((a.position for a in attentions if isinstance(a.mask, Window)), Rotary(base=LOCAL_BASE))
    wide = next((a.position for a in attentions if not isinstance(a.mask, Window)), Rotary(base=GLOBAL_BASE))
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **common(spec),
        **act_config(spec),
        **window_fields(spec),
        **scale_config(spec),
        "rope_parameters": {"full_attention": rotary_config(wide), "sliding_attention": rotary_config(local)},
        "rope_theta": wide.base,
        "rope_local_base_freq": local.base,
        "attention_bias": attentions[0].qkv_bias,
        "final_logit_softcapping": readout.cap,
    }


GEMMA3 = Family(
    "Gemma 3",
    ("gemma3_text", "gemma3"),
    spec,
    config,
    (*TEXT, *INSIDE),
    tied=TIED | {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    ignored=IGNORED,
    unused=("vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*", "model.multi_modal_projector.*"),
    prefix="model.",
)
