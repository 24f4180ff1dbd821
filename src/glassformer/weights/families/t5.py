"""T5 (arXiv 1910.10683), and T5 1.1 and Flan-T5 (arXiv 2210.11416): pre-norm halves whose only positions are buckets of distance.

    shared ─► encoder.block.0 … ─► final_layer_norm ─► memory
    shared ─► decoder.block.0 … (EncDecAttention reads the memory) ─► final_layer_norm ─► (* 1/sqrt(d)) ─► lm_head

The encoder alone (``T5EncoderModel``: text for image models, sentence encoders) is the upper line by itself.

The first version ties read-out and embedding and scales between; from 1.1 on the read-out is a matrix of its own and nothing is scaled. A config says
both in one word: older files by ``tie_word_embeddings``, newer ones (where that word is always true) by ``scale_decoder_outputs``.
"""

from __future__ import annotations

from typing import Any

from glassformer.core.errors import WeightsError
from glassformer.models import Block, Decoder, Encoder, EncoderDecoder
from glassformer.parts.attention import Attention
from glassformer.parts.embed import InverseSqrtWidth
from glassformer.parts.feedforward import FeedForward, Gated, Plain
from glassformer.parts.norm import RMSNorm
from glassformer.parts.position import T5Buckets
from glassformer.parts.readout import LanguageModel, ReadOut, States

from ..config import Config
from ..family import Family, Variant
from ..rules import Rule
from .bert import head
from .llama import ACTS

GATED_NAMES = {"gelu_tanh": "gelu"}  # 'gated-gelu' means the approximation by tanh


def feedforward(c: Config) -> FeedForward:
    """``relu``, ``gated-gelu``, ``gated-silu``…; ``dense_act_fn`` and ``is_gated_act`` say the same once more."""
    kind = str(c("feed_forward_proj", "relu"))
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name
    if name not in ACTS:
        raise WeightsError(f"{c.file}: feed_forward_proj is {kind!r}, but only {', '.join(ACTS)} are known, with or without 'gated-' before them.")
    c.only("dense_act_fn", name)
    c.only("is_gated_act", gated)
    return (Gated if gated else Plain)(c.whole("d_ff"), act=ACTS[name])


def spec(c: Config) -> EncoderDecoder | Encoder:
    """From config.json."""
    c.only("is_decoder", False)
    c.ignore("is_encoder_decoder")  # what is built is said by the class
    tied = c.flag("tie_word_embeddings", True)
    tied = c.flag("scale_decoder_outputs", tied)
    readouts: dict[str, ReadOut] = {"ForConditionalGeneration": LanguageModel(scale=InverseSqrtWidth()) if tied else LanguageModel(), "Model": States()}
    readouts |= {"WithLMHeadModel": readouts["ForConditionalGeneration"], "EncoderModel": States()}
    kind = head(c, ("T5",), tuple(readouts))
    norm = RMSNorm(eps=c.number("layer_norm_epsilon", 1e-6))
    attention = Attention(c.whole("num_heads"), d_head=c.whole("d_kv"), scale=1.0)
    block = Block(attention, feedforward(c), norm=norm)
    buckets, distance = c.whole("relative_attention_num_buckets", 32), c.whole("relative_attention_max_distance", 128)
    vocab, d, n = c.whole("vocab_size"), c.whole("d_model"), c.whole("num_layers")
    deep = c.whole("num_decoder_layers", n)
    encoder = Encoder(vocab, d, (block,) * n, final_norm=norm, position=T5Buckets(buckets, distance), readout=States())
    if kind == "EncoderModel":
        return encoder
    decoder = Decoder(
        vocab,
        d,
        (block.replace(cross=attention),) * deep,
        final_norm=norm,
        tied=tied and kind != "Model",
        position=T5Buckets(buckets, distance, bidirectional=False),
        readout=readouts[kind],
    )
    return EncoderDecoder(encoder, decoder, shared=True, start=int(c("decoder_start_token_id", 0)))


