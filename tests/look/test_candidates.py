"""Candidates and comparisons: the numbers are the model's, and what the parts carry sums to the change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.look.changes import Scale, Zero
from glassformer.look.comparison import compare, mean_gradient
from glassformer.look.edits import Intervention, load_edits
from glassformer.look.figure import mark
from glassformer.look.next_tokens import candidates
from look import zoo

ALL = list(zoo.SPECS)


def logits_of(model, ids, source=None, tap=None):
    first = () if source is None else (torch.tensor([source]),)
    with torch.no_grad(), evaluating(model):
        return model(*first, torch.tensor([ids]), tap=tap)[0]


@pytest.mark.parametrize("name", ALL)
def test_candidates_are_the_models_own(name):
    model, given = zoo.model(name), zoo.texts(name)
    found = candidates(model, **given, k=7, temperature=0.5)
    own = logits_of(model, given["text"], given.get("source"))[-1]
    p = (own / 0.5).softmax(-1)
    assert torch.equal(found.ids, own.topk(7).indices) and torch.equal(found.logits, own.topk(7).values)
    torch.testing.assert_close(found.p, p.topk(7).values)
    torch.testing.assert_close(found.cumulative, p.topk(7).values.cumsum(0))
    assert found.entropy == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-5)
    assert found.position == len(given["text"]) - 1 and found.vocab_size == zoo.V
    assert len(candidates(model, **given, k=1000).pieces) == zoo.V, "more than the vocabulary is all of it"


def test_candidates_at_another_position_and_what_cannot_be():
    model, ids = zoo.model("gpt2"), zoo.ids()
    assert torch.equal(candidates(model, ids, position=3).ids, candidates(model, ids[:4]).ids)
    for options, message in (
        ({"temperature": 0}, "temperature=0: logits are divided by it, so it is above 0"),
        ({"k": 0}, "k=0: at least 1 token is listed"),
        ({"position": [1, 2]}, "One position is needed, but 2 were given"),
    ):
        with pytest.raises(InputError, match=message):
            candidates(model, ids, **options)
    with pytest.raises(InputError, match=r"candidates\(\) asks for scores over the vocabulary"):
        candidates(zoo.SPECS["gpt2"].replace(readout=gf.Classifier(3)).build(seed=0), ids)


@pytest.mark.parametrize("name", ["gpt2", "sandwich", "t5"])
def test_edits_hold_in_both_runs_of_a_comparison(name):
    """As direct runs with the same tap have it; the parts still sum to the change, for the edits are of parts."""
    model, given = zoo.model(name), zoo.texts(name)
    half = "decoder." if name == "t5" else ""
    edits = Intervention("both", (Zero(f"{half}blocks.0.attn.z[1]"), Scale(f"{half}blocks.1.ffn.out", 2.0, positions="3:")))
    other, source = zoo.ids(9, seed=3), given.get("source")
    found = compare(model, given["text"], other, source=source, target=(3, 5), tap=edits.tap(model))
    for which, ids in enumerate((given["text"], other)):
        own = logits_of(model, ids, source, edits.tap(model))[-1]
        torch.testing.assert_close(found.logits[which], own[found.ids])
        assert found.values[which] == pytest.approx(float(own[3] - own[5]), abs=1e-5)
    bare = compare(model, given["text"], other, source=source, target=(3, 5))
    assert abs(bare.change - found.change) > 1e-3 and abs(found.rest) < 1e-4
    assert float(found.heads[0, 1]) == 0 and float(bare.heads[0, 1]) != 0, "a head that is off carries nothing"


@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)])
@pytest.mark.parametrize("name", ALL)
def test_parts_sum_to_the_change(name, lengths):
    """Pre-norm, post-norm, sandwich, reordered, parallel; capped and transformed read-outs; texts of equal and of different length."""
    model = zoo.model(name).double()
    source = {"source": zoo.ids(6, 3), "other_source": zoo.ids(7, 4)} if name == "t5" else {}
    found = compare(model, zoo.ids(lengths[0]), zoo.ids(lengths[1], seed=1), **source, target=(3, 5))
    a = logits_of(model, zoo.ids(lengths[0]), source.get("source"))[-1]
    b = logits_of(model, zoo.ids(lengths[1], seed=1), source.get("other_source"))[-1]
    change = float((b[3] - b[5]) - (a[3] - a[5]))
    assert found.change == pytest.approx(change, abs=1e-9)
    total = float(found.attn.sum() + found.ffn.sum()) + found.embedding
    assert total == pytest.approx(change, abs=1e-4) and abs(found.rest) < 1e-4
    heads = found.heads.sum(1) + (0 if found.cross is None else found.cross.sum(1))
    torch.testing.assert_close(heads, found.attn, atol=1e-5, rtol=1e-5)
    assert (found.cross is not None) == (name == "t5")


def test_exchanged_texts_turn_every_sign():
    model, one, two = zoo.model("bert").double(), zoo.ids(), zoo.ids(7, seed=1)
    there, back = compare(model, one, two, target=(3, 5)), compare(model, two, one, target=(3, 5))
    torch.testing.assert_close(there.heads, -back.heads)
    torch.testing.assert_close(there.ffn, -back.ffn)
    assert there.change == -back.change and there.js == pytest.approx(back.js) and there.kl == pytest.approx(back.kl[::-1])


def test_a_foreign_model_is_compared_but_not_divided():
    transformers = pytest.importorskip("transformers")
    from glassformer.look import foreign, logit_lens, tuned_lens

    theirs = foreign(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=31, n_layer=2, n_embd=16, n_head=4, n_positions=24)).eval())
    found = compare(theirs, zoo.ids(), zoo.ids(seed=1))
    assert found.heads is None and found.attn is None and found.rest is None and found.js > 0 and len(found.rows) == 3
    assert found.lens_js[-1] == pytest.approx(found.js, abs=1e-6) and len(found.plot().axes) == 2 and "Logit of" in str(found)
    assert torch.equal(candidates(theirs, zoo.ids(), k=3).ids, logits_of(theirs, zoo.ids())[-1].topk(3).indices)
    lens = logit_lens(theirs, zoo.ids(), keep_logits=True)
    assert torch.equal(lens.logits[-1], logits_of(theirs, zoo.ids())) and len(lens.rows) == 3
    assert logit_lens(theirs, zoo.ids(), of="attn").rows == ("block 0 attn", "block 1 attn")
    with pytest.raises(InputError, match="tuned_lens.. reads the model's matrices, which a foreign model keeps"):
        tuned_lens(theirs, zoo.ids(300))
    with pytest.raises(InputError, match="norm='final' reads the model's matrices"):
        logit_lens(theirs, zoo.ids(), of="attn", norm="final")


def test_with_a_linear_read_out_a_part_is_its_change_times_the_direction():
    spec = zoo.SPECS["gpt2"].replace(final_norm=gf.NoNorm())
    model = spec.build(seed=0).double().eval()
    ids, other = zoo.ids(), zoo.ids(seed=1)
    found = compare(model, ids, other, target=(3, 5))
    records = [gf.Record("blocks.*.attn.result", "blocks.*.ffn.out") for _ in range(2)]
    with torch.no_grad():
        for record, row in zip(records, (ids, other), strict=True):
            model(torch.tensor([row]), tap=record)
        direction = model.readout.weight[3] - model.readout.weight[5]
        result, ffn = (records[1].stack(p)[:, 0, -1] - records[0].stack(p)[:, 0, -1] for p in ("blocks.*.attn.result", "blocks.*.ffn.out"))
    torch.testing.assert_close(found.heads.double(), result @ direction, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.ffn.double(), ffn @ direction, atol=1e-6, rtol=1e-5)


def test_a_head_that_does_not_change_carries_nothing():
    """Only layer 1's head 2 returns anything: it alone carries the change, and nothing arises before it."""
    model = zoo.SPECS["llama"].build(seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        for i, block in enumerate(model.blocks):
            block.ffn.down.weight.zero_()
            kept = block.attn.out.weight[:, 8:12].clone()
            block.attn.out.weight.zero_()
            if i == 1:
                block.attn.out.weight[:, 8:12] = kept
    found = compare(model, [1, 2, 3, 4], [9, 2, 3, 4])
    assert found.best(1)[0][0] == "1.2" and (found.heads != 0).sum() == 1 and found.embedding == 0 and (found.ffn == 0).all()
    assert found.distance[:2].tolist() == [0, 0] and (found.distance[2:] > 0).all(), "the streams part behind block 1"
    torch.testing.assert_close(found.lens_js[:2], torch.zeros(2), atol=1e-6, rtol=0)
    assert found.lens_js[-1] == pytest.approx(found.js, abs=1e-6)
    assert found.aligned.shape == (4, 4) and found.aligned[0].tolist()[1:] == [0, 0, 0] and found.aligned[0, 0] > 0


def test_outputs_are_compared_as_a_small_program_does():
    model, ids, other = zoo.model("gpt2").double(), zoo.ids(), zoo.ids(7, seed=1)
    found = compare(model, ids, other, k=4)
    logits = torch.stack([logits_of(model, ids)[-1], logits_of(model, other)[-1]])
    p = logits.softmax(-1).numpy()
    m = p.mean(0)
    assert found.kl == pytest.approx((float((p[0] * np.log2(p[0] / p[1])).sum()), float((p[1] * np.log2(p[1] / p[0])).sum())))
    assert found.js == pytest.approx(float(sum((q * np.log2(q / m)).sum() for q in p) / 2))
    union = set(logits[0].topk(4).indices.tolist()) | set(logits[1].topk(4).indices.tolist())
    assert set(found.ids.tolist()) == union
    change = (found.p[1] - found.p[0]).abs()
    assert torch.equal(change, change.sort(descending=True).values)
    order = logits.argsort(-1, descending=True).argsort(-1) + 1
    assert torch.equal(found.rank, order[:, found.ids])
    gain = p[1] - p[0]
    assert found.target == f"‹{gain.argmax()}› − ‹{gain.argmin()}›"
    streams = []
    for row in (ids, other):
        record = gf.Record("blocks.1.resid_post")
        with torch.no_grad():
            model(torch.tensor([row]), tap=record)
        streams.append(record["blocks.1.resid_post"][0, -1])
    x, y = streams
    assert float(found.distance[2]) == pytest.approx(float(2 * (x - y).norm() / (x.norm() + y.norm())))
    assert float(found.cosine[2]) == pytest.approx(float(x @ y / (x.norm() * y.norm())))


def test_what_texts_share():
    model = zoo.model("gpt2")
    found = compare(model, [1, 2, 3, 4, 5], [1, 9, 3, 4, 7, 5])
    assert (found.prefix, found.suffix) == (1, 1)
    assert found.pairs == ((0, 0), (1, 1), (2, 2), (3, 3), (4, 5)) and found.same == (True, False, True, True, True)
    assert found.shared == ("‹1›", "‹3›", "‹4›", "‹5›")
    same = compare(model, [1, 2, 2], [1, 2, 2])
    assert (same.prefix, same.suffix, same.js, same.change) == (3, 0, 0.0, 0.0) and (same.heads == 0).all()
    other = compare(model, [1, 2], [3, 4, 5])
    assert other.pairs == () and other.aligned.shape == (4, 0)
    bert = compare(zoo.model("bert"), zoo.ids(), zoo.ids(6), position=2)
    assert bert.at == (2, 2)


def test_a_mean_gradient_times_the_way_is_the_difference():
    draw = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    g = mean_gradient(lambda x: (x / x.norm(dim=-1, keepdim=True)).tanh()[:, 1] + x[:, 0] ** 3, ends)
    f = [float(torch.tanh(x[1] / x.norm()) + x[0] ** 3) for x in ends]
    assert float(g @ (ends[1] - ends[0])) == pytest.approx(f[1] - f[0], abs=1e-8)


def test_they_show_themselves(tmp_path: Path):
    tokenizer, model = zoo.words(), zoo.model("llama")
    one = candidates(model, "the old man saw", k=5, tokenizer=tokenizer)
    assert "After “the old man saw”: entropy" in str(one) and one.best(2)[0][0] == one.pieces[0] and len(one.plot().axes) == 1
    two = compare(model, "the old man saw", "the old red fox saw", k=5, tokenizer=tokenizer)
    text = " ".join(str(two).split())
    for part in ("the old man saw” against “the old red fox saw", "Shared: the first 2 and the last 1 of 4 and 5 tokens", "Heads that carry most of it: "):
        assert part in text
    for dark in (False, True):
        assert len(two.plot(dark).axes) == 4  # tokens, depths, parts and their colour bar
    assert two.save(tmp_path / "c.json").stat().st_size > 500
    exchanged = compare(model, "the old man saw", "the old dog saw", k=5, tokenizer=tokenizer)
    assert "exchanged: man → dog" in str(exchanged)


def test_a_mark_of_punctuation_stands_in_quotes():
    """Alone beside a bar a comma is hardly seen; words and longer marks stay as they are."""
    assert [mark(t) for t in (",", ".", '"', "'", "·,", "a", "...", "")] == ["','", "'.'", "'\"'", "“'”", "'·,'", "a", "...", ""]


def test_from_the_command_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gf.save(zoo.model("llama"), tmp_path / "m", tokenizer=zoo.words())
    assert cli.main(["look", "candidates", "the old man", "--model", "m", "-k", "3", "--temperature", "2", "--out", "c.csv"]) == 0
    assert "at temperature 2" in capsys.readouterr().out and len(Path("c.csv").read_text().splitlines()) == 4
    assert cli.main(["look", "compare", "the old man", "the red fox", "--model", "m", "--target", "dog", "--target", "fox"]) == 0
    bare = capsys.readouterr().out
    assert "Logit of dog − fox" in bare
    Intervention("off", (Zero("blocks.0.attn.out"),)).save("off.json")
    assert cli.main(["look", "compare", "the old man", "the red fox", "--model", "m", "--target", "dog", "--target", "fox", "--edits", "off.json"]) == 0
    model = zoo.model("llama")
    asked = compare(model, "the old man", "the red fox", target=("dog", "fox"), tokenizer=zoo.words(), tap=load_edits("off.json").tap(model))
    edited = capsys.readouterr().out
    assert edited != bare and f"a change of {asked.change:+.3g} = attention" in edited
    assert cli.main(["look", "candidates", "the old man", "--model", "m", "--temperature", "0"]) == 2
    assert "--temperature 0: logits" in capsys.readouterr().err
    assert cli.main(["look", "compare", "the old man", "the red fox", "--model", "m", "--position", "9"]) == 2
    assert "Position 9 was asked for, but the text has 3 tokens" in capsys.readouterr().err


def test_the_smallest_temperatures_leave_the_best_and_wrong_ones_say_so():
    model, ids = zoo.model("gpt2"), zoo.ids()
    for temperature in (1e-9, 1e-45, 1e-300):
        found = candidates(model, ids, temperature=temperature, k=3)
        assert found.p.tolist() == [1, 0, 0] and found.entropy == 0 and found.ids[0] == logits_of(model, ids)[-1].argmax()
    assert candidates(model, ids, temperature=float("inf")).entropy == pytest.approx(np.log2(zoo.V), abs=1e-5)
    for wrong in (None, float("nan"), "1", True, -1):
        with pytest.raises(InputError, match="logits are divided by it, so it is above 0"):
            candidates(model, ids, temperature=wrong)
    with pytest.raises(InputError, match="k=True: at least 1 token is listed"):
        candidates(model, ids, k=True)


def test_long_texts_with_the_same_end_are_told_apart_by_where_they_part():
    tokenizer, end = zoo.words(), " and the dog ran home to Rome or Paris when it rained , said Mary"
    found = compare(zoo.model("llama"), "the old man saw a red fox" + end, "the old man saw a big fox" + end, tokenizer=tokenizer)
    assert found.texts == ("“…man saw a red fox and the dog…”", "“…man saw a big fox and the dog…”")


@pytest.mark.parametrize("given", ["--3", "²", "3-", ""])
def test_a_position_that_is_no_number_is_a_word(given):
    from glassformer.cli.look.common import position_of

    assert position_of(given) == given and position_of("-2") == -2 and position_of(None) is None
