"""safetensors headers: what is right is read, and everything else says what is wrong; tensors come out to the bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glassformer.core.errors import WeightsError
from glassformer.weights import safetensors_file, stored
from weights.made import entry, raw

A = {"a": entry([2, 3])}


def test_every_type_is_read_to_the_bit(tmp_path):
    torch.manual_seed(0)
    values = {t: (10 * torch.randn(5, 3)).to(t) for t in (*stored.TYPES.values(),) if t != torch.bool} | {torch.bool: torch.randn(4) > 0}
    given = {str(t): x for t, x in values.items()} | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(given, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = safetensors_file.header(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    for name, x in given.items():
        got = found[name].read()
        assert got.dtype == x.dtype and got.shape == x.shape and found[name].dtype == x.dtype
        assert torch.equal(got.reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("chunk", [8, 24, 4 << 20])
def test_filling_changes_the_type_on_the_way(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(stored, "CHUNK", chunk)
    x = torch.randn(7, 5)
    save_file({"x": x, "y": x.bfloat16()}, tmp_path / "x.safetensors")
    found = safetensors_file.header(tmp_path / "x.safetensors")
    for name, given in (("x", x), ("y", x.bfloat16())):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            out = torch.full((7, 5), 9.0, dtype=dtype)
            found[name].fill(out)
            assert torch.equal(out, given.to(dtype))
            found[name].item(3).fill(out[0])
            assert torch.equal(out[0], given[3].to(dtype)) and torch.equal(out[1:], given[1:].to(dtype))


def test_memory_of_another_size_is_refused_with_both_shapes(tmp_path):
    save_file({"x": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x in .*x\.safetensors has shape \(2, 3\), but memory for \(3, 3\) was given"):
        safetensors_file.header(tmp_path / "x.safetensors")["x"].fill(torch.empty(3, 3))


def test_a_file_that_changes_while_it_is_open_says_so(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(200, 3)}, file)
    x = safetensors_file.header(file)["x"]
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(WeightsError, match=r"x\.safetensors ends within 'x': it was cut short while it was open\. Copy it again"):
        x.read()
    file.unlink()
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read any more \(No such file or directory\): was it moved"):
        x.read()


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    x = safetensors_file.header(tmp_path / "x.safetensors")["x"]

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(WeightsError, match=r"cannot be read at 'x' \(Input/output error\): check the disk"):
        x.read()


DAMAGE = {
    "empty": (b"", b"", 0, "header is no JSON"),
    "no-json": (b"{'a': 1}", b"", None, "its header is no JSON"),
    "no-utf8": (b"\xff\xfe\xff\xff", b"", None, "its header is no JSON"),
    "a-list": ([1], b"", None, "its header is no table of tensors"),
    "longer-than-the-file": (b"{}", b"", 10**6, r"promises a header of 1000000 bytes and has 10 in all"),
    "beyond-all-numbers": (b"{}", b"", 2**64 - 1, r"promises a header of 18446744073709551615 bytes and has 10"),
    "deep": (b"[" * 100_000, b"", None, "its header is no JSON"),
    "deep-entry": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b"", None, "damaged"),
    "twice": (b'{"a":' + json.dumps(A["a"]).encode() + b',"a":' + json.dumps(A["a"]).encode() + b"}", bytes(24), None, "'a' stands there twice"),
    "digits": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b'], "data_offsets": [0, 4]}}', b"", None, "header is no JSON"),
    "huge": ({"a": entry([10**4_000], 0) | {"data_offsets": [0, 4]}}, bytes(4), None, "whole numbers below"),
    "huge-product": ({"a": {"dtype": "F32", "shape": [2**47] * 8, "data_offsets": [0, 4]}}, bytes(4), None, "needs .* bytes, but 0 to 4 of 4 are its own"),
    "a-number": ({"a": 3}, b"", None, "'a' is described by 3, which lacks dtype, shape or data_offsets"),
    "no-shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), None, "lacks dtype, shape or data_offsets"),
    "one-offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), None, "lacks dtype, shape or data_offsets"),
    "type-unknown": ({"a": entry([1], dtype="F99")}, bytes(4), None, "'a' has type 'F99', which is not supported. Known: F64, F32"),
    "type-a-list": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4), None, r"has type \['F32'\], which is not supported"),
    "shape-a-text": ({"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}, bytes(4), None, "'a' has shape '' and data_offsets"),
    "shape-a-table": ({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, bytes(4), None, r"'a' has shape {} and data_offsets"),
    "shape-below-0": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4), None, r"'a' has shape \[-1\]"),
    "shape-true": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), None, r"'a' has shape \[True\]"),
    "shape-a-float": ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4), None, r"'a' has shape \[1\.0\]"),
    "many-axes": ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, bytes(4), None, "at most 8 whole numbers"),
    "offsets-turned": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4), None, r"needs 4 bytes, but 4 to 0"),
    "beyond-the-end": ({"a": entry([2, 3])}, bytes(20), None, r"'a' of shape \(2, 3\) and type F32 needs 24 bytes, but 0 to 24 of 20 are its own"),
    "shape-and-bytes": ({"a": entry([2]) | {"data_offsets": [0, 12]}}, bytes(12), None, r"needs 8 bytes, but 0 to 12 of 12"),
    "a-hole": ({"a": entry([1]), "b": entry([1], 8)}, bytes(12), None, r"'b' starts at byte \d+, but what stands before it ends at \d+"),
    "on-one-another": ({"a": entry([2]), "b": entry([2], 4)}, bytes(12), None, r"'b' starts at byte \d+, but what stands before it ends at \d+"),
    "bytes-left": (A, bytes(28), None, r"its tensors end at byte \d+, but it has \d+"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case, tmp_path):
    header, data, promised, words = DAMAGE[case]
    file = raw(tmp_path / "x.safetensors", header, data, promised)
    with pytest.raises(WeightsError, match=words) as caught:
        safetensors_file.header(file)
    said = str(caught.value)
    assert str(file) in said and len(said) < 1_000
    if "type" not in case:
        assert said.endswith("Copy it again from where it came.") and "is damaged or no safetensors file" in said


def test_short_files_and_absent_ones(tmp_path):
    file = tmp_path / "x.safetensors"
    for n in range(8):
        file.write_bytes(bytes(n))
        with pytest.raises(WeightsError, match="promises a header of 0 bytes and has"):
            safetensors_file.header(file)
    file.unlink()
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read \(No such file or directory\): check that it is there and yours to read"):
        safetensors_file.header(file)
    with pytest.raises(WeightsError, match="cannot be read"):
        safetensors_file.header(tmp_path)


def test_a_header_above_what_is_believed_is_not_read(tmp_path):
    file = raw(tmp_path / "x.safetensors", b"{}", b"", safetensors_file.MOST + 1)
    os.truncate(file, 1 << 40)
    with pytest.raises(WeightsError, match=r"promises a header of 16777217 bytes, and more than 16777216 are not believed"):
        safetensors_file.header(file)


def test_a_long_name_makes_no_long_error(tmp_path):
    with pytest.raises(WeightsError, match="lacks dtype") as caught:
        safetensors_file.header(raw(tmp_path / "x.safetensors", {"n" * 1_000_000: []}))
    assert len(str(caught.value)) < 1_000


def test_many_names_and_one_twice_are_settled_in_one_pass(tmp_path):
    names = [f'"{i}":0' for i in range(200_000)]  # comparing all with all would take hours
    with pytest.raises(WeightsError, match="'199999' stands there twice"):
        safetensors_file.header(raw(tmp_path / "x.safetensors", ("{" + ",".join([*names, names[-1]]) + "}").encode()))


def test_metadata_is_no_tensor_whatever_it_holds(tmp_path):
    assert list(safetensors_file.header(raw(tmp_path / "x.safetensors", {"__metadata__": [1, {"a": None}], **A}, bytes(24)))) == ["a"]


def test_the_header_is_all_that_is_read(tmp_path, monkeypatch):
    save_file({"x": torch.ones(200, 3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("data was read"))
    x = safetensors_file.header(Path(tmp_path / "x.safetensors"))["x"]
    assert (x.shape, x.type, x.nbytes, x.numel, x.quantised, x.item(7).shape) == ((200, 3), "F32", 2_400, 600, False, (3,))
