"""config.json of the checkpoints that are fetched most: each with the fields of its own that no other has, read without a complaint and said again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Window
from glassformer.parts.experts import Experts
from glassformer.parts.rotary import Llama3Scaling, LongRope, YaRNScaling
from glassformer.weights.family import family_of
from weights.families import test_published as decoders, test_published_encoders as encoders
from weights.families.test_deepseek import V2_LITE

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
DISTILGPT2 = GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6}
OPT_125M = decoders.OPT | {
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "torch_dtype": "float16",
    "word_embed_proj_dim": 768,
}
LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TINYLLAMA = LLAMA2 | {
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
}
LLAMA32 = LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
LLAMA32_AGAIN = LLAMA32 | {"pad_token_id": 128004, "unsloth_fixed": True, "unsloth_version": "2025.3.19"}
SMOLLM2 = LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL3 = decoders.MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
MIXTRAL = decoders.MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
QWEN25 = decoders.QWEN2 | {"max_window_layers": 24, "use_mrope": False}
R1_QWEN = decoders.QWEN2 | {
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_mrope": False,
}
QWEN3_MOE = decoders.QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
QWEN3_CODER = QWEN3_MOE | {
    "intermediate_size": 5472,
    "max_position_embeddings": 262144,
    "max_window_layers": 28,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
PHI3_4K = decoders.PHI3 | {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047}
PHI4_MINI = decoders.PHI3 | {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
OLMO2_1B = decoders.OLMO2 | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16}
SMOLLM3 = decoders.SMOLLM3 | {"transformers.js_config": {"dtype": "q4", "use_external_data_format": {"model.onnx": 1}}}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
CHINESE = encoders.BERT | {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
    "vocab_size": 21128,
}
NER = encoders.BERT | {
    "_num_labels": 9,
    "architectures": ["BertForTokenClassification"],
    "id2label": {str(i): name for i, name in enumerate(("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"))},
    "output_past": True,
    "vocab_size": 28996,
}
MINILM = encoders.BERT | {"architectures": ["BertModel"], "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
MARCO = MINILM | {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0.dev0"},
}
MNLI = encoders.ROBERTA | {
    "_num_labels": 3,
    "architectures": ["RobertaForSequenceClassification"],
    "hidden_size": 1024,
    "id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"},
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
BART_CNN = encoders.BART | {
    "_num_labels": 3,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layers": 12,
    "force_bos_token_to_be_generated": True,
    "length_penalty": 2.0,
    "num_hidden_layers": 12,
    "output_past": True,
    "prefix": " ",
    "static_position_embeddings": False,
    "vocab_size": 50264,
}
DISTILBART = BART_CNN | {
    "decoder_layers": 6,
    "extra_pos_embeddings": 2,
    "replacing_rate": 0,
    "student_decoder_layers": None,
    "student_encoder_layers": None,
    "task_specific_params": {},
}
POOLER_384 = 384 * 384 + 384
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (GPT2, 124_439_808),
    "distilgpt2": (DISTILGPT2, 81_912_576),
    "opt-125m": (OPT_125M, 125_239_296),
    "Llama-2-7b": (LLAMA2, 6_738_415_616),
    "TinyLlama-1.1B-Chat": (TINYLLAMA, 1_100_048_384),
    "Llama-3.2-1B": (LLAMA32, 1_235_814_400),
    "Llama-3.2-1B-uploaded-again": (LLAMA32_AGAIN, 1_235_814_400),
    "SmolLM2-135M-Instruct": (SMOLLM2, 134_515_008),
    "SmolLM3-3B": (SMOLLM3, 3_075_098_624),
    "Mistral-7B-v0.3": (MISTRAL3, 7_248_023_552),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "DeepSeek-R1-Distill-Qwen-1.5B": (R1_QWEN, 1_777_088_000),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30_532_122_624),
    "Qwen3-Coder-30B-A3B": (QWEN3_CODER, 30_532_122_624),
    "Phi-3-mini-4k": (PHI3_4K, 3_821_079_552),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760),
    "OLMo-2-1B": (OLMO2_1B, 1_484_916_736),
    "gpt-oss-20b": (GPT_OSS, 20_914_757_184),
    "DeepSeek-V2-Lite": (V2_LITE | {"architectures": ["DeepseekV2ForCausalLM"], "ep_size": 1}, 15_706_484_224),
    "bert-base-chinese": (CHINESE, 102_290_312),
    "bert-base-multilingual-cased": (CHINESE | {"vocab_size": 119547}, 177_974_523),
    "bert-base-NER": (NER, 107_726_601),
    "all-MiniLM-L6-v2": (MINILM, 22_713_216 - POOLER_384),  # whose sentences are means of states
    "ms-marco-MiniLM-L-6-v2": (MARCO, 22_713_601),
    "roberta-large-mnli": (MNLI, 355_362_819),
    "bart-large-cnn": (BART_CNN, 406_290_432 + 50_264),
    "distilbart-cnn-12-6": (DISTILBART, 305_510_400 + 50_264),
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
    assert family.read(json.loads(json.dumps(family.config(spec)))) == spec


OTHERWISE: dict[str, tuple[str, Any, str]] = {
    "pairs": ("SmolLM2-135M-Instruct", {"rope_interleaved": True}, "rope_interleaved is True, but only False"),
    "window": ("SmolLM2-135M-Instruct", {"use_sliding_window": True}, "use_sliding_window is True, but only False"),
    "images": ("Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope is True, but only False"),
    "no-biases": ("Qwen2.5-0.5B", {"qkv_bias": False}, "qkv_bias is False, but only True"),
    "shared": ("Qwen3-Coder-30B-A3B", {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size is 768, but only 0"),
    "no-norms": ("Qwen3-Coder-30B-A3B", {"use_qk_norm": False}, "use_qk_norm is False, but only True"),
    "biases": ("Qwen3-Coder-30B-A3B", {"qkv_bias": True}, "qkv_bias is True, but only False"),
    "head": ("Phi-4-mini", {"lm_head_bias": True}, "lm_head_bias is True, but only False"),
    "some-layers": ("Phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod is 2, but only 1"),
    "squeezed": ("Phi-4-mini", {"interpolate_factor": 2}, "interpolate_factor is 2, but only 1"),
    "mlp": ("Mistral-7B-v0.3", {"mlp_bias": True}, "mlp_bias is True, but only False"),
    "attention": ("Mixtral-8x7B", {"attention_bias": True}, "attention_bias is True, but only False"),
    "one-way": ("bert-base-chinese", {"directionality": "left"}, "directionality is 'left', but only 'bidi'"),
    "rows": ("distilbart-cnn-12-6", {"extra_pos_embeddings": 0}, "extra_pos_embeddings is 0, but only 2"),
    "fixed": ("bart-large-cnn", {"static_position_embeddings": True}, "static_position_embeddings is True, but only False"),
    "pair": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True, but only False"),
    "table": ("opt-125m", {"learned_embeddings": False}, "learned_embeddings is False, but only True"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_the_same_field_with_another_value_is_refused(case):
    name, changed, said = OTHERWISE[case]
    with pytest.raises(WeightsError, match=f"config.json: {said} is supported: this model computes something that would be left out"):
        read(PUBLISHED[name][0] | changed)


def test_what_files_of_other_programs_repeat_is_no_matter():
    """Dumps of all fields there are, and words that the tokenizer has anyway."""
    words = {"bos_token": "<s>", "eos_token": "</s>", "_attn_implementation_internal": "sdpa", "model_max_length": 2048, "neftune_noise_alpha": 5}
    pair = {"is_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False, "cross_attention_hidden_size": None, "pruned_heads": {}}
    window = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    for name in ("gpt2", "opt-125m", "Llama-2-7b", "Qwen2.5-0.5B", "Phi-4-mini", "Mixtral-8x7B"):
        values = PUBLISHED[name][0]
        assert read(values | words | pair) == read(values), name
    with pytest.raises(WeightsError, match="sliding_window is 4096, which is not understood here"):
        read(LLAMA2 | {"sliding_window": 4096})
    assert read(LLAMA2 | window) == read(LLAMA2) and read(QWEN25 | {"attention_bias": True}) == read(QWEN25)
    assert read(decoders.PYTHIA | pair) == read(decoders.PYTHIA) and read(decoders.GPTJ | pair) == read(decoders.GPTJ)
    assert read(encoders.DISTILBERT | {"layer_norm_eps": 1e-5}) == read(encoders.DISTILBERT)
    assert read(GPT2 | {"predict_special_tokens": True, "n_special": 0}) == read(GPT2)


def test_what_the_published_configs_say_between_the_lines():
    scaling = read(LLAMA32).blocks[0].attention.position.scaling
    assert scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192) and read(LLAMA32).tied and read(LLAMA32_AGAIN) == read(LLAMA32)
    turned = read(PHI4_MINI).blocks[0].attention.position
    assert turned.fraction == 0.75 and isinstance(turned.scaling, LongRope) and turned.scaling.factor == 32.0 and read(PHI4_MINI).tied
    assert all(b.attention.mask == Window(2047) for b in read(PHI3_4K).blocks) and read(MISTRAL3).blocks[0].attention.mask == Everything()
    assert all(isinstance(b.feedforward, Experts) and b.feedforward.normalise for b in read(QWEN3_CODER).blocks)
    assert read(QWEN3_CODER).blocks[0].attention.position.base == 1e7 and all(b.attention.mask == Everything() for b in read(R1_QWEN).blocks)
    oss = read(GPT_OSS).blocks[1].attention.position.scaling
    assert isinstance(oss, YaRNScaling) and not oss.truncate and [b.attention.mask for b in read(GPT_OSS).blocks] == [Window(128), Everything()] * 12
    assert read(MARCO).readout.n_classes == 1 and read(MNLI).readout.n_classes == 3 and read(NER).readout.n_classes == 9


# Weights in few bits

PACKED: dict[str, dict[str, Any]] = {
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"bits": 4, "group_size": 128, "quant_method": "gptq"},
    "awq": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    "compressed-tensors": {"format": "pack-quantized", "quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "DeepSeek-V2-Lite", "gpt-oss-20b"])
def test_quantised_weights_are_refused_by_the_name_of_their_format(name, method):
    with pytest.raises(WeightsError, match=rf"config\.json: .* format '{method}' \(quantization_config, quant_method\), which is not read") as caught:
        read(PUBLISHED[name][0] | {"quantization_config": PACKED[method]})
    said = str(caught.value)
    assert "Fetch the same model unquantised" in said and "GGUF" in said and "ignore" not in said


def test_quantised_weights_that_name_no_format():
    with pytest.raises(WeightsError, match=r"quantised in few bits \(quantization is \{.*\}\), which is not read here") as caught:
        read(LLAMA32 | {"quantization": {"group_size": 64, "bits": 4}})
    assert "ignore" not in str(caught.value)
    assert read(LLAMA32 | {"quantization_config": None, "quantization": {}}) == read(LLAMA32)
    assert read(GPT_OSS | {"quantization_config": None}) == read(GPT_OSS)
    with pytest.raises(WeightsError, match=r"quantization_config: bits is 3, which is not understood here"):
        read(GPT_OSS | {"quantization_config": {"quant_method": "mxfp4", "bits": 3}})
