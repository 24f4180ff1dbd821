"""config.json: every field is read, known to be harmless, or an error.

    values ──► Config ──► c("hidden_size")              must be there
                          c("head_dim", None)           may be missing
                          c.only("hidden_act", "silu")  one value is understood
                          c.ignore("pretraining_tp")    changes nothing here
           ──► c.finish()                               whatever nobody asked for is an error

A field that a reader skips without a word is a model that computes something else: this file is why that cannot happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glassformer.core.errors import WeightsError, did_you_mean
from glassformer.parts.rotary import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRope, RopeScaling, Rotary, Unscaled, YaRNScaling

from .stored import shown

MISSING: Any = object()

MOST = {"layer": 2_000, "expert": 4_096}  # the model is built of as many objects, before a single tensor of it is looked for
MOST_NUMBER = 1 << 40

HARMLESS = frozenset(
    " ".join(
        (
            # Who wrote the file, for what program
            "_name_or_path name_or_path _commit_hash architectures auto_map model_type transformers_version torch_dtype dtype task_specific_params",
            "finetuning_task tokenizer_class processor_class custom_pipelines language license tags is_llama_config transformers.js_config",
            "adapters adapter_fusion neftune_noise_alpha sentence_transformers sbert_ce_default_activation_function unsloth_fixed unsloth_version",
            "total_flos save_step",
            # How to run it
            "use_cache attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled",
            "use_flash_attn torchscript",
            "use_bfloat16 output_attentions output_hidden_states output_past output_router_logits return_dict pretraining_tp chunk_size_feed_forward",
            "gradient_checkpointing experts_implementation _experts_implementation reference_compile repad_logits_with_grad sparse_prediction",
            "sparse_pred_ignore_index",
            # Special tokens and generation, which the tokenizer and the generation settings carry
            "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id",
            "forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens max_length min_length do_sample early_stopping num_beams",
            "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences return_dict_in_generate output_scores remove_invalid_values",
            "exponential_decay_length_penalty prefix generation_config bos_token eos_token pad_token sep_token cls_token mask_token unk_token",
            # Training only
            "initializer_range initializer_factor initializer_cutoff_factor init_std embedding_initializer_range router_aux_loss_coef",
            "aux_loss_alpha seq_aux router_jitter_noise problem_type label2id id2label num_labels _num_labels layerdrop encoder_layerdrop",
            "decoder_layerdrop replacing_rate",
            "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob embd_pdrop attn_pdrop resid_pdrop dropout",
            "dropout_rate activation_dropout classifier_dropout classif_dropout embedding_dropout mlp_dropout embd_dropout resid_dropout",
            "emb_dropout qa_dropout seq_classif_dropout summary_first_dropout classifier_dropout_prob",
            # Limits and older spellings that the computation does not read
            "max_position_embeddings n_positions n_ctx seq_length model_max_length max_seq_len max_sequence_length tie_encoder_decoder",
            "is_encoder_decoder cross_attention_hidden_size pruned_heads tf_legacy_loss",
        )
    ).split()
)
"""Fields that do not change what a trained model computes (dropout is a matter of training; a family may still read any of them)."""


class Config:
    """The fields of a config.json, and which of them were read."""

    def __init__(self, values: Mapping[str, Any], file: Path | str = "config.json"):
        self.values, self.file = dict(values), file
        self.seen: set[str] = set()

    def __call__(self, key: str, default: Any = MISSING) -> Any:
        """The field; without a default it must be there. A field that is null counts as missing where there is a default."""
        self.seen.add(key)
        value = self.values.get(key, MISSING)
        if value is MISSING or (value is None and default is not MISSING):
            if default is MISSING:
                raise WeightsError(f"{self.file} lacks {key!r}, without which the model cannot be built.{did_you_mean(key, self.values)}")
            return default
        return value

    def nullable(self, key: str, default: Any = None) -> Any:
        """A field whose null means none; only a field that is missing has the default."""
        return self(key) if key in self.values else self(key, default)

    def defaults(self, **fields: Any) -> None:
        """What the family's fields are where the file does not say (nested tables leave out what is usual)."""
        self.values = fields | self.values

    def whole(self, key: str, default: Any = MISSING) -> Any:
        """A field that is a whole number above 0 (or the default)."""
        value = self(key, default)
        if value is default:
            return value
        if type(value) is not int or value < 1:
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but a whole number above 0 is needed.")
        most = next((n for word, n in MOST.items() if word in key), MOST_NUMBER)
        if value > most:
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but no model has more than {most:,}: fetch the file again.")
        return value

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """A field that is true or false (or the default); 1 and 0 say the same. The text ``"false"`` says neither: taken for a truth it would be true."""
        value = self(key, default)
        if type(value) not in (bool, int) or value not in (0, 1):
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but true or false is needed.")
        return bool(value)

    def number(self, key: str, default: Any = MISSING) -> float:
        """A field that is a finite number (or the default)."""
        value = self(key, default)
        if type(value) not in (int, float) or not abs(value) <= 1e38:
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but a finite number is needed.")
        return float(value)

    def only(self, key: str, *understood: Any, default: Any = MISSING) -> Any:
        """A field of which only some values are understood; missing means ``default`` (or the first of them)."""
        value = self(key, understood[0] if default is MISSING else default)
        if value not in understood:
            choices = " or ".join(map(repr, understood))
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but only {choices} is supported: this model computes something that would be left out.")
        return value

    def ignore(self, *keys: str) -> None:
        """Fields that change nothing for this family."""
        self.seen.update(keys)

    def inner(self, key: str, default: Mapping[str, Any] | None = None) -> Config:
        """A table within the table, whose fields count as well."""
        value = self(key, MISSING if default is None else default)
        if not isinstance(value, Mapping):
            raise WeightsError(f"{self.file}: {key} is {shown(value)}, but a table of fields is needed.")
        return Config(value, f"{self.file}, {key}")

    def finish(self, harmless: frozenset[str] = HARMLESS, ignored: Sequence[str] = ()) -> None:
        """Raise :class:`WeightsError` for a field that nobody read, which might change what the model computes (null and empty ones do not)."""
        for key in ("quantization_config", "quantization", "compression_config"):
            if self.values.get(key) and key not in self.seen and key not in ignored:
                raise packed(self.file, key, self.values[key])
        unread = [k for k, v in self.values.items() if k not in self.seen and k not in harmless and k not in ignored and v is not None and v != {} and v != []]
        if unread:
            rest = f" (and {len(unread) - 1} more: {', '.join(unread[1:20])})" if unread[1:] else ""
            raise WeightsError(
                f"{self.file}: {unread[0]} is {shown(self.values[unread[0]])}{rest}, which is not understood here and might change what the model computes. "
                f"If it does not, open the model with ignore={unread[:20]!r}."
            )


