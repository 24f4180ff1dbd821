"""ELECTRA (arXiv 2003.10555): BERT's stack under a table that may be narrower than the stream; a generator and a discriminator.

word + type + position ─► LayerNorm ─► (embeddings_project) ─► blocks ─┬─► generator_predictions ─► generator_lm_head                  ForMaskedLM
                                                                       ├─► discriminator_predictions: one logit, was it replaced?      ForPreTraining
                                                                       ├─► first ─► classifier.dense ─► gelu ─► classifier.out_proj    ForSequenceClassification
                                                                       └─► classifier                                                  ForTokenClassification
"""

from __future__ import annotations

from typing import Any

from glassformer.models import Encoder
from glassformer.parts.embed import Embedding, LiftSum, NoLift
from glassformer.parts.position import Learned
from glassformer.parts.readout import Classifier, Dense, LanguageModel, ReadOut, States, Tagger

from ..config import Config
from ..family import Family, Variant
from ..rules import Rule
from .bert import NAMES, common, encoder, head, n_classes, named, plain_encoder, post_norm, stack_rules
from .llama import act_named, layers


def spec(c: Config) -> Encoder:
    """From config.json."""
    plain_encoder(c)
    c.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")  # of a head for multiple choice
    block = post_norm(c, c.number("layer_norm_eps", 1e-12))
    d, width = c.whole("hidden_size"), c.whole("embedding_size", 128)
    readouts: dict[str, ReadOut] = {
        "ForMaskedLM": LanguageModel(bias=True, transform=Dense("gelu", block.norm, width=None if width == d else width)),
        "ForPreTraining": Tagger(1, transform=Dense(act_named(c, "hidden_act", "gelu"))),
        "ForSequenceClassification": Classifier(n_classes(c), transform=Dense("gelu")),
        "ForTokenClassification": Tagger(n_classes(c)),
        "Model": States(),
    }
    readout = readouts[head(c, ("Electra",), tuple(readouts))]
    lift = NoLift() if width == d else LiftSum(width)
    embedding = Embedding(n_types=c.whole("type_vocab_size", 2), norm=block.norm, lift=lift)
    return encoder(c, d, layers(c), block, readout, embedding=embedding, position=Learned(c.whole("max_position_embeddings", 512)))


def config(spec: Encoder) -> dict[str, Any]:
    """To config.json."""
    names = NAMES | ({Tagger: "ForPreTraining"} if _finds_replaced(spec) else {})
    made = {"model_type": "electra", **named(spec, "Electra", names), **common(spec), "embedding_size": spec.embedding.lift.widths(spec.d_model)[0]}
    if _finds_replaced(spec):
        del made["num_labels"]  # one logit per token, not classes
    return made


def _finds_replaced(spec: Encoder) -> bool:
    return isinstance(spec.readout, Tagger) and spec.readout.transform is not None


GENERATOR = ("generator_predictions.dense.{w}", "generator_predictions.LayerNorm.{w}", "generator_lm_head.{w}")
DISCRIMINATOR = ("discriminator_predictions.dense.{w}", "discriminator_predictions.dense_prediction.{w}")


def heads(spec: Encoder) -> Variant:
    """What the parameters of the read-out are called."""
    if isinstance(spec.readout, LanguageModel):
        dense, norm, _ = GENERATOR
        rules = (
            Rule("readout.transform.linear.{w}", dense),
            Rule("readout.transform.norm.{w}", norm),
            Rule("readout.matrix", "generator_lm_head.weight"),
            Rule("readout.bias", "generator_lm_head.bias"),
        )
        return Variant(rules, unused=DISCRIMINATOR)
    if _finds_replaced(spec):
        dense, scores = DISCRIMINATOR
    elif isinstance(spec.readout, Classifier):
        dense, scores = "classifier.dense.{w}", "classifier.out_proj.{w}"
    else:
        dense, scores = "classifier.dense.{w}", "classifier.{w}"
    others = GENERATOR if _finds_replaced(spec) else GENERATOR + DISCRIMINATOR
    return Variant((Rule("readout.transform.linear.{w}", dense), Rule("readout.linear.{w}", scores)), unused=others)


ELECTRA = Family(
    "ELECTRA",
    ("electra",),
    spec,
    config,
    (*stack_rules("electra"), Rule("embed.lift_sum.{w}", "electra.embeddings_project.{w}")),
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ignored=("electra.embeddings.position_ids", "electra.embeddings.token_type_ids"),
    prefix="electra.",
    by_spec=heads,
)
