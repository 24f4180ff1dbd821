"""Verify: every family agrees with the reference site by site, and what is wrong is found where it arises."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto as auto

import warm
from glassformer import weights
from glassformer.cli.app import main
from glassformer.core.errors import GlassformerError, WeightsError
from glassformer.core.mask import Window
from glassformer.parts.norm import RMSNorm
from glassformer.parts.rotary import Rotary
from glassformer.weights.family import families
from weights.families.harness import COMMON, VOCAB, saved

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TWO_HALVES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 44}
TWO_HALVES |= {"decoder_ffn_dim": 40, "decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4}
LATENT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 44},
    "gptj": {"n_inner": 44, "rotary_dim": 4},
    "bart": TWO_HALVES,
    "mbart": TWO_HALVES,
    "marian": TWO_HALVES,
    "t5": T5,
    "mt5": T5,
    "opt": {"ffn_dim": 44, "word_embed_proj_dim": 32},
    "distilbert": {"hidden_dim": 44},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma3": {"text_config": SIZES | {"vocab_size": VOCAB}, "vision_config": VISION},
}
"""Sizes that a kind has names of its own for."""

ALONE = {
    "experts.router",  # probabilities here, logits or probabilities of the chosen there
    "experts.chosen",
    "embed",  # with token types here; read from a table that two halves share there
    "pos_embed",  # sinusoids come from no tensor
    "attn.k",  # latent attention: made for observers, in no module's output
    "attn.q_rot",  # GPT-J attends in a method of its own
    "attn.k_rot",
}
"""What may be without a counterpart in the reference."""


def tiny(kind: str, folder: Any, **more: Any) -> Any:
    """A lively random model of that kind in ``folder``."""
    usual = transformers.CONFIG_MAPPING[kind]()
    given = COMMON | {k: v for k, v in SIZES.items() if hasattr(usual, k) and not (k == "head_dim" and "n_head" in vars(usual))}
    given = {k: v for k, v in given.items() if kind != "gemma3"} | OWN.get(kind, {}) | more
    if "qk_rope_head_dim" in given:
        given.pop("head_dim", None)
    config = transformers.AutoConfig.for_model(kind, **given)
    makers = (
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
        (auto.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (auto.MODEL_MAPPING, transformers.AutoModel),
    )
    return saved(config, folder, auto=next(maker for kinds, maker in makers if type(config) in kinds))


def last(site: str) -> str:
    """The part and name of a site, without where its part stands."""
    return ".".join(s for s in site.split(".") if not s.isdigit() and s not in ("blocks", "encoder", "decoder", "shared"))


@pytest.mark.parametrize("kind", sorted(k for k in families() if k in transformers.CONFIG_MAPPING))
def test_every_family_agrees_with_the_reference(kind, tmp_path):
    tiny(kind, tmp_path)
    found = weights.verify(tmp_path, tolerance=1e-5)
    assert found.agrees and found.first is None, found.verdict
    assert {last(s) for s in found.alone} <= ALONE, found.counts
    sites = {last(c.site) for c in found.compared}
    assert {"resid_pre", "resid_post", "resid_final", "logits", "attn.in", "attn.q", "attn.z", "attn.out", "attn.pattern"} <= sites
    assert {"ffn.in", "ffn.pre", "ffn.post", "ffn.out"} <= sites or {"experts.in", "experts.out"} <= sites
    assert len({c.site for c in found.compared}) == len(found.compared)
    assert all(c.relative > 0 or c.error == 0 for c in found.compared)


# What is wrong is found


def llama(folder: Any, **more: Any) -> Any:
    tiny("llama", folder, num_hidden_layers=3, **more)
    return weights.open(folder)


WRONG: dict[str, tuple[str, Any, str]] = {
    "another base": ("blocks.*.attention.position", Rotary(base=77.0), "blocks.0.attn.q_rot"),
    "another base in one layer": ("blocks.1.attention.position", Rotary(base=77.0), "blocks.1.attn.q_rot"),
    "another eps": ("blocks.2.norm", RMSNorm(eps=0.3), "blocks.2.attn.in"),
    "another eps at the end": ("final_norm", RMSNorm(eps=0.3), "resid_final"),
    "another activation": ("blocks.1.feedforward.act", "gelu", "blocks.1.ffn.post"),
    "a window": ("blocks.2.attention.mask", Window(4), "blocks.2.attn.pattern"),
    "another scale of scores": ("blocks.0.attention.scale", 0.5, "blocks.0.attn.q_rot"),
    "a soft cap": ("blocks.0.attention.cap", 2.0, "blocks.0.attn.pattern"),
    "a cap on logits": ("readout.cap", 2.0, "logits"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_is_located(what, tmp_path):
    path, value, site = WRONG[what]
    opened = llama(tmp_path)
    opened.spec = opened.spec.at(path).set(value)
    found = weights.verify(opened)
    assert not found.agrees and found.first is not None
    assert found.first.site == site, found.verdict
    before = [c.relative for c in found.compared[: found.compared.index(found.first)]]
    assert max(before) < 1e-5
    assert found.verdict.startswith(f"first difference: {site}, absolute ") and f"; everything before agrees to {max(before):.1e}" in found.verdict
    assert f"{found.first.error:8.1e}  {found.first.relative:8.1e}  differs" in str(found)


def test_an_edited_tensor_is_located_in_every_kind_of_model(tmp_path):
    """The reference's own weights changed after they were saved: what a fault in a family's rules would look like."""
    from safetensors.torch import load_file, save_file

    for kind, name, site in (
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", "blocks.1.ffn.out"),
        ("bert", "bert.encoder.layer.1.attention.self.key.weight", "blocks.1.attn.k"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.v.weight", "decoder.blocks.0.cross.v"),
    ):
        if kind not in families():
            continue
        folder = tmp_path / kind
        tiny(kind, folder)
        file = folder / "model.safetensors"
        opened = weights.open(folder)
        tensors = load_file(file)
        wanted = name if name in tensors else next(n for n in tensors if n.endswith(name.split(".", 1)[1]))
        load = opened.load

        def changed(*args: Any, load=load, wanted=wanted, opened=opened, **options: Any) -> Any:
            model, report = load(*args, **options)
            ours = next(f.path for f in opened.plan.fillings if any(s.name == wanted for s in f.stored))
            filling = next(f for f in opened.plan.fillings if f.path == ours)
            theirs = [s.read() * (3.0 if s.name == wanted else 1.0) for s in filling.stored]
            with torch.no_grad():
                model.get_parameter(ours).copy_(filling.form.ours(theirs, filling.place))
            return model, report

        opened.load = changed
        found = weights.verify(opened)
        assert found.first is not None and found.first.site == site, found.verdict
        save_file(tensors, file, {"format": "pt"})


# Options


def test_types_tolerances_and_plain_data(tmp_path):
    opened = llama(tmp_path)
    found = weights.verify(opened, dtype="float64", tolerance=1e-5)  # the reference norms and rotates in float32 all the same
    assert found.agrees and found.dtype == "float64"
    assert not weights.verify(opened, tolerance=1e-12).agrees
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["agrees"] is True and plain["first"] is None and plain["family"] == "Llama" and plain["reference"] == "LlamaForCausalLM"
    assert [s["site"] for s in plain["sites"]] == [c.site for c in found.compared]
    assert plain["sites"][0] == {"site": "embed", "shape": [2, 19, 32], "absolute": 0.0, "relative": 0.0}
    assert f"{len(found.compared)} of {len(found.compared)} sites compared with LlamaForCausalLM" in str(found)


def test_the_reference_is_left_as_it_was(tmp_path):
    from transformers.models.llama import modeling_llama

    function, level = modeling_llama.eager_attention_forward, transformers.utils.logging.get_verbosity()
    weights.verify(llama(tmp_path))
    assert modeling_llama.eager_attention_forward is function
    assert transformers.utils.logging.get_verbosity() == level


def test_a_text_by_the_folders_own_tokenizer(tmp_path):
    from glassformer.text import train

    tokenizer = train("characters", texts=["a transformer reads this text, and another one reads it too"])
    llama(tmp_path)
    with pytest.raises(GlassformerError, match="has no tokenizer, so a text means nothing to its model: leave the text out to run random tokens."):
        weights.verify(tmp_path, text="this text")
    tokenizer.save(tmp_path)
    found = weights.verify(tmp_path, text="this text")
    assert found.agrees and found.compared[0].shape == (1, 9, 32)
    with pytest.raises(GlassformerError, match="The text is empty"):
        weights.verify(tmp_path, text="")


def test_the_command(tmp_path, capsys, monkeypatch):
    llama(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "blocks.2.attn.q_rot" in said and "agrees: " in said.splitlines()[-1]
    assert main(["verify", str(tmp_path), "--tolerance", "1e-12"]) == 1
    assert "first difference: blocks." in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--json", "--dtype", "float64"]) == 0
    assert json.loads(capsys.readouterr().out)["agrees"] is True
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["verify", str(tmp_path)]) == 0
    assert "blocks.2.attn.q_rot" in capsys.readouterr().out


# What cannot be verified


def test_bad_input_is_one_sentence(tmp_path, capsys):
    llama(tmp_path / "theirs")
    model, _ = weights.open(tmp_path / "theirs").load()
    weights.save(model, tmp_path / "own")
    with pytest.raises(WeightsError, match="own is glassformer's own format, which transformers cannot be asked about: verify needs the Hugging Face folder"):
        weights.verify(tmp_path / "own")
    with pytest.raises(WeightsError, match="There is nothing at .*nowhere"):
        weights.verify(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="tolerance=0 would let nothing agree: give a number above 0, such as 1e-4."):
        weights.verify(tmp_path / "theirs", tolerance=0)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "own")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["verify", str(tmp_path / "theirs"), "--dtype", "float3"]) == 2
    assert "float3" in capsys.readouterr().err


def test_without_transformers_the_remedy_is_named(tmp_path):
    llama(tmp_path)
    code = f"import sys; sys.modules['transformers'] = None\nfrom glassformer.cli.app import main\nsys.exit(main(['verify', {str(tmp_path)!r}]))"
    process = warm.Program(["-c", code])
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == "error: verify compares with the transformers library, which is not installed: pip install transformers.\n"
