from __future__ import annotations

import math

import pytest

from glassformer.core.errors import SpecError
from glassformer.core.spec import registered
from glassformer.train import WSD, Constant, Cosine, InverseSqrt, Schedule

ALL = [Constant(warmup=10), Cosine(warmup=10), WSD(warmup=10), WSD(warmup=10, curve="linear"), InverseSqrt(warmup=10)]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_the_warm_up_rises_in_a_line_to_the_full_rate(schedule):
    rise = [schedule.factor(s, 100) for s in range(11)]
    assert rise == pytest.approx([(s + 1) / 11 for s in range(10)] + [1.0], abs=0.06)
    assert all(0 < schedule.factor(s, 100) <= 1 for s in range(100))


def test_cosine_against_the_formula():
    for step in range(20, 120):
        p = (step - 20) / 100
        assert Cosine(warmup=20, final=0.1).factor(step, 120) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2)
    assert Cosine(warmup=0, final=0.1).factor(120, 120) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls():
    line, root = WSD(warmup=10, decay=0.2, curve="linear"), WSD(warmup=10, decay=0.2)
    assert all(line.factor(s, 100) == 1.0 for s in range(10, 81))
    assert [line.factor(s, 100) for s in (85, 90, 95, 100)] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert [root.factor(s, 100) for s in (85, 90, 95, 100)] == pytest.approx([1 - math.sqrt(p) for p in (0.25, 0.5, 0.75, 1.0)])
    assert WSD(warmup=0, decay=1.0, final=0.5, curve="linear").factor(50, 100) == pytest.approx(0.75)


def test_inverse_sqrt_against_the_formula():
    assert [InverseSqrt(warmup=100).factor(s, 10_000) for s in (99, 399, 9_999)] == pytest.approx([100 / 101, 0.5, 0.1], abs=1e-2)


def test_a_share_of_the_run_as_warm_up():
    assert Cosine(warmup=0.1).factor(9, 100) == Cosine(warmup=10).factor(9, 100)
    assert Constant(warmup=0).factor(0, 100) == 1.0


def test_all_schedules_are_specs():
    for name, made in registered(Schedule).items():
        assert Schedule.from_dict(made().to_dict()) == made(), name
    assert {"Constant", "Cosine", "WSD", "InverseSqrt"} <= set(registered(Schedule))
    assert Schedule.from_dict({"type": "Cosine", "warmup": 200}).warmup == 200
    assert Schedule.from_dict({"type": "Cosine", "warmup": 0.25}).warmup == 0.25


def test_what_makes_no_sense():
    with pytest.raises(SpecError, match=r"warmup is a number of steps \(an int\) or a share of the run \(a float below 1\); 1.5 was given"):
        Cosine(warmup=1.5)
    with pytest.raises(SpecError, match="-3 was given"):
        Constant(warmup=-3)
    with pytest.raises(SpecError, match="decay is the share of the run that decays, above 0 and at most 1; 0.0 was given"):
        WSD(decay=0.0)
    with pytest.raises(SpecError, match="curve is 'linear' or 'sqrt'; 'round' was given"):
        WSD(curve="round")
    with pytest.raises(SpecError, match="A warm-up of 200 steps takes more than half of a run of 50"):
        Cosine(warmup=200).check(50)
