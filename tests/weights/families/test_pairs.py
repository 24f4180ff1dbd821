"""T5, BART and Marian: halves of other depths and widths, tied and untied, one vocabulary and two, scaled and unscaled embeddings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from glassformer import weights
from glassformer.core.errors import WeightsError
from parity.reference import lively
from weights.families.encoders import hold_encoder
from weights.families.harness import VOCAB, close, ids
from weights.families.pairs import hold_pair

SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "forced_eos_token_id": None, "attn_implementation": "eager"}


def t5(**more: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 44, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "layer_norm_epsilon": 1e-4}
    sizes |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0, "pad_token_id": 0}
    return tf.T5Config(**sizes | SPECIAL | more)


def bart_fields(**more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 30, "max_position_embeddings": 48, "pad_token_id": 1, "decoder_start_token_id": 2}
    sizes |= {
        "encoder_layers": 3,
        "encoder_attention_heads": 5,
        "encoder_ffn_dim": 44,
        "decoder_layers": 2,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 20,
    }
    return sizes | SPECIAL | more


def bart(**more: Any) -> Any:
    return tf.BartConfig(**bart_fields(**more))


def marian(**more: Any) -> Any:
    return tf.MarianConfig(**bart_fields(**{"activation_function": "swish", "scale_embedding": True, "decoder_start_token_id": 1} | more))


# What the reference holds beside what it computes with: an untied BART's first table.
CASES: dict[str, Any] = {
    "t5": (tf.T5ForConditionalGeneration, t5(), ()),
    "t5-gated": (tf.T5ForConditionalGeneration, t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False), ()),
    "t5-silu": (tf.T5ForConditionalGeneration, t5(feed_forward_proj="gated-silu"), ()),
    "t5-deep-decoder": (tf.T5ForConditionalGeneration, t5(num_decoder_layers=4), ()),
    "t5-gelu": (tf.T5ForConditionalGeneration, t5(feed_forward_proj="gelu_new"), ()),
    "t5-states": (tf.T5Model, t5(), ()),
    "bart": (tf.BartForConditionalGeneration, bart(), ()),
    "bart-scaled": (tf.BartForConditionalGeneration, bart(scale_embedding=True, activation_function="relu"), ()),
    "bart-untied": (tf.BartForConditionalGeneration, bart(tie_word_embeddings=False), ("model.shared.weight",)),
    "bart-states": (tf.BartModel, bart(), ()),
    "marian": (tf.MarianMTModel, marian(), ()),
    "marian-unscaled": (
        tf.MarianMTModel,
        marian(scale_embedding=False, activation_function="relu", d_model=32, encoder_attention_heads=4, decoder_attention_heads=2),
        (),
    ),
    "marian-two-vocabularies": (tf.MarianMTModel, marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=67), ()),
    "marian-two-untied": (tf.MarianMTModel, marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=67, tie_word_embeddings=False), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_decoder_is_the_reference(case, tmp_path):
    make, config, unread = CASES[case]
    # The reference's cache has room for as many decoder blocks of T5 as the encoder has, so a deeper decoder cannot generate there.
    hold_pair(make(config), tmp_path, unread=unread, n=0 if case in ("t5-states", "bart-states", "t5-deep-decoder") else 32)


def test_t5s_encoder_alone_is_the_reference(tmp_path):
    model, reference = hold_encoder(tf.T5EncoderModel(t5()), tmp_path, layers=3)
    pair = tf.T5ForConditionalGeneration(t5())
    pair.load_state_dict(reference.state_dict(), strict=False)
    pair.save_pretrained(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps(config | {"architectures": ["T5EncoderModel"]}))
    alone, report = weights.open(tmp_path / "both").load()
    assert all(n.startswith("decoder.") for n in report.left) and len(report.left) > 10
    with torch.no_grad():
        assert torch.equal(alone(ids()), model(ids()))


def test_the_read_out_of_a_later_t5_is_a_matrix_of_its_own(tmp_path):
    """T5 1.1 and Flan: config.json says that nothing is tied, the file holds lm_head.weight beside shared.weight, and nothing is scaled."""
    reference = lively(tf.T5ForConditionalGeneration(t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, own = load_file(file), torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(5)) / 6
    save_file(tensors | {"lm_head.weight": own}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "scale_decoder_outputs"} | {"tie_word_embeddings": False}  # as the published ones say it
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, report = weights.open(tmp_path).load()
    assert report.used["decoder.readout.matrix"] == ("lm_head.weight",) and torch.equal(model.decoder.readout.matrix, own)
    source, target, tap = ids(2, 9), ids(2, 6, seed=4), weights.open(tmp_path)
    with torch.no_grad():
        states = reference(input_ids=source, decoder_input_ids=target, output_hidden_states=True).decoder_hidden_states[-1]
        close(model(source, target), states @ own.T, "logits")
    assert not tap.spec.decoder.tied
    weights.export_hf(model, tmp_path / "back", config=config)
    again = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        close(again(input_ids=source, decoder_input_ids=target).logits, states @ own.T, "logits of the reference's own reading")


def test_what_no_version_reads_is_left_over_and_what_is_not_understood_is_named(tmp_path):
    lively(tf.T5ForConditionalGeneration(t5())).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stale = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(load_file(file) | {stale: torch.zeros(8, 4)}, file, metadata={"format": "pt"})
    _, report = weights.open(tmp_path).load()
    assert report.left == {stale: "holds nothing learnt"}
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value, said in (
        ("feed_forward_proj", "gated-mish", "feed_forward_proj is 'gated-mish', but only silu, .* are known, with or without 'gated-' before them"),
        ("is_gated_act", True, "is_gated_act is True, but only False is supported"),
        (
            "architectures",
            ["T5EncoderModel2"],
            "architectures is 'T5EncoderModel2', but of this family only T5ForConditionalGeneration, T5Model, .* are supported",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(WeightsError, match=said):
            weights.open(tmp_path)


def test_the_first_barts_fields_are_understood(tmp_path):
    """Fields that old configs carry and no class reads; those that would compute something else are errors."""
    lively(tf.BartForConditionalGeneration(bart())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"add_bias_logits": False, "add_final_layer_norm": False, "normalize_before": False, "normalize_embedding": True, "classif_dropout": 0.1}
    old |= {"static_position_embeddings": False, "extra_pos_embeddings": 2, "force_bos_token_to_be_generated": False, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    plain = weights.open(tmp_path).spec
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plain == weights.open(tmp_path).spec
    (tmp_path / "config.json").write_text(json.dumps(config | {"normalize_before": True}))
    with pytest.raises(WeightsError, match="normalize_before is True, but only False is supported"):
        weights.open(tmp_path)


def test_marians_sinusoids_are_not_read_from_the_file(tmp_path):
    """Old files hold the fixed table; it holds nothing learnt."""
    reference = lively(tf.MarianMTModel(marian()))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    table = {f"model.{half}.embed_positions.weight": getattr(reference.model, half).embed_positions.weight.detach().clone() for half in ("encoder", "decoder")}
    save_file(load_file(file) | table, file, metadata={"format": "pt"})
    model, report = weights.open(tmp_path).load()
    assert report.left == dict.fromkeys(table, "holds nothing learnt")
    ours = model.encoder.position.add(torch.arange(48), torch.zeros(1))
    torch.testing.assert_close(ours, reference.model.encoder.embed_positions.create_weight(), atol=1e-7, rtol=0)
