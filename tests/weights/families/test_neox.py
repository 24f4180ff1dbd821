"""GPT-NeoX and Pythia: side by side or one after the other, with and without biases, a part of each head turned."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from glassformer import weights
from glassformer.weights.family import families
from weights.families.harness import COMMON, hold_decoder, opened

VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000.0, "partial_rotary_factor": 0.25}},
    "sequential-bare-tied": {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    "linear": {"layer_norm_eps": 1e-3, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0, "partial_rotary_factor": 1.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_neox_is_the_reference(variant, tmp_path):
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **COMMON, **VARIANTS[variant]
    )
    model, _ = hold_decoder(config, tmp_path, layers=3)
    if variant == "parallel":  # the read-out bears two names, as one program or the other wrote it; we write the published files'
        for name, other in (("lm_head", "embed_out"), ("embed_out", "lm_head")):
            file = tmp_path / "back" / "model.safetensors"
            assert f"{other}.weight" in weights.open(tmp_path / "back").tensors
            tensors = {n.replace(other, name): x for n, x in load_file(file).items()}
            save_file(tensors, file)
            assert opened(tmp_path / "back").readout.matrix.equal(model.readout.matrix)


def test_published_files_name_the_rotation_otherwise():
    values = {"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    old = families()["gpt_neox"].read(values | {"rotary_pct": 0.5, "rotary_emb_base": 500, "classifier_dropout": 0.1, "is_decoder": True})
    new = families()["gpt_neox"].read(values | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}})
    assert old == new and old.blocks[0].attention.position.fraction == 0.5
    assert families()["gpt_neox"].read(values).blocks[0].attention.position.fraction == 0.25
