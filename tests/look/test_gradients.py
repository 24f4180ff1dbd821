"""Gradient attributions: against autograd by hand and brute-force sums, completeness, and what cannot be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look import gradient_x_input, integrated_gradients
from look import zoo


def test_gradient_x_input_is_autograd_by_hand() -> None:
    made, ids = zoo.model("llama"), zoo.ids()
    x = made.embed.weight[ids][None].detach().requires_grad_()
    out = made(inputs_embeds=x)[0, 4]
    (grad,) = torch.autograd.grad(out[3] - out[5], x)
    found = gradient_x_input(made, ids, (3, 5), position=4)
    torch.testing.assert_close(found.values, (x * grad).sum(-1)[0].detach())
    assert found.actual == pytest.approx(float((out[3] - out[5]).detach()), abs=1e-5) and found.error is None
    assert (found.values[5:] == 0).all()  # a causal model does not read what comes later


@pytest.mark.parametrize("name", list(zoo.SPECS))
def test_sites_keep_all_axes_but_features(name: str) -> None:
    made, given = zoo.model(name), zoo.texts(name)
    shapes = {"blocks.1.attn.z": (9, 4), "blocks.0.resid_pre": (9,), "blocks.1.attn.pattern": (4, 9, 9)}
    for site, shape in shapes.items():
        found = gradient_x_input(made, **given, site=site)
        assert found.values.shape == shape and found.values.abs().sum() > 0
        found.plot()
        assert len(found.grid().rows) > 0 and len(found.grid().rows[0]) == 1 + len(shape)


def test_a_stream_is_linear_after_the_last_block() -> None:
    """Where nothing but a linear read-out follows, gradient times value is the logit itself."""
    made, ids = zoo.model("reordered"), zoo.ids()
    found = gradient_x_input(made, ids, 7, site="resid_final")
    assert float(found.values[-1]) == pytest.approx(float(made(torch.tensor([ids]))[0, -1, 7]), abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "parallel"])
def test_integrated_gradients_are_complete(name: str) -> None:
    made, given = zoo.model(name).double(), zoo.texts(name)
    for baseline in ("mean", 3):
        found = integrated_gradients(made, **given, target=(3, 5), baseline=baseline, tolerance=1e-4)
        assert found.baseline is not None and found.error is not None
        assert found.error < 2e-4 * max(abs(found.actual - found.baseline), 1e-2)
        assert (found.source_values is not None) == (name == "t5")


def test_integrated_gradients_equal_a_fine_sum() -> None:
    made, ids = zoo.model("gpt2").double(), zoo.ids()
    start = [3] * 9
    x, x0 = made.embed.weight[ids].detach(), made.embed.weight[start].detach()
    at = ((torch.arange(400) + 0.5) / 400).double()[:, None, None]
    line = (x0 + at * (x - x0)).requires_grad_()
    (grad,) = torch.autograd.grad(made(inputs_embeds=line)[:, -1, 7].sum(), line)
    expected = (grad.mean(0) * (x - x0)).sum(-1)
    found = integrated_gradients(made, ids, 7, baseline=start, tolerance=1e-5)
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=0)
    again = integrated_gradients(made, ids, 7, baseline=start, tolerance=1e-5, batch=5)
    torch.testing.assert_close(found.values, again.values, atol=1e-9, rtol=0)


def test_zero_vectors_under_rms_norms_need_short_intervals() -> None:
    """Nodes in the logarithm: the sum is the difference, in float64 to the tolerance, with far fewer gradients than halving needs."""
    found = integrated_gradients(zoo.model("llama", wide=False), zoo.ids(), 7)
    assert found.error is not None and found.steps > 32 and found.error < 1e-2 * abs(found.actual)
    deep = integrated_gradients(zoo.model("llama", wide=False).double(), zoo.ids(), 7, tolerance=1e-5)
    assert deep.error is not None and deep.baseline is not None and deep.error < 2e-5 * abs(deep.actual - deep.baseline)
    assert deep.steps < 700
    few = integrated_gradients(zoo.model("llama", wide=False), zoo.ids(), 7, steps=8, most=24)
    assert few.steps <= 24 and few.error is not None and few.error > found.error


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_more_steps_do_not_make_it_worse(name: str) -> None:
    """The cuts where the output changes stay, whatever ``steps``; from there on intervals are halved."""
    made, ids = zoo.model(name), zoo.ids()
    errors = []
    for steps in (32, 256, 1024, 2048):
        found = integrated_gradients(made, ids, 7, steps=steps)
        assert found.error is not None and min(steps, 2048 - 15) <= found.steps <= 2048
        errors.append(found.error)
    rounding = 64 * torch.finfo(torch.float32).eps * float(made(torch.tensor([ids])).abs().max())
    assert all(error <= errors[0] + rounding for error in errors), errors


def test_a_small_difference_of_large_outputs_ends_early() -> None:
    """What is left of each interval is the rounding of the logits, which more gradients do not lessen."""
    made, ids = zoo.model("llama"), zoo.ids()
    with torch.no_grad():
        end, start = made(torch.tensor([ids]))[0, -1], made(inputs_embeds=torch.zeros(1, len(ids), zoo.D))[0, -1]
    part = float((end - start)[7] / (end - start)[5])
    found = integrated_gradients(made, ids, lambda out: out[:, -1, 7] - part * out[:, -1, 5])
    assert found.baseline is not None and abs(found.actual - found.baseline) < 1e-5
    assert found.error is not None and found.error < 1e-4 and found.steps < 1000, (found.steps, found.error)
    few = integrated_gradients(made, ids, 7, most=64)
    assert few.steps <= 64 and few.error is not None, "the intervals where the output moves most, as many as there is room for"


def test_the_known_error_is_that_of_the_sum() -> None:
    """Errors of two tokens that cancel are not seen: this number is 0 all along the line, while either token's own integral needs finer steps."""
    model = gf.Decoder(zoo.V, zoo.D, (), final_norm=gf.NoNorm()).build(seed=0).double()
    size = 200 / float(model(torch.tensor([[3]]))[0, 0, 7])  # so that either sine has 32 waves on the line
    found = [
        integrated_gradients(model, [3, 3], lambda out: torch.sin(size * out[:, 0, 7]) - torch.sin(size * out[:, 1, 7]), baseline="mean", steps=n)
        for n in (8, 1024)
    ]
    assert [f.error for f in found] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert abs(float(found[0].values[0] - found[1].values[0])) > 0.1


