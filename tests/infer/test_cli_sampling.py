"""``glassformer generate``: the options that say how the next token is chosen."""

from __future__ import annotations

import json

import pytest

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.cli.sampling import settings
from glassformer.text import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train("characters", texts=["a cab, a bed, a face: 'abc'\n"])
    model = gf.preset("tiny", vocab_size=tokenizer.vocab_size).build(seed=0)
    return gf.save(model, tmp_path_factory.mktemp("m") / "m", tokenizer)


@pytest.fixture
def run(capsys, folder):
    def command(*args):
        code = cli.main(["generate", str(folder), "a cab", "-n", "12", "--seed", "3", *args])
        return code, *capsys.readouterr()

    return command


def test_every_option_reaches_its_link(run, folder):
    space, f = gf.load(folder).tokenizer.encode(" f")
    said = (
        "--temperature 0.9 --top-k 9 --top-p 0.95 --min-p 0.01 --typical-p 0.99 --top-n-sigma 4 --xtc-probability 0.5 --xtc-threshold 0.2 "
        "--repetition-penalty 1.1 --frequency-penalty 0.1 --presence-penalty 0.2 --dry-multiplier 0.8 --no-repeat-ngram-size 4 --bad-word f --order llama.cpp "
        "--set min_keep=2 --set dry_base=1.5 --show-sampler"
    )
    code, out, err = run(*said.split())
    assert code == 0 and out.startswith("a cab") and "f" not in out[5:]
    assert err == (
        "Penalties(repetition=1.1, frequency=0.1, presence=0.2, window=64) | "
        "DRY(multiplier=0.8, base=1.5, window=64, breakers=Breakers.of(tokenizer, ('\\n', ':', '\"', '*'))) | NoRepeatNGram(n=4) | "
        f"BadWords(sequences=(({f},), ({space}, {f}))) | TopNSigma(n=4.0) | TopK(k=9) | Typical(p=0.99, min_keep=2) | TopP(p=0.95, min_keep=2) | "
        "MinP(p=0.01, min_keep=2) | XTC(probability=0.5, threshold=0.2, min_keep=2) | Temperature(t=0.9) | Draw(seed=3)\n"
    )
    assert run(*said.split())[1] == out


def test_mirostat_and_an_order_of_one_s_own_drop_what_nobody_said(run):
    assert run("--mirostat", "2", "--show-sampler")[2] == "Temperature(t=0.8) | Mirostat2() | Draw(seed=3)\n"
    assert run("--order", "min_p;temperature", "--min-p", "0.1", "--show-sampler")[2] == "MinP(p=0.1) | Temperature(t=0.8) | Draw(seed=3)\n"


def test_the_checkpoint_s_settings_stand_where_nothing_is_said():
    known = {
        "temperature": 0.6,
        "typical_p": 0.9,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5]],
        "eos_token_id": 2,
        "num_beams": 4,
        "forced_eos_token_id": [1],
    }
    assert settings(known, {}) == {"temperature": 0.6, "top_k": 40, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]]}
    assert settings(known, {"mirostat": 1}) == {"temperature": 0.6, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "mirostat": 1}
    assert settings(known, {"typical_p": 0.5, "bad_words": []}, ["top-h=0.3", "order=llama.cpp"])["typical_p"] == 0.5
    assert settings({}, {}, [f"logit_bias={json.dumps([[3, -2.0]])}"])["logit_bias"] == [[3, -2.0]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "adaptiv_target=1"], "no setting 'adaptiv_target' of a sampler. Did you mean 'adaptive_target'"),
        (["--set", "x"], "--set takes NAME=VALUE, such as adaptive_target=0.4, but got 'x'"),
        (["--set", "top_k=3", "--top-k", "2"], "top_k was given twice, as 2 and as 3"),
        (["--set", "top_a=much"], "--set top_a=much: it is a number, but a text was given"),
        (["--set", "top_k=5.5"], "--set top_k=5.5: it is a whole number, but a number was given"),
        (["--choice", "bé"], "No text of this choice can be written with this tokenizer's tokens. The vocabulary has no é: change the choice"),
        (["--set", "penalty_alpha=6"], "contrastive search is a weight from 0 to 1, but alpha=6 was given"),
        (["--set", "contrast_beta=1"], "--set contrast_beta was given without --amateur"),
        (["-t", "-1"], "A temperature is a finite number of 0 or more, but -1 was given"),
        (["-t", "inf"], "A temperature is a finite number of 0 or more, but inf was given"),
        (["-t", "-1.0"], "A temperature is a finite number of 0 or more, but -1.0 was given"),
        (["--set", "temperature=-1"], "A temperature is a finite number of 0 or more, but -1 was given"),
        (["--xtc-threshold", "0.2"], "--xtc-threshold was given without --xtc-probability"),
        (["--mirostat", "2", "--top-k", "5"], "TopK(k=5) cannot go with it"),
        (["--order", "lama.cpp"], "no order of samplers named 'lama.cpp'"),
    ],
)
def test_a_mistake_ends_in_a_sentence(run, args, words):
    code, out, err = run(*args)
    assert code == 2 and words in err and "Traceback" not in err and out == ""


