"""The trace: what it says is what was drawn, against NumPy in float64; and how it shows itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import glassformer as gf
from glassformer import weights
from glassformer.cli import app as cli
from glassformer.core.errors import InputError, SamplerError
from glassformer.infer import Chain, Draw, Greedy, MinP, Penalties, Session, Suppress, Temperature, TopK, TopP, Trace, generate, stream
from glassformer.infer.trace_page import data
from glassformer.infer.trace_table import percent
from glassformer.infer.tracing import _best, measure
from glassformer.models.presets import llama
from glassformer.parts.rotary import Rotary
from infer.fake import Bigram, Bytes, Pieces

LINKS = [TopK(7), TopK(3), TopK(500), TopP(0.8), MinP(0.05), Temperature(0.7), Temperature(1.0), Penalties(1.4, 0.2), Suppress((0, 2, 5)), Temperature(0)]
CHAINS = st.builds(lambda links, final: Chain((*links, final)), st.lists(st.sampled_from(LINKS), max_size=5), st.sampled_from([Draw(3), Greedy()]))
HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "{{data}}", "\u202eabc", "\x1b[31m", "שלום", "\n", " ", "", "a")


def traced(chain, x, history=None, k=4, state=None):
    """The choices of a chain's own pass, and what it drew."""
    passed = []
    chosen = chain(x, history, state, passed)
    return measure(x, passed, chain.links, chosen, k), chosen.tolist()


def by_numpy(logits, before, chosen):
    """What a stage must say, from the logits of one row in float64, and what was removed to come to it."""
    x = np.asarray(logits, dtype=np.float64)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    alive = x > -np.inf
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    gone = np.zeros_like(alive) if before is None else (np.asarray(before, dtype=np.float64) > -np.inf) & ~alive
    was = 0 * p if before is None else np.exp(before - before.max()) / np.exp(before - before.max()).sum()
    return p, alive, entropy, 1 + int((x > x[chosen]).sum()), gone, was


def check_against_steps(chain, x, history, k):
    """Every number of a trace of the narrowed pass against NumPy over the logits of the plain one."""
    steps = [s for s in chain.steps(x, history) if not s.link.off]
    choices, drawn = traced(chain, x, history, k)
    for b, (choice, token) in enumerate(zip(choices, drawn, strict=True)):
        if token < 0:
            continue
        assert choice.id == token == choice.stages[-1].candidates[0].id == steps[-1].chosen[b]
        assert [s.name for s in choice.stages] == ["model", *(s.name for s in steps)]
        rows = [(x[b].numpy().astype(np.float64), None), *((s.logits[b].double().numpy(), s.before[b].double().numpy()) for s in steps)]
        for stage, (logits, before) in zip(choice.stages, rows, strict=True):
            p, alive, entropy, rank, gone, was = by_numpy(logits, before, token)
            assert (stage.left, stage.removed) == (alive.sum(), gone.sum())
            assert stage.rank == rank
            assert [stage.p, stage.entropy, stage.mass] == pytest.approx([p[token], entropy, was[gone].sum()], abs=2e-5)
            known = {c.id: c.p for c in stage.candidates}
            best = np.lexsort((np.arange(len(p)), -logits))[:k]
            assert {int(i) for i in best if alive[i]} <= known.keys() or stage.link is chain.links[-1]
            assert token in known and all(alive[i] for i in known)
            assert list(known.values()) == pytest.approx([p[i] for i in known], abs=2e-6)
            assert list(known.values()) == sorted(known.values(), reverse=True)
            if stage.link is not chain.links[-1] and before is not None:
                lost = sorted(np.flatnonzero(gone), key=lambda i: (-before[i], i))[:k]
                assert [c.id for c in stage.gone] == lost
                assert [c.p for c in stage.gone] == pytest.approx([was[i] for i in lost], abs=2e-6)


@settings(max_examples=60, deadline=None)
@given(CHAINS, st.integers(0, 10**6), st.sampled_from([1, 4, 60]), st.sampled_from(["plain", "ties", "gone", "one"]))
def test_a_trace_says_what_numpy_says_of_the_plain_way(chain, seed, k, kind):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        x = x.round()
    if kind == "gone":
        x = x.masked_fill(x < 1, -math.inf)
    if kind == "one":
        x[1, :] = -math.inf
        x[1, 7] = 2.0
    check_against_steps(chain, x, [[1, 2, 1], [5], [9, 9]], k)


