"""Redundancy: distances and correlations against plain formulas, ablation against zeroed weights, Taylor against differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError
from glassformer.look.head_loss import Loss
from glassformer.look.redundancy import _js, head_redundancy
from glassformer.look.windows import Reading
from look import planted, zoo


def loss_of(model: Any, ids: list[int]) -> float:
    logits = model(torch.tensor([ids]))[0].double()
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "parallel", "experts"])
def test_a_head_off_is_its_weights_at_zero(name: str) -> None:
    model, ids = zoo.model(name), zoo.ids(14, 1)
    found = head_redundancy(model, ids, points=3)
    with torch.no_grad():
        whole = loss_of(model, ids)
        for layer, block in enumerate(model.blocks):
            for h in (0, 3):
                kept = block.attn.out.weight.clone()
                width = block.attn.d_value
                block.attn.out.weight[:, h * width : (h + 1) * width] = 0
                assert float(found.exact[4 * layer + h]) == pytest.approx(loss_of(model, ids) - whole, abs=1e-4)
                block.attn.out.weight.copy_(kept)
    assert found.least == pytest.approx(whole, abs=1e-4) and not found.held_out


def test_taylor_is_the_slope_of_the_loss() -> None:
    model, ids = zoo.model("llama").double(), zoo.ids(12, 2)
    found = head_redundancy(model, ids, points=3)
    for n in (0, 5, 11):
        layer, h = divmod(n, 4)
        ends = []
        for factor in (1 - 1e-4, 1 + 1e-4):
            with torch.no_grad():
                y = model(torch.tensor([ids]), tap=gf.Edit(f"blocks.{layer}.attn.z[{h}]", lambda z, f=factor: f * z))[0]
                ends.append(float(torch.nn.functional.cross_entropy(y[:-1], torch.tensor(ids[1:]))))
        assert float(found.taylor[n]) == pytest.approx(abs(ends[1] - ends[0]) / 2e-4, rel=1e-3, abs=1e-6)


def test_taylor_averages_sizes_over_texts() -> None:
    model, texts = zoo.model("gpt2"), [zoo.ids(12, s) for s in range(4)]
    both = head_redundancy(model, texts, points=2)
    one, three = (head_redundancy(model, texts[i], points=2).taylor for i in (0, 2))
    assert both.held_out and torch.allclose(both.taylor, (one + three) / 2, atol=1e-5)  # every other window measures importance


def test_curves_are_those_of_a_loop() -> None:
    model, texts = zoo.model("gpt2"), [zoo.ids(12, 1), zoo.ids(10, 2)]
    found = head_redundancy(model, texts, points=4, random_orders=1)
    assert found.off == (0, 4, 8, 12) and found.orders == ("by Taylor", "by ablation", "random")
    off = found.taylor.argsort()[:8].tolist()
    tap: Any = None
    for n in off:
        one = gf.Edit(f"blocks.{n // 4}.attn.z[{n % 4}]", lambda z: 0 * z)
        tap = one if tap is None else tap | one
    with torch.no_grad():
        y = model(torch.tensor([texts[1]]), tap=tap)[0].double()
    assert float(found.curves[0, 2]) == pytest.approx(float(torch.nn.functional.cross_entropy(y[:-1], torch.tensor(texts[1][1:]))), abs=1e-5)
    assert torch.allclose(found.curves[:, -1], found.curves[0, -1].expand(3)) and torch.allclose(found.curves[:, 0], found.curves[0, 0].expand(3))


def test_it_is_said_which_loss_is_which() -> None:
    model, texts = zoo.model("gpt2"), [zoo.ids(12, 1), zoo.ids(10, 2)]
    found = head_redundancy(model, texts, points=5, random_orders=1)
    with torch.no_grad():
        learnt, judged = (loss_of(model, t) for t in texts)
        without = model(torch.tensor([texts[0]]), tap=gf.Edit("blocks.1.attn.z[2]", lambda z: 0 * z))[0].double()
    assert found.held_out and found.whole == pytest.approx(learnt, abs=1e-5) and found.least == pytest.approx(judged, abs=1e-5)
    grid = found.grid()
    row = dict(zip(grid.columns, next(r for r in grid.rows if r[0] == "1.2"), strict=True))
    alone = float(torch.nn.functional.cross_entropy(without[:-1], torch.tensor(texts[0][1:])))
    assert row["loss without it"] == pytest.approx(alone, abs=1e-5) and row["more than whole"] == pytest.approx(alone - learnt, abs=1e-5)
    assert f"Whole model: {found.whole:.4g}; without it: with that one head off." in grid.note
    assert f"on other windows than importance was measured on; whole model there: {found.least:.4g}." in grid.note
    curve = found.curves[0]
    assert "Loss without the first 3, 6, 9, 12 of 12 heads (the least important first, or in random order), on other windows" in grid.note
    assert "\n  by Taylor: " + ", ".join(f"{float(curve[p]):.4g}" for p in (1, 2, 3, 4)) + "\n" in grid.note
    figure = found.plot()
    *_, one, several = (a for a in figure.axes if a.get_ylabel())
    assert f"whole model's ({found.whole:.3g})" in one.get_ylabel() and "without the head" in one.get_ylabel()
    assert several.get_title(loc="left") == "several heads off, the least important first, or at random" and several.get_xlabel() == "heads off, of 12"
    assert [t.get_text() for t in several.texts] == [f"whole model {found.least:.3g}"]


def test_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at once is bounded by numbers, not by rows: one window and one ablation at a time give the same."""
    from glassformer.look import head_loss, redundancy

    model, texts = zoo.model("gpt2"), [zoo.ids(12, 1), zoo.ids(10, 2), zoo.ids(7, 3)]
    whole = head_redundancy(model, texts, points=3)
    for module in (redundancy, head_loss):
        monkeypatch.setattr(module, "NUMBERS", 1)
    parts = head_redundancy(model, texts, points=3)
    for name in ("pattern_distance", "output_correlation", "exact", "curves"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5, equal_nan=True), name


