"""config.json as it stands beside published encoders and encoder-decoders: read without a complaint, as many parameters as published, and said again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Window
from glassformer.models import Encoder
from glassformer.parts.embed import LiftSum, SqrtWidth
from glassformer.parts.position import ALiBi, Learned
from glassformer.parts.readout import Classifier, LanguageModel, States, Tagger
from glassformer.weights.family import families, family_for, family_of

DROPOUTS = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}
BASE = DROPOUTS | {"hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
BERT = BASE | {
    "architectures": ["BertForMaskedLM"],
    "gradient_checkpointing": False,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
ROBERTA = BASE | {
    "architectures": ["RobertaForMaskedLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
XLMR = ROBERTA | {"architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "output_past": True, "vocab_size": 250002}
DISTILBERT = {
    "activation": "gelu",
    "architectures": ["DistilBertForMaskedLM"],
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "transformers_version": "4.10.0.dev0",
    "vocab_size": 30522,
}
SENTIMENT = DISTILBERT | {
    "architectures": ["DistilBertForSequenceClassification"],
    "finetuning_task": "sst-2",
    "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
    "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
    "output_past": True,
}
ELECTRA = DROPOUTS | {
    "architectures": ["ElectraForPreTraining"],
    "embedding_size": 128,
    "hidden_act": "gelu",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "electra",
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "summary_activation": "gelu",
    "summary_last_dropout": 0.1,
    "summary_type": "first",
    "summary_use_proj": True,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "repad_logits_with_grad": False,
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"translation_en_to_de": {"max_length": 300, "num_beams": 4, "prefix": "translate English to German: "}},
    "use_cache": True,
    "vocab_size": 32128,
}
FLAN = T5 | {
    "d_ff": 1024,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
BART = {
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.1,
    "classifier_dropout": 0.0,
    "d_model": 768,
    "decoder_attention_heads": 12,
    "decoder_ffn_dim": 3072,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 6,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 6,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "max_position_embeddings": 1024,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "normalize_embedding": True,
    "num_beams": 4,
    "num_hidden_layers": 6,
    "pad_token_id": 1,
    "scale_embedding": False,
    "task_specific_params": {"summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12, "num_beams": 4}},
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 50265,
}
MARIAN = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0,
    "bad_words_ids": [[58100]],
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "d_model": 512,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 2048,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 6,
    "decoder_start_token_id": 58100,
    "decoder_vocab_size": 58101,
    "dropout": 0.1,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 6,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "gradient_checkpointing": False,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 512,
    "max_position_embeddings": 512,
    "model_type": "marian",
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 6,
    "num_hidden_layers": 6,
    "pad_token_id": 58100,
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True,
    "use_cache": True,
    "vocab_size": 58101,
}
# The bias on the logits is a parameter here and a buffer there; fixed sinusoids are neither learnt nor stored.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "bert-base-uncased": (BERT, 109_514_298),
    "roberta-base": (ROBERTA, 124_697_433),
    "xlm-roberta-base": (XLMR, 278_295_186),
    "distilbert-base-uncased": (DISTILBERT, 66_985_530),
    "distilbert-sst-2": (SENTIMENT, 66_955_010),
    "electra-small-discriminator": (ELECTRA, 13_549_057),
    "ModernBERT-base": (MODERNBERT, 149_655_232),
    "t5-small": (T5, 60_506_624),
    "flan-t5-small": (FLAN, 76_961_152),
    "bart-base": (BART, 139_420_416 + 50_265),
    "opus-mt-en-de": (MARIAN, 74_410_496 - 2 * 512 * 512 + 58_101),
}


def read(values: dict[str, Any]) -> Any:
    return family_of(values, "config.json").read(values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood_to_the_last_parameter(name):
    values, n = PUBLISHED[name]
    assert read(values).build(device="meta").params().total == n


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_read_can_be_said(name):
    values, _ = PUBLISHED[name]
    family, spec = family_of(values, "config.json"), read(values)
    said = json.loads(json.dumps(family.config(spec)))
    assert family.read(said) == spec and family.config(family.read(said)) == said
    # XLM-R says nothing that RoBERTa does not, and is written as one.
    assert said["architectures"] == [values["architectures"][0].removeprefix("XLM").replace("XLMRoberta", "Roberta")]
    assert family_for(spec, values["model_type"]) == (family, family.config(spec))
    other, by_itself = family_for(spec)
    assert other.read(by_itself) == spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_field_that_nobody_reads_is_an_error(name):
    values, _ = PUBLISHED[name]
    with pytest.raises(WeightsError, match=r"config\.json: attention_twist is 3, which is not understood here and might change what the model computes\."):
        read(values | {"attention_twist": 3})


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_no_family_computes_is_not_said(name):
    spec = read(PUBLISHED[name][0])
    half = "" if isinstance(spec, Encoder) else "decoder."
    other = spec.at(f"{half}blocks.*.attention.position").set(ALiBi())
    with pytest.raises(WeightsError, match=f"No published family computes what this {type(spec).__name__} does"):
        family_for(other, PUBLISHED[name][0]["model_type"])


def test_what_the_published_configs_say_between_the_lines():
    assert read(ROBERTA).position == Learned(512, offset=2) and read(BART).encoder.position == Learned(1_024, offset=2)
    assert read(BERT).tied and isinstance(read(BERT).readout, LanguageModel) and read(SENTIMENT).readout.n_classes == 2
    assert read(ELECTRA).embedding.lift == LiftSum(128) and read(ELECTRA).readout == Tagger(1, transform=read(ELECTRA).readout.transform)
    assert [i for i, b in enumerate(read(MODERNBERT).blocks) if b.attention.mask == Everything()] == list(range(0, 22, 3))
    assert read(MODERNBERT).blocks[1].attention.mask == Window(65)
    assert read(T5).decoder.tied and not read(FLAN).decoder.tied and read(FLAN).encoder.blocks[0].feedforward.act == "gelu_tanh"
    assert read(MARIAN).shared and read(MARIAN).start == 58_100 and isinstance(read(MARIAN).encoder.embedding.scale, SqrtWidth)
    assert isinstance(read(SENTIMENT).readout, Classifier) and isinstance(read(BERT | {"architectures": None}).readout, States)


def test_every_family_of_encoders_has_a_published_config():
    kinds = {values["model_type"] for values, _ in PUBLISHED.values()}
    assert kinds == {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert", "t5", "bart", "marian"} <= families().keys()