@pytest.mark.parametrize("chain", [TopK(5) | Penalties(1.5, 0.3) | TopK(3) | Draw(1), TopP(0.9) | Suppress((1, 2)) | TopK(6) | MinP(0.1) | Greedy()], ids=str)
def test_links_after_a_narrowing_one_are_traced_on_few_tokens_or_all(chain):
    check_against_steps(chain, torch.randn(4, 200, generator=torch.Generator().manual_seed(2)) * 2, [[1, 2, 3]] * 4, 5)


@pytest.mark.parametrize("width", [700, 5003])
@pytest.mark.parametrize("kind", ["different", "equals", "gone", "one"])
def test_the_best_of_a_wide_row_are_those_of_a_stable_sort(kind, width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    if kind == "equals":
        x = x.round()
    if kind in ("gone", "one"):
        x = x.masked_fill(x < (1.0 if kind == "gone" else 2.5), -math.inf)
    x[0, -1] = 9.0  # in what no block holds
    for k in (1, 2, 10):
        columns, values = _best(x, k)
        wanted = x.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, wanted.values[:, :k])
        there = values > -math.inf
        assert torch.equal(columns[there], wanted.indices[:, :k][there])


def test_rows_that_broke_do_not_disturb_their_neighbours():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[2], x[3, 4] = math.nan, -math.inf, math.inf
    chain = Temperature(0.9) | TopK(9) | TopP(0.9) | Draw(2)
    choices, drawn = traced(chain, x)
    alone, _ = traced(chain, x[:1])
    assert choices[0].to_dict() == alone[0].to_dict() and drawn[1:3] == [-1, -1]
    assert json.loads(json.dumps([c.to_dict() for c in choices], allow_nan=False))
    assert "token" in str(Trace(tuple(choices)))


def test_off_links_leave_no_stage_and_a_bare_final_has_two():
    x = torch.randn(1, 9)
    (choice,), (token,) = traced(TopK(0) | Temperature(1.0) | MinP(0.0) | Greedy(), x)
    assert [s.name for s in choice.stages] == ["model", "Greedy"]
    last = choice.stages[-1]
    assert (last.left, last.entropy, last.p, last.removed) == (1, 0.0, 1.0, 8) and last.candidates[0].id == token
    assert last.mass == pytest.approx(1 - choice.stages[0].p)


def test_logits_of_half_precision_are_traced_in_float32():
    x = torch.randn(2, 50).bfloat16()
    a, _ = traced(TopK(9) | Draw(1), x)
    b, _ = traced(TopK(9) | Draw(1), x.float())
    assert [c.to_dict() for c in a] == [c.to_dict() for c in b]


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    (choice,), _ = traced(Penalties(1.2) | Temperature(0.8) | TopP(0.95) | Draw(1), torch.randn(1, 5000), [[1, 2]], k=10)
    assert len(pickle.dumps([choice.facts, choice.followed, choice.p, choice.gone, choice.gone_p])) < 4000
    assert choice.facts.base is None and choice.p.base is None and choice.gone.base is None


# In a generation


def test_the_trace_of_a_generation_is_of_its_tokens_and_changes_none():
    model, options = Bigram.random(), {"max_new_tokens": 9, "temperature": 0.9, "top_k": 5, "repetition_penalty": 1.2, "seed": 4}
    plain, got = generate(model, [1, 2], **options), generate(model, [1, 2], **options, trace=3)
    assert got.ids == plain.ids and plain.trace is None and got.logprobs == plain.logprobs
    assert [c.id for c in got.trace] == got.ids and [c.step for c in got.trace] == list(range(9))
    assert [math.log(c.stages[0].p) for c in got.trace] == pytest.approx(got.logprobs, abs=1e-5)
    assert got.trace.chain == "Penalties(repetition=1.2) | Temperature(t=0.9) | TopK(k=5) | Draw(seed=4)"
    events = list(stream(model, [1, 2], **options, trace=3))
    assert [t.trace.to_dict() for t in events] == [c.to_dict() for c in got.trace]


