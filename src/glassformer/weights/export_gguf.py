"""Giving back as a GGUF file, which llama.cpp and what is built on it run.

    model ─ Spec ──────► family ─► config.json's fields ─► metadata ─┐
          ─ parameters ─► GGUF's names, right to left ─► quantised ──┴─► one file
    tokenizer ───────────────────────────────────────────► metadata

Norms, biases and other vectors stay float32, as llama.cpp wants them; matrices take the type that is asked for, or F16 where
their rows are no whole number of blocks. The header is written first and read again: what it says must be the Spec that was
given, or nothing is exported.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import WeightsError, did_you_mean
from glassformer.core.fields import typed

from . import assign, own, sentence
from .config import HARMLESS
from .families import gguf_fields, gguf_names
from .family import Family, family_for, in_full, says
from .quants import FORMATS, WRITTEN, quantise, reference

if TYPE_CHECKING:
    from glassformer.text import Tokenizer

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""What the file calls the type of most of its tensors (``general.file_type``)."""
ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "rope_freqs.weight", "attn_rel_b.weight", "_sinks.weight")
LARGEST = 65_504  # of float16, in which F16 keeps its numbers and the quantised types their scales
CONTEXT = 4_096  # said of a model that does not say how long its contexts may be


@typed(WeightsError)
def export_gguf(
    model: Any,
    file: str | os.PathLike[str],
    type: str = "F16",
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` as a GGUF file with matrices of ``type``: F32, F16, BF16, Q8_0 or Q4_0.

    ``settings``: fields of the config.json that it comes from (those that do not change the computation are kept), or metadata by
    its own key (``{"general.name": "mine"}``); None takes them from the checkpoint that the model was opened from, if it was. The
    file is written under another name first. Raises :class:`WeightsError` if no architecture of GGUF computes what the model does, if a number
    is too large for the type, or if the file cannot be written.
    """
    type = type.upper()
    if type not in WRITTEN:
        raise WeightsError(f"A GGUF file is written in {', '.join(WRITTEN)}, but {type!r} was asked for.{did_you_mean(type, WRITTEN)}")
    if getattr(model, "spec", None) is None:
        raise WeightsError("A model that was built from a Spec can be exported, but something else was given.")
    own.check_plain(model)
    origin = getattr(model, "origin", {})
    path, given = Path(file), dict({**origin.get("config", {}), **_ends_of(origin.get("generation", {}))} if settings is None else settings)
    family, fields = family_for(sentence.bare(model.spec), given.get("model_type"))
    fields = {"max_position_embeddings": CONTEXT} | {k: v for k, v in given.items() if k in HARMLESS} | fields
    arch, metadata, more = gguf_fields.metadata(fields)
    family, _ = gguf_names.dialect(family, model.spec, {})
    homeless = [path for path, _ in model.named_parameters() if not family.fitted(model.spec).table.rules_for(path)]
    if homeless or sentence.bare(model.spec) != model.spec:
        what = f"the parameter {homeless[0]!r}" if homeless else "how its vectors are pooled"
        raise WeightsError(f"GGUF has no place for {what} of this {family.name} model: its {arch} architecture is the bare stack. Write a folder (export_hf).")
    general = {"general.architecture": arch, "general.type": "model", "general.file_type": FILE_TYPES[type], "general.quantization_version": 2}
    metadata = general | {"general.name": path.stem} | metadata | _tokenizer(tokenizer) | _ids(tokenizer, given) | {k: v for k, v in given.items() if "." in k}
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.gguf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(draft, metadata, more, model, family, type)
        files.flush(draft)
        draft.replace(path)
    except OSError as error:
        reason, todo = files.trouble(error)
        raise WeightsError(f"The model could not be written to {path}: {reason}. {todo}; what was there before is untouched.") from error
    finally:
        with suppress(OSError):  # it may never have been made
            draft.unlink(missing_ok=True)
    return path


def _ends_of(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation settings say of the tokens that end a text: it goes before what the config says."""
    return {k: v for k, v in generation.items() if k == "eos_token_id" and v is not None}


def _ids(tokenizer: Tokenizer | None, given: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens by the model's settings, where those name any: the first that ends a text, the next that ends a turn."""
    if tokenizer is None:
        return {}
    ends = given.get("eos_token_id")
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if _is_id(i, tokenizer)]
    made = dict(zip(("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"), ends, strict=False))
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if _is_id(given.get(ours), tokenizer):
            made[f"tokenizer.ggml.{theirs}_token_id"] = given[ours]
    return made


def _is_id(value: Any, tokenizer: Tokenizer) -> bool:
    """Whether a setting is an id of this vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < tokenizer.vocab_size


def _tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    from glassformer.text.from_gguf import gguf_metadata

    return gguf_metadata(tokenizer)


def _write(draft: Path, metadata: Mapping[str, Any], more: Mapping[str, Tensor], model: Any, family: Family, type: str) -> None:
    gguf = reference()
    writer = gguf.GGUFWriter(draft, metadata["general.architecture"])
    try:
        for key, value in metadata.items():
            if key != "general.architecture" and value is not None:
                _add(writer, gguf, key, value)
        size = 0
        for name, x in (*more.items(), *_shapes(model, family)):
            kind = _type_of(name, x, type)
            nbytes = x.numel() // FORMATS[kind].numbers * FORMATS[kind].bytes
            writer.add_tensor_info(name, _stored_shape(x, kind), _numpy_type(kind), nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
            size += -(-nbytes // 32) * 32
        writer.open_output_file(draft)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for x in more.values():
            writer.write_tensor_data(x.numpy())
        _check_header(writer.fout[0], draft, size, model)
        for name, x in assign.theirs(model, family):
            writer.write_tensor_data(_bytes(x, _type_of(name, x, type)))
    finally:
        writer.close()


def _shapes(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that will be written, in order, from a model without memory."""
    return assign.theirs(model.spec.build(device="meta"), family)


def _check_header(handle: Any, draft: Path, size: int, model: Any) -> None:
    """Raise :class:`WeightsError` if what the header says is another model than was given."""
    from .opened import open as open_checkpoint

    handle.flush()
    at = handle.tell()
    os.truncate(draft, -(-at // 32) * 32 + size)  # room for what comes, which costs nothing yet
    again = open_checkpoint(draft)
    if again.family is None or not says(again.family, again.config, model.spec):
        lines = in_full(model.spec).diff(in_full(again.spec))
        raise WeightsError(f"A GGUF file cannot say all of this model; read again, it would be another one:\n{lines}\nExport it as a folder.")


def _type_of(name: str, x: Tensor, type: str) -> str:
    """The type of one tensor: float32 for vectors and what is small, F16 where blocks do not fill a row."""
    if x.ndim < 2 or name.endswith(ALWAYS_F32) or name.endswith(".bias"):
        return "F32"
    return "F16" if x.shape[-1] % FORMATS[type].numbers else type


def _stored_shape(x: Tensor, kind: str) -> tuple[int, ...]:
    """The shape as the writer counts it: bytes for what is not F32 or F16."""
    form = FORMATS[kind]
    return tuple(x.shape) if kind in ("F32", "F16") else (*x.shape[:-1], x.shape[-1] // form.numbers * form.bytes)


def _numpy_type(kind: str) -> Any:
    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))


def _bytes(x: Tensor, kind: str) -> np.ndarray:
    if kind not in ("F32", "BF16") and x.numel() and not float(x.abs().max()) <= LARGEST:
        raise WeightsError(
            f"A matrix of shape {tuple(x.shape)} holds {float(x.abs().max()):.3g}, and {kind} ends at {LARGEST:,}: write the file with type BF16 or F32."
        )
    if kind in ("F32", "F16"):
        return x.to("cpu", torch.float32 if kind == "F32" else torch.float16).contiguous().numpy()
    return quantise(x, kind).numpy()


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    """One key; whole numbers as llama.cpp reads them, without a sign."""
    if isinstance(value, bool | np.bool_):
        writer.add_bool(key, bool(value))
    elif isinstance(value, int | np.integer):
        writer.add_uint32(key, int(value))
    elif isinstance(value, float | np.floating):
        writer.add_float32(key, float(value))
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else list(value))