def packed(file: Any, key: str, table: Any) -> WeightsError:
    """The error for weights that another program holds in few bits."""
    method = table.get("quant_method") if isinstance(table, Mapping) else None
    how = f"in the format {str(method)[:60]!r} ({key}, quant_method)" if method else f"in few bits ({key} is {shown(table)})"
    return WeightsError(
        f"{file}: the weights of this checkpoint are quantised {how}, which is not read here: its tensors are no plain numbers. "
        "Fetch the same model unquantised (bfloat16 or float16), or as a GGUF file, whose quantised types are read."
    )


# Rotary positions: what transformers 5 calls rope_parameters, and what stood there before (rope_theta, rope_scaling)


def rotary(c: Config, *, kind: str | None = None, base: float = 10_000.0, fraction: float = 1.0, layout: str = "half") -> Rotary:
    """The rotary encoding of a config; ``kind`` picks one of several (``"sliding_attention"``), ``base`` and ``fraction`` are the family's defaults."""
    old_base, old_fraction, old_scaling = c("rope_theta", base), c("partial_rotary_factor", fraction), c("rope_scaling", {})
    given = c("rope_parameters", None) or old_scaling
    name = "rope_parameters" if c.values.get("rope_parameters") else "rope_scaling"
    if not isinstance(given, Mapping):
        raise WeightsError(f"{c.file}: {name} is {shown(given)}, but a table of fields is needed.")
    if kind is not None and isinstance(given.get(kind), Mapping):
        given = given[kind]
    r = Config(given, f"{c.file}, {name}")
    theta, part = r.number("rope_theta", old_base), r.number("partial_rotary_factor", old_fraction)
    made = Rotary(base=theta, fraction=part, layout=layout, scaling=_scaling(r, c))
    r.finish(frozenset())
    return made


