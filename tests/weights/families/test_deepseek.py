"""DeepSeek-V2 and V3: with and without query latents, groups, shared experts, YaRN with its two magnitudes, both rotary layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.core.tap import Record
from glassformer.weights.families.deepseek import V2
from parity.reference import close, greedy_together, hold_together
from weights.families.harness import COMMON, given_back, hold_decoder, ids, opened, saved

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
V2S: dict[str, dict[str, Any]] = {
    "greedy": {"q_lora_rank": 9, "n_shared_experts": 2},
    "direct": {"q_lora_rank": None, "n_shared_experts": 1, "attention_bias": True, "mlp_bias": True, "first_k_dense_replace": 0, "rms_norm_eps": 1e-3},
    "groups": {"q_lora_rank": 9, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "yarn": {"q_lora_rank": 9, "n_shared_experts": 1, "tie_word_embeddings": True, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
}
V3S: dict[str, dict[str, Any]] = {
    "groups": {"q_lora_rank": 9, "n_group": 4, "topk_group": 2},
    "direct": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "attention_bias": True, "n_shared_experts": 3},
    "half": {"q_lora_rank": 9, "n_group": 2, "topk_group": 1, "rope_interleave": False, "tie_word_embeddings": True, "first_k_dense_replace": 2},
    "yarn": {"q_lora_rank": 9, "n_group": 2, "topk_group": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-unlike": {"q_lora_rank": None, "n_group": 2, "topk_group": 1, "rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 0.8}},
}


class Corrected:
    """Reference models whose corrections, which start from zero, say something."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
        g = torch.Generator().manual_seed(3)
        for name, x in model.named_buffers():
            if name.endswith("correction_bias"):
                x.copy_(0.3 * torch.randn(x.shape, generator=g))
        return model


@pytest.mark.parametrize("variant", V2S)
def test_deepseek_v2_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.DeepseekV2Config(**{**SIZES, **COMMON, **V2S[variant]}), tmp_path, layers=3)


@pytest.mark.parametrize("variant", V3S)
def test_deepseek_v3_is_the_reference(variant, tmp_path):
    reference = saved(transformers.DeepseekV3Config(**{**SIZES, **COMMON, **V3S[variant]}), tmp_path / "theirs", auto=Corrected)
    model = opened(tmp_path / "theirs")
    assert model.blocks[2].experts.routing.correction.abs().min() > 0
    hold_together(model, reference, ids(2, 15), 3)
    greedy_together(model, reference, ids(2, 5, seed=2), 32)
    given_back(model, reference, tmp_path, type(reference))


