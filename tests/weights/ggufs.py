"""Small odd models of every architecture that GGUF files are written for, by the fields of their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glassformer.weights.export_gguf import export_gguf
from glassformer.weights.family import families

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not 64 / 4
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
NARROW = SIZES | {"head_dim": 16}  # where llama.cpp knows no other head than width / heads


def turned(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0} | scaling}


LLAMA3 = turned(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
SOFT = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32, "sliding_window": 6}
LATENT: dict[str, Any] = {
    **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")},
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    **turned(),
}
GPT_OSS = SIZES | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama"} | turned(),
    "llama-odd": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True} | LLAMA3,
    "llama-linear": SIZES | {"model_type": "llama"} | turned(rope_type="linear", factor=2.0),
    "llama-yarn": SIZES | {"model_type": "llama"} | turned(**YARN),
    "mistral": SIZES | {"model_type": "mistral", "sliding_window": 5} | turned(),
    "mixtral": SIZES | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | turned(),
    "qwen2": NARROW | {"model_type": "qwen2"} | turned(),
    "qwen3": SIZES | {"model_type": "qwen3"} | turned(),
    "qwen3_moe": SIZES
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    | turned(),
    "olmo2": NARROW | {"model_type": "olmo2"} | turned(),
    "phi3": NARROW | {"model_type": "phi3", "sliding_window": None} | turned(),
    "phi3-long": NARROW
    | {"model_type": "phi3", "sliding_window": None, "max_position_embeddings": 2048, "original_max_position_embeddings": 1024}
    | turned(**LONG),
    "smollm3": SIZES | {"model_type": "smollm3", "num_hidden_layers": 5} | turned(),
    "gemma": SIZES | {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"} | turned(),
    "gemma2": SIZES | SOFT | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | turned(),
    "gemma3": SIZES
    | SOFT
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt_neox": {
        **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")},
        "model_type": "gpt_neox",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": V, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_oss": GPT_OSS | turned(),
    "gpt_oss-yarn": GPT_OSS | turned(**YARN, truncate=False),
    "deepseek_v2": LATENT | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_routed_experts": 4, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    "deepseek_v3": LATENT
    | {"model_type": "deepseek_v3", "q_lora_rank": 16, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"}
    | {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "bert": {
        **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        "model_type": "bert",
        "architectures": ["BertModel"],
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": V,
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 32,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
    },
}


def made(name: str, seed: int = 1) -> Any:
    """A model in evaluation mode whose every parameter matters."""
    values = CONFIGS[name]
    model = families()[values["model_type"]].read(values).build(seed=seed)
    g = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.empty_like(x).normal_(0, 0.08 if x.ndim > 1 else 0.2, generator=g))
    return model.eval()


def written(name: str, folder: Path, type: str = "F32") -> tuple[Any, Path]:
    """The model, and the file that it was exported to."""
    model, values = made(name), CONFIGS[name]
    settings = {k: values[k] for k in ("model_type", "max_position_embeddings") if k in values}
    return model, export_gguf(model, folder / f"{name}.gguf", type, settings=settings)


def inputs(model: Any, t: int = 17) -> tuple[torch.Tensor, ...]:
    """Tokens for a model: one row, or source and target."""
    x = torch.randint(0, V, (1, t), generator=torch.Generator().manual_seed(5))
    return (x, x[:, :7]) if hasattr(model, "encoder") else (x,)
