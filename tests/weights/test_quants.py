"""Blocks of quantised numbers: the same float32 numbers as the format's reference, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from glassformer.core import blocks
from glassformer.core.errors import WeightsError
from glassformer.weights.quants import FORMATS, WRITTEN, dequantise, quantise, row_bytes, row_numbers

# Where a block holds float16 scales: random bytes there would be infinite or no number at all in places.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2]}
SCALES |= {"Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "TQ1_0": [52], "TQ2_0": [64], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ3_XXS": [0]}
SCALES |= {"IQ1_S": [0], "IQ3_S": [0], "IQ2_S": [0], "NVFP4": [], "IQ1_M": []}


def random_blocks(type: str, rows: int, per_row: int, seed: int = 0) -> np.ndarray:
    form, rng = FORMATS[type], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * per_row, form.bytes), dtype=np.uint8)
    for at in SCALES.get(type, []):
        # all sizes of scales, below 0 and exactly 0 and too small to be normal among them
        d = (rng.normal(0, 1, len(raw)) * 10.0 ** rng.integers(-8, 3, len(raw))).astype(np.float16)
        d[rng.random(len(raw)) < 0.05] = 0
        raw[:, at : at + 2] = d[:, None].view(np.uint8)
    if type == "MXFP4":
        raw[:, 0] = rng.integers(0, 250, len(raw))  # above, the product overflows in the reference too
    if type == "IQ1_M":  # four bits of the scale in each of four places
        raw[:, 49:56:2] &= 0x3F
    return raw.reshape(rows, -1)


def reference(raw: np.ndarray, type: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type])))


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_the_table_of_formats_is_the_reference_s() -> None:
    for name, form in FORMATS.items():
        number = gguf.GGMLQuantizationType[name]
        assert (form.id, form.numbers, form.bytes) == (int(number), *gguf.GGML_QUANT_SIZES[number])


@pytest.mark.parametrize("type", blocks.UNPACK)
def test_every_type_is_the_reference_to_the_bit(type: str) -> None:
    raw = random_blocks(type, 7, 3)
    assert same_bits(dequantise(torch.from_numpy(raw), type), reference(raw, type))


@pytest.mark.parametrize("type", blocks.UNPACK)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), per_row=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_every_type_is_the_reference_whatever_the_bytes(type: str, seed: int, rows: int, per_row: int) -> None:
    raw = random_blocks(type, rows, per_row, seed)
    assert same_bits(dequantise(torch.from_numpy(raw), type), reference(raw, type))


@pytest.mark.parametrize("type", ["Q4_K", "Q5_0", "IQ4_XS", "Q8_0"])
def test_chunks_meet_without_a_seam(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_blocks(type, 5, 7))
    whole = dequantise(raw, type)
    monkeypatch.setattr(blocks, "CHUNK", 4 * FORMATS[type].numbers)  # 35 blocks in chunks of 4
    assert same_bits(dequantise(raw, type), whole)
    assert torch.equal(dequantise(raw, type, torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("type", ["TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "NVFP4"])
def test_rare_types_go_by_the_reference(type: str) -> None:
    raw = random_blocks(type, 3, 2)
    got, wanted = dequantise(torch.from_numpy(raw), type), reference(raw, type)
    assert got.shape == (3, 2 * FORMATS[type].numbers)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("type", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_numbers_are_read_as_they_are(type: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5).to(dtype)
    assert torch.equal(dequantise(x.view(torch.uint8), type), x.float())


def test_rows_may_lie_apart_and_axes_may_be_more() -> None:
    raw = torch.from_numpy(random_blocks("Q4_K", 8, 2))
    whole = dequantise(raw, "Q4_K")
    assert torch.equal(dequantise(raw[::3], "Q4_K"), whole[::3])
    assert torch.equal(dequantise(raw.view(2, 4, -1), "Q4_K"), whole.view(2, 4, -1))
    assert dequantise(raw[:0], "Q4_K").shape == (0, 512)
    assert dequantise(raw.to("meta"), "Q4_K").shape == (8, 512)


@pytest.mark.parametrize("type", WRITTEN)
def test_what_is_written_is_the_reference_s_and_comes_back(type: str) -> None:
    x = torch.randn(4, 96)
    raw = quantise(x, type)
    assert raw.dtype == torch.uint8
    assert raw.shape == (4, row_bytes(type, 96))
    wanted = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[type])
    assert np.array_equal(raw.numpy(), np.ascontiguousarray(wanted).view(np.uint8).reshape(4, -1))
    step = {"F32": 0.0, "F16": 2e-3, "BF16": 1.6e-2, "Q8_0": 2e-2, "Q4_0": 0.3}[type]
    assert (dequantise(raw, type) - x).abs().max() <= step


def test_sizes_of_rows() -> None:
    assert row_bytes("Q4_K", 512) == 288
    assert row_numbers("Q4_K", 288) == 512


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(WeightsError, match="No type of stored numbers is named 'Q4_k'. Did you mean 'Q4_K'"):
        row_bytes("Q4_k", 256)
    with pytest.raises(WeightsError, match="A row of 100 numbers is no whole number of Q8_0 blocks, which hold 32 each"):
        row_bytes("Q8_0", 100)
    with pytest.raises(WeightsError, match="A row of 35 bytes is no whole number of Q8_0 blocks of 34 bytes"):
        dequantise(torch.zeros(2, 35, dtype=torch.uint8), "Q8_0")
    with pytest.raises(WeightsError, match="Numbers are written as F32, F16, BF16, Q8_0, Q4_0, but 'Q4_K' was asked for"):
        quantise(torch.zeros(1, 256), "Q4_K")
