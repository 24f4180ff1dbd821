"""Blocks: numbers that share a scale, as GGUF files hold them, and the numbers that they stand for.

    32 numbers of Q4_0     | d: float16 | 16 bytes, two numbers of 4 bits in each |          y = d * (q - 8)

    256 numbers of Q4_K    | d | dmin | 8 scales and 8 minima of 6 bits | 128 bytes |        y = (d * s) * q - (dmin * m)

A row of a matrix is a run of blocks. :func:`dequantise` gives back exactly the float32 numbers that the format's reference
gives: the same products in the same order, none fused. It works through a row chunk by chunk, so that what lies between
bytes and numbers stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import WeightsError, did_you_mean


class Format(NamedTuple):
    """A type of number: its id in GGUF files, numbers per block, bytes per block."""

    id: int
    numbers: int
    bytes: int


FORMATS: dict[str, Format] = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "Q4_0": Format(2, 32, 18),
    "Q4_1": Format(3, 32, 20),
    "Q5_0": Format(6, 32, 22),
    "Q5_1": Format(7, 32, 24),
    "Q8_0": Format(8, 32, 34),
    "Q2_K": Format(10, 256, 84),
    "Q3_K": Format(11, 256, 110),
    "Q4_K": Format(12, 256, 144),
    "Q5_K": Format(13, 256, 176),
    "Q6_K": Format(14, 256, 210),
    "IQ2_XXS": Format(16, 256, 66),
    "IQ2_XS": Format(17, 256, 74),
    "IQ3_XXS": Format(18, 256, 98),
    "IQ1_S": Format(19, 256, 50),
    "IQ4_NL": Format(20, 32, 18),
    "IQ3_S": Format(21, 256, 110),
    "IQ2_S": Format(22, 256, 82),
    "IQ4_XS": Format(23, 256, 136),
    "I8": Format(24, 1, 1),
    "I16": Format(25, 1, 2),
    "I32": Format(26, 1, 4),
    "I64": Format(27, 1, 8),
    "F64": Format(28, 1, 8),
    "IQ1_M": Format(29, 256, 56),
    "BF16": Format(30, 1, 2),
    "TQ1_0": Format(34, 256, 54),
    "TQ2_0": Format(35, 256, 66),
    "MXFP4": Format(39, 32, 17),
    "NVFP4": Format(40, 64, 36),
}
"""Every type that a tensor may have; the grids and ternary ones are decoded by the ``gguf`` package."""

PLAIN: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
CHUNK = 1 << 18  # numbers made at a time: a megabyte, which a core's own cache holds; smaller ones cost more in calls than they save
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # 16 levels, finer about 0
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # the sixteen floats of 4 bits, doubled


def format_of(type: str) -> Format:
    """The format of that name; raises :class:`WeightsError` with the nearest ones."""
    if type not in FORMATS:
        raise WeightsError(f"No type of stored numbers is named {type!r}.{did_you_mean(type, FORMATS)} Known: {', '.join(FORMATS)}.")
    return FORMATS[type]


def row_bytes(type: str, n: int) -> int:
    """Bytes of a row of ``n`` numbers. Raises :class:`WeightsError` if blocks do not fill it."""
    form = format_of(type)
    if n % form.numbers:
        raise WeightsError(f"A row of {n} numbers is no whole number of {type} blocks, which hold {form.numbers} each: keep such a tensor in F16.")
    return n // form.numbers * form.bytes


def row_numbers(type: str, n: int) -> int:
    """Numbers of a row of ``n`` bytes. Raises :class:`WeightsError` if it ends within a block."""
    form = format_of(type)
    if n % form.bytes:
        raise WeightsError(f"A row of {n} bytes is no whole number of {type} blocks of {form.bytes} bytes: is it of another type?")
    return n // form.bytes * form.numbers


def dequantise(raw: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [.. n] that blocks [.. bytes] (uint8) stand for, made in float32 and given in ``dtype``.

    Equal to the bit to the reference of the format (``gguf.quants.dequantize``) in float32. Raises :class:`WeightsError`.
    """
    form = format_of(type)
    shape = (*raw.shape[:-1], row_numbers(type, raw.shape[-1]))
    if type in PLAIN:
        return raw.contiguous().clone().view(PLAIN[type]).to(dtype)
    if type not in UNPACK:
        return _by_reference(raw, type).view(shape).to(dtype)
    blocks = raw.reshape(-1, form.bytes)
    out = torch.empty(blocks.shape[0], form.numbers, dtype=dtype, device=raw.device)
    if raw.is_meta or not len(blocks):
        return out.view(shape)
    # A graph that is compiled, or a device with thousands of threads, takes all at once.
    step = CHUNK // form.numbers if raw.device.type == "cpu" and not torch.compiler.is_compiling() else len(blocks)
    unpack, wide = UNPACK[type], dtype != torch.float32
    room = torch.empty(min(step, len(blocks)), form.numbers, device=raw.device) if wide else out
    with torch.no_grad():
        for at in range(0, len(blocks), step):
            part = blocks[at : at + step]
            y = room[: len(part)] if wide else out[at : at + step]
            unpack(part, y)
            if wide:
                out[at : at + step] = y
    return out.view(shape)


