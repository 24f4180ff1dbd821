"""The tree: the parts of every score add up, every dead hypothesis has a cause, every finished one is there; as table, page and numbers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from glassformer.core.errors import InputError
from glassformer.infer import BeamTree, generate
from infer.fake import Pieces
from look import zoo

torch.set_num_threads(1)
LLAMA, T5 = zoo.model("llama"), zoo.model("t5")
SEARCHES: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4},
    "early": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.4},
    "groups": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.8},
    "phrases": {"num_beams": 4, "force_words": [[11, 12], [[13], [14, 15]]]},
    "drawn": {"num_beams": 3, "temperature": 1.2, "seed": 4},
    "linked": {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "one": {"num_beams": 1},
    "coverage": {"num_beams": 3, "coverage_penalty": 0.3},
}


def trees(name: str) -> list[Any]:
    model = T5 if name == "coverage" else LLAMA
    prompts = [zoo.ids(7, 1), zoo.ids(3, 2), zoo.ids(5, 3)]
    return generate(model, prompts, max_new_tokens=8, eos_id=(4, 17, 26), beam_tree=True, **SEARCHES[name])


@pytest.fixture(scope="module", params=SEARCHES)
def outs(request):
    return trees(request.param)


def test_the_parts_of_a_score_add_up(outs):
    for out in outs:
        tree, power = out.tree, out.tree.search.length_penalty
        for h in tree:
            path = tree.path(h)
            parts = h.parts
            assert parts["log_probability"] == pytest.approx(sum(x.gain for x in path), abs=1e-6)
            assert -parts["diversity"] == pytest.approx(sum(x.penalty for x in path), abs=1e-9)
            assert parts["length"] == len(path) == h.step + 1
            assert parts["divisor"] == pytest.approx(len(path) ** power)
            assert h.score == pytest.approx((parts["log_probability"] + parts["diversity"]) / parts["divisor"] + parts["coverage"], abs=1e-9)
            assert parts["coverage"] <= 0 and (not parts["coverage"] or h.fate in ("finished", "displaced"))


def test_every_hypothesis_has_a_fate_that_fits(outs):
    for out in outs:
        tree = out.tree
        for h in tree:
            below = tree.children(h)
            lives = [c for c in below if c.alive or c.fate in ("finished", "displaced")]
            assert h.why
            if h.fate != "no_room":
                assert (h.ending is not None) == (h.fate in ("finished", "displaced", "late", "unmet") or (h.fate == "outscored" and h.step == 7))
            if h.fate == "kept":
                assert lives
            elif h.fate == "barren":
                assert not any(c.alive or c.fate == "finished" for c in below)
            else:
                assert not below
            if h.fate in ("outscored", "diversity", "late", "pruned") and h.by is not None:
                assert h.score <= h.by + 1e-9, h.why
            if h.fate in ("bank", "displaced"):
                assert h.by is not None
        assert {h.fate for h in tree if h.step == len(tree.steps) - 1} & {"finished", "pruned", "displaced", "outscored"}


def test_every_finished_text_is_in_the_tree(outs):
    for out in outs:
        tree = out.tree
        assert [tree.ids(h) for h in tree.best] == [b.ids for b in out.beams]
        assert [h.score for h in tree.best] == [b.score for b in out.beams] == sorted((b.score for b in out.beams), reverse=True)
        assert [h.place for h in tree.best] == list(range(1, 1 + len(out.beams)))
        for h, beam in zip(tree.best, out.beams, strict=True):
            assert h.fate == "finished" and h.ending == beam.finish_reason
            assert [x.logprob for x in tree.path(h)] == beam.logprobs
        assert out.ids == out.beams[0].ids and out.score == out.beams[0].score
        displaced = [h for h in tree if h.fate == "displaced"]
        for h in displaced:
            assert sum(b.score >= h.score - 1e-9 and b.group == h.group for b in tree.best) == tree.search.width


def test_survivors_are_the_best_of_their_step(outs):
    for out in outs:
        if out.tree.phrases:
            continue
        for step in out.tree.steps:
            for g in range(out.tree.search.num_beam_groups):
                alive = [h.score for h in step if h.group == g and h.alive]
                assert len(alive) <= out.tree.search.width
                dead = [h.score for h in step if h.group == g and h.fate == "outscored"]
                assert not alive or not dead or min(alive) >= max(dead)


def test_the_fates_do_occur():
    seen = {h.fate for name in SEARCHES for out in trees(name) for h in out.tree}
    assert {"kept", "barren", "outscored", "finished", "displaced", "late", "pruned", "diversity", "bank", "no_room"} <= seen, seen


def test_without_being_asked_no_tree_is_kept():
    out = generate(LLAMA, [5, 6], num_beams=3, max_new_tokens=4)
    assert out.tree is None and all(b.tree is None for b in out.beams)


# As numbers, page and table


def read(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_saved_as_numbers_and_as_a_page(outs, tmp_path):
    tree = outs[0].tree
    plain = json.loads(tree.save(tmp_path / "t.json").read_text())
    assert plain["kind"] == "BeamTree" and len(plain["hypotheses"]) == len(tree) and plain["search"]["num_beams"] == tree.search.num_beams
    assert [b["ids"] for b in plain["best"]] == [b.ids for b in outs[0].beams]
    for h, d in zip(tree, plain["hypotheses"], strict=True):
        assert (d["id"], d["parent"], d["fate"], d["why"], d["score"]) == (h.id, h.parent, h.fate, h.why, h.score)
    page = tree.save(tmp_path / "t.html").read_text()
    data = read(page)
    assert len(data["nodes"]) == len(tree) and data["best"] == [h.id for h in tree.best]
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert "src=" not in page and "//" not in re.sub(r"http://www\.w3\.org/2000/svg|// .*", "", page).split("<body>")[0]


def test_nothing_from_a_token_can_disturb_the_page():
    evil = ["<script>alert(1)</script>", "</script>", "\u202e", "&amp;", "a"]
    out = generate(
        LLAMA, [1], tokenizer=Pieces(*evil, *map(str, range(26))), num_beams=4, max_new_tokens=3, eos_id=(), beam_tree=True, suppress=list(range(5, 31))
    )
    page = out.tree.to_html()
    assert "<script>alert" not in page and page.count("</script>") == 2 and "\u202e" not in page
    assert set(read(page)["texts"].values()) <= {*evil, "‹U+202E›"} | set(evil)
    assert "\u202e" not in str(out.tree)


def test_it_is_printed_with_the_causes_of_death(outs):
    tree = outs[0].tree
    said = str(tree)
    assert f"{len(tree):,} hypotheses" in said and tree.chain in said and "as number 1 of" in said
    for h in tree.best:
        assert f"{h.score:.4f}" in said
    assert tree._repr_html_().startswith("<pre")


def test_texts_and_phrases_are_shown():
    words = zoo.words()
    options = {"tokenizer": words, "suppress": [27, 28, 29, 30], "eos_id": ()}
    out = generate(LLAMA, "the old man", num_beams=3, max_new_tokens=5, beam_tree=True, force_words=["Rome", ["dog ran", "home"]], **options)
    assert out.tree.phrases == (("Rome",), ("dog ran", "home")) and out.tree.prompt == "the old man"
    assert out.tree.written(out.tree.best[0]) == words.decode(out.ids)
    assert read(out.tree.to_html())["phrases"] == [["Rome"], ["dog·ran", "home"]]
    assert all("Rome" in b.text for b in out.beams)


def test_a_long_tree_is_cut_in_the_terminal_and_not_on_the_page():
    out = generate(LLAMA, [5, 6], num_beams=8, max_new_tokens=30, eos_id=(), beam_tree=True)
    assert "The first 200 lines" in str(out.tree)
    assert len(read(out.tree.to_html())["nodes"]) == len(out.tree) > 300


@pytest.mark.parametrize(
    ("name", "says"), [("t.txt", "the ending says how a beam tree is written"), ("nowhere/t.html", "does not exist"), (5, "name one, such as 'beams.html'")]
)
def test_places_that_it_cannot_be_written_to(tmp_path, name, says):
    tree = BeamTree((), search=SEARCH, chain="Greedy()")
    with pytest.raises(InputError, match=says):
        tree.save(tmp_path / name if isinstance(name, str) else name)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        tree.save(tmp_path / "folder.html")


def test_an_empty_tree_prints():
    assert "0 hypotheses" in str(BeamTree((), search=SEARCH, chain="Greedy()"))


SEARCH = generate(LLAMA, [5], num_beams=2, max_new_tokens=1, beam_tree=True).tree.search