def test_rows_that_end_at_different_times_have_traces_of_their_own():
    model, prompts = Bigram.random(seed=3), [[1], [2, 3, 4], [5], [6, 7]]
    options = {"max_new_tokens": 12, "eos_id": [0, 8, 9], "seed": [1, 2, 3, 4], "top_p": 0.9, "trace": True}
    rows = generate(model, prompts, **options)
    assert len({len(r.ids) for r in rows}) > 1
    for i, row in enumerate(rows):
        assert [c.id for c in row.trace] == row.ids
        alone = generate(model, prompts[i], **{**options, "seed": [i + 1]})
        assert alone.ids == row.ids
        for a, b in zip(alone.trace, row.trace, strict=True):
            assert np.allclose(a.facts, b.facts, atol=1e-6) and a.links == b.links


def test_a_session_gives_the_choices_of_a_step():
    session = Session(Bigram.random(), [[1], [2]], TopK(4) | Draw(None), seed=9, trace=2)
    drawn = session.step()
    assert [c.id for c in drawn.traces] == drawn.ids
    assert drawn.traces[0].links == (TopK(4), Draw(9))  # the seed that is in use
    assert session.fork(2).step().traces[3].step == 1
    assert Session(Bigram.random(), [[1]], Greedy()).step().traces is None


def test_texts_come_from_the_tokenizer():
    got = generate(Bigram.cycle([97, 98, 99], 257), "a", tokenizer=Bytes(), max_new_tokens=2, trace=2)
    assert got.trace.prompt == "a" and [c.text for c in got.trace] == ["b", "c"]
    assert got.trace[0].stages[0].candidates[0] == (98, "b", 1.0)


@pytest.mark.parametrize(("trace", "kept"), [(False, None), (0, None), (True, 10), (1, 1), (200, 40)])
def test_how_many_candidates_are_kept(trace, kept):
    got = generate(Bigram.random(40), [1], max_new_tokens=1, trace=trace).trace
    assert (got and len(got[0].stages[0].candidates)) == kept


def test_what_is_asked_wrongly_is_said():
    with pytest.raises(InputError, match="trace is -3; it is True, or the number of candidates"):
        generate(Bigram.random(), [1], trace=-3)
    with pytest.raises(SamplerError, match="trace is .* but a text was given"):
        generate(Bigram.random(), [1], trace="all")


# Who removed what


def test_who_removed_a_token():
    x = torch.log(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    (choice,), _ = traced(Suppress((1,)) | TopK(3) | TopP(0.6) | Greedy(), x, k=5)
    assert [choice.removed_by(i) for i in range(5)] == [None, Suppress((1,)), TopP(0.6), TopP(0.6), TopK(3)]
    assert [s.removed for s in choice.stages] == [0, 1, 1, 2, 0]
    assert [s.mass for s in choice.stages] == pytest.approx([0, 0.3, 0.05 / 0.7, 0.25 / 0.65, 0], abs=1e-6)
    with pytest.raises(InputError, match="Token 77 was not followed in step 0: .* trace=40"):
        choice.removed_by(77)


# How it shows itself


def shown_trace(k=3):
    model = Bigram(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)) * 2)
    return generate(model, [9], tokenizer=Pieces(*HOSTILE), max_new_tokens=6, temperature=0.8, top_k=4, min_p=0.1, seed=2, trace=k).trace


def test_the_table_has_a_line_per_token():
    trace = shown_trace()
    lines = str(trace).splitlines()
    assert lines[0] == "How 6 tokens were chosen" and lines[1] == trace.chain
    assert all(name in lines[2] for name in ("token", "model", "Temperature", "TopK", "MinP", "rank", "bits", "left"))
    assert sum(bool(re.match(r" *\d ", line)) for line in lines) == 6
    assert not any(c in str(trace) for c in "\x1b\u202e")
    assert "pre" in trace._repr_html_() and "<img" not in trace._repr_html_()


def test_a_narrow_terminal_gets_fewer_columns():
    from rich.console import Console

    console = Console(width=70, record=True, file=io.StringIO())
    console.print(shown_trace())
    text = console.export_text()
    assert "model" in text and "MinP" in text and "TopK " not in text.splitlines()[3]


def test_one_choice_has_a_line_per_candidate():
    choice = shown_trace(6)[0]
    text = str(choice)
    assert text.startswith("Token ") and "picked" in text and "×" in text
    assert all(word in text for word in ("tokens left", "their share", "entropy, bits", "pick's rank", "TopK(k=4) removed", "and"))


