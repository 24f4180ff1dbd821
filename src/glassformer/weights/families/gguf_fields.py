"""What a GGUF file says of its model, in the words of a config.json, and back.

    metadata ── read ──► fields of config.json ──► the family's own ``spec``
    metadata ◄── write ─ fields of config.json ◄── the family's own ``config``

One architecture of GGUF serves several model types (``llama``: Llama, Mistral, Mixtral), told apart by what the file
holds. Most of a translation is a table of names; what a file leaves to be known (the activation, whether read-out and
embedding are one) or says by tensors (the frequencies of Llama 3) has a few lines beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import WeightsError, did_you_mean
from glassformer.parts.rotary import Llama3Scaling, LongRope

from ..stored import Stored

Fields = dict[str, Any]


class Said:
    """The metadata of one file, asked without the architecture's name before every key; ``tensors`` by name."""

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], file: Path, arch: str):
        self.metadata, self.tensors, self.file, self.arch = metadata, tensors, file, arch
        self.assumed: list[str] = []

    def assume(self, sentence: str) -> None:
        """Note what the file does not say and the fields do."""
        self.assumed.append(sentence)

    def __call__(self, key: str, default: Any = ...) -> Any:
        """A value: floats as the shortest number that they can mean, an array of equal values as the value. Without a default it must be there."""
        name = f"{self.arch}.{key}"
        if name not in self.metadata:
            if default is ...:
                raise WeightsError(f"{self.file} lacks {name!r}, without which the model cannot be built.{did_you_mean(name, self.metadata)}")
            return default
        value = self.metadata[name]
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise WeightsError(f"{self.file}: {name} differs from layer to layer ({', '.join(map(str, value[:6]))} …), which is not supported here.")
            value = value[0].item()
        return float(str(np.float32(value))) if isinstance(value, float) else value  # written as float32: 1e-05, not 9.99999974e-06

    def gives(self, key: str) -> bool:
        """Whether the file has a key."""
        return f"{self.arch}.{key}" in self.metadata

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.tensors

    def rows(self, tensor: str) -> int:
        """How many rows a tensor has."""
        if tensor not in self.tensors:
            raise WeightsError(f"{self.file} lacks the tensor {tensor!r}, without which the model cannot be built.{did_you_mean(tensor, self.tensors)}")
        return self.tensors[tensor].shape[0]


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures. ``kinds``: the model types that it serves. ``table``: pairs of a field of config.json and a key.

    ``read`` and ``write`` are what the table cannot say: more fields from a file, more metadata from the fields.
    """

    name: str
    kinds: tuple[str, ...]
    table: tuple[tuple[str, str], ...]
    read: Callable[[Said], Fields]
    write: Callable[[Fields], dict[str, Any]] = lambda fields: {}


def config(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], file: Path) -> Fields:
    """The fields of config.json that a GGUF file says. Raises :class:`WeightsError` for an architecture that is not supported."""
    return _read(metadata, tensors, file)[0]


def assumed(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], file: Path) -> tuple[str, ...]:
    """What the format has no word for, or this file does not use it, and was taken for granted: a sentence each, for people."""
    return tuple(_read(metadata, tensors, file)[1].assumed)


def _read(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], file: Path) -> tuple[Fields, Said]:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise WeightsError(f"{file} lacks 'general.architecture': it is a GGUF file, but not of a language model.")
    if name not in ARCHITECTURES:
        raise WeightsError(f"{file}: the architecture {name[:60]!r} is not supported.{did_you_mean(name, ARCHITECTURES)} Known: {', '.join(ARCHITECTURES)}.")
    said, arch = Said(metadata, tensors, file, name), ARCHITECTURES[name]
    try:
        return _config(said, arch), said
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, IndexError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file}: the metadata of {name!r} makes no sense ({error}): the file is damaged, or of another version of its format.") from error


def _config(said: Said, arch: Architecture) -> Fields:
    stacked = max((t.shape[0] for t in said.tensors.values() if len(t.shape) > 2 and t.nbytes), default=0)  # all experts of a layer in one tensor
    for key, most in (("block_count", len(said.tensors)), ("expert_count", max(len(said.tensors), stacked))):
        if said(key, 0) > most:
            raise WeightsError(f"{said.file}: {arch.name}.{key} is {said(key)}, but the file holds no more than {most} tensors or slices: it is damaged.")
    fields = {ours: value for ours, theirs in arch.table if (value := said(theirs, None)) is not None}
    return {k: v for k, v in (fields | {"vocab_size": said.rows("token_embd.weight")} | arch.read(said)).items() if v is not None}


def metadata(fields: Fields) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The way back: the architecture's name, its metadata with full keys, and tensors that belong to the metadata (frequencies)."""
    kind = fields["model_type"]
    arch = next((a for a in ARCHITECTURES.values() if kind in a.kinds), None)
    if arch is None:
        known = sorted(k for a in ARCHITECTURES.values() for k in a.kinds)
        raise WeightsError(
            f"The model is of the type {kind!r}, for which GGUF has no architecture that is written here. Known: {', '.join(known)}. Export it as a folder."
        )
    made = {theirs: fields[ours] for ours, theirs in arch.table if fields.get(ours) is not None}
    made |= {"vocab_size": fields["vocab_size"]} | arch.write(fields)
    tensors: dict[str, Tensor] = {}
    if "rope_parameters" in fields:
        more, tensors = rope_metadata(fields)
        made |= more
    return arch.name, {k if k.startswith("tokenizer.") else f"{arch.name}.{k}": v for k, v in made.items() if v is not None}, tensors


