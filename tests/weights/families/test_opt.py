"""OPT: norms before and after, positions that begin at row 2, a table narrower than the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from glassformer.core.errors import WeightsError
from glassformer.core.tap import Record
from glassformer.weights.family import families
from parity.reference import close, greedy_together
from weights.families.harness import COMMON, given_back, hold_decoder, ids, opened, saved

SIZES: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **COMMON}
VARIANTS: dict[str, dict[str, Any]] = {
    "before": {},
    "before-bare": {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "after": {"do_layer_norm_before": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_opt_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.OPTConfig(**SIZES, **VARIANTS[variant]), tmp_path, layers=3)


@pytest.mark.parametrize(("before", "tied"), [(False, True), (True, False)])
def test_opt_with_a_narrow_table_is_the_reference(before, tied, tmp_path):
    """The reference calls what its read-out reads the last hidden state, after it has been narrowed; the stream before is compared by its blocks."""
    config = transformers.OPTConfig(**SIZES, word_embed_proj_dim=12, do_layer_norm_before=before, tie_word_embeddings=tied)
    reference = saved(config, tmp_path / "theirs")
    model, tap = opened(tmp_path / "theirs"), Record("**")
    with torch.no_grad():
        theirs, ours = reference(ids(2, 15), output_hidden_states=True, output_attentions=True), model(ids(2, 15), tap=tap)
    for i in range(3):
        close(tap[f"blocks.{i}.resid_pre"], theirs.hidden_states[i], f"stream into layer {i}")
        close(tap[f"blocks.{i}.attn.pattern"], theirs.attentions[i], f"pattern of layer {i}")
    close(ours, theirs.logits, "logits")
    greedy_together(model, reference, ids(2, 5, seed=2), 32)
    given_back(model, reference, tmp_path, type(reference))


def test_norms_without_weights_are_refused():
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8}
    with pytest.raises(WeightsError, match=r"layer_norm_elementwise_affine is False, but only True is supported"):
        families()["opt"].read(values | {"layer_norm_elementwise_affine": False})
