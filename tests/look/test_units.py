"""Units of feed-forward layers: statistics, contexts and directions are what a plain loop finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look import neurons, sparsity
from glassformer.look.moments import Moments
from glassformer.look.windows import Reading
from glassformer.parts.feedforward import Gated, Plain
from look import zoo

PLAIN = [n for n in zoo.SPECS if n not in ("experts",)]
TEXTS = [zoo.ids(20, seed) for seed in range(6)]


def posts(name: str, model: Any, layer: int, context: int) -> list[tuple[int, int, torch.Tensor]]:
    """(text, position, post [f]) of every token, window by window, one at a time."""
    found = []
    prefix = "decoder." if name == "t5" else ""
    path = f"{prefix}blocks.{layer}.ffn.post"
    for i, text in enumerate(TEXTS):
        for start in range(0, len(text), context):
            part = torch.tensor([text[start : start + context]])
            record = gf.Record(path)
            with torch.no_grad():
                model(*((torch.tensor([zoo.ids(6, 1)]), part) if name == "t5" else (part,)), tap=record)
            found += [(i, start + t, v) for t, v in enumerate(record[path][0])]
    return found


def source(name: str) -> dict[str, Any]:
    return {"source": zoo.ids(6, 1)} if name == "t5" else {}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("by", ["largest", "absolute"])
def test_contexts_and_statistics_are_those_of_a_loop(name: str, by: str) -> None:
    model = zoo.model(name)
    found = neurons(model, TEXTS, layer=1, units=[0, 3, 7], top=5, context=8, by=by, **source(name))
    every = posts(name, model, 1, 8)
    for unit in found:
        values = np.array([float(v[unit.unit]) for _, _, v in every])
        key = np.abs(values) if by == "absolute" else values
        order = np.argsort(-key, kind="stable")[:5]
        np.testing.assert_allclose([c.value for c in unit.contexts], values[order], rtol=2e-4, atol=1e-5)
        assert {(c.text, c.position) for c in unit.contexts[:2]} == {every[i][:2] for i in order[:2]}
        for c in unit.contexts:
            assert c.values[c.at] == pytest.approx(c.value, rel=1e-3, abs=1e-5)
            assert c.pieces[c.at] == f"‹{TEXTS[c.text][c.position]}›"
        assert unit.tokens == len(values) == 120
        assert unit.mean == pytest.approx(values.mean(), abs=1e-5)
        assert unit.deviation == pytest.approx(values.std(), rel=1e-4)
        assert unit.positive == pytest.approx((values > 0).mean())
        assert (unit.smallest, unit.largest) == pytest.approx((values.min(), values.max()), rel=1e-4)
        assert unit.kurtosis == pytest.approx((((values - values.mean()) / values.std()) ** 4).mean(), rel=1e-3)


def test_smallest_are_the_largest_turned_round() -> None:
    model = zoo.model("llama")
    found = neurons(model, TEXTS, layer=0, units=2, top=3, by="smallest")
    values = sorted(float(v[2]) for _, _, v in posts("llama", model, 0, 256))
    np.testing.assert_allclose([c.value for c in found[0].contexts], values[:3], rtol=1e-4, atol=1e-6)


def turned(model: Any) -> Any:
    """The same function, with the sign of unit 5 turned on its way in and on its way out: its outliers lie below zero."""
    with torch.no_grad():
        layer = model.blocks[0].ffn
        layer.gate_up.weight[8 + 5] *= -1
        layer.down.weight[:, 5] *= -1
    return model


def test_the_end_is_shown_on_which_the_outliers_lie() -> None:
    texts = [[1, 2, 7, 3], [7, 4, 5, 6, 11], [0, 1, 2, 3]]
    for model, side, by, value in ((planted(True), "above", "largest", 3.0), (turned(planted(True)), "below", "smallest", -3.0)):
        found = neurons(model, texts, count=1, top=2)
        unit = found["0.5"]
        assert (unit.side, unit.by, unit.extreme) == (side, by, value)
        assert [(c.text, c.position, c.value) for c in unit.contexts] == [(0, 2, value), (1, 0, value)]
        row = dict(zip(found.grid().columns, found.grid().rows[0], strict=True))
        assert (row["side"], row["extreme"], row["tokens"]) == (side, value, "‹7›")
        assert all(("Where post is below zero" in " ".join(str(x).split())) == (value < 0) for x in (found, unit))
        assert (
            "those values of that side" in found.grid().note
            and f"lies {side} it" in " ".join(str(unit).split())
            and f"contexts of the {by} values" in str(unit)
        )
    other = neurons(turned(planted(True)), texts, count=1, top=2, by="largest")[0]
    assert (other.side, other.by) == ("below", "largest") and all(c.value == 0 for c in other.contexts)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_further_end_is_that_of_a_loop(name: str) -> None:
    model = zoo.model(name)
    found = neurons(model, TEXTS, layer=1, units=range(24), top=4)
    values = torch.stack([v for _, _, v in posts(name, model, 1, 256)])
    away = values - values.mean(0)
    sides = set()
    for unit in found:
        column = values[:, unit.unit]
        below = bool(-away[:, unit.unit].min() > away[:, unit.unit].max())
        expected = column.sort(descending=not below).values[:4].tolist()
        np.testing.assert_allclose([c.value for c in unit.contexts], expected, rtol=1e-4, atol=1e-5)
        assert unit.extreme == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
        sides.add(unit.side)
    assert "above" in sides and (name != "llama" or "below" in sides)


def test_many_small_batches_merge_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model("gpt2")
    whole = neurons(model, TEXTS, top=7, context=4)
    monkeypatch.setitem(Reading.__init__.__kwdefaults__, "at_once", 8)
    parts = neurons(model, TEXTS, top=7, context=4)
    assert [u.name for u in whole] == [u.name for u in parts]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose([c.value for c in a.contexts], [c.value for c in b.contexts], rtol=1e-4, atol=1e-6)
        assert a.kurtosis == pytest.approx(b.kurtosis, rel=1e-4)


def test_moments_of_batches_are_those_of_the_whole() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) ** 3 + torch.tensor([0.0, 5.0, -100.0])
    m = Moments()
    for part in x.split([1, 99, 250, 150]):
        m.add(part)
    y = x.double()
    centred = y - y.mean(0)
    torch.testing.assert_close(m.mean, y.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m.deviation(), centred.square().mean(0).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(m.kurtosis(), (centred**4).mean(0) / centred.square().mean(0) ** 2, rtol=1e-3, atol=0)
    still = Moments()
    still.add(torch.full((10, 1), 3.0))
    assert still.kurtosis().item() == 0


def planted(gated: bool = False) -> Any:
    """A decoder of one block without attention, whose unit 5 answers to token 7 and raises the logit of token 11."""
    ffn = Gated(8, "relu") if gated else Plain(8, "relu")
    spec = gf.Decoder(12, 12, (gf.Block(attention=gf.Attention(2), feedforward=ffn, norm=gf.NoNorm()),), final_norm=gf.NoNorm(), tied=True)
    model = spec.build(seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight.copy_(torch.eye(12))
        layer = model.blocks[0].ffn
        if gated:
            layer.gate_up.weight[5, 7] = 2.0
            layer.gate_up.weight[8 + 5, 7] = 1.5
        else:
            layer.up.weight[5, 7] = 3.0
        layer.down.weight[11, 5] = 1.0
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_a_planted_unit_is_found_with_what_it_reads_and_writes(gated: bool) -> None:
    texts = [[1, 2, 7, 3], [7, 4, 5, 6, 11], [0, 1, 2, 3]]
    found = neurons(planted(gated), texts, count=1, top=2)
    unit = found["0.5"]
    assert found[0, 5] is unit and len(found) == 1 and found.considered == 8
    assert [(c.text, c.position, c.value) for c in unit.contexts] == [(0, 2, 3.0), (1, 0, 3.0)]
    assert unit.positive == pytest.approx(2 / 13)
    assert unit.raises is not None and unit.raises.ids[0] == 11
    assert unit.reads is not None and unit.reads.ids[0] == 7 and unit.reads.values[0] == pytest.approx(1.0)
    assert (unit.values_read is not None) == gated
    measured = sparsity(planted(gated), texts)
    assert float(measured.silent) == pytest.approx(7 / 8)
    assert float(measured.positive) == pytest.approx(2 / 13 / 8)
    assert float(measured.active) == pytest.approx(2 / 13 / 8)  # where it speaks it is alone


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "reordered", "parallel"])
def test_what_a_unit_writes_is_the_change_of_the_logits(name: str) -> None:
    """In the last layer, for a tiny step along the unit's column, the logits change along the words' scores (norms divide all tokens alike)."""
    model = zoo.model(name).double()
    from glassformer.look.directions import words_written
    from glassformer.look.vectors import subject_of

    layer = len(model.blocks) - 1
    raises, lowers = words_written(subject_of(model), layer, model.blocks[layer].ffn, 3, zoo.V, torch.arange(zoo.V))
    assert raises is not None and lowers is not None
    scores = torch.zeros(zoo.V, dtype=torch.float64)
    scores[list(raises.ids)] = torch.tensor(raises.values, dtype=torch.float64)
    u = model.blocks[layer].ffn.down.weight[:, 3].detach()
    post = getattr(model.blocks[layer], "norm2_post", None)
    u = u if post is None else u * post.weight.detach()
    # Far out along u only u remains, and the final norm reads nothing else.
    far = model.readout.scores(model.final_norm(1e9 * u[None, None], gf.core.flow.Pass(torch.zeros(1), torch.zeros(1))))[0, 0].detach()
    base = model.readout.scores(getattr(model.final_norm, "bias", None).detach()[None, None])[0, 0].detach() if hasattr(model.final_norm, "bias") else 0
    change = far - base
    change = change - change.mean()
    cosine = torch.dot(change, scores) / change.norm() / scores.norm()
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert lowers.ids[0] == raises.ids[-1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "parallel", "bert"])
def test_what_a_unit_reads_is_the_gradient_of_its_input(name: str) -> None:
    """The direction is that of d(pre)/d(stream), up to what the norm's division adds along the stream itself."""
    from glassformer.look.directions import norm_before
    from glassformer.look.vectors import back_through, matrix_of

    model = zoo.model(name).double()
    ffn = model.blocks[1].ffn
    row = matrix_of(ffn.gate_up if name == "llama" else ffn.up)[2].double()
    norm = norm_before(model, 1)
    x = torch.randn(1, 1, zoo.D, dtype=torch.float64, requires_grad=True)
    y = x if norm is None else norm(x, gf.core.flow.Pass(torch.zeros(1), torch.zeros(1)))
    (gradient,) = torch.autograd.grad((y * row).sum(), x)
    direction = back_through(norm, row.float()).double()
    basis = torch.stack([direction, x.detach()[0, 0] - (x.mean() if isinstance(norm, type(model.final_norm)) and name != "llama" else 0)], 1).detach()
    left = gradient[0, 0] - basis @ torch.linalg.lstsq(basis, gradient[0, 0]).solution
    assert float(left.norm() / gradient.norm()) < 1e-5


