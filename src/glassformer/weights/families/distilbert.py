"""DistilBERT (arXiv 1910.01108): BERT's stack with half the blocks, no token types, and fields and tensors by names of its own.

states ─┬─► vocab_transform ─► act ─► vocab_layer_norm ─► vocab_projector    ForMaskedLM
        ├─► first ─► pre_classifier ─► relu ─► classifier                    ForSequenceClassification
        └─► classifier                                                       ForTokenClassification
"""

from __future__ import annotations

from typing import Any

from glassformer.models import Block, Encoder
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm
from glassformer.parts.position import Learned
from glassformer.parts.readout import Classifier, Dense, LanguageModel, ReadOut, States, Tagger
from glassformer.parts.wiring import PostNorm

from ..config import Config
from ..family import Family, Variant
from ..rules import Rule
from .bert import NAMES, encoder, head, head_fields, n_classes, named, norm_rules, plain_encoder
from .llama import act_name, act_named

NORM = LayerNorm(eps=1e-12)  # not a field of its config


def spec(c: Config) -> Encoder:
    """From config.json."""
    plain_encoder(c)
    # Sinusoids are what the table of positions starts from; it is stored, and read, as any other.
    c.ignore("sinusoidal_pos_embds", "tie_weights_")  # the second: written by old versions, read by none
    c.ignore("layer_norm_eps")  # BERT's, which files made from it repeat; the norms of this one have an epsilon that no field says
    act = act_named(c, "activation", "gelu")
    block = Block(Attention(c.whole("n_heads"), qkv_bias=True, out_bias=True), Plain(c.whole("hidden_dim"), act=act, bias=True), norm=NORM, wiring=PostNorm())
    readouts: dict[str, ReadOut] = {
        "ForMaskedLM": LanguageModel(bias=True, transform=Dense(act, NORM)),
        "ForSequenceClassification": Classifier(n_classes(c), transform=Dense("relu")),
        "ForTokenClassification": Tagger(n_classes(c)),
        "Model": States(),
    }
    readout = readouts[head(c, ("DistilBert",), tuple(readouts))]
    position = Learned(c.whole("max_position_embeddings", 512))
    return encoder(c, c.whole("dim"), c.whole("n_layers"), block, readout, embedding=Embedding(norm=NORM), position=position)


def config(spec: Encoder) -> dict[str, Any]:
    """To config.json."""
    block, position = spec.blocks[0], spec.position
    feedforward: Any = block.feedforward
    return {
        "model_type": "distilbert",
        **named(spec, "DistilBert", NAMES),
        "vocab_size": spec.vocab_size,
        "dim": spec.d_model,
        "n_layers": len(spec.blocks),
        "n_heads": block.attention.n_heads,
        "hidden_dim": feedforward.d_ff,
        "activation": act_name(feedforward.act),
        "max_position_embeddings": getattr(position, "max_positions", None),
        **head_fields(spec),
    }


EMBEDDINGS, LAYER = "distilbert.embeddings", "distilbert.transformer.layer.{i}"
RULES = (
    Rule("embed.weight", f"{EMBEDDINGS}.word_embeddings.weight"),
    Rule("position.table", f"{EMBEDDINGS}.position_embeddings.weight"),
    *norm_rules("embed.norm", f"{EMBEDDINGS}.LayerNorm"),
    Rule("blocks.{i}.attn.qkv.{w}", *(f"{LAYER}.attention.{n}_lin.{{w}}" for n in "qkv")),
    Rule("blocks.{i}.attn.out.{w}", f"{LAYER}.attention.out_lin.{{w}}"),
    Rule("blocks.{i}.norm1.{w}", f"{LAYER}.sa_layer_norm.{{w}}"),
    Rule("blocks.{i}.ffn.up.{w}", f"{LAYER}.ffn.lin1.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{LAYER}.ffn.lin2.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{LAYER}.output_layer_norm.{{w}}"),
    Rule("readout.matrix", "vocab_projector.weight"),
    Rule("readout.bias", "vocab_projector.bias"),
    Rule("readout.transform.norm.{w}", "vocab_layer_norm.{w}"),
    Rule("readout.linear.{w}", "classifier.{w}"),
)


def heads(spec: Encoder) -> Variant:
    """What the read-out's transform is called."""
    if isinstance(spec.readout, LanguageModel):
        return Variant((Rule("readout.transform.linear.{w}", "vocab_transform.{w}"),))
    others = ("vocab_transform.{w}", "vocab_layer_norm.{w}", "vocab_projector.{w}")
    return Variant((Rule("readout.transform.linear.{w}", "pre_classifier.{w}"),), unused=others)


DISTILBERT = Family(
    "DistilBERT",
    ("distilbert",),
    spec,
    config,
    RULES,
    tied={"vocab_projector.weight": f"{EMBEDDINGS}.word_embeddings.weight"},
    ignored=(f"{EMBEDDINGS}.position_ids",),
    prefix="distilbert.",
    by_spec=heads,
)
