"""BERT (arXiv 1810.04805), and what the encoders that came from it share: a stack of post-norm blocks under one of several heads.

    word + type + position ─► LayerNorm ─► blocks ─┬─► cls.predictions          ForMaskedLM
                                                   ├─► pooler ─► classifier     ForSequenceClassification
                                                   ├─► classifier               ForTokenClassification
                                                   └─► the states               Model

    block: q k v ─► attention.output.dense ─► + ─► LayerNorm ─► intermediate ─► output.dense ─► + ─► LayerNorm

Which head a checkpoint has is said by ``architectures`` in its config.json. Tensors of other heads that lie beside it (a pooler, the prediction of
the next sentence) are left over by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glassformer.core.errors import WeightsError
from glassformer.models import Block, Encoder
from glassformer.models.init import BERT_INIT
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm, NoNorm
from glassformer.parts.position import Learned
from glassformer.parts.readout import Classifier, Dense, LanguageModel, ReadOut, States, Tagger
from glassformer.parts.wiring import PostNorm

from ..config import Config
from ..family import Family, Variant
from ..rules import Form, Place, Rule
from ..stored import shown
from .llama import act_name, act_named, layers

# What all encoders share


class Repeated(Form):
    """One vector that stands in the checkpoint under two names; the last is the one that is computed with."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return theirs[-1]

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return ours, ours.clone()


def head(c: Config, stems: Sequence[str], known: Sequence[str]) -> str:
    """Which of the ``known`` endings (``"ForMaskedLM"``) follows one of the ``stems`` in the config's ``architectures``; ``"Model"`` where it says nothing."""
    names = c("architectures", None) or [f"{stems[0]}Model"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise WeightsError(f"{c.file}: architectures is {shown(names)}, but a list with the name of a class is needed.")
    for ending in known:
        if names[0] in [stem + ending for stem in stems]:
            return ending
    choices = ", ".join(stems[0] + ending for ending in known)
    raise WeightsError(f"{c.file}: architectures is {shown(names[0])}, but of this family only {choices} are supported.")


def n_classes(c: Config) -> int:
    """How many classes a head has: as many as have labels, or ``num_labels``, or two."""
    labels = c("id2label", None)
    count: int = c.whole("num_labels", len(labels) if labels else 2)
    return count


def plain_encoder(c: Config) -> None:
    """Raise :class:`WeightsError` if the stack is run as a decoder, or has other positions than learned ones."""
    c.only("is_decoder", False)
    c.only("add_cross_attention", False)
    c.only("position_embedding_type", "absolute")
    c.ignore("tie_word_embeddings")  # read again by the one head that has such a table


def tied(c: Config, readout: ReadOut) -> bool:
    """Whether read-out and embedding are one table; other heads than the vocabulary's have none."""
    return isinstance(readout, LanguageModel) and c.flag("tie_word_embeddings", True)


def encoder(c: Config, d: int, n: int, block: Block, readout: ReadOut, **more: Any) -> Encoder:
    """``n`` times the block ``[b t d]``, which ends in a norm, so that none follows; ``more``: embedding and positions."""
    ends: dict[str, Any] = {"final_norm": NoNorm(), "readout": readout, "tied": tied(c, readout), "init": BERT_INIT}
    return Encoder(c.whole("vocab_size"), d, (block,) * n, **ends, **more)


def post_norm(c: Config, eps: float) -> Block:
    """BERT's block."""
    n = c.whole("num_attention_heads")
    feedforward = Plain(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "gelu"), bias=True)
    return Block(Attention(n, qkv_bias=True, out_bias=True), feedforward, norm=LayerNorm(eps=eps), wiring=PostNorm())


def common(spec: Encoder) -> dict[str, Any]:
    """The way back: the fields that BERT and its descendants share."""
    block, position = spec.blocks[0], spec.position
    feedforward: Any = block.feedforward
    made = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": block.attention.n_heads,
        "intermediate_size": feedforward.d_ff,
        "hidden_act": act_name(feedforward.act),
        "layer_norm_eps": getattr(block.norm, "eps", None),
        "type_vocab_size": spec.embedding.n_types,
        "max_position_embeddings": getattr(position, "max_positions", None),
    }
    return made | head_fields(spec)


def head_fields(spec: Encoder) -> dict[str, Any]:
    """What the head says in a config, but for its name."""
    if isinstance(spec.readout, LanguageModel):
        return {"tie_word_embeddings": spec.tied}
    classes = getattr(spec.readout, "n_classes", None)
    return {} if classes is None else {"num_labels": classes}


def named(spec: Encoder, stem: str, names: dict[type, str]) -> dict[str, Any]:
    """``architectures``: the class that has this kind of read-out."""
    return {"architectures": [stem + names[type(spec.readout)]]}