def test_lines_from_zero_are_cut_by_ratio() -> None:
    """The same integral by even steps in ln a, where one function of known integral stands for the model: atan(a / s) with a small s."""
    model, ids = gf.Encoder(zoo.V, zoo.D, (), readout=gf.Vector(), final_norm=gf.NoNorm()).build(seed=0).double(), zoo.ids(3)
    for size in (1e-9, 1e-3, 1.0):
        found = integrated_gradients(model, ids, lambda v, s=size: torch.atan(v.sum(-1) / s), tolerance=1e-6)
        assert found.error is not None and found.error < 1e-5 and found.steps < 500, size
        assert found.sum == pytest.approx(found.actual, abs=1e-5)


def test_a_function_of_the_output_and_classes() -> None:
    ids = zoo.ids()
    vector = gf.Encoder(zoo.V, zoo.D, (zoo.block(),), position=gf.Learned(32), readout=gf.Vector()).build(seed=0)
    other = torch.randn(zoo.D, generator=torch.Generator().manual_seed(0))
    found = integrated_gradients(vector, ids, lambda v: v @ other, baseline="mean")
    assert found.actual == pytest.approx(float(vector(torch.tensor([ids]))[0] @ other), abs=1e-5)
    assert found.error is not None and found.error < 1e-3 * max(1.0, abs(found.actual))
    classes = gf.Encoder(zoo.V, zoo.D, (zoo.block(),), readout=gf.Classifier(3)).build(seed=0)
    scores = classes(torch.tensor([ids]))[0]
    assert gradient_x_input(classes, ids, (0, 2)).actual == pytest.approx(float(scores[0] - scores[2]), abs=1e-5)
    assert gradient_x_input(classes, ids).target == f"class {int(scores.argmax())}"
    with pytest.raises(InputError, match="target=3 is no class of this model: give a number from 0 to 2"):
        gradient_x_input(classes, ids, 3)
    with pytest.raises(InputError, match="ends in Vector, which has no scores: give target= as a function"):
        gradient_x_input(vector, ids)
    with pytest.raises(InputError, match=r"one number per row is needed: \(1,\)"):
        gradient_x_input(vector, ids, lambda v: v)