def test_contrastive_search_by_set(run):
    code, out, err = run("--set", "penalty_alpha=0.6", "--show-sampler")
    assert (code, err) == (0, "Greedy()\n") and out.startswith("a cab")
    assert run("--set", "penalty_alpha=0.6", "--set", "top_k=4")[1] == out, "nothing stands of the usual 40"


def test_a_setting_of_a_run_is_none_of_a_sampler(folder, capsys):
    assert cli.main(["look", "sampling", "a", "--model", str(folder), "--set", "penalty_alpha=0.6"]) == 2
    assert "penalty_alpha is no setting of a sampler but of a run: 'glassformer generate' takes --set penalty_alpha=0.6" in capsys.readouterr().err


def test_a_whole_number_may_be_written_with_a_point(run):
    assert run("--set", "top_k=5.0", "--show-sampler")[2] == run("--top-k", "5", "--show-sampler")[2]
    assert run("--set", "penalty_window=-1.0", "--repetition-penalty", "1.1") == run("--set", "penalty_window=-1", "--repetition-penalty", "1.1")


def test_combined_models_by_their_options(run, folder, capsys):
    plain = run("--temperature", "0", "--top-k", "0")[1]
    for said in (
        ["--guidance-scale", "3"],
        ["--guidance-scale", "3", "--negative-prompt", "face"],
        ["--dola-layers", "low"],
        ["--dola-layers", "0,1"],
    ):
        code, out, err = run("--temperature", "0", *said)
        assert (code, err) == (0, "") and out.startswith("a cab") and len(out) == len(plain), said
    # A model against itself: every plausible token is as good as the other, and the first of them is taken.
    assert run("--temperature", "0", "--amateur", str(folder))[0] == 0
    for said, words in (
        (["--negative-prompt", "face"], "--negative-prompt was given without --guidance-scale"),
        (["--dola-layers", "hgih"], "DoLa has no layers named 'hgih'. Did you mean 'high'"),
        (["--dola-layers", "99"], "but layer 99 was given"),
        (["--guidance-scale", "2", "--dola-layers", "low"], "each combine the model in their own way"),
        (["--amateur", "nowhere"], "There is no model at 'nowhere'"),
    ):
        code, _, err = run(*said)
        assert code == 2 and words in err and "Traceback" not in err


def test_what_is_said_is_what_the_command_line_has(run):
    code, _, err = run("--min-new-tokens", "3")
    assert code == 2
    assert "this model's texts have no end, so leave --min-new-tokens out." in err
    code, _, err = run("--set", "top_a=.1", "--show-sampler")
    assert code == 0
    assert "TopA(a=0.1)" in err


def test_an_order_of_one_link(run):
    code, _, err = run("--order", "top_k;", "--top-k", "3", "--show-sampler")
    assert (code, err) == (0, "TopK(k=3) | Draw(seed=3)\n")
    assert "Known: hf, transformers, llama.cpp, or links: 'top_k;temperature', 'top_k;'." in run("--order", "top_k")[2]
