"""Roles of heads: planted heads are found and nothing else, and every score is what a plain loop gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look import role_scores
from glassformer.look.forecasting import _Alive
from glassformer.look.inside import head_figures
from glassformer.look.roles import DEFINITIONS, RELATIONS, ROLES, head_roles, relations
from look import planted, zoo

CIRCUIT = [["writes previous", "first", "itself", "even"], ["induction", "same", "local", "previous"]]
FOUND = {
    "0.0": ("previous",),
    "0.1": ("first",),
    "0.2": ("itself",),
    "0.3": ("uniform",),
    "1.0": ("induction",),
    "1.1": ("same",),
    "1.2": ("local",),
    "1.3": ("previous",),
}


def some_ids(t: int, seed: int) -> list[int]:
    return torch.randint(planted.V, (t,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("norm", [gf.NoNorm(), gf.RMSNorm()], ids=["no norm", "rms"])
@pytest.mark.parametrize("texts", [None, [some_ids(50, 1), some_ids(31, 2)]], ids=["repeats alone", "with texts"])
def test_planted_heads_are_found_and_nothing_else(norm: Any, texts: Any) -> None:
    found = head_roles(planted.planted(CIRCUIT, norm), texts)
    assert found.roles() == FOUND
    assert found.holding("previous") == ("0.0", "1.3")
    assert found.holding("duplicate") == ()
    assert found["1.0"]["induction"] > 0.95 and found["1.1"]["same"] == pytest.approx(1, abs=1e-4) and found["0.1"]["first"] == pytest.approx(1, abs=1e-4)


def test_induction_needs_both_of_its_heads() -> None:
    without = head_roles(planted.planted([["even", "even"], ["induction", "even"]]))
    assert without.holding("induction") == ()
    assert head_roles(planted.planted([["writes previous", "even"], ["induction", "even"]])).holding("induction") == ("1.0",)


def test_a_fixed_distance_is_not_induction() -> None:
    """A head that looks 31 back does so at the repeats of one length only; lengths differ."""
    model = planted.planted([["previous", "even"]])
    with torch.no_grad():
        q = model.blocks[0].attn.qkv.weight[: planted.P]
        q.zero_()
        n = planted.P - 25
        q[:n, planted.V + 25 : planted.V + planted.P] = planted.SHARP * torch.eye(n)  # position t asks for t - 25
    at_one = head_roles(model, repeats=1, length=26)
    assert at_one.lengths == (26,) and at_one.holding("induction") == ("0.0",)  # cannot be told apart at one length
    assert head_roles(model, length=26).holding("induction") == ()


def test_an_even_head_gets_the_baseline() -> None:
    found = head_roles(planted.planted([["even"]]), some_ids(40, 3))
    for name in (*RELATIONS, "positional"):
        i = ROLES.index(name)
        if name in found.applicable:
            assert found.scores[0, i] == pytest.approx(float(found.baseline[0, i]), abs=1e-5), name
            assert abs(found.excess[0, i]) < 1e-4
    assert found["0.0"]["uniform"] == pytest.approx(1, abs=1e-5)


def brute(pattern: np.ndarray, ids: list[int]) -> dict[str, float]:
    """Scores of one head of a decoder on one text, query by query."""
    sums = {r: [] for r in RELATIONS}
    t = len(ids)
    for q in range(1, t):
        targets = {
            "previous": [q - 1],
            "next": [],
            "first": [0],
            "last": [],
            "local": [s for s in (q - 3, q - 2, q - 1) if s >= 0],
            "duplicate": [s for s in range(q) if ids[s] == ids[q]],
            "induction": [s for s in range(1, q) if ids[s - 1] == ids[q]],
        }
        targets["itself"] = [q] if targets["duplicate"] else []
        targets["same"] = [*targets["duplicate"], q] if q in [i for i in range(t) if ids.count(ids[i]) > 1] else []
        for r, s in targets.items():
            if s and len(s) < q + 1:
                sums[r].append(pattern[q, s].sum())
    return {r: float(np.mean(v)) if v else float("nan") for r, v in sums.items()}


def test_scores_are_those_of_a_loop() -> None:
    model, ids = zoo.model("llama").double(), zoo.ids(20, 4)
    found = head_roles(model, ids)
    tap = gf.Record("blocks.*.attn.pattern")
    model(torch.tensor([ids]), tap=tap)
    for layer in range(3):
        for h in range(4):
            expected = brute(tap[f"blocks.{layer}.attn.pattern"][0, h].detach().numpy(), ids)
            own = found.texts[found.heads.index(f"{layer}.{h}")]
            for r, value in expected.items():
                assert float(own[ROLES.index(r)]) == pytest.approx(value, abs=1e-5, nan_ok=True), (layer, h, r)


def test_several_texts_weigh_by_their_queries() -> None:
    model, a, b = zoo.model("gpt2"), zoo.ids(20, 4), zoo.ids(11, 5)
    both, first, second = (head_roles(model, t).texts[:, 0] for t in ([a, b], a, b))
    assert torch.allclose(both, (19 * first + 10 * second) / 29, atol=1e-5)  # previous: every query after the first counts


@pytest.mark.parametrize("name", ["gpt2", "bert", "sandwich"])
def test_agrees_with_the_figures_of_the_page(name: str) -> None:
    model, ids = zoo.model(name), zoo.ids(18, 6)
    found = head_roles(model, ids)
    tap = gf.Record("blocks.*.attn.pattern")
    model(torch.tensor([ids]), tap=tap)
    for layer in range(len(model.blocks)):
        entropy, distance, _, previous, first, copy = head_figures(tap[f"blocks.{layer}.attn.pattern"][0].detach().numpy(), ids).T
        rows = slice(4 * layer, 4 * layer + 4)
        assert np.allclose(found.entropy[rows], entropy, atol=1e-5) and np.allclose(found.distance[rows], distance, atol=1e-4)
        assert np.allclose(found.texts[rows, ROLES.index("previous")], previous, atol=1e-5)
        assert np.allclose(found.texts[rows, ROLES.index("first")], first, atol=1e-5)
        assert np.allclose(found.texts[rows, ROLES.index("induction")], copy, atol=1e-5)


def test_without_the_sink() -> None:
    model, ids = zoo.model("gpt2"), zoo.ids(12, 7)
    found = head_roles(model, ids)
    tap = gf.Record("blocks.1.attn.pattern")
    model(torch.tensor([ids]), tap=tap)
    rest = tap["blocks.1.attn.pattern"][0, 2].detach().double()[1:, 1:]
    rest = rest / rest.sum(-1, keepdim=True)
    far = (torch.arange(1, 12)[:, None] - torch.arange(1, 12)).abs()
    assert float(found.entropy_rest[6]) == pytest.approx(float(-(rest * rest.clamp_min(1e-300).log2()).sum(-1).mean()), abs=1e-4)
    assert float(found.distance_rest[6]) == pytest.approx(float((rest * far).sum(-1).mean()), abs=1e-4)
    assert found.by_layer(found.distance_rest).shape == (3,)
    sink = head_roles(planted.planted([["first", "even"]]))
    assert sink.distance[0] > 10 and sink.distance_rest[0].isnan()  # nothing is left of a perfect sink's rows


def test_positional_is_the_share_of_variance_between_distances() -> None:
    model, texts = zoo.model("llama"), [zoo.ids(15, 1), zoo.ids(9, 2)]
    found = head_roles(model, texts).texts[:, ROLES.index("positional")]
    values: dict[int, list[float]] = {}
    for ids in texts:
        tap = gf.Record("blocks.2.attn.pattern[3]")
        model(torch.tensor([ids]), tap=tap)
        a = tap["blocks.2.attn.pattern"][0, 0].tolist()
        for t in range(len(ids)):
            for s in range(t):
                values.setdefault(t - s, []).append(a[t][s])
    flat = np.concatenate([np.array(v) for v in values.values()])
    within = sum(((np.array(v) - np.mean(v)) ** 2).sum() for v in values.values())
    assert float(found[11]) == pytest.approx(1 - within / ((flat - flat.mean()) ** 2).sum(), abs=1e-5)


@pytest.mark.parametrize("name", list(zoo.SPECS))
def test_every_kind_of_model(name: str) -> None:
    texts = zoo.texts(name, 14)
    found = head_roles(zoo.model(name), texts["text"], source=texts.get("source"), repeats=3)
    assert found.heads[-1] == f"{len(found.heads) // 4 - 1}.3" and found.tokens == 14
    assert ("next" in found.applicable) == (name == "bert")
    assert not found.scores[:, [ROLES.index(r) for r in found.applicable]].isnan().any()
    assert (found.scores.nan_to_num(0) <= 1 + 1e-5).all() and (found.baseline.nan_to_num(0) <= 1).all()
    same = head_roles(zoo.model(name), texts["text"], source=texts.get("source"), repeats=3)
    assert torch.equal(same.repeats.nan_to_num(9), found.repeats.nan_to_num(9))  # the seed decides


def test_groups_of_heads_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.look import patterns

    model, texts = zoo.model("bert"), [zoo.ids(15, 1), zoo.ids(9, 2), zoo.ids(12, 3)]
    whole = head_roles(model, texts)
    monkeypatch.setattr(patterns, "AT_ONCE", 1)  # one head at a time
    assert torch.allclose(head_roles(model, texts).scores, whole.scores, atol=1e-6, equal_nan=True)
    alone = [head_roles(model, t).texts for t in texts]
    previous = sum(a[:, 0] * (len(t) - 1) for a, t in zip(alone, texts, strict=True)) / (14 + 8 + 11)
    assert torch.allclose(whole.texts[:, 0], previous, atol=1e-5)


@pytest.mark.parametrize("numbers", [1, 400, 5000])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_some_queries_at_a_time_are_all_of_them(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = zoo.model(name), [zoo.ids(23, 1), zoo.ids(9, 2)]
    whole = head_roles(model, texts, repeats=2)
    monkeypatch.setattr(role_scores, "AT_ONCE", numbers)  # one query, a few, and a row in two parts
    parts = head_roles(model, texts, repeats=2)
    for field in ("texts", "repeats", "texts_even", "repeats_even", "entropy", "distance", "entropy_rest", "distance_rest"):
        assert torch.allclose(getattr(parts, field), getattr(whole, field), rtol=1e-5, atol=1e-7, equal_nan=True), field
    ids = torch.tensor(texts[0])
    assert torch.equal(torch.cat([relations(ids, slice(i, i + 4)) for i in range(0, 23, 4)], 1), relations(ids))


def test_beside_a_pattern_stands_less_than_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of nine roles on 200 tokens as float64 would take 2.9 MB, the weights of four heads take 1.3."""
    t, h = 200, 4
    pattern = torch.rand(h, t, t, dtype=torch.float64).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    visible, ids = torch.ones(t, t, dtype=torch.bool).tril(), torch.randint(30, (t,))
    most = {}
    for numbers in (2**12, 2**30):
        monkeypatch.setattr(role_scores, "AT_ONCE", numbers)
        with _Alive() as seen:
            role_scores.Tally(h, t).add(slice(0, h), pattern, visible, lambda queries: relations(ids, queries), t)
        most[numbers] = seen.most
    assert most[2**12] < pattern.nbytes / 2 and most[2**30] > 3 * pattern.nbytes


