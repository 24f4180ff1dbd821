"""GGUF headers: read as they were written; damaged, hostile and cut-off files are errors that say where."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import WeightsError
from glassformer.weights import gguf_file
from glassformer.weights.gguf_file import Metadata, read


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def key(name: str, type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", type) + value


def tensor(name: str, dims: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", type, offset)


def header(keys: list[bytes], tensors: list[bytes], version: int = 3, data: int = 0, counts: tuple[int, int] | None = None) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    made = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return made + bytes(-len(made) % 32) + bytes(data)


def put(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "made.gguf"
    file.write_bytes(data)
    return file


def refused(tmp_path: Path, data: bytes, said: str) -> None:
    file = put(tmp_path, data)
    with pytest.raises(WeightsError, match=said) as caught:
        read(file)
    assert str(file) in str(caught.value)


def whole_file(file: Path) -> dict[str, Any]:
    """A file by the reference's writer, with a bit of everything; gives what was written."""
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {"u8": 200, "i8": -3, "u16": 60_000, "i16": -9, "u32": 4_000_000_000, "i32": -8, "u64": 2**63, "i64": -(2**40)}
    for name, type in zip(numbers, ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"), strict=True):
        getattr(writer, f"add_{type}")(name, numbers[name])
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_string("text", "héllo ▁")
    writer.add_token_list(["a", "", "▁b", "c" * 300])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 0.25])
    x, q = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(2 * 3 * 34, dtype=np.uint8).reshape(2, 3, 34)
    writer.add_tensor("x", x)
    writer.add_tensor("q", q, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("h", x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**numbers, "f32": 1.5, "f64": 1e-300, "yes": True, "text": "héllo ▁", "x": x, "q": q}


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    wrote = whole_file(file)
    found = read(file)
    for name in ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "yes", "text"):
        assert found.metadata[name] == wrote[name], name
    assert found.metadata["yes"] is True
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "", "▁b", "c" * 300]
    assert found.metadata["ints"].tolist() == [1, -2, 3]
    assert found.metadata["floats"].tolist() == [0.5, 0.25]
    assert torch.equal(found.tensors["x"].read(), torch.from_numpy(wrote["x"]))
    assert torch.equal(found.tensors["h"].read(), torch.from_numpy(wrote["x"]).half())
    assert found.tensors["q"].shape == (2, 3, 32)
    assert found.tensors["q"].type == "Q8_0"
    assert found.tensors["q"].raw().tolist() == wrote["q"].reshape(-1).tolist()
    wanted = torch.from_numpy(gguf.quants.dequantize(wrote["q"], gguf.GGMLQuantizationType.Q8_0))
    torch.testing.assert_close(found.tensors["q"].read(), wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.tensors["q"].item(1).read(), wanted[1], rtol=0, atol=0, equal_nan=True)


def test_the_reference_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    whole_file(file)
    found, theirs = read(file), gguf.GGUFReader(file)
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == set(found.metadata)
    for t in theirs.tensors:
        ours = found.tensors[t.name]
        assert (ours.offset, ours.nbytes, ours.shape) == (t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist())))


def test_version_2_is_read_too(tmp_path: Path) -> None:
    file = put(tmp_path, header([key("a", 4, struct.pack("<I", 7))], [tensor("x", (2,))], version=2, data=32))
    assert read(file).metadata["a"] == 7


def test_arrays_are_decoded_when_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "whole.gguf"
    whole_file(file)
    decoded: list[int] = []
    real = gguf_file._Array.decoded
    monkeypatch.setattr(gguf_file._Array, "decoded", lambda self: decoded.append(self.count) or real(self))
    found = read(file)
    assert decoded == []
    assert found.metadata.count("tokenizer.ggml.tokens") == 4
    assert found.metadata.count("nothing") == 0
    assert decoded == []
    first = found.metadata["tokenizer.ggml.tokens"]
    assert found.metadata["tokenizer.ggml.tokens"] is first
    assert decoded == [4]


