from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glassformer.core.errors import SpecError, TrainingError
from glassformer.models.presets import preset
from glassformer.parts.readout import States
from glassformer.tasks import Batch, Loss, NextToken, Task
from train import small

TOKENS = torch.from_numpy(small.ids(60)).view(3, 20)


def by_hand(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """Sum over positions, in float64, from the definition."""
    logits = logits.double()
    log_z = torch.log(torch.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    right = log_p.gather(-1, targets[..., None])[..., 0]
    return (-(1 - smoothing) * right - smoothing * log_p.mean(-1) + z * log_z**2).sum()


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.3)])
def test_the_loss_against_its_definition(smoothing, z):
    model = small.model()
    loss = NextToken(label_smoothing=smoothing, z_loss=z).loss(model, Batch(TOKENS))
    expected = by_hand(model(TOKENS[:, :-1]), TOKENS[:, 1:], smoothing, z)
    assert loss.count == 57
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.mean.item() == pytest.approx(expected.item() / 57, rel=1e-5)
    assert sum(v.item() for v in loss.parts.values()) == pytest.approx(expected.item(), rel=1e-5)


def test_packed_documents_cost_what_they_cost_alone():
    model = small.model()
    row = TOKENS[:1]
    ids = torch.tensor([[1] * 7 + [2] * 9 + [3] * 4])
    packed = NextToken(z_loss=0.1).loss(model, Batch(row, ids))
    alone = [NextToken(z_loss=0.1).loss(model, Batch(row[:, a:b])) for a, b in ((0, 7), (7, 16), (16, 20))]
    assert int(packed.count) == sum(one.count for one in alone) == 17
    assert packed.total.item() == pytest.approx(sum(one.total.item() for one in alone), rel=1e-4)
    parallel = NextToken().rows(model, Batch(row, ids))
    assert parallel[1].tolist() == [17]


def test_rows_add_up_to_the_plain_loss():
    model = small.model()
    sums, counts = NextToken(label_smoothing=0.3, z_loss=0.1).rows(model, Batch(TOKENS))
    assert counts.tolist() == [19, 19, 19]
    assert sums.sum().item() == pytest.approx(NextToken().loss(model, Batch(TOKENS)).total.item(), rel=1e-5)


class Charging(nn.Module):
    """A model whose experts charge 0.5 to the ledger."""

    has_experts = True

    def forward(self, tokens, *, aux=None):
        aux.charge("balance", torch.tensor(0.5))
        return F.one_hot(tokens, small.VOCABULARY).float()


def test_experts_are_charged_for_in_proportion():
    loss = NextToken().loss(Charging(), Batch(TOKENS))
    assert loss.parts["balance"].item() == pytest.approx(0.5 * 57)
    assert (loss.total / loss.count).item() == pytest.approx(loss.parts["cross_entropy"].item() / 57 + 0.5)


def test_a_custom_task_needs_only_a_loss():
    class Zero(Task):
        def loss(self, model, batch, **kw):
            return Loss(torch.zeros(()), 1, {})

    assert Zero().rows(nn.Identity(), None) is None


def test_specs_and_errors():
    assert Task.from_dict({"type": "NextToken", "z_loss": 1e-4}) == NextToken(z_loss=1e-4)
    with pytest.raises(SpecError, match="label_smoothing is a share of the target, from 0 up to but not including 1; 1.0 was given"):
        NextToken(label_smoothing=1.0)
    with pytest.raises(SpecError, match="z_loss is a weight, 0 or more; -1.0 was given"):
        NextToken(z_loss=-1.0)


def test_models_that_cannot_predict_the_next_token_are_refused_before_the_first_step():
    NextToken().check(small.model())
    NextToken().check(nn.Linear(2, 2))  # no spec: anything may be in it
    with pytest.raises(TrainingError, match=r"NextToken trains a Decoder .* but this Encoder has the mask Everything\(\) and sees the tokens"):
        NextToken().check(preset("bert-base").build(device="meta"))
    with pytest.raises(TrainingError, match=r"but this model is an EncoderDecoder, which reads a second text"):
        NextToken().check(preset("t5-small").build(device="meta"))
    with pytest.raises(TrainingError, match=r"but this Decoder has the read-out States: build it with readout=LanguageModel"):
        small.trainer(small.spec().replace(readout=States()).build(seed=0))
