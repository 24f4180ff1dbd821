"""Links that look back: each against its rule written again, token by token; DRY against llama.cpp itself as well."""

from __future__ import annotations

import ctypes
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from glassformer.core.errors import SamplerError
from glassformer.infer import DRY, BadWords, Breakers, Chain, Draw, Greedy, NoRepeatNGram, SequenceBias, TopK
from glassformer.infer.history import repeats
from infer.fake import Bytes, Pieces

GONE = -math.inf
V = 12


# The rules again, one row at a time


def no_repeat(x, history, n):
    if n == 0:
        return x
    seen = {tuple(history[i : i + n]) for i in range(len(history) - n + 1)}
    y = np.array([GONE if (*history[len(history) - n + 1 :], t) in seen else l for t, l in enumerate(x)])
    return y if (y > GONE).any() or len(history) < n - 1 else x


def sequence_bias(x, history, table):
    y = x.copy()
    for (*before, last), value in table.items():
        if history[len(history) - len(before) :] == before:
            y[last] += value
    return y if (y > GONE).any() else x


def dry(x, history, multiplier, base=1.75, allowed=2, window=None, breakers=()):
    """As llama.cpp tells it: the last breaker, the longest repeat before every token, the penalty."""
    h = history if window is None else history[max(0, len(history) - window) :]
    n, reach = len(h), len(h)
    for i in range(n - 1, -1, -1):  # the last place where a breaker begins, and its longest one there
        found = [len(s) for s in breakers if h[i : i + len(s)] == list(s)]
        if found:
            reach = n - i - max(found)
            break
    longest = {}
    for end in range(n - 1):
        length = 0
        while length <= end and h[end - length] == h[n - 1 - length]:
            length += 1
        length = min(length, reach)
        if length >= allowed:
            longest[h[end + 1]] = max(longest.get(h[end + 1], 0), length)
    y = x.copy()
    for token, length in longest.items():
        if (token,) not in breakers:
            more = length - allowed
            y[token] -= multiplier * base ** (min(more, int(88.7228391 / math.log(base))) if base > 1.000001 else more)
    return y


def rows_of(seed, b=4, v=V, n=40, symbols=None):
    g = np.random.default_rng(seed)
    x = torch.tensor(g.normal(size=(b, v)) * 3, dtype=torch.float32)
    history = [g.integers(0, symbols or v, size=g.integers(0, n)).tolist() for _ in range(b)]
    return x, history


def after(link, x, history):
    (step,) = Chain((link,)).steps(x, history)
    return step.logits.numpy()


def same(link, rule, seeds, **rows):
    for seed in seeds:
        x, history = rows_of(seed, **rows)
        want = np.stack([rule(row, h) for row, h in zip(x.double().numpy(), history, strict=True)])
        np.testing.assert_allclose(after(link, x, history), want, rtol=2e-6, atol=1e-5, err_msg=str(history))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_no_ngram_comes_twice(n):
    same(NoRepeatNGram(n), lambda x, h: no_repeat(x, h, n), range(60), symbols=3)


def test_no_ngram_comes_twice_in_a_whole_text():
    chain = NoRepeatNGram(3) | Draw(1)
    state, text = chain.state(2), [[1], [2, 2]]
    for _ in range(100):
        for row, token in zip(text, chain(torch.zeros(2, 6), text, state).tolist(), strict=True):
            row.append(token)
    for row in text:
        grams = [tuple(row[i : i + 3]) for i in range(len(row) - 2)]
        assert len(set(grams)) == len(grams)


SEQUENCES = {(3,): 1.5, (0, 3): -2.0, (1, 2): 4.0, (0, 1, 2): GONE, (2, 2, 2, 0): GONE, (5,): GONE}


def test_a_sequence_bias_waits_for_what_stands_before():
    same(SequenceBias(SEQUENCES), lambda x, h: sequence_bias(x, h, SEQUENCES), range(80), symbols=3)
    words = ((4,), (0, 1), (1, 0, 2), (2, 2))
    same(BadWords(words), lambda x, h: sequence_bias(x, h, dict.fromkeys(words, GONE)), range(80), symbols=3)


