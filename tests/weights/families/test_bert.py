"""BERT and its descendants, each with every head: odd widths, tied and untied, padding, token types, heads that lie beside the one that is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.parts.readout import Classifier, LanguageModel, States, Tagger
from parity.reference import lively
from weights.families.encoders import VOCAB, hold_encoder

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "num_hidden_layers": 3, "max_position_embeddings": 24, "attn_implementation": "eager"}
SIZES |= {"hidden_size": 30, "num_attention_heads": 5, "intermediate_size": 22}
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def bert(**more: Any) -> Any:
    return tf.BertConfig(**SIZES | {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new", "type_vocab_size": 3} | more)


def roberta(**more: Any) -> Any:
    return tf.RobertaConfig(**SIZES | {"layer_norm_eps": 1e-4, "hidden_act": "relu", "type_vocab_size": 1, "pad_token_id": 3} | more)


def electra(**more: Any) -> Any:
    return tf.ElectraConfig(**SIZES | {"layer_norm_eps": 1e-3, "embedding_size": 14, "hidden_act": "silu"} | more)


def distilbert(**more: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "n_layers": 3, "max_position_embeddings": 24, "dim": 30, "n_heads": 5, "hidden_dim": 22, "activation": "relu"}
    return tf.DistilBertConfig(**sizes, pad_token_id=0, attn_implementation="eager", **more)


CASES: dict[str, Any] = {
    "bert-masked": (tf.BertForMaskedLM, bert(), 3, ()),
    "bert-masked-untied": (tf.BertForMaskedLM, bert(tie_word_embeddings=False), 3, ()),
    "bert-classes": (tf.BertForSequenceClassification, bert(num_labels=3), 3, ()),
    "bert-two-classes": (tf.BertForSequenceClassification, bert(), 3, ()),
    "bert-tags": (tf.BertForTokenClassification, bert(num_labels=7), 3, ()),
    "bert-states": (tf.BertModel, bert(), 3, POOLER),
    "roberta-masked": (tf.RobertaForMaskedLM, roberta(), 0, ()),
    "roberta-masked-untied": (tf.RobertaForMaskedLM, roberta(tie_word_embeddings=False, pad_token_id=1), 0, ()),
    "roberta-classes": (tf.RobertaForSequenceClassification, roberta(num_labels=4), 0, ()),
    "roberta-tags": (tf.RobertaForTokenClassification, roberta(num_labels=5), 0, ()),
    "roberta-states": (tf.RobertaModel, roberta(type_vocab_size=2), 2, POOLER),
    "xlm-roberta-masked": (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig(**SIZES | {"pad_token_id": 1, "type_vocab_size": 1}), 0, ()),
    "distilbert-masked": (tf.DistilBertForMaskedLM, distilbert(), 0, ()),
    "distilbert-masked-untied": (tf.DistilBertForMaskedLM, distilbert(tie_word_embeddings=False), 0, ()),
    "distilbert-sinusoidal": (tf.DistilBertForMaskedLM, distilbert(sinusoidal_pos_embds=True), 0, ()),
    "distilbert-classes": (tf.DistilBertForSequenceClassification, distilbert(num_labels=3), 0, ()),
    "distilbert-tags": (tf.DistilBertForTokenClassification, distilbert(num_labels=3), 0, ()),
    "distilbert-states": (tf.DistilBertModel, distilbert(), 0, ()),
    "electra-generator": (tf.ElectraForMaskedLM, electra(), 2, ()),
    "electra-generator-untied": (tf.ElectraForMaskedLM, electra(tie_word_embeddings=False), 2, ()),
    "electra-generator-wide": (tf.ElectraForMaskedLM, electra(embedding_size=30), 2, ()),
    "electra-discriminator": (tf.ElectraForPreTraining, electra(), 2, ()),
    "electra-classes": (tf.ElectraForSequenceClassification, electra(num_labels=3), 2, ()),
    "electra-tags": (tf.ElectraForTokenClassification, electra(num_labels=3), 2, ()),
    "electra-states": (tf.ElectraModel, electra(), 2, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_is_the_reference(case, tmp_path):
    make, config, types, missing = CASES[case]
    unread = () if config.tie_word_embeddings else ("cls.predictions.bias", "lm_head.bias")  # an untied read-out has another bias, which is read
    model, _ = hold_encoder(make(config), tmp_path, layers=3, types=types, missing=missing, unread=unread)
    kinds = {"masked": LanguageModel, "classes": Classifier, "tags": Tagger, "states": States, "discriminator": Tagger, "generator": LanguageModel}
    word = next((w for w in kinds if w in case), "masked")
    assert type(model.spec.readout) is kinds[word]


def written(reference: Any, folder: Any) -> dict[str, Any]:
    lively(reference).save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def rewritten(folder: Any, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_heads_beside_the_one_that_is_asked_for_are_left_over_by_name(tmp_path):
    reference = tf.BertForPreTraining(bert())
    config = written(reference, tmp_path)
    model, report = weights.open(tmp_path).load()
    assert isinstance(model.spec.readout, LanguageModel)
    beside = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    assert set(report.left) == beside and set(report.left.values()) == {"belongs to a head that this model does not have"}
    x = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x).prediction_logits, atol=1e-5, rtol=1e-5)
    rewritten(tmp_path, config | {"architectures": ["BertModel"]})
    states, report = weights.open(tmp_path).load()
    assert isinstance(states.spec.readout, States) and "cls.predictions.bias" in report.left
    with torch.no_grad():
        torch.testing.assert_close(states(x), reference.bert(x).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_there_is_missed_and_one_that_nobody_asked_for_is_named(tmp_path):
    config = written(tf.BertForMaskedLM(bert()), tmp_path)
    rewritten(tmp_path, config | {"architectures": ["BertForSequenceClassification"]})
    with pytest.raises(WeightsError, match="the parameter 'readout.transform.linear.weight' needs the tensor 'bert.pooler.dense.weight', which is not there"):
        weights.open(tmp_path).load()
    rewritten(tmp_path, config | {"architectures": ["BertForQuestionAnswering"]})
    with pytest.raises(WeightsError, match="architectures is 'BertForQuestionAnswering', but of this family only BertForMaskedLM, .* are supported"):
        weights.open(tmp_path)
    rewritten(tmp_path, config | {"architectures": "BertModel"})
    with pytest.raises(WeightsError, match="architectures is 'BertModel', but a list with the name of a class is needed"):
        weights.open(tmp_path)
    for field, value in (("is_decoder", True), ("position_embedding_type", "relative_key")):
        rewritten(tmp_path, config | {field: value})
        with pytest.raises(WeightsError, match=f"{field} is {value!r}, but only"):
            weights.open(tmp_path)


def test_the_first_checkpoints_names_of_norms_are_known(tmp_path):
    reference = tf.BertForMaskedLM(bert())
    written(reference, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in tensors.items()}
    assert renamed.keys() != tensors.keys()
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    renamed["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(renamed, tmp_path / "model.safetensors")
    model, report = weights.open(tmp_path).load()
    assert report.tied == {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    assert report.left == {"bert.embeddings.position_ids": "holds nothing learnt"}
    x = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x).logits, atol=1e-5, rtol=1e-5)


def test_labels_are_kept_where_their_number_is(tmp_path):
    labels = {0: "sad", 1: "glad", 2: "neither"}
    reference = tf.BertForSequenceClassification(bert(id2label=labels, label2id={v: k for k, v in labels.items()}))
    config = written(reference, tmp_path / "a")
    model, _ = weights.open(tmp_path / "a").load()
    weights.export_hf(model, tmp_path / "b", config=config)
    assert tf.BertForSequenceClassification.from_pretrained(tmp_path / "b").config.id2label == labels
    tags = weights.open(tmp_path / "a").spec.replace(readout=Tagger(5)).build(seed=0)
    weights.export_hf(tags, tmp_path / "d", config=config)
    assert weights.open(tmp_path / "d").spec == tags.spec
    again = tf.AutoModelForTokenClassification.from_pretrained(tmp_path / "d")
    assert again.config.architectures == ["BertForTokenClassification"] and len(again.config.id2label) == 5
