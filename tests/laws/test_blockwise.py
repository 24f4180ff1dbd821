"""Attention in blocks, for compiled bfloat16 steps on a CPU: the same gradients as the formula's."""

from __future__ import annotations

import pytest
import torch

from glassformer.core.mask import Causal, Everything, resolve
from glassformer.parts import blockwise, kernels
from glassformer.parts.blockwise import BLOCK, BlockwiseAttention
from glassformer.parts.kernels import Rule, Softmax
from tools import draw, same

H, K, SCALE = 2, 8, 0.4


@pytest.fixture(autouse=True)
def matrix_unit(monkeypatch):
    """The numbers do not depend on the machine; whether this way is taken does."""
    monkeypatch.setattr(blockwise, "_MATRIX_UNIT", True)


LENGTHS = [(2, 2), (BLOCK - 1, BLOCK - 1), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 1), (2 * BLOCK + 40, 2 * BLOCK + 40)]


def drawn(t: int, s: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [draw((1, H, n, K), i, torch.float64).to(dtype).requires_grad_() for i, n in enumerate((t, s, s))]


def rule(causal: bool, t: int) -> Rule:
    index = torch.arange(t)
    return Rule(SCALE, None, None, resolve(Causal() if causal else Everything(), index, index, rows=1), Softmax().build(H))


def oracle(q, k, v, dz, causal):
    """The formula in float64, differentiated by torch."""
    scores = SCALE * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    z = torch.softmax(scores, -1) @ v
    return z, torch.logsumexp(scores, -1, keepdim=True), torch.autograd.grad((z * dz).sum(), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s"), [*LENGTHS, (BLOCK + 3, 2 * BLOCK + 1), (300, 5)])
def test_the_gradients_are_those_of_the_formula(t, s, causal) -> None:
    if causal and t != s:
        pytest.skip("causal attention is of one row with itself")
    q, k, v = drawn(t, s, torch.float64)
    dz = draw((1, H, t, K), 9, torch.float64)
    z, log_sum, expected = oracle(q, k, v, dz, causal)
    with torch.no_grad():
        found = blockwise._gradients(q, k, v, z, log_sum, dz, causal, SCALE)
    for a, b, name in zip(found, expected, "qkv", strict=True):
        same(a, b, what=f"d{name}")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s"), LENGTHS)
def test_in_bfloat16_it_is_as_near_to_the_formula_as_the_open_way_is(t, s, causal) -> None:
    q, k, v = drawn(t, s, torch.bfloat16)
    dz = draw((1, H, t, K), 9, torch.float64).bfloat16()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    z, _, expected = oracle(*exact, dz.double(), causal)

    def errors(out):
        found = torch.autograd.grad(out, (q, k, v), dz)
        assert {x.dtype for x in (out, *found)} == {torch.bfloat16}
        return [(a.double() - b).norm().item() for a, b in zip((out, *found), (z, *expected), strict=True)]

    here, in_the_open = errors(BlockwiseAttention.apply(q, k, v, causal, SCALE)), errors(kernels.explicit(q, k, v, rule(causal, t)))
    # D = sum(dz * z) is taken from the rounded z, so each query's dS is off by up to 2^-9 |dz| |z| scale, shared out over its keys.
    longest = max(x.detach().double().norm(dim=-1).max() for x in (q, k))
    rounding = float(SCALE * 2**-9 * (dz.double().norm(dim=-1) * z.detach().norm(dim=-1)).norm() * longest)
    assert all(a <= 1.5 * b + rounding for a, b in zip(here, in_the_open, strict=True)), (here, in_the_open, rounding)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [H, 1])
def test_a_compiled_step_takes_this_way_and_an_eager_one_does_not(causal, groups) -> None:
    t = BLOCK + 9
    q, k, v = drawn(t, t, torch.bfloat16)
    k, v = (x[:, :groups].detach().requires_grad_() for x in (k, v))
    r = rule(causal, t)

    def step(way):
        out = way(q, k, v, r)
        return out, torch.autograd.grad(out.float().square().sum(), (q, k, v))

    repeated = [x.repeat_interleave(H // groups, 1) for x in (k, v)]
    direct = BlockwiseAttention.apply(q, *repeated, causal, SCALE)
    direct = direct, torch.autograd.grad(direct.float().square().sum(), (q, k, v))
    torch._dynamo.reset()
    compiled = step(torch.compile(kernels.fused, backend="aot_eager", dynamic=False))
    eager = step(kernels.fused)
    assert torch.equal(compiled[0], direct[0])
    for a, b, c in zip(compiled[1], direct[1], eager[1], strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert (a - c).norm() < 0.02 * c.norm()


def test_what_it_does_not_know_goes_the_other_way() -> None:
    q, _, v = drawn(4, 4, torch.bfloat16)
    assert not blockwise.pays(q, q, v)  # not compiling

    def asked(q, v):
        return torch.zeros(int(blockwise.pays(q, q, v)))

    torch._dynamo.reset()
    ask = torch.compile(asked, backend="eager", dynamic=False)
    assert len(ask(q, v)) == 1
    assert len(ask(q.detach(), v)) == 0
    assert len(ask(q, v[..., :3])) == 0
    assert len(ask(q[:, :, :1], v)) == 0
    assert len(ask(q.repeat(1, 1, 300, 1).detach().requires_grad_(), v)) == 0  # too long


def test_without_a_matrix_unit_the_fused_kernel_stays(monkeypatch) -> None:
    q, _, v = drawn(4, 4, torch.bfloat16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert blockwise.pays(q, q, v)
    monkeypatch.setattr(blockwise, "_MATRIX_UNIT", False)
    assert not blockwise.pays(q, q, v)


def test_columns_instead_of_rows_are_read_right() -> None:
    q, k, v = drawn(9, 9, torch.bfloat16)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    a, b = (BlockwiseAttention.apply(*x, True, SCALE) for x in ((q, k, v), turned))
    assert torch.equal(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), (q, k, v)), torch.autograd.grad(b.sum(), turned), strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)  # sums in another order, rounded to bfloat16


def test_a_second_derivative_is_refused() -> None:
    q, k, v = drawn(9, 9, torch.bfloat16)
    (dq,) = torch.autograd.grad(BlockwiseAttention.apply(q, k, v, True, SCALE).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
