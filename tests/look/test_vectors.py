"""Embeddings: neighbours, analogies, axes and alignment, on tables made by hand and against plain loops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer import text
from glassformer.core.errors import InputError, SiteError
from glassformer.look import align, align_vectors, analogies, analogy, direction_against_axis, nearest, nearest_in_context
from glassformer.look.alignment import procrustes, relative
from look import zoo

WORDS = ["man", "woman", "king", "queen", "boy", "girl", "he", "she", "stone", "water", "fire", "tree"]


def royal(noise: float = 0.0, d: int = 16, tied: bool = True) -> tuple[Any, Any]:
    """A model whose table has a direction for 'female' across all coordinates: man + female = woman, and so on."""
    tokenizer = text.train("words", texts=[" ".join(WORDS)] * 2, vocab_size=len(WORDS) + 1)
    model = gf.Decoder(tokenizer.vocab_size, d, (zoo.block(feedforward=gf.Plain(8)),), tied=tied).build(seed=0).eval()
    draw = torch.Generator().manual_seed(3)
    table = torch.randn(tokenizer.vocab_size, d, generator=draw)
    female = torch.randn(d, generator=draw)
    at = {w: tokenizer.encode(w)[0] for w in WORDS}
    for a, b in (("man", "woman"), ("king", "queen"), ("boy", "girl"), ("he", "she")):
        table[at[b]] = table[at[a]] + female + noise * torch.randn(d, generator=draw)
    with torch.no_grad():
        model.embed.weight.copy_(table)
    return model, tokenizer


# Neighbours


@pytest.mark.parametrize("by", ["cosine", "euclid", "dot"])
def test_neighbours_are_those_of_a_loop(by: str) -> None:
    model, tokenizer = royal()
    table = model.embed.weight.detach().numpy().astype(np.float64)
    at = tokenizer.encode("king")[0]
    score = {
        "cosine": lambda v: v @ table[at] / np.linalg.norm(v) / np.linalg.norm(table[at]),
        "euclid": lambda v: -np.linalg.norm(v - table[at]),
        "dot": lambda v: v @ table[at],
    }[by]
    order = sorted((i for i in range(len(table)) if i != at), key=lambda i: -score(table[i]))
    found = nearest(model, "king", 5, by=by, tokenizer=tokenizer)
    assert found.ids.tolist() == order[:5]
    np.testing.assert_allclose(found.values.numpy(), [abs(score(table[i])) if by == "euclid" else score(table[i]) for i in order[:5]], rtol=1e-4)
    assert found.pieces[0] in str(found) and at not in found.ids
    found.plot()


def test_a_vector_of_ones_own_leaves_nothing_out_and_the_output_table_is_the_readouts() -> None:
    model, tokenizer = royal(tied=False)
    with torch.no_grad():
        model.readout.matrix.normal_(generator=torch.Generator().manual_seed(1))
    row = model.readout.matrix[4].detach()
    assert nearest(model, row, 1, table="output", tokenizer=tokenizer).ids.tolist() == [4]
    assert nearest(model, model.embed.weight[4].detach(), 1, tokenizer=tokenizer).ids.tolist() == [4]
    assert nearest(model, 4, 99).ids.shape == (11,)


def test_centring_subtracts_the_mean() -> None:
    model, tokenizer = royal()
    with torch.no_grad():
        model.embed.weight.add_(50.0)
    far, near = nearest(model, "king", 3, tokenizer=tokenizer), nearest(model, "king", 3, centre=True, tokenizer=tokenizer)
    assert float(far.values.min()) > 0.99 > float(near.values.max())


def test_a_lifted_table_is_seen_as_it_enters() -> None:
    spec = gf.Decoder(zoo.V, zoo.D, (zoo.block(),), embedding=gf.Embedding(scale=gf.SqrtWidth(), lift=gf.LiftTokens(6)), tied=False)
    model = spec.build(seed=0).eval()
    record = gf.Record("embed")
    model(torch.arange(zoo.V)[None], tap=record)
    x = record["embed"][0]
    assert nearest(model, x[3], 1, by="euclid").values.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", [n for n in zoo.SPECS if n != "t5"])
def test_neighbours_in_context_are_those_of_a_loop(name: str) -> None:
    model = zoo.model(name)
    texts = [zoo.ids(12, s) for s in range(1, 6)]
    ids = zoo.ids(9)
    site = "blocks.1.resid_post"
    found = nearest_in_context(model, ids, 4, texts, site=site, k=6, context=7)
    record = gf.Record(site)
    with torch.no_grad():
        model(torch.tensor([ids]), tap=record)
        query = record[site][0, 4]
        every = []
        for i, row in enumerate(texts):
            for start in range(0, 12, 7):
                model(torch.tensor([row[start : start + 7]]), tap=record)
                every += [(float(torch.cosine_similarity(v, query, dim=0)), i, start + t) for t, v in enumerate(record[site][0])]
    every.sort(reverse=True)
    np.testing.assert_allclose(found.values.numpy(), [e[0] for e in every[:6]], rtol=1e-4, atol=1e-5)
    assert (found.contexts[0].text, found.contexts[0].position) == every[0][1:]
    assert found.tokens == 60 and "cosine" in str(found)


def test_neighbours_in_context_of_an_encoder_decoder() -> None:
    model, source = zoo.model("t5"), zoo.ids(6, 1)
    texts = [zoo.ids(9), zoo.ids(9, 5)]
    found = nearest_in_context(model, zoo.ids(9), 3, texts, site="blocks.1.resid_post", k=1, source=source)
    assert (found.contexts[0].text, found.contexts[0].position) == (0, 3)
    assert found.values.item() == pytest.approx(1, abs=1e-5)


# Analogies


def test_a_planted_analogy_is_answered_with_and_without_its_inputs() -> None:
    model, tokenizer = royal()
    found = analogy(model, "king", "man", "woman", 3, tokenizer=tokenizer)
    assert found.excluded[0] == "queen" and set(found.words).isdisjoint(found.excluded)
    unit = torch.nn.functional.normalize(model.embed.weight.detach(), dim=1)
    at = {w: tokenizer.encode(w)[0] for w in WORDS}
    query = unit[at["king"]] - unit[at["man"]] + unit[at["woman"]]
    best = (unit @ query / query.norm()).topk(3)
    assert found.included_ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(found.included_values, best.values)
    assert "inputs allowed" in str(found)
    found.plot(dark=True)


def test_a_table_without_relations_answers_with_its_inputs() -> None:
    """In a random table the inputs themselves lie nearest: what the exclusion hides."""
    model = gf.Decoder(zoo.V, 128, (zoo.block(feedforward=gf.Plain(8)),)).build(seed=0).eval()
    for a, b, c in ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)):
        found = analogy(model, a, b, c, 2)
        assert set(found.included_ids.tolist()) == {a, c}
        assert not {a, b, c} & set(found.excluded_ids.tolist())


def test_a_file_of_questions_is_counted_rule_by_rule(tmp_path: Path) -> None:
    model, tokenizer = royal()
    pairs = [("man", "woman"), ("king", "queen"), ("boy", "girl"), ("he", "she")]
    lines = [": family"] + [f"{a} {b} {c} {d}" for a, b in pairs for c, d in pairs if a != c] + [": unknown", "man woman emperor empress"]
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(lines))
    found = analogies(model, file, tokenizer=tokenizer)
    assert found.categories == ("family", "unknown", "all") and found.asked == (12, 0, 12) and found.given == (12, 1, 13)
    right = dict.fromkeys(found.rules, 0)
    for line in lines[1:13]:
        b, a, c, d = line.split()
        one = analogy(model, a, b, c, 1, tokenizer=tokenizer)
        right["a - b + c"] += one.excluded[0] == d
        right["inputs allowed"] += one.included[0] == d
        right["only c"] += one.nearest_to_c[0] == d
    for rule in ("a - b + c", "inputs allowed", "only c"):
        assert found[rule] == pytest.approx(right[rule] / 12)
    assert found["a - b + c"] > 0.9 > found["b - a + c"]
    assert "unknown" not in str(found)
    found.plot()


# Axis or direction


def pairs_along(direction: torch.Tensor, n: int = 40, noise: float = 0.2, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    d = len(direction)
    first = torch.randn(n, d, generator=draw)
    return torch.stack([first, first + direction + noise * torch.randn(n, d, generator=draw)], 1)


def test_a_feature_along_one_axis_and_one_across_all_are_told_apart() -> None:
    d = 32
    axis = torch.zeros(d)
    axis[9] = -3.0
    one = direction_against_axis(None, pairs_along(axis))
    assert one.best == 9
    assert one.share[1] > 0.8 and one.share[1] > 3 * one.share[2]
    assert one.sides[0] == one.sides[1] == 1
    spread = direction_against_axis(None, pairs_along(torch.full((d,), 3.0 / d**0.5)))
    assert spread.share[0] > 0.8 > 0.3 > spread.share[1]
    assert spread.share[3] < 0.15
    assert one.projections.shape == (40, 2) and "best coordinate, turned" in str(one)
    one.plot()


def test_pairs_without_a_feature_are_at_chance() -> None:
    none = direction_against_axis(None, pairs_along(torch.zeros(32), n=200, noise=1.0))
    assert float(none.sides[0]) == pytest.approx(0.5, abs=0.12)
    assert float(none.share[0]) < 0.06


def test_words_are_looked_up_in_the_table() -> None:
    model, tokenizer = royal()
    found = direction_against_axis(model, [("man", "woman"), ("king", "queen"), ("boy", "girl"), ("he", "she")], tokenizer=tokenizer, folds=4)
    assert float(found.share[0]) == pytest.approx(1, abs=1e-4) and found.pairs == 4


# Two spaces


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_a_planted_rotation_is_recovered() -> None:
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = rotation(12)
    torch.testing.assert_close(procrustes(x, x @ r), r)
    found = align_vectors(x, 2 * x @ r + 5)
    assert found["Procrustes"] == 1 and found["relative"] == 1 and found.overlap == pytest.approx(1)
    assert max(found["as they are"], found["Procrustes, wrong pairs"], found["relative, wrong pairs"]) < 0.15
    torch.testing.assert_close(found.rotation.double(), r, atol=1e-5, rtol=0)
    assert (found.learnt_on, found.measured_on) == (240, 60)
    found.plot()


def test_unrelated_spaces_are_at_chance() -> None:
    draw = torch.Generator().manual_seed(1)
    found = align_vectors(torch.randn(400, 8, generator=draw), torch.randn(400, 11, generator=draw))
    assert "as they are" not in found.ways and float(found.accuracy.max()) < 0.08 and found.rotation.shape == (8, 11)


def test_relative_representations_do_not_see_a_rotation() -> None:
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(relative(x, x[:7]), relative(3 * x @ rotation(10), x[:7] @ rotation(10)))


def test_two_models_are_compared_on_the_words_they_share() -> None:
    tokenizer = zoo.words()
    a, b = zoo.model("gpt2"), zoo.model("llama")
    with torch.no_grad():
        b.embed.weight.copy_(a.embed.weight @ rotation(zoo.D).float())
    found = align(a, b, tokenizers=(tokenizer, tokenizer), train=0.7)
    assert found["Procrustes"] == 1
    assert found.learnt_on + found.measured_on == tokenizer.vocab_size - len(tokenizer.special)
    words = [w for w in dict.fromkeys(zoo.WORDS) if w != ","]
    assert align(a, a, words, tokenizers=(tokenizer, tokenizer))["as they are"] == 1


# Mistakes


MISTAKES: list[tuple[Any, str]] = [
    (lambda m, t: nearest(m, "emperor queen", tokenizer=t), "'emperor queen' is no token of this vocabulary"),
    (lambda m, t: nearest(m, "king"), "there is no tokenizer to read it"),
    (lambda m, t: nearest(m, 99), "Token id 99 was asked about"),
    (lambda m, t: nearest(m, 1, 0), "k=0: a whole number of at least 1 is needed"),
    (lambda m, t: nearest(m, 1, by="angle"), "'angle' is no measure of nearness"),
    (lambda m, t: nearest(m, 1, table="middle"), "'middle' is no table of vectors"),
    (lambda m, t: nearest(m, torch.zeros(3)), "The vector has shape (3,), but the rows of the input table have 16 numbers"),
    (lambda m, t: analogy(m, 1, 2, 3, 0), "k=0: a whole number of at least 1 is needed"),
    (lambda m, t: analogies(m, [["man", "king", "woman"]], tokenizer=t), "Line 1 of the questions has 3 words (man king woman), but a question has 4"),
    (lambda m, t: analogies(m, [["a", "b", "c", "d"]], tokenizer=t), "None of the 1 questions has four words of one token"),
    (lambda m, t: analogies(m, []), "there is no tokenizer to read them"),
    (lambda m, t: analogies(m, [], tokenizer=t), "There is no question"),
    (lambda m, t: direction_against_axis(m, [(1, 2), (3, 4)]), "2 pairs were given"),
    (lambda m, t: direction_against_axis(m, [(1, 2, 3)]), "(1, 2, 3) is no pair"),
    (lambda m, t: direction_against_axis(None, torch.zeros(5, 3)), "The pairs are a tensor of shape (5, 3)"),
    (lambda m, t: direction_against_axis(m, [(1, 2)] * 5, folds=1), "folds=1: lines are learnt on some pairs"),
    (lambda m, t: align(m, m, ["man", "woman"], tokenizers=(t, t)), "The two models have 2 words in common, but at least 20 are needed"),
    (lambda m, t: align(m, m), "a model has no tokenizer"),
    (lambda m, t: align_vectors(torch.zeros(3, 2), torch.zeros(4, 2)), "The vectors have shapes (3, 2) and (4, 2)"),
    (lambda m, t: align_vectors(torch.zeros(9, 2), torch.zeros(9, 2), train=0.99), "train=0.99 of 9 rows leaves 9 to learn on and 0"),
    (lambda m, t: align_vectors(torch.zeros(9, 2), torch.zeros(9, 2), anchors=0), "anchors=0: a whole number of at least 1 is needed"),
    (lambda m, t: nearest(m, torch.full((16,), torch.nan)), "The vector holds numbers that are not finite"),
    (lambda m, t: nearest_in_context(m, [1, 2], 0, [[1, 2]], k=-1), "k=-1: a whole number of at least 1 is needed"),
    (lambda m, t: nearest_in_context(m, [1, 2], 0, [[1, 2]], around=-1), "around=-1: a whole number of at least 0"),
    (lambda m, t: nearest_in_context(m, [1, 2], 0, [[1, 2]], site="blocks.0.attn.pattern"), "one vector for each token is read here: choose a site b t d"),
    (lambda m, t: nearest_in_context(m, [1, 2], 0, [[1, 2]], site=["embed", "resid_final"]), "meets 2 sites, but vectors of one are compared"),
    (lambda m, t: analogies(m, 5, tokenizer=t), "5 is no question"),
    (lambda m, t: analogies(m, [5], tokenizer=t), "5 is no question"),
    (lambda m, t: analogies(m, [[1, 2, 3, 4]], tokenizer=t), "1 is no question: a question is four words"),
    (lambda m, t: direction_against_axis(m, 5), "pairs is a whole number, but a list of pairs of words is read"),
    (lambda m, t: direction_against_axis(m, [1, 2, 3, 4]), "1 is no pair"),
    (lambda m, t: direction_against_axis(m, [(1, 2)] * 5, turns=0), "turns=0: a whole number of at least 1 is needed"),
    (lambda m, t: direction_against_axis(None, torch.full((5, 2, 3), torch.inf)), "The pairs hold numbers that are not finite"),
    (lambda m, t: align(m, m, "king", tokenizers=(t, t)), "words is a text, but a list of words is read"),
    (lambda m, t: align(m, m, most=0, tokenizers=(t, t)), "most=0: a whole number of at least 1 is needed"),
    (lambda m, t: align(m, m, ["king", " king"] * 20, tokenizers=(t, t)), "have 1 words in common"),
    (lambda m, t: align_vectors([1], [2]), "Two tensors of vectors are compared, but a list and a list were given"),
    (lambda m, t: align_vectors(torch.zeros(9, 2), torch.zeros(9, 2), train=float("nan")), "train=nan: it is the share of the rows that is learnt on"),
    (lambda m, t: align_vectors(torch.zeros(9, 2), torch.full((9, 2), torch.nan)), "The vectors hold numbers that are not finite"),
    (lambda m, t: analogies(m, [["man", "woman", "king", "queen"]], tokenizer=t)["sum"], "'sum' is no rule. Known: a - b + c"),
]


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_mistakes_are_told(case: int) -> None:
    call, said = MISTAKES[case]
    with pytest.raises((InputError, SiteError)) as caught:
        call(*royal())
    assert any(part in str(caught.value) for part in said.split("|")), caught.value


def test_a_model_without_logits_has_no_output_table() -> None:
    model = zoo.SPECS["bert"].replace(readout=gf.Vector()).build(seed=0)
    with pytest.raises(InputError, match="The output table asks for scores over the vocabulary, but this model ends in Vector"):
        nearest(model, 3, table="output")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from glassformer.cli import app as cli
    from glassformer.weights import own

    monkeypatch.chdir(tmp_path)
    model, tokenizer = royal()
    own.save(model, "model")
    tokenizer.save("model")
    Path("questions.txt").write_text("man woman king queen\nking queen boy girl\n")
    Path("pairs.txt").write_text("man woman\nking\tqueen\nboy girl\nhe she\n")
    Path("text.txt").write_text("man king water she")

    def ran(*arguments: str) -> str:
        assert cli.main(["look", "embeddings", *arguments]) == 0
        return capsys.readouterr().out

    assert "Nearest to king in the input table, by euclid" in ran("nearest", "king", "--model", "model", "--by", "euclid", "-k", "3")
    assert "queen" in ran("analogy", "king", "man", "woman", "--model", "model", "--out", "a.csv")
    assert "2 of 2 questions" in ran("analogies", "questions.txt", "--model", "model")
    assert "differences of 4 pairs" in ran("axis", "pairs.txt", "--model", "model", "--folds", "2")
    assert "among 4 tokens" in ran("nearest", "king", "--model", "model", "--text", "he king tree", "--file", "text.txt", "--site", "embed")
    assert cli.main(["look", "embeddings", "nearest", "king", "--model", "model", "--text", "he king"]) == 2
    assert re.search("--text and --file go together", capsys.readouterr().err)
    assert cli.main(["look", "embeddings", "align", "--model", "model", "--other", "model"]) == 2
    assert "have 12 words in common" in re.sub(r"\s+", " ", capsys.readouterr().err)
