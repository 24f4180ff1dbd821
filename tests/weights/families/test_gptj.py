"""GPT-J: one norm for two branches, neighbours turned in pairs, a bias on the read-out."""

from __future__ import annotations

import pytest
import transformers

from glassformer.core.errors import WeightsError
from glassformer.weights.families.gptj import fraction_of
from glassformer.weights.family import families
from weights.families.harness import COMMON, hold_decoder


@pytest.mark.parametrize(("rotary_dim", "tied", "inner"), [(4, False, 44), (8, True, None)])
def test_gptj_is_the_reference(rotary_dim, tied, inner, tmp_path):
    config = transformers.GPTJConfig(
        n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=rotary_dim, n_inner=inner, tie_word_embeddings=tied, layer_norm_epsilon=1e-4, **COMMON
    )
    hold_decoder(config, tmp_path, layers=3)


def test_a_fraction_gives_its_features_back():
    assert all(int(fraction_of(r, k) * k) == r for k in range(2, 400) for r in range(1, k + 1))


def test_a_head_that_is_too_small_is_named():
    with pytest.raises(WeightsError, match=r"rotary_dim is 64, but a head has 8 features \(n_embd=32, n_head=4\)\."):
        families()["gptj"].read({"vocab_size": 9, "n_embd": 32, "n_head": 4, "n_layer": 1})
