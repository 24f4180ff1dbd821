"""Data types by name, seeds, the ledger, and the tree of errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from glassformer.core import errors
from glassformer.core.errors import GlassformerError, SpecError
from glassformer.core.flow import Ledger, Pass
from glassformer.core.numerics import dtype_named, seed_everything, wide
from glassformer.core.sites import LOGITS


def test_types_by_name():
    assert dtype_named("bf16") is torch.bfloat16 is dtype_named("bfloat16") is dtype_named(torch.bfloat16)
    assert (dtype_named("fp32"), dtype_named("fp16"), dtype_named("fp64")) == (torch.float32, torch.float16, torch.float64)
    with pytest.raises(SpecError, match=r"No data type is named 'float23'\. Did you mean 'float32', .* Known: fp32, float32, bf16"):
        dtype_named("float23")


def test_wide_never_narrows():
    assert [wide(torch.zeros(1, dtype=t)).dtype for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)] == [torch.float32] * 3 + [torch.float64]


def test_one_seed_sets_every_generator():
    def draws() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002 (the global generator is what is tested)

    seed_everything(5)
    a = draws()
    seed_everything(5)
    assert draws() == a
    seed_everything(6)
    assert all(x != y for x, y in zip(draws(), a, strict=True))
    seed_everything(2**40)


def test_every_error_is_of_the_tree():
    kinds = [c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__ and not issubclass(c, Warning)]
    assert len(kinds) == 17 and all(issubclass(c, GlassformerError) for c in kinds)
    assert all(c.__name__ in (errors.__doc__ or "") for c in kinds)
    assert issubclass(errors.NotFinite, errors.TrainingError) and issubclass(SpecError, ValueError) and issubclass(errors.SiteError, LookupError)


def test_a_ledger_adds_up():
    ledger = Ledger()
    for x in (1.0, 2.0):
        ledger.charge("balance", torch.tensor(x))
    ledger.charge("other", torch.tensor(4.0))
    total = ledger.total()
    assert total is not None and total.item() == 7.0 and len(ledger.entries["balance"]) == 2


def test_an_unobserved_pass_is_handed_on_unchanged():
    index = torch.arange(3)
    p = Pass(positions=index, index=index)
    assert p.at("attn") is p and p.layer(3) is p
    x = torch.zeros(1)
    assert p.see(LOGITS, x) is x and not p.edits(LOGITS) and p.name(LOGITS) == "logits"
