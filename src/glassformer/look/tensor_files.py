"""Tensors and the text that says what they are, in one safetensors file that is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from glassformer.core import files
from glassformer.weights.safetensors_file import header
from glassformer.weights.stored import Stored


def write(target: Path, tensors: Mapping[str, Tensor], key: str, plain: Mapping[str, Any]) -> None:
    """Write ``tensors`` and, under ``key`` of the file's own text, ``plain`` as JSON. Raises :class:`OSError`; what was there before is then untouched."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata={key: json.dumps(plain, ensure_ascii=False)})
    draft = target.with_name(f".{target.name}.draft")
    try:
        draft.write_bytes(data)
        files.flush(draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read(file: Path, key: str) -> tuple[dict[str, Stored], Any]:
    """The tensors of a file, and what is written under ``key`` (None: nothing that can be read). Raises :class:`WeightsError` for a damaged file."""
    tensors = header(file)  # checked against the file's size before anything is believed
    with file.open("rb") as f:
        about = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    try:
        return tensors, json.loads(about.get("__metadata__", {})[key])
    except (KeyError, TypeError, ValueError, AttributeError):
        return tensors, None


__all__ = ["read", "write"]
