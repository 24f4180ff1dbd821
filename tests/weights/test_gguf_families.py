"""GGUF files of every architecture: written, read again, the same model; what a file must say and what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.parts.position import Learned
from glassformer.parts.rotary import Llama3Scaling, LongRope
from glassformer.weights.export_gguf import export_gguf
from glassformer.weights.families import gguf_fields, gguf_names
from glassformer.weights.family import families
from glassformer.weights.quants import FORMATS, row_bytes
from glassformer.weights.rules import Place
from weights.ggufs import CONFIGS, SIZES, inputs, made, turned, written


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_was_written_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    model, file = written(name, tmp_path)
    opened = weights.open(file)
    assert opened.spec == model.spec
    again, report = opened.load()
    assert not report.left or set(report.left) <= {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    for (ours, x), (theirs, y) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert ours == theirs
        if name.startswith("gemma") and "norm" in ours:
            # The format adds one to these weights: what is finer than the last bit of 1 + w is gone, and half that bit is 6e-8.
            torch.testing.assert_close(x, y, rtol=0, atol=1.2e-7)
        else:
            assert torch.equal(x, y), ours
    with torch.no_grad():
        a, b = model(*inputs(model)), again(*inputs(model))
    if name.startswith("gemma"):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("llama-linear", "llama-yarn", "gpt_oss-yarn", "phi3-long")])
def test_a_packed_model_computes_what_the_unpacked_one_does(name: str, tmp_path: Path) -> None:
    _, file = written(name, tmp_path, "Q8_0")
    opened = weights.open(file)
    dense, _ = opened.load()
    packed, report = opened.load(packed=True)
    with torch.no_grad():
        torch.testing.assert_close(packed(*inputs(dense)), dense(*inputs(dense)), rtol=0, atol=2e-5)  # other strips, other order of sums
    assert report.bytes < 0.6 * sum(4 * x.numel() for x in dense.parameters())
    assert packed.params().total == dense.params().total


def test_rows_of_one_matrix_may_be_of_several_types(tmp_path: Path) -> None:
    """As a quantiser leaves them: queries and keys in Q4_K, values in Q6_K, the read-out in Q5_K, and rows of heads to be moved."""
    wide = {"vocab_size": 40, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    spec = families()["llama"].read({"model_type": "llama", **wide, "head_dim": 64, "rms_norm_eps": 1e-5} | turned())
    plain = weights.open(export_gguf(spec.build(seed=0), tmp_path / "plain.gguf", "F32"))
    writer, rng = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama"), np.random.default_rng(0)
    for k, v in plain.found.metadata.items():
        if k.startswith("llama."):
            (writer.add_float32 if isinstance(v, float) else writer.add_uint32)(k, v)
    kinds = {"token_embd": "Q3_K", "output": "Q5_K", "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q2_K", "ffn_gate": "IQ4_XS"}
    for name, stored in plain.tensors.items():
        kind = kinds.get(name.split(".")[-2], "Q8_0")
        if len(stored.shape) == 1:
            writer.add_tensor(name, stored.read().numpy())
            continue
        raw = rng.integers(0, 256, (stored.shape[0], row_bytes(kind, 256)), dtype=np.uint8)
        blocks = raw.reshape(-1, FORMATS[kind].bytes)
        for at in {"Q3_K": [108], "Q5_K": [0, 2], "Q4_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "IQ4_XS": [0], "Q8_0": [0]}[kind]:
            blocks[:, at : at + 2] = np.full((len(blocks), 1), 1e-4, np.float16).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = weights.open(tmp_path / "mixed.gguf")
    dense, _ = opened.load()
    packed, _ = opened.load(packed=True)
    assert packed.blocks[0].attn.qkv.types == ("Q4_K", "Q4_K", "Q6_K")
    assert torch.equal(packed.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)
    q = torch.from_numpy(gguf.quants.dequantize(opened.tensors["blk.0.attn_q.weight"].raw().numpy().reshape(256, -1), gguf.GGMLQuantizationType.Q4_K))
    assert torch.equal(dense.blocks[0].attn.qkv.weight[32], q[1])  # the second row of the file turns with the first
    x = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(x), dense(x))


def test_a_table_that_is_stored_twice_is_one_unless_a_quantiser_parted_them(tmp_path: Path) -> None:
    for copy, tied in ((np.float32, True), (np.float16, False)):
        found = {"position_embd.weight": np.zeros((9, 64), np.float32), "output.weight": np.zeros((7, 64), copy)}
        assert config_of(file_of(tmp_path, "gpt2", LLAMA, found))["tie_word_embeddings"] is tied


def test_the_names_are_those_of_the_reference() -> None:
    """Every right side of the table is a name that the gguf package knows for the architecture."""
    for name, arch in gguf_fields.ARCHITECTURES.items():
        number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
        known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[number]}
        model_name = next(n for n, c in CONFIGS.items() if c["model_type"] in arch.kinds)
        model = made(model_name)
        for path, _ in model.named_parameters():
            rule = next(r for r in gguf_names.rules(name) if r.match(path) is not None)
            for theirs in rule.names(rule.match(path) or {}):
                stem = theirs.removesuffix(".weight").removesuffix(".bias")
                generic = ".".join("{bid}" if s.isdigit() else s for s in stem.split("."))
                assert generic in known, f"{name}: {theirs}"


def test_rows_of_queries_and_keys_go_there_and_back() -> None:
    model = made("llama")
    place = Place(model.blocks[0].attn, "qkv")
    x = torch.arange(4 * 32 + 2 * 2 * 32).float()[:, None].expand(-1, 3)
    q, k, v = gguf_names.Paired().theirs(x, place)
    assert q[:4, 0].tolist() == [0, 16, 1, 17]  # neighbours turn together
    assert k[:2, 0].tolist() == [128, 144]
    assert torch.equal(v, x[-64:])
    assert torch.equal(gguf_names.Paired().ours((q, k, v), place), x)


# What a file says


def file_of(tmp_path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    file = tmp_path / "made.gguf"
    writer = gguf.GGUFWriter(file, arch)
    for key, value in keys.items():
        name = f"{arch}.{key}"
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, x in ({"token_embd.weight": np.zeros((7, 64), np.float32)} | (tensors or {})).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


LLAMA = {
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 128,
}


def config_of(file: Path) -> dict[str, Any]:
    found = weights.source.find(file)
    return gguf_names.config(found.metadata, found.tensors, file)


def test_fields_are_those_of_a_config(tmp_path: Path) -> None:
    fields = config_of(file_of(tmp_path, "llama", LLAMA | {"rope.freq_base": 500_000.0}))
    assert fields["rms_norm_eps"] == 1e-5  # and not the float32 next to it
    assert fields["vocab_size"] == 7
    assert fields["head_dim"] == 16
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000.0}
    assert fields["tie_word_embeddings"] is True


def test_one_architecture_serves_several_model_types(tmp_path: Path) -> None:
    assert config_of(file_of(tmp_path, "llama", LLAMA))["model_type"] == "llama"
    assert config_of(file_of(tmp_path, "llama", LLAMA | {"attention.sliding_window": 9}))["model_type"] == "mistral"
    experts = {"blk.0.ffn_down_exps.weight": np.zeros((4, 64, 96), np.float32)}
    assert config_of(file_of(tmp_path, "llama", LLAMA | {"expert_count": 4, "expert_used_count": 2}, experts))["model_type"] == "mixtral"


def test_values_per_layer_that_are_all_alike_count_as_one(tmp_path: Path) -> None:
    assert config_of(file_of(tmp_path, "llama", LLAMA | {"attention.head_count": [4, 4]}))["num_attention_heads"] == 4
    with pytest.raises(WeightsError, match=r"llama.attention.head_count differs from layer to layer \(4, 2 …\)"):
        config_of(file_of(tmp_path, "llama", LLAMA | {"attention.head_count": [4, 2]}))


@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(),
        Llama3Scaling(factor=32.0),
        Llama3Scaling(factor=8.0, original_context=4_096),
        Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=8.0, original_context=2_048),
    ],
)
def test_the_scaling_of_llama_3_is_found_in_its_divisors(tmp_path: Path, scaling: Llama3Scaling) -> None:
    plain = 1 / 500_000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    factors = plain / scaling.frequencies(500_000.0, 128)
    keys = LLAMA | {"embedding_length": 512, "rope.freq_base": 500_000.0}  # heads of 128, as published; no hint of the context
    fields = config_of(file_of(tmp_path, "llama", keys, {"rope_freqs.weight": factors.numpy()}))
    found = weights.config.rotary(weights.config.Config(fields)).scaling
    assert isinstance(found, Llama3Scaling)
    assert found == scaling


def test_other_divisors_are_kept_as_they_are(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    fields = config_of(file_of(tmp_path, "llama", LLAMA, {"rope_freqs.weight": factors}))
    found = weights.config.rotary(weights.config.Config(fields)).scaling
    assert isinstance(found, LongRope)
    assert found.short == found.long
    assert found.magnitude == 1.0
    np.testing.assert_array_equal(np.array(found.short, np.float32), factors)


def test_experts_of_the_first_months_are_tensors_of_their_own() -> None:
    rules = [r for r in gguf_names.rules("llama") if r.match("blocks.1.experts.experts.3.down.weight")]
    assert [r.names(r.match("blocks.1.experts.experts.3.down.weight") or {}) for r in rules] == [
        ("blk.1.ffn_down_exps.weight",),
        ("blk.1.ffn_down.3.weight",),
    ]


def test_what_a_file_does_not_say_is_said_to_be_assumed(tmp_path: Path) -> None:
    wanted = {
        "qwen3_moe": ["divided by their sum (norm_topk_prob; the format has no word for it), as llama.cpp does"],
        "gemma2": ["the last of every 2 layers sees all tokens", "divided by the root of 32 (a model of other than 46 blocks: a head's size"],
        "gpt_oss-yarn": ["the last of every 2 layers", "(truncate is false), as GPT-OSS was trained; the format has no word for it, and llama.cpp rounds them"],
        "llama": [],
    }
    for name, sentences in wanted.items():
        found = weights.source.find(written(name, tmp_path)[1])
        said = gguf_names.assumed(found.metadata, found.tensors, found.path)
        assert len(said) == len(sentences), said
        for sentence in sentences:
            assert sum(sentence in s for s in said) == 1, said


def test_groups_of_experts_that_a_file_does_not_say_are_assumed_to_be_none(tmp_path: Path) -> None:
    _, file = written("deepseek_v3", tmp_path)
    found = weights.source.find(file)
    assert not gguf_names.assumed(found.metadata, found.tensors, file)
    older = {k: v for k, v in found.metadata.items() if "expert_group" not in k}
    (said,) = gguf_names.assumed(older, found.tensors, file)
    assert "chosen among all and not by groups (expert_group_count is not in the file), as llama.cpp does" in said
    assert gguf_names.config(older, found.tensors, file)["n_group"] == 1


# Errors


def test_an_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"the architecture 'qwen33' is not supported. Did you mean 'qwen3'.*Known: llama, qwen2"):
        weights.open(file_of(tmp_path, "qwen33", LLAMA))


def test_opt_has_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the architecture 'opt' is not supported"):
        weights.open(file_of(tmp_path, "opt", LLAMA))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'llama.attention.head_count'.*Did you mean 'llama.attention.head_count_kv'"):
        weights.open(file_of(tmp_path, "llama", {k: v for k, v in LLAMA.items() if k != "attention.head_count"}))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"7 missing, 0 left over.*the parameter 'blocks.0.attn.out.weight' needs the tensor 'blk.0.attn_output.weight'"):
        weights.open(file_of(tmp_path, "llama", LLAMA)).load()


def test_an_unknown_scaling_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="llama.rope.scaling.type is 'stretch', but only none, linear, yarn and longrope"):
        config_of(file_of(tmp_path, "llama", LLAMA | {"rope.scaling.type": "stretch"}))


def test_a_scaling_that_the_format_has_no_word_for_is_not_written() -> None:
    fields = SIZES | {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(WeightsError, match="scaled by 'dynamic' cannot be said in a GGUF file"):
        gguf_fields.metadata(fields)


def test_learned_positions_are_counted_by_their_table(tmp_path: Path) -> None:
    _, file = written("gpt2", tmp_path)
    assert weights.open(file).spec.position == Learned(64)


def test_metadata_that_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the metadata of 'llama' makes no sense"):
        config_of(file_of(tmp_path, "llama", LLAMA | {"attention.head_count": "four"}))
    with pytest.raises(WeightsError, match="the metadata of 'llama' makes no sense"):
        config_of(file_of(tmp_path, "llama", LLAMA | {"attention.head_count": 0}))
    with pytest.raises(WeightsError, match="llama.block_count is 4000000000, but the file holds no more than 1"):
        config_of(file_of(tmp_path, "llama", LLAMA | {"block_count": 4_000_000_000}))
    with pytest.raises(WeightsError, match="llama.expert_count is 4000000000, but the file holds no more than 1 "):
        config_of(file_of(tmp_path, "llama", LLAMA | {"expert_count": 4_000_000_000}))
