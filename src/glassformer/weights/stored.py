"""A stored tensor: what a file says of it, read when it is asked for and not before.

    header ──► Stored(name, shape, type, file, offset, nbytes)     nothing is read, nothing is mapped
                 │
                 ├─► item(e)      slice e of the first axis, still unread
                 ├─► read()       a tensor of the file's own type (blocks of quantised numbers become float32)
                 └─► fill(out)    straight into memory that exists, chunk by chunk, in the type of ``out``

Reading goes through ``preadv`` into the parameter's own memory: a model that is loaded in the type of its file is never
held twice, and one that changes its type needs one small buffer beside it.
"""

from __future__ import annotations

import math
import os
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import WeightsError

TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types whose numbers stand by themselves; every other name is a type of quantised blocks (``quants``)."""

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 2, 100, 40, 60


def shown(value: Any) -> str:
    """What a file says, short enough for an error: a name may have ten megabytes, a list a thousand levels."""
    return _short.repr(value)


CHUNK = 4 << 20  # bytes read at a time where the type changes on the way: stays in the processor's cache


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``shape`` as torch counts it, ``type`` by the file's own word, ``nbytes`` from ``offset`` on."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def quantised(self) -> bool:
        """Whether it is made of blocks that share a scale."""
        return self.type not in TYPES

    @property
    def dtype(self) -> torch.dtype:
        """What :meth:`read` returns."""
        return TYPES.get(self.type, torch.float32)

    def item(self, e: int) -> Stored:
        """Slice ``e`` of the first axis."""
        n = self.nbytes // self.shape[0]
        return replace(self, name=f"{self.name}[{e}]", shape=self.shape[1:], offset=self.offset + e * n, nbytes=n)

    def raw(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The bytes ``start`` to ``stop`` as they lie in the file, [n] uint8."""
        out = torch.empty((self.nbytes if stop is None else stop) - start, dtype=torch.uint8)
        self._read_into(out, start)
        return out

    def read(self) -> Tensor:
        """The whole tensor in the file's own type; blocks of quantised numbers become float32."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.fill(out)
        return out

    def fill(self, out: Tensor) -> None:
        """Read into ``out`` (contiguous, as many numbers, any type that holds numbers, any device)."""
        if out.numel() != self.numel:
            raise WeightsError(f"{self.name} in {self.file} has shape {self.shape}, but memory for {tuple(out.shape)} was given.")
        if not out.numel():
            return
        if not self.quantised and out.dtype == self.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_into(out.reshape(-1).view(torch.uint8), 0)
            return
        flat = out.view(-1)
        if self.quantised:
            from . import quants

            row = self.shape[-1]
            size = quants.row_bytes(self.type, row)
            rows = max(1, CHUNK // (4 * row))
            for at in range(0, self.numel // row, rows):
                n = min(rows, self.numel // row - at)
                raw = self.raw(at * size, (at + n) * size).view(n, size)
                flat[at * row : (at + n) * row].copy_(quants.dequantise(raw, self.type).view(-1))
            return
        width, buffer = self.nbytes // self.numel, torch.empty(min(CHUNK, self.nbytes), dtype=torch.uint8)
        for start in range(0, self.nbytes, CHUNK):
            part = buffer[: self.nbytes - start]
            self._read_into(part, start)
            flat[start // width : (start + len(part)) // width].copy_(part.view(self.dtype))

    def _read_into(self, out: Tensor, start: int) -> None:
        """Fill the bytes ``out`` [n] from byte ``start`` of this tensor on."""
        numbers: Any = out.numpy()
        view = memoryview(numbers).cast("B")
        try:
            handle = os.open(self.file, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(f"{self.file} cannot be read any more ({error.strerror}): was it moved while it was open?") from error
        try:
            done = 0
            while done < len(view):
                got = os.preadv(handle, [view[done : done + (1 << 30)]], self.offset + start + done)
                if got == 0:
                    raise WeightsError(f"{self.file} ends within {self.name!r}: it was cut short while it was open. Copy it again.")
                done += got
        except OSError as error:
            raise WeightsError(f"{self.file} cannot be read at {self.name!r} ({error.strerror}): check the disk, or copy it again.") from error
        finally:
            os.close(handle)
