"""Decoders against the reference library: GPT-2, Llama and its scalings, partial rotary, windows, experts, Gemma 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from glassformer.core.mask import Everything, Window
from glassformer.core.tap import Record
from glassformer.models import Block, Decoder
from glassformer.models.presets import gpt2, llama
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, SqrtWidth
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.norm import LayerNorm, RMSNorm
from glassformer.parts.readout import LanguageModel
from glassformer.parts.rotary import LinearScaling, Llama3Scaling, NTKScaling, Rotary, Unscaled, YaRNScaling
from glassformer.parts.wiring import Parallel, Sandwich
from parity.reference import VOCAB, fill, greedy_together, hold_together, joined, lively, tokens

LAYERS, D, HEADS, FF = 2, 32, 4, 48
COMMON: dict[str, Any] = {"attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def reference(config: Any) -> Any:
    return lively(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


# GPT-2


def gpt2_pair() -> tuple[Any, Any]:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=D, n_layer=LAYERS, n_head=HEADS, **COMMON)
    ref = reference(config)
    s = ref.state_dict()
    w: dict[str, Tensor] = {"embed.weight": s["transformer.wte.weight"], "position.table": s["transformer.wpe.weight"]}
    for i in range(LAYERS):
        a, b = f"transformer.h.{i}", f"blocks.{i}"
        for theirs, ours in {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.out", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}.items():
            w |= {f"{b}.{ours}.weight": s[f"{a}.{theirs}.weight"].T, f"{b}.{ours}.bias": s[f"{a}.{theirs}.bias"]}  # their matrices are input x output
        for theirs, ours in {"ln_1": "norm1", "ln_2": "norm2"}.items():
            w |= {f"{b}.{ours}.{n}": s[f"{a}.{theirs}.{n}"] for n in ("weight", "bias")}
    w |= {f"final_norm.{n}": s[f"transformer.ln_f.{n}"] for n in ("weight", "bias")}
    spec = gpt2(LAYERS, D, HEADS).replace(vocab_size=VOCAB).at("position.max_positions").set(64)
    return fill(spec.build(), w), ref


def test_gpt2_equals_the_reference():
    model, ref = gpt2_pair()
    hold_together(model, ref, tokens(3, 17), LAYERS)


def test_gpt2_generates_what_the_reference_generates():
    model, ref = gpt2_pair()
    greedy_together(model, ref, tokens(2, 7))


# Llama: grouped queries, a head size that is not d / h, every scaling


def llama_weights(s: dict[str, Tensor], layers: int = LAYERS) -> dict[str, Tensor]:
    """The names that Llama, Mistral and their descendants share."""
    w = {"embed.weight": s["model.embed_tokens.weight"], "final_norm.weight": s["model.norm.weight"], "readout.matrix": s["lm_head.weight"]}
    for i in range(layers):
        a, b = f"model.layers.{i}", f"blocks.{i}"
        w |= {
            f"{b}.attn.qkv.weight": joined(s, *(f"{a}.self_attn.{n}_proj.weight" for n in "qkv")),
            f"{b}.attn.out.weight": s[f"{a}.self_attn.o_proj.weight"],
            f"{b}.norm1.weight": s[f"{a}.input_layernorm.weight"],
        }
        if f"{a}.mlp.down_proj.weight" in s:
            w |= {
                f"{b}.ffn.gate_up.weight": joined(s, f"{a}.mlp.gate_proj.weight", f"{a}.mlp.up_proj.weight"),
                f"{b}.ffn.down.weight": s[f"{a}.mlp.down_proj.weight"],
            }
        if f"{a}.pre_feedforward_layernorm.weight" not in s:
            w[f"{b}.norm2.weight"] = s[f"{a}.post_attention_layernorm.weight"]
    return w


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({"rope_type": "default"}, Unscaled()),
    "llama3": (LLAMA3, Llama3Scaling(factor=4.0, original_context=16)),
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearScaling(3.0)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0},
        YaRNScaling(4.0, 16, beta_fast=4.0),
    ),
    "yarn-blend": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "truncate": False,
            "attention_factor": 1.3,
        },
        YaRNScaling(4.0, 64, beta_fast=8.0, beta_slow=0.5, truncate=False, attention_factor=1.3),
    ),
    # At 24 tokens of a context of 16 the dynamic base has grown by 2 * 24 / 16 - 1 = 2.
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, NTKScaling(2.0)),
}


def llama_pair(scaling: str, d_head: int = 10) -> tuple[Any, Any]:
    theirs, ours = SCALINGS[scaling]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=d_head,
        max_position_embeddings=16 if scaling == "dynamic" else 64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1_000.0} | theirs,
        **COMMON,
    )
    ref = reference(config)
    spec = llama(VOCAB, D, LAYERS, HEADS, 2, FF, Rotary(base=1_000.0, scaling=ours)).at("blocks.*.attention.d_head").set(d_head)
    return fill(spec.build(), llama_weights(ref.state_dict())), ref


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama_equals_the_reference_under_every_scaling(scaling):
    model, ref = llama_pair(scaling)
    hold_together(model, ref, tokens(2, 24), LAYERS)


def test_llama_generates_what_the_reference_generates():
    model, ref = llama_pair("llama3")
    greedy_together(model, ref, tokens(2, 9))


def test_llama_by_inputs_embeds_equals_the_reference():
    model, ref = llama_pair("default")
    x = 0.3 * torch.randn(2, 9, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=x), ref(inputs_embeds=x).logits, atol=1e-5, rtol=1e-5)


# Partial rotary: NeoX (first quarter of a head, two parallel norms) and GPT-J (interleaved pairs, one norm)


def test_neox_with_partial_rotary_equals_the_reference():
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FF,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0, "partial_rotary_factor": 0.25},
        **COMMON,
    )
    ref = reference(config)
    s, w = ref.state_dict(), {}
    w |= {"embed.weight": s["gpt_neox.embed_in.weight"], "readout.matrix": s["lm_head.weight"]}
    w |= {f"final_norm.{n}": s[f"gpt_neox.final_layer_norm.{n}"] for n in ("weight", "bias")}
    for i in range(LAYERS):
        a, b = f"gpt_neox.layers.{i}", f"blocks.{i}"
        for n in ("weight", "bias"):
            qkv = s[f"{a}.attention.query_key_value.{n}"]  # their rows go head by head: q, k, v of head 0, then of head 1
            w[f"{b}.attn.qkv.{n}"] = qkv.view(HEADS, 3, D // HEADS, -1).transpose(0, 1).reshape(qkv.shape)
            for theirs, ours in {"attention.dense": "attn.out", "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"}.items():
                w[f"{b}.{ours}.{n}"] = s[f"{a}.{theirs}.{n}"]
            w |= {f"{b}.norm1.{n}": s[f"{a}.input_layernorm.{n}"], f"{b}.norm2.{n}": s[f"{a}.post_attention_layernorm.{n}"]}
    block = Block(
        Attention(HEADS, position=Rotary(base=1_000.0, fraction=0.25), qkv_bias=True, out_bias=True),
        Plain(FF, act="gelu", bias=True),
        norm=LayerNorm(),
        wiring=Parallel(norms=2),
    )
    model = fill(Decoder(VOCAB, D, (block,) * LAYERS, final_norm=LayerNorm()).build(), w)
    hold_together(model, ref, tokens(2, 13), LAYERS)
    greedy_together(model, ref, tokens(2, 5))


def test_gptj_with_interleaved_rotary_equals_the_reference():
    config = transformers.GPTJConfig(vocab_size=VOCAB, n_positions=64, n_embd=D, n_layer=LAYERS, n_head=HEADS, rotary_dim=4, n_inner=FF, **COMMON)
    ref = reference(config)
    s, w = ref.state_dict(), {}
    w |= {"embed.weight": s["transformer.wte.weight"], "readout.matrix": s["lm_head.weight"], "readout.bias": s["lm_head.bias"]}
    w |= {f"final_norm.{n}": s[f"transformer.ln_f.{n}"] for n in ("weight", "bias")}
    for i in range(LAYERS):
        a, b = f"transformer.h.{i}", f"blocks.{i}"
        w |= {f"{b}.attn.qkv.weight": joined(s, *(f"{a}.attn.{n}_proj.weight" for n in "qkv")), f"{b}.attn.out.weight": s[f"{a}.attn.out_proj.weight"]}
        for n in ("weight", "bias"):
            w |= {f"{b}.ffn.up.{n}": s[f"{a}.mlp.fc_in.{n}"], f"{b}.ffn.down.{n}": s[f"{a}.mlp.fc_out.{n}"], f"{b}.norm1.{n}": s[f"{a}.ln_1.{n}"]}
    block = Block(
        Attention(HEADS, position=Rotary(fraction=0.5, layout="interleaved")),
        Plain(FF, act="gelu_tanh", bias=True),
        norm=LayerNorm(),
        wiring=Parallel(norms=1),
    )
    spec = Decoder(VOCAB, D, (block,) * LAYERS, final_norm=LayerNorm(), readout=LanguageModel(bias=True))
    hold_together(fill(spec.build(), w), ref, tokens(2, 13), LAYERS)


# Windows: Mistral


def test_mistral_with_a_sliding_window_equals_the_reference():
    config = transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=5,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
        **COMMON,
    )
    ref = reference(config)
    spec = llama(VOCAB, D, LAYERS, HEADS, 2, FF, Rotary(base=1_000.0)).at("blocks.*.attention.mask").set(Window(5))
    model = fill(spec.build(), llama_weights(ref.state_dict()))
    hold_together(model, ref, tokens(2, 17), LAYERS)
    greedy_together(model, ref, tokens(2, 9))


# Experts: Mixtral


def test_mixtral_equals_the_reference():
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=None,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
        **COMMON,
    )
    ref = reference(config)
    s = ref.state_dict()
    w = llama_weights(s)
    for i in range(LAYERS):
        a, b = f"model.layers.{i}.mlp", f"blocks.{i}.experts"
        w[f"{b}.router.weight"] = s[f"{a}.gate.weight"]
        for e in range(4):
            w |= {f"{b}.experts.{e}.gate_up.weight": s[f"{a}.experts.gate_up_proj"][e], f"{b}.experts.{e}.down.weight": s[f"{a}.experts.down_proj"][e]}
    spec = llama(VOCAB, D, LAYERS, HEADS, 2, FF, Rotary(base=1_000.0)).at("blocks.*.feedforward").set(Experts(4, 2, Gated(FF)))
    model = fill(spec.build(), w)
    hold_together(model, ref, tokens(2, 13), LAYERS)

    from glassformer.core.flow import Ledger

    ledger = Ledger()
    ids = tokens(2, 13)
    tap = Record("**.router")
    with torch.no_grad():
        model(ids, aux=ledger, tap=tap)
        theirs = ref(input_ids=ids, output_router_logits=True)
    for i in range(LAYERS):
        torch.testing.assert_close(tap[f"blocks.{i}.experts.router"].flatten(0, 1), theirs.router_logits[i].softmax(-1), atol=1e-6, rtol=1e-5)
    assert len(ledger.entries["balance"]) == LAYERS


# Gemma 2: caps, sandwich norms, scaled embedding, weights stored minus one, windows in every other layer


@pytest.mark.parametrize("window", [4, 32])
def test_gemma2_equals_the_reference(window):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=window,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
        **COMMON,
    )
    ref = lively(transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager"))
    s = ref.state_dict()
    w = llama_weights(s, 4)
    del w["readout.matrix"]
    for i in range(4):
        for theirs, ours in {"post_attention": "norm1_post", "pre_feedforward": "norm2", "post_feedforward": "norm2_post"}.items():
            w[f"blocks.{i}.{ours}.weight"] = s[f"model.layers.{i}.{theirs}_layernorm.weight"]
    norm = RMSNorm(eps=1e-6, offset=1.0, cast="late")
    block = Block(
        Attention(HEADS, n_kv_heads=2, d_head=12, position=Rotary(base=1_000.0), cap=5.0, scale=20**-0.5),
        Gated(FF, act="gelu_tanh"),
        norm=norm,
        wiring=Sandwich(),
    )
    local, wide = block.at("attention.mask").set(Window(window)), block.at("attention.mask").set(Everything())
    spec = Decoder(VOCAB, D, (local, wide) * 2, final_norm=norm, tied=True, embedding=Embedding(scale=SqrtWidth()), readout=LanguageModel(cap=3.0))
    model = fill(spec.build(), w)
    hold_together(model, ref, tokens(2, 15), 4)
    greedy_together(model, ref, tokens(2, 7))