def test_jensen_shannon() -> None:
    share = torch.tensor([[[1.0, 0, 0, 0]], [[0, 1.0, 0, 0]], [[0.5, 0.5, 0, 0]], [[1.0, 0, 0, 0]]], dtype=torch.float64)
    d = _js(share)
    assert d[0, 1] == pytest.approx(1) and d[0, 3] == 0 and torch.equal(d, d.T)
    m = torch.tensor([0.75, 0.25])
    divergence = -(m * m.log2()).sum() - 0.5
    assert float(d[0, 2]) == pytest.approx(float(divergence) ** 0.5)


def test_equal_heads_are_found_equal() -> None:
    found = head_redundancy(planted.planted([["writes previous", "writes previous", "first", "even"]]), [torch.arange(24).tolist()], points=3)
    assert found.pattern_distance[0, 1] == 0 and float(found.output_correlation[0, 1]) == pytest.approx(1)
    assert found.nearest(found.pattern_distance, False)[0] == 1
    assert float(found.pattern_distance[0, 2]) > 0.9
    assert found.output_correlation[2].isnan().all()  # it writes nothing


def test_similarity_is_that_of_the_formulas() -> None:
    model, ids = zoo.model("sandwich"), zoo.ids(13, 3)
    found = head_redundancy(model, ids, points=2)
    tap = gf.Record("blocks.*.attn.pattern", "blocks.*.attn.result")
    with torch.no_grad():
        model(torch.tensor([ids]), tap=tap)
    x = torch.cat([tap[f"blocks.{i}.attn.result"][0].transpose(0, 1) for i in range(2)]).double()
    x = x - x.mean(1, keepdim=True)
    flat = x.flatten(1)
    assert torch.allclose(found.output_correlation.double(), (flat @ flat.T) / (flat.norm(dim=1)[:, None] * flat.norm(dim=1)), atol=1e-5)
    p = torch.cat([tap[f"blocks.{i}.attn.pattern"][0] for i in range(2)]).double()[:, 1:]
    a, b = p[0], p[5]
    m = (a + b) / 2
    kl = lambda u: (u * (u / m).clamp_min(1e-300).log2()).nan_to_num(0).sum(-1)
    assert float(found.pattern_distance[0, 5]) == pytest.approx(float(((kl(a) + kl(b)) / 2).clamp_min(0).sqrt().mean()), abs=1e-5)


