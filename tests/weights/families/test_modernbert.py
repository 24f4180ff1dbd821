"""ModernBERT: local and global layers with a base each, odd windows, biases on and off, every head, old and new words for the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers as tf

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Window
from parity.reference import lively
from weights.families.encoders import VOCAB, hold_encoder


def modernbert(**more: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 22, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None, "max_position_embeddings": 32}
    sizes |= {"local_attention": 6, "norm_eps": 1e-4, "attn_implementation": "eager"}
    return tf.ModernBertConfig(**sizes | more)


BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 700.0}, "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}
CASES: dict[str, Any] = {
    "masked": (tf.ModernBertForMaskedLM, modernbert()),
    "masked-untied": (tf.ModernBertForMaskedLM, modernbert(tie_word_embeddings=False, decoder_bias=False, local_attention=7, classifier_activation="relu")),
    "masked-biases": (tf.ModernBertForMaskedLM, modernbert(**BIASES, rope_parameters=ROPE, hidden_activation="silu")),
    "uneven-layers": (tf.ModernBertForMaskedLM, modernbert(layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"])),
    "only-global": (tf.ModernBertForMaskedLM, modernbert(layer_types=["full_attention"] * 4)),
    "classes-first": (tf.ModernBertForSequenceClassification, modernbert(num_labels=3)),
    "classes-mean": (tf.ModernBertForSequenceClassification, modernbert(num_labels=3, classifier_pooling="mean", **BIASES)),
    "tags": (tf.ModernBertForTokenClassification, modernbert(num_labels=5)),
    "states": (tf.ModernBertModel, modernbert()),
}


@pytest.mark.parametrize("case", CASES)
def test_modernbert_is_the_reference(case, tmp_path):
    make, config = CASES[case]
    hold_encoder(make(config), tmp_path, layers=4)


def test_older_words_mean_the_same(tmp_path):
    """The published configs of 2024: every how many layers a global one, and the two bases by name."""
    reference = lively(tf.ModernBertForMaskedLM(modernbert()))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = weights.open(tmp_path).spec
    del config["layer_types"], config["rope_parameters"]
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "deterministic_flash_attn": False}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    assert weights.open(tmp_path).spec == spec
    assert [type(b.attention.mask) for b in spec.blocks] == [Everything, Window, Window, Everything]
    assert [b.attention.position.base for b in spec.blocks] == [160_000.0, 10_000.0, 10_000.0, 160_000.0]
    assert [b.wiring.bare for b in spec.blocks] == [("attn",), (), (), ()]
    for field, value in (("classifier_pooling", "max"), ("layer_types", ["chunked_attention"] * 4)):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(WeightsError, match=f"{field} (is 'max'|holds 'chunked_attention'), but only"):
            weights.open(tmp_path)
