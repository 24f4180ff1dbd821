"""Figures that the origin of a sampler publishes with it: distributions before and after, as llama.cpp's tests/test-sampling.cpp lists them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glassformer.infer import DRY, XTC, DynamicTemperature, Greedy, Link, MinP, Penalties, Temperature, TopK, TopNSigma, TopP, Typical, build_chain

RISING, FALLING, FLAT = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2] * 5


def dry(multiplier: float, allowed: int, window: int, breakers: Any = ()) -> Link:
    return DRY(multiplier, 1.1, allowed, window, breakers)


PUBLISHED: list[tuple[Link, list[float], list[int], list[float]]] = [
    (Temperature(1.0), RISING, [], RISING),
    (DynamicTemperature(1.0, 0.0, 1.0), RISING, [], RISING),
    (TopK(1), RISING, [], [0, 0, 0, 1.0]),
    (TopK(3), RISING, [], [0, 0.22222, 0.33333, 0.44444]),
    (TopK(4), RISING, [], RISING),
    (TopK(0), RISING, [], RISING),
    (TopP(0.7), RISING, [], [0, 0, 0.428571, 0.571429]),
    (TopP(0.8), RISING, [], [0, 0.22222, 0.33333, 0.44444]),
    (TopP(1.0), RISING, [], RISING),
    (MinP(0.0), RISING, [], RISING),
    (MinP(0.24), RISING, [], RISING),
    (MinP(0.26), RISING, [], [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
    (MinP(0.49), RISING, [], [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
    (MinP(0.51), RISING, [], [0, 0, 0.3 / 0.7, 0.4 / 0.7]),
    (MinP(0.74), RISING, [], [0, 0, 0.3 / 0.7, 0.4 / 0.7]),
    (MinP(0.76), RISING, [], [0, 0, 0, 1.0]),
    (MinP(1.0), RISING, [], [0, 0, 0, 1.0]),
    (XTC(1.0, 0.09), FALLING, [], [0, 0, 0, 1.0]),  # there with a probability of 0.99, and before the rest is made to sum to 1
    (XTC(1.0, 0.19), FALLING, [], [0, 0, 0.2 / 0.3, 0.1 / 0.3]),
    (XTC(1.0, 0.29), FALLING, [], [0, 0.3 / 0.6, 0.2 / 0.6, 0.1 / 0.6]),
    (XTC(1.0, 0.39), FALLING, [], FALLING),
    (Typical(0.5), [0.97, 0.01, 0.01, 0.01], [], [1.0, 0, 0, 0]),
    (Typical(0.5), [0.4, 0.2, 0.2, 0.2], [], [0, 1 / 3, 1 / 3, 1 / 3]),
    (Penalties(50.0), FLAT, [0], [0, 0.25, 0.25, 0.25, 0.25]),
    (Penalties(50.0), FLAT, [0, 1, 2], [0, 0, 0, 0.5, 0.5]),
    (Penalties(50.0), FLAT, [0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5]),
    (Penalties(1.0, 5.0, 5.0), FLAT, [0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
    (Penalties(1.0, 5.0, 5.0), FLAT, [0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
    (Penalties(1.0, 5.0, 5.0), FLAT, [0, 1, 2, 0, 0], [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    (dry(1.0, 2, 4), [0.25] * 4, [0, 1], [0.25] * 4),
    (dry(1.0, 2, 5), [0.25] * 4, [0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923]),
    (dry(1.0, 2, 6, [[3]]), FLAT, [0, 1, 3, 4, 0, 1], FLAT),
    (dry(2.0, 2, 5), FLAT, [0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
    (dry(1.0, 4, 7), FLAT, [0, 1, 2, 3, 4, 0, 1], FLAT),
    (TopNSigma(1.0), RISING, [], [0, 0, 0.428571, 0.571429]),
    (TopNSigma(0.0), RISING, [], RISING),
    (TopNSigma(3.0), RISING, [], RISING),
]


@pytest.mark.parametrize("case", range(len(PUBLISHED)), ids=lambda i: f"{i}-{type(PUBLISHED[i][0]).__name__}")
def test_the_figures_published_with_llama_cpp(case: int) -> None:
    link, before, history, after = PUBLISHED[case]
    logits = torch.tensor([before]).log()
    step = next(iter((link | Greedy()).steps(logits, [history] if history else None)))
    torch.testing.assert_close(step.logits.softmax(-1), torch.tensor([after]), atol=1e-5, rtol=0)


def test_a_temperature_of_0_takes_the_most_probable() -> None:
    """Published as the distribution 0, 0, 0, 1."""
    for settings in ({"temperature": 0.0}, {"temperature": 0.0, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0}):
        assert build_chain(**settings)(torch.tensor([RISING]).log()).tolist() == [3]  # type: ignore[arg-type]
