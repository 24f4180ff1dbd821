"""The temperature that follows the entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glassformer.core.errors import SamplerError
from glassformer.infer import Chain, Draw, DynamicTemperature, Temperature, TopK
from infer import links_in_numpy as rules


def logits(b=6, v=150, seed=0):
    x = torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * 3
    x[1, 4:90] = -math.inf
    x[2] *= 0.05
    x[3, 7] += 20
    return x


@pytest.mark.parametrize("settings", [(1.0, 0.5), (0.8, 0.3, 2.0), (0.8, 0.3, 0.5), (0.5, 1.5), (2.0, 1.0, 0.0), (0.7, 0.0), (0.0, 1.0)])
def test_it_is_its_rule(settings):
    x = logits()
    want = np.stack([rules.dynamic_temperature(row, *settings) for row in x.double().numpy()])
    np.testing.assert_allclose(DynamicTemperature(*settings).apply(x).numpy(), want, rtol=2e-4)  # float32: H of a row that is nearly certain


def test_the_flattest_distribution_gets_the_highest_temperature_and_a_certain_one_the_lowest():
    x = torch.zeros(3, 50)
    x[1, 4] = 300.0
    x[2, 10:] = -math.inf  # flat over what is left
    t = DynamicTemperature(1.0, 0.75).temperature(x)[:, 0]
    assert t.tolist() == pytest.approx([1.75, 0.25, 1.75])
    between = DynamicTemperature(1.0, 0.75).temperature(logits())[:, 0]
    assert ((between > 0.25) & (between < 1.75)).all()
    assert between.argsort().tolist()[0] == 3 and between.argsort().tolist()[-1] == 2


def test_a_temperature_of_zero_keeps_the_strongest_only():
    x = torch.tensor([[0.0, 400.0, 1.0], [3.0, 3.0, 3.0]])
    left = DynamicTemperature(0.5, 0.5).apply(x)
    assert left.tolist() == [[-math.inf, 400.0, -math.inf], [3.0, 3.0, 3.0]]
    assert DynamicTemperature(0.0, 0.0).apply(x)[0].tolist() == [-math.inf, 400.0, -math.inf]


def test_one_token_left_stays_as_it_is():
    x = torch.tensor([[-math.inf, 2.5, -math.inf]])
    assert torch.equal(DynamicTemperature(0.5, 0.25).apply(x), x)


def test_a_range_of_zero_is_a_plain_temperature_and_one_besides_is_off():
    x = logits()
    assert torch.equal(DynamicTemperature(0.6).apply(x), Temperature(0.6).apply(x))
    assert DynamicTemperature(1.0).off and not DynamicTemperature(1.0, 0.1).off and not DynamicTemperature(0.6).off
    assert torch.equal(DynamicTemperature(1.0).apply(x), x)
    assert torch.equal((DynamicTemperature(1.0) | Draw(3))(x), Chain((Draw(3),))(x))


def test_it_looks_at_the_tokens_that_are_left():
    x = logits()
    few = TopK(5).narrow(x)[0]
    (_, step) = (TopK(5) | DynamicTemperature(0.9, 0.4)).steps(x)
    assert torch.allclose(step.logits[step.logits > -math.inf].reshape(6, 5), DynamicTemperature(0.9, 0.4).apply(few), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((-1.0,), "The t of a dynamic temperature is 0 or more, but -1.0 was given. Use t=1, range=0"),
        ((1.0, -0.5), "The range of a dynamic temperature is 0 or more, but -0.5"),
        ((1.0, math.inf), "The range of a dynamic temperature is 0 or more, but inf"),
        ((1.0, 0.5, math.nan), "The exponent of a dynamic temperature is 0 or more, but nan"),
        ((1.0, 0.5, -2.0), "The exponent of a dynamic temperature is 0 or more, but -2.0"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(settings, words):
    with pytest.raises(SamplerError, match=words):
        DynamicTemperature(*settings)
