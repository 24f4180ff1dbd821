"""Quantised numbers of a file: read as float32, and written for a file.

bytes [rows, bytes] ── dequantise ──► numbers [rows, n]       the formats are core/blocks.py's
numbers [rows, n] ──── quantise ────► bytes [rows, bytes]     by the format's reference (the gguf package)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.blocks import FORMATS, Format, dequantise, format_of, row_bytes, row_numbers
from glassformer.core.errors import WeightsError

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""The types that a model can be exported in."""


def reference() -> Any:
    """The gguf package. Raises :class:`WeightsError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise WeightsError("Writing GGUF files needs the gguf package: pip install gguf.") from error
    return gguf


def quantise(x: Tensor, type: str) -> Tensor:
    """The bytes [.. bytes] (uint8) of the numbers [.. n], the nearest that ``type`` can say. Raises :class:`WeightsError`."""
    if type not in WRITTEN:
        raise WeightsError(f"Numbers are written as {', '.join(WRITTEN)}, but {type!r} was asked for: let llama.cpp's own quantiser make it from an F16 file.")
    n = row_bytes(type, x.shape[-1])
    gguf = reference()
    flat = x.detach().to("cpu", torch.float32).contiguous()
    made = gguf.quants.quantize(flat.numpy(), gguf.GGMLQuantizationType[type])
    return torch.from_numpy(made).contiguous().view(torch.uint8).view(*x.shape[:-1], n)


__all__ = ["FORMATS", "WRITTEN", "Format", "dequantise", "format_of", "quantise", "reference", "row_bytes", "row_numbers"]
