"""Taps of one request in a batch: they see what they would see alone, and nobody else feels them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import glassformer as gf
from glassformer.core.tap import Tap
from glassformer.infer.engine.taps import only_looks
from infer import engine_kit as kit

NAMES = ["learned", "grouped", "alibi", "latent", "experts", "t5"]


def together(model: Any, tap: Tap | None, **options: Any) -> tuple[gf.Ticket, list[gf.Ticket], gf.Engine]:
    """A request with a tap in the middle of others, which came before and come later."""
    engine = gf.Engine(model, slots=4, capacity=64, prefill_chunk=8)
    others = [engine.submit(gf.Request(kit.ids(5 + 6 * i, i), max_new_tokens=14, temperature=1.0, seed=i)) for i in range(2)]
    engine.step()
    mine = engine.submit(gf.Request(kit.ids(9, 50), max_new_tokens=7, tap=tap, **options))
    others += [engine.submit(gf.Request(kit.ids(11, 70), max_new_tokens=9, temperature=1.0, seed=9))]
    while engine.step():
        pass
    return mine, others, engine


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_in_a_batch_is_the_recording_alone(name: str) -> None:
    model = kit.model(name)
    ours, alone = gf.Record("**"), gf.Record("**")
    mine, _, _ = together(model, ours)
    expected = gf.generate(model, kit.ids(9, 50), max_new_tokens=7, tap=alone)
    assert mine.result().ids == expected.ids
    assert set(ours.paths) == set(alone.paths)
    for path in alone.paths:
        assert ours[path].shape == alone[path].shape, path
        torch.testing.assert_close(ours[path], alone[path], atol=2e-4, rtol=1e-3, msg=lambda m, path=path: f"{path}: {m}")


def test_heads_are_picked_and_places_told() -> None:
    model = kit.model("grouped")

    class Places(Tap):
        def __init__(self) -> None:
            self.told: list[tuple[str, list[int]]] = []

        def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
            self.told.append((path, index.flatten().tolist()))

    ours, alone = gf.Record("blocks.1.attn.pattern[2]", "step.3.blocks.0.attn.z[0,3]"), gf.Record("blocks.1.attn.pattern[2]", "step.3.blocks.0.attn.z[0,3]")
    mine, _, _ = together(model, ours)
    gf.generate(model, kit.ids(9, 50), max_new_tokens=7, tap=alone)
    assert ours["step.4.blocks.1.attn.pattern"].shape == (1, 1, 1, 13)
    assert "step.3.blocks.0.attn.z" in ours and "step.2.blocks.0.attn.z" not in ours
    assert {p: v.shape for p, v in ours.values.items()} == {p: v.shape for p, v in alone.values.items()}
    one, two = Places(), Places()
    together(model, one)
    gf.generate(model, kit.ids(9, 50), max_new_tokens=7, tap=two)
    assert one.told == two.told and len(one.told) == 7
    assert mine.done


@pytest.mark.parametrize("name", ["grouped", "window", "latent", "t5"])
def test_an_edit_changes_its_own_row_as_it_does_alone(name: str) -> None:
    model = kit.model(name)
    site = "decoder.blocks.0.attn.z[1]" if name == "t5" else "blocks.0.attn.z[1]"
    mine, others, _ = together(model, gf.Edit(site, lambda z: -2 * z))
    edited = gf.generate(model, kit.ids(9, 50), max_new_tokens=7, tap=gf.Edit(site, lambda z: -2 * z))
    plain = gf.generate(model, kit.ids(9, 50), max_new_tokens=7)
    kit.same(mine.result(), edited)
    assert edited.logprobs != plain.logprobs
    for i, (ticket, prompt) in enumerate(zip(others[:2], (kit.ids(5, 0), kit.ids(11, 1)), strict=True)):
        kit.same(ticket.result(), gf.generate(model, prompt, max_new_tokens=14, temperature=1.0, seed=i))


@pytest.mark.parametrize("site", ["blocks.0.attn.pattern", "blocks.0.attn.v", "blocks.1.resid_pre", "logits"])
def test_nobody_else_feels_an_edit_to_the_bit(site: str) -> None:
    model = kit.model("grouped")
    _, calm, _ = together(model, gf.Edit(site, lambda x: x))
    _, wild, _ = together(model, gf.Edit(site, lambda x: 100 * x + 1))
    _, broken, _ = together(model, gf.Edit(site, lambda x: x * float("nan")))
    for one, other, third in zip(calm, wild, broken, strict=True):
        assert one.result().ids == other.result().ids == third.result().ids
        assert one.result().logprobs == other.result().logprobs == third.result().logprobs


def test_nobody_else_feels_a_look_to_the_bit() -> None:
    model = kit.model("grouped")
    _, plain, _ = together(model, None)
    _, seen, _ = together(model, gf.Record("blocks.0.attn.out"))
    for one, other in zip(plain, seen, strict=True):
        assert one.result().ids == other.result().ids
        torch.testing.assert_close(torch.tensor(one.result().logprobs), torch.tensor(other.result().logprobs), atol=1e-5, rtol=1e-5)


def test_who_looks_shares_the_call_and_who_may_change_something_does_not() -> None:
    look, edit = gf.Record("blocks.0.attn.z"), gf.Edit("logits", lambda x: x)
    assert only_looks(look) and only_looks(look | gf.Record("logits"))
    assert not only_looks(edit) and not only_looks(look | edit) and not only_looks(gf.Record("logits", grad=True)) and not only_looks(Tap())


def test_a_tap_that_raises_ends_its_own_request() -> None:
    model = kit.model("window")

    def later(x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ZeroDivisionError("one step in")
        return x

    for tap, kind, said in (
        (gf.Edit("blocks.1.resid_post", later), ZeroDivisionError, "one step in"),
        (gf.Edit("blocks.1.resid_post", lambda x: x[..., :3]), gf.SiteError, "keep the shape"),
        (gf.Record("step.2.blocks.0.attn.z[9]"), gf.SiteError, "which has 4 heads"),
    ):
        mine, others, engine = together(model, tap)
        with pytest.raises(kind, match=said):
            mine.result()
        for i, (ticket, prompt) in enumerate(zip(others[:2], (kit.ids(5, 0), kit.ids(11, 1)), strict=True)):
            kit.same(ticket.result(), gf.generate(model, prompt, max_new_tokens=14, temperature=1.0, seed=i))
        assert engine.stats().running == 0


def test_steps_without_a_tap_have_none() -> None:
    model = kit.model("grouped")
    engine = gf.Engine(model, slots=2, capacity=64)
    taps: list[Any] = []
    call = engine._rows._call

    def watched(view: Any, tokens: Any, fed: Any, tap: Any, *rest: Any) -> Any:
        taps.append(tap)
        return call(view, tokens, fed, tap, *rest)

    engine._rows._call = watched  # type: ignore[method-assign]
    looking = engine.submit(gf.Request([1, 2], max_new_tokens=2, tap=gf.Record("logits")))
    engine.submit(gf.Request([3, 4], max_new_tokens=6))
    looking.result()
    del taps[:]
    while engine.step():
        pass
    assert taps and not any(taps)
