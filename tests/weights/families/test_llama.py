"""Llama: odd heads, biases, every scaling of rotary positions, tied and untied."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from weights.families.harness import COMMON, hold_decoder

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1_000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 10},
    "biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 3.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_is_the_reference(variant, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **COMMON, **VARIANTS[variant]
    )
    hold_decoder(config, tmp_path, layers=3)
