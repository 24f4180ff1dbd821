"""Mixtral: uneven heads, a window, tied and untied, one expert a token and all of them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from weights.families.harness import COMMON, hold_decoder

VARIANTS: dict[str, dict[str, Any]] = {
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2},
    "window-tied": {"num_key_value_heads": 2, "sliding_window": 6, "tie_word_embeddings": True, "num_local_experts": 3, "num_experts_per_tok": 1},
    "all-experts": {"num_key_value_heads": 4, "num_local_experts": 3, "num_experts_per_tok": 3, "rms_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixtral_is_the_reference(variant, tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **COMMON, **VARIANTS[variant]
    )
    hold_decoder(config, tmp_path, layers=3)