def test_latents_are_the_references(tmp_path):
    reference = saved(transformers.DeepseekV3Config(**{**SIZES, **COMMON, **V3S["groups"]}), tmp_path, auto=Corrected)
    model, tap, theirs = opened(tmp_path), Record("**.latent", "**.q_latent", "**.z"), {}
    for i, layer in enumerate(reference.model.layers):
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            getattr(layer.self_attn, name).register_forward_hook(lambda m, x, y, key=(i, name): theirs.__setitem__(key, y))
        layer.self_attn.o_proj.register_forward_hook(lambda m, x, y, key=(i, "z"): theirs.__setitem__(key, x[0]))
    with torch.no_grad():
        model(ids(), tap=tap)
        reference(ids())
    for i in range(3):
        torch.testing.assert_close(tap[f"blocks.{i}.attn.latent"], theirs[i, "kv_a_layernorm"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tap[f"blocks.{i}.attn.q_latent"], theirs[i, "q_a_layernorm"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tap[f"blocks.{i}.attn.z"].flatten(2), theirs[i, "z"], atol=1e-5, rtol=1e-5)


def test_corrections_are_loaded_in_float32_whatever_the_type_of_the_rest(tmp_path):
    reference = saved(transformers.DeepseekV3Config(**{**SIZES, **COMMON, **V3S["groups"]}), tmp_path / "theirs", auto=Corrected)
    model, _ = weights.open(tmp_path / "theirs").load(dtype=torch.bfloat16)
    layer, theirs = model.blocks[1].experts, reference.model.layers[1].mlp.gate
    assert layer.router.weight.dtype == torch.bfloat16 and torch.equal(layer.routing.correction, theirs.e_score_correction_bias)
    weights.export_hf(model, tmp_path / "back")
    again = type(reference).from_pretrained(tmp_path / "back")
    assert torch.equal(again.model.layers[1].mlp.gate.e_score_correction_bias, theirs.e_score_correction_bias)


# Configs as they are published

V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_a_published_config_has_the_published_size():
    """DeepSeek-V2-Lite: 15.7 billion parameters, 2.4 of them in use for a token (arXiv 2405.04434, appendix B)."""
    spec = V2.read(V2_LITE)
    model = spec.build(device="meta")
    assert model.params().total / 1e9 == pytest.approx(15.7, abs=0.05)
    assert model.bytes().cache_per_token == 27 * (512 + 64) * 4
    assert spec.blocks[0].attention.scale == pytest.approx(192**-0.5 * (0.0707 * 3.6888794541139363 + 1) ** 2, rel=1e-12)
    assert spec.blocks[0].attention.position.scaling.attention_factor == 1.0


def test_a_config_is_given_back_as_it_was_said():
    spec = V2.read(V2_LITE)
    back = V2.config(spec)
    assert back["rope_parameters"]["mscale_all_dim"] == 0.707 and back["rope_parameters"]["mscale"] == 0.707
    assert V2.read(back) == spec
    for key in ("kv_lora_rank", "q_lora_rank", "first_k_dense_replace", "n_shared_experts", "num_experts_per_tok", "v_head_dim", "routed_scaling_factor"):
        assert back[key] == V2_LITE[key], key


def rewritten(folder: Path, **fields: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scoring_func": "softmax"}, r"scoring_func is 'softmax', but only 'sigmoid' is supported"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads is 2, but only 4 is supported"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq is 2, but only 1 is supported"),
        ({"n_group": 3}, r"8 experts do not stand in 3 equal groups"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(fields, said, tmp_path):
    saved(transformers.DeepseekV3Config(**{**SIZES, **COMMON, **V3S["groups"]}), tmp_path)
    with pytest.raises(WeightsError, match=said):
        weights.open(rewritten(tmp_path, **fields)).load()


def test_the_layer_that_predicts_a_second_token_is_left_and_said(tmp_path):
    """It follows the model's own, however many those are."""
    config = transformers.DeepseekV3Config(**{**SIZES, **COMMON, **V3S["groups"], "num_hidden_layers": 2})
    reference = saved(config, tmp_path, auto=Corrected)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = {f"model.layers.2.{name}.weight": torch.ones(32, 32) for name in ("eh_proj", "enorm", "self_attn.o_proj", "shared_head.head")}
    save_file(tensors | extra, file, metadata={"format": "pt"})
    model, report = weights.open(rewritten(tmp_path, num_nextn_predict_layers=1)).load()
    assert report.left.keys() == extra.keys() and len(model.blocks) == 2
    with torch.no_grad():
        close(model(ids()), reference(ids()).logits, "logits")
    # Far from the model's own layers there is nothing to predict with, and none of its own is left.
    save_file(tensors | {"model.layers.61.eh_proj.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.layers\.61\.eh_proj\.weight"):
        weights.open(tmp_path).load()


@pytest.mark.parametrize(("config", "variant"), [(transformers.DeepseekV2Config, V2S["groups"]), (transformers.DeepseekV3Config, V3S["groups"])])
def test_experts_are_chosen_as_the_reference_does_in_bfloat16(config, variant, tmp_path):
    """The router's product is computed in float32: in bfloat16, logits that lie close are rounded together and other experts are chosen."""
    reference = saved(config(**{**SIZES, **COMMON, **variant}), tmp_path, auto=Corrected).to(torch.bfloat16)
    model, _ = weights.open(tmp_path).load(dtype=torch.bfloat16)
    assert model.spec.blocks[1].feedforward.routing.wide
    x = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    layer, gate = model.blocks[1].experts, reference.model.layers[1].mlp.gate
    with torch.no_grad():
        theirs = gate(x)
        logits = theirs if isinstance(theirs, torch.Tensor) else theirs[0]
        assert torch.equal(layer.router.weight, gate.weight) and layer.router.weight.dtype == torch.bfloat16
        assert torch.equal(layer.logits(x).view_as(logits), logits) and not torch.equal(layer.router(x).float().view_as(logits), logits)
