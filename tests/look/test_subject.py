"""What is looked at: texts, ids, positions, targets and heads, and what is said when they do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, SiteError
from glassformer.look.subject import (
    Target,
    check_layer,
    check_reads_tokens,
    choose,
    feedforward_of,
    n_heads,
    n_layers,
    read,
    read_head,
    read_pair,
    with_weights,
)
from look import zoo

GPT2 = zoo.model("gpt2")
WORDS = zoo.words()


def test_a_text_and_its_ids_are_the_same_subject() -> None:
    text = "the old man saw a red fox"
    ids = WORDS.encode(text)
    subjects = [read(GPT2, text, WORDS), read(GPT2, ids, WORDS), read(GPT2, torch.tensor(ids), WORDS), read(GPT2, torch.tensor([ids]), WORDS)]
    assert {s.ids for s in subjects} == {tuple(ids)}
    assert subjects[0].pieces == tuple(text.split())
    assert read(GPT2, ids).pieces[0] == f"‹{ids[0]}›"


def test_what_gf_load_gives_has_its_tokenizer(tmp_path) -> None:
    gf.save(GPT2, tmp_path / "m", WORDS)
    assert read(gf.load(tmp_path / "m"), "the old man").pieces == ("the", "old", "man")


@pytest.mark.parametrize("name", zoo.SPECS)
def test_a_run_records_what_the_model_computes(name: str) -> None:
    model = zoo.model(name)
    s = read(model, **zoo.texts(name))
    record, logits = s.run("blocks.1.resid_pre", "blocks.*.attn.pattern")
    with torch.no_grad():
        assert torch.equal(logits, model(*s.inputs)[0])
    assert record[s.path("blocks.1.resid_pre")].shape == (1, 9, zoo.D)
    assert (s.layers, s.causal) == (len(s.stack.blocks), name != "bert")
    assert feedforward_of(s.stack, 0) == ("experts" if name == "experts" else "ffn")
    assert n_heads(s.stack, 1) == 4


def test_a_model_is_left_in_its_mode() -> None:
    model = zoo.model("llama").train()
    read(model, [1, 2, 3]).run("logits")
    assert model.training


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, [0, 1, 2, 3, 4]), (-1, [4]), ([0, -2], [0, 3]), (slice(1, 3), [1, 2]), ("old man", [1, 2]), ("man", [2]), ("oldman", [1, 2])],
)
def test_positions(given: Any, expected: list[int]) -> None:
    assert read(GPT2, "the old man saw a", WORDS).positions(given) == expected


def test_one_position() -> None:
    s = read(GPT2, "the old man saw a", WORDS)
    assert (s.position(None), s.position(1), s.position("old man")) == (4, 1, 2)
    with pytest.raises(InputError, match=r"One position is needed, but 2 were given: \[0, 1\]"):
        s.position([0, 1])


def test_an_encoder_is_asked_about_its_mask_token() -> None:
    tokenizer = gf.text.train("wordpiece", texts=[" ".join(zoo.WORDS)] * 3, vocab_size=120, special=("[MASK]",), min_frequency=1)
    model = zoo.SPECS["bert"].replace(vocab_size=tokenizer.vocab_size).build(seed=0)
    s = read(model, "the old [MASK] ran home", tokenizer)
    assert s.pieces[s.position(None)] == "[MASK]"


def test_targets() -> None:
    s = read(GPT2, "the old man", WORDS)
    logits = torch.arange(zoo.V, dtype=torch.float32)
    man, fox = WORDS.encode("man")[0], WORDS.encode("fox")[0]
    assert s.target(None, logits).token == zoo.V - 1
    assert s.target("man", logits) == s.target(man, logits) == Target(man, None, "man")
    pair = s.target(("man", "fox"), logits)
    assert (pair.ids, pair.label) == ((man, fox), "man − fox")
    assert pair.of(torch.stack([logits, 2 * logits])).tolist() == [man - fox, 2 * (man - fox)]
    assert s.target(pair, logits) is pair


def test_labels_tell_equal_pieces_apart() -> None:
    assert read(GPT2, "the old man saw the fox", WORDS).labels() == ["the 0", "old", "man", "saw", "the 4", "fox"]


def test_heads() -> None:
    assert {read_head(GPT2, h) for h in ("2.1", "L2H1", "2,1", "l2 h1", (2, 1))} == {(2, 1)}
    assert (n_layers(GPT2), check_layer(GPT2, 2)) == (3, 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: read(GPT2, "", WORDS), InputError, "The text has 0 tokens, but at least 1 is looked at: give some text."),
        (lambda: read(GPT2, []), InputError, "The text has 0 tokens"),
        (lambda: read(GPT2, "some text"), InputError, "text is a text, but there is no tokenizer to read it: give tokenizer=,"),
        (lambda: read(GPT2, [1] * 65), InputError, "The text has 65 tokens, but this model has positions for 64: give a shorter one"),
        (lambda: read(GPT2, [1, 2, 3], most=2), InputError, "The text has 3 tokens, but at most 2 are shown here"),
        (lambda: read(GPT2, [1, 99]), InputError, "text holds the token id 99, but the model's vocabulary is 0 to 30"),
        (lambda: read(GPT2, [1, -2]), InputError, "text holds the token id -2, but the model's vocabulary is 0 to 30"),
        (lambda: read(GPT2, ["a", "b"]), InputError, "text is a list that holds 'a', but one text is read at a time"),
        (lambda: read(GPT2, torch.ones(2, 3, dtype=torch.long)), InputError, r"shape \(2, 3\), but one row of token ids is read"),
        (lambda: read(GPT2, 5), InputError, "text is a whole number, but a text or token ids are read"),
        (lambda: read(zoo.SPECS["gpt2"], [1]), InputError, r"A model of glassformer is looked into, but .* was given: gf.load\(folder\) gives one"),
        (lambda: read(torch.nn.Linear(2, 2), [1]), InputError, r"look.foreign\(model\) opens a model of transformers"),
        (lambda: read(zoo.SPECS["gpt2"].build(device="meta"), [1]), InputError, "stands on the meta device"),
        (
            lambda: read(zoo.model("t5"), [1]),
            InputError,
            "An encoder-decoder reads two texts, but one was given: text is the decoder's, source= the encoder's.",
        ),
        (lambda: read(GPT2, [1], source=[2]), InputError, "this Decoder reads one text only: leave source out"),
        (lambda: read_pair(GPT2, "the old man", "the man", WORDS), InputError, "the first has 3 tokens .the old man. and the second 2 .the man."),
        (lambda: read(GPT2, [1, 2]).positions(2), InputError, "Position 2 was asked for, but the text has 2 tokens: positions are 0 to 1"),
        (lambda: read(GPT2, [1, 2]).positions([True]), InputError, "A position is a whole number, but True or False was given"),
        (lambda: read(GPT2, [1, 2]).positions([]), InputError, "No position was given"),
        (lambda: read(GPT2, [1, 2]).positions(slice(5, 9)), InputError, "holds none of the text's 2 positions"),
        (lambda: read(GPT2, "the old man", WORDS).positions("fox"), InputError, "'fox' does not stand in the text 'the old man'"),
        (lambda: read(GPT2, "the man", WORDS).token("old man"), InputError, r"'old man' is 2 tokens \('old', 'man'\), but a target is one"),
        (lambda: read(GPT2, [1]).token("old"), InputError, "'old' is a text, but there is no tokenizer to read it"),
        (lambda: read(GPT2, [1]).token(31), InputError, "Token id 31 was asked about, but the vocabulary has 31 tokens, 0 to 30."),
        (lambda: read(GPT2, [1]).token(True), InputError, "A token is named by its id or its text, but True or False was given"),
        (lambda: read(GPT2, [1]).target((1, 2, 3), torch.zeros(31)), InputError, "A target is one token or a pair of two, whose logits are subtracted; 3 were"),
        (lambda: read(GPT2, [1]).target((3, 3), torch.zeros(31)), InputError, r"whose logits are subtracted, but both are 3 \(id 3\): give another token"),
        (lambda: read(GPT2, "the man", WORDS).target(("man", "man"), torch.zeros(31)), InputError, "but both are 'man' .* give another token, or one alone"),
        (lambda: read(GPT2, "the man", WORDS).target(("man", " man"), torch.zeros(31)), InputError, "but 'man' and ' man' are both 'man'"),
        (lambda: read(GPT2, [1]).path("blocks.0.attn.patern"), SiteError, "Did you mean 'blocks.0.attn.pattern'"),
        (lambda: read_head(GPT2, "5.1"), SiteError, "Layer 5 was asked for, but the model has 3 layers, 0 to 2."),
        (lambda: read_head(GPT2, "2.4"), SiteError, "Head 2.4 was asked for, but layer 2 has 4 heads, 0 to 3."),
        (lambda: read_head(GPT2, "five"), SiteError, "'five' names no head: write layer and head, both counted from 0, such as '2.3' or 'L2H3', the last one."),
        (lambda: read_head(GPT2, [1, 2]), SiteError, r"\[1, 2\] names no head: give \(layer, head\), or a text such as '2.3', the last one\."),
        (lambda: choose("laier", ("layer", "head"), "axis"), InputError, "'laier' is no axis. Did you mean 'layer'. Known: layer, head."),
        (lambda: with_weights(SimpleNamespace(), "This"), InputError, "This reads the model's matrices, which a foreign model keeps under names of its own"),
        (
            lambda: check_reads_tokens(zoo.SPECS["bert"].replace(readout=gf.Vector()).build(device="meta"), "A lens"),
            InputError,
            "A lens asks for scores over the vocabulary, but this model ends in Vector: give one with readout=LanguageModel",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_a_spaced_word_is_suggested() -> None:
    bpe = gf.text.train("bpe", texts=["a wanderer met the wanderer and the wanderer"] * 4, vocab_size=330)
    model = zoo.SPECS["gpt2"].replace(vocab_size=bpe.vocab_size).build(seed=0)
    assert len(bpe.encode(" wanderer")) == 1
    assert len(bpe.encode("wanderer")) > 1
    with pytest.raises(InputError, match=r"but a target is one: ' wanderer' \(with its space\) is one\."):
        read(model, "the", bpe).token("wanderer")


def test_a_pass_goes_on_only_from_a_stream():
    model = zoo.model("gpt2")
    x = torch.zeros(1, 3, zoo.D)
    for args, options, message in (
        ((x, True), {}, "a pass goes on at block 0 to 3; True was given"),
        ((x.long(), 0), {}, "The stream is torch.int64, but a stream holds vectors"),
        ((x, 0), {"mask": "causal"}, "mask is a text, but"),
        ((x, 0), {"lengths": 3}, "lengths is a whole number, but a list is needed"),
        ((x, 0), {"tap": "logits"}, "tap is a text, but"),
    ):
        with pytest.raises(InputError, match=message):
            model.resume(*args, **options)
    pooled = zoo.SPECS["bert"].replace(readout=gf.Classifier(3)).build(seed=0)
    with pytest.raises(InputError, match="keep chooses positions to read out, but Classifier makes one vector"):
        pooled.resume(x, 3, keep=1)