def test_skip_and_tokens_and_windows() -> None:
    model = zoo.model("gpt2")
    assert neurons(model, TEXTS, tokens=30, layer=0, units=0, context=8).units[0].tokens == 30
    found = neurons(model, TEXTS, skip=3, layer=0, units=0, context=10)
    assert found[0].tokens == 6 * 2 * 7
    assert all(c.position % 10 >= 3 for c in found[0].contexts)


def test_sparsity_is_that_of_a_loop() -> None:
    model = zoo.model("gpt2")
    measured = sparsity(model, TEXTS)
    x = torch.stack([v for _, _, v in posts("gpt2", model, 2, 256)])
    assert measured.layers == (0, 1, 2) and measured.widths == (24, 24, 24)
    assert float(measured.positive[2]) == pytest.approx(float((x > 0).float().mean()), rel=1e-5)
    active = (x.square().sum(1) ** 2 / (24 * (x**4).sum(1))).mean()
    assert float(measured.active[2]) == pytest.approx(float(active), rel=1e-4)
    assert "never above zero" in str(measured)


def test_experts_have_no_units_but_a_shared_one_has() -> None:
    with pytest.raises(InputError, match="Layer 0 is a mixture of experts: each expert sees only the tokens that chose it"):
        neurons(zoo.model("experts"), TEXTS, layer=0)
    with pytest.raises(InputError, match="or a shared expert"):
        sparsity(zoo.model("experts"), TEXTS)
    shared = gf.Experts(4, 2, Gated(12), shared=Gated(10))
    model = gf.Decoder(zoo.V, zoo.D, (zoo.block(feedforward=shared), zoo.block(feedforward=gf.Experts(4, 2, Gated(12))))).build(seed=0).eval()
    found = neurons(model, TEXTS, count=3)
    assert found.considered == 10
    assert all(u.site == "blocks.0.experts.shared.post" and u.raises is not None for u in found)


