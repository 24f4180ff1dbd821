"""Mistral: with a window and without, one key/value head, heads of a size of their own, a base that grows with the text."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from glassformer.core.mask import Everything, Window
from glassformer.weights.family import families
from weights.families.harness import COMMON, hold_decoder

VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 10, "tie_word_embeddings": True},
    "no-window": {"num_key_value_heads": 1, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"},
    # 15 tokens in a row, and 37 one by one: the base has grown in both.
    "dynamic": {
        "num_key_value_heads": 4,
        "sliding_window": None,
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mistral_is_the_reference(variant, tmp_path):
    fields = {"max_position_embeddings": 64} | COMMON | VARIANTS[variant]
    config = transformers.MistralConfig(hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, **fields)
    hold_decoder(config, tmp_path, layers=3)


def test_a_missing_window_is_the_usual_one_and_null_is_none():
    values = {"model_type": "mistral", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    mask = lambda **more: families()["mistral"].read(values | more).blocks[0].attention.mask
    assert mask() == Window(4_096) and mask(sliding_window=None) == Everything() and mask(sliding_window=7) == Window(7)