@pytest.mark.parametrize("name", list(zoo.SPECS))
def test_every_kind_of_model(name: str) -> None:
    given = zoo.texts(name, 12)
    found = head_redundancy(zoo.model(name), [given["text"], zoo.ids(9, 4)], source=given.get("source"), points=3)
    n = len(found.heads)
    assert found.exact.shape == found.taylor.shape == (n,) and found.curves.shape == (5, 3) and found.pattern_distance.shape == (n, n)
    assert not found.curves.isnan().any() and (found.taylor >= 0).all() and float(found.curves[0, 0]) == pytest.approx(found.least)
    assert "in place" in found.loss if name == "bert" else "next token" in found.loss


def test_a_model_without_scores_drifts() -> None:
    spec = zoo.SPECS["bert"].replace(readout=gf.Vector())
    model = spec.build(seed=0).eval()
    found = head_redundancy(model, [zoo.ids(12), zoo.ids(9, 4)], points=3)
    assert "drift" in found.loss and found.least == pytest.approx(0, abs=1e-6) and (found.taylor > 0).all() and (found.exact >= -1e-6).all()


def test_the_length_of_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many random directions agree with differences of the output."""
    from glassformer.look import head_loss

    model = zoo.SPECS["bert"].replace(readout=gf.Vector()).build(seed=1).double().eval()
    reading = Reading(model, [zoo.ids(8)])
    loss = Loss(reading, torch.Generator().manual_seed(0))
    (window,) = reading.windows()
    monkeypatch.setattr(head_loss, "DIRECTIONS", 200)
    found = loss.taylor([window])
    ends = []
    for step in (-1e-3, 1e-3):
        gates = torch.ones(1, 12)
        gates[0, 7] += step
        with torch.no_grad():
            ends.append(torch.nn.functional.normalize(loss.out(window, gates).flatten(), dim=0))
    assert float(found[7]) == pytest.approx(float((ends[1] - ends[0]).norm() / 2e-3), rel=0.15)


def test_a_window_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches of gates are run over it."""
    from glassformer.look import head_loss

    count, read = [0], head_loss.read

    def counted(*given: Any, **options: Any) -> Any:
        count[0] += 1
        return read(*given, **options)

    monkeypatch.setattr(head_loss, "read", counted)
    monkeypatch.setattr(head_loss, "NUMBERS", 1)
    head_redundancy(zoo.model("gpt2"), [zoo.ids(12, 1), zoo.ids(10, 2), zoo.ids(7, 3)], points=3)
    assert count[0] == 3


def test_hidden_tokens() -> None:
    spec = zoo.SPECS["bert"]
    words = zoo.words()
    assert words.mask_id is None
    reading = Reading(spec.build(seed=0).eval(), [zoo.ids(20)], words)
    loss = Loss(reading, torch.Generator().manual_seed(0))
    loss.mask, (window,) = 3, reading.windows()
    ids = list(window.ids)
    hidden = loss._hidden(window)
    assert len(hidden) == 2
    given = torch.tensor([[3 if i in hidden else t for i, t in enumerate(ids)]])
    with torch.no_grad():
        y = loss.model(given)[0].double()
        expected = torch.nn.functional.cross_entropy(y[hidden], torch.tensor(ids)[hidden])
        assert float(loss.of(window, torch.ones(1, 12))) == pytest.approx(float(expected), abs=1e-6)


def test_shows_itself_and_names_mistakes(tmp_path: Path) -> None:
    model = zoo.model("gpt2")
    found = head_redundancy(model, [zoo.ids(12), zoo.ids(9, 4)], points=3)
    text = " ".join(str(found).split())
    assert "agree to a rank correlation" in text and "on other windows" in text
    assert found.save(tmp_path / "a.png").stat().st_size > 1000 and -1 <= found.agreement <= 1
    with pytest.raises(InputError, match="at least 2 tokens"):
        head_redundancy(model, [3])
    with pytest.raises(InputError, match=r"points='9': a whole number of at least 0 is needed"):
        head_redundancy(model, zoo.ids(9), points="9")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"points=1 and random_orders=3: a curve has at least 2 points"):
        head_redundancy(model, zoo.ids(9), points=1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glassformer.cli.app import main

    gf.save(zoo.model("llama"), tmp_path / "model")
    zoo.words().save(tmp_path / "model")
    assert main(["look", "redundancy", "the old man saw a red fox and the dog ran home", "-m", str(tmp_path / "model"), "--context", "6"]) == 0
    assert "What 12 heads have in common" in capsys.readouterr().out
    assert main(["look", "redundancy", "the", "-m", str(tmp_path / "model")]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err
