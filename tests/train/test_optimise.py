from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from glassformer.core.errors import CheckpointError, SpecError
from glassformer.core.spec import registered
from glassformer.parts.experts import Experts
from glassformer.train import AdamW, Muon, Optimizer
from train import small


def test_norms_biases_and_embeddings_do_not_decay():
    model = small.spec().at("blocks.*.feedforward").update(lambda f: f.replace(bias=True) if hasattr(f, "bias") else f).build(seed=0)
    (_, decays, with_decay), (_, stays, without) = AdamW(weight_decay=0.3).build(model).groups()
    assert with_decay["weight_decay"] == 0.3
    assert without["weight_decay"] == 0.0
    assert with_decay["fused"] is True
    by_name = dict(model.named_parameters())
    assert sorted(decays + stays) == sorted(by_name)
    assert all(by_name[n].ndim == 2 and ("blocks" in n or "readout" in n) for n in decays)
    assert all(by_name[n].ndim == 1 or "embed" in n for n in stays)
    assert "embed.weight" in stays
    assert "readout.matrix" in decays


def test_a_tied_read_out_is_an_embedding():
    (_, decays, _), (_, stays, _) = AdamW().build(small.spec().replace(tied=True).build(seed=0)).groups()
    assert "embed.weight" in stays
    assert not any("readout" in n for n in decays + stays)


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest():
    model = small.model()
    groups = list(Muon(lr=0.01, rest=AdamW(lr=0.002)).build(model).groups())
    assert groups[0][0] == "Muon"
    assert all(n.startswith("blocks.") and n.endswith("weight") for n in groups[0][1])
    assert {name for name, _, _ in groups[1:]} == {"AdamW"}
    assert groups[0][2]["lr"] == 0.01
    assert groups[1][2]["lr"] == 0.002
    assert "readout.matrix" in groups[1][1]
    assert "embed.weight" in groups[2][1]
    assert sorted(n for _, names, _ in groups for n in names) == sorted(n for n, _ in model.named_parameters())


def test_muon_takes_the_experts_matrices_and_adamw_their_router():
    spec = small.spec()
    model = spec.at("blocks.*.feedforward").update(lambda f: Experts(expert=f, n_experts=4, top_k=2)).build(seed=0)
    groups = list(Muon().build(model).groups())
    experts = [n for n, p in model.named_parameters() if ".experts." in n and "router" not in n and p.ndim == 2]
    assert len(experts) >= 16
    assert set(experts) <= set(groups[0][1])
    assert not any("router" in n for n in groups[0][1])
    assert sum("router" in n for n in groups[1][1]) == 2
    assert groups[1][2]["weight_decay"] == 0.1


def adamw_by_hand(w: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, betas: tuple[float, float], eps: float) -> np.ndarray:
    """AdamW from the paper (arXiv 1711.05101, algorithm 2), in float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * (m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * w)
    return w


def test_adamw_against_the_paper():
    model = nn.Linear(5, 3, bias=False)
    start = model.weight.detach().double().numpy().copy()
    draw = np.random.default_rng(0)
    gradients = [draw.normal(size=(3, 5)) for _ in range(7)]
    made = AdamW(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6).build(model)
    for g in gradients:
        model.weight.grad = torch.from_numpy(g).float()
        made.step()
    assert model.weight.detach().numpy() == pytest.approx(adamw_by_hand(start, gradients, 0.1, 0.2, (0.8, 0.9), 1e-6), rel=1e-4)


def test_muon_moves_along_an_orthogonal_matrix():
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    start = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    made = Muon(lr=0.1, weight_decay=0.0).build(model)
    made.step()
    update = (start - model[0].weight.detach()) / 0.1 / (0.2 * 24**0.5)
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() <= values.max() < 1.3  # Newton-Schulz stops near one


@pytest.mark.parametrize("spec", [AdamW(), Muon()], ids=repr)
def test_state_goes_away_and_comes_back_to_the_bit(spec):
    def steps(model, made, seeds):
        for seed in seeds:
            draw = torch.Generator().manual_seed(seed)
            for p in made.parameters:
                p.grad = torch.randn(p.shape, generator=draw)
            made.step()

    one = small.model()
    made = spec.build(one)
    assert made.state() == {}
    steps(one, made, range(3))
    state = {k: v.clone() for k, v in made.state().items()}
    assert all(name.rpartition("/")[0] in dict(one.named_parameters()) for name in state)
    two = small.model()
    two.load_state_dict(one.state_dict())
    again = spec.build(two)
    again.restore(state)
    steps(one, made, range(3, 6))
    steps(two, again, range(3, 6))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_factor_scales_every_rate_from_its_own_base():
    made = Muon(lr=0.01, rest=AdamW(lr=0.002)).build(small.model())
    made.set_factor(0.5)
    made.set_factor(0.5)
    assert [g["lr"] for _, _, g in made.groups()] == [0.005, 0.001, 0.001]
    assert made.lr == 0.005


def test_frozen_parameters_are_left_alone():
    model = small.model()
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in AdamW().build(model).names
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(SpecError, match="No parameter of this model is trainable"):
        AdamW().build(model)


def test_all_optimizers_are_specs():
    for name, made in registered(Optimizer).items():
        assert Optimizer.from_dict(made().to_dict()) == made(), name
    assert Optimizer.from_dict({"type": "Muon", "rest": {"type": "AdamW", "lr": 0.5}}).rest.lr == 0.5
    assert Optimizer.from_dict({"type": "AdamW", "betas": [0.5, 0.6]}).betas == (0.5, 0.6)


def test_what_makes_no_sense():
    with pytest.raises(SpecError, match="lr is above 0; -1.0 was given"):
        AdamW(lr=-1.0)
    with pytest.raises(SpecError, match=r"betas are two numbers in \[0, 1\); \(0.9, 1.0\) were given"):
        AdamW(betas=(0.9, 1.0))
    with pytest.raises(SpecError, match=r"betas are two numbers in \[0, 1\); \(0.9,\) were given"):
        AdamW(betas=(0.9,))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="eps is above 0; 0.0 was given"):
        AdamW(eps=0.0)
    with pytest.raises(SpecError, match=r"momentum lies in \[0, 1\); 1.0 was given"):
        Muon(momentum=1.0)
    with pytest.raises(SpecError, match="iterations of Newton-Schulz are 1 or more; 0 was given"):
        Muon(iterations=0)
    with pytest.raises(SpecError, match="weight_decay is 0 or more; -0.1 was given"):
        AdamW(weight_decay=-0.1)
    with pytest.raises(SpecError, match="lr is above 0; 0.0 was given"):
        Muon(lr=0.0)
    with pytest.raises(SpecError, match="Muon moves the matrices inside blocks, but this model has none"):
        Muon().build(nn.LayerNorm(3))
    made = AdamW().build(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="optimiser state for 'strange', which is no trainable parameter"):
        made.restore({"strange/step": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"exp_avg of 'weight' has shape \(3,\), but the parameter has \(2, 2\)"):
        made.restore({"weight/exp_avg": torch.zeros(3)})
