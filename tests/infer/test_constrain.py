"""Constrained decoding: masks against brute force, whole texts against ``re`` and a validator, and the laws of forks, batches and ends."""

from __future__ import annotations

import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import glassformer as gf
from glassformer.core.errors import InputError, SamplerError
from glassformer.infer import (
    AnyJSON,
    Choices,
    Constrained,
    Draw,
    Grammar,
    Greedy,
    JSONSchema,
    Regex,
    Session,
    Temperature,
    TopK,
    Where,
    generate,
    generation,
    stream,
)
from glassformer.infer.constrain import matchers
from glassformer.infer.constrain.vocabulary import Vocabulary
from glassformer.text import train
from infer.fake import Bigram, Pieces

TEXT = 'The quick brown fox — naïve, 日本 🙂 — jumps over; {"a": 1, "b": [2, 3.5], "name": "x"} abc 0123456789 -true null false\n'
GONE = float("-inf")


class Few(Pieces):
    """A vocabulary given as texts, which says its size."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)


class FewWithEnd(Few):
    eos_id = 0


@pytest.fixture(scope="module")
def bpe():
    return train("bpe", texts=[TEXT * 30], vocab_size=330, special=["<eos>"])


def model_of(tokenizer, seed=0):
    return Bigram.random(tokenizer.vocab_size, seed)


def place_of(link, ids):
    return link._matchers.at(np.array(ids, dtype=np.int64))


# Masks


FINITE = ["ab?c|ca{1,3}", "a", "(ab|ba){1,2}", "[abc]{2}", "a(b|bc)(c|a)?", "|ab", "aaa|aab|b"]


@pytest.mark.parametrize("pattern", FINITE)
@pytest.mark.parametrize("kind", [Few, FewWithEnd])
def test_allowed_tokens_are_those_of_brute_force(pattern, kind):
    tokenizer = kind("" if kind is Few else "<end>", "a", "b", "c", "ab", "bc", "ab", "ca", "aa", "bca", "d", "ad", "cab")  # one twice, one empty
    language = {"".join(t) for n in range(7) for t in product("abc", repeat=n) if re.fullmatch(pattern, "".join(t))}
    link, v = Constrained(Regex(pattern), tokenizer), tokenizer.vocab_size
    todo = [[]]
    while todo:
        ids = todo.pop()
        text = tokenizer.decode(ids)
        may = {i for i, piece in enumerate(tokenizer.pieces) if piece and piece != "<end>" and any(s.startswith(text + piece) for s in language)}
        if kind is FewWithEnd and text in language:
            may.add(0)
        state = (link | Greedy()).state(1)
        state.steps = [len(ids)]
        found = link.allowed(1, v, torch.tensor([[3, *ids]]), state.own(0, ""))[0]
        assert set(np.flatnonzero(found).tolist()) == may, (text, pattern)
        assert place_of(link, ids).may_end == (text in language)
        assert place_of(link, ids).complete == (text in language and not any(s.startswith(text) and s != text for s in language))
        todo += [[*ids, i] for i in may if i or kind is Few]
        assert len(ids) < 8


def test_drawing_is_the_distribution_renormalised_over_what_is_allowed():
    tokenizer = FewWithEnd("<end>", "a", "b", "ab", "c")
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
    after = Constrained(Regex("a(b|c)*"), tokenizer).apply(logits)
    p = logits.double().softmax(-1) * torch.tensor([0.0, 1, 0, 1, 0])
    torch.testing.assert_close(after.double().softmax(-1), p / p.sum(-1, keepdim=True))
    assert torch.equal(after[:, [1, 3]], logits[:, [1, 3]])


def test_texts_come_as_often_as_their_steps_say():
    tokenizer = FewWithEnd("<end>", "a", "b", "ab")
    table = torch.tensor([[0.0, 1, 0, 0.5], [0.3, 0, 1, 0], [1.0, 0, 0, 0], [0.5, 0, 0.2, 0]])
    model, p = Bigram(table), table.double().softmax(-1)
    first = p[3, [1, 3]] / p[3, [1, 3]].sum()  # "a" or "ab"; then b, or the end where it may be
    after_a = p[1, [0, 2]] / p[1, [0, 2]].sum()
    expected = {(1, 0): first[0] * after_a[0], (1, 2): first[0] * after_a[1], (3,): first[1]}
    out = generate(model, [[3]] * 4000, tokenizer=tokenizer, regex="ab?", seed=0, max_new_tokens=5)
    counts = {ids: sum(tuple(row.ids) == ids for row in out) for ids in expected}
    assert sum(counts.values()) == 4000
    assert sum((counts[k] - 4000 * float(q)) ** 2 / (4000 * float(q)) for k, q in expected.items()) < 13.8  # chi-square, 2 degrees, p = 0.001


@pytest.mark.parametrize("pattern", ["x", "[a-f]{2}", ".*"])
def test_few_and_many_allowed_tokens_are_kept_alike(pattern, bpe):
    link, logits = Constrained(Regex(pattern), bpe), torch.randn(3, bpe.vocab_size)
    logits[0, ::7] = float("nan")
    expected = torch.where(torch.from_numpy(link.allowed(3, bpe.vocab_size)), logits, GONE)
    torch.testing.assert_close(link.apply(logits), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(link.apply(logits.T.contiguous().T), expected, rtol=0, atol=0, equal_nan=True)


# The bytes of tokens


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "characters", "words", "wordpiece"])
def test_the_bytes_of_tokens_joined_are_what_decoding_adds(kind):
    tokenizer = train(kind, texts=[TEXT * 30], vocab_size={"bpe": 320, "bytes": None}.get(kind, 120), special=["<eos>"])
    vocabulary = Vocabulary.of(tokenizer)
    assert Vocabulary.of(tokenizer) is vocabulary
    ids = tokenizer.encode("The quick fox over 日本 🙂 true")
    for cut in range(1, len(ids)):
        whole, head = tokenizer.decode(ids).encode(), tokenizer.decode(ids[:cut])
        if "\ufffd" not in head:
            assert b"".join(vocabulary.words[i] for i in ids[cut:]) == whole[len(head.encode()) :]
    assert vocabulary.special["<eos>"] == tokenizer.eos_id and vocabulary.words[tokenizer.eos_id] == b""


def test_bytes_of_sentencepiece_are_single_bytes():
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}, "▁the": 258, "fox": 259, "▁": 260}
    library = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "</s>"])
    tokenizer = gf.Tokenizer(library)
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.words[2 + 0xE6] == b"\xe6" and vocabulary.words[258] == b" the" and vocabulary.words[259] == b"fox" and vocabulary.words[0] == b""
    out = generate(model_of(tokenizer), [259], tokenizer=tokenizer, regex="( the|日本|é){3}", seed=0, max_new_tokens=30)
    assert re.fullmatch("( the|日本|é){3}", out.text)


def test_a_tokenizer_without_a_size_and_one_without_hash():
    with pytest.raises(InputError, match=r"this Pieces does not say how many it has: give it a vocab_size"):
        Constrained(Regex("a"), Pieces("a"))

    class Odd(Few):
        __hash__ = None

        def __eq__(self, other):
            return self is other

    assert generate(Bigram.random(2), [0], tokenizer=Odd("a", "b"), regex="ab").text == "ab"


# Whole texts


PATTERNS = [
    r"\d{4}-\d{2}-\d{2}",
    r"[a-z]+@[a-z]{2,8}\.(com|org)",
    r"(?:yes|no|maybe)(?:, (?:yes|no)){0,3}!?",
    r"^[^\n]{3,12}$",
    r"[é日🙂]{2,5}",
    r"(?i)fox|Abc/\d",
    r"\w\W\s\S",
    r"a\$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_pattern_is_matched_from_end_to_end(pattern, kind, bpe):
    tokenizer = bpe if kind == "bpe" else train("bytes", special=["<eos>"])
    ended = 0
    for seed in range(3):
        for out in generate(model_of(tokenizer, seed), [[1], [2, 3], [70, 71, 72]], tokenizer=tokenizer, regex=pattern, seed=seed, max_new_tokens=60):
            if out.finish_reason != "length":
                ended += 1
                assert re.fullmatch(pattern, out.text, re.ASCII), out.text
            assert "<eos>" not in out.text
    assert ended >= 6


def values(depth):
    scalar = st.one_of(
        st.builds(lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-50, 50), st.integers(0, 200)),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=4), st.booleans(), st.none()), min_size=1, max_size=4).map(lambda e: {"enum": e}),
        st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
        st.just({"type": "string", "format": "date"}),
    )
    if depth == 0:
        return scalar
    inner = values(depth - 1)

    def thing(fields, required):
        return {"type": "object", "properties": fields, "required": [k for k, r in zip(fields, required, strict=False) if r], "additionalProperties": False}

    return st.one_of(
        scalar,
        st.builds(lambda i, n: {"type": "array", "items": i, "minItems": min(n, 2), "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(thing, st.dictionaries(st.sampled_from(["a", "b", "名", "x y", 'q"']), inner, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3)),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=values(2), seed=st.integers(0, 9), wild=st.sampled_from([1.0, 30.0]))
def test_json_of_any_small_schema_parses_and_is_valid(bpe, schema, seed, wild):
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    model = Bigram(model_of(bpe, seed).table.detach() * wild)
    outs = generate(model, [[5], [6, 7]], tokenizer=bpe, json_schema=schema, seed=seed, max_new_tokens=400)
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for out in outs:
        assert out.finish_reason in ("stop", "eos"), out.text
        validator.validate(json.loads(out.text))


def test_any_json_and_objects(bpe):
    table = torch.randn(bpe.vocab_size, bpe.vocab_size, generator=torch.Generator().manual_seed(3))
    table[:, bpe.encode("}]1")] += 4.0
    for seed in range(3):
        out = generate(Bigram(table), [5], tokenizer=bpe, json_schema=True, seed=seed, max_new_tokens=120)
        if out.finish_reason != "length":
            json.loads(out.text)
        made = generate(Bigram(table), [5], tokenizer=bpe, constraint=AnyJSON(objects=True), seed=seed, max_new_tokens=120)
        assert made.finish_reason == "length" or isinstance(json.loads(made.text), dict)
        assert made.text.startswith("{")


def test_a_schema_may_be_a_dict_a_text_or_a_pydantic_class(bpe):
    pydantic = pytest.importorskip("pydantic")

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=4)
        people: int = pydantic.Field(ge=0, le=99)

    schema = City.model_json_schema()
    assert JSONSchema(City) == JSONSchema(schema) == JSONSchema(json.dumps(schema))
    assert City.model_validate_json(generate(model_of(bpe), [1], tokenizer=bpe, json_schema=City, seed=1, max_new_tokens=99).text)
    assert JSONSchema({"type": "null"}, whitespace="") != JSONSchema({"type": "null"})


def test_whitespace_is_bounded_and_what_people_write_is_allowed(bpe):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "null"}}}, "required": ["a", "b"]}
    value = {"a": 1, "b": [None, None]}
    link, tight = Constrained(JSONSchema(schema), bpe), Constrained(JSONSchema(schema, whitespace=""), bpe)
    compact = json.dumps(value, separators=(",", ":"))
    for text in (json.dumps(value), json.dumps(value, indent=2), json.dumps(value, indent=4), compact):
        assert place_of(link, bpe.encode(text)).complete
        if text != compact:
            with pytest.raises(SamplerError, match="was drawn where the constraint does not allow it"):
                place_of(tight, bpe.encode(text))
    with pytest.raises(SamplerError, match="does not allow it"):
        place_of(link, bpe.encode('{  "a"'))
    assert place_of(tight, bpe.encode(compact)).complete


@pytest.mark.parametrize(
    ("form", "lacks"), [({"regex": "a#"}, "#"), ({"regex": "[é]b"}, "é"), ({"grammar": 'root ::= "ab#"'}, "#"), ({"choices": ["a日"]}, "日")]
)
def test_the_characters_that_are_named_are_those_of_the_form(form, lacks):
    tokenizer = train("characters", texts=["abc"])
    with pytest.raises(SamplerError, match=f"The vocabulary has no {lacks}: change the"):
        generate(Bigram.random(tokenizer.vocab_size), [0], tokenizer=tokenizer, max_new_tokens=4, **form)


def test_a_choice_among_thousands_and_a_grammar_that_is_too_much():
    tokenizer = train("characters", texts=["abcdefgh"])
    texts = ["".join(word) for word in product("abcdefgh", repeat=4)]
    out = generate(Bigram.random(8), [0], tokenizer=tokenizer, choices=texts, max_new_tokens=9, temperature=1.0, seed=2)
    assert (out.text in texts, out.finish_reason) == (True, "stop")
    rule = "start: " + " | ".join(f'"{text}"' for text in texts)
    with pytest.raises(SamplerError, match=r"(cannot be used|too much to follow): .*items; max is"):
        Constrained(Grammar(rule), tokenizer)


def test_a_choice(bpe):
    texts = ["fox", "foxes", "日本", 'say "no"\n']
    seen = {generate(model_of(bpe, s), [1], tokenizer=bpe, choices=texts, seed=s).text for s in range(40)}
    assert seen == set(texts)
    assert Choices("fox").texts == ("fox",)


GBNF = 'root ::= pair ("," pair)*\npair ::= [a-c]+ "=" ("yes" | "no")\n'
LARK = 'start: pair ("," pair)*\npair: /[a-c]+/ "=" ("yes" | "no")\n'


def test_lark_and_gbnf_are_the_same_and_match_the_pattern(bpe):
    rows = [[1], [7, 8], [90]]
    for seed in range(4):
        lark = generate(model_of(bpe, seed), rows, tokenizer=bpe, grammar=LARK, seed=seed, max_new_tokens=40)
        gbnf = generate(model_of(bpe, seed), rows, tokenizer=bpe, grammar=GBNF, seed=seed, max_new_tokens=40)
        assert [r.ids for r in lark] == [r.ids for r in gbnf]
        for out in lark:
            if out.finish_reason != "length":
                assert re.fullmatch(r"[a-c]+=(yes|no)(,[a-c]+=(yes|no))*", out.text)
    assert Grammar('start: "::="').lark(Vocabulary.of(bpe)) == 'start: "::="'


def test_a_lark_grammar_with_options_of_its_own(bpe):
    out = generate(model_of(bpe), [1], tokenizer=bpe, grammar='%llguidance {"no_forcing": false}\nstart: "fox" NUMBER\nNUMBER: /[0-9]{2}/\n', seed=0)
    assert re.fullmatch(r"fox\d\d", out.text)


# Ends


def test_a_whole_text_ends_its_row_without_an_end_of_sequence():
    tokenizer = Few("a", "b", "c")
    out = generate(Bigram.random(3), [0], tokenizer=tokenizer, regex="abc", max_new_tokens=9)
    assert (out.text, out.finish_reason, len(out.ids)) == ("abc", "stop", 3)
    assert generate(Bigram.random(3), [0], tokenizer=tokenizer, regex="a+", max_new_tokens=9).finish_reason == "length"
    assert generate(Bigram.random(3), [0], tokenizer=tokenizer, regex="abc", max_new_tokens=2).finish_reason == "length"
    assert generate(Bigram.random(3), [0], tokenizer=tokenizer, regex="abc", max_new_tokens=3).finish_reason == "stop"


def test_the_empty_text_alone_is_refused_where_nothing_can_say_it():
    tokenizer = train("characters", texts=["abc"])
    with pytest.raises(SamplerError, match="The regular expression allows the empty text alone, which is no token, and the model has no end-of-sequence"):
        Constrained(Regex(""), tokenizer)
    assert Constrained(Regex("a?"), tokenizer).rule == Regex("a?")
    assert Constrained(Regex(""), tokenizer, eos=(0,)).eos == (0,)


def test_end_of_sequence_is_allowed_exactly_where_the_text_may_end():
    tokenizer = FewWithEnd("<end>", "a", "b")
    model = Bigram(torch.tensor([[9.0, 0, 0]] * 3))  # wants to end
    assert generate(model, [1], tokenizer=tokenizer, regex="a{2,5}", max_new_tokens=9).ids == [1, 1, 0]
    assert generate(model, [1], tokenizer=tokenizer, regex="(a|b)*", max_new_tokens=9).ids == [0]
    out = generate(model, [1], tokenizer=tokenizer, regex="a{2,5}", max_new_tokens=9, eos_id=())
    assert (out.ids, out.finish_reason) == ([1] * 5, "stop")
    other = generate(Bigram(torch.tensor([[0.0, 1, 5]] * 3)), [1], tokenizer=tokenizer, regex="[ab]{2,5}", max_new_tokens=9, eos_id=[2])
    assert (other.ids, other.finish_reason) == ([1, 1, 2], "eos")  # b ends here, so it is no text
    assert generate(model, [1], tokenizer=tokenizer, regex="a{1,5}", min_new_tokens=3, max_new_tokens=9).ids == [1, 1, 1, 0]


@pytest.mark.parametrize("eos", [None, ()])
@pytest.mark.parametrize("cache", [None, False])
def test_rows_that_end_at_different_times_do_not_disturb_each_other(bpe, eos, cache):
    rows = [[1], [2, 3], [4, 5, 6], [7, 8], [9], [11, 12], [13]]
    options = {"tokenizer": bpe, "regex": "([a-f]{1,9}|The )!", "max_new_tokens": 20, "seed": 4, "eos_id": eos}
    together = generate(model_of(bpe), rows, cache=cache, **options)
    assert len({len(r.ids) for r in together}) > 1
    for row, out in zip(rows, together, strict=True):
        alone = generate(model_of(bpe), row, **options)
        assert (alone.ids, alone.finish_reason) == (out.ids, out.finish_reason) and re.fullmatch("([a-f]{1,9}|The )!", out.text)
    from glassformer.core.tap import Tap

    assert [r.ids for r in generate(model_of(bpe), rows, tap=Tap(), **options)] == [r.ids for r in together]  # no row leaves the batch


def test_a_session_says_which_rows_are_whole():
    tokenizer = Few("a", "b")
    session = Session(Bigram.random(2), [[0], [1]], Constrained(Regex("ab"), tokenizer) | Greedy())
    assert session.ended == [False, False]
    session.step()
    assert session.ended == [False, False]
    session.step()
    assert session.ended == [True, True]
    with pytest.raises(SamplerError, match="No token is left to choose from in row 0"):
        session.step()


# Forks, rewinding, the memo


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}, "b": {"type": "integer"}}, "required": ["a", "b"]}


def chain_of(bpe):
    return Constrained(JSONSchema(SCHEMA), bpe) | TopK(40) | Temperature(1.5) | Draw(seed=3)


def run(session, n):
    for _ in range(n):
        session.step()
    return session.ids


@pytest.mark.parametrize("places", [1024, 2])
def test_forking_and_winding_back_give_what_is_given_without(bpe, places, monkeypatch):
    monkeypatch.setattr(matchers, "PLACES", places)  # with room for two places nearly all are computed anew
    prompts = [[5, 6], [7], [8, 9, 10]]
    straight = run(Session(model_of(bpe), prompts, chain_of(bpe)), 18)
    session = Session(model_of(bpe), prompts, chain_of(bpe))
    run(session, 9)
    twins = session.fork(2, seeds=[0, 71, 1, 72, 2, 73])
    other = run(twins, 9)
    assert [other[0], other[2], other[4]] == straight and other[1] != straight[0]
    run(session, 6)
    session.rewind(8)
    assert run(session, 11) == straight
    picked = Session(model_of(bpe), prompts, chain_of(bpe), seeds=[0, 1, 2])
    run(picked, 7)
    assert run(picked.select([2, 0]), 11) == [straight[2], straight[0]]


def test_steps_show_what_the_next_call_draws(bpe):
    chain = chain_of(bpe)
    state, logits = chain.state(2), torch.randn(2, bpe.vocab_size, generator=torch.Generator().manual_seed(0))
    history = torch.tensor([[3], [4]])
    for _ in range(5):
        shown = list(chain.steps(logits, history, state))
        drawn = chain(logits, history, state)
        assert shown[-1].chosen == drawn.tolist()
        history = torch.cat([history, drawn[:, None]], dim=1)
    with pytest.raises(SamplerError, match="looks at all 5 tokens that were drawn, but the history has 0: hand the whole of it"):
        chain(logits, None, state)


def test_the_trace_says_what_the_constraint_removed(bpe):
    out = generate(model_of(bpe), [1], tokenizer=bpe, choices=["fox", "abc"], temperature=0.9, seed=1, trace=True)
    first = out.trace[0]
    assert repr(first.stages[1].link).startswith("Constrained(Choices(texts=('fox', 'abc')))")
    allowed = [i for i, w in enumerate(Vocabulary.of(bpe).words) if w and (b"fox".startswith(w) or b"abc".startswith(w))]
    assert first.stages[1].left == len(allowed) and first.stages[1].removed == bpe.vocab_size - len(allowed)


# Vocabularies that lack characters


def test_a_branch_that_the_vocabulary_cannot_finish_is_never_entered():
    tokenizer = Few("a", "b", "c", "ab")
    for seed in range(6):
        out = generate(Bigram.random(4, seed), [0], tokenizer=tokenizer, regex="ab1|abX?c|ca1", seed=seed, max_new_tokens=9)
        assert (out.text, out.finish_reason) == ("abc", "stop")


def test_a_vocabulary_that_lacks_what_is_needed_is_refused_before_the_model_runs():
    tokenizer = train("characters", texts=["To be, or not to be: that is the question"])
    model = model_of(tokenizer)
    with pytest.raises(
        SamplerError, match=r"No text of this JSON schema can be written with this tokenizer's tokens\. The vocabulary has no \{ \} \[ \] \" 0 1 2"
    ):
        generate(model, [1], tokenizer=tokenizer, json_schema={"type": "object"})
    with pytest.raises(SamplerError, match=r"No text of this regular expression can be written .* The vocabulary has no"):
        stream(model, [1], tokenizer=tokenizer, regex="to be[0-9]")
    assert model.calls == []
    assert generate(model, [1], tokenizer=tokenizer, regex="to [a-z]{2}", max_new_tokens=9).text[:3] == "to "


# Models of every kind


def test_models_of_every_kind_keep_to_the_choice():
    from look.zoo import SPECS, words

    tokenizer, texts = words(), [" old man saw", " red fox", " the dog ran home to Rome"]
    decoders = {name: spec for name, spec in SPECS.items() if isinstance(spec, gf.Decoder)}
    assert len(decoders) > 5
    for name, spec in decoders.items():
        outs = generate(spec.build(seed=0), ["the old", "a", "when it rained"], tokenizer=tokenizer, choices=texts, temperature=1.0, seed=2, max_new_tokens=12)
        assert all(out.text in texts for out in outs), name


def test_beams_guesses_and_the_engine_keep_to_the_pattern(bpe):
    model = gf.Decoder(bpe.vocab_size, 16, (gf.Block(gf.Attention(2, position=gf.Rotary()), feedforward=gf.Plain(24)),)).build(seed=0)
    rows, pattern = ["The fox", "abc", '{"a"'], "([a-f]{2,6}|The )[0-9]!?"
    options = {"tokenizer": bpe, "regex": pattern, "max_new_tokens": 20}
    plain = generate(model, rows, seed=3, **options)
    assert all(re.fullmatch(pattern, out.text) for out in plain)
    for out in generate(model, rows, num_beams=3, **options) + generate(model, rows, num_beams=3, eos_id=(), **options):
        assert re.fullmatch(pattern, out.text) and out.finish_reason in ("stop", "eos")
    guessed = generate(model, rows, seed=3, prompt_lookup_num_tokens=3, **options)
    served = gf.Engine(model, tokenizer=bpe).generate(rows, regex=pattern, max_new_tokens=20, seed=3)
    for one in (guessed, served):
        assert [(out.ids, out.finish_reason) for out in one] == [(out.ids, out.finish_reason) for out in plain]


def test_an_encoder_decoder_keeps_to_the_pattern(bpe):
    half = {"d_model": 16, "blocks": (gf.Block(gf.Attention(2), gf.Plain(24)),)}
    decoder = gf.Decoder(bpe.vocab_size, 16, (gf.Block(gf.Attention(2, position=gf.Rotary()), feedforward=gf.Plain(24), cross=gf.Attention(2)),))
    model = gf.EncoderDecoder(gf.Encoder(bpe.vocab_size, **half), decoder).build(seed=0)
    out = generate(model, ["The fox", "abc 日本"], tokenizer=bpe, regex="[a-f]{3}[0-9]", seed=0, max_new_tokens=9, decoder_start=1)
    assert all(re.fullmatch("[a-f]{3}[0-9]", r.text) for r in out)


# A function of the user's


def test_where_follows_the_function(bpe):
    model = Bigram.random(8)
    out = generate(model, [[1], [2, 3]], max_new_tokens=6, seed=0, allowed=lambda ids: [(ids[-1] + 1) % 8, (ids[-1] + 2) % 8])
    for row, start in zip(out, (1, 3), strict=True):
        for a, b in zip([start, *row.ids], row.ids, strict=False):
            assert (b - a) % 8 in (1, 2)
    logits = torch.randn(2, 8)
    mask = torch.tensor([True, False] * 4)
    kept = torch.where(mask, logits, GONE)
    assert torch.equal(Where(lambda ids: mask).apply(logits), kept)
    assert torch.equal(Where(lambda ids: mask.numpy()).apply(logits), kept)
    assert torch.equal(Where(lambda ids: mask.tolist()).apply(logits), kept)
    assert torch.equal(Where(lambda ids: {0, 2, 4, 6}).apply(logits), kept)
    assert torch.equal(Where(lambda ids: torch.tensor([0, 2, 4, 6])).apply(logits), kept)
    assert torch.equal(Where(lambda ids: None).apply(logits), logits)
    seen = []
    Where(lambda ids: seen.append(ids)).apply(logits, torch.tensor([[-1, 3], [4, 5]]))
    assert seen == [[3], [4, 5]]


def test_what_a_function_may_not_answer():
    logits = torch.zeros(1, 8)
    for answer, why in (
        ([9], "allows token 9, but ids go from 0 to 7"),
        ([True], r"a mask of the shape \[1\], but the vocabulary has 8 tokens"),
        (3, "answered with a whole number; it says ids, a mask, or None for all"),
        ([0.5], "it says ids in one row, a mask of bool, or None for all"),
    ):
        with pytest.raises(SamplerError, match=why):
            Where(lambda ids, answer=answer: answer).apply(logits)
    with pytest.raises(SamplerError, match=r"takes one argument, the ids of its row\. .*\(batch_id\) to give: write lambda ids"):
        generation(None, prefix_allowed_tokens_fn=lambda batch_id, ids: [0])
    with pytest.raises(SamplerError, match="No token is left to choose from in row 0 at step 0"):
        generate(Bigram.random(8), [1], allowed=lambda ids: [])
    assert generate(Bigram.random(8), [1], prefix_allowed_tokens_fn=lambda ids: [4], max_new_tokens=3).ids == [4, 4, 4]


def test_a_function_and_a_rule_go_together(bpe):
    vowels = [i for i, w in enumerate(Vocabulary.of(bpe).words) if w in (b"a", b"e")]
    out = generate(model_of(bpe), [1], tokenizer=bpe, regex="[a-f]{4}", allowed=lambda ids: vowels, seed=0, max_new_tokens=9)
    assert re.fullmatch("[ae]{4}", out.text)
    chain = generation(None, tokenizer=bpe, regex="[a-f]{4}", allowed=len, temperature=0.8, logit_bias={1: 1.0}, seed=3)
    assert str(chain) == "Constrained(Regex(pattern='[a-f]{4}')) | Where(len) | LogitBias(bias=((1, 1.0),)) | Temperature(t=0.8) | Draw(seed=3)"


# What is wrong


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
            r"The JSON schema cannot be used: Unsatisfiable schema: minLength \(5\) is greater",
        ),
        ({"json_schema": {"type": "strin"}}, "The JSON schema cannot be used: type is 'strin'. Did you mean 'string'"),
        ({"json_schema": {"type": ["null", 3]}}, "The JSON schema cannot be used: type is 3. Known: string, number"),
        (
            {"json_schema": {"properties": {"type": {"type": "string"}, "age": {"items": {"anyOf": [{}, {"type": "strng"}]}}}}},
            "cannot be used: properties.age.items.anyOf.1.type is 'strng'. Did you mean 'string'",
        ),
        (
            {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}, "c": {"type": "int"}}}}}},
            r"cannot be used: \$defs.a.properties.c.type is 'int'. Did you mean 'integer'",
        ),
        ({"json_schema": {"properties": 3}}, "The JSON schema cannot be used: "),
        ({"json_schema": {"type": "object", "propertyNames": {"pattern": "a"}}}, r'The JSON schema cannot be used: Unimplemented keys: \["propertyNames"\]'),
        ({"json_schema": False}, "The JSON schema is false, which nothing meets"),
        ({"json_schema": "{"}, r"The JSON schema is no JSON \(Expecting .*\): '\{'\. Give a dict"),
        ({"json_schema": 3}, "A JSON schema is a dict, its JSON text, or a pydantic model class, but a whole number was given: '3'"),
        ({"json_schema": {"const": {1, 2}}}, "The JSON schema holds what JSON cannot"),
        ({"regex": "a("}, "The regular expression cannot be used: .*unclosed group"),
        ({"regex": r"a(?=b)"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"[^\s\S]"}, "No text of this regular expression can be written with this tokenizer's tokens. Nothing meets it"),
        ({"grammar": "start: foo"}, 'The grammar cannot be used: .*unknown name: "foo"'),
        ({"grammar": "root ::= ("}, "The grammar cannot be used: it cannot be read as GBNF: "),
        ({"grammar": "hello"}, "The grammar cannot be used: "),
        ({"choices": []}, r"A choice is among one text or more, none of them empty, but \[\] was given"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"constraint": "a"}, "constraint is a rule such as"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices were both given, and each says what the whole text is: leave one out"),
        ({"regex": "a", "forced_first": [3]}, "forced_first brings in tokens that regex may not allow: leave one of them out"),
        ({"regex": "a", "forced_last": 3}, "forced_last brings in tokens that regex may not allow"),
        ({"regex": 3}, "regex"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_runs(bpe, options, why):
    model = model_of(bpe)
    with pytest.raises(SamplerError, match=why) as error:
        generate(model, [1], tokenizer=bpe, **options)
    assert model.calls == []
    assert "\n" not in str(error.value) and "state>" not in str(error.value) and len(str(error.value)) < 700


def test_a_rule_needs_a_tokenizer_and_a_known_syntax(bpe):
    with pytest.raises(InputError, match="A regular expression rules text, and without a tokenizer there are only ids: give tokenizer"):
        generate(Bigram.random(), [1], regex="a")
    with pytest.raises(SamplerError, match="A grammar's syntax is 'lark' or 'gbnf', but 'bnf' was given"):
        Grammar("a", "bnf")


def test_words_begin_with_their_space():
    from look.zoo import words

    with pytest.raises(
        SamplerError, match=r"No text of this choice can be written .*\(its tokens are words that begin with their space, and so has the text to\)"
    ):
        Constrained(Choices(("old man",)), words())


def test_a_constraint_can_be_pickled_and_copied(bpe):
    import copy
    import pickle

    chain = chain_of(bpe)
    for twin in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain)):
        assert twin == chain and hash(twin) == hash(chain)
        assert run(Session(model_of(bpe), [[5]], twin), 12) == run(Session(model_of(bpe), [[5]], chain), 12)


def test_a_token_forced_behind_the_constraint_is_told(bpe):
    from glassformer.infer import ForceFirst

    chain = Constrained(Regex("[a-f]{4}"), bpe) | ForceFirst((bpe.encode("1")[0],)) | Greedy()
    with pytest.raises(SamplerError, match=r"Token \d+ was drawn where the constraint does not allow it: another link of the chain brought it in"):
        generate(model_of(bpe), [1], tokenizer=bpe, sampler=chain)


def test_a_model_with_more_and_with_fewer_logits_than_the_tokenizer(bpe):
    wide = Bigram.random(bpe.vocab_size + 40)
    assert re.fullmatch("[a-f]{3}", generate(wide, [1], tokenizer=bpe, regex="[a-f]{3}", seed=0).text)
    narrow = Bigram.random(bpe.vocab_size - 20)
    assert re.fullmatch("[a-f]{3}", generate(narrow, [1], tokenizer=bpe, regex="[a-f]{3}", seed=0).text)


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bpe):
    return gf.save(gf.preset("tiny", vocab_size=bpe.vocab_size).build(seed=0), tmp_path_factory.mktemp("m") / "m", bpe)


def test_the_command_line(capsys, folder, tmp_path):
    from glassformer.cli import app as cli

    def command(*args):
        code = cli.main(["generate", str(folder), "abc ", "-n", "40", "--seed", "3", *args])
        return code, *capsys.readouterr()

    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["fox", 3]}), encoding="utf-8")
    (tmp_path / "g.gbnf").write_text(GBNF.replace("+", "{1,3}").replace(")*", "){0,2}"), encoding="utf-8")
    assert json.loads(command("--json-schema", str(tmp_path / "schema.json"))[1].removeprefix("abc ")) in ("fox", 3)
    assert command("--json-schema", '{"const": [1, "x"]}')[1].removeprefix("abc ").replace(" ", "").replace("\n", "") == '[1,"x"]'
    assert re.fullmatch(r"abc \d{3}\n", command("--regex", r"\d{3}")[1])
    assert command("--choice", "fox", "--choice", "over")[1] in ("abc fox\n", "abc over\n")
    assert re.fullmatch(r"abc [a-c]{1,3}=(yes|no)(,[a-c]{1,3}=(yes|no)){0,2}\n", command("--grammar", str(tmp_path / "g.gbnf"))[1])
    assert command("--regex", r"\d{3}", "--show-sampler")[2].startswith(r"Constrained(Regex(pattern='\\d{3}')) | ")
    assert "cut after 40 tokens (-n), so it may be no more than the beginning of such a text" in command("--regex", r"\d{400}")[2]
    assert "cut after" not in command("--regex", r"\d{3}")[2]
    code, out, err = command("--regex", "a(")
    assert code == 2 and out == "" and "The regular expression cannot be used" in err
    code, _, err = command("--grammar", str(tmp_path / "none"))
    assert code == 2 and "the file cannot be read (No such file or directory)" in err
    (tmp_path / "bad").write_bytes(b"\xff")
    assert "the file is not UTF-8 text" in command("--json-schema", str(tmp_path / "bad"))[2]
