"""Muon over stacks is torch's Muon: the same settings, the same state, the same matrices."""

import pytest
import torch

from glassformer.train import stacked

SHAPES = [(7, 5), (5, 7), (6, 6), (16, 8), (7, 5), (8, 16), (3, 3)]
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 5}


def matrices() -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=made)) for shape in SHAPES]


@pytest.mark.parametrize("together", [2**24, 80, 1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_moves_matrices_as_torch_s_muon_does(monkeypatch, nesterov, together):
    monkeypatch.setattr(stacked, "TOGETHER", together)
    ours, theirs = matrices(), matrices()
    mine = stacked.Muon(ours, nesterov=nesterov, **SETTINGS)
    reference = torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    random = torch.Generator().manual_seed(1)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        if step == 2:
            ours[3].grad = theirs[3].grad = None  # not reached by this step's loss
        before = [b.detach().clone() for b in theirs]
        mine.step()
        reference.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            # the products are bfloat16 (relative 2^-8); another order of a sum may round the last bit the other way
            assert (a - b).norm() <= 0.01 * (b - old).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a].keys() == reference.state[b].keys() == {"momentum_buffer"}
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])


def test_newton_schulz_brings_singular_values_near_one_and_keeps_their_vectors():
    x = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    made = stacked.orthogonal(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    inside = u.mT @ made @ v.mT
    values = torch.diagonal(inside, dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9


def test_stacks_hold_one_shape_lying_or_standing_and_so_many_numbers(monkeypatch):
    assert stacked._stacks(matrices()) == [[0, 1, 4], [2], [3, 5], [6]]
    monkeypatch.setattr(stacked, "TOGETHER", 80)
    assert stacked._stacks(matrices()) == [[0, 1], [4], [2], [3], [5], [6]]
    apart = [torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(0, 3)]
    assert stacked._stacks(apart) == [[0], [1], [2]]
