"""The tuned lens: it finds a planted turn, gains on held-out text, is kept with its model and refused with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError, WeightsError
from glassformer.look.lenses import logit_lens
from glassformer.look.tuned import fingerprint, load_tuned_lens, tuned_lens
from look import zoo

QUICK = {"max_tokens": 512, "context": 32, "steps": 10, "batch": 64}


def test_a_planted_turn_is_taken_out_exactly():
    """Block 1 maps the stream by a fixed affine map (its feed-forward is linear, attention says nothing): the lens before it must find that map."""
    block = zoo.block(norm=gf.NoNorm(), feedforward=gf.Plain(d_ff=zoo.D, act="identity", bias=True))
    model = gf.Decoder(zoo.V, zoo.D, (block,) * 2, final_norm=gf.LayerNorm()).build(seed=0).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
        for b in model.blocks:
            b.attn.out.weight.zero_()
        model.blocks[1].ffn.down.bias.copy_(torch.randn(zoo.D, generator=draw))
    lens = tuned_lens(model, zoo.ids(600), **QUICK | {"steps": 80})
    assert (lens.before > 0.5).all(), "without the map the depths read something else"
    assert (lens.after < 0.05 * lens.before).all()
    plain, tuned = (logit_lens(model, zoo.ids(20, seed=7), tuned=x) for x in (None, lens))
    assert float(tuned.kl[1].mean()) < 0.1 * float(plain.kl[1].mean()), "also in logit_lens, on another text"
    assert torch.equal(tuned.p[-1], plain.p[-1]) and tuned.tuned and not plain.tuned and "Tuned lens" in tuned.title


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "parallel", "experts", "bert"])
def test_it_gains_on_text_that_was_held_out(name):
    lens = tuned_lens(zoo.model(name), zoo.ids(2048), **QUICK | {"max_tokens": 2048})
    layers = len(zoo.SPECS[name].blocks)
    assert lens.weight.shape == (layers, zoo.D, zoo.D) and lens.rows[0] == "embedding" and len(lens.rows) == layers
    assert (lens.after < lens.before).all() and lens.trained_on + lens.held_out == 2048


def test_before_and_after_are_what_the_lens_reads():
    model, ids = zoo.model("gpt2"), zoo.ids(512)
    lens = tuned_lens(model, ids, **QUICK)
    held = [ids[i : i + 32] for i in range(448, 512, 32)]
    for tuned, reported in ((None, lens.before), (lens, lens.after)):
        own = torch.cat([logit_lens(model, row, tuned=tuned).kl for row in held], 1).mean(1)
        torch.testing.assert_close(own[:-1], reported, atol=1e-4, rtol=1e-4)


def test_an_encoder_decoder_is_trained_on_pairs():
    pairs = [(zoo.ids(6, i), zoo.ids(12, 50 + i)) for i in range(16)]
    lens = tuned_lens(zoo.model("t5"), pairs, **QUICK)
    assert lens.weight.shape[0] == 2 and (lens.after < lens.before).any()
    found = logit_lens(zoo.model("t5"), zoo.ids(5), source=zoo.ids(4), tuned=lens)
    assert (found.kl[-1] == 0).all()
    with pytest.raises(InputError, match="its lens is trained on pairs"):
        tuned_lens(zoo.model("t5"), "text")


def test_the_same_seed_gives_the_same_lens_and_steps_help():
    model, ids = zoo.model("llama"), zoo.ids(600)
    one, two = (tuned_lens(model, ids, **QUICK) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    other = tuned_lens(model, ids, **QUICK, seed=1)
    assert not torch.equal(one.weight, other.weight)
    start = tuned_lens(model, ids, **QUICK | {"steps": 0})
    assert float(one.after.mean()) < float(start.after.mean()) < float(start.before.mean())


def test_it_is_kept_beside_its_model_and_refused_with_another(tmp_path: Path):
    model, ids = zoo.model("llama"), zoo.ids(300)
    lens = tuned_lens(model, ids, **QUICK)
    assert sorted(p.name for p in lens.save(tmp_path / "kept").iterdir()) == ["tuned_lens.json", "tuned_lens.safetensors"]
    again = load_tuned_lens(tmp_path / "kept", model)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias) and again.rows == lens.rows
    torch.testing.assert_close(again.after, lens.after)
    assert torch.equal(logit_lens(model, ids[:9], tuned=again).p, logit_lens(model, ids[:9], tuned=lens).p)
    other = zoo.model("llama", seed=1)
    with pytest.raises(WeightsError, match="trained for another model .its fingerprint is [0-9a-f]+, the given model's is [0-9a-f]+.: train one"):
        load_tuned_lens(tmp_path / "kept", other)
    with pytest.raises(WeightsError, match="trained for another model"):
        logit_lens(other, ids[:9], tuned=lens)
    assert fingerprint(model.double()) == lens.fingerprint, "the same numbers, held wider"


def test_damaged_and_missing_files_say_so(tmp_path: Path):
    with pytest.raises(WeightsError, match="There is no tuned lens in .*tuned_lens.json is missing"):
        load_tuned_lens(tmp_path)
    lens = tuned_lens(zoo.model("llama"), zoo.ids(300), **QUICK)
    lens.save(tmp_path)
    about = json.loads((tmp_path / "tuned_lens.json").read_text())
    (tmp_path / "tuned_lens.json").write_text(json.dumps(about | {"rows": ["embedding"]}))
    with pytest.raises(WeightsError, match="cannot be read .1 depths and format 1 are described"):
        load_tuned_lens(tmp_path)
    (tmp_path / "tuned_lens.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tuned_lens(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="could not be written"):
        lens.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (zoo.ids(20), {}, "The text has 20 tokens in 10 rows, but a lens is trained on at least 64"),
        ("some text", {}, "there is no tokenizer to read them"),
        (zoo.ids(300), {"steps": -1}, "steps=-1"),
        (zoo.ids(300), {"batch": 0}, "batch=0.: it is a whole number, at least 1"),
    ],
)
def test_what_cannot_be_trained_says_so(given, options, message):
    with pytest.raises(InputError, match=message):
        tuned_lens(zoo.model("llama"), given, **options)
    with pytest.raises(InputError, match="A tuned lens maps the streams between blocks, but of='attn' was asked for"):
        logit_lens(zoo.model("llama"), zoo.ids(), of="attn", tuned=tuned_lens(zoo.model("llama"), zoo.ids(80), **QUICK | {"steps": 0}))


def test_texts_are_read_by_the_tokenizer_and_the_report_shows_itself(tmp_path: Path):
    text = "the old man saw a red fox and the dog ran home to Rome or Paris when it rained , " * 6
    model, tokenizer = zoo.model("llama"), zoo.words()
    one = tuned_lens(model, text, tokenizer=tokenizer, **QUICK)
    two = tuned_lens(model, [tokenizer.encode(text)], **QUICK)
    assert torch.equal(one.weight, two.weight)
    assert "KL before" in str(one) and "weight" not in one.to_dict() and len(one.plot(dark=True).axes) == 1
    assert one.save(tmp_path / "report.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1.5}, r"tuned_lens\(steps=1.5\): it is a whole number, at least 0 .0: least squares only."),
        ({"context": None}, r"tuned_lens\(context=None\): it is a whole number, at least 1"),
        ({"max_tokens": "x"}, "max_tokens='x'"),
        ({"batch": True}, "batch=True"),
        ({"seed": None}, "seed=None"),
        ({"texts": None}, "texts is a text, token ids, or a list of either, but None was given"),
    ],
)
def test_wrong_kinds_say_so(options, message):
    with pytest.raises(InputError, match=message):
        tuned_lens(zoo.model("gpt2"), **({"texts": zoo.ids(200)} | options))
    with pytest.raises(WeightsError, match="A tuned lens is opened by the folder that it was saved in, but None was given"):
        load_tuned_lens(None)
