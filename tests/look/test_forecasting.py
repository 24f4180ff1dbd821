"""What is foretold is what is held, to the byte; a budget is obeyed; what lies on disk is what would have lain in memory."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.errors import InputError, SiteError
from glassformer.look import capturing
from glassformer.look.capturing import capture
from glassformer.look.forecasting import available, dry_run, forecast, said
from look import zoo

torch.set_num_threads(1)


def inputs(name: str, rows: int = 2) -> tuple[torch.Tensor, ...]:
    target = torch.tensor([zoo.ids(9, i) for i in range(rows)])
    return (target[:, :6], target) if name == "t5" else (target,)


@pytest.mark.parametrize("name", zoo.SPECS)
def test_bytes_are_those_that_a_record_holds(name):
    model = zoo.model(name)
    some = [s.path for s in model.sites() if ".1." in s.path][::9]
    for sites in (["**"], ["**.q", "**.pattern[1,3]"], *([p] for p in some)):
        record = gf.Record(*sites)
        with torch.no_grad():
            model(*inputs(name), tap=record)
        told = forecast(model, sites, 2, 9, source_t=6 if name == "t5" else None)
        assert told.bytes == record.bytes == sum(s.bytes for s in told.sites), sites
        assert [(s.path, s.shape, s.dtype) for s in told.sites] == [(p, tuple(x.shape), str(x.dtype)[6:]) for p, x in record.values.items()]


def test_bytes_of_another_type():
    model = zoo.model("llama")
    assert 2 * forecast(model, "**.resid_post", 2, 9, dtype="bfloat16").bytes == forecast(model, "**.resid_post", 2, 9).bytes
    record = gf.Record("**")
    half = zoo.model("llama").bfloat16()
    with torch.no_grad():
        half(*inputs("llama"), tap=record)
    assert forecast(half, "**", 2, 9).bytes == record.bytes == forecast(model, "**", 2, 9, dtype="bfloat16").bytes


def test_the_forecast_reads_well_and_knows_its_place(tmp_path):
    told = forecast(zoo.model("llama"), "blocks.*.attn.*", 2, 9, budget=10**9)
    assert told.fits and told.place == "memory" and told.seconds is None and told.peak > 0
    assert told.title.startswith(f"2 x 9 tokens: {said(told.bytes)} to be held in memory, ")
    assert "blocks.0.attn.scores" in str(told)
    told.save(tmp_path / "a.png")
    tight = forecast(zoo.model("llama"), "blocks.*.attn.*", 2, 9, budget=1000)
    assert tight.place == "disk" and tight.budget == 1000
    assert 0 < available() < 2**45


def test_time_is_measured_when_asked():
    model = zoo.model("gpt2")
    told = forecast(model, "**", 1, 9, measure=True)
    begin = time.perf_counter()
    with torch.no_grad():
        model(*inputs("gpt2", 1), tap=gf.Record("**"))
    assert told.seconds is not None and math.isfinite(told.seconds) and 0 < told.seconds < 100 * (time.perf_counter() - begin) + 5


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (("blocks.*.attn.patern", 1, 9), SiteError, "meets no site of this model. Did you mean"),
        (("embed", 0), InputError, "batch is a whole number of at least 1, but 0 was given"),
        (("embed", 1, 65), InputError, "t=65 was given, but this model has positions for 64"),
    ],
)
def test_what_cannot_be_foretold(arguments, kind, said):
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        forecast(zoo.model("gpt2"), *arguments)
    with pytest.raises(InputError, match="budget is a number of bytes"):
        forecast(zoo.model("gpt2"), "embed", 1, 9, budget=0)
    with pytest.raises(InputError, match="those of Linear cannot"):
        forecast(torch.nn.Linear(2, 2), "embed")


# Capturing


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "experts"])
def test_disk_holds_what_memory_holds(name, tmp_path):
    model = zoo.model(name)
    given = {"source": zoo.ids(6, 1)} if name == "t5" else {}
    texts = [zoo.ids(9), zoo.ids(9, 1), zoo.ids(7, 2)]
    sites = ["**.resid_post", "**.attn.pattern", "**.attn.scores[2]", "**.result", "**.pos_embed" if name == "gpt2" else "**.v"]
    if name == "gpt2":
        sites[-1] = "pos_embed"
    whole = capture(model, texts, sites, **given)
    record = gf.Record(*sites)
    tokens = torch.zeros(3, 9, dtype=torch.long)
    for i, t in enumerate(texts):
        tokens[i, : len(t)] = torch.tensor(t)
    with torch.no_grad():
        model(*((torch.tensor([given["source"]] * 3),) if given else ()), tokens, lengths=[9, 9, 7], tap=record)
    assert whole.place == "memory" and whole.paths == record.paths and whole.bytes == record.bytes
    need = forecast(model, sites, 3, 9, source_t=6 if given else None)
    spilled = capture(model, texts, sites, budget=int(0.7 * (need.bytes + need.peak)), folder=tmp_path / "held", **given)
    assert spilled.place == "disk" and spilled.paths == whole.paths and [p.name for p in (tmp_path / "held").iterdir()] == ["captured.safetensors"]
    for path in whole.paths:
        assert torch.equal(whole[path], record[path])
        torch.testing.assert_close(spilled[path], whole[path], atol=1e-5, rtol=1e-5, equal_nan=True)
    path = next(p for p in whole.paths if p.endswith("pattern"))
    assert torch.equal(spilled.row(path, 1, 3), spilled[path][1, 3]) and torch.equal(spilled.row(path, 2), spilled[path][2, :, :7, :7])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "sigmoid", "parallel"])
def test_one_head_at_a_time_is_the_full_record(name, monkeypatch):
    model, prefix = zoo.model(name), "decoder." if name == "t5" else ""
    given = {"source": zoo.ids(6, 1)} if name == "t5" else {}
    full = capture(model, zoo.ids(9), "**.pattern", **given)
    for sites in ([f"{prefix}blocks.*.resid_pre"], ["**.embed" if prefix else "embed"]):
        held = capture(model, zoo.ids(9), sites, **given)
        for layer in range(2):
            for head in range(4):
                for kind in ("attn", "cross") if prefix else ("attn",):
                    want = full[f"{prefix}blocks.{layer}.{kind}.pattern"][0, head]
                    torch.testing.assert_close(held.pattern(layer, head, kind=kind), want, atol=1e-6, rtol=1e-5)
    assert torch.equal(full.pattern(1, 2), full[f"{prefix}blocks.1.attn.pattern"][0, 2])


def test_a_pattern_stops_at_its_layer(monkeypatch):
    model = zoo.model("llama")
    held = capture(model, zoo.ids(9), "blocks.*.resid_pre")
    calls: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        block.attn.register_forward_pre_hook(lambda *_, i=i: calls.append(10 + i))
    held.pattern(1, 0)
    assert calls == [11]


def test_a_budget_that_nothing_meets():
    model = zoo.model("llama")
    with pytest.raises(InputError, match=r"The capture takes .* at one time, but the budget is 2 kB and disk=False: raise it"):
        capture(model, zoo.ids(9), "**", budget=2000, disk=False)
    with pytest.raises(InputError, match=r"Even with every value on disk a pass of 9 tokens takes .* at one time, but the budget is 500 bytes"):
        capture(model, zoo.ids(9), "**", budget=500)
    held = capture(model, zoo.ids(9), "blocks.0.attn.z")
    with pytest.raises(SiteError, match=r"'blocks\.0\.attn\.zz' was not captured\. Did you mean 'blocks\.0\.attn\.z'"):
        held["blocks.0.attn.zz"]
    with pytest.raises(SiteError, match=r"Head 0\.9 was asked for, but layer 0 has 4 heads"):
        held.pattern(0, 9)
    with pytest.raises(InputError, match="Row 3 was asked for, but there are 1"):
        held.pattern(0, 1, row=3)


def test_a_pass_of_several_rows_keeps_within_the_budget(tmp_path):
    """What a pass takes besides its rows (masks, tables) does not shrink with them."""
    model, texts = zoo.model("gpt2"), [zoo.ids(9, i) for i in range(12)]
    sites = ("blocks.*.attn.result",)
    shapes, _, _ = dry_run(model, gf.Record(*sites), 12, 9)
    need = [dry_run(model, capturing._Spill(sites, shapes, lambda *_: None), n, 9)[1] for n in range(1, 13)]
    for budget in (need[0], need[4], need[4] + 10, need[10]):
        n = capturing._rows_at_once(model, sites, shapes, 12, 9, None, budget)
        assert need[n - 1] <= budget and (n == 12 or need[n] > budget), n
    whole = capture(model, texts, sites)
    held = capture(model, texts, sites, budget=need[4])
    for path in whole.paths:
        torch.testing.assert_close(held[path], whole[path], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_row_ends_where_its_text_ends(name, tmp_path):
    model, given = zoo.model(name), {"source": zoo.ids(6, 1)} if name == "t5" else {}
    texts, half = [zoo.ids(9), zoo.ids(5, 1)], "decoder." if name == "t5" else ""
    sites = [f"{half}blocks.1.resid_post", f"{half}blocks.1.attn.pattern", f"{half}blocks.1.attn.k"]
    sites += ["encoder.resid_final", "decoder.blocks.1.cross.pattern"] if half else []
    need = forecast(model, sites, 2, 9, source_t=6 if half else None)
    memory, disk = capture(model, texts, sites, **given), capture(model, texts, sites, budget=need.peak + need.bytes - 100, folder=tmp_path / "a", **given)
    assert (memory.place, disk.place, memory.lengths) == ("memory", "disk", [9, 5])
    for i, text in enumerate(texts):
        alone = capture(model, text, sites, **given)
        for path in alone.paths:
            for held in (memory, disk):
                torch.testing.assert_close(held.row(path, i), alone[path][0], atol=1e-4, rtol=1e-4)
        for held in (memory, disk):
            torch.testing.assert_close(held.pattern(1, 2, row=i), alone[f"{half}blocks.1.attn.pattern"][0, 2], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"already holds a capture \(captured\.safetensors\), which another one may be reading"):
        capture(model, texts, sites, budget=need.peak + need.bytes - 100, folder=tmp_path / "a", **given)


def test_nonsense_is_answered_in_a_sentence():
    model = zoo.model("llama")
    held = capture(model, [zoo.ids(9), zoo.ids(5)], ["blocks.0.resid_post", "blocks.0.attn.z"])
    wrong = [
        (lambda: held.row("blocks.0.resid_post", 2), "Row 2 was asked for, but there are 2"),
        (lambda: held.row("blocks.0.resid_post", "a"), "Row 'a' was asked for"),
        (lambda: held.row("blocks.0.attn.z", 0, 1), "where a head is no part of its own"),
        (lambda: held.pattern(0, "a"), "Head 0.a was asked for"),
        (lambda: held.pattern(0, 1, kind="cross"), "'cross' is no kind of attention of this model"),
        (lambda: held.pattern(9, 0), "Layer 9 was asked for"),
        (lambda: forecast(model, "embed", 1, 9, source_t=4), "reads one text: leave it out"),
        (lambda: forecast(zoo.model("t5"), "**.embed", 1, 9, source_t=0), "source_t is a whole number of at least 1, but 0"),
        (lambda: forecast(zoo.model("t5").decoder, "embed"), "give the whole encoder-decoder"),
        (lambda: forecast(model, 5), "Sites are named by a pattern"),
        (lambda: forecast(model, []), "keeps nothing: name what to keep"),
        (lambda: forecast(model, "embed", True), "batch is a whole number"),
        (lambda: capture(model, [], "embed"), "has 0 tokens"),
        (lambda: capture(model, zoo.ids(9), "embed", budget=float("inf")), "budget is a number of bytes"),
    ]
    for ask, answer in wrong:
        with pytest.raises((InputError, SiteError), match=answer):
            ask()
    assert torch.equal(capture(model, torch.tensor(zoo.ids(9)), "embed")["embed"], capture(model, np.array(zoo.ids(9)), "embed")["embed"])


def test_nothing_is_left_where_a_capture_fails(tmp_path, monkeypatch):
    model = zoo.model("llama")
    need = forecast(model, "**", 1, 9)
    monkeypatch.setattr(capturing.Draft, "put", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="The capture cannot be written to .*: the disk is full. Free some space"):
        capture(model, zoo.ids(9), "**", budget=need.peak + need.bytes - 100, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path, capsys):
    gf.save(zoo.SPECS["llama"].replace(vocab_size=zoo.words().vocab_size).build(seed=0), tmp_path / "m", tokenizer=zoo.words())
    out = tmp_path / "f.json"
    assert main(["look", "forecast", "-m", str(tmp_path / "m"), "-s", "blocks.*.attn.pattern", "--batch", "2", "--tokens", "8", "-o", str(out)]) == 0
    assert "to be held in memory" in capsys.readouterr().out
    assert json.loads(out.read_text())["bytes"] == 3 * 2 * 4 * 8 * 8 * 4
    assert main(["look", "forecast", "-m", str(tmp_path / "m"), "-s", "blocks.*.attn.patern"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    for budget in ("nan", "inf", "-1"):
        assert main(["look", "forecast", "-m", str(tmp_path / "m"), "-s", "embed", "--budget", budget]) == 2
        assert "--budget is a number of GB above 0" in capsys.readouterr().err
