"""Prompts, endings, streams and errors of ``generate``, on a model that knows only which token follows which."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from glassformer.core.errors import CacheError, InputError, SamplerError
from glassformer.infer import Draw, Generated, Greedy, Penalties, Session, TopK, build_chain, generate, stream
from glassformer.infer.named import Settings
from glassformer.infer.options import Options
from infer.fake import Bigram, Bytes, Pieces

ABC = Pieces("a", "b", "c", "END", "E", "N", "D", "\n")


def says(text: str, tokenizer=ABC) -> Bigram:
    return Bigram.cycle(tokenizer.encode(text), len(tokenizer.pieces))


# Prompts


def test_a_text_a_list_and_a_tensor_give_the_same():
    model = says("abc")
    want = generate(model, "ab", tokenizer=ABC, max_new_tokens=4)
    assert isinstance(want, Generated)
    assert (want.text, want.ids, want.prompt_ids, want.finish_reason) == ("cabc", [2, 0, 1, 2], [0, 1], "length")
    assert str(want) == "cabc"
    for prompt in ([0, 1], torch.tensor([0, 1])):
        assert generate(model, prompt, tokenizer=ABC, max_new_tokens=4) == want
    for prompt in (["ab"], [[0, 1]], torch.tensor([[0, 1]])):
        assert generate(model, prompt, tokenizer=ABC, max_new_tokens=4) == [want]


def test_without_a_tokenizer_there_are_ids_only():
    out = generate(says("abc"), [0], max_new_tokens=3, logprobs=1)
    assert (out.text, out.ids, str(out), out.top[0][0].text) == (None, [1, 2, 0], "1 2 0", None)


def test_an_empty_prompt_begins_with_the_beginning_of_text():
    model = Bigram.cycle([256, 104, 105], 257)
    out = generate(model, "", tokenizer=Bytes(), max_new_tokens=2)
    assert (out.prompt_ids, out.text) == ([256], "hi")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("ab", {}, InputError, "without a tokenizer it cannot be read"),
        ("", {"tokenizer": ABC}, InputError, "The prompt is empty"),
        ([""], {"tokenizer": ABC}, InputError, "The prompt is empty"),
        ([[0], []], {}, InputError, "Prompt 1 is empty"),
        ([], {}, InputError, "a list of either"),
        (3, {}, InputError, "but got 3"),
        ([[0], [0.5]], {}, InputError, "Prompt 1 is neither a text nor a list of ids"),
        ([0], {"max_new_tokens": 0}, InputError, "max_new_tokens is 0"),
        ([0], {"logprobs": -1}, InputError, "logprobs is -1"),
        ([0], {"stop": "x"}, InputError, "Stop strings are text, and without a tokenizer"),
        ([0], {"stop": [""], "tokenizer": ABC}, SamplerError, "stop string is empty"),
        ([0], {"sampler": Greedy(), "top_k": 3, "temperature": 1.0}, SamplerError, "top_k"),
        ([0], {"sampler": TopK(3)}, SamplerError, "ends without a link that picks"),
        ([0], {"temperature": -1}, SamplerError, "0 or more, but -1"),
        ([[0], [1]], {"seed": [1, 2, 3]}, SamplerError, "3 seeds were given for 2 prompts"),
        ([0], {"decoder_start": 1}, InputError, "decoder_start is for encoder-decoder"),
        ([0], {"typical_q": 1}, SamplerError, "no option 'typical_q'"),
        ([0], {"max_tokens": 3}, SamplerError, "no option 'max_tokens'. Did you mean 'max_new_tokens'"),
        ([0], {"max_tokens": None}, SamplerError, "no option 'max_tokens'"),
        ([0], {"max_tokens": 3, "sampler": Greedy()}, SamplerError, "no option 'max_tokens'"),
        ([0], {"sampler": Greedy(), "suppress": [1]}, SamplerError, "suppress were both given"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_runs(prompt, options, error, words):
    model = says("abc")
    with pytest.raises(error, match=words):
        stream(model, prompt, **options)
    assert model.calls == []


def test_a_cache_that_is_too_small_is_refused_before_the_model_runs():
    model = says("abc")
    with pytest.raises(CacheError, match="capacity of 5 tokens and holds 0: a prompt of 2 and 5 new tokens need 6"):
        generate(model, [0, 1], max_new_tokens=5, cache=model.cache(1, 5))
    with pytest.raises(CacheError, match="made for 2 rows and there are 1 prompts"):
        generate(model, [0, 1], max_new_tokens=5, cache=model.cache(2, 50))
    assert model.calls == []
    assert generate(model, [0, 1], max_new_tokens=4, cache=model.cache(1, 5)).ids == [2, 0, 1, 2]


def test_every_option_is_accepted_and_every_sampling_name_is_an_option():
    options = set(Options.__annotations__)
    assert set(Settings.__annotations__) | set(inspect.signature(build_chain).parameters) - {"settings"} <= options
    taken = dict.fromkeys(options - {"max_new_tokens", "logprobs", "stop", "order", "trace"})
    assert generate(says("abc"), [0], max_new_tokens=3, logprobs=0, stop=(), order="llama.cpp", **taken).ids == [1, 2, 0]
    assert 1 not in generate(says("abc"), [0], max_new_tokens=3, suppress=[1]).ids


def test_nothing_left_to_choose_is_an_error_that_names_row_and_step():
    table = torch.zeros(4, 4)
    table[2] = float("-inf")
    table[0, 2] = 9.0
    with pytest.raises(SamplerError, match=r"No token is left .* in row 1 at step 1: every logit is -inf after TopK"):
        generate(Bigram(table), [[1], [0]], max_new_tokens=3, sampler=TopK(2) | Greedy())
    table[2] = float("nan")
    with pytest.raises(SamplerError, match="NaN logits in row 0 at step 1"):
        generate(Bigram(table), [0], max_new_tokens=3)
    for huge in (3e38, float("inf")):
        table[2] = torch.tensor([0.0, huge, 0.0, 0.0])
        with pytest.raises(SamplerError, match=r"gave a logit of (3e\+38|inf) in row 0 at step 1, of which no probability can be worked out"):
            generate(Bigram(table), [0], max_new_tokens=3, temperature=0.01, seed=0)


# Endings


def test_an_end_of_sequence_ends_the_row_and_is_no_text():
    class Ending(Pieces):
        eos_id = 2

    tok = Ending(*ABC.pieces)
    out = generate(says("abc"), "a", tokenizer=tok, max_new_tokens=9)
    assert (out.text, out.ids, out.finish_reason) == ("b", [1, 2], "eos")
    assert len(out.logprobs) == len(out.top) == 2
    assert generate(says("abc"), "a", tokenizer=tok, max_new_tokens=5, eos_id=()).text == "bcabc"
    assert generate(says("abc"), "a", tokenizer=tok, max_new_tokens=5, eos_id=[0, 7]).text == "bc"


@pytest.mark.parametrize(("stop", "text", "n"), [("END", "ab", 5), (["zz", "bE"], "a", 3), ("D", "abEN", 5), ("DDD", "abENDab", 7), ("Da", "abEN", 6)])
def test_stop_strings_end_across_tokens_and_are_never_shown(stop, text, n):
    model = Bigram.cycle([7, 0, 1, 4, 5, 6], 8)  # "\n" a b E N D, letter by letter
    model = Bigram.cycle([0, 1, 4, 5, 6], 8)
    model.table.data[7] = model.table.data[6]  # after "\n" comes a
    events = list(stream(model, "\n", tokenizer=ABC, max_new_tokens=7, stop=stop))
    assert "".join(e.text for e in events) == text
    assert len(events) == n
    assert events[-1].finish_reason == ("stop" if n < 7 else "length")
    assert all(e.finish_reason is None for e in events[:-1])


def test_a_held_tail_is_shown_when_the_text_ends_otherwise():
    events = list(stream(says("abcEN"), "a", tokenizer=ABC, max_new_tokens=4, stop="END"))
    assert [e.text for e in events] == ["b", "c", "", "EN"]
    assert events[-1].finish_reason == "length"


def test_a_stop_string_that_is_completed_by_the_last_token_counts():
    out = generate(says("abc"), "a", tokenizer=ABC, max_new_tokens=2, stop="c")
    assert (out.text, out.finish_reason) == ("b", "stop")


def test_characters_of_many_bytes_stream_whole():
    text = "é日🙂"
    model = Bigram.cycle([0, *text.encode()], 257)
    events = list(stream(model, [0], tokenizer=Bytes(), max_new_tokens=len(text.encode())))
    assert [e.text for e in events] == ["", "é", "", "", "日", "", "", "", "🙂"]
    cut = generate(model, [0], tokenizer=Bytes(), max_new_tokens=3)
    assert cut.text == "é\ufffd"
    held = generate(model, [0], tokenizer=Bytes(), max_new_tokens=3, stop="éxx")
    assert (held.text, held.finish_reason) == ("é\ufffd", "length")
    met = generate(model, [0], tokenizer=Bytes(), max_new_tokens=3, stop="é\ufffd")
    assert (met.text, met.finish_reason) == ("", "stop")


# Probabilities


def test_logprobs_are_those_of_the_model_before_the_sampler():
    model = Bigram.random(11)
    out = generate(model, [3], max_new_tokens=6, sampler=Penalties(1.5) | TopK(2) | Draw(1), logprobs=4)
    before = 3
    for token, logprob, top in zip(out.ids, out.logprobs, out.top, strict=True):
        lp = model.table[before].log_softmax(-1)
        assert logprob == pytest.approx(lp[token].item(), abs=1e-5)
        assert [c.id for c in top] == lp.topk(4).indices.tolist()
        assert [c.logprob for c in top] == pytest.approx(lp.topk(4).values.tolist(), abs=1e-5)
        assert math.exp(logprob) <= 1
        before = token


def test_more_candidates_than_tokens_are_all_tokens():
    assert len(generate(says("abc"), [0], max_new_tokens=1, logprobs=99, tokenizer=ABC).top[0]) == 8


# Streams


def test_generate_is_the_stream_put_together():
    model, prompts = Bigram.random(11), [[1, 2], [3], [4, 4, 4]]
    options = {"max_new_tokens": 9, "temperature": 1.2, "seed": 5, "logprobs": 2, "eos_id": 0, "tokenizer": Pieces(*"abcdefghijk")}
    seen = []
    out = generate(model, prompts, stream=seen.append, **options)
    assert seen == list(stream(model, prompts, **options))
    for row, one in enumerate(out):
        mine = [e for e in seen if e.row == row]
        assert [e.id for e in mine] == one.ids
        assert [e.logprob for e in mine] == one.logprobs
        assert [e.top for e in mine] == one.top
        assert "".join(e.text for e in mine) == one.text
        assert mine[-1].finish_reason == one.finish_reason
        assert one.prompt_ids == prompts[row]


def test_a_stream_runs_the_model_only_as_far_as_it_is_read():
    model = says("abc")
    tokens = stream(model, [0, 1], max_new_tokens=100)
    assert model.calls == []
    next(tokens), next(tokens)
    assert model.calls == [((1, 2), "step.0"), ((1, 1), "step.1")]


def test_no_step_is_read_that_nobody_asked_for():
    model = says("abc")
    generate(model, [0, 1], max_new_tokens=3)
    assert len(model.calls) == 3


# Rows of a batch


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [4]]


@pytest.mark.parametrize("options", [{"temperature": 1.5, "seed": 9}, {"sampler": TopK(5) | Draw(2)}, {}], ids=str)
@pytest.mark.parametrize("cache", [None, False])
def test_a_row_gets_the_same_in_any_batch(options, cache):
    model = Bigram.random(11)
    options = {**options, "max_new_tokens": 20, "eos_id": 0, "cache": cache}
    together = generate(model, PROMPTS, **options)
    assert len({len(o.ids) for o in together}) > 1 or not options.get("seed")  # rows end at different steps
    for prompt, one in zip(PROMPTS[:4], together, strict=False):
        alone = generate(model, prompt, **options)
        assert (alone.ids, alone.finish_reason) == (one.ids, one.finish_reason)
        assert alone.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def test_equal_prompts_in_a_batch_go_different_ways():
    out = generate(Bigram.random(11), [[4]] * 4, max_new_tokens=20, temperature=1.5, seed=9)
    assert len({tuple(o.ids) for o in out}) == 4


def test_seeds_make_runs_repeat_and_differ():
    model = Bigram.random(11)

    def ids(**options):
        return generate(model, [4], max_new_tokens=20, temperature=1.5, **options).ids

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    torch.manual_seed(0)
    a, b = ids(), ids()
    torch.manual_seed(0)
    assert ids() == a != b
    rows = generate(model, [[4], [4]], max_new_tokens=20, temperature=1.5, seed=[30, 31])
    assert [r.ids for r in rows] == [generate(model, [[4]], max_new_tokens=20, temperature=1.5, seed=[s])[0].ids for s in (30, 31)]


def test_one_seed_may_be_given_beside_a_sampler():
    model, sampler = Bigram.random(11), TopK(8) | Draw()
    ids = [generate(model, [4], max_new_tokens=20, sampler=sampler, seed=s).ids for s in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_finished_rows_leave_the_batch_when_half_are_done_but_not_under_a_tap():
    from glassformer.core.tap import Record

    model = Bigram.cycle([0, 1, 2, 3, 4, 5, 6, 7], 8)
    out = generate(model, [[0], [3], [5], [6]], max_new_tokens=20, eos_id=7)
    assert [len(o.ids) for o in out] == [7, 4, 2, 1]
    assert [shape[0] for shape, _ in model.calls] == [4, 4, 2, 2, 1, 1, 1]
    watched = Bigram(model.table.data)
    assert generate(watched, [[0], [3], [5], [6]], max_new_tokens=20, eos_id=7, tap=Record("logits")) == out
    assert [shape[0] for shape, _ in watched.calls] == [4] * 7


def test_a_cache_of_yours_holds_all_tokens_but_the_last_and_none_of_other_rows_waiting():
    model = Bigram.cycle([0, 1, 2, 3, 4, 5, 6, 7], 8)
    cache = model.cache(3, 50)
    out = generate(model, [[0], [3, 4], [5, 6, 7]], max_new_tokens=6, eos_id=7, cache=cache)
    assert [len(o.ids) for o in out] == [6, 3, 6]
    assert cache.lengths == [1 + 5, 2 + 2, 3 + 5]


# Sessions


def test_a_session_forks_and_rewinds():
    model = Bigram.random(11)
    session = Session(model, [[1, 2], [3]], Penalties(1.2) | Draw(7), room=40)
    for _ in range(6):
        session.step()
    assert session.drawn == 6
    six = session.ids
    twins = session.fork(2)
    other = session.fork(2, seeds=[1, 2, 3, 4])
    for _ in range(8):
        session.step()
        twins.step()
        other.step()
    assert twins.ids == [row for row in session.ids for _ in range(2)]
    assert [row[: len(p)] for row, p in zip(other.ids, [six[0], six[0], six[1], six[1]], strict=True)] == [six[0], six[0], six[1], six[1]]
    assert other.ids[0] != other.ids[1]

    full = session.ids
    session.rewind(8)
    assert session.ids == six
    for _ in range(8):
        session.step()
    assert session.ids == full
    session.rewind(14)
    assert session.ids == [[1, 2], [3]]
    for _ in range(14):
        session.step()
    assert session.ids == full
    assert session.cache.lengths == [15, 14]


def test_a_session_has_ends():
    session = Session(Bigram.random(5), [[1, 2]], Greedy(), room=4)
    session.step()
    with pytest.raises(InputError, match="1 tokens were drawn, so 2 cannot be forgotten"):
        session.rewind(2)
    with pytest.raises(SamplerError, match=r"fork\(3\) makes 3 rows, but 2 seeds"):
        session.fork(3, seeds=[1, 2])
    with pytest.raises(InputError, match=r"at least one token in every row, but the rows have \[1, 0\]"):
        Session(Bigram.random(5), [[1], []], Greedy())


def test_a_session_without_a_cache_goes_on_beyond_its_room():
    model = says("abc")
    session = Session(model, [[0], [1, 2]], Greedy(), room=1, cache=False)
    for _ in range(7):
        drawn = session.step()
    assert session.ids == [[0, 1, 2, 0, 1, 2, 0, 1], [1, 2, 0, 1, 2, 0, 1, 2, 0]]
    assert drawn.ids == [1, 0]
