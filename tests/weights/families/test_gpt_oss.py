"""GPT-OSS: sinks, windows, clamped experts in one tensor, plain and in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.weights.families.gpt_oss import FromMXFP4, TakingTurns, from_mxfp4
from parity.reference import hold_together
from weights.families.harness import COMMON, hold_decoder, ids, opened, saved

YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 10, "rope_parameters": YARN, "sliding_window": 6},
    "tied": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": False, "swiglu_limit": 0.7, "swiglu_alpha": 1.1},
    "uneven": {
        "num_key_value_heads": 4,
        "head_dim": 6,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}


def tiny(**more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_local_experts": 5, "num_experts_per_tok": 2}
    return transformers.GptOssConfig(**{**sizes, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **COMMON, **more})


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt_oss_is_the_reference(variant, tmp_path):
    model, _ = hold_decoder(tiny(**VARIANTS[variant]), tmp_path, layers=3)
    assert model.blocks[0].attn.normaliser.sinks.abs().sum() > 0


# MXFP4


def packed(rows: int, columns: int, seed: int, experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
    return blocks, torch.randint(119, 124, (experts, rows, columns // 32), generator=g, dtype=torch.uint8)


def test_every_byte_and_every_scale_is_what_the_reference_makes_of_it():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16)
    for low in range(1, 250, 16):
        scales = torch.arange(low, low + 16).clamp(max=254).to(torch.uint8).view(1, 16, 1)
        theirs = convert_moe_packed_tensors(bytes_, scales, dtype=torch.float32)[0].mT
        ours = from_mxfp4(bytes_[0], scales[0])
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_the_forms_work_on_the_meta_device_and_undo_each_other():
    blocks, scales = (x[0].to("meta") for x in packed(6, 64, 0))
    assert FromMXFP4().ours((blocks, scales), None).shape == (6, 64)
    x = torch.arange(24.0).view(4, 6)
    (back,) = TakingTurns().theirs(x, None)
    assert torch.equal(TakingTurns().ours((back,), None), x) and torch.equal(back[:, 0], x[0]) and torch.equal(back[:, 1], x[2])
    (bias,) = TakingTurns().theirs(x[0], None)
    assert bias.tolist() == [0, 3, 1, 4, 2, 5] and torch.equal(TakingTurns().ours((bias,), None), x[0])
    with pytest.raises(WeightsError, match="MXFP4 is read and not written"):
        FromMXFP4().theirs(x, None)


def in_mxfp4(folder: Path) -> Any:
    """A tiny model of the reference and, in ``folder``, the same as the published files are: experts packed."""
    reference = saved(tiny(hidden_size=64, intermediate_size=32), folder)
    tensors, d, f = load_file(folder / "model.safetensors"), 64, 32
    for i, layer in enumerate(reference.model.layers):
        for name, rows, columns in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            path, (blocks, scales) = f"model.layers.{i}.mlp.experts.{name}", packed(rows, columns, seed=7 * i + rows)
            del tensors[path]
            tensors |= {f"{path}_blocks": blocks, f"{path}_scales": scales}
            with torch.no_grad():
                getattr(layer.mlp.experts, name).copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(values))
    return reference


def test_the_published_format_is_the_reference(tmp_path):
    reference = in_mxfp4(tmp_path / "theirs")
    model = opened(tmp_path / "theirs")
    for i, block in enumerate(model.blocks):
        theirs = reference.model.layers[i].mlp.experts
        for e, expert in enumerate(block.experts.experts):
            assert torch.equal(expert.down.weight, theirs.down_proj[e].mT)
            assert torch.equal(expert.gate_up.weight, torch.cat([theirs.gate_up_proj[e].mT[::2], theirs.gate_up_proj[e].mT[1::2]]))
    hold_together(model, reference, ids(2, 15), 3)
    weights.export_hf(model, tmp_path / "back", config=weights.open(tmp_path / "theirs").config)
    again = type(reference).from_pretrained(tmp_path / "back", attn_implementation="eager")
    for name, x in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_another_packing_is_refused(tmp_path):
    saved(tiny(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="quantised in the format 'fp8' .*, which is not read here"):
        weights.open(tmp_path)