def _scaling(r: Config, c: Config) -> RopeScaling:
    kind = r("rope_type", r("type", "default"))
    r.seen.add("type")
    context = c("max_position_embeddings", 0)
    original = r("original_max_position_embeddings", c("original_max_position_embeddings", context))
    if kind in ("default", "mrope_off"):
        return Unscaled()
    if kind == "linear":
        return LinearScaling(r.number("factor"))
    if kind == "dynamic":
        return DynamicNTKScaling(r.number("factor"), int(context))
    if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in r.values):  # the older names of Phi-3's
        factor = r.number("factor", 0) or context / original
        short, long = tuple(map(float, r("short_factor"))), tuple(map(float, r("long_factor")))
        return LongRope(short, long, int(original), factor, r("attention_factor", None))
    if kind == "llama3":
        return Llama3Scaling(r.number("factor"), r.number("low_freq_factor"), r.number("high_freq_factor"), int(original))
    if kind == "yarn":
        factor = r.number("factor", 0) or context / original
        return YaRNScaling(
            factor,
            int(original),
            beta_fast=r.number("beta_fast", 32.0),
            beta_slow=r.number("beta_slow", 1.0),
            attention_factor=_yarn_magnitude(r, factor),
            truncate=r.flag("truncate", True),
        )
    raise WeightsError(f"{r.file}: rope_type is {shown(kind)}, which is not supported. Known: default, linear, dynamic, llama3, yarn, longrope.")


def _yarn_magnitude(r: Config, factor: float) -> float | None:
    """The factor on rotated queries and keys, where the file says one: itself, or as a ratio of two magnitudes (DeepSeek-V2, arXiv 2405.04434)."""
    given, mscale, all_dim = r("attention_factor", None), r("mscale", None), r("mscale_all_dim", None)
    if given is not None or not (mscale and all_dim):
        return given
    return magnitude(factor, mscale) / magnitude(factor, all_dim)


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """``0.1 mscale ln(factor) + 1`` (YaRN, arXiv 2309.00071, section 3.4)."""
    import math

    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_config(rotary: Rotary) -> dict[str, Any]:
    """The ``rope_parameters`` that :func:`rotary` reads as this encoding."""
    made: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if rotary.fraction != 1.0:
        made["partial_rotary_factor"] = rotary.fraction
    s = rotary.scaling
    if isinstance(s, LinearScaling):
        made |= {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, DynamicNTKScaling):
        made |= {"rope_type": "dynamic", "factor": s.factor}
    elif isinstance(s, LongRope):
        made |= {"rope_type": "longrope", "factor": s.factor, "short_factor": list(s.short), "long_factor": list(s.long)}
        made |= {"original_max_position_embeddings": s.original_context}
        if s.attention_factor is not None:
            made["attention_factor"] = s.attention_factor
    elif isinstance(s, Llama3Scaling):
        made |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_frequency_factor, "high_freq_factor": s.high_frequency_factor}
        made |= {"original_max_position_embeddings": s.original_context}
    elif isinstance(s, YaRNScaling):
        made |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original_context, "beta_fast": s.beta_fast}
        made |= {"beta_slow": s.beta_slow, "truncate": s.truncate}
        if s.attention_factor is not None:
            made["attention_factor"] = s.attention_factor
    elif not isinstance(s, Unscaled):
        raise WeightsError(f"{type(s).__name__} has no name in a config.json, so this model cannot be written in that format.")
    return made


def context_config(rotary: Rotary) -> dict[str, int]:
    """The fields outside ``rope_parameters`` on which an encoding depends: the context that a dynamic scaling compares with, those whose ratio stretches."""
    s = rotary.scaling
    if isinstance(s, DynamicNTKScaling):
        return {"max_position_embeddings": s.original_context}
    if isinstance(s, LongRope):
        return {"max_position_embeddings": round(s.factor * s.original_context), "original_max_position_embeddings": s.original_context}
    return {}
