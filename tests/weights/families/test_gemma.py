"""Gemma 1, 2 and 3: scaled embeddings, norms around norms, caps, windows that alternate unevenly, two rotations in one model, the text half of a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.core.mask import Everything, Window
from glassformer.parts.rotary import LinearScaling, Rotary
from glassformer.weights.family import families
from parity.reference import close, greedy_together
from weights.families.harness import COMMON, hold_decoder, ids, opened, saved

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "max_position_embeddings": 64, **COMMON}
UNEVEN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

GEMMA: dict[str, dict[str, Any]] = {
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 10},
    "biases-untied": {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "relu"},
}


@pytest.mark.parametrize("variant", GEMMA)
def test_gemma_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.GemmaConfig(**SIZES, num_hidden_layers=3, **GEMMA[variant]), tmp_path, layers=3)


GEMMA2: dict[str, dict[str, Any]] = {
    "alternating": {"num_key_value_heads": 1, "head_dim": 10, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "uneven-uncapped": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": UNEVEN,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 2.0},
    },
}


@pytest.mark.parametrize("variant", GEMMA2)
def test_gemma2_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.Gemma2Config(**SIZES, num_hidden_layers=4, sliding_window=5, **GEMMA2[variant]), tmp_path, layers=4)


TWO_BASES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA3: dict[str, dict[str, Any]] = {
    "two-bases": {"num_key_value_heads": 1, "head_dim": 10, "query_pre_attn_scalar": 13, "layer_types": UNEVEN, "rope_parameters": TWO_BASES},
    "capped-untied": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window_pattern": 2,
    },
}


@pytest.mark.parametrize("variant", GEMMA3)
def test_gemma3_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=4, sliding_window=5, **GEMMA3[variant]), tmp_path, layers=4)


# The text half of a whole Gemma 3


def whole() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "num_hidden_layers": 4, "sliding_window": 5, **GEMMA3["two-bases"]}
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=58, eoi_token_index=59
    )


def test_the_text_half_of_a_whole_model_is_the_reference(tmp_path):
    reference = saved(whole(), tmp_path / "theirs", transformers.AutoModelForImageTextToText)
    model, tokens = opened(tmp_path / "theirs"), ids(2, 15) % 57
    report = weights.open(tmp_path / "theirs").load()[1]
    assert report.left and all("vision_tower" in n or "multi_modal_projector" in n for n in report.left)
    with torch.no_grad():
        close(model(tokens), reference(input_ids=tokens).logits, "logits")
    # It is given back as the text half alone, which the reference library opens as such.
    weights.export_hf(model, tmp_path / "back", config=weights.open(tmp_path / "theirs").config)
    again, info = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        close(again(tokens).logits, reference(input_ids=tokens).logits, "logits of what was given back")
    greedy_together(model, again.eval(), ids(2, 5, seed=2), 12)


@pytest.mark.parametrize("place", ["language_model.model.", "model.language_model."])
def test_a_whole_model_may_hold_it_in_either_place(place, tmp_path):
    saved(whole(), tmp_path / "theirs", transformers.AutoModelForImageTextToText)
    want = opened(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {}
    for name, x in load_file(file).items():
        for known in ("language_model.model.", "model.language_model."):
            if name.startswith(known):
                name = place + name.removeprefix(known)
        tensors[name] = x
    assert any(name.startswith(place) for name in tensors)
    save_file(tensors, file)
    for (name, x), y in zip(want.named_parameters(), opened(tmp_path / "theirs").parameters(), strict=True):
        assert torch.equal(x, y), name


# Files that say little, and older ones


def test_an_almost_empty_text_config_has_the_usual_sizes():
    """As in the published 4b model, whose table leaves out what is usual."""
    text = {"hidden_size": 2_560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1_024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    values = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1_152}, "image_token_index": 262_144}
    spec = families()["gemma3"].read(values)
    assert (spec.vocab_size, spec.d_model, len(spec.blocks), spec.tied) == (262_208, 2_560, 34, True)
    local, wide = spec.blocks[4].attention, spec.blocks[5].attention
    assert local.sizes(2_560) == (8, 4, 256, 256)
    assert local.mask == Window(1_024) and local.position == Rotary(base=10_000.0)
    assert wide.mask == Everything() and wide.position == Rotary(base=1_000_000.0, scaling=LinearScaling(8.0))


TINY3 = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
ROTATIONS: dict[str, dict[str, Any]] = {
    "unsaid": {},
    "older": {"rope_theta": 5e5, "rope_local_base_freq": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "older-without-local": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "older-unscaled": {"rope_theta": 1e6, "rope_local_base_freq": 10_000, "rope_scaling": None},
    "flat": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "flat-and-beside": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 7e5, "rope_local_base_freq": 50.0},
    "flat-and-tables": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 3e5,
            "full_attention": {"rope_type": "default", "rope_theta": 4e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        }
    },
    "one-table": {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 6e5}}},
    "the-other-table": {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}, "rope_theta": 8e5},
    "tables-without-bases": {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 3e5, "rope_local_base_freq": 20.0},
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_gemma3_turns_each_kind_of_layer_as_the_reference_does(case):
    """One flat table is that of the layers that see all; the others turn by a base of their own."""
    fields = {**TINY3, "num_hidden_layers": 6, **ROTATIONS[case]}
    spec = families()["gemma3_text"].read(fields)
    reference = Gemma3RotaryEmbedding(transformers.Gemma3TextConfig(**copy.deepcopy(fields)))
    for block, kind in ((spec.blocks[0], "sliding_attention"), (spec.blocks[5], "full_attention")):
        ours = block.attention.position
        stretch = getattr(ours.scaling, "factor", 1.0)
        torch.testing.assert_close(ours.base ** -(torch.arange(0, 8, 2) / 8) / stretch, getattr(reference, f"{kind}_inv_freq"), atol=0, rtol=1e-6)
    assert families()["gemma3_text"].read(families()["gemma3_text"].config(spec)) == spec


def test_a_flat_table_is_that_of_the_layers_that_see_all():
    spec = families()["gemma3_text"].read({**TINY3, "num_hidden_layers": 6, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}})
    assert spec.blocks[5].attention.position == Rotary(base=5e5, scaling=LinearScaling(8.0)) and spec.blocks[0].attention.position == Rotary(base=10_000.0)


@pytest.mark.parametrize("scalar", [7, 168, 144, 224, 256, 12.5, 0.3])
def test_the_scale_of_scores_is_said_as_it_was_read(scalar):
    for kind in ("gemma2", "gemma3_text"):
        family = families()[kind]
        spec = family.read({**TINY3, "num_hidden_layers": 1, "query_pre_attn_scalar": scalar})
        assert spec.blocks[0].attention.scale == scalar**-0.5
        said = family.config(spec)["query_pre_attn_scalar"]
        assert said == pytest.approx(scalar) and isinstance(said, type(scalar)) and family.read(family.config(spec)) == spec


def test_the_activation_of_gemma_s_first_files():
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "head_dim": 4}
    act = lambda **more: families()["gemma"].read(values | more).blocks[0].feedforward.act
    assert act() == act(hidden_act="gelu") == act(hidden_act="gelu", hidden_activation=None) == "gelu_tanh"
    assert act(hidden_activation="gelu") == "gelu" and act(hidden_act="relu") == "relu"


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_what_makes_an_encoder_of_it_is_refused(kind):
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    with pytest.raises(WeightsError, match=r"use_bidirectional_attention is True, but only False is supported"):
        families()[kind].read(values | {"use_bidirectional_attention": True})
