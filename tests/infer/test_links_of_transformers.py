"""Links that transformers has too, against its own processors on the same logits."""

from __future__ import annotations

import math

import pytest
import torch

from glassformer.infer import Epsilon, Eta, MinP, Temperature, TopH, TopK, TopP, Typical


def warpers():
    process = pytest.importorskip("transformers.generation.logits_process")
    return [
        (Typical(0.2), process.TypicalLogitsWarper(0.2)),
        (Typical(0.95), process.TypicalLogitsWarper(0.95)),
        (Typical(0.3, min_keep=7), process.TypicalLogitsWarper(0.3, min_tokens_to_keep=7)),
        (Epsilon(9e-4), process.EpsilonLogitsWarper(9e-4)),
        (Epsilon(0.5, min_keep=3), process.EpsilonLogitsWarper(0.5, min_tokens_to_keep=3)),
        (Eta(3e-4), process.EtaLogitsWarper(3e-4)),
        (Eta(0.1), process.EtaLogitsWarper(0.1)),
        (Eta(0.5, min_keep=3), process.EtaLogitsWarper(0.5, min_tokens_to_keep=3)),
        (TopH(0.1), process.TopHLogitsWarper(0.1)),
        (TopH(0.4), process.TopHLogitsWarper(0.4)),
        (TopH(0.9), process.TopHLogitsWarper(0.9)),
    ]


@pytest.mark.parametrize("case", range(11))
@pytest.mark.parametrize("shape", [(8, 40), (8, 1000), (3, 20_000)])
def test_a_link_keeps_what_transformers_keeps(case, shape):
    link, warper = warpers()[case]
    for seed in range(4):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        x[0, : shape[1] // 2] = -math.inf
        assert torch.equal(link.apply(x), warper(None, x.clone())), seed


def test_chains_in_the_order_of_transformers_keep_what_its_processors_keep():
    process = pytest.importorskip("transformers.generation.logits_process")
    theirs = [
        process.TemperatureLogitsWarper(0.8),
        process.TopHLogitsWarper(0.9),
        process.TopKLogitsWarper(60),
        process.TopPLogitsWarper(0.97),
        process.MinPLogitsWarper(0.001),
        process.TypicalLogitsWarper(0.9),
        process.EpsilonLogitsWarper(1e-3),
        process.EtaLogitsWarper(2e-3),
    ]
    chain = Temperature(0.8) | TopH(0.9) | TopK(60) | TopP(0.97) | MinP(0.001) | Typical(0.9) | Epsilon(1e-3) | Eta(2e-3)
    for seed in range(5):
        x = torch.randn(4, 500, generator=torch.Generator().manual_seed(seed)) * 2
        want = x.clone()
        for warper, step in zip(theirs, chain.steps(x), strict=True):
            want = warper(None, want)
            assert torch.equal(step.logits > -math.inf, want > -math.inf), step.name
            assert torch.allclose(step.logits, want, rtol=1e-6)