@pytest.mark.parametrize(
    "link",
    [
        DRY(0.8),
        DRY(1.3, 2.5, 1),
        DRY(0.8, 1.0, 3),
        DRY(0.8, 1.75, 2, 9),
        DRY(0.8, window=1),
        DRY(0.8, breakers=((0,),)),
        DRY(0.8, 1.75, 1, breakers=((1,), (0, 2), (2, 1, 2), (0, 2, 2))),
        DRY(0.8, 1.75, 1, 15, breakers=((0, 1), (0,), (0, 1, 0))),
    ],
    ids=repr,
)
def test_dry_lowers_what_would_continue_a_repeat(link):
    def rule(x, h):
        return dry(x, h, link.multiplier, link.base, link.allowed_length, link.window, link.breakers.sequences)

    same(link, rule, range(60), symbols=3)
    same(link, rule, range(100, 130), symbols=2, n=150)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 4), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3))
@hypothesis_settings(max_examples=150, deadline=None)
def test_dry_on_any_history(history, allowed, breakers):
    x = np.linspace(-2, 2, 4)
    got = after(DRY(0.7, 1.5, allowed, breakers=breakers), torch.tensor(x)[None], [history])
    np.testing.assert_allclose(got[0], dry(x, history, 0.7, 1.5, allowed, None, tuple(map(tuple, breakers))), rtol=1e-5, atol=1e-5)


def test_a_repeat_without_end_is_counted_to_the_largest_penalty_and_costs_little():
    history = torch.full((4, 3000), 7)
    link = DRY(0.8)
    assert link.most == 2 + 158
    began = time.perf_counter()
    got = link.apply(torch.zeros(4, 20), history)
    assert time.perf_counter() - began < 2
    assert got[:, 7].tolist() == pytest.approx([-1e30] * 4)  # finite, so that a row never loses its last token to it
    assert (got[:, :7] == 0).all() and (got[:, 8:] == 0).all()
    rows, ends = torch.zeros(2, dtype=torch.long), torch.tensor([2998, 1])
    assert repeats(history, rows, ends).tolist() == [2999, 2]
    assert repeats(history, rows, ends, 50).tolist() == [50, 2]


LINKS = [NoRepeatNGram(1), NoRepeatNGram(2), DRY(5.0, 3.0, 1), BadWords(((0,), (1, 2), (1, 1))), SequenceBias({(1,): -3.0, (2, 0): GONE})]
VALUES = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([GONE, 0.0, 3e38, -3e38, math.nan]))


@pytest.mark.parametrize("link", LINKS, ids=repr)
@given(logits=st.lists(VALUES, min_size=3, max_size=3), history=st.lists(st.integers(0, 2), max_size=12))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_token_is_always_left(link, logits, history):
    x = torch.tensor([logits])
    got = link.apply(x.clone(), torch.tensor([history], dtype=torch.long))
    if not x.isnan().any():
        assert not got.isnan().any()
        assert bool((x > GONE).any()) == bool((got > GONE).any())
        assert not ((got > GONE) & (x == GONE)).any()


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_rows_do_not_see_each_other_and_padding_is_nothing(link):
    x, history = rows_of(3, b=6, v=5, symbols=3)
    together = after(link, x, history)
    for i, h in enumerate(history):
        np.testing.assert_array_equal(after(link, x[i : i + 1], [h])[0], together[i])
    padded = torch.full((6, 60), -1)
    for i, h in enumerate(history):
        padded[i, 60 - len(h) :] = torch.tensor(h, dtype=torch.long)
    np.testing.assert_array_equal(after(link, x, padded), together)


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_the_narrowed_way_is_the_plain_way_and_logits_are_not_written_to(link):
    x, history = rows_of(5, b=6, v=9, symbols=3)
    for chain in (TopK(5) | link | TopK(3) | Draw(2), link | TopK(3) | Greedy()):
        state, kept = chain.state(6), x.clone()
        *_, last = chain.steps(x, history, state)
        assert last.chosen == chain(x, history, state).tolist()
        assert torch.equal(x, kept)


