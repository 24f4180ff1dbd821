"""SmolLM3: layers without positions, which may also see a window."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from glassformer.core.errors import WeightsError
from glassformer.parts.position import NoPosition
from glassformer.parts.rotary import Rotary
from glassformer.weights.family import families
from weights.families.harness import COMMON, hold_decoder

VARIANTS: dict[str, dict[str, Any]] = {
    "every-other": {"num_key_value_heads": 2, "no_rope_layer_interval": 2, "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "first-without": {"num_key_value_heads": 1, "no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "windows": {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_smollm3_is_the_reference(variant, tmp_path):
    config = transformers.SmolLM3Config(
        hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64, **COMMON, **VARIANTS[variant]
    )
    model, _ = hold_decoder(config, tmp_path, layers=4)
    kinds = [type(b.attention.position) for b in model.spec.blocks]
    assert kinds == [Rotary if has else NoPosition for has in config.no_rope_layers]


def test_too_few_layers_are_named():
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(WeightsError, match=r"no_rope_layers names 2 layers, but num_hidden_layers is 3\."):
        families()["smollm3"].read(values | {"no_rope_layers": [1, 0]})
