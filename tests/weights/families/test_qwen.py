"""Qwen2 and Qwen3: biases on queries, keys and values alone; norms on them; windows from some layer on, or where layer_types says."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Window
from glassformer.weights.family import families
from weights.families.harness import COMMON, hold_decoder

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **COMMON,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "upper-windows-tied": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    "mixed-windows-yarn": {
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": MIXED,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1_000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_qwen2_is_the_reference(variant, tmp_path):
    more = {"head_dim": 10} if variant == "plain" else {}
    model, _ = hold_decoder(transformers.Qwen2Config(**SIZES, **VARIANTS[variant], **more), tmp_path, layers=4)
    assert model.blocks[0].attn.qkv.bias is not None and model.blocks[0].attn.out.bias is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_qwen3_is_the_reference(variant, tmp_path):
    biased = variant == "upper-windows-tied"
    config = transformers.Qwen3Config(**SIZES, **VARIANTS[variant], head_dim=10, attention_bias=biased)
    model, _ = hold_decoder(config, tmp_path, layers=4)
    assert (model.blocks[0].attn.out.bias is not None) == biased and model.blocks[0].attn.q_norm.weight.shape == (10,)


def test_windows_of_older_files_begin_at_a_layer():
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8, "sliding_window": 7}
    for kind in ("qwen2", "qwen3"):
        masks = lambda kind=kind, **more: [b.attention.mask for b in families()[kind].read(values | more).blocks]
        assert masks() == [Everything()] * 3, "a window that is not used"
        assert masks(use_sliding_window=True, max_window_layers=1) == [Everything(), Window(7), Window(7)]
        assert masks(use_sliding_window=True) == [Everything()] * 3, "the usual first layer with a window is the 28th"
        with pytest.raises(WeightsError, match=r"layer_types names 2 layers, but num_hidden_layers is 3\."):
            masks(layer_types=["full_attention"] * 2)
        with pytest.raises(WeightsError, match=r"layer_types holds 'linear_attention', but only 'full_attention' and 'sliding_attention' are supported\."):
            masks(layer_types=["linear_attention"] * 3)