@pytest.mark.parametrize("link", [NoRepeatNGram(0), DRY(0), DRY(0.8, window=0), BadWords(()), SequenceBias({})], ids=repr)
def test_off_values_do_nothing(link):
    x, _ = rows_of(1)
    assert link.off
    assert torch.equal(link.apply(x, torch.zeros(4, 9, dtype=torch.long)), x)


def test_without_a_history_only_what_needs_none_acts():
    x = torch.zeros(1, 4)
    for link in (NoRepeatNGram(2), DRY(0.8)):
        assert torch.equal(link.apply(x), x)
    assert BadWords(((1,), (2, 3))).apply(x).tolist() == [[0, GONE, 0, 0]]


def test_links_are_plain_data_and_come_back():
    chain = NoRepeatNGram(3) | SequenceBias({(1, 2): -1.0}) | BadWords([[1], [2, 3]]) | DRY(0.8, breakers=Breakers(("a",), ((1,), (2, 0)))) | Greedy()
    again = Chain.from_dict(json.loads(json.dumps(chain.to_dict())))
    assert again == chain and hash(again) == hash(chain)
    assert eval(repr(Chain(chain.links[:3]))) == Chain(chain.links[:3])
    assert repr(chain.links[3]) == "DRY(multiplier=0.8, breakers=Breakers.of(tokenizer, ('a',)))"
    assert repr(DRY(0.8, breakers=[[3]])) == "DRY(multiplier=0.8, breakers=Breakers(sequences=((3,),)))"
    assert repr(Breakers()) == "Breakers()"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoRepeatNGram(-1), "whole number, 0 or more, but -1"),
        (lambda: DRY(-0.1), "multiplier is 0 or more, but -0.1"),
        (lambda: DRY(math.inf), "multiplier is 0 or more, but inf"),
        (lambda: DRY(0.8, 0.9), "base is 1 or more, but 0.9"),
        (lambda: DRY(0.8, allowed_length=0), "1 token or more, but 0"),
        (lambda: DRY(0.8, window=-1), "window is 0 tokens or more, but -1"),
        (lambda: DRY(0.8, breakers=[[]]), "A sequence breaker is empty"),
        (lambda: DRY(0.8, breakers=["x"]), "the text 'x' was given: encode it"),
        (lambda: BadWords([3]), r"but 3 was given: write \(3,\)"),
        (lambda: BadWords([[3, -1]]), "A bad word holds the token -1"),
        (lambda: SequenceBias({(): 1.0}), "A sequence with a bias is empty"),
        (lambda: SequenceBias({(1,): math.inf}), r"bias of the sequence \(1,\) is inf"),
        (lambda: SequenceBias({(4, 9): 1.0}).apply(torch.zeros(1, 9)), "A sequence bias names token 9, but the vocabulary has 9"),
        (lambda: BadWords([[9]]).apply(torch.zeros(1, 9)), "A bad word names token 9, but the vocabulary has 9"),
        (lambda: Breakers.of(Bytes257(), [""]), "A sequence breaker is empty"),
        (lambda: Breakers.of(Pieces("a", "b"), ["a"]), "Pieces does not say how many tokens it has"),
    ],
)
def test_senseless_settings_are_errors_that_say_what_to_do(make, words):
    with pytest.raises(SamplerError, match=words):
        make()


# Sequence breakers


class Bytes257(Bytes):
    vocab_size = 257


class Sized(Pieces):
    def __len__(self):
        return len(self.pieces)


