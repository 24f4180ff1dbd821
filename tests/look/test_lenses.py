"""The logit lens: its last row is the model, its first is the embedding read out, and what sublayers add sums to the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import glassformer as gf
from glassformer.cli import app as cli
from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.look.lenses import FrozenReadOut, entropy, js, kl, logit_lens
from glassformer.look.subject import read
from look import zoo

ALL = list(zoo.SPECS)


def logits_of(model, given):
    source = (torch.tensor([given["source"]]),) if "source" in given else ()
    with torch.no_grad(), evaluating(model):
        return model(*source, torch.tensor([given["text"]]))[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("of", ["resid_post", "resid_mid"])
def test_the_last_row_is_the_models_own_output_to_the_bit(name, of):
    model, given = zoo.model(name), zoo.texts(name)
    if name == "parallel" and of == "resid_mid":
        with pytest.raises(InputError, match="here both read the same stream: use of='attn' or 'ffn'"):
            logit_lens(model, **given, of=of)
        return
    found = logit_lens(model, **given, of=of, keep_logits=True, top=3)
    own = logits_of(model, given)
    assert torch.equal(found.logits[-1], own)
    assert torch.equal(found.ids[-1], own.softmax(-1).topk(3).indices)
    assert torch.equal(found.choice, own.argmax(-1)) and (found.choice_rank[-1] == 1).all()
    assert (found.kl[-1] == 0).all() and (found.kl[:-1] > 0).all()
    layers = 2 if name in ("sandwich", "reordered", "experts", "sigmoid", "t5") else 3
    per_block = 1 if of == "resid_post" else 3 if name == "t5" else 2
    assert len(found.rows) == 1 + layers * per_block and found.rows[0] == "embedding" and found.rows[-1] == "output"


def test_every_row_is_what_the_model_computes_when_its_later_blocks_are_gone():
    model, ids = zoo.model("llama"), zoo.ids()
    found = logit_lens(model, ids, keep_logits=True)
    for depth in range(3):
        shallow = zoo.SPECS["llama"].replace(blocks=zoo.SPECS["llama"].blocks[:depth] or zoo.SPECS["llama"].blocks[:1]).build(seed=0).eval()
        weights = {k: v for k, v in model.state_dict().items() if k in shallow.state_dict()}
        shallow.load_state_dict(weights)
        if depth == 0:
            with torch.no_grad():
                expected = shallow.resume(model.embed.weight[torch.tensor(ids)][None], 1)[0]
        else:
            expected = logits_of(shallow, {"text": ids})
        torch.testing.assert_close(found.logits[depth], expected, atol=1e-5, rtol=1e-5)


def test_numbers_are_those_of_a_small_program_in_float64():
    model, ids = zoo.model("gpt2").double(), zoo.ids()
    found = logit_lens(model, ids, words=[5, 7], target=(5, 7), top=4, positions=[2, -1])
    record = gf.Record("blocks.1.resid_pre", "logits")
    model(torch.tensor([ids]), tap=record)
    h = record["blocks.1.resid_pre"][0, [2, -1]].numpy()
    w, b, matrix = (x.detach().numpy() for x in (model.final_norm.weight, model.final_norm.bias, model.readout.weight))
    h = h - h.mean(-1, keepdims=True)
    scores = (h / (h.var(-1, keepdims=True) + 1e-5) ** 0.5 * w + b) @ matrix.T
    p = torch.tensor(scores).softmax(-1)
    final = record["logits"][0, [2, -1]].log_softmax(-1)
    torch.testing.assert_close(found.p[1], p.topk(4).values)
    torch.testing.assert_close(found.entropy[1], -(p * p.log2()).sum(-1))
    torch.testing.assert_close(found.kl[1], (final.exp() * (final.exp().log2() - p.log2())).sum(-1))
    torch.testing.assert_close(found.probability(7)[1], p[:, 7])
    assert found.rank(5)[1].tolist() == [int((row > row[5]).sum()) + 1 for row in p]
    torch.testing.assert_close(found.target_value[1], torch.tensor(scores[:, 5] - scores[:, 7]))
    assert found.positions == (2, len(ids) - 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "sandwich", "reordered", "parallel", "experts", "sigmoid", "t5"])
def test_what_sublayers_add_sums_to_the_logits(name):
    model, given = zoo.model(name).double(), zoo.texts(name)
    s = read(model, **given)
    kinds = ("attn", "ffn", "cross") if name == "t5" else ("attn", "ffn")
    lenses = [logit_lens(model, **given, of=kind, norm="final", keep_logits=True) for kind in kinds]
    assert all(torch.equal(lens.scores, lens.logits.gather(-1, lens.ids)) and lens.grid().columns[4] == "adds" for lens in lenses)
    parts = [lens.logits.sum(0) for lens in lenses]
    record, _ = s.run("blocks.0.resid_pre")
    frozen = FrozenReadOut(s, range(len(s)))
    total = sum(parts) + frozen(record[s.path("blocks.0.resid_pre")][0]).detach()
    stack = s.stack
    bias = getattr(stack.final_norm, "bias", None)
    if bias is not None:
        total = total + (bias * stack.readout.factor) @ stack.readout.weight.T
    cap = stack.spec.readout.cap
    total = total.detach() if cap is None else cap * torch.tanh(total.detach() / cap)
    torch.testing.assert_close(total, logits_of(model, given), atol=1e-9, rtol=1e-9)


def test_a_norm_of_its_own_reads_a_sublayer_as_if_it_were_the_stream():
    model, ids = zoo.model("llama"), zoo.ids()
    found = logit_lens(model, ids, of="ffn", keep_logits=True)
    record = gf.Record("blocks.*.ffn.out")
    with torch.no_grad():
        model(torch.tensor([ids]), tap=record)
        expected = torch.stack([model.read(record[f"blocks.{i}.ffn.out"], normed=False)[0] for i in range(3)])
    assert torch.equal(found.logits, expected) and found.rows == ("block 0 ffn", "block 1 ffn", "block 2 ffn")
    assert logit_lens(zoo.model("experts"), ids, of="ffn").rows == ("block 0 experts", "block 1 experts")


def test_a_planted_word_is_found_where_it_is_written():
    """Blocks that add nothing but one, which writes the direction of token 9: the lens turns to 9 there and not before."""
    spec = zoo.SPECS["llama"]
    model = spec.build(seed=0).eval()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(zoo.V, zoo.D))
        model.readout.matrix.copy_(torch.eye(zoo.V, zoo.D))
        for block in model.blocks:
            block.attn.out.weight.zero_()
            block.ffn.down.weight.zero_()
        only = gf.Edit("blocks.1.ffn.out", lambda x: x + 10 * torch.eye(zoo.V, zoo.D)[9])
        s = read(model, [1, 2, 3])
        _, edited = s.run("resid_final", tap=only)
    assert edited.argmax(-1).tolist() == [9, 9, 9]
    found = logit_lens(model, [1, 2, 3], words=9)
    assert (found.rank(9) > 1).all(), "nothing writes 9 without the edit"
    assert found.ids[:, :, 0].tolist() == [[1, 2, 3]] * 4


def test_divergences_of_known_distributions():
    a, b = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()
    assert js(a, b).item() == pytest.approx(1.0) and js(a, a).item() == 0
    assert entropy(a).item() == pytest.approx(1.0) and entropy(b).item() == 0
    assert kl(a, torch.tensor([0.25, 0.25, 0.5]).log()).item() == pytest.approx(1.0) and kl(a, b).item() == float("inf")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {"of": "atn"}, "'atn' is no stream or sublayer that a lens reads. Did you mean 'attn'"),
        ("gpt2", {"norm": "finl", "of": "attn"}, "'finl' is no norm of a lens. Did you mean 'final'"),
        ("gpt2", {"norm": "final"}, "of='resid_post' reads whole streams, which have a norm of their own: use of='attn' or 'ffn'"),
        ("gpt2", {"of": "cross"}, "of='cross' asks for what cross adds, but this model has none"),
        ("gpt2", {"top": 0}, "top=0: at least 1 token"),
        ("gpt2", {"words": [99]}, "Token id 99 was asked about, but the vocabulary has 31"),
        ("gpt2", {"positions": 40}, "Position 40 was asked for, but the text has 9 tokens"),
        ("bert", {"norm": "final", "of": "attn"}, "a norm stands behind every sum .post-norm."),
    ],
)
def test_what_cannot_be_asked_says_so(name, options, message):
    with pytest.raises(InputError, match=message):
        logit_lens(zoo.model(name), **zoo.texts(name), **options)


def test_parts_that_do_not_add_up_are_refused():
    squashed = zoo.SPECS["gpt2"].replace(final_norm=gf.DynamicTanh())
    with pytest.raises(InputError, match="DynamicTanh is no division by a number: use norm='own'"):
        logit_lens(squashed.build(seed=0), zoo.ids(), of="attn", norm="final")
    turned = zoo.SPECS["gpt2"].replace(readout=gf.LanguageModel(transform=gf.Dense("gelu")))
    with pytest.raises(InputError, match="this read-out has a transform that is not linear: use norm='own'"):
        logit_lens(turned.build(seed=0), zoo.ids(), of="attn", norm="final")
    with pytest.raises(InputError, match="A lens asks for scores over the vocabulary, but this model ends in Classifier"):
        logit_lens(zoo.SPECS["gpt2"].replace(readout=gf.Classifier(3)).build(seed=0), zoo.ids())
    with pytest.raises(InputError, match="5 was not followed: name it in words=; followed are 3"):
        logit_lens(zoo.model("gpt2"), zoo.ids(), words=3).rank(5)


def test_it_shows_itself(tmp_path: Path):
    tokenizer = zoo.words()
    found = logit_lens(zoo.model("llama"), "the old man saw a red fox", tokenizer=tokenizer, words=["fox", "dog"], target=("fox", "dog"))
    assert torch.equal(found.rank("fox"), found.rank(tokenizer.encode("fox")[0]))
    text = str(found)
    assert "Logit lens: the stream after each block" in text and "Entropy and KL in bits, " in text
    assert found.grid().columns[-5:] == ("rank 'fox'", "p 'fox'", "rank 'dog'", "p 'dog'", "logit fox − dog")
    assert found.best("output", -1)[0][0] == found.vocabulary[int(found.choice[-1])]
    assert found.grid().rows[0][0] == 6 and len(found.grid().rows) == 7 * 4
    for dark in (False, True):
        assert len(found.plot(dark).axes) == 3  # the map, its colour bar, the words
    assert found.save(tmp_path / "lens.json").stat().st_size > 500
    long = logit_lens(zoo.model("llama"), zoo.ids(50))
    assert not long.plot().axes[0].texts and logit_lens(zoo.model("llama"), zoo.ids(20)).plot().axes[0].texts


def test_from_the_command_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gf.save(zoo.model("llama"), tmp_path / "m", tokenizer=zoo.words())
    Path("some.txt").write_text("the old man saw a red fox and the dog ran home to Rome or Paris " * 30)
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--words", "fox", "--words", "dog", "--of", "attn", "--out", "a.csv"]) == 0
    out = capsys.readouterr().out
    assert "what attention adds alone" in out and Path("a.csv").read_text().startswith("position,token,depth") and "rank 'dog'" in Path("a.csv").read_text()
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tuned", "m"]) == 2
    assert "There is no tuned lens in m" in capsys.readouterr().err
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tune", "some.txt"]) == 0
    out = capsys.readouterr().out
    assert "KL before" in out and "Tuned lens: the stream after each block" in out and Path("m/tuned_lens.json").exists()
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tune", "missing.txt"]) == 2, "a saved one is no reason to let a misspelt file pass"
    assert "'missing.txt' is no file: --tune reads the text that a lens is trained on" in capsys.readouterr().err
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tune", "some.txt"]) == 0, "the saved one is used"
    assert "KL before" not in capsys.readouterr().out
    gf.save(zoo.model("llama", seed=1), tmp_path / "m", tokenizer=zoo.words())
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tuned", "m"]) == 2
    assert "trained for another model" in capsys.readouterr().err
    Path("no_text.bin").write_bytes(b"\xff\xfe\xfd")
    assert cli.main(["look", "lens", "the old man", "--model", "m", "--tune", "no_text.bin"]) == 2
    assert "'no_text.bin' cannot be read as text" in capsys.readouterr().err


def test_wrong_kinds_say_so():
    model, ids = zoo.model("gpt2"), zoo.ids()
    for options, message in (
        ({"words": None}, "words= is a token .its id or its text. or a list of tokens, but None was given"),
        ({"words": 1.5}, "words= is a token"),
        ({"tuned": "m"}, "tuned= is a TunedLens, but a text was given: load_tuned_lens"),
        ({"top": True}, "top=True: at least 1 token"),
        ({"positions": 1.5}, "A position is a whole number, a word of the text, or a list of numbers, but a number was given"),
        ({"tokenizer": "m"}, "tokenizer= is a tokenizer of glassformer, but a text was given"),
    ):
        with pytest.raises(InputError, match=message):
            logit_lens(model, ids, **options)
    found = logit_lens(model, ids, positions=-1)
    for place, message in (
        ((9, 0), "This lens has 4 depths, counted from 0, but 9"),
        ((0, 1), "This lens has 1 asked positions, counted from 0, but 1"),
        ((True, 0), "but True was asked for"),
    ):
        with pytest.raises(InputError, match=message):
            found.best(*place)
    assert "no distribution" in logit_lens(model, ids, of="ffn", norm="final").grid().note and "no distribution" not in found.grid().note


def test_the_best_are_in_order_where_probabilities_are_nought():
    model = zoo.model("llama")
    with torch.no_grad():
        model.readout.matrix.mul_(1000)
    found = logit_lens(model, zoo.ids(), top=zoo.V, keep_logits=True)
    assert (found.p == 0).any() and torch.equal(found.ids[:, :, 0], found.logits.argmax(-1))
    assert (found.scores.diff(dim=-1) <= 0).all()


def test_a_word_is_asked_for_as_it_stands_in_the_text() -> None:
    bpe = gf.text.train("bpe", texts=["the man and the man and the man"] * 4, vocab_size=270)
    model = zoo.SPECS["llama"].replace(vocab_size=bpe.vocab_size).build(seed=0)
    found = logit_lens(model, "the man", tokenizer=bpe, words=[" man"])
    assert torch.equal(found.probability(" man"), found.probability("·man"))
