"""Qwen3-MoE: dense and sparse blocks mixed in both of its ways, weights of the chosen divided by their sum or not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from glassformer import weights
from glassformer.parts.experts import Experts
from weights.families.harness import COMMON, hold_decoder, saved

VARIANTS: dict[str, dict[str, Any]] = {
    "dense-first": {"num_key_value_heads": 1, "head_dim": 10, "mlp_only_layers": [0], "norm_topk_prob": True},
    "every-other": {"num_key_value_heads": 2, "decoder_sparse_step": 2, "tie_word_embeddings": True, "attention_bias": True},
    "all-sparse": {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_experts_per_tok": 5},
    "both-ways": {"num_key_value_heads": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3], "rms_norm_eps": 1e-3},
}


def tiny(**more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "moe_intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.Qwen3MoeConfig(**{**sizes, "num_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 64, **COMMON, **more})


@pytest.mark.parametrize("variant", VARIANTS)
def test_qwen3_moe_is_the_reference(variant, tmp_path):
    hold_decoder(tiny(**VARIANTS[variant]), tmp_path, layers=4)


def test_which_blocks_are_sparse(tmp_path):
    sparse = lambda folder: [isinstance(b.feedforward, Experts) for b in weights.open(folder).spec.blocks]
    saved(tiny(**VARIANTS["both-ways"]), tmp_path)
    assert sparse(tmp_path) == [False, True, False, False]


def test_the_number_of_experts_has_two_names(tmp_path):
    """Published files say num_experts, the reference library now writes num_local_experts."""
    saved(tiny(), tmp_path)
    spec = weights.open(tmp_path).spec
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_experts"] = values.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert weights.open(tmp_path).spec == spec and spec.blocks[0].feedforward.n_experts == 5
