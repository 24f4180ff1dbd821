"""At the command line a sentence speaks of the options that were typed, not of Python's arguments."""

from __future__ import annotations

import pytest
import typer

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.cli.shorts import BEFORE
from glassformer.cli.spoken import as_typed, options_of
from glassformer.text import train

GROUP = typer.main.get_command(cli.app)
GENERATE = options_of(GROUP, ["generate", "m", "x", "-n", "3", "--set", "top_a=0.1", "--temperature=2", "-t3"])


def test_the_options_of_a_command_are_found_as_they_were_typed():
    assert (GENERATE["max_new_tokens"], GENERATE["temperature"], GENERATE["top_k"]) == ("-n", "--temperature", "--top-k")
    assert (GENERATE["top_a"], GENERATE["dry_base"], GENERATE["prompt_lookup_num_tokens"]) == ("--set top_a", "--set dry_base", "--prompt-lookup")
    assert options_of(GROUP, ["generate", "m", "x", "--set=top_k=3"])["top_k"] == "--set top_k"
    assert "prompt" not in GENERATE and "model" not in GENERATE and "more" not in GENERATE
    assert options_of(GROUP, ["look", "generate", "--model", "m", "--packed"])["packed"] == "--packed", "a page's text may be the name of a command"
    assert options_of(GROUP, ["look", "sampling", "x", "-k", "3"])["k"] == "-k"
    assert options_of(GROUP, ["look", "embeddings", "nearest", "x"])["top"] == "--top"
    assert options_of(GROUP, []) == options_of(GROUP, ["nothing"]) and "top_k" not in options_of(GROUP, [])


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        ("min_new_tokens is 9, but max_new_tokens is 3: allow more.", "--min-new-tokens is 9, but -n is 3: allow more."),
        ("weights='int8' and quantise both say it: leave one out.", "--weights int8 and --quantise both say it: leave one out."),
        ("weights='in 8' is no way.", "--weights 'in 8' is no way."),
        ("packed=True keeps them, quantise makes new ones.", "--packed keeps them, --quantise makes new ones."),
        ("regex and grammar were both given.", "--regex and --grammar were both given."),
        ("contrast and dola_layers were both given", "--amateur and --dola-layers were both given"),
        ("mirostat_tau was given without mirostat, so give mirostat too", "--set mirostat_tau was given without --mirostat, so give --mirostat too"),
        ("Mirostat decides, so TopK(k=5) cannot: leave top_k out, or mirostat.", "Mirostat decides, so TopK(k=5) cannot: leave --top-k out, or --mirostat."),
        ("build_chain(top_a='much'): top_a is a number or None, but a text was given.", "--set top_a=much: it is a number, but a text was given."),
        ("Leave out what draws (temperature, top_k, seed, …).", "Leave out what draws (--temperature, --top-k, --seed, …)."),
        ("there is beam_tree=True. Leave weights out.", "there is --beam-tree. Leave --weights out."),
        ("draft_tokens=5: say draft=a smaller model or draft=PromptLookup().", "--draft-tokens 5: say --draft MODEL or --prompt-lookup N."),
    ],
)
def test_arguments_become_options(python, typed):
    assert as_typed(python, GENERATE) == typed


@pytest.mark.parametrize(
    "text",
    [
        "There is no setting 'top_kk'. Did you mean 'top_k'? Known: top_k, top_p.",
        "/runs/max_new_tokens/top_k.json holds seed.txt: the order of the draft has weights and a seed at the stop.",
        r"C:\top_k is missing",
        "model.cache(batch=3, seed=4) and Chain(TopP(top_p=3), seed=4) stay",
        "TopK(k=5) was asked for, but the order has no place for it: add 'top_k' to constraint, min_p, temperature.",
        "The text 'seed=3' is odd, and a \"top_k\" is too",
        "",
    ],
)
def test_texts_paths_and_calls_stay_as_they_are(text):
    assert as_typed(text, GENERATE) == text