def test_targets_of_many_tokens_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[slice] = []
    plain = role_scores.relations
    monkeypatch.setattr(role_scores, "relations", lambda ids, queries: made.append(queries) or plain(ids, queries))
    model = zoo.model("gpt2")  # three layers
    kept = head_roles(model, repeats=1, length=8).scores
    assert made == [slice(0, 16)]
    made.clear()
    monkeypatch.setattr(role_scores, "AT_ONCE", 9 * 16 * 8)
    monkeypatch.setattr(role_scores, "KEPT", 9 * 16**2 - 1)
    assert torch.allclose(head_roles(model, repeats=1, length=8).scores, kept, atol=1e-6, equal_nan=True)
    assert made == [slice(0, 8), slice(8, 16)] * 3


def test_targets_of_a_repeated_row() -> None:
    found = relations(torch.tensor([9, 1, 2, 3, 1, 2, 3]))
    induction = found[RELATIONS.index("induction")].nonzero().tolist()
    assert induction == [[4, 2], [5, 3], [6, 4]]
    assert found[RELATIONS.index("duplicate")].nonzero().tolist() == [[4, 1], [5, 2], [6, 3]]
    assert found[RELATIONS.index("itself")].nonzero().tolist() == [[4, 4], [5, 5], [6, 6]]


