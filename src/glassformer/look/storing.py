"""A safetensors file that is written piece by piece: its header is known before the first value, so that none has to wait in memory.

with Draft(file, {"embed": (torch.float32, (2, 9, 16))}) as draft:
    draft.put("embed", x, 0)                     bytes of x to the beginning of embed
                                                 at the end the draft is renamed to its place, or removed if anything went wrong
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core.files import flush
from glassformer.weights.stored import TYPES

NAMES = {dtype: name for name, dtype in TYPES.items()}


class Draft:
    """A file in the making (see the head of this module); ``layout``: type and shape by name. Raises :class:`OSError`."""

    def __init__(self, file: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.file, self._draft, self._handle = file, file.with_name(f".{file.name}.draft"), -1
        entries: dict[str, Any] = {}
        at = 0
        for name, (dtype, shape) in layout.items():
            end = at + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        head = json.dumps(entries).encode()
        head += b" " * (-len(head) % 8)
        self._head, self._size = len(head).to_bytes(8, "little") + head, at
        self._begins = {name: len(self._head) + e["data_offsets"][0] for name, e in entries.items()}

    def __enter__(self) -> Draft:
        self._handle = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.pwrite(self._handle, self._head, 0)
            os.ftruncate(self._handle, len(self._head) + self._size)
        except BaseException:
            self._give_up()
            raise
        return self

    def put(self, name: str, x: Tensor, at: int) -> None:
        """The numbers of ``x``, from byte ``at`` of the tensor ``name`` on."""
        numbers: Any = x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        view, at = memoryview(numbers), at + self._begins[name]
        while len(view):
            n = os.pwrite(self._handle, view, at)
            view, at = view[n:], at + n

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1
            self._draft.replace(self.file)
        except BaseException:
            self._give_up()
            raise
        flush(self.file.parent)

    def _give_up(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._draft.unlink(missing_ok=True)


__all__ = ["NAMES", "Draft"]