def test_a_model_without_logits_has_statistics_but_no_words_written() -> None:
    spec = zoo.SPECS["bert"].replace(readout=gf.Vector())
    found = neurons(spec.build(seed=0).eval(), TEXTS, layer=0, units=1)
    assert found[0].raises is None and found[0].reads is not None
    assert neurons(zoo.model("bert"), TEXTS, layer=0, units=1)[0].raises is None  # behind a transform with an activation


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"layer": 9}, SiteError, "Layer 9 was asked for, but the model has 3 layers, 0 to 2."),
        ({"units": 3}, InputError, "no layer was given: add layer="),
        ({"layer": 0, "units": [1, 99]}, SiteError, "Unit 99 was asked for, but layer 0 has 24 units, 0 to 23."),
        ({"by": "biggest"}, InputError, "'biggest' is no ranking of contexts."),
        ({"layer": 0, "units": []}, InputError, r"units=\[\]: units are whole numbers from 0, one or several\."),
        ({"layer": 0, "units": [3, -1]}, InputError, r"units=\[3, -1\]: units are whole numbers from 0"),
        ({"layer": 0, "units": "3"}, InputError, "units='3': units are whole numbers from 0"),
        ({"layer": 0, "units": 1.5}, InputError, "units=1.5: units are whole numbers from 0"),
        ({"context": "9"}, InputError, "context='9': a whole number of at least 1 is needed."),
        ({"tokens": True}, InputError, "tokens=True: at least 1 token is read"),
        ({"top": 0}, InputError, "top=0: a whole number of at least 1 is needed."),
        ({"skip": 300}, InputError, "skip=300 leaves no token of the windows"),
        ({"tokens": 0}, InputError, "tokens=0: at least 1 token is read"),
        ({"context": 100}, InputError, "Windows of 100 tokens were asked for, but this model has positions for 64"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match="(?s)" + said.replace("(", r"\(")):
        neurons(zoo.model("gpt2"), TEXTS, **arguments)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "The texts have 0 tokens"),
        ("", "there is no tokenizer"),
        ([[99]], "Text 0 holds the token id 99, but the model's vocabulary is 0 to 30"),
        ([[True, 2]], "holds True"),
        (Path("nowhere.txt"), "There is no file 'nowhere.txt'"),
        (7, "texts is .*, but a text, a file"),
    ],
)
def test_texts_that_cannot_be_read_are_told(texts: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        neurons(zoo.model("gpt2"), texts)


def test_a_file_is_read_document_by_document_and_the_answer_shows_itself(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the old man saw a red fox \f and the dog ran home to Rome\n")
    found = neurons(zoo.model("gpt2"), file, tokenizer=zoo.words(), count=6, words=4)
    assert found[0].tokens == 14
    assert {c.text for u in found for c in u.contexts} == {0, 1}
    assert str(found[0].contexts[0]).count("[") == 1
    text = str(found)
    assert "kurtosis" in text and found.units[0].name in text
    for dark in (False, True):
        found.plot(dark)
        found[0].plot(dark)
    assert "raises:" in str(found[0])
    with pytest.raises(InputError, match="Unit '9.9' is none of those looked at"):
        found["9.9"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import app as cli
    from glassformer.weights import own

    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    own.save(zoo.model("gpt2"), folder)
    zoo.words().save(folder)
    file.write_text("the old man saw a red fox and the dog ran home to Rome")
    assert cli.main(["look", "neurons", str(file), "--model", str(folder), "--layer", "1", "--unit", "3", "--out", "unit.json"]) == 0
    out = capsys.readouterr().out
    assert "Unit 3 of the feed-forward layer 1" in out and (tmp_path / "unit.json").exists()
    assert cli.main(["look", "neurons", str(file), "--model", str(folder), "--sparsity"]) == 0
    assert "Sparsity of feed-forward units over 14 tokens" in capsys.readouterr().out
    assert cli.main(["look", "neurons", str(file), "--model", str(folder), "--unit", "3"]) == 2
    assert "add --layer" in capsys.readouterr().err


@pytest.mark.parametrize("dark", [False, True])
def test_above_zero_has_the_same_colour_in_every_figure(dark: bool) -> None:
    """A unit's tokens, bars of both signs, eigenvalues, a journey's small pictures: warm above zero, cold below, as in a signed heat map."""
    import io

    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from glassformer.look.circuits import ov_circuit
    from glassformer.look.figure import bars, below_above, colours, new_figure
    from glassformer.look.journey_page import png

    figure, theme = new_figure((4, 3), dark)
    below, above = below_above(theme)
    assert to_rgb(above)[0] > to_rgb(above)[2] and to_rgb(below)[2] > to_rgb(below)[0]
    axes = figure.subplots()
    cells = axes.imshow([[-1.0, 1.0]], cmap=colours(theme, True)).to_rgba([-1.0, 1.0])[:, :3]
    assert cells[1, 0] > cells[1, 2] and cells[0, 2] > cells[0, 0]
    bars(axes, theme, ["a", "b"], [-1.0, 1.0])
    assert [p.get_facecolor()[:3] for p in axes.patches] == [to_rgb(below), to_rgb(above)]
    drawn = neurons(planted(True), [[1, 2, 7, 3]], count=1, top=1)[0].plot(dark).axes[0]
    assert to_rgb(above) in [p.get_facecolor()[:3] for p in drawn.patches if p.get_facecolor()[3] > 0.5]
    circuit = ov_circuit(zoo.model("llama"), 1, 2)
    points = circuit.plot(dark).axes[0].collections[0].get_facecolors()[:, :3]
    assert {tuple(p) for p in points[circuit.eigenvalues[:, 0].numpy() >= 0]} == {to_rgb(above)}
    small = imread(io.BytesIO(png(torch.tensor([[-1.0, 1.0]]))), format="png")[0, :, :3]  # the small pictures of a journey's page
    assert small[1, 0] > small[1, 2] and small[0, 2] > small[0, 0]
