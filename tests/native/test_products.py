"""Products with few rows by compiled code: right for every shape and type, and a row's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import native
from glassformer.core.blocks import dequantise
from glassformer.parts import linear
from glassformer.parts.linear import Linear, packed_product, product
from glassformer.parts.packed import PackedLinear, Piece
from glassformer.weights.quants import quantise

DENSE = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 4e-3)}


@pytest.fixture(autouse=True, scope="module")
def ready() -> None:
    if not native.wait():
        pytest.skip("no compiled code here")


def far(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> float:
    """The largest error, as a share of what a sum of these sizes may reach."""
    x, w = x.double(), w.double()
    want = x @ w.T + (0 if b is None else b.double())
    scale = x.abs() @ w.abs().T + (0 if b is None else b.double().abs())
    return float(((y.double() - want).abs() / scale.clamp(min=1e-30)).max())


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 7), (3, 16), (4, 31), (5, 33), (9, 100), (64, 768), (2, 3072), (1031, 48)])
def test_dense_against_float64(name: str, n: int, k: int) -> None:
    dtype, most = DENSE[name]
    draw = torch.Generator().manual_seed(n * 31 + k)
    w, b = torch.randn(n, k, generator=draw).to(dtype), torch.randn(n, generator=draw).to(dtype)
    with torch.no_grad():
        for m in (1, 2, 3, 4, 5, 8, 33):
            x = torch.randn(m, k, generator=draw).to(dtype)
            for bias in (None, b):
                assert far(product(x, w, bias), x, w, bias) < most


@pytest.mark.parametrize("kind", linear.BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 64), (4, 480), (5, 544), (6, 1056), (257, 96)])
def test_blocks_against_float64(kind: str, dtype: torch.dtype, n: int, k: int) -> None:
    draw = torch.Generator().manual_seed(n * 31 + k)
    raw, b = quantise(torch.randn(n, k, generator=draw), kind), torch.randn(n, generator=draw).to(dtype)
    with torch.no_grad():
        for m in (1, 3, 4, 7, 32):
            x = torch.randn(m, k, generator=draw).to(dtype)
            y = packed_product(x, [raw], [kind], b)
            assert y is not None
            assert y.dtype == dtype
            assert far(y, x, dequantise(raw, kind), b) < (4e-3 if dtype == torch.bfloat16 else 3e-5)


def every(kind: str, k: int) -> tuple[Any, int]:
    """A product of rows [m k] with one matrix in ``kind``, and the most rows that it takes."""
    draw = torch.Generator().manual_seed(k)
    w, b = torch.randn(1030, k, generator=draw), torch.randn(1030, generator=draw)
    if kind in DENSE:
        dtype = DENSE[kind][0]
        w, b = w.to(dtype), b.to(dtype)
        return (lambda x: product(x.to(dtype), w, b)), linear.ROWS[dtype]
    raw = quantise(w, kind)
    return (lambda x: packed_product(x, [raw], [kind], b)), linear.PACKED_ROWS


@pytest.mark.parametrize("kind", [*DENSE, *linear.BLOCKS])
def test_bits_of_a_row_are_its_own(kind: str) -> None:
    """Not those of its batch, its place in it, or the number of threads."""
    run, most = every(kind, 160)
    x, threads = torch.randn(most, 160, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    with torch.no_grad():
        alone = torch.cat([run(row[None]) for row in x])
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for m in range(1, most + 1):
                    assert torch.equal(run(x[:m]), alone[:m])
                    assert torch.equal(run(x[most - m :].view(1, m, 160))[0], alone[most - m :])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [*DENSE, *linear.BLOCKS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out(kind: str, value: float) -> None:
    run, _ = every(kind, 64)
    x = torch.ones(3, 64)
    x[1, 40] = value
    with torch.no_grad():
        y = run(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", linear.BLOCKS)
@settings(max_examples=40, deadline=None)
@given(power=st.integers(-45, 35), lone=st.integers(0, 63))
def test_numbers_of_any_size_meet_blocks(kind: str, power: int, lone: int) -> None:
    raw = quantise(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), kind)
    x = torch.linspace(-1, 1, 64)[None].clone()
    x[0, :32] = 0.0
    x[0, lone] = 10.0**power
    with torch.no_grad():
        y = packed_product(x, [raw], [kind])
    assert y is not None
    x, w = x.double(), dequantise(raw, kind).double()
    most = x.view(2, 32).abs().amax(-1).repeat_interleave(32)  # the step of a number is that of the largest of its block
    assert ((y.double() - x @ w.T).abs() <= 3e-5 * (most @ w.abs().T) + 1e-37).all()


def test_odd_layouts() -> None:
    w, b = torch.randn(40, 48), torch.randn(40)
    x = torch.randn(48, 3).T
    with torch.no_grad():
        assert torch.allclose(product(x, w, b), F.linear(x, w, b), atol=1e-5)
        assert torch.allclose(product(x, w.T.contiguous().T, b), F.linear(x, w, b), atol=1e-5)
        assert product(torch.randn(48), w, b).shape == (40,)
        assert product(torch.randn(0, 48), w, b).shape == (0, 40)
        assert product(torch.randn(2, 1, 3, 48), w).shape == (2, 1, 3, 40)
        with pytest.raises(RuntimeError):
            product(torch.randn(2, 47), w, b)


def test_who_asks_for_gradients_gets_torch_itself() -> None:
    layer, x = Linear(96, 32), torch.randn(2, 96)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_transforms_autocast_and_compilers_get_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, x = Linear(64, 32), torch.randn(3, 64)

    def never() -> None:
        raise AssertionError("the compiled code was asked for")

    monkeypatch.setattr(native, "library", never)
    with torch.no_grad():
        assert torch.vmap(layer)(x).shape == (3, 32)
        assert torch.func.jvp(layer, (x,), (x,))[1].shape == (3, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FakeTensorMode():
            assert Linear(64, 32)(torch.empty(2, 64)).shape == (2, 32)
        with pytest.raises(AssertionError, match="was asked for"):
            Linear(64, 32)(x)


def test_a_parameter_may_be_replaced() -> None:
    layer, x = Linear(64, 32), torch.randn(1, 64)
    with torch.no_grad():
        layer(x)
        layer.weight = nn.Parameter(torch.zeros(32, 64))
        assert torch.equal(layer(x)[0], layer.bias)
        layer.weight.data = torch.ones(32, 64)
        assert torch.allclose(layer(x)[0], x.sum() + layer.bias, atol=1e-5)


def test_a_packed_layer_of_several_pieces() -> None:
    w, b = torch.randn(50, 64), nn.Parameter(torch.randn(50))
    parts = [Piece(quantise(w[:20], "Q8_0"), "Q8_0"), Piece(quantise(w[20:], "Q4_0"), "Q4_0")]
    layer, x = PackedLinear(parts, b), torch.randn(2, 64)
    with torch.no_grad():
        slow = F.linear(x, layer.weight, b)
        assert torch.allclose(layer(x), slow, atol=2e-3)
        assert torch.allclose(layer(torch.cat([x] * 40))[:2], slow, atol=1e-4)  # many rows: unpacked
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


# Tiles


def has_tiles() -> bool:
    return native.wait() and bool(native.library().glassformer_has_tiles())


needs_tiles = pytest.mark.skipif(not has_tiles(), reason="no matrix unit for bfloat16 here")


@needs_tiles
@pytest.mark.parametrize(("n", "k"), [(1, 32), (15, 64), (16, 96), (33, 768), (1031, 160)])
def test_tiles_against_float64(n: int, k: int) -> None:
    draw = torch.Generator().manual_seed(n * 31 + k)
    w, b = torch.randn(n, k, generator=draw).bfloat16(), torch.randn(n, generator=draw).bfloat16()
    with torch.no_grad():
        for m in (9, 15, 16, 17, 32):
            assert linear.kernel(native.library(), torch.bfloat16, m, k) == "tiles"
            x = torch.randn(m, k, generator=draw).bfloat16()
            for bias in (None, b):
                assert far(product(x, w, bias), x, w, bias) < DENSE["bfloat16"][1]


@needs_tiles
def test_a_row_has_the_same_bits_in_every_batch_of_tiles() -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(1030, 160, generator=draw).bfloat16(), torch.randn(32, 160, generator=draw).bfloat16()
    threads = torch.get_num_threads()
    with torch.no_grad():
        whole = product(x, w)
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                for m in range(9, 33):
                    assert torch.equal(product(x[:m], w), whole[:m])
                    assert torch.equal(product(x[32 - m :], w), whole[32 - m :])
        finally:
            torch.set_num_threads(threads)


@needs_tiles
def test_rows_that_are_not_finite_stay_alone_in_tiles() -> None:
    x, w = torch.ones(12, 64).bfloat16(), torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 40], x[5, 2] = float("nan"), float("inf")
    with torch.no_grad():
        y = product(x, w)
    assert not y[[3, 5]].isfinite().any()
    assert y[[0, 1, 2, 4, 6, 11]].isfinite().all()


def test_where_tiles_do_not_serve() -> None:
    code = native.library()
    assert linear.kernel(code, torch.bfloat16, 16, 48) is None  # a row is not a whole number of tiles
    assert linear.kernel(code, torch.bfloat16, 33, 64) is None
    assert linear.kernel(code, torch.float32, 17, 64) is None
    assert linear.kernel(code, torch.bfloat16, 8, 64) == "linear"
