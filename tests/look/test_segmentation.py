"""Tokenizers opened: the trail ends where the tokenizer ends, and each step is one that the algorithm takes."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import glassformer as gf
from glassformer import text as texts
from glassformer.cli import app as cli
from glassformer.core.errors import InputError, TokenizerError
from glassformer.look import Edge, Match, Merge, segment

CORPUS = ["the wanderer and the unhappy companion wandered and wandered , unhappily happy in the companionable land of the dead"] * 4
KINDS = ("bpe", "unigram", "wordpiece", "words", "characters", "bytes")


@lru_cache
def tokenizer(kind: str) -> gf.Tokenizer:
    special = ("<|end|>",) if kind in ("bpe", "unigram") else ()
    return texts.train(kind, texts=CORPUS, vocab_size={"bpe": 300, "bytes": None}.get(kind, 90), min_frequency=1, special=special)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trail_ends_with_the_tokens(kind: str) -> None:
    text = "the unhappy wanderer and the dead"
    found = segment(tokenizer(kind), text)
    assert [i for w in found.words for i in w.ids] == tokenizer(kind).encode(text)
    assert [o for w in found.words for o in w.offsets] == [(p.start, p.end) for p in tokenizer(kind).offsets(text)]


@given(st.text(st.sampled_from("the wandru hapy,cmoi \nXé’😀"), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_any_text_is_followed(kind: str, text: str) -> None:
    found = segment(tokenizer(kind), text)
    assert [i for w in found.words for i in w.ids] == tokenizer(kind).encode(text)


def test_bpe_joins_the_pair_that_was_learnt_first() -> None:
    model = json.loads(tokenizer("bpe").library.to_str())["model"]
    ranks = {tuple(m): i for i, m in enumerate(model["merges"])}
    word = next(w for w in segment(tokenizer("bpe"), "a wandered").words if len(w.steps) > 3)
    pieces = list(word.text)
    for step in word.steps:
        assert isinstance(step, Merge)
        known = [ranks[pair] for pair in itertools.pairwise(pieces) if pair in ranks]
        assert step.rank == min(known)
        at = next(i for i in range(len(pieces) - 1) if ranks.get((pieces[i], pieces[i + 1])) == step.rank)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    assert not any(pair in ranks for pair in itertools.pairwise(pieces)), "a merge was left undone"


def test_unigram_takes_the_best_of_all_paths() -> None:
    word = max(segment(tokenizer("unigram"), "wandered").words, key=lambda w: len(w.text))
    edges = [e for e in word.steps if isinstance(e, Edge)]

    def paths(at: int) -> list[list[Edge]]:
        return [[]] if at == len(word.text) else [[e, *rest] for e in edges if e.start == at for rest in paths(e.end)]

    sums = sorted((math.fsum(e.score for e in p) for p in paths(0)), reverse=True)
    assert math.fsum(e.score for e in edges if e.taken) == pytest.approx(sums[0])
    assert f"the best of all paths: {sums[0]:.2f}; the next one {sums[1]:.2f}" == word.note


def test_wordpiece_takes_the_longest_that_fits() -> None:
    vocabulary = json.loads(tokenizer("wordpiece").library.to_str())["model"]["vocab"]
    (word,) = segment(tokenizer("wordpiece"), "unhappily").words
    for step in word.steps:
        assert isinstance(step, Match)
        assert step.piece in vocabulary
        prefix = "##" if step.start else ""
        longer = [prefix + word.text[step.start : end] for end in range(len(word.text), step.start + len(step.piece) - len(prefix), -1)]
        assert len(longer) == step.tried
        assert not any(piece in vocabulary for piece in longer)
    (unknown,) = segment(tokenizer("wordpiece"), "wandq9").words
    assert unknown.note == "no piece fits the rest, so the whole word is unknown"
    assert unknown.pieces == ("[UNK]",)


def test_special_tokens_are_tokens_of_their_own() -> None:
    found = segment(tokenizer("bpe"), "the end<|end|>the")
    assert [w.note for w in found.words if w.text == "<|end|>"] == ["a token of its own"]


@pytest.mark.parametrize(
    "marks", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}, {"single_word": True, "lstrip": True}]
)
@given(st.lists(st.sampled_from(["<|end|>", " ", "  ", "\n", "the", "dead", "."]), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_special_tokens_that_take_the_space_beside_them(marks: dict[str, bool], parts: list[str]) -> None:
    made = marked(tuple(marks.items()))
    found = segment(made, "".join(parts))
    assert [i for w in found.words for i in w.ids] == made.encode("".join(parts))
    assert [o for w in found.words for o in w.offsets] == [(p.start, p.end) for p in made.offsets("".join(parts))]


@lru_cache
def marked(marks: tuple[tuple[str, bool], ...]) -> gf.Tokenizer:
    """The same tokenizer, whose special token has these marks."""
    config = json.loads(tokenizer("bpe").library.to_str())
    config["added_tokens"] = [{**t, **dict(marks)} for t in config["added_tokens"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return gf.Tokenizer.load(path)


def test_a_special_token_takes_its_space_along() -> None:
    found = segment(marked((("lstrip", True), ("rstrip", True))), "the  <|end|> dead")
    assert [w.text for w in found.words if w.note] == ["  <|end|> "]
    whole = segment(marked((("single_word", True),)), "the<|end|>dead")
    assert not any(w.note == "a token of its own" for w in whole.words)


def test_what_is_said_and_drawn(tmp_path) -> None:
    for kind in ("bpe", "unigram", "wordpiece"):
        found = segment(tokenizer(kind), "the wandered <land>")
        assert found.title in str(found)
        for name in ("a.png", "a.svg", "a.html", "a.json", "a.csv"):
            assert found.save(tmp_path / f"{kind}.{name}").stat().st_size > 200
    assert "rank" in str(segment(tokenizer("bpe"), "the"))


def test_errors() -> None:
    with pytest.raises(InputError, match="The text is empty, so no word of it can be followed: give some text."):
        segment(tokenizer("bpe"), "")
    with pytest.raises(InputError, match="segment\\(tokenizer, text\\) opens a tokenizer"):
        segment("no tokenizer", "text")  # type: ignore[arg-type]


def test_a_cut_that_is_not_followed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassformer.look.segmentation._words", lambda library, config, text: [("wand", None)])
    with pytest.raises(TokenizerError, match="it cuts in a way that is not followed"):
        segment(tokenizer("bpe"), "the dead")
    with pytest.raises(TokenizerError, match="The trail ends after"):
        segment(tokenizer("bpe"), "wanda")


def test_command_line(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tokenizer("bpe").save(tmp_path)
    assert cli.main(["look", "tokens", "the wanderer", "--model", str(path), "--out", str(tmp_path / "a.svg")]) == 0
    out = capsys.readouterr().out
    assert "rank" in out
    assert "wrote" in out
    assert cli.main(["look", "tokens", "", "--model", str(path)]) == 2
    assert "The text is empty" in capsys.readouterr().err


def test_what_is_too_long_or_nothing_says_so():
    made = texts.train("bpe", texts=["the old man and the sea"] * 3, vocab_size=270)
    assert len(segment(made, "a" * 2000).words[0].ids) > 1
    with pytest.raises(InputError, match="A word of 2,001 letters stands in this text as the tokenizer cuts it, but at most 2,000 are followed"):
        segment(made, "a" * 2001)
    pieces = texts.train("wordpiece", texts=["the old man and the sea"] * 3, vocab_size=60)
    nothing = segment(pieces, " ")  # its normaliser leaves none of it
    assert nothing.words == () and nothing.plot().axes and nothing.title == "0 tokens of ' ', by wordpiece"
    assert segment(made, "the").title == "1 token of 'the', by bpe" and len(segment(made, "the sea " * 50).title) < 100


def test_the_tokenizer_of_a_model_or_of_an_unfinished_run(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gf.save(gf.preset("tiny", vocab_size=300).build(seed=0), tmp_path / "model", tokenizer("bpe"))
    unfinished = tmp_path / "run" / "checkpoints" / "step-00000002"
    unfinished.parent.mkdir(parents=True)
    model.rename(unfinished)
    assert cli.main(["look", "tokens", "the", "--model", str(unfinished)]) == 0
    assert cli.main(["look", "tokens", "the", "--model", str(tmp_path / "run")]) == 0
    assert "rank" in capsys.readouterr().out
    gf.save(gf.preset("tiny", vocab_size=300).build(seed=0), tmp_path / "bare")
    assert cli.main(["look", "tokens", "the", "--model", str(tmp_path / "bare")]) == 2
    assert "has no tokenizer: put the tokenizer.json that it was trained with into that folder" in capsys.readouterr().err