def test_answers_show_themselves() -> None:
    for name in ("gpt2", "t5"):
        found = gradient_x_input(zoo.model(name), **zoo.texts(name))
        assert "need not sum" in str(found).replace("\n", " ")
        found.plot(dark=True)
        assert found.best(2)[0][1] == max((*found.values.tolist(), *(() if found.source_values is None else found.source_values.tolist())), key=abs)
    long: Any = gradient_x_input(zoo.model("llama"), zoo.ids(60))
    assert long.size()[1] > found.size()[1] or len(long.pieces) == 60
    long.plot()


def test_nothing_is_left_in_the_model() -> None:
    made = zoo.model("gpt2").train()
    integrated_gradients(made, zoo.ids(), 3, baseline="mean", steps=8)
    assert made.training and all(p.grad is None for p in made.parameters())


def test_errors_say_what_to_do() -> None:
    made, ids = zoo.model("gpt2"), zoo.ids()
    with pytest.raises(InputError, match="baseline='none' is unknown"):
        integrated_gradients(made, ids, baseline="none")
    with pytest.raises(InputError, match="The baseline has 3 ids, but the text has 9 tokens"):
        integrated_gradients(made, ids, baseline=[1, 2, 3])
    with pytest.raises(InputError, match="Token id 99 was asked about"):
        integrated_gradients(made, ids, baseline=99)
    with pytest.raises(InputError, match="steps=0 is a number of gradients"):
        integrated_gradients(made, ids, steps=0)
    with pytest.raises(InputError, match="tolerance=0 is the error that is allowed"):
        integrated_gradients(made, ids, tolerance=0)
    with pytest.raises(SiteError, match="meets no site"):
        gradient_x_input(made, ids, site="blocks.9.attn.z")
    with pytest.raises(InputError, match="names several sites: name one, such as 'blocks.0.attn.z'"):
        gradient_x_input(made, ids, site="blocks.*.attn.z")


def test_what_has_no_gradient_is_said() -> None:
    made, ids = zoo.model("gpt2"), zoo.ids()
    for target in (lambda o: o.argmax(-1)[:, -1], lambda o: torch.ones(len(o))):
        for site in (None, "blocks.0.attn.z"):
            with pytest.raises(InputError, match=r"has no gradient: what it returns is constant"):
                gradient_x_input(made, ids, target, site=site)
    with pytest.raises(InputError, match="chosen' holds whole numbers"):
        gradient_x_input(zoo.model("experts"), ids, site="blocks.0.experts.chosen")
    with pytest.raises(InputError, match="site=3 is no name"):
        gradient_x_input(made, ids, site=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tolerance=nan"):
        integrated_gradients(made, ids, tolerance=float("nan"))
    with pytest.raises(InputError, match="most=16 gradients are allowed, but steps=100"):
        integrated_gradients(made, ids, steps=100, most=16)


def test_a_model_whose_weights_are_frozen_has_gradients_too() -> None:
    made, ids = zoo.model("gpt2"), zoo.ids()
    wanted = [gradient_x_input(made, ids, 3, site=site).values for site in ("blocks.1.attn.z", "embed")]
    made.requires_grad_(False)
    for site, values in zip(("blocks.1.attn.z", "embed"), wanted, strict=True):
        torch.testing.assert_close(gradient_x_input(made, ids, 3, site=site).values, values)
