"""RoBERTa (arXiv 1907.11692) and XLM-R (arXiv 1911.02116): BERT's stack whose positions are counted from ``pad_token_id + 1``, with heads of its own.

states ─┬─► lm_head.dense ─► gelu ─► layer_norm ─► decoder              ForMaskedLM
        ├─► first ─► classifier.dense ─► tanh ─► classifier.out_proj    ForSequenceClassification
        └─► classifier                                                  ForTokenClassification
"""

from __future__ import annotations

from typing import Any

from glassformer.models import Encoder
from glassformer.parts.embed import Embedding
from glassformer.parts.position import Learned
from glassformer.parts.readout import Classifier, Dense, LanguageModel, ReadOut, States, Tagger

from ..config import Config
from ..family import Family, Variant
from ..rules import Rule
from .bert import NAMES, common, encoder, head, n_classes, named, norm_rules, plain_encoder, post_norm, stack_rules, vocabulary_rules
from .llama import layers


def spec(c: Config) -> Encoder:
    """From config.json. The table of positions holds ``pad_token_id + 1`` rows before its first position.

    The reference gives padding no position at all; here texts are padded on the right (``lengths``), where that makes no difference.
    """
    plain_encoder(c)
    block = post_norm(c, c.number("layer_norm_eps", 1e-5))
    readouts: dict[str, ReadOut] = {
        "ForMaskedLM": LanguageModel(bias=True, transform=Dense("gelu", block.norm)),
        "ForSequenceClassification": Classifier(n_classes(c), transform=Dense("tanh")),
        "ForTokenClassification": Tagger(n_classes(c)),
        "Model": States(),
    }
    readout = readouts[head(c, ("Roberta", "XLMRoberta"), tuple(readouts))]
    offset = int(c("pad_token_id", 1)) + 1
    embedding = Embedding(n_types=c.whole("type_vocab_size", 1), norm=block.norm)
    position = Learned(c.whole("max_position_embeddings", 514) - offset, offset=offset)
    return encoder(c, c.whole("hidden_size"), layers(c), block, readout, embedding=embedding, position=position)


def config(spec: Encoder) -> dict[str, Any]:
    """To config.json."""
    position: Any = spec.position
    places = {"max_position_embeddings": position.max_positions + position.offset, "pad_token_id": position.offset - 1}
    return {"model_type": "roberta", **named(spec, "Roberta", NAMES), **common(spec), **places}


def heads(spec: Encoder) -> Variant:
    """What the parameters of the read-out are called."""
    if isinstance(spec.readout, LanguageModel):
        dense, norm = Rule("readout.transform.linear.{w}", "lm_head.dense.{w}"), norm_rules("readout.transform.norm", "lm_head.layer_norm")
        return Variant((dense, *norm, *vocabulary_rules("lm_head.decoder", "lm_head.bias")))
    others = ("lm_head.bias", "lm_head.decoder.{w}", "lm_head.dense.{w}", "lm_head.layer_norm.{w}")
    if isinstance(spec.readout, Classifier):
        dense = Rule("readout.transform.linear.{w}", "classifier.dense.{w}")
        return Variant((dense, Rule("readout.linear.{w}", "classifier.out_proj.{w}")), unused=others)
    return Variant((Rule("readout.linear.{w}", "classifier.{w}"),), unused=others)


ROBERTA = Family(
    "RoBERTa",
    ("roberta", "xlm-roberta"),
    spec,
    config,
    stack_rules("roberta"),
    tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    ignored=("roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids"),
    unused=("roberta.pooler.dense.{w}",),
    prefix="roberta.",
    by_spec=heads,
)