def architecture_of(kinds: tuple[str, ...]) -> Architecture:
    """The architecture that serves these model types."""
    return next(a for a in ARCHITECTURES.values() if set(kinds) & set(a.kinds))


# Rotary positions


def rope(said: Said, head_dim: int, base: float = 10_000.0) -> Fields:
    """``rope_parameters`` from a file's keys and its tensors of frequencies."""
    turned = said("rope.dimension_count", head_dim)
    made: Fields = {"rope_type": "default", "rope_theta": said("rope.freq_base", base)}
    if turned != head_dim:
        made["partial_rotary_factor"] = turned / head_dim
    kind = said("rope.scaling.type", "none")
    if said.has("rope_factors_long.weight"):
        return made | _longrope(said)
    if said.has("rope_freqs.weight"):
        return made | _from_factors(said, made["rope_theta"])
    if kind == "linear" and said("rope.scaling.factor", 1.0) not in (0.0, 1.0):
        return made | {"rope_type": "linear", "factor": said("rope.scaling.factor")}
    if kind == "yarn":
        factor = said("rope.scaling.factor")
        made |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": said("rope.scaling.original_context_length")}
        for ours, theirs in (("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")):
            if (beta := said(theirs, None)) is not None:
                made[ours] = beta
        if (sharper := said("rope.scaling.attn_factor", None)) is not None:
            made["attention_factor"] = float(str(np.float32(sharper * (0.1 * math.log(factor) + 1))))
        return made
    if kind not in ("none", "linear"):
        raise WeightsError(f"{said.file}: {said.arch}.rope.scaling.type is {kind!r}, but only none, linear, yarn and longrope are supported.")
    return made


def _longrope(said: Said) -> Fields:
    """A divisor per frequency, for short and for long passes (Phi-3)."""
    long, short = (said.tensors[f"rope_factors_{n}.weight"].read().tolist() for n in ("long", "short"))
    original = said("rope.scaling.original_context_length")
    made = {"rope_type": "longrope", "short_factor": _shortest(short), "long_factor": _shortest(long), "original_max_position_embeddings": original}
    sharper, usual = said("rope.scaling.attn_factor", 1.0), LongRope(tuple(short), tuple(long), original, said("context_length") / original).magnitude
    return made if math.isclose(sharper, usual, rel_tol=1e-6) else made | {"attention_factor": sharper}