def test_breakers_lie_across_the_borders_of_tokens():
    tok = Sized("a", "x\n", "\n", "<", "/s", ">", "a</s>", "<<", "/s>", "\n<")
    assert Breakers.of(tok, ["\n"]).sequences == ((1,), (2,), (9,))
    found = Breakers.of(tok, ["</s>"]).sequences  # encode("/s>") takes the longest piece
    assert found == ((3, 8), (6,), (7, 8), (9, 8))

    class Unhashable(Sized):
        __hash__ = None

    assert Breakers.of(Unhashable(*tok.pieces), "</s>").sequences == found
    link = DRY(0.8, 1.75, 1, breakers=Breakers.of(tok, ["</s>"]))
    repeat = [0, 2, 0, 2]
    assert link.apply(torch.zeros(1, 10), torch.tensor([repeat]))[0, 0] < 0
    assert (link.apply(torch.zeros(1, 10), torch.tensor([[*repeat, 0, 7, 8]])) == 0).all()  # "…<<" "/s>" has just ended
    assert link.apply(torch.zeros(1, 10), torch.tensor([[0, 2, 6, 0]]))[0, 2] < 0
    assert (link.apply(torch.zeros(1, 10), torch.tensor([[6, 2, 0, 2]]))[0, 6]) == 0


def test_a_breaker_that_is_cut_within_a_character_is_found_in_bytes():
    assert Breakers.of(Bytes257(), ["ab", "é"]).sequences == ((97, 98),)  # without its bytes a piece of é is U+FFFD

    class Raw(Bytes257):
        def decode_bytes(self, ids):
            return bytes(i for i in ids if i < 256)

    assert Breakers.of(Raw(), ["é"]).sequences == ((0xC3, 0xA9),)


# Against llama.cpp


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A trained byte-level tokenizer, and llama.cpp's reading of it."""
    pytest.importorskip("gguf")
    llama = pytest.importorskip("llama_cpp")
    from glassformer.models.presets import preset
    from glassformer.text import train
    from glassformer.weights.export_gguf import export_gguf

    tok = train("bpe", texts=['Tom: "Come, *now*," he said.\nAnn: "No: not now."\n\nTom said no, and said no.\n'] * 30, vocab_size=320)
    spec = preset("gpt2", vocab_size=tok.vocab_size)
    small = spec.replace(d_model=32, blocks=spec.blocks[:1]).at("blocks.*.attention.n_heads").set(2).at("blocks.*.feedforward.d_ff").set(64)
    file = export_gguf(small.build(seed=0), tmp_path_factory.mktemp("llama") / "m.gguf", tokenizer=tok)
    model = llama.Llama(str(file), vocab_only=True, verbose=False)
    return tok, llama.llama_cpp, model


@pytest.mark.parametrize("texts", [(), ("\n", ":", '"', "*"), ("said no", "now", ' "'), (", and said",)], ids=str)
@pytest.mark.parametrize("window", [None, 12])
def test_dry_is_that_of_llama_cpp(vocabulary, texts, window):
    tok, llama, model = vocabulary
    v = tok.vocab_size
    names = (ctypes.c_char_p * max(len(texts), 1))(*[t.encode() for t in texts])
    vocab = llama.llama_model_get_vocab(model._model.model)
    link = DRY(0.8, 1.75, 2, window, Breakers.of(tok, texts))
    g, lowered = np.random.default_rng(0), 0
    text = tok.encode('Tom: "Come, *now*," he said.\nAnn: "No: not now."\nTom said no, and said no. Tom: "No: not now, and said no, and said')
    for _ in range(90):
        history = text[: g.integers(3, len(text))] if g.random() < 0.5 else g.choice(text, size=60).tolist()
        history = history + (history[: g.integers(0, 9)] if g.random() < 0.5 else history[-5:])
        theirs = llama.llama_sampler_init_dry(vocab, 0.8, 1.75, 2, window or 4096, names, len(texts))
        for token in history:
            llama.llama_sampler_accept(theirs, token)
        data = (llama.llama_token_data * v)(*[llama.llama_token_data(i, 0.0, 0.0) for i in range(v)])
        array = llama.llama_token_data_array(data, v, -1, False)
        llama.llama_sampler_apply(theirs, ctypes.byref(array))
        llama.llama_sampler_free(theirs)
        want = np.zeros(v)
        for i in range(v):
            want[data[i].id] = data[i].logit
        got = link.apply(torch.zeros(1, v), torch.tensor([history]))[0].numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=tok.decode(history))
        lowered += (want < 0).sum()
    assert lowered > 5