def _by_reference(raw: Tensor, type: str) -> Tensor:
    """Types that are too rare to be worth a fast path."""
    try:
        import gguf

        number = gguf.GGMLQuantizationType[type]
        y = gguf.quants.dequantize(raw.cpu().contiguous().numpy(), number)
    except (ImportError, NotImplementedError) as error:
        raise WeightsError(f"Numbers of type {type} cannot be decoded here ({error}): install the gguf package, or quantise to a K type.") from error
    return torch.from_numpy(y).to(raw.device)


# The formats, each from blocks [n bytes] to numbers [n, block]


def _half(b: Tensor) -> Tensor:
    """Float16 numbers in float32: [n 2m] bytes -> [n m]."""
    return b.clone(memory_format=torch.contiguous_format).view(torch.float16).float()  # a copy: bytes of a block may lie at odd places


def _spread(b: Tensor, out: Tensor, bits: int) -> None:
    """All numbers of ``bits`` bits in bytes ``b`` [.. k] into ``out`` [.. 8 // bits, k], the lowest bits of all bytes first."""
    last, mask = 8 // bits - 1, (1 << bits) - 1
    for i in range(last + 1):
        shifted = b >> (bits * i) if i else b
        out[..., i, :] = shifted if i == last else shifted & mask


def _fours(qs: Tensor) -> Tensor:
    """Numbers of 4 bits, [n 16] -> [n 32] bytes: the low halves of all bytes, then the high."""
    return torch.cat((qs & 15, qs >> 4), -1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """``0, bits, 2 bits, …`` within a byte."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _ones(b: Tensor) -> Tensor:
    """Bits one by one, the lowest of each byte first: [n k] -> [n 8k] bytes of 0 or 1."""
    return (b[..., None] >> _shifts(1, b.device) & 1).flatten(-2)


def _layers(b: Tensor, bits: int) -> Tensor:
    """Numbers of ``bits`` bits, the lowest bits of all bytes first: [.. k] -> [.. 8 // bits, k] bytes."""
    return b[..., None, :] >> _shifts(bits, b.device)[:, None] & (1 << bits) - 1


def _q8_0(b: Tensor, y: Tensor) -> None:
    y.copy_(b[:, 2:].view(torch.int8)).mul_(_half(b[:, :2]))


def _q4_0(b: Tensor, y: Tensor) -> None:
    _spread(b[:, 2:], y.view(-1, 2, 16), 4)
    y.sub_(8).mul_(_half(b[:, :2]))


def _q4_1(b: Tensor, y: Tensor) -> None:
    _spread(b[:, 4:], y.view(-1, 2, 16), 4)
    y.mul_(_half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q5_0(b: Tensor, y: Tensor) -> None:
    y.copy_(_fours(b[:, 6:]) | _ones(b[:, 2:6]) << 4).sub_(16).mul_(_half(b[:, :2]))


def _q5_1(b: Tensor, y: Tensor) -> None:
    y.copy_(_fours(b[:, 8:]) | _ones(b[:, 4:8]) << 4).mul_(_half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q2_k(b: Tensor, y: Tensor) -> None:
    """16 groups of 16: scale and minimum of 4 bits each."""
    scales, d = b[:, :16], _half(b[:, 80:84])
    _spread(b[:, 16:80].view(-1, 2, 32), y.view(-1, 2, 4, 32), 2)
    y = y.view(-1, 16, 16)
    y.mul_((d[:, :1] * (scales & 15))[..., None]).sub_((d[:, 1:] * (scales >> 4))[..., None])


def _q3_k(b: Tensor, y: Tensor) -> None:
    """16 groups of 16: scale of 6 bits (low four, then high two), numbers of two bits and one more in a mask."""
    low, high = b[:, 96:104], b[:, 104:108]
    scales = _fours(low) | _layers(high, 2).flatten(1) << 4
    d = _half(b[:, 108:110]) * (scales.float() - 32)
    q = _layers(b[:, 32:96].view(-1, 2, 32), 2).flatten(1) | _layers(b[:, :32], 1).flatten(1) << 2  # a bit of the mask that is not set takes 4 away
    y.copy_(q).sub_(4).view(-1, 16, 16).mul_(d[..., None])


def _sixes(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of Q4_K and Q5_K: 8 and 8 numbers of 6 bits in 12 bytes, [n 12] -> [n 8], [n 8]."""
    d, m, rest = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = torch.cat((d & 63, rest & 15 | d >> 2 & 48), -1)
    return scales, torch.cat((m & 63, rest >> 4 | m >> 2 & 48), -1)


def _scaled(b: Tensor, y: Tensor) -> None:
    """``y = (d s) q - (dmin m)`` for 8 groups of 32."""
    (s, m), d = _sixes(b[:, 4:16]), _half(b[:, :4])
    y.view(-1, 8, 32).mul_((d[:, :1] * s)[..., None]).sub_((d[:, 1:] * m)[..., None])


def _q4_k(b: Tensor, y: Tensor) -> None:
    _spread(b[:, 16:].view(-1, 4, 32), y.view(-1, 4, 2, 32), 4)
    _scaled(b, y)


def _q5_k(b: Tensor, y: Tensor) -> None:
    y.copy_(_layers(b[:, 48:].view(-1, 4, 32), 4).flatten(1) | _layers(b[:, 16:48], 1).flatten(1) << 4)
    _scaled(b, y)


def _q6_k(b: Tensor, y: Tensor) -> None:
    """16 groups of 16 with a scale of 8 bits; four low bits, then two high ones."""
    y.copy_(_layers(b[:, :128].view(-1, 2, 64), 4).flatten(1) | _layers(b[:, 128:192].view(-1, 2, 32), 2).flatten(1) << 4)
    d = _half(b[:, 208:210]) * b[:, 192:208].view(torch.int8)
    y.sub_(32).view(-1, 16, 16).mul_(d[..., None])


def _looked_up(levels: tuple[int, ...], qs: Tensor, y: Tensor) -> None:
    """Pairs of levels by byte: ``qs`` [.. k] into ``y`` [.. 2, k]."""
    table = torch.tensor(levels, dtype=torch.float32, device=qs.device)
    index = qs.long()
    y[..., 0, :] = table[index & 15]
    y[..., 1, :] = table[index >> 4]


def _iq4_nl(b: Tensor, y: Tensor) -> None:
    _looked_up(IQ4, b[:, 2:], y.view(-1, 2, 16))
    y.mul_(_half(b[:, :2]))


def _iq4_xs(b: Tensor, y: Tensor) -> None:
    """8 groups of 32: scale of 6 bits (low four, then high two)."""
    low, high = b[:, 4:8], b[:, 2:4]
    fours = torch.stack((low & 15, low >> 4), -1).flatten(1)
    twos = (high[..., None] >> _shifts(2, b.device) & 3).flatten(1)
    d = _half(b[:, :2]) * ((fours | twos << 4).float() - 32)
    _looked_up(IQ4, b[:, 8:].view(-1, 8, 16), y.view(-1, 8, 2, 16))
    y.view(-1, 8, 32).mul_(d[..., None])


def _mxfp4(b: Tensor, y: Tensor) -> None:
    """The scale is a power of two, halved because the levels are doubled: ``2^(e - 128)``."""
    e = b[:, :1].int()
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    _looked_up(E2M1, b[:, 1:], y.view(-1, 2, 16))
    y.mul_(bits.view(torch.float32))


UNPACK: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