def _from_factors(said: Said, base: float) -> Fields:
    """The scaling of Llama 3 from the divisors that it gives; divisors of another origin are kept as they are, for passes of any length."""
    factors = said.tensors["rope_freqs.weight"].read().float()
    plain = 1.0 / base ** (torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors)))
    for guess in _guesses(factors, plain, said("rope.scaling.original_context_length", 8_192)):
        if torch.allclose(plain / guess.frequencies(base, 2 * len(factors)), factors, rtol=1e-5, atol=0):
            made = {"rope_type": "llama3", "factor": guess.factor, "low_freq_factor": guess.low_frequency_factor}
            return made | {"high_freq_factor": guess.high_frequency_factor, "original_max_position_embeddings": guess.original_context}
    given, context = _shortest(factors.tolist()), said("context_length", 2)
    made = {"rope_type": "longrope", "short_factor": given, "long_factor": given, "factor": 1.0, "attention_factor": 1.0}
    return made | {"original_max_position_embeddings": context}


def _guesses(factors: Tensor, plain: Tensor, context: int) -> Iterator[Llama3Scaling]:
    """Scalings that may have given these divisors: the published one, the one with another context, the one with another blend.

    A divisor between 1 and the largest lies in the blend, which is a line over the turns within the context: ``(turns - low) / (high - low)``.
    """
    largest = float(factors.max())
    yield Llama3Scaling(round(largest, 3), original_context=context)
    inside = ((factors > 1.0001) & (factors < largest * 0.9999)).nonzero()[:, 0].tolist()
    smooth = [(1 / float(factors[n]) - 1 / largest) / (1 - 1 / largest) for n in inside]
    turns = [float(plain[n]) / (2 * math.pi) for n in inside]  # per position
    if inside:
        yield Llama3Scaling(round(largest, 3), original_context=max(2, round((3 * smooth[0] + 1) / turns[0])))
    if len(inside) > 1:
        slope = (smooth[0] - smooth[-1]) / (turns[0] - turns[-1])  # context / (high - low)
        start = smooth[0] - slope * turns[0]  # -low / (high - low)
        for low in (1.0, 2.0, 4.0, 8.0) if start < 0 else ():  # the three numbers count up to a factor in common
            yield Llama3Scaling(round(largest, 3), low, round(low - low / start, 3), max(2, round(-slope * low / start)))


def _shortest(values: list[float]) -> list[float]:
    return [float(str(np.float32(v))) for v in values]


