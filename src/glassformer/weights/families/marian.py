"""Marian (arXiv 1804.00344), as its translation models are published: BART's halves with fixed sinusoids and without a norm on the embedding.

shared * (sqrt(d)) + sin, cos ─► encoder.layers ─► memory          one vocabulary for both languages, or one for each
shared * (sqrt(d)) + sin, cos ─► decoder.layers (encoder_attn reads the memory) ─► lm_head + final_logits_bias
"""

from __future__ import annotations

from typing import Any

from glassformer.models import EncoderDecoder
from glassformer.parts.norm import NoNorm
from glassformer.parts.position import Sinusoidal
from glassformer.parts.readout import LanguageModel, ReadOut, States

from ..config import Config
from ..family import Family, Variant
from .bart import DECODERS, ONE_FOR_ALL, ONE_TABLE, SHARED, STACKS, TABLE_EACH, common_config, halves, scores

NAMES: dict[type, str] = {LanguageModel: "MTModel", States: "Model"}


def spec(c: Config) -> EncoderDecoder:
    """From config.json."""
    c.only("normalize_embedding", False)
    c.only("static_position_embeddings", True)
    c.ignore("classifier_dropout", "num_labels", "extra_pos_embeddings")
    source = c.whole("vocab_size")
    shared = c.flag("share_encoder_decoder_embeddings", True)
    target = c.whole("decoder_vocab_size", source)
    if shared and not c.flag("tie_word_embeddings", True):
        shared = False  # both halves start from one table, but each is stored, and was trained, by itself
    readouts: dict[str, ReadOut] = {"MTModel": LanguageModel(bias=True), "Model": States()}
    start = int(c("decoder_start_token_id", source - 1))
    return halves(c, "Marian", NoNorm(), Sinusoidal(layout="halves"), readouts, vocab=(source, target), shared=shared, start=start)


def config(spec: EncoderDecoder) -> dict[str, Any]:
    """To config.json."""
    made = {"model_type": "marian", **common_config(spec, "Marian", NAMES)}
    if isinstance(spec.decoder.readout, States):
        made["tie_word_embeddings"] = True
    return made | {"decoder_vocab_size": spec.decoder.vocab_size, "share_encoder_decoder_embeddings": spec.shared}


def by_spec(spec: EncoderDecoder) -> Variant:
    """Where the table lies: one for all, or one in each half (and a third beside them that nothing reads)."""
    if spec.shared:
        return Variant(ONE_TABLE, ONE_FOR_ALL, scores(spec))
    return Variant(TABLE_EACH, {"lm_head.weight": DECODERS} if spec.decoder.tied else {}, (*scores(spec), SHARED))


MARIAN = Family(
    "Marian",
    ("marian",),
    spec,
    config,
    STACKS,
    ignored=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
    prefix="model.",
    by_spec=by_spec,
)
