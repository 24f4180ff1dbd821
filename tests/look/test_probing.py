"""Probes: what was planted is found, what is random is not, and nothing of a test text is seen in fitting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look import probe, probe_norm, probe_order, probe_position_back
from glassformer.look.fitting import RIDGE, Ridge, folds_of, logistic, predicted, scores_by_fold, splits
from look import zoo

TEXTS = [zoo.ids(14, s) for s in range(24)]


def flat(d: int = 32, **changes: Any) -> Any:
    """A decoder with a table of unit vectors, so that every function of a token can be read linearly from its embedding."""
    model = gf.Decoder(zoo.V, d, (zoo.block(feedforward=gf.Plain(8), **changes),) * 2, final_norm=gf.LayerNorm()).build(seed=0).eval()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(d)[: zoo.V])
    return model


def gaussian(n: int = 300, d: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    return x, (x @ torch.randn(d, classes, generator=draw)).argmax(1), torch.arange(n) // 5


# The fits


def test_logistic_regression_is_the_minimum_of_its_loss() -> None:
    x, y, _ = gaussian()
    (fit,) = list(logistic(x.double(), y, 3, (1e-2,)))
    w = fit.w.clone().requires_grad_()  # type: ignore[attr-defined]
    b = fit.b.clone().requires_grad_()  # type: ignore[attr-defined]
    loss = torch.nn.functional.cross_entropy(x.double() @ w + b, y) + 0.5e-2 * w.square().sum()
    gradients = torch.autograd.grad(loss, (w, b))
    assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_ridge_is_the_solution_of_its_normal_equations() -> None:
    x, _, _ = gaussian()
    x = x - x.mean(0)
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(1))
    for s in (1.0, 1e-3):
        direct = torch.linalg.solve(x.T.double() @ x.double() / len(x) + s * torch.eye(6).double(), x.T.double() @ (y - y.mean(0)).double() / len(x))
        torch.testing.assert_close(Ridge(x, y).weights(s), direct, rtol=1e-4, atol=1e-5)
    assert len(RIDGE) > 4


def test_a_text_is_in_one_fold_and_a_strength_is_chosen_within_the_training_fold() -> None:
    groups = torch.tensor([5, 5, 2, 2, 9, 9, 1, 1, 0, 0, 7, 7])
    fold = folds_of(groups, 3, 0)
    assert fold.bincount().tolist() == [4, 4, 4]
    for train, test, fit, held in splits(fold, groups, 0):
        assert not set(groups[train].tolist()) & set(groups[test].tolist())
        assert not set(groups[fit].tolist()) & set(groups[held].tolist())
        assert sorted([*fit.tolist(), *held.tolist()]) == train.tolist()
    labels = torch.tensor([0] * 6 + [1] * 3)
    balanced = folds_of(torch.arange(9), 3, 0, labels)
    assert all((labels[balanced == f] == 0).sum() == 2 for f in range(3))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_is_linear_is_learnt_and_what_is_random_is_not(kind: str) -> None:
    x, y, groups = gaussian()
    fold = folds_of(groups, 3 if kind == "linear" else 2, 0)
    right = scores_by_fold(predicted(x, y, 3, fold, groups, kind, 0), y, fold, 3)
    assert float(right.mean()) > 0.9
    random = torch.randint(3, y.shape, generator=torch.Generator().manual_seed(5))
    assert float(scores_by_fold(predicted(x, random, 3, fold, groups, kind, 0), random, fold, 3).mean()) == pytest.approx(1 / 3, abs=0.1)
    number = x[:, 0] * 3 + 7
    assert float(scores_by_fold(predicted(x, number, 0, fold, groups, kind, 0), number, fold, 0).mean()) > 0.95


def test_an_mlp_learns_what_no_linear_probe_can() -> None:
    x, _, groups = gaussian(400, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    fold = folds_of(groups, 2, 0)
    linear, mlp = (float(scores_by_fold(predicted(x, y, 2, fold, groups, k, 0), y, fold, 2).mean()) for k in ("linear", "mlp"))
    assert linear < 0.65 < 0.9 < mlp


# Probes of models


def test_a_label_of_the_token_is_read_and_so_is_its_control() -> None:
    """Both are functions of the token: the probe remembers words, and the selectivity says so."""
    labels = [["odd" if i % 2 else "even" for i in t] for t in TEXTS]
    found = probe(flat(), TEXTS, labels, ["embed"], folds=3)
    assert found.sites == ("embed",) and found.classes == ("even", "odd") and found.examples == 24 * 14 and found.texts == 24
    assert found["embed"] > 0.97 and float(found.control.mean()) > 0.9
    assert abs(float(found.selectivity)) < 0.1
    assert int(found.confusion.sum()) == found.examples
    assert float(found.confusion[0].diagonal().sum()) / found.examples == pytest.approx(found["embed"], abs=0.02)


def test_random_labels_are_at_chance_and_a_run_is_repeated_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = [torch.randint(2, (14,), generator=draw) for _ in TEXTS]
    found, again = (probe(zoo.model("gpt2"), TEXTS, labels, "blocks.{0,2}.resid_post", folds=3, seed=4) for _ in range(2))
    assert found.accuracy.shape == (2, 3)
    assert abs(float(found.accuracy.mean()) - 0.5) < 0.08
    assert torch.equal(found.accuracy, again.accuracy) and torch.equal(found.control, again.control)


def test_what_only_the_context_tells_is_read_above_attention_alone() -> None:
    """A label of the token before: nothing in the embedding tells it, an attention layer that looks one place back does."""
    model = zoo.model("sigmoid")
    labels = [[None, *(i % 2 for i in t[:-1])] for t in TEXTS]
    found = probe(model, TEXTS, labels, ["embed", "blocks.0.resid_post"], folds=3, control=False)
    assert found.examples == 24 * 13
    assert found["embed"] < 0.65
    assert found.control.isnan().all() and found.best in found.sites


@pytest.mark.parametrize("name", list(zoo.SPECS))
def test_every_kind_of_model_is_probed(name: str) -> None:
    model = zoo.model(name)
    options = {"source": zoo.ids(6, 1)} if name == "t5" else {}
    found = probe(model, TEXTS[:9], [[i % 3 for i in t] for t in TEXTS[:9]], "blocks.1.resid_post", folds=3, control=False, **options)
    assert found.sites == ("blocks.1.resid_post",)
    assert found.accuracy.isfinite().all() and float(found.accuracy.min()) >= 0


def test_a_number_per_text_and_its_pools() -> None:
    texts = [zoo.ids(8 + s % 3, s) for s in range(40)]
    shares = [sum(i == 3 or i == 5 for i in t) / len(t) for t in texts]
    found = probe(flat(), texts, shares, "embed", per="text", folds=4, pool="mean")
    assert found.measure == "R²" and found["embed"] > 0.9 and float(found.control.mean()) < 0.3
    first = probe(flat(), texts, [t[0] for t in texts], "embed", per="text", folds=2, pool="first", control=False)
    last = probe(flat(), texts, [t[-1] for t in texts], "embed", per="text", folds=2, control=False)
    assert first.examples == last.examples == 40
    found.plot()


def test_words_are_read_at_their_last_token() -> None:
    from glassformer.look.features import examples_of
    from glassformer.look.windows import Reading

    tokenizer = gf.text.train("characters", texts=["abcdefgh "] * 2)
    model = gf.Decoder(tokenizer.vocab_size, 16, (zoo.block(),)).build(seed=0).eval()
    texts = ["abc de f", "gh a", "ab b"]
    reading = Reading(model, texts, tokenizer)
    got = examples_of(reading, ["embed"], [["x", None, "z"], ["p", "q"], ["r", "s"]], "word", "last")
    expected = [tokenizer.encode(c)[0] for c in "cfhabb"]
    torch.testing.assert_close(got.x["embed"], model.embed.weight.detach()[expected])
    assert got.labels == list("xzpqrs") and got.types == ["abc", "f", "gh", "a", "ab", "b"] and got.groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_equal_texts_stay_together() -> None:
    found = probe(flat(), [TEXTS[0], TEXTS[0], *TEXTS[1:5]], [[i % 2 for i in t] for t in (TEXTS[0], TEXTS[0], *TEXTS[1:5])], "embed", folds=3)
    assert found.texts == 5


def test_numbers_of_numpy_are_numbers() -> None:
    labels = np.arange(24, dtype=np.float32) / 24
    assert probe(flat(), TEXTS, labels, "embed", per="text", folds=2, control=False).measure == "R²"
    assert probe(flat(), TEXTS, list(labels), "embed", per="text", folds=2, control=False).measure == "R²"


# Probes without labels


def test_equal_windows_are_one_group() -> None:
    """Texts that stand there twice are not learnt on in one fold and asked about in another; the last, cut short, belongs to the one it begins."""
    from glassformer.look.readable import _groups, _rows
    from glassformer.look.windows import Reading

    a, b, c = TEXTS[:3]
    reading = Reading(flat(), [a, b, a, c, b[:9]])
    got = _rows(reading, ["embed"], 2)
    assert [int(got.group[got.window == w].unique()) for w in range(5)] == [0, 1, 0, 2, 1]
    assert _groups([(1, 2), (1,), (3,)]).tolist() == [0, 1, 2]  # only the last is cut short


def test_the_token_itself_is_read_and_the_one_before_is_not_from_the_embedding() -> None:
    found = probe_position_back(flat(), None, (0, 1), site="embed", context=16, tokens=1600, folds=2)
    assert found["embed", 0] > 0.99
    assert found["embed", 1] < 0.12
    assert (found.candidates == zoo.V and "places back" not in found.title) or "k places back" in found.title
    found.plot(dark=True)


def test_a_copying_head_makes_the_token_before_readable() -> None:
    """A planted head attends to the place before (by positions) and copies what stands there into coordinates of its own."""
    d = 96
    spec = gf.Decoder(
        zoo.V, d, (gf.Block(attention=gf.Attention(1), feedforward=gf.Plain(4), norm=gf.NoNorm()),), final_norm=gf.NoNorm(), position=gf.Learned(16)
    )
    model = spec.build(seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[:, : zoo.V] = torch.eye(zoo.V)
        model.position.table[:, 64:80] = torch.eye(16)
        attn: Any = model.blocks[0].attn
        for t in range(1, 16):
            attn.qkv.weight[t, 64 + t] = 200.0  # the query of place t is the key of place t - 1
            attn.qkv.weight[d + t, 64 + t - 1] = 5.0
        for v in range(zoo.V):
            attn.qkv.weight[2 * d + v, v] = 1.0
            attn.out.weight[32 + v, v] = 1.0
    found = probe_position_back(model, None, (1, 2), context=16, tokens=1600, folds=2)
    assert found["embed", 1] < 0.12
    assert found["blocks.0.resid_post", 1] > 0.95 > 0.12 > found["blocks.0.resid_post", 2]


def test_places_are_read_where_positions_are_put_in() -> None:
    model = zoo.model("gpt2")
    with torch.no_grad():
        model.position.table[:, 0] = torch.arange(64) / 2
    found = probe_order(model, [zoo.ids(16, s) for s in range(40)], site=["embed", "blocks.0.resid_pre"], folds=2, context=16, within=4)
    position, order = found.position.mean(-1), found.order.mean(-1)
    assert found.sites == ("embed", "blocks.0.resid_pre") and float(position[0]) < 0.1 and abs(float(order[0]) - 0.5) < 0.12
    assert float(position[1]) > 0.6 and float(order[1]) > 0.75
    found.plot()


def test_a_layer_norm_takes_the_mean_away_and_the_stream_has_it() -> None:
    texts = [zoo.ids(12, s) for s in range(30)]
    found = probe_norm(zoo.model("gpt2"), texts, target="mean", folds=2, context=12)
    assert found.layers == (0, 1, 2) and float(found.stream.min()) > 0.999
    assert float(found.normed.mean(-1).max()) < 0.99
    bare = probe_norm(zoo.model("bert"), texts, folds=2, context=12)  # post-norm: attention reads the stream as it is
    torch.testing.assert_close(bare.stream, bare.normed)
    found.plot()
    assert "behind the norm" in str(found)


# Mistakes


EVEN = [[i % 2 for i in t] for t in TEXTS]
MISTAKES: list[tuple[Any, str]] = [
    (lambda m: probe(m, TEXTS, EVEN[:3]), "There are 24 texts but labels for 3"),
    (lambda m: probe(m, TEXTS, [[0]] * 24), "Text 0 has 14 tokens but 1 labels"),
    (lambda m: probe(m, TEXTS, [1] * 24), "The labels of text 0 are 1, but per='token' takes a list"),
    (lambda m: probe(m, TEXTS, [[0] * 14] * 24), "labels are 0: a probe tells at least 2 classes apart"),
    (lambda m: probe(m, TEXTS, [[0.5] * 14] * 24), "labels are 0.5 or not finite"),
    (lambda m: probe(m, TEXTS, [[0.5, "a"] * 7] * 24), "Some labels are numbers, but 'a' is none"),
    (lambda m: probe(m, TEXTS, [[None] * 14] * 24), "No label stands at a token that was read"),
    (lambda m: probe(m, TEXTS[:3], EVEN[:3]), "5 folds need at least 5 different texts, but there are 3"),
    (lambda m: probe(m, TEXTS, EVEN, folds=1), "folds=1: a probe is fitted on some texts and tested on others"),
    (lambda m: probe(m, TEXTS, EVEN, kind="cubic"), "'cubic' is no kind of probe"),
    (lambda m: probe(m, TEXTS, EVEN, per="line"), "'line' is no place of labels"),
    (lambda m: probe(m, TEXTS, EVEN, per="word"), "Text 0 is no text with a tokenizer"),
    (lambda m: probe(m, TEXTS, EVEN, "blocks.0.attn.pattern"), "'blocks.0.attn.pattern' has the axes 'b h t s'"),
    (lambda m: probe(m, TEXTS, [[[0]] * 14] * 24), "A label is a text or a number, but [0] was given"),
    (lambda m: probe(m, TEXTS, {0: 1}), "labels is a dict, but a list is read, with a list of labels for each text"),
    (lambda m: probe(m, [Path("a.txt")] * 24, EVEN), "A file may hold many texts"),
    (lambda m: probe(m, TEXTS, EVEN, 3), "site=3 names no site"),
    (lambda m: probe(m, TEXTS, EVEN, []), "site=[] names no site"),
    (lambda m: probe(m, TEXTS, EVEN, folds="5"), "folds='5': a probe is fitted on some texts"),
    (lambda m: probe_position_back(m, TEXTS, 1.5), "back=1.5: places back are whole numbers"),
    (lambda m: probe_position_back(m, TEXTS, context="9"), "context='9': a whole number of at least 1 is needed"),
    (lambda m: probe_norm(m, TEXTS, skip=-1), "skip=-1: a whole number of at least 0 is needed"),
    (lambda m: probe_order(m, [TEXTS[0]] * 9), "5 folds need at least 5 different windows, but the texts make 1 of 64 tokens"),
    (lambda m: probe(m, TEXTS, EVEN, "blocks.7.resid_post"), "meets no site of this model"),
    (lambda m: probe(m, TEXTS, EVEN, "blocks.0.attn.z[1]"), "picks heads, but whole vectors are read here"),
    (lambda m: probe(m, TEXTS[0], EVEN), "give a list of texts, with labels for each"),
    (lambda m: probe(m, TEXTS[:6], EVEN[:6], "blocks.0.resid_pre", folds=2, control=False)["embed"], "'embed' was not probed"),
    (lambda m: probe_position_back(m, TEXTS, (-1,)), "back=(-1,): places back are whole numbers from 0"),
    (lambda m: probe_position_back(m, TEXTS, 20, context=16), "windows have 16 tokens: give a larger context"),
    (lambda m: probe_position_back(m, TEXTS, 15, context=16), "No window has 15 tokens before another"),
    (lambda m: probe_order(m, TEXTS[:2]), "5 folds need at least 5 different windows, but the texts make 2"),
    (lambda m: probe_order(m, TEXTS, within=0), "within=0: two tokens of a pair are at least 1 apart"),
    (lambda m: probe_norm(m, TEXTS, target="length"), "'length' is no number of a vector"),
    (lambda m: probe_norm(m, TEXTS, skip=50), "skip=50 leaves no token"),
]


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_mistakes_are_told(case: int) -> None:
    call, said = MISTAKES[case]
    with pytest.raises((InputError, SiteError), match=re.escape(said)):
        call(zoo.model("gpt2"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import app as cli
    from glassformer.weights import own

    monkeypatch.chdir(tmp_path)
    own.save(zoo.model("gpt2"), "model")
    zoo.words().save("model")
    sentences = ["the old man saw", "a red fox", "the dog ran home", "John gave Tom", "Mary said it", "one big dog"]
    Path("texts.tsv").write_text("".join(f"{'ab'[i % 2]}\t{s}\n" for i, s in enumerate(sentences)))
    Path("words.tsv").write_text("".join(f"{' '.join('xy'[len(w) % 2] for w in s.split())}\t{s}\n" for s in sentences))
    Path("numbers.tsv").write_text("".join(f"{i / 2}\t{s}\n" for i, s in enumerate(sentences)))
    Path("plain.txt").write_text("\f".join(sentences * 3))
    Path("tree.conllu").write_text("\n".join(
        "".join(f"{n}\t{w}\t_\t{'NX'[len(w) % 2]}\t_\t_\t0\tdep\t_\t_\n" for n, w in enumerate(s.split(), 1)) for s in sentences
    ))  # fmt: skip

    def ran(*arguments: str) -> str:
        assert cli.main(["look", "probe", *arguments, "--model", "model", "--folds", "2"]) == 0
        return capsys.readouterr().out

    assert "probe for 2 labels per text: 6 examples" in ran("texts.tsv", "--site", "blocks.*.resid_post", "--out", "probe.png")
    assert Path("probe.png").exists()
    assert "per word: 20 examples" in ran("words.tsv", "--per", "word", "--no-control")
    assert "a number per text" in ran("numbers.tsv", "--numbers", "--site", "embed")
    assert "probe for 2 labels per word: 20 examples" in ran("tree.conllu", "--site", "embed")
    assert "Place and order" in ran("plain.txt", "--what", "order")
    assert cli.main(["look", "probe", "plain.txt", "--model", "model"]) == 2
    assert "is no label and text parted by a tab" in re.sub(r"\s+", " ", capsys.readouterr().err)
