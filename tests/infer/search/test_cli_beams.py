"""``glassformer generate --num-beams``: the n best with their scores, the tree, and sentences for what does not go."""

from __future__ import annotations

import json

import pytest

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.cli.beams import settings
from glassformer.text import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train("characters", texts=["a cab, a bed, a face: 'abc'\n"])
    model = gf.preset("tiny", vocab_size=tokenizer.vocab_size).build(seed=0)
    return gf.save(model, tmp_path_factory.mktemp("m") / "m", tokenizer)


@pytest.fixture
def run(capsys, folder):
    def command(*args):
        code = cli.main(["generate", str(folder), "a cab", "-n", "8", *args])
        return code, *capsys.readouterr()

    return command


def test_the_n_best_are_printed_with_their_scores(run, folder):
    code, out, err = run("--num-beams", "3", "--length-penalty", "0.8")
    loaded = gf.load(folder)
    want = gf.generate(loaded.model, "a cab", tokenizer=loaded.tokenizer, eos_id=loaded.eos_ids, num_beams=3, length_penalty=0.8, max_new_tokens=8)
    assert (code, err) == (0, "")
    assert out == "".join(f" {i}  {b.score:.4f}  {b.finish_reason:<6}  a cab{b.text}\n" for i, b in enumerate(want.beams, 1))
    assert run("--num-beams", "3", "--length-penalty", "0.8", "--num-return-sequences", "1")[1] == f"a cab{want.text}\n"


def test_the_tree_is_written_and_printed(run, tmp_path):
    code, out, err = run("--num-beams", "3", "--beam-tree", str(tmp_path / "t.html"), "--beam-tree", str(tmp_path / "t.json"), "--beam-tree", "-")
    assert code == 0 and err.count("wrote ") == 2 and "as number 1 of 3" in out and "outscored" in out
    assert json.loads((tmp_path / "t.json").read_text())["search"]["num_beams"] == 3
    assert "What the beam search considered" in (tmp_path / "t.html").read_text()


def test_every_option_reaches_the_search(run, tmp_path):
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "early_stopping": "never", "num_return_sequences": 2}
    said = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code, _, _ = run(*said, "--beam-tree", str(tmp_path / "t.json"))
    assert code == 0
    assert json.loads((tmp_path / "t.json").read_text())["search"] == options | {"length_penalty": 1.0, "coverage_penalty": 0.0}
    code, out, _ = run("--num-beams", "3", "--force-word", "face", "--force-word", "b")
    assert code == 0 and all("face" in line and "b" in line[25:] for line in out.splitlines())
    code, out, _ = run("--num-beams", "2", "--temperature", "1.5", "--seed", "3", "--early-stopping", "yes", "--show-sampler")
    assert code == 0 and out == run("--num-beams", "2", "--temperature", "1.5", "--seed", "3", "--early-stopping", "yes")[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--length-penalty", "0.5"], "give --num-beams 4 too"),
        (["--num-beams", "2", "--coverage-penalty", "0.5"], "it is for encoder-decoders"),
        (["--num-beams", "2", "--beam-tree", "t.txt"], "how a beam tree is written"),
        (["--num-beams", "2", "--trace", "-"], "there is --beam-tree."),
        (["--num-beams", "2", "--logprobs", "3"], "--beam-tree -"),
        (["--num-beams", "2", "--early-stopping", "perhaps"], "none of yes, no, never"),
        (["--num-beams", "2", "--force-word", "a cab a cab a cab"], "-n is 8"),
    ],
)
def test_what_does_not_go_is_one_sentence(run, args, says):
    code, _, err = run(*args)
    assert code == 2 and says in err and "Traceback" not in err


def test_nothing_is_drawn_unless_it_is_said():
    known = {
        "temperature": 0.6,
        "top_k": 50,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_bos_token_id": 0,
        "num_beams": 4,
    }
    found = {"length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3, "forced_bos_token_id": 0}
    assert settings(known, {"temperature": None}, None, {"num_beams": 2}) == found | {"num_beams": 2}
    assert settings(known, {"temperature": 0.9}, ["min_p=0.1"], {"length_penalty": 1.0}) == found | {"temperature": 0.9, "min_p": 0.1, "length_penalty": 1.0}