def rope_metadata(fields: Fields) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys and tensors that say ``rope_parameters``."""
    given = fields["rope_parameters"]
    given = given.get("full_attention", given)
    kind, head = given["rope_type"], fields.get("qk_rope_head_dim") or _head_dim(fields)
    turned = int(head * given.get("partial_rotary_factor", 1.0))
    made: dict[str, Any] = {"rope.freq_base": given["rope_theta"], "rope.dimension_count": turned}
    if kind == "default":
        return made, {}
    if kind == "llama3":
        scaling = Llama3Scaling(given["factor"], given["low_freq_factor"], given["high_freq_factor"], given["original_max_position_embeddings"])
        plain = 1.0 / given["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
        made["rope.scaling.original_context_length"] = scaling.original_context  # not needed, but it spares the reader a guess
        return made, {"rope_freqs.weight": plain / scaling.frequencies(given["rope_theta"], turned)}
    if kind == "longrope":
        short, long, original = tuple(given["short_factor"]), tuple(given["long_factor"]), given["original_max_position_embeddings"]
        factor = given.get("factor") or fields["max_position_embeddings"] / original
        sharper = LongRope(short, long, original, factor, given.get("attention_factor")).magnitude
        made |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": sharper}
        return made, {f"rope_factors_{n}.weight": torch.tensor(given[f"{n}_factor"]) for n in ("long", "short")}
    if kind not in ("linear", "yarn"):
        raise WeightsError(f"Rotary positions scaled by {kind!r} cannot be said in a GGUF file: export the model as a folder.")
    made |= {"rope.scaling.type": kind, "rope.scaling.factor": given["factor"]}
    if kind == "yarn":
        made |= {"rope.scaling.original_context_length": given["original_max_position_embeddings"]}
        made |= {"rope.scaling.yarn_beta_fast": given.get("beta_fast"), "rope.scaling.yarn_beta_slow": given.get("beta_slow")}
        if given.get("attention_factor") is not None:
            made["rope.scaling.attn_factor"] = given["attention_factor"] / (0.1 * math.log(given["factor"]) + 1)
    return made, {}


def _head_dim(fields: Fields) -> int:
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


# The architectures

LAYERS = (("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"), ("intermediate_size", "feed_forward_length"))
HEADS = (("num_attention_heads", "attention.head_count"), ("max_position_embeddings", "context_length"))
COMMON = (*LAYERS, *HEADS, ("num_key_value_heads", "attention.head_count_kv"), ("rms_norm_eps", "attention.layer_norm_rms_epsilon"))
WINDOW = (("sliding_window", "attention.sliding_window"),)
CHOSEN = (("num_experts_per_tok", "expert_used_count"),)
CAPS = (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping"))


def _decoder(said: Said, kind: str, **more: Any) -> Fields:
    """What all decoders with rotary positions have in common."""
    head = said("attention.key_length", None) or said("embedding_length") // said("attention.head_count")
    made: Fields = {"model_type": kind, "head_dim": head, "rope_parameters": rope(said, head)}
    return made | {"tie_word_embeddings": not said.has("output.weight")} | more


def _sizes(fields: Fields) -> dict[str, Any]:
    head = _head_dim(fields)
    return {"attention.key_length": head, "attention.value_length": head}


def _biases(said: Said) -> Fields:
    return {"attention_bias": said.has("blk.0.attn_q.bias"), "mlp_bias": said.has("blk.0.ffn_up.bias")}


def _llama(said: Said) -> Fields:
    experts, size = said("expert_count", 0), said("attention.sliding_window", 0)
    if experts:
        made = _decoder(said, "mixtral", num_local_experts=experts, num_experts_per_tok=said("expert_used_count"), sliding_window=size or None)
    elif size:
        made = _decoder(said, "mistral", sliding_window=size)
    else:
        made = _decoder(said, "llama", **_biases(said))
    return made


def _llama_back(fields: Fields) -> dict[str, Any]:
    made = _sizes(fields) | {"attention.sliding_window": fields.get("sliding_window")}
    if "num_local_experts" in fields:
        made |= {"expert_count": fields["num_local_experts"], "expert_used_count": fields["num_experts_per_tok"]}
    return made


def _windows(said: Said, every: int) -> Fields:
    """Layers with a window, and one without after ``every - 1`` of them."""
    n = said("block_count")
    if not said.gives("attention.sliding_window_pattern"):
        said.assume(f"the last of every {every} layers sees all tokens, the others a window (attention.sliding_window_pattern is not there), as llama.cpp does")
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
    return {"layer_types": kinds}


def _gemma(said: Said, kind: str, largest: int = 0) -> Fields:
    """Gemma's activation and, from its second version on, the factor on scores: by the head's size, but in the largest model by the width."""
    made = _decoder(said, kind, hidden_activation="gelu_pytorch_tanh")
    if kind != "gemma":
        across = said("embedding_length") // said("attention.head_count")
        made["query_pre_attn_scalar"] = across if said("block_count") == largest else made["head_dim"]
        why = (
            f"a model of {largest} blocks: its width by its heads"
            if said("block_count") == largest
            else f"a model of other than {largest} blocks: a head's size"
        )
        said.assume(f"attention scores are divided by the root of {made['query_pre_attn_scalar']} ({why}; the format has no word for it), as llama.cpp does")
    return made


def _gemma3(said: Said) -> Fields:
    made = _gemma(said, "gemma3_text", largest=62)
    local = {"rope_type": "default", "rope_theta": said("rope.freq_base_swa", 10_000.0)}
    return made | {"rope_parameters": {"full_attention": made["rope_parameters"], "sliding_attention": local}} | _windows(said, 6)


def _gemma3_back(fields: Fields) -> dict[str, Any]:
    local = fields["rope_parameters"]["sliding_attention"]
    return _sizes(fields) | {"rope.freq_base_swa": local["rope_theta"]}


def _gpt_oss(said: Said) -> Fields:
    made = _decoder(said, "gpt_oss", attention_bias=True) | _windows(said, 2)
    if made["rope_parameters"]["rope_type"] == "yarn":
        made["rope_parameters"]["truncate"] = False
        said.assume(
            "the borders of YaRN's blend are not rounded (truncate is false), as GPT-OSS was trained; the format has no word for it, and llama.cpp rounds them"
        )
    return made


def _deepseek(said: Said) -> Fields:
    """Latent attention: the sizes of a head stand under keys of their own since there are two ways to compute it."""
    rope_dim = said("rope.dimension_count")
    third = said("expert_gating_func", 1) == 2  # sigmoid
    made: Fields = {
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        "num_key_value_heads": said("attention.head_count"),
        "q_lora_rank": said("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": said("attention.key_length_mla", said("attention.key_length", 0)) - rope_dim,
        "v_head_dim": said("attention.value_length_mla", said("attention.value_length", 0)),
        "routed_scaling_factor": said("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(said("expert_weights_norm", False)),
        "tie_word_embeddings": not said.has("output.weight"),
        "rope_parameters": rope(said, rope_dim),
    }
    if not said.gives("expert_group_count") and said("expert_count", 0):
        said.assume("experts are chosen among all and not by groups (expert_group_count is not in the file), as llama.cpp does")
    groups, kept = said("expert_group_count", 1), said("expert_group_used_count", 1)
    made |= {"topk_method": "noaux_tc" if third else "group_limited_greedy" if groups > 1 else "greedy", "scoring_func": "sigmoid" if third else "softmax"}
    made |= {"n_group": groups, "topk_group": kept}
    times = said("rope.scaling.yarn_log_multiplier", 0.0)
    if times:
        made["rope_parameters"] |= dict.fromkeys(("mscale", "mscale_all_dim"), float(str(np.float32(times * 10))))
    return made | ({} if third else {"mlp_bias": said.has("blk.0.ffn_up.bias")})


def _deepseek_back(fields: Fields) -> dict[str, Any]:
    rank, turned, plain = fields["kv_lora_rank"], fields["qk_rope_head_dim"], fields["qk_nope_head_dim"]
    third = fields["model_type"] == "deepseek_v3"
    made = {
        "attention.head_count_kv": 1,  # in the latent space all heads share one key
        "attention.q_lora_rank": fields.get("q_lora_rank") or 0,  # llama.cpp wants it said that there is none
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": plain + turned,
        "attention.value_length_mla": fields["v_head_dim"],
        "expert_gating_func": 2 if third else 1,
        "expert_weights_scale": float(fields["routed_scaling_factor"]),
        "expert_weights_norm": bool(fields["norm_topk_prob"]),
        "expert_group_count": fields.get("n_group"),
        "expert_group_used_count": fields.get("topk_group"),
    }
    all_dim = fields["rope_parameters"].get("mscale_all_dim")
    return made | ({"rope.scaling.yarn_log_multiplier": 0.1 * all_dim} if all_dim else {})


def _neox(said: Said) -> Fields:
    head = said("embedding_length") // said("attention.head_count")
    made: Fields = {"model_type": "gpt_neox", "rope_parameters": rope(said, head), "attention_bias": said.has("blk.0.attn_qkv.bias")}
    return made | {"tie_word_embeddings": not said.has("output.weight"), "hidden_act": "gelu"}


def _qwen3_moe(said: Said) -> Fields:
    said.assume("the weights of the chosen experts are divided by their sum (norm_topk_prob; the format has no word for it), as llama.cpp does")
    return _decoder(said, "qwen3_moe", norm_topk_prob=True, attention_bias=said.has("blk.0.attn_q.bias"))


def _gpt2(said: Said) -> Fields:
    """The converter stores the one table twice; a quantiser gives the copy a better type, and then they are two."""
    twice = said.has("output.weight") and said.tensors["output.weight"].type != said.tensors["token_embd.weight"].type
    return {"model_type": "gpt2", "tie_word_embeddings": not twice}


def _bert(said: Said) -> Fields:
    made = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}
    return made | {"type_vocab_size": said.rows("token_types.weight"), "max_position_embeddings": said.rows("position_embd.weight")}


def _bert_back(fields: Fields) -> dict[str, Any]:
    return {"attention.causal": False, "tokenizer.ggml.token_type_count": fields["type_vocab_size"]}


def _t5(said: Said) -> Fields:
    """T5 and Flan-T5. (llama.cpp runs those with a read-out of their own: it leaves out the scale that a tied one has.)"""
    gated = said.has("enc.blk.0.ffn_gate.weight")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "num_decoder_layers": said("decoder_block_count", said("block_count")),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not said.has("output.weight"),
        "is_encoder_decoder": True,
    }


def _t5_back(fields: Fields) -> dict[str, Any]:
    made = {"context_length": fields.get("max_position_embeddings"), "attention.value_length": fields["d_kv"], "attention.head_count_kv": fields["num_heads"]}
    return made | {"attention.layer_norm_epsilon": fields["layer_norm_epsilon"]}


_TABLE_T5 = (
    ("d_model", "embedding_length"),
    ("num_layers", "block_count"),
    ("num_decoder_layers", "decoder_block_count"),
    ("d_ff", "feed_forward_length"),
    ("num_heads", "attention.head_count"),
    ("d_kv", "attention.key_length"),
    ("layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
    ("relative_attention_num_buckets", "attention.relative_buckets_count"),
    ("decoder_start_token_id", "decoder_start_token_id"),
)
_TABLE_DEEPSEEK = (
    *LAYERS,
    *HEADS,
    *CHOSEN,
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
    ("n_routed_experts", "expert_count"),
    ("n_shared_experts", "expert_shared_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("first_k_dense_replace", "leading_dense_block_count"),
)
_TABLE_GPT2 = (
    ("n_embd", "embedding_length"),
    ("n_layer", "block_count"),
    ("n_inner", "feed_forward_length"),
    ("n_head", "attention.head_count"),
    ("n_positions", "context_length"),
    ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
)
_TABLE_NEOX = (*LAYERS, *HEADS, ("layer_norm_eps", "attention.layer_norm_epsilon"), ("use_parallel_residual", "use_parallel_residual"))

_ALL = (
    Architecture("llama", ("llama", "mistral", "mixtral"), COMMON, _llama, _llama_back),
    Architecture("qwen2", ("qwen2",), COMMON, lambda said: _decoder(said, "qwen2"), _sizes),
    Architecture("qwen3", ("qwen3",), COMMON, lambda said: _decoder(said, "qwen3", attention_bias=said.has("blk.0.attn_q.bias")), _sizes),
    Architecture("olmo2", ("olmo2",), COMMON, lambda said: _decoder(said, "olmo2"), _sizes),
    Architecture(
        "phi3",
        ("phi3",),
        (*COMMON, *WINDOW),
        lambda said: _decoder(said, "phi3", original_max_position_embeddings=said("rope.scaling.original_context_length", None)),
        _sizes,
    ),
    Architecture("smollm3", ("smollm3",), COMMON, lambda said: _decoder(said, "smollm3", **_biases(said)), _sizes),
    Architecture("gptneox", ("gpt_neox",), _TABLE_NEOX, _neox),
    Architecture("gpt2", ("gpt2",), _TABLE_GPT2, _gpt2),
    Architecture("gemma", ("gemma",), COMMON, lambda said: _gemma(said, "gemma"), _sizes),
    Architecture("gemma2", ("gemma2",), (*COMMON, *WINDOW, *CAPS), lambda said: _gemma(said, "gemma2", largest=46) | _windows(said, 2), _sizes),
    Architecture("gemma3", ("gemma3_text", "gemma3"), (*COMMON, *WINDOW, *CAPS[1:]), _gemma3, _gemma3_back),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        (*COMMON, *CHOSEN, ("num_experts", "expert_count"), ("moe_intermediate_size", "expert_feed_forward_length")),
        _qwen3_moe,
        _sizes,
    ),
    Architecture(
        "gpt-oss",
        ("gpt_oss",),
        (*COMMON, *CHOSEN, *WINDOW, ("num_local_experts", "expert_count"), ("intermediate_size", "expert_feed_forward_length")),
        _gpt_oss,
        _sizes,
    ),
    Architecture("deepseek2", ("deepseek_v2", "deepseek_v3"), _TABLE_DEEPSEEK, _deepseek, _deepseek_back),
    Architecture("bert", ("bert",), (*LAYERS, *HEADS, ("layer_norm_eps", "attention.layer_norm_epsilon")), _bert, _bert_back),
    Architecture("t5", ("t5",), _TABLE_T5, _t5, _t5_back),
)
ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in _ALL}
"""Every architecture that is read and written, by GGUF's name."""
