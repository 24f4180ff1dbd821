"""Giving back: a model as a folder that other programs open.

    model ─ Spec ──────► the family that says the same ─► config.json
          ─ parameters ─► its table, right to left ─────► model.safetensors (shards above 5 GB, with an index)
    beside them: tokenizer.json, chat_template.jinja, generation_config.json

Whether a family says the same is not believed but tried: the config that it writes is read again, and must give the
Spec that it came from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import WeightsError
from glassformer.core.fields import typed
from glassformer.models import Decoder

from . import assign, own, sentence
from .config import HARMLESS
from .family import family_for, says
from .source import INDEX

if TYPE_CHECKING:
    from glassformer.text import Tokenizer

OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files of an earlier model in the same folder that would be read as this one's."""
SHARD = 5_000_000_000  # bytes of tensors in one file


@typed(WeightsError)
def export_hf(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> Path:
    """Write ``model`` as a Hugging Face folder, in the types that its parameters have.

    ``config``: the fields of the config.json that it comes from; those that do not change the computation (special tokens, the longest
    context) are kept. ``generation``: what generation_config.json shall say. None takes both from the checkpoint that the model was opened
    from, if it was (``model.origin``); special tokens that neither names are the tokenizer's. ``shard``: bytes of tensors in one file. Files are
    written under other names first.
    Raises :class:`WeightsError` if no published family computes what the model does, or the folder cannot be written.
    """
    origin = getattr(model, "origin", {})
    path, given = Path(folder), dict(origin.get("config", {}) if config is None else config)
    generation = origin.get("generation") if generation is None else generation
    if getattr(model, "spec", None) is None:
        raise WeightsError(f"A model that was built from a Spec can be exported, but a {type(model).__name__} was given.")
    if (path / "model.json").exists():
        raise WeightsError(f"{path} holds a model in glassformer's own format, which would be lost: choose another folder.")
    spec = sentence.bare(model.spec)
    own.check_plain(model)
    family, values = family_for(spec, given.get("model_type"))
    values = {k: v for k, v in given.items() if k in HARMLESS and k not in ("torch_dtype", "dtype", "transformers_version")} | values
    if given.get("model_type") == values["model_type"] and given.get("architectures"):
        kept = values | {"architectures": given["architectures"]}
        values = kept if says(family, kept, spec) else values  # another head than it was opened with has another class
    if len(values.get("id2label") or ()) != values.get("num_labels"):
        values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}  # labels of another number of classes
    if isinstance(model.spec, Decoder):  # a field that is missing is not "none" to other programs, but another model's default
        values = special_ids(tokenizer) | values
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    staging: Path | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path, prefix=".writing."))
        _write_tensors(model, family, staging, shard)
        _write_json(staging / "config.json", values)
        if generation:
            _write_json(staging / "generation_config.json", dict(generation))
        if tokenizer is not None:
            tokenizer.save(staging / "tokenizer.json")
        written = files.take_places(staging, path, last="config.json")
        for old in path.iterdir():  # shards of an earlier model, or its index: some programs would open those
            if (OURS.fullmatch(old.name) or old.name in COMPANIONS) and old.name not in written:
                old.unlink()
        sentence.write_modules(model.spec, path)
    except (OSError, SafetensorError) as error:
        reason, todo = files.trouble(error)
        raise WeightsError(f"The model could not be written to {path}: {reason}. {todo}; what was there before is untouched.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids that begin, end and fill texts by a tokenizer; None for those that it does not have."""
    return {f"{role}_token_id": None if tokenizer is None else tokenizer.role_id(role) for role in ("bos", "eos", "pad")}


def _write_tensors(model: Any, family: Any, folder: Path, most: int) -> None:
    """One file, or several with an index; never more than one shard is copied in memory."""
    names = _sizes(model, family)
    shards: list[list[str]] = [[]]
    size = 0
    for name, n in names.items():
        if shards[-1] and size + n > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    waiting: dict[str, Tensor] = {}
    made = assign.theirs(model, family)
    for file, wanted in zip(files, shards, strict=True):
        while not all(n in waiting for n in wanted):
            name, x = next(made)
            waiting[name] = x
        save_file({n: waiting.pop(n).to("cpu").contiguous() for n in wanted}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {n: f for f, wanted in zip(files, shards, strict=True) for n in wanted}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(names.values())}, "weight_map": where})


def _sizes(model: Any, family: Any) -> dict[str, int]:
    """Bytes of every tensor that will be written, in order, from a model without memory."""
    meta = model.spec.build(device="meta")
    kinds = {name: x.dtype for name, x in model.named_parameters()}
    for name, x in meta.named_parameters():
        x.data = x.data.to(kinds.get(name, x.dtype))
    return {name: x.numel() * x.element_size() for name, x in assign.theirs(meta, family)}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{file.name} cannot say what was given ({error}): give numbers, texts, lists and tables.") from error
    file.write_text(text + "\n", encoding="utf-8")
