"""What makes no sense to patching, paths, ablation, steering and tracing is answered in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from glassformer.core.errors import InputError, SiteError
from glassformer.look.ablation import ablate, ablate_heads
from glassformer.look.patching import activation_patch, attribution_patch
from glassformer.look.paths import edge_attribution, path_patch
from glassformer.look.steering import AddVector, SteeringVector, steer, steering_vector
from glassformer.look.tracing import causal_trace
from look import zoo

A, B = "the old man", "the old dog"
NAN, INF = float("nan"), float("inf")
CASES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (activation_patch, {"site": 5}, "A site is named by a text, such as 'resid_pre' or 'z', but a whole number was given"),
    (activation_patch, {"site": None}, "A site is named by a text"),
    (activation_patch, {"site": ""}, "empty segment"),
    (activation_patch, {"site": "Ä.😀"}, "meets no site of this model"),
    (activation_patch, {"by": 5}, "5 is no axis of a sweep"),
    (activation_patch, {"layers": []}, "No layer was given: name at least one of 0 to 2"),
    (activation_patch, {"layers": 7}, "Layer 7 was asked for"),
    (activation_patch, {"memory": "x"}, "memory='x': it is the number of bytes"),
    (activation_patch, {"memory": NAN}, "memory=nan"),
    (activation_patch, {"memory": 0}, "memory=0"),
    (activation_patch, {"foo": 1}, "There is no option 'foo' here"),
    (activation_patch, {"metrc": "kl"}, "Did you mean 'metric'"),
    (attribution_patch, {"metric": lambda x: x.detach()[:, 0]}, "gives no gradient, but an estimate is made of it"),
    (attribution_patch, {"site": 5}, "A site is named by a text"),
    (path_patch, {"senders": 5}, "5 names no end of a path"),
    (path_patch, {"receivers": None}, "None names no end of a path"),
    (path_patch, {"senders": []}, "A path has two ends"),
    (path_patch, {"foo": 1}, "There is no option 'foo' here"),
    (edge_attribution, {"exact": -1}, "exact=-1: a whole number of at least 0"),
    (edge_attribution, {"exact": 2, "seed": "x"}, "seed='x': a whole number"),
]


@pytest.mark.parametrize(("function", "options", "says"), CASES)
def test_of_two_texts(function: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, SiteError)) as error:
        function(zoo.model("llama"), A, B, tokenizer=zoo.words(), **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"what": None}, "None names no part"),
        ({"what": ()}, "() names no part"),
        ({"what": "9" * 5000 + ".1"}, "names no part"),
        ({"what": "block -1"}, "Layer -1 was asked for"),
        ({"what": "position 1.2"}, "'position 1.2': a position has no parts by number"),
        ({"what": "0.1", "how": 5}, "5 is no way to ablate"),
        ({"what": "0.1", "how": "resample", "draws": 1.5}, "draws=1.5: a whole number of at least 1"),
        ({"what": "0.1", "how": "resample", "seed": "x"}, "seed='x'"),
        ({"what": "0.1", "how": "mean", "reference": 5}, "reference is a list of texts, but a whole number was given"),
        ({"what": "0.1", "how": "mean", "reference": [""]}, "has 0 tokens"),
    ],
)
def test_of_ablation(options: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, SiteError)) as error:
        ablate(zoo.model("llama"), A, tokenizer=zoo.words(), **options)
    assert says in str(error.value)


@pytest.mark.parametrize("head", ["9.9", "0.9", "ffn 1", "attn 1"])
def test_of_heads_that_are_none(head: str) -> None:
    found = ablate_heads(zoo.model("llama"), A, tokenizer=zoo.words())
    assert found["1.2"] == float(found.change[1, 2])
    with pytest.raises(SiteError, match=f"'{head}' is no head here: layers are 0 to 2, heads 0 to 3"):
        found[head]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subject": "Berlin"}, "'Berlin' does not stand in the text"),
        ({"noise": NAN}, "noise=nan: it is a finite number above 0"),
        ({"noise": INF}, "noise=inf"),
        ({"noise": "x"}, "noise='x'"),
        ({"samples": 1.5}, "samples=1.5: a whole number"),
        ({"kinds": []}, "No kind of state was given"),
        ({"kinds": 5}, "5 is no kind of state"),
        ({"seed": "x"}, "seed='x'"),
        ({"target": (1, 2)}, "the probability of one token, but a pair was given"),
    ],
)
def test_of_tracing(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        causal_trace(zoo.model("llama"), A, tokenizer=zoo.words(), **({"subject": "old"} | options))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((5, B, 1), {}, "is a whole number, but a text or token ids are read"),
        ((None, B, 1), {}, "text is None"),
        (([], B, 1), {}, "No positive text was given"),
        ((A, B, 1, [0, 1]), {}, "position=[0, 1]: a number, None for the mean"),
        ((A, B, 1, 1.5), {}, "position=1.5"),
        ((A, B, "x"), {}, "Layer 'x' was asked for"),
        ((A, B, 1), {"site": 5}, "A site is named by a text"),
    ],
)
def test_of_steering_vectors(arguments: tuple[Any, ...], options: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, SiteError)) as error:
        steering_vector(zoo.model("llama"), *arguments, tokenizer=zoo.words(), **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vector": None}, "A steering vector is added, but None was given"),
        ({"strength": "x"}, "A strength is a finite number, but 'x' was given"),
        ({"strength": NAN}, "A strength is a finite number, but nan"),
        ({"strength": []}, "No strength was given"),
        ({"positions": -1}, "counted from 0, not from the end"),
        ({"positions": 1.5}, "positions=1.5: a number (from there on)"),
        ({"positions": "x"}, "positions='x': a number (from there on)"),
        ({"positions": slice(0, 5, 0)}, "a slice goes forward"),
        ({"tap": 1}, "tap= sees or edits a pass, but a whole number was given"),
    ],
)
def test_of_steering(options: dict[str, Any], says: str) -> None:
    given = {"vector": SteeringVector(torch.ones(zoo.D), 1), "strength": 1.0, "max_new_tokens": 2} | options
    with pytest.raises(InputError) as error:
        steer(zoo.model("llama"), A, tokenizer=zoo.words(), **given)
    assert says in str(error.value)


def test_of_vectors() -> None:
    wrong: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (None, {}, "The vector is a tensor"),
        ([1.0, 2.0], {}, "The vector is a tensor"),
        (torch.zeros(2, 2, 2), {}, "one direction"),
        (torch.zeros(3, dtype=torch.long), {}, "one direction"),
        (torch.zeros(2, 16), {"positions": slice(1, 3)}, "give the first of their positions only"),
    )
    for vector, options, says in wrong:
        with pytest.raises(InputError, match=says):
            AddVector("embed", vector, **options)
