"""ModernBERT (arXiv 2412.13663): pre-norm, rotary with two bases, most layers local, gated feed-forward, hardly a bias.

    tok_embeddings ─► norm ─► [ (attn_norm) ─► Wqkv ─► rotary ─► Wo ─► + ─► mlp_norm ─► Wi ─► act(first half) * second ─► Wo ─► + ] ─► final_norm
        ─► head: dense ─► act ─► norm ─┬─► decoder                              ForMaskedLM
                                       ├─► classifier (of the pooled states)    ForSequenceClassification
                                       └─► classifier                           ForTokenClassification

The first layer's attention reads the embedding's norm as it is, without one of its own. Layers are ``full_attention`` (the global base) or
``sliding_attention`` (the local base; a position sees ``local_attention // 2`` others on either side).
"""

from __future__ import annotations

from typing import Any

from glassformer.core.mask import Everything, Window
from glassformer.models import Block, Encoder
from glassformer.models.init import BERT_INIT
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import LayerNorm
from glassformer.parts.readout import Classifier, Dense, First, LanguageModel, Mean, ReadOut, States, Tagger
from glassformer.parts.rotary import Rotary
from glassformer.parts.wiring import PreNorm

from ..config import Config, context_config, rotary, rotary_config
from ..family import Family, Variant
from ..rules import Rule
from .bert import NAMES, head, head_fields, n_classes, named, tied
from .llama import act_name, act_named, layers, windows

GLOBAL, LOCAL = 160_000.0, 10_000.0
POOLS: dict[str, Any] = {"cls": First(), "mean": Mean()}


def spec(c: Config) -> Encoder:
    """From config.json."""
    c.ignore("tie_word_embeddings", "deterministic_flash_attn")  # the first is read again by the one head that has such a table
    c.ignore("layer_norm_eps", "position_embedding_type")  # BERT's, which the published configs repeat and no class of this family reads
    n, d = layers(c), c.whole("hidden_size")
    norm = LayerNorm(eps=c.number("norm_eps", 1e-5), bias=c.flag("norm_bias", False))
    every = c.whole("global_attn_every_n_layers", 3)
    kinds = c("layer_types", ["sliding_attention" if i % every else "full_attention" for i in range(n)])
    bases = {"full_attention": c.number("global_rope_theta", GLOBAL), "sliding_attention": c.number("local_rope_theta", LOCAL)}
    turns = {kind: rotary(c, kind=kind, base=base) for kind, base in bases.items()}
    biased = c.flag("attention_bias", False)
    masks = windows(c, kinds, c.whole("local_attention", 128) // 2 + 1)  # a window counts the position itself
    inner = Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_activation", "gelu"), bias=c.flag("mlp_bias", False))
    blocks = []
    for i, (kind, mask) in enumerate(zip(kinds, masks, strict=True)):
        attention = Attention(c.whole("num_attention_heads"), position=turns[kind], mask=mask, qkv_bias=biased, out_bias=biased)
        blocks.append(Block(attention, inner, norm=norm, wiring=PreNorm() if i else PreNorm(bare=("attn",))))
    readout = _readout(c, norm)
    return Encoder(
        c.whole("vocab_size"),
        d,
        tuple(blocks),
        final_norm=norm,
        tied=tied(c, readout),
        embedding=Embedding(norm=norm),
        readout=readout,
        init=BERT_INIT,
    )


def _readout(c: Config, norm: LayerNorm) -> ReadOut:
    transform = Dense(act_named(c, "classifier_activation", "gelu"), norm, bias=c.flag("classifier_bias", False))
    pooling = c.only("classifier_pooling", *POOLS)
    readouts: dict[str, ReadOut] = {
        "ForMaskedLM": LanguageModel(bias=c.flag("decoder_bias", True), transform=transform),
        "ForSequenceClassification": Classifier(n_classes(c), pool=POOLS[pooling], transform=transform),
        "ForTokenClassification": Tagger(n_classes(c), transform=transform),
        "Model": States(),
    }
    return readouts[head(c, ("ModernBert",), tuple(readouts))]


def config(spec: Encoder) -> dict[str, Any]:
    """To config.json."""
    blocks: Any = spec.blocks
    first, readout = blocks[0], spec.readout
    windows = {isinstance(b.attention.mask, Window): b.attention for b in blocks}
    turns = {"full_attention": Rotary(base=GLOBAL), "sliding_attention": Rotary(base=LOCAL)}
    turns |= {"sliding_attention" if local else "full_attention": a.position for local, a in windows.items()}
    made: dict[str, Any] = {
        "model_type": "modernbert",
        **named(spec, "ModernBert", NAMES),
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": first.feedforward.d_ff,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attention.n_heads,
        "hidden_activation": act_name(first.feedforward.act),
        "norm_eps": first.norm.eps,
        "norm_bias": first.norm.bias,
        "attention_bias": first.attention.qkv_bias,
        "mlp_bias": first.feedforward.bias,
        "layer_types": ["full_attention" if isinstance(b.attention.mask, Everything) else "sliding_attention" for b in blocks],
        "local_attention": 2 * (windows[True].mask.size - 1) if True in windows else 128,
        "rope_parameters": {kind: rotary_config(turn) for kind, turn in turns.items()},
        **context_config(first.attention.position),
        **head_fields(spec),
    }
    transform = getattr(readout, "transform", None)
    if isinstance(transform, Dense):
        made |= {"classifier_activation": act_name(transform.act), "classifier_bias": transform.bias}
    if isinstance(readout, LanguageModel):
        made["decoder_bias"] = readout.bias
    if isinstance(readout, Classifier):
        made["classifier_pooling"] = {pool: name for name, pool in POOLS.items()}[readout.pool]
    return made


LAYER = "model.layers.{i}"
RULES = (
    Rule("embed.weight", "model.embeddings.tok_embeddings.weight"),
    Rule("embed.norm.{w}", "model.embeddings.norm.{w}"),
    Rule("blocks.{i}.norm1.{w}", f"{LAYER}.attn_norm.{{w}}"),
    Rule("blocks.{i}.attn.qkv.{w}", f"{LAYER}.attn.Wqkv.{{w}}"),
    Rule("blocks.{i}.attn.out.{w}", f"{LAYER}.attn.Wo.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{LAYER}.mlp_norm.{{w}}"),
    Rule("blocks.{i}.ffn.gate_up.{w}", f"{LAYER}.mlp.Wi.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{LAYER}.mlp.Wo.{{w}}"),
    Rule("final_norm.{w}", "model.final_norm.{w}"),
    Rule("readout.transform.linear.{w}", "head.dense.{w}"),
    Rule("readout.transform.norm.{w}", "head.norm.{w}"),
    Rule("readout.matrix", "decoder.weight"),
    Rule("readout.bias", "decoder.bias"),
    Rule("readout.linear.{w}", "classifier.{w}"),
)


def heads(spec: Encoder) -> Variant:
    """Which heads a file may hold beside the one that is asked for."""
    transform, matrix = ("head.dense.{w}", "head.norm.{w}"), ("decoder.{w}",)
    return Variant(unused=() if isinstance(spec.readout, LanguageModel) else transform + matrix if isinstance(spec.readout, States) else matrix)


MODERNBERT = Family(
    "ModernBERT",
    ("modernbert",),
    spec,
    config,
    RULES,
    tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    prefix="model.",
    by_spec=heads,
)