def config(spec: EncoderDecoder | Encoder) -> dict[str, Any]:
    """To config.json."""
    encoder = spec if isinstance(spec, Encoder) else spec.encoder
    block: Any = encoder.blocks[0]
    position, inner = encoder.position, block.feedforward
    gated = isinstance(inner, Gated)
    named = {act: name for name, act in reversed(ACTS.items())} | (GATED_NAMES if gated else {"gelu_tanh": "gelu_new"})
    made = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.d_model,
        "d_kv": block.attention.sizes(encoder.d_model)[2],
        "d_ff": inner.d_ff,
        "num_layers": len(encoder.blocks),
        "num_heads": block.attention.n_heads,
        "relative_attention_num_buckets": getattr(position, "buckets", None),
        "relative_attention_max_distance": getattr(position, "max_distance", None),
        "layer_norm_epsilon": block.norm.eps,
        "feed_forward_proj": ("gated-" if gated else "") + named[inner.act],
        "is_encoder_decoder": isinstance(spec, EncoderDecoder),
    }
    if isinstance(spec, Encoder):
        return made
    plain = isinstance(spec.decoder.readout, States)
    tied = spec.decoder.tied or plain
    return made | {
        "architectures": ["T5Model" if plain else "T5ForConditionalGeneration"],
        "num_decoder_layers": len(spec.decoder.blocks),
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": tied,
        "decoder_start_token_id": spec.start,
    }


def half(ours: str, name: str, last: int) -> tuple[Rule, ...]:
    """The rules of the half ``name``, whose feed-forward layer is the sublayer number ``last``; ``ours`` stands before our names."""
    block, theirs = f"{ours}blocks.{{i}}", f"{name}.block.{{i}}.layer"
    inner = f"{theirs}.{last}.DenseReluDense"
    return (
        Rule(f"{ours}position.table", f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Rule(f"{ours}final_norm.weight", f"{name}.final_layer_norm.weight"),
        Rule(f"{block}.norm1.weight", f"{theirs}.0.layer_norm.weight"),
        Rule(f"{block}.attn.qkv.weight", *(f"{theirs}.0.SelfAttention.{n}.weight" for n in "qkv")),
        Rule(f"{block}.attn.out.weight", f"{theirs}.0.SelfAttention.o.weight"),
        Rule(f"{block}.norm_cross.weight", f"{theirs}.1.layer_norm.weight"),
        Rule(f"{block}.cross.q.weight", f"{theirs}.1.EncDecAttention.q.weight"),
        Rule(f"{block}.cross.kv.weight", *(f"{theirs}.1.EncDecAttention.{n}.weight" for n in "kv")),
        Rule(f"{block}.cross.out.weight", f"{theirs}.1.EncDecAttention.o.weight"),
        Rule(f"{block}.norm2.weight", f"{theirs}.{last}.layer_norm.weight"),
        Rule(f"{block}.ffn.up.weight", f"{inner}.wi.weight"),
        Rule(f"{block}.ffn.gate_up.weight", f"{inner}.wi_0.weight", f"{inner}.wi_1.weight"),
        Rule(f"{block}.ffn.down.weight", f"{inner}.wo.weight"),
    )


def table(ours: str) -> tuple[Rule, ...]:
    """The embedding's table, which both halves read."""
    return Rule(f"{ours}embed.weight", "shared.weight"), Rule(f"{ours}embed.weight", "encoder.embed_tokens.weight")


RULES = (
    *table("encoder."),
    *half("encoder.", "encoder", 1),
    *half("decoder.", "decoder", 2),
    Rule("decoder.readout.matrix", "lm_head.weight"),
    Rule("decoder.readout.matrix", "shared.weight"),  # files of a read-out that is a copy
    *table(""),
    *half("", "encoder", 1),
)
TIED = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight")
# The first checkpoints hold a table of distances between the two halves, which no version has ever read.
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def rest(spec: EncoderDecoder | Encoder) -> Variant:
    """What a file may hold beside the part that is asked for: the other half of an encoder, the read-out of bare states."""
    if isinstance(spec, Encoder):
        return Variant(unused=("lm_head.weight", "decoder.*"))
    return Variant(unused=("lm_head.weight",) if isinstance(spec.decoder.readout, States) else ())


T5 = Family("T5", ("t5",), spec, config, RULES, tied=TIED, ignored=IGNORED, by_spec=rest)