def test_a_link_that_stands_twice_is_counted_and_no_tokenizer_leaves_numbers():
    (choice,), (token,) = traced(TopK(9) | Temperature(0.5) | TopK(2) | Greedy(), torch.randn(1, 30))
    assert "TopK 1" in str(choice) and "TopK 2" in str(choice) and f"#{token}" in str(choice)
    assert str(Trace(())) == "No token was generated." and Trace(()).chain == ""


@pytest.mark.parametrize(
    ("p", "words"), [(None, "–"), (1.0, "100%"), (0.9999, ">99.9%"), (0.5, "50.0%"), (0.051, "5.10%"), (2e-5, "0.0020%"), (1e-9, "<0.0001%")]
)
def test_how_probabilities_are_written(p, words):
    assert percent(p) == words


def test_the_numbers_as_json():
    trace = shown_trace()
    read = json.loads(trace.to_json())
    assert read == trace.to_dict() and read["chain"] == trace.chain and len(read["tokens"]) == 6
    stage = read["tokens"][0]["stages"][2]
    assert stage["link"] == "TopK(k=4)" and stage["left"] == 4 and stage["removed"]["count"] == 6 and len(stage["removed"]["most_probable"]) == 3
    assert sum(c["p"] for c in read["tokens"][0]["stages"][-1]["candidates"]) == 1


def test_the_page_is_one_file_that_asks_for_nothing_and_takes_no_text_for_html():
    page = shown_trace().to_html()
    assert page.count("<script") == 2 and "alert(1)</script>" not in page and "<img" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy and "default-src 'none'" in policy
    assert not re.search(r"https?://|innerHTML|\{\{", script + page[: page.index("<script")])
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert held == data(shown_trace())
    token = held["tokens"][0]
    assert len(token["facts"]) == len(held["stages"]) == 5 and all(len(row) == 6 for row in token["candidates"])
    assert {str(row[0]) for row in token["candidates"]} | {str(token["id"])} <= held["texts"].keys()


def test_the_page_of_no_token_is_a_page():
    assert data(Trace(()))["tokens"] == [] and "<title>" in Trace(()).to_html()


def test_saving(tmp_path):
    trace = shown_trace()
    assert json.loads(trace.save(tmp_path / "t.json").read_text(encoding="utf-8"))["kind"] == "Trace"
    assert trace.save(str(tmp_path / "t.HTML")).read_text(encoding="utf-8") == trace.to_html()
    (tmp_path / "folder.json").mkdir()
    for place, words in [
        (tmp_path / "t.png", r"'t.png' ends in '.png', but the ending says how a trace is written: .html or .json"),
        (tmp_path / "t", "has no ending"),
        (tmp_path / "no" / "t.json", "folder .* does not exist; create it or choose another"),
        (tmp_path / "folder.json", "cannot be written: .* what was there before is untouched"),
        (7, "written to a file, but a whole number was given: name one"),
    ]:
        with pytest.raises(InputError, match=words):
            trace.save(place)


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("traced") / "llama"
    tokenizer = gf.text.train("bpe", texts=["the cat sat on the mat "] * 50, vocab_size=270)
    weights.export_hf(llama(tokenizer.vocab_size, 32, 2, 4, 2, 64, Rotary(), tied=True).build(seed=0), at, tokenizer=tokenizer)
    return at


def test_the_command_writes_and_prints_a_trace(folder, tmp_path, capsys):
    page, numbers = tmp_path / "why.html", tmp_path / "why.json"
    asked = ["generate", str(folder), "the cat", "-n", "4", "--min-p", "0.01", "--seed", "1"]
    assert cli.main(asked) == 0
    plain = capsys.readouterr().out
    assert cli.main([*asked, "--trace", str(page), "--trace", str(numbers), "--trace", "-", "--candidates", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(plain) and "How 4 tokens were chosen" in out
    assert err == f"wrote {page}\nwrote {numbers}\n"
    read = json.loads(numbers.read_text(encoding="utf-8"))
    assert read["prompt"] == "the cat" and "Draw(seed=1)" in read["chain"] and len(read["tokens"][0]["stages"][0]["candidates"]) in (2, 3, 4)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(("place", "words"), [("why.pdf", "'why.pdf' ends in '.pdf'"), ("no/why.json", "does not exist")])
def test_the_command_refuses_a_place_before_it_opens_the_model(place, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "no_model_here", "Hi", "--trace", place]) == 2
    assert words in capsys.readouterr().err
