"""BART (arXiv 1910.13461): post-norm halves, learned positions from the third row on, a normed embedding, a bias on the logits.

shared * (sqrt(d)) + encoder.embed_positions ─► layernorm_embedding ─► encoder.layers ─► memory
shared * (sqrt(d)) + decoder.embed_positions ─► layernorm_embedding ─► decoder.layers (encoder_attn reads the memory) ─► lm_head + final_logits_bias
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glassformer.models import Block, Decoder, Encoder, EncoderDecoder
from glassformer.models.init import BERT_INIT
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, SqrtWidth, Unit
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm, NoNorm, Norm
from glassformer.parts.position import Learned, Position
from glassformer.parts.readout import LanguageModel, ReadOut, States
from glassformer.parts.wiring import PostNorm

from ..config import Config
from ..family import Family, Variant
from ..rules import Form, Place, Rule
from .bert import Repeated, head
from .llama import act_name, act_named

OFFSET = 2  # rows of the table of positions that no text reads


class Row(Form):
    """A vector that the checkpoint holds as a matrix of one row."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return theirs[0][0]

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return (ours[None],)


# What BART and Marian share


def halves(
    c: Config, stem: str, norm: Norm, position: Position, readouts: dict[str, ReadOut], *, vocab: tuple[int, int], shared: bool, start: int
) -> EncoderDecoder:
    """Both halves by their usual names. ``stem``: how the family's classes begin; ``norm``: of the embedding; ``vocab``: sizes of both vocabularies."""
    c.only("is_decoder", False)
    c.only("is_encoder_decoder", True)
    for key in ("normalize_before", "add_final_layer_norm"):  # written by the first configs; no class computes otherwise
        c.only(key, False)
    c.ignore("add_bias_logits", "force_bos_token_to_be_generated")  # read by none of today's classes
    c.ignore("num_hidden_layers", "hidden_size", "num_attention_heads")  # other words for what each half says
    d = c.whole("d_model")
    embedding = Embedding(scale=SqrtWidth() if c.flag("scale_embedding", False) else Unit(), norm=norm)
    readout = readouts[head(c, (stem,), tuple(readouts))]

    def stack(name: str, cross: bool) -> tuple[Block, ...]:
        attention = Attention(c.whole(f"{name}_attention_heads"), qkv_bias=True, out_bias=True)
        inner = Plain(c.whole(f"{name}_ffn_dim"), act=act_named(c, "activation_function", "gelu"), bias=True)
        block = Block(attention, inner, norm=LayerNorm(), wiring=PostNorm(), cross=attention if cross else None)
        return (block,) * int(c.whole(f"{name}_layers"))

    common: dict[str, Any] = {"final_norm": NoNorm(), "embedding": embedding, "position": position, "init": BERT_INIT}
    encoder = Encoder(vocab[0], d, stack("encoder", False), readout=States(), **common)
    tied = c.flag("tie_word_embeddings", True) and not isinstance(readout, States)
    decoder = Decoder(vocab[1], d, stack("decoder", True), tied=tied, readout=readout, **common)
    return EncoderDecoder(encoder, decoder, shared=shared, start=start)


def common_config(spec: EncoderDecoder, stem: str, names: dict[type, str]) -> dict[str, Any]:
    """The way back."""
    made: dict[str, Any] = {
        "architectures": [stem + names[type(spec.decoder.readout)]],
        "vocab_size": spec.encoder.vocab_size,
        "d_model": spec.encoder.d_model,
        "max_position_embeddings": getattr(spec.encoder.position, "max_positions", None),
        "scale_embedding": isinstance(spec.encoder.embedding.scale, SqrtWidth),
        "tie_word_embeddings": spec.shared if isinstance(spec.decoder.readout, States) else spec.decoder.tied,
        "decoder_start_token_id": spec.start,
        "is_encoder_decoder": True,
    }
    for name, half in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        inner: Any = half.blocks[0].feedforward
        made |= {f"{name}_layers": len(half.blocks), f"{name}_attention_heads": half.blocks[0].attention.n_heads, f"{name}_ffn_dim": inner.d_ff}
        made["activation_function"] = act_name(inner.act)
    return {k: v for k, v in made.items() if v is not None}


