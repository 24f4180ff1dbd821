from __future__ import annotations

import pytest
import torch
from torch import nn

from glassformer.core.errors import NotFinite
from glassformer.core.tap import Edit
from glassformer.tasks import NextToken
from glassformer.train.checkpoint import list_steps
from glassformer.train.finite import explain_gradient
from train import small


class Poisoned(NextToken):
    """From the fourth step on the values at a site are divided by zero."""

    site = "blocks.1.ffn.out"

    def loss(self, model, batch, **kw):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        if self.calls >= 4:
            poison = Edit(self.site, lambda x: x / 0)
            kw["tap"] = poison | kw["tap"] if "tap" in kw else poison
        return super().loss(model, batch, **kw)


def test_the_step_and_the_first_site_are_named_and_the_last_good_checkpoint_is_kept(tmp_path):
    model = small.model()
    trainer = small.trainer(model, task=Poisoned(), folder=tmp_path / "run", save_every=1)
    with pytest.raises(NotFinite, match=r"Step 4: the loss is nan. The first value that is not finite is in the site blocks.1.ffn.out: \d+ NaN") as caught:
        trainer.run()
    assert "Try a lower learning rate" in str(caught.value)
    assert list_steps(tmp_path / "run") == [2, 3]
    assert trainer.number == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_damaged_parameter_is_named_first():
    model = small.model()
    with torch.no_grad():
        model.blocks[0].attn.out.weight[3, 3] = float("inf")
    with pytest.raises(NotFinite, match=r"the parameter blocks.0.attn.out.weight \(before the step\): 0 NaN and 1 infinite of 1024"):
        small.trainer(model).run()


class Steep(NextToken):
    def loss(self, model, batch, **kw):
        loss = super().loss(model, batch, **kw)
        zero = sum((p.sum() for p in model.final_norm.parameters()), torch.zeros(())).detach() * 0
        return loss._replace(total=loss.total + torch.sqrt(zero * next(model.final_norm.parameters()).sum()))  # d sqrt(0) is infinite


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(NotFinite, match="Step 1: the loss is finite, but the gradient's norm is nan. .* the gradient of final_norm.weight"):
        small.trainer(task=Steep()).run()


def test_gradients_too_large_to_add():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 1e30)
    assert "each gradient is finite, but their squares are too large" in str(explain_gradient([("p", p)], 3, float("inf")))


class Flaky(NextToken):
    def loss(self, model, batch, **kw):
        loss = super().loss(model, batch, **kw)
        return loss if "tap" in kw else loss._replace(total=loss.total * float("nan"))


def test_a_loss_that_is_finite_when_run_again():
    with pytest.raises(NotFinite, match="the same batch run again gives a finite one"):
        small.trainer(task=Flaky()).run()


class Last(NextToken):
    def loss(self, model, batch, **kw):
        loss = super().loss(model, batch, **kw)
        return loss._replace(total=loss.total * float("inf"))


def test_a_loss_that_breaks_after_the_model():
    with pytest.raises(NotFinite, match="the loss is inf. .* the loss itself"):
        small.trainer(task=Last()).run()


class NoTaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(small.VOCABULARY, small.VOCABULARY))

    def forward(self, tokens):
        return self.table[tokens] * float("inf")


def test_a_model_without_taps():
    with pytest.raises(NotFinite, match="in the loss itself"):
        small.trainer(NoTaps()).run()