def test_shows_itself(tmp_path: Path) -> None:
    found = head_roles(planted.planted(CIRCUIT), some_ids(30, 1))
    text = str(found)
    assert "induction" in text and "An even head gets" in text and "Heads with a role come first" in text and "Roles of 8 heads on 30 tokens of text" in text
    for suffix in ("html", "json", "csv"):  # the page draws it in light and in dark
        assert found.save(tmp_path / f"a.{suffix}").stat().st_size > 500
    assert found.to_dict()["definitions"] == DEFINITIONS


def test_the_table_of_one_role() -> None:
    found = head_roles(planted.planted(CIRCUIT), some_ids(50, 1))
    only = found.only("previous", 0.05)
    column = only.grid().columns.index("previous")
    rows = only.grid().rows
    excess = found.excess[:, ROLES.index("previous")]
    assert [r[0] for r in rows][:2] == ["0.0", "1.3"] and {r[0] for r in rows} == {h for h, e in zip(found.heads, excess.tolist(), strict=True) if e >= 0.05}
    assert [r[column] for r in rows] == sorted((r[column] for r in rows), reverse=True) and len(rows) == 3  # the local head is on the way
    assert "3 of 8 heads come at least 0.05 of the way from an even head to all weight on the target, the highest score first." in only.grid().note
    assert only.title.startswith("The role 'previous' of 8 heads") and [r[0] for r in found.only("previous").grid().rows] == ["0.0", "1.3"]
    assert [r[0] for r in found.only("uniform").grid().rows] == ["0.3"] and "at least 0.9 of the largest entropy" in found.only("uniform").grid().note
    assert "0.2" in [r[0] for r in found.only("same", 0.01).grid().rows]  # it is named by the narrower role, and comes as far in the wider one
    nothing = head_roles(planted.planted([["even", "first"]])).only("induction")
    assert nothing.grid().rows == () and "No head of 2 comes 0.5 of the way" in nothing.grid().note
    assert re.search(r"the nearest is 0\.\d with -?\S+: take a lower threshold to see it\.", nothing.grid().note)
    assert "No head can hold 'next' here (weight on the position after" in nothing.only("next").grid().note
    assert nothing.plot().axes
    with pytest.raises(InputError, match=r"'inducton' is no role"):
        found.only("inducton")
    with pytest.raises(InputError, match=r"threshold=True: it is a share"):
        found.only("induction", True)