LAYER = "model.{half}.layers.{i}"
STACKS = (
    Rule("{half}.blocks.{i}.attn.qkv.{w}", *(f"{LAYER}.self_attn.{n}_proj.{{w}}" for n in "qkv")),
    Rule("{half}.blocks.{i}.attn.out.{w}", f"{LAYER}.self_attn.out_proj.{{w}}"),
    Rule("{half}.blocks.{i}.norm1.{w}", f"{LAYER}.self_attn_layer_norm.{{w}}"),
    Rule("{half}.blocks.{i}.cross.q.{w}", f"{LAYER}.encoder_attn.q_proj.{{w}}"),
    Rule("{half}.blocks.{i}.cross.kv.{w}", *(f"{LAYER}.encoder_attn.{n}_proj.{{w}}" for n in "kv")),
    Rule("{half}.blocks.{i}.cross.out.{w}", f"{LAYER}.encoder_attn.out_proj.{{w}}"),
    Rule("{half}.blocks.{i}.norm_cross.{w}", f"{LAYER}.encoder_attn_layer_norm.{{w}}"),
    Rule("{half}.blocks.{i}.ffn.up.{w}", f"{LAYER}.fc1.{{w}}"),
    Rule("{half}.blocks.{i}.ffn.down.{w}", f"{LAYER}.fc2.{{w}}"),
    Rule("{half}.blocks.{i}.norm2.{w}", f"{LAYER}.final_layer_norm.{{w}}"),
    Rule("decoder.readout.matrix", "lm_head.weight"),
    Rule("decoder.readout.bias", "final_logits_bias", form=Row()),
)
SHARED, ENCODERS, DECODERS = "model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
ONE_TABLE = (Rule("encoder.embed.weight", SHARED), Rule("encoder.embed.weight", ENCODERS))
TABLE_EACH = (Rule("encoder.embed.weight", ENCODERS), Rule("decoder.embed.weight", DECODERS))
ONE_FOR_ALL = dict.fromkeys((ENCODERS, DECODERS, "lm_head.weight"), SHARED)


def scores(spec: EncoderDecoder) -> tuple[str, ...]:
    """The read-out's tensors, where only the states are asked for."""
    return ("final_logits_bias", "lm_head.weight") if isinstance(spec.decoder.readout, States) else ()


# BART itself

NAMES: dict[type, str] = {LanguageModel: "ForConditionalGeneration", States: "Model"}


def spec(c: Config) -> EncoderDecoder:
    """From config.json. Where tables are not tied, each half has its own."""
    c.only("normalize_embedding", True)
    c.only("static_position_embeddings", False)
    c.only("extra_pos_embeddings", OFFSET)
    c.ignore("classifier_dropout", "num_labels")
    vocab = c.whole("vocab_size")
    readouts: dict[str, ReadOut] = {"ForConditionalGeneration": LanguageModel(bias=True), "Model": States()}
    position = Learned(c.whole("max_position_embeddings", 1_024), offset=OFFSET)
    shared, start = c.flag("tie_word_embeddings", True), int(c("decoder_start_token_id", 2))
    return halves(c, "Bart", LayerNorm(), position, readouts, vocab=(vocab, vocab), shared=shared, start=start)


def config(spec: EncoderDecoder) -> dict[str, Any]:
    """To config.json."""
    return {"model_type": "bart", **common_config(spec, "Bart", NAMES)}


def by_spec(spec: EncoderDecoder) -> Variant:
    """Where the table lies: one for all, or one in each half (and a third beside them that nothing reads)."""
    beside = scores(spec)
    if spec.shared:
        return Variant(ONE_TABLE, ONE_FOR_ALL, beside)
    return Variant((Rule("encoder.embed.weight", SHARED, ENCODERS, form=Repeated()), *TABLE_EACH), unused=beside)


BART = Family(
    "BART",
    ("bart",),
    spec,
    config,
    (
        *STACKS,
        Rule("{half}.position.table", "model.{half}.embed_positions.weight"),
        Rule("{half}.embed.norm.{w}", "model.{half}.layernorm_embedding.{w}"),
    ),
    ignored=("model.encoder.version", "model.decoder.version"),
    prefix="model.",
    by_spec=by_spec,
)
