"""OLMo 2: norms inside the residual, and over all heads at once."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from weights.families.harness import COMMON, hold_decoder

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2, "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "one-kv-head": {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_olmo2_is_the_reference(variant, tmp_path):
    config = transformers.Olmo2Config(
        hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **COMMON, **VARIANTS[variant]
    )
    hold_decoder(config, tmp_path, layers=3)
