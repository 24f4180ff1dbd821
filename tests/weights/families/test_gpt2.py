"""GPT-2: tied and untied, an inner width of its own."""

from __future__ import annotations

import pytest
import transformers

from weights.families.harness import COMMON, hold_decoder


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_is_the_reference(tied, tmp_path):
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=44,
        n_positions=64,
        layer_norm_epsilon=1e-4,
        tie_word_embeddings=tied,
        activation_function="relu" if tied else "gelu_new",
        **COMMON,
    )
    hold_decoder(config, tmp_path, layers=3)
