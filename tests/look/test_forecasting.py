"""What is foretold is what is held, to the byte; a budget is obeyed; what lies on disk is what would have lain in memory."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.errors import InputError, SiteError
from glassformer.look.capturing import capture
from glassformer.look.forecasting import available, forecast, said
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
        told = forecast(model, sites, 2, 9, source_t=6)
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
    need = forecast(model, sites, 3, 9, source_t=6)
    spilled = capture(model, texts, sites, budget=int(0.7 * (need.bytes + need.peak)), folder=tmp_path / "held", **given)
    assert spilled.place == "disk" and spilled.paths == whole.paths and [p.name for p in (tmp_path / "held").iterdir()] == ["captured.safetensors"]
    for path in whole.paths:
        assert torch.equal(whole[path], record[path])
        torch.testing.assert_close(spilled[path], whole[path], atol=1e-5, rtol=1e-5, equal_nan=True)
    path = next(p for p in whole.paths if p.endswith("pattern"))
    assert torch.equal(spilled.row(path, 1, 3), spilled[path][1, 3]) and torch.equal(spilled.row(path, 2), spilled[path][2])


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


def test_on_the_command_line(tmp_path, capsys):
    gf.save(zoo.SPECS["llama"].replace(vocab_size=zoo.words().vocab_size).build(seed=0), tmp_path / "m", tokenizer=zoo.words())
    out = tmp_path / "f.json"
    assert main(["look", "forecast", "-m", str(tmp_path / "m"), "-s", "blocks.*.attn.pattern", "--batch", "2", "--tokens", "8", "-o", str(out)]) == 0
    assert "to be held in memory" in capsys.readouterr().out
    assert json.loads(out.read_text())["bytes"] == 3 * 2 * 4 * 8 * 8 * 4
    assert main(["look", "forecast", "-m", str(tmp_path / "m"), "-s", "blocks.*.attn.patern"]) == 2
    assert "Did you mean" in capsys.readouterr().err
