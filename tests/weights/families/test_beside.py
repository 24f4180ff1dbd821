"""What a file may hold beside the parts that were asked for, and what it may not: only heads by name and true copies are left over, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from glassformer import weights
from glassformer.core.errors import WeightsError
from parity.reference import lively
from weights.families.test_bert import electra, roberta
from weights.families.test_modernbert import modernbert
from weights.families.test_pairs import bart, marian, t5

OTHER_HEAD = "belongs to a head that this model does not have"


def changed(reference: Any, folder: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A folder of the reference library with more (or other) tensors and fields."""
    lively(reference).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | (tensors or {}), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_the_discriminator_beside_the_generator(tmp_path):
    head = {f"discriminator_predictions.dense.{w}": torch.zeros(30) for w in ("weight", "bias")}
    assert weights.open(changed(tf.ElectraForMaskedLM(electra()), tmp_path / "a", head)).plan.left == dict.fromkeys(head, OTHER_HEAD)
    left = weights.open(changed(tf.ElectraForPreTraining(electra()), tmp_path / "b", {"generator_lm_head.bias": torch.zeros(61)})).plan.left
    assert left == {"generator_lm_head.bias": OTHER_HEAD}
    both = changed(tf.ElectraForPreTraining(electra()), tmp_path / "c", architectures=["ElectraModel"])
    assert set(weights.open(both).plan.left) == {f"discriminator_predictions.{n}.{w}" for n in ("dense", "dense_prediction") for w in ("weight", "bias")}


def test_the_masked_head_beside_the_tagger(tmp_path):
    left = weights.open(changed(tf.RobertaForTokenClassification(roberta()), tmp_path, {"lm_head.bias": torch.zeros(61)})).plan.left
    assert left == {"lm_head.bias": OTHER_HEAD}


@pytest.mark.parametrize(
    ("reference", "name", "shape"),
    [
        (lambda: tf.T5ForConditionalGeneration(t5()), "decoder.block.2.layer.0.layer_norm.weight", (32,)),
        (lambda: tf.BartForConditionalGeneration(bart()), "model.encoder.layers.3.fc1.bias", (44,)),
        (lambda: tf.ElectraForMaskedLM(electra()), "generator_predictions.other.weight", (14,)),
        (lambda: tf.ModernBertForMaskedLM(modernbert(decoder_bias=False)), "decoder.bias", (61,)),
        (lambda: tf.ModernBertModel(modernbert()), "model.layers.0.attn_norm.weight", (32,)),
    ],
    ids=["t5-block", "bart-block", "electra-head", "modernbert-bias", "modernbert-first-norm"],
)
def test_what_nobody_asked_for_is_an_error(tmp_path, reference, name, shape):
    folder = changed(reference(), tmp_path, {name: torch.zeros(shape)})
    with pytest.raises(WeightsError, match=rf"\(0 missing, 1 left over\): the tensor '{name}' is claimed by no parameter"):
        weights.open(folder).load()


def test_a_copy_of_the_decoders_table_is_one(tmp_path):
    """Two vocabularies: the read-out repeats the decoder's table, and where it does not, that is said."""
    reference = lively(tf.MarianMTModel(marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=67)))
    table = "model.decoder.embed_tokens.weight"
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors[table].clone()}, file, metadata={"format": "pt"})
    assert weights.open(tmp_path).load()[1].tied == {"lm_head.weight": table}
    save_file(tensors | {"lm_head.weight": tensors[table] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="'lm_head.weight' and 'model.decoder.embed_tokens.weight' are one matrix by the config"):
        weights.open(tmp_path).load()
