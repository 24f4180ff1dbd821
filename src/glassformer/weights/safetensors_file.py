"""safetensors files: a header that says where every tensor lies, checked before anything is believed.

    8 bytes n ──► n bytes of JSON {name: {dtype, shape, data_offsets}} ──► data, without holes

Only the header is read here. Whatever it promises is compared with the size of the file first, so that a damaged or
hostile file is an error and never a large allocation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from glassformer.core.errors import WeightsError

from .stored import TYPES, Stored, shown

MOST_NUMBER = 1 << 48  # a side or a place in the file: 280 TB
MOST = 16 << 20  # bytes of a header: that of a 14 GB model has 50 thousand
AGAIN = "copy it again from where it came"


def header(file: Path) -> dict[str, Stored]:
    """Every tensor of a file by its name. Raises :class:`WeightsError` saying what is wrong with the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            n = int.from_bytes(start, "little")
            if len(start) < 8 or n > size - 8:
                raise _damaged(file, f"it promises a header of {n} bytes and has {size} in all")
            if n > MOST:
                raise _damaged(file, f"it promises a header of {n} bytes, and more than {MOST} are not believed")
            text = f.read(n)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror}): check that it is there and yours to read.") from error
    try:
        entries = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is no table of tensors")
    entries.pop("__metadata__", None)
    found = {name: _entry(file, name, about, 8 + n, size) for name, about in entries.items()}
    at = 8 + n
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            raise _damaged(file, f"{shown(tensor.name)} starts at byte {tensor.offset}, but what stands before it ends at {at}")
        at += tensor.nbytes
    if at != size:
        raise _damaged(file, f"its tensors end at byte {at}, but it has {size}")
    return found


def _entry(file: Path, name: str, about: Any, data: int, size: int) -> Stored:
    try:
        kind, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
        whole = isinstance(shape, list) and all(type(x) is int and 0 <= x < MOST_NUMBER for x in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, f"{shown(name)} is described by {shown(about)}, which lacks dtype, shape or data_offsets") from error
    if not isinstance(kind, str) or kind not in TYPES:
        raise WeightsError(f"{file}: {shown(name)} has type {shown(kind)}, which is not supported. Known: {', '.join(TYPES)}.")
    if not whole or len(shape) > 8:
        raise _damaged(file, f"{shown(name)} has shape {shown(shape)} and data_offsets {shown([start, stop])}: at most 8 whole numbers below 2^48, and 2")
    nbytes = math.prod(shape) * TYPES[kind].itemsize
    if stop - start != nbytes or data + stop > size:
        raise _damaged(file, f"{shown(name)} of shape {tuple(shape)} and type {kind} needs {nbytes} bytes, but {start} to {stop} of {size - data} are its own")
    return Stored(name, tuple(shape), kind, file, data + start, nbytes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, about in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} stands there twice")
        found[name] = about
    return found


def _damaged(file: Path, what: str) -> WeightsError:
    return WeightsError(f"{file} is damaged or no safetensors file: {what}. {AGAIN.capitalize()}.")
