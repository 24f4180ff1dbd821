"""Presets: names, overrides, and the facts of the published shapes."""

from __future__ import annotations

import pytest
import torch

from glassformer.core.errors import SpecError
from glassformer.models.presets import names, preset
from glassformer.parts.rotary import Llama3Scaling


def test_names():
    assert names() == [
        *("tiny", "small", "transformer-base", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
        *("llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.2-1b", "bert-base", "t5-small"),
    ]


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(SpecError, match=r"No preset is named 'gtp2'\. Did you mean 'gpt2'.* Known: tiny, small, "):
        preset("gtp2")
    with pytest.raises(SpecError, match=r"Decoder has no field 'vocab'\. Did you mean 'vocab_size'\?"):
        preset("tiny", vocab=3)


def test_fields_can_be_overridden():
    spec = preset("tiny", vocab_size=65)
    assert spec.vocab_size == 65 and spec.diff(preset("tiny")) == "vocab_size: 256 -> 65"
    assert spec.build(seed=0)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 65)


@pytest.mark.parametrize("name", names())
def test_each_call_gives_an_equal_spec(name):
    assert preset(name) == preset(name)


def test_facts():
    gpt2, llama, bert, t5 = (preset(n) for n in ("gpt2", "llama3-70b", "bert-base", "t5-small"))
    assert (len(gpt2.blocks), gpt2.d_model, gpt2.tied, gpt2.position.max_positions) == (12, 768, True, 1024)
    a = llama.blocks[0].attention
    assert (len(llama.blocks), a.n_heads, a.n_kv_heads, a.position.base, llama.tied) == (80, 64, 8, 500_000.0, False)
    assert preset("llama3.2-1b").blocks[0].attention.position.scaling == Llama3Scaling(factor=32.0)
    assert bert.embedding.n_types == 2 and bert.readout.transform is not None and bert.final_norm.build(3)(torch.ones(3), None).tolist() == [1, 1, 1]
    assert t5.encoder.blocks[0].attention.scale == 1.0 and t5.decoder.blocks[0].cross is not None and t5.shared
    assert preset("transformer-base").decoder.blocks[0].dropout == 0.1


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.5e6, 2e6), ("small", 8e6, 20e6), ("transformer-base", 60e6, 66e6)])
def test_sizes_of_those_without_a_published_total(name, low, high):
    """The paper gives 65 million for its base model, with a vocabulary of about 37,000."""
    assert low < preset(name).build(device="meta").params().total < high