def test_mistakes_are_named() -> None:
    model = planted.planted([["even"]])
    with pytest.raises(InputError, match=r"threshold=0: it is a share of the way from an even head"):
        head_roles(model).roles(0)
    with pytest.raises(InputError, match=r"threshold='half': it is a share"):
        head_roles(model).roles("half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"repeats='8': a whole number of at least 0 is needed"):
        head_roles(model, repeats="8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"repeats=0 and length=48: at least one row of 4"):
        head_roles(model, repeats=0)
    with pytest.raises(InputError, match=r"'inducton' is no role.*induction"):
        head_roles(model).holding("inducton")
    with pytest.raises(SiteError, match=r"Head 0\.7 was asked for, but layer 0 has 1 heads"):
        head_roles(model)["0.7"]
    short = planted.planted([["even"]], p=6)
    with pytest.raises(InputError, match=r"4 different tokens are repeated, but this model has 6 positions and 26 ordinary tokens"):
        head_roles(short)
    with pytest.raises(InputError, match="have 0 tokens"):
        head_roles(model, [[]])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glassformer.cli.app import main

    folder = tmp_path / "model"
    gf.save(zoo.model("llama"), folder)
    zoo.words().save(folder)
    (tmp_path / "text.txt").write_text("the old man saw a red fox and the dog ran home to the old man")
    assert (
        main(["look", "heads", "--model", str(folder), str(tmp_path / "text.txt"), "--role", "previous", "--threshold", "0.3", "-o", str(tmp_path / "a.svg")])
        == 0
    )
    out = capsys.readouterr().out
    assert "The role 'previous' of 12 heads on 16 tokens of text" in out and (tmp_path / "a.svg").is_file()
    assert re.search(
        r"previous: weight on the position before \(t-1\)\. (No head of 12 comes|\d+ of 12 heads come at least) 0\.3 of the way", " ".join(out.split())
    )
    for threshold, said in (("2", "--threshold 2: it is a share of the way"), ("0.4", "--threshold 0.4 says from where on a head holds a role")):
        assert main(["look", "heads", "-m", str(folder), "--threshold", threshold]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert main(["look", "heads", "-m", str(folder)]) == 0
    assert "All measured on repeated random tokens" in " ".join(capsys.readouterr().out.split())
    assert main(["look", "heads", "-m", str(folder), "novle.txt"]) == 2
    assert "There is no file 'novle.txt'" in " ".join(capsys.readouterr().err.split())
    assert main(["look", "heads", "-m", str(folder), "--role", "sink"]) == 2
    assert "'sink' is no role" in capsys.readouterr().err