def test_english_words_that_are_options_too_stay_words():
    look = options_of(GROUP, ["look", "activations", "f", "-m", "m", "-s", "x"]) | options_of(GROUP, ["train", "x"])
    text = "The folder is empty: data is missing, and context. It has layers, data, and a budget; give data or steps."
    assert as_typed(text, look) == text


def test_an_engine_s_own_arguments_are_the_server_s_options():
    serve = options_of(GROUP, ["serve", "m"])
    assert as_typed("Engine(memory='x'): a number of bytes.", serve) == "--memory x: a number of bytes."
    assert (
        as_typed("Engine(deterministic=True, cache_dtype='int8'): leave cache_dtype out.", serve)
        == "--deterministic, --cache-dtype int8: leave --cache-dtype out."
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train("characters", texts=["a cab, a bed, a face: 'abc'\n"])
    return str(gf.save(gf.preset("tiny", vocab_size=tokenizer.vocab_size).build(seed=0), tmp_path_factory.mktemp("m") / "m", tokenizer))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", "0"], "error: -n is 0; ask for at least 1."),
        (["--max-new-tokens", "0"], "error: --max-new-tokens is 0; ask for at least 1."),
        (["--prompt-lookup", "3", "--draft-tokens", "2"], "error: --prompt-lookup N guesses by itself, N tokens at a time: leave it out, or --draft"),
        (["--draft-tokens", "2"], "error: --draft-tokens 2 was given without a draft: say who guesses, --draft MODEL or --prompt-lookup N."),
        (["--negative-prompt", "a"], "error: --negative-prompt was given without --guidance-scale"),
        (["--weights", "int8", "--quantise", "int8"], "error: --weights int8 and --quantise int8 both say"),
        (["--weights", "int9"], "error: --weights int9 is no way"),
        (["--quantise", "int9"], "error: --quantise int9 is no kind"),
        (["--packed"], "leave --packed out"),
        (["--regex", "a", "--choice", "a"], "error: --regex and --choice were both given"),
        (["--num-beams", "2", "--prompt-lookup", "3"], "error: --prompt-lookup does not go with --num-beams"),
        (["--num-beams", "2", "--trace", "-"], "error: --trace does not go with --num-beams: "),
        (["--num-return-sequences", "2"], "error: --num-return-sequences is about a search with beams, and none was asked for: give --num-beams 4 too"),
        (["--set", "dry_base=2"], "error: --set dry_base was given without --dry-multiplier"),
    ],
)
def test_what_a_user_sees_names_what_the_user_typed(args, words, folder, capsys):
    assert cli.main(["generate", folder, "a cab", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == "" and len(err.strip().splitlines()) == 1


# Letters


def commands(group, path=()):
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))
    if not hasattr(group, "commands"):
        yield path, group


def test_a_letter_means_one_thing_in_every_command():
    meant = {}
    for path, command in commands(GROUP):
        for param in command.params:
            for letter in (o for o in param.opts if param.param_type_name == "option" and len(o) == 2):
                meant.setdefault(letter, {}).setdefault(max(param.opts, key=len), []).append(" ".join(path))
    assert {letter: list(options) for letter, options in meant.items() if len(options) > 1} == {}


def test_what_a_letter_meant_before_still_works_and_is_not_shown(capsys):
    known = {" ".join(path): command for path, command in commands(GROUP)}
    for end, letters in BEFORE.items():
        path = next(path for path in known if f" {path}".endswith(f" {end}"))
        for letter, option in letters.items():
            param = next(p for p in known[path].params if option in p.opts)
            parsed = {}
            for spelling in ([letter, "2"], [option, "2"], [f"{letter}2"]):
                context = known[path].make_context(f"glassformer {path}", [*spelling], resilient_parsing=True)
                parsed[tuple(spelling)] = context.params[param.name]
            assert len({str(found) for found in parsed.values()}) == 1 and "None" not in map(str, parsed.values()), (path, letter, parsed)
        assert cli.main([*path.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f" {letter} " not in shown and f"{letter}," not in shown for letter in letters), path
