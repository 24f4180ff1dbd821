"""Every decoder that a family reads can be said again: by that family, and by some family when nobody says by which."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glassformer.core.errors import WeightsError
from glassformer.models import Decoder
from glassformer.parts.position import ALiBi
from glassformer.weights.family import families, family_for

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 8,
}
PLAIN = {k: v for k, v in LLAMA_LIKE.items() if k not in ("head_dim", "num_key_value_heads")}
LISTS = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 6.0]}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", LLAMA_LIKE | {"sliding_window": 3}),
    "mistral-dynamic": ("mistral", LLAMA_LIKE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}),
    "qwen2": ("qwen2", LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 3, "layer_types": KINDS}),
    "smollm3": ("smollm3", LLAMA_LIKE | {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True}),
    "smollm3-nowhere": ("smollm3", LLAMA_LIKE | {"no_rope_layers": [0, 0, 0, 0]}),
    "phi3": ("phi3", LLAMA_LIKE | {"rope_scaling": LISTS, "max_position_embeddings": 48, "original_max_position_embeddings": 16}),
    "phi3-partial": ("phi3", LLAMA_LIKE | {"partial_rotary_factor": 0.34, "sliding_window": 4}),
    "olmo2": ("olmo2", LLAMA_LIKE | {"attention_bias": True}),
    "gemma": ("gemma", LLAMA_LIKE),
    "gemma2": ("gemma2", LLAMA_LIKE | {"query_pre_attn_scalar": 7, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", LLAMA_LIKE | {"query_pre_attn_scalar": 6, "rope_theta": 500.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}),
    "gemma3-local": ("gemma3_text", LLAMA_LIKE | {"layer_types": ["sliding_attention"] * 4, "sliding_window": 3}),
    "neox": ("gpt_neox", PLAIN | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "gptj": ("gptj", {"vocab_size": 9, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 6}),
    "opt": ("opt", {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 8, "word_embed_proj_dim": 4}),
    "opt-after": (
        "opt",
        {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 8, "do_layer_norm_before": False},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_can_be_said(name):
    kind, values = CONFIGS[name]
    family = families()[kind]
    spec = family.read(values)
    said = json.loads(json.dumps(family.config(spec)))
    assert said["model_type"] == kind and said["architectures"]
    assert family.read(said) == spec and family.config(family.read(said)) == said
    assert family_for(spec, kind) == (family, family.config(spec))
    other, by_itself = family_for(spec)
    assert other.read(by_itself) == spec


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_that_nobody_reads_is_an_error(name):
    kind, values = CONFIGS[name]
    with pytest.raises(WeightsError, match=r"config\.json: attention_twist is 3, which is not understood here and might change what the model computes\."):
        families()[kind].read(values | {"attention_twist": 3})


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("gptj", "opt", "opt-after")])
def test_what_no_family_computes_is_not_said(name):
    kind, values = CONFIGS[name]
    spec: Decoder = families()[kind].read(values).at("blocks.*.attention.position").set(ALiBi())
    with pytest.raises(WeightsError, match=r"No published family computes what this Decoder does"):
        family_for(spec, kind)
