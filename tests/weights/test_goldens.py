"""Goldens: what the reference library computed with tiny checkpoints, kept as files, so that this needs no reference library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glassformer import weights
from glassformer.weights.family import families

GOLDENS = Path(__file__).parent / "goldens"
ALL = sorted(p.name for p in GOLDENS.iterdir() if p.is_dir())


def test_every_family_has_a_golden():
    named = {f.name for f in families().values()}
    assert {families()[kind].name for kind in ALL} == named


@pytest.mark.parametrize("kind", ALL)
def test_a_golden_is_met(kind):
    expected = load_file(GOLDENS / kind / "expected.golden")
    model, report = weights.open(GOLDENS / kind).load()
    assert report.dtype == "float32"
    with torch.no_grad():
        inputs = (expected["ids"], expected["target"]) if hasattr(model, "encoder") else (expected["ids"],)
        torch.testing.assert_close(model(*inputs), expected["output"], atol=1e-5, rtol=1e-5)
