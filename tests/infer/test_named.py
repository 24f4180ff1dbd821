"""The names that people know: what chain each makes, where it stands, and what is said when names disagree."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.fields import hints
from glassformer.infer import (
    DRY,
    XTC,
    AdaptiveP,
    AnyJSON,
    BadWords,
    Breakers,
    Chain,
    Choices,
    Constrained,
    Draw,
    DynamicTemperature,
    Epsilon,
    Eta,
    ForceFirst,
    ForceLast,
    Grammar,
    Greedy,
    JSONSchema,
    LogitBias,
    MinNewTokens,
    MinP,
    Mirostat1,
    Mirostat2,
    NoRepeatNGram,
    Penalties,
    Regex,
    SequenceBias,
    Suppress,
    SuppressFirst,
    Temperature,
    TopA,
    TopH,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Where,
    build_chain,
    generate,
    generation,
    stream,
)
from glassformer.infer.named import _NEEDS, ALIASES, ORDERS, STEERING, Settings, renamed
from glassformer.infer.options import Options
from infer.fake import Bigram, Pieces

GONE = -math.inf


class Words(Pieces):
    eos_id = 0
    vocab_size = 6


TOK = Words("<end>", "no", " no", "\n", "a", " ")
DIGITS = Words("<end>", "1", "2", "-", ".", ",")

# One name, one link.
ONE = [
    ({"temperature": 0.7}, Temperature(0.7)),
    ({"temperature": 0.7, "dynatemp_range": 0.5}, DynamicTemperature(0.7, 0.5)),
    ({"dynatemp_range": 0.5, "dynatemp_exponent": 2.0}, DynamicTemperature(1.0, 0.5, 2.0)),
    ({"top_k": 40}, TopK(40)),
    ({"top_p": 0.9, "min_keep": 3}, TopP(0.9, 3)),
    ({"min_p": 0.1, "min_keep": 0}, MinP(0.1)),
    ({"typical_p": 0.9}, Typical(0.9)),
    ({"typ_p": 0.9}, Typical(0.9)),
    ({"top_n_sigma": 1.5}, TopNSigma(1.5)),
    ({"top_h": 0.4}, TopH(0.4)),
    ({"top_a": 0.2}, TopA(0.2)),
    ({"epsilon_cutoff": 0.01}, Epsilon(0.01)),
    ({"eta_cutoff": 0.01, "min_keep": 2}, Eta(0.01, 2)),
    ({"xtc_probability": 0.5}, XTC(0.5)),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, XTC(0.5, 0.2)),
    ({"mirostat": 1}, Mirostat1()),
    ({"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2}, Mirostat2(3.0, 0.2)),
    ({"adaptive_target": 0.4, "adaptive_decay": 0.8}, AdaptiveP(0.4, 0.8)),
]
# These rule single tokens: they are there when the strongest is taken, too.
ON_TOKENS = [
    ({"repetition_penalty": 1.2}, Penalties(1.2)),
    ({"repeat_penalty": 1.2, "repeat_last_n": 32}, Penalties(1.2, window=32)),
    ({"frequency_penalty": 0.5, "presence_penalty": 0.2, "penalty_window": -1}, Penalties(1.0, 0.5, 0.2)),
    ({"dry_multiplier": 0.8}, DRY(0.8)),
    (
        {"dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": 99, "dry_sequence_breakers": [[3], [1, 2]]},
        DRY(0.8, 2.0, 3, 99, ((3,), (1, 2))),
    ),
    ({"dry_multiplier": 0.8, "tokenizer": TOK}, DRY(0.8, breakers=Breakers(("\n", ":", '"', "*"), ((3,),)))),
    ({"dry_multiplier": 0.8, "dry_penalty_last_n": -1, "dry_sequence_breakers": "no", "tokenizer": TOK}, DRY(0.8, breakers=Breakers(("no",), ((1,), (2,))))),
    ({"dry_multiplier": 0.8, "dry_sequence_breakers": (), "tokenizer": TOK}, DRY(0.8)),
    ({"no_repeat_ngram_size": 3}, NoRepeatNGram(3)),
    ({"bad_words": ["no", [4, 4]], "tokenizer": TOK}, BadWords(((1,), (2,), (4, 4)))),
    ({"bad_words_ids": [[4], [4, 4]]}, BadWords(((4,), (4, 4)))),
    ({"logit_bias": {4: 1.0, "no": False}, "tokenizer": TOK}, LogitBias({4: 1.0, 1: GONE})),
    ({"sequence_bias": {(1, 2): 3.0}}, SequenceBias({(1, 2): 3.0})),
    ({"suppress": [2, 3]}, Suppress((2, 3))),
    ({"suppress_tokens": [2, 3]}, Suppress((2, 3))),
    ({"begin_suppress_tokens": [2]}, SuppressFirst((2,))),
    ({"suppress_first": (2,)}, SuppressFirst((2,))),
    ({"forced_first": [3, 4]}, ForceFirst((3, 4))),
    ({"forced_bos_token_id": 3}, ForceFirst((3,))),
    ({"forced_last": [3, 4], "max_new_tokens": 9}, ForceLast((3, 4), 9)),
    ({"forced_eos_token_id": 3, "max_new_tokens": 9}, ForceLast((3,), 9)),
    ({"min_new_tokens": 4, "eos_id": (5, 2), "max_new_tokens": 4}, MinNewTokens(4, (2, 5))),
    ({"min_new_tokens": 4, "tokenizer": TOK}, MinNewTokens(4, (0,))),
    ({"json_schema": {"const": 12}, "tokenizer": DIGITS}, Constrained(JSONSchema({"const": 12}), DIGITS)),
    ({"json_schema": True, "tokenizer": DIGITS}, Constrained(AnyJSON(), DIGITS, (0,))),
    ({"regex": "(no)+", "tokenizer": TOK, "eos_id": (4, 5)}, Constrained(Regex("(no)+"), TOK, (4, 5))),
    ({"grammar": 'start: "no"', "tokenizer": TOK}, Constrained(Grammar('start: "no"'), TOK)),
    ({"choices": ["no", "a"], "tokenizer": TOK}, Constrained(Choices(("no", "a")), TOK)),
    ({"constraint": Regex("a"), "tokenizer": TOK}, Constrained(Regex("a"), TOK)),
    ({"allowed": len}, Where(len)),
    ({"prefix_allowed_tokens_fn": len}, Where(len)),
]


@pytest.mark.parametrize(("settings", "link"), ONE, ids=[", ".join(s) for s, _ in ONE])
@pytest.mark.parametrize("order", ["hf", "transformers", "llama.cpp"])
def test_a_name_makes_its_link(settings, link, order):
    assert build_chain(**settings, order=order) == link | Draw()
    assert build_chain(**settings, order=order, do_sample=False) == Chain((Greedy(),))
    assert build_chain(**settings, order=order, seed=3).final == Draw(3)


@pytest.mark.parametrize(("settings", "link"), ON_TOKENS, ids=[", ".join(s) for s, _ in ON_TOKENS])
def test_a_name_that_rules_tokens_makes_its_link_drawn_or_not(settings, link):
    assert build_chain(**settings) == link | Greedy()
    assert build_chain(**settings, do_sample=True) == link | Draw()
    assert build_chain(**settings, temperature=0.0, top_k=5) == link | Greedy()


def test_every_name_was_tried():
    tried = {name for settings, _ in ONE + ON_TOKENS for name in settings}
    assert set(hints(Settings)) - tried == {"do_sample", "order", "samplers"}
    assert set(hints(Settings)) <= set(hints(Options))
    assert set(ALIASES) <= set(hints(Options)) and set(ALIASES.values()) <= set(hints(Options))


def test_off_values_of_every_program_make_no_link():
    off = {
        "temperature": 1.0,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "top_h": 1.0,
        "top_a": 0.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "adaptive_target": -1.0,
        "adaptive_decay": 0.9,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "penalty_window": 64,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": ["\n"],
        "no_repeat_ngram_size": 0,
        "bad_words": [],
        "logit_bias": {},
        "sequence_bias": {},
        "suppress": [],
        "suppress_first": [],
        "forced_first": [],
        "forced_last": [],
        "min_new_tokens": 0,
        "min_keep": 0,
    }
    for order in ORDERS:
        assert build_chain(**off, order=order) == Chain((Draw(),))
    assert build_chain(**dict.fromkeys(Settings.__annotations__)) == Chain((Greedy(),))


# Orders

ALL = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.95,
    "top_n_sigma": 2.0,
    "top_h": 0.4,
    "top_a": 0.1,
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3,
    "xtc_probability": 0.5,
    "repetition_penalty": 1.1,
    "dry_multiplier": 0.8,
    "no_repeat_ngram_size": 3,
    "bad_words": [[1]],
    "logit_bias": {2: 1.0},
    "sequence_bias": {(1, 2): 1.0},
    "suppress": [3],
    "suppress_first": [4],
    "forced_first": 5,
    "min_new_tokens": 2,
    "eos_id": 0,
    "adaptive_target": 0.5,
    "seed": 1,
}
BEFORE = "LogitBias SequenceBias Suppress Penalties DRY NoRepeatNGram BadWords MinNewTokens SuppressFirst ForceFirst"


@pytest.mark.parametrize(
    ("order", "filters"),
    [
        ("hf", "Temperature TopNSigma TopH TopK TopP MinP TopA Typical Epsilon Eta XTC AdaptiveP Draw"),
        ("llama.cpp", "TopNSigma TopK Typical TopP MinP TopA TopH Epsilon Eta XTC Temperature AdaptiveP Draw"),
    ],
)
def test_the_named_orders(order, filters):
    chain = build_chain(**ALL, order=order)
    assert [type(link).__name__ for link in chain.links] == f"{BEFORE} {filters}".split()
    assert chain.links[8] == SuppressFirst((4,), 2)  # the first step that is free is the second
    assert eval(repr(chain)) == chain


def test_the_window_of_penalties_is_that_of_the_program():
    said = {"repetition_penalty": 1.1, "dry_multiplier": 0.8}
    assert build_chain(**said) == Penalties(1.1) | DRY(0.8) | Greedy()
    assert build_chain(**said, order="llama.cpp") == Penalties(1.1, window=64) | DRY(0.8, window=64) | Greedy()
    assert build_chain(**said, order="llama.cpp", penalty_window=-1, dry_penalty_last_n=-1) == Penalties(1.1) | DRY(0.8) | Greedy()


def test_an_order_of_your_own():
    said = {"temperature": 0.8, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "suppress": [1]}
    assert build_chain(**said, order=["top_k", "temperature", "penalties", "min_p"]) == (
        Suppress((1,)) | TopK(40) | Temperature(0.8) | Penalties(1.1) | MinP(0.1) | Draw()
    )
    assert build_chain(top_k=5, temperature=2.0, samplers="top_k;temperature;top_k") == TopK(5) | Temperature(2.0) | TopK(5) | Draw()
    assert build_chain(typical_p=0.5, epsilon_cutoff=0.1, order=["epsilon_cutoff", "typ_p"]) == Epsilon(0.1) | Typical(0.5) | Draw()
    assert build_chain(top_k=5, adaptive_target=0.5, order=["top_k", "adaptive_p"]) == TopK(5) | AdaptiveP(0.5) | Draw()
    for order in ORDERS.values():
        assert not set(order) & set(STEERING)


def test_mirostat_takes_penalties_and_a_temperature_and_no_other_filter():
    chain = build_chain(mirostat=2, temperature=0.8, repetition_penalty=1.1, top_k=0, seed=1)
    assert chain == Penalties(1.1) | Temperature(0.8) | Mirostat2() | Draw(1)
    assert build_chain(mirostat=1, temperature=0.0) == Chain((Greedy(),))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_q": 0.5}, "no setting 'top_q' of a sampler. Did you mean 'top_p'"),
        ({"xtc_probabilty": 0.5}, "Did you mean 'xtc_probability'"),
        ({"top_k": "5"}, "top_k is a whole number or None, but a text was given"),
        ({"top_k": 5, "order": "lama.cpp"}, "no order of samplers named 'lama.cpp'. Did you mean 'llama.cpp'"),
        ({"top_k": 5, "order": ["topk"]}, "An order names links, and there is none named 'topk'. Did you mean 'top_k'"),
        ({"top_k": 5, "order": ["temperature"]}, r"TopK\(k=5\) was asked for, but the order has no place for it: add 'top_k' to"),
        ({"mirostat": 2, "top_k": 5, "order": ["mirostat", "top_k"]}, "mirostat steers the draw by what is left, so it is the last of the order, but top_k"),
        ({"mirostat": 3}, "mirostat is its version, 1 or 2, or 0 for none, but 3"),
        ({"mirostat": 2, "typical_p": 0.5}, r"Mirostat decides by itself how many tokens stay, so Typical\(p=0.5\) cannot go with it: leave typical_p out"),
        ({"mirostat": 2, "adaptive_target": 0.5}, "so AdaptiveP.* leave adaptive_target out, or mirostat"),
        (
            {"repeat_penalty": 1.1, "repetition_penalty": 1.2},
            "repeat_penalty and repetition_penalty are two names of one thing, and both were given: 1.1 and 1.2",
        ),
        ({"dry_base": 2.0}, "dry_base was given without dry_multiplier, which is off"),
        ({"xtc_threshold": 0.2}, "xtc_threshold was given without xtc_probability"),
        ({"min_new_tokens": 3}, "min_new_tokens=3 keeps end-of-sequence away, but which token that is is not known"),
        ({"min_new_tokens": 3, "eos_id": 0, "max_new_tokens": 2}, "min_new_tokens is 3, but max_new_tokens is 2"),
        ({"forced_last": 3}, r"forced_last=\[3\] is for the end of max_new_tokens tokens: give max_new_tokens too"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": ["\n"]}, r"sequence breaker '\\n' is a text, and without a tokenizer"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": ["\n", [3]], "tokenizer": TOK}, "texts or lists of ids, but both were given"),
        ({"bad_words": ["no"]}, "A bad word names the text 'no', and without a tokenizer"),
        ({"logit_bias": {"no": 1.0}}, "A logit bias names the text 'no', and without a tokenizer"),
        ({"top_p": 0.0}, "above 0 and up to 1, but 0.0"),
    ],
)
def test_what_disagrees_is_said(settings, words):
    with pytest.raises(SamplerError, match=words):
        build_chain(**settings)


def test_no_setting_needs_one_that_is_unknown():
    assert set(_NEEDS) | set(_NEEDS.values()) <= set(hints(Settings))
    assert renamed({"stop_strings": None, "stop": "x", "eos_token_id": 3}) == {"stop": "x", "eos_id": 3}
    assert renamed({"stop_strings": "y", "stop": ()}) == {"stop": "y"}


# generation, generate, stream


def model(seed=0, v=6):
    return Bigram.random(v, seed)


def test_generation_shows_the_chain_that_generate_uses():
    options = {"temperature": 0.8, "top_k": 3, "min_new_tokens": 2, "seed": 7, "tokenizer": TOK, "max_new_tokens": 12, "stop": "a"}
    chain = generation(model(), **options)
    assert str(chain) == "MinNewTokens(n=2, eos=(0,)) | Temperature(t=0.8) | TopK(k=3) | Draw(seed=7)"
    others = {"seed": 7, "tokenizer": TOK, "max_new_tokens": 12, "stop": "a"}
    assert generate(model(), [1], **options).ids == generate(model(), [1], sampler=chain, **others).ids
    assert str(generation(model())) == "Greedy()"
    assert generation(model(), temperature=0.5, seed=[1, 2]).final == Draw(0)
    assert generation(model(), sampler=TopK(2) | Greedy()) == TopK(2) | Greedy()


def test_generation_knows_the_model():
    built = gf.preset("tiny", vocab_size=9).build(seed=0)
    assert str(generation(built, suppress=[8], top_k=4)) == "Suppress(ids=(8,)) | TopK(k=4) | Draw()"
    with pytest.raises(SamplerError, match="Suppress names token 9, but the vocabulary has 9 tokens"):
        generation(built, suppress=[9])

    class Loaded:
        model, tokenizer, eos_ids = built, TOK, (3,)

    assert generation(Loaded(), min_new_tokens=2, bad_words="no").links[:2] == (BadWords(((1,), (2,))), MinNewTokens(2, (3,)))
    assert generation(Loaded(), min_new_tokens=2, eos_id=4).links[0] == MinNewTokens(2, (4,))
    with pytest.raises(SamplerError, match="There is no option 'temprature'. Did you mean 'temperature'"):
        generation(built, temprature=1.0)
    with pytest.raises(InputError, match="has to encode and decode"):
        generation(built, tokenizer=3)


def test_generate_takes_every_name():
    said = {**ALL, "adaptive_target": None, "forced_first": 1, "logit_bias": {"a": 1.0}, "suppress": [3], "suppress_first": [4]}
    out = generate(model(), "a", tokenizer=TOK, max_new_tokens=5, forced_last=5, **{**said, "eos_id": [0]})
    assert out.ids[0] == 1 and (out.ids[-1] == 5 if len(out.ids) == 5 else out.ids[-1] == 0 and len(out.ids) > 2)
    assert 3 not in out.ids
    assert generate(model(), "a", tokenizer=TOK, max_new_tokens=5, no_repeat_ngram_size=1, eos_token_id=()).finish_reason == "length"


def test_what_was_drawn_is_what_the_names_say():
    table = torch.full((6, 6), 0.0)
    ids = generate(Bigram(table), [4], max_new_tokens=30, seed=3, min_new_tokens=20, eos_id=0).ids
    assert 0 not in ids[:20]
    ids = generate(Bigram(table), [4], max_new_tokens=30, seed=3, bad_words=[[1], [2, 3]]).ids
    assert 1 not in ids and (2, 3) not in set(pairwise(ids)) and {2, 3} <= set(ids)
    rows = generate(Bigram(table), [[4], [4, 5, 4]], max_new_tokens=10, seed=3, forced_first=[3, 2], forced_last=[2, 1])
    assert all(row.ids[:2] == [3, 2] and row.ids[-2:] == [2, 1] for row in rows)
    alone = generate(Bigram(table), [4, 5, 4], max_new_tokens=10, seed=3, forced_first=[3, 2], forced_last=[2, 1])
    assert alone.ids == rows[1].ids


def test_stop_strings_are_stop():
    cycle = Bigram.cycle([1, 4, 5], 6)
    out = generate(cycle, "no", tokenizer=TOK, max_new_tokens=9, stop_strings=["a n"])
    assert (out.text, out.finish_reason) == ("", "stop") and out == generate(cycle, "no", tokenizer=TOK, max_new_tokens=9, stop="a n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dry_multiplyer": 0.8}, "no option 'dry_multiplyer'. Did you mean 'dry_multiplier'"),
        ({"repetion_penalty": 0.8}, "Did you mean 'repetition_penalty'"),
        ({"stop_string": "x"}, "Did you mean 'stop_strings'"),
        ({"min_new_tokens": 3}, "give eos_id=…, or a tokenizer that has one"),
        ({"sampler": Greedy(), "xtc_probability": 0.5}, r"sampler=Greedy\(\) and xtc_probability were both given"),
        ({"sampler": Greedy(), "repeat_penalty": 1.5}, "and repetition_penalty were both given"),
        ({"top_k": 2.5}, "top_k is a whole number or None"),
    ],
)
def test_a_misspelt_name_says_which_was_meant_before_the_model_runs(options, words):
    m = model()
    with pytest.raises(SamplerError, match=re.escape(words) if "(" not in words else words):
        stream(m, [1], **options)
    assert m.calls == []