def test_bytes_that_are_no_text_can_be_had_back(tmp_path: Path) -> None:
    array = struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2) + b"\xff\xfe"
    found = read(put(tmp_path, header([key("a", 9, array)], []) + bytes(32))).metadata["a"]
    assert found[0].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_a_missing_key_names_the_nearest(tmp_path: Path) -> None:
    meta = Metadata({"llama.block_count": 1}, tmp_path / "x.gguf")
    with pytest.raises(WeightsError, match="lacks 'llama.block_cout'.*Did you mean 'llama.block_count'"):
        meta.need("llama.block_cout")
    assert meta.need("llama.block_count") == 1


# Several files


def part(i: int, n: int, name: str, total: int = 2) -> bytes:
    keys = [key("split.no", 2, struct.pack("<H", i)), key("split.count", 2, struct.pack("<H", n)), key("split.tensors.count", 5, struct.pack("<i", total))]
    return header(keys, [tensor(name, (8,))], data=32)


def test_a_split_model_is_opened_together_by_any_of_its_files(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(part(i, 2, f"t{i}"))
    for i in range(2):
        found = read(tmp_path / f"m-0000{i + 1}-of-00002.gguf")
        assert set(found.tensors) == {"t0", "t1"}
        assert [f.name for f in found.files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
        assert found.metadata["split.no"] == 0


def test_numbers_of_parts_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "m-00001-of-00002.gguf"
    file.write_bytes(header([key("split.count", 9, struct.pack("<IQ", 0, 2) + bytes(2))], []))
    with pytest.raises(WeightsError, match="split.count is .*, but a whole number is needed"):
        read(file)


def test_a_split_model_that_is_not_whole(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(part(0, 2, "t0"))
    with pytest.raises(WeightsError, match="one of 2 files of a model, and m-00002-of-00002.gguf is not beside it"):
        read(first)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(part(0, 2, "t1"))
    with pytest.raises(WeightsError, match=r"calls itself part 0 of 2, counted from 0, but its name says 1 of 2"):
        read(first)
    second.write_bytes(part(1, 2, "t0"))
    with pytest.raises(WeightsError, match="'t0' is in m-00001-of-00002.gguf and in m-00002-of-00002.gguf"):
        read(first)
    first.write_bytes(part(0, 2, "t0", total=5))
    second.write_bytes(part(1, 2, "t1"))
    with pytest.raises(WeightsError, match="promises 5 tensors in 2 files, but they hold 2"):
        read(first)
    other = tmp_path / "renamed.gguf"
    other.write_bytes(part(0, 2, "t0"))
    with pytest.raises(WeightsError, match="its name must say which: name-00001-of-00002.gguf"):
        read(other)


# Damaged and hostile files

HUGE = 2**64 - 1


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    refused(tmp_path, b"GGML" + bytes(60), "is no GGUF file: it starts with b'GGML'")
    refused(tmp_path, b"GGUF", "has 4 bytes, and the header of a GGUF file alone has more")
    refused(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "written for big-endian machines")
    refused(tmp_path, header([], [], version=1), "GGUF version 1, but versions 2 and 3 are read")
    with pytest.raises(WeightsError, match="cannot be read"):
        read(tmp_path / "nothing.gguf")


def test_counts_that_the_file_cannot_hold(tmp_path: Path) -> None:
    refused(tmp_path, header([], [], counts=(0, HUGE)), f"promises {HUGE} keys, and more than 65536 are not believed")
    refused(tmp_path, header([], [], counts=(0, 50_000)), "promises 50000 keys, but only")
    refused(tmp_path, header([], [], counts=(HUGE, 0)), f"promises {HUGE} tensors, and more than 131072")
    refused(tmp_path, header([key("a", 9, struct.pack("<IQ", 8, HUGE))], []), f"promises {HUGE} texts in 'a'")
    refused(tmp_path, header([key("a", 9, struct.pack("<IQ", 10, 2**61))], []), f"promises {2**61} numbers in 'a'")


def test_lengths_that_lead_out_of_the_file(tmp_path: Path) -> None:
    refused(tmp_path, header([struct.pack("<Q", HUGE)], [], counts=(0, 1)), "key 0 is said to be|it promises 1 keys")
    refused(tmp_path, header([key("a", 8, struct.pack("<Q", 2**40))], []), f"the value of 'a' is said to be {2**40} bytes long")
    array = struct.pack("<IQ", 8, 2) + struct.pack("<Q", 2**50) + bytes(64)
    refused(tmp_path, header([key("a", 9, array)], []), "text 1 of 2 in 'a' begins beyond the end")
    array = struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**50)
    refused(tmp_path, header([key("a", 9, array)], []), "a text in 'a' ends beyond the end")


def test_values_of_unknown_types(tmp_path: Path) -> None:
    refused(tmp_path, header([key("a", 77, bytes(8))], []), "'a' has a value of type 77")
    refused(tmp_path, header([key("a", 9, struct.pack("<IQ", 9, 1) + bytes(40))], []), "'a' is an array of items of type 9")
    refused(tmp_path, header([key("a", 4, bytes(4)), key("a", 4, bytes(4))], []), "the key 'a' stands there twice")


@pytest.mark.parametrize("alignment", [0, 24, 3])
def test_an_alignment_is_a_power_of_two(tmp_path: Path, alignment: int) -> None:
    refused(tmp_path, header([key("general.alignment", 4, struct.pack("<I", alignment))], []), f"general.alignment is {alignment}, but a power of two")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([tensor("x", (2,)), tensor("x", (2,), offset=32)], "the tensor 'x' is described twice"),
        ([tensor("x", (2**33, 2**33))], "cannot hold that"),
        ([tensor("x", (0, 4))], r"has shape \(4, 0\)"),
        ([tensor("x", (2, 2, 2, 2, 2))], "has 5 axes, but there are at most 4"),
        ([tensor("x", (33,), type=8)], "rows of 33 numbers, but Q8_0 packs 32 together"),
        ([tensor("x", (), type=8)], "is one number, but Q8_0 packs 32 together"),
        ([tensor("x", (2,), type=4)], "the type number 4, which is not known here"),
        ([tensor("x", (2,), offset=8)], "starts at offset 8, which is no multiple of the alignment 32"),
        ([tensor("x", (64,))], r"needs the bytes \d+ to \d+, but the file has"),
        ([tensor("x", (2,), offset=2**63)], r"needs the bytes"),
        ([tensor("x", (10,)), tensor("y", (2,), offset=32)], "'x' and 'y' lie on the same bytes"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, tensors: list[bytes], said: str) -> None:
    refused(tmp_path, header([], tensors, data=96), said)


def test_every_cut_and_every_flipped_byte_is_an_error_or_a_file(tmp_path: Path) -> None:
    """No crash and no other exception, whatever stands in the header."""
    file = tmp_path / "whole.gguf"
    whole_file(file)
    data = file.read_bytes()
    tensors = read(file).tensors.values()
    end, last = min(t.offset for t in tensors), max(t.offset + t.nbytes for t in tensors)  # the file is padded beyond
    for cut in range(0, last, 7):
        with pytest.raises(WeightsError):
            read(put(tmp_path, data[:cut]))
    rng = np.random.default_rng(0)
    for at in range(4, end, 3):
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        try:
            found = read(put(tmp_path, bytes(damaged)))
            list(found.metadata.values())
        except WeightsError:
            pass


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_noise_is_an_error(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "noise.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<I", 3) + noise)
        try:
            found = read(file)
        except WeightsError:
            return
        assert all(t.offset + t.nbytes <= file.stat().st_size for t in found.tensors.values())