NAMES: dict[type, str] = {LanguageModel: "ForMaskedLM", Classifier: "ForSequenceClassification", Tagger: "ForTokenClassification", States: "Model"}


def norm_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A norm, by today's names or by those of the first checkpoints (gamma, beta)."""
    return Rule(f"{ours}.{{w}}", f"{theirs}.{{w}}"), Rule(f"{ours}.weight", f"{theirs}.gamma"), Rule(f"{ours}.bias", f"{theirs}.beta")


def stack_rules(stem: str) -> tuple[Rule, ...]:
    """Embedding and blocks of BERT, RoBERTa and ELECTRA; ``stem`` stands before every name."""
    embeddings, layer = f"{stem}.embeddings", f"{stem}.encoder.layer.{{i}}"
    return (
        Rule("embed.weight", f"{embeddings}.word_embeddings.weight"),
        Rule("embed.types", f"{embeddings}.token_type_embeddings.weight"),
        Rule("position.table", f"{embeddings}.position_embeddings.weight"),
        *norm_rules("embed.norm", f"{embeddings}.LayerNorm"),
        Rule("blocks.{i}.attn.qkv.{w}", *(f"{layer}.attention.self.{n}.{{w}}" for n in ("query", "key", "value"))),
        Rule("blocks.{i}.attn.out.{w}", f"{layer}.attention.output.dense.{{w}}"),
        *norm_rules("blocks.{i}.norm1", f"{layer}.attention.output.LayerNorm"),
        Rule("blocks.{i}.ffn.up.{w}", f"{layer}.intermediate.dense.{{w}}"),
        Rule("blocks.{i}.ffn.down.{w}", f"{layer}.output.dense.{{w}}"),
        *norm_rules("blocks.{i}.norm2", f"{layer}.output.LayerNorm"),
    )


def vocabulary_rules(matrix: str, bias: str) -> tuple[Rule, ...]:
    """The matrix over the vocabulary and its bias, which also stands by itself (``bias``) beside ``matrix.bias``."""
    return (
        Rule("readout.matrix", f"{matrix}.weight"),
        Rule("readout.bias", bias, f"{matrix}.bias", form=Repeated()),
        Rule("readout.bias", bias),
        Rule("readout.bias", f"{matrix}.bias"),
    )


# BERT itself


def spec(c: Config) -> Encoder:
    """From config.json."""
    plain_encoder(c)
    # Of the first program's heads: text is read both ways (as ever), and what its pooler might have been.
    c.only("directionality", "bidi")
    c.ignore("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")
    block = post_norm(c, c.number("layer_norm_eps", 1e-12))
    readouts: dict[str, ReadOut] = {
        "ForMaskedLM": LanguageModel(bias=True, transform=Dense(act_named(c, "hidden_act", "gelu"), block.norm)),
        "ForSequenceClassification": Classifier(n_classes(c), transform=Dense("tanh")),
        "ForTokenClassification": Tagger(n_classes(c)),
        "Model": States(),
    }
    readouts["ForPreTraining"] = readouts["ForMaskedLM"]  # and whether a sentence follows another, which is left out
    readout = readouts[head(c, ("Bert",), tuple(readouts))]
    embedding, position = Embedding(n_types=c.whole("type_vocab_size", 2), norm=block.norm), Learned(c.whole("max_position_embeddings", 512))
    return encoder(c, c.whole("hidden_size"), layers(c), block, readout, embedding=embedding, position=position)


def config(spec: Encoder) -> dict[str, Any]:
    """To config.json."""
    return {"model_type": "bert", **named(spec, "Bert", NAMES), **common(spec)}


def heads(spec: Encoder) -> Variant:
    """What the parameters of the read-out are called."""
    if isinstance(spec.readout, LanguageModel):
        transform = "cls.predictions.transform"
        dense = Rule("readout.transform.linear.{w}", f"{transform}.dense.{{w}}")
        norm = norm_rules("readout.transform.norm", f"{transform}.LayerNorm")
        return Variant((dense, *norm, *vocabulary_rules("cls.predictions.decoder", "cls.predictions.bias")))
    return Variant((Rule("readout.transform.linear.{w}", "bert.pooler.dense.{w}"), Rule("readout.linear.{w}", "classifier.{w}")), unused=PREDICTIONS)


PREDICTIONS = tuple(f"cls.predictions.{n}" for n in ("bias", "decoder.{w}", "transform.dense.{w}", "transform.LayerNorm.{any}"))
BERT = Family(
    "BERT",
    ("bert",),
    spec,
    config,
    stack_rules("bert"),
    tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    ignored=("bert.embeddings.position_ids", "bert.embeddings.token_type_ids"),
    unused=("bert.pooler.dense.{w}", "cls.seq_relationship.{w}"),
    prefix="bert.",
    by_spec=heads,
)
