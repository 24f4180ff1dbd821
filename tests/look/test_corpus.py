"""Activations on disk are those of the model, whatever the batch and the interruption; statistics are NumPy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.errors import InputError, SiteError
from glassformer.look import corpus
from glassformer.look.corpus import activations, read_activations
from glassformer.look.statistics import Moments, site_statistics
from look import zoo

torch.set_num_threads(1)
SITES = ["blocks.*.resid_post", "blocks.0.attn.z[1]"]
TEXT = " ".join(zoo.WORDS * 6)


@pytest.fixture(scope="module")
def words() -> Any:
    return zoo.words()


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.model("llama")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def by_hand(model: Any, ids: list[int], context: int, site: str) -> torch.Tensor:
    parts = []
    for at in range(0, len(ids), context):
        tap = gf.Record(site)
        with torch.no_grad():
            model(torch.tensor([ids[at : at + context]]), tap=tap)
        parts.append(tap[site.split("[")[0]][0])
    return torch.cat(parts)


def close(x: torch.Tensor, want: torch.Tensor) -> None:
    """Within 2e-6 of the largest: this model's stream grows to 20, where two float32 runs in batches of other sizes each lie up to 2.1e-5 from float64's."""
    torch.testing.assert_close(x, want, atol=2e-6 * float(want.abs().max()), rtol=0)


def test_activations_are_the_model_s(model, words, file, tmp_path):
    acts = activations(model, file, SITES, tmp_path / "acts", tokenizer=words, batch=3, context=10)
    ids = words.encode(TEXT)
    assert len(acts) == len(ids) and acts.tokens[:].tolist() == ids
    assert acts.sites == ["blocks.0.attn.z", "blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post"]
    for site, pattern in (("blocks.0.attn.z", "blocks.0.attn.z[1]"), ("blocks.2.resid_post", "blocks.2.resid_post")):
        want = by_hand(model, ids, 10, pattern)
        assert acts[site].shape == tuple(want.shape)
        close(acts[site][:], want)
        close(torch.cat([x for _, x in acts.batches(site, 7)]), want)
    assert f"{len(ids):,} tokens, 4 sites, float32" in repr(acts)


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD", 2000)


def test_slices_across_shards(model, words, file, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    acts = activations(model, file, "blocks.1.resid_post", tmp_path / "acts", tokenizer=words, batch=2, context=10, dtype="float16")
    files = sorted(p.name for p in (tmp_path / "acts").glob("*.safetensors"))
    assert len(files) > 2 and all((tmp_path / "acts" / f).stat().st_size < 7000 for f in files)
    rows = acts["blocks.1.resid_post"]
    whole = rows[:]
    assert whole.dtype == torch.float16 and len(rows) == len(acts)
    for where in (slice(3, 150), slice(0, 0), slice(5, 170, 7), slice(-20, None), slice(100, 90)):
        assert torch.equal(rows[where], whole[where])
    assert torch.equal(rows[-1], whole[-1]) and torch.equal(rows[[0, 160, 5]], whole[[0, 160, 5]])
    with pytest.raises(InputError, match="Place 5000 was asked for, but there are"):
        rows[5000]


def test_a_killed_run_goes_on(model, words, file, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    options: dict[str, Any] = {"tokenizer": words, "batch": 2, "context": 10}
    want = activations(model, file, SITES, tmp_path / "whole", **options)
    real, calls = corpus._write, []

    def killed(path, *rest):
        if len(calls) == 2:
            (path.parent / f".{path.name}.draft").write_bytes(b"half")
            raise KeyboardInterrupt
        calls.append(path)
        real(path, *rest)

    monkeypatch.setattr(corpus, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        activations(model, file, SITES, tmp_path / "acts", **options)
    with pytest.raises(InputError, match=r"is not whole: \d+ of \d+ shards are missing; call activations again"):
        read_activations(tmp_path / "acts")
    monkeypatch.setattr(corpus, "_write", lambda p, *rest: (calls.append(p), real(p, *rest)))
    acts = activations(model, file, SITES, tmp_path / "acts", **options)
    assert len(calls) == len(set(calls)) == len(list((tmp_path / "acts").glob("*.safetensors")))  # no shard was made twice
    assert not list((tmp_path / "acts").glob(".*"))
    for site in want.sites:
        assert torch.equal(acts[site][:], want[site][:])


def test_folders_are_not_mixed(model, words, file, tmp_path):
    options: dict[str, Any] = {"tokenizer": words, "batch": 2, "context": 10}
    activations(model, file, SITES, tmp_path / "acts", **options)
    other = tmp_path / "other.txt"
    other.write_text(" ".join(zoo.WORDS[::-1] * 6))
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((zoo.model("llama", seed=1), file, SITES), {}, "another model"),
        ((model, other, SITES), {}, "another text"),
        ((model, file, SITES[:1]), {}, "another sites"),
        ((model, file, SITES), {"context": 12}, "another context"),
        ((model, file, SITES), {"dtype": "float16"}, "another dtype"),
        ((model, file, SITES), {"resume": False}, "already holds activations"),
    ]
    for arguments, changed, said in wrong:
        with pytest.raises(InputError, match=said):
            activations(*arguments, tmp_path / "acts", **(options | changed))


def test_what_cannot_be_kept(model, words, file, tmp_path):
    with pytest.raises(SiteError, match=r"'blocks\.0\.attn\.pattern' has the axes b h t s, but a corpus keeps one value per token"):
        activations(model, file, "blocks.0.attn.pattern", tmp_path / "a", tokenizer=words)
    with pytest.raises(InputError, match="reads pairs of texts"):
        activations(zoo.model("t5"), file, "embed", tmp_path / "a", tokenizer=words)
    with pytest.raises(InputError, match=r"There is no file '.*none\.txt'"):
        activations(model, tmp_path / "none.txt", "embed", tmp_path / "a", tokenizer=words)
    with pytest.raises(InputError, match="there is none: give tokenizer="):
        activations(model, file, "embed", tmp_path / "a")
    with pytest.raises(InputError, match=r"One window of 10 tokens takes .*, but the budget is 1 kB: raise it"):
        activations(model, file, SITES, tmp_path / "a", tokenizer=words, context=10, budget=1000)
    with pytest.raises(InputError, match="dtype='int8' is no type to keep activations in"):
        activations(model, file, SITES, tmp_path / "a", tokenizer=words, dtype="int8")
    with pytest.raises(InputError, match="0 tokens"):
        activations(model, [""], SITES, tmp_path / "a", tokenizer=words)
    with pytest.raises(InputError, match="holds no activations"):
        read_activations(tmp_path)
    acts = activations(model, [TEXT], "embed", tmp_path / "b", tokenizer=words, most=17)
    assert len(acts) == 17
    with pytest.raises(SiteError, match="'embedd' was not kept in"):
        acts["embedd"]


def test_a_pass_stays_within_the_budget_whatever_the_shards_were_begun_with(model, words, file, tmp_path, monkeypatch):
    """Shards are written as they are computed: what a folder was begun with says nothing of the memory that going on takes."""
    options: dict[str, Any] = {"tokenizer": words, "batch": 16, "context": 10}
    want = activations(model, file, SITES, tmp_path / "whole", **options)
    need = {n: corpus._plan(model, tuple(SITES), n, 10, torch.float32, 10**9) for n in (1, 16)}
    assert need[16][1] == 16 and need[1][2] == need[16][2]
    seen: list[int] = []
    monkeypatch.setattr(model, "states", lambda tokens, tap: (seen.append(len(tokens)), type(model).states(model, tokens, tap=tap)))
    tight = next(b for b in range(1000, 10**6, 1000) if _fits(model, b))
    acts = activations(model, file, SITES, tmp_path / "acts", budget=3 * tight, **options)
    assert 1 <= max(seen) < 16
    (tmp_path / "acts" / corpus._shard(0)).unlink()
    seen.clear()
    acts = activations(model, file, SITES, tmp_path / "acts", budget=tight, **options)
    assert max(seen) == 1
    for site in want.sites:
        close(acts[site][:], want[site][:])


def _fits(model: Any, budget: int) -> bool:
    try:
        return bool(corpus._plan(model, tuple(SITES), 1, 10, torch.float32, budget))
    except InputError:
        return False


def test_places_by_mask_and_nonsense(model, words, tmp_path):
    acts = activations(model, [TEXT], "embed", tmp_path / "a", tokenizer=words)
    rows, mask = acts["embed"], torch.arange(len(acts)) % 7 == 3
    assert torch.equal(rows[mask], rows[:][mask]) and torch.equal(rows[np.int64(4)], rows[:][4]) and rows[[]].shape == (0, zoo.D)
    for wrong in (1.5, [0.5], mask[:4], torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(InputError, match="Places are whole numbers, a slice, or a mask"):
            rows[wrong]
    with pytest.raises(InputError, match="size is a number of tokens, at least 1, but 0 was given"):
        next(acts.batches("embed", 0))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("x" * 5000, "embed"), {}, "cannot be read as a file"),
        ((5, "embed"), {}, "A text file or a list of texts is read, but a whole number was given"),
        (([1, 2], "embed"), {}, "The list of texts holds a whole number"),
        (([TEXT], 5), {}, "Sites are named by a pattern"),
        (([TEXT], "embed"), {"most": -3}, "most is a number of tokens, at least 1, but -3 was given"),
        (([TEXT], "embed"), {"budget": float("nan")}, "budget is a number of bytes"),
        (([TEXT], "embed"), {"batch": 0}, "batch is a whole number of at least 1"),
    ],
)
def test_nonsense_is_answered_in_a_sentence(model, words, tmp_path, arguments, options, said):
    with pytest.raises(InputError, match=said):
        activations(model, *arguments, tmp_path / "a", tokenizer=words, **options)
    assert not (tmp_path / "a").exists()


def test_a_damaged_folder_is_refused(model, words, tmp_path):
    folder = tmp_path / "a"
    activations(model, [TEXT], "embed", folder, tokenizer=words)
    index = json.loads((folder / "index.json").read_text())
    for name, value in (("windows_per_shard", 0), ("sites", {}), ("tokens", "9"), ("context", None)):
        (folder / "index.json").write_text(json.dumps(index | {name: value}))
        with pytest.raises(InputError, match=f"{name}'.*: remove the folder and write it again"):
            read_activations(folder)
    (folder / "index.json").write_text(json.dumps(index | {"sites": {"embed": [3]}}))
    with pytest.raises(InputError, match=r"activations-00000\.safetensors in .* has shape \[\d+, 16\] at 'embed', but index\.json says \[\d+, 3\]"):
        read_activations(folder)


def test_what_float16_cannot_hold_is_said(words, tmp_path):
    model = zoo.model("gpt2")
    with torch.no_grad():
        model.blocks[1].ffn.down.bias[5] += 1e5
    with pytest.raises(InputError, match=r"'blocks\.1\.resid_post' is beyond what float16 holds \(65,504\): keep the activations as bfloat16"):
        activations(model, [TEXT], "blocks.*.resid_post", tmp_path / "a", tokenizer=words, dtype="float16", context=32)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["index.json"]
    folder = tmp_path / "b"
    assert float(activations(model, [TEXT], "blocks.1.resid_post", folder, tokenizer=words, dtype="bfloat16", context=32)["blocks.1.resid_post"][3][5]) > 9e4


# Statistics


def test_statistics_are_of_the_heads_that_were_asked_for(model, words, tmp_path):
    one = site_statistics(model, [TEXT], "blocks.0.attn.z[1]", tokenizer=words, context=10)["blocks.0.attn.z"]
    x = by_hand(model, words.encode(TEXT), 10, "blocks.0.attn.z[1]").flatten(1)
    assert one.mean.shape == (4,)
    torch.testing.assert_close(one.mean.float(), x.mean(0), atol=1e-5, rtol=1e-5)
    acts = activations(model, [TEXT], SITES, tmp_path / "a", tokenizer=words, context=10)
    found = site_statistics(acts, sites="blocks.*.resid_post")
    axes = found.plot().axes[0]
    assert axes.yaxis.get_major_formatter()(100.0) == "100" and axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert [s.site for s in found.sites] == acts.sites[1:]
    for arguments, options, said in (
        ((acts, "text.txt"), {}, "leave texts and most out"),
        ((acts,), {"most": 3}, "leave texts and most out"),
        ((acts,), {"sites": "blocks.0.attn.z[1]"}, "leave the brackets out"),
        ((acts,), {"sites": "blocks.*.resid_pst"}, r"'blocks\.\*\.resid_pst' was not kept in"),
    ):
        with pytest.raises((InputError, SiteError), match=said):
            site_statistics(*arguments, **options)


def test_merged_moments_are_numpys():
    x = np.random.default_rng(0).gamma(2.0, size=(1000, 5)) * [1, 10, 0.1, 1, 1] + [0, 100, 0, 0, -50]
    m = Moments()
    for part in np.split(x, [1, 2, 50, 51, 700]):
        m.add(torch.from_numpy(part))
    c = x - x.mean(0)
    for own, want in ((m.mean, x.mean(0)), (m.m2, (c**2).sum(0)), (m.m3, (c**3).sum(0)), (m.m4, (c**4).sum(0))):
        np.testing.assert_allclose(own.numpy(), want, rtol=1e-9)
    assert m.n == 1000


def test_statistics_of_a_model_and_of_its_activations_are_numpys(model, words, file, tmp_path):
    site = "blocks.1.resid_post"
    found = site_statistics(model, file, site, tokenizer=words, batch=3, context=10)[site]
    x = by_hand(model, words.encode(TEXT), 10, site).double().numpy()
    sd = x.std(0)
    np.testing.assert_allclose(found.mean.numpy(), x.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.variance.numpy(), x.var(0), rtol=1e-4)
    np.testing.assert_allclose(found.skew.numpy(), ((x - x.mean(0)) ** 3).mean(0) / sd**3, atol=1e-3)
    np.testing.assert_allclose(found.kurtosis.numpy(), ((x - x.mean(0)) ** 4).mean(0) / sd**4, atol=1e-3)
    norms = np.linalg.norm(x, axis=1)
    assert found.norm == pytest.approx(norms.mean(), rel=1e-5) and found.tokens == len(x)
    np.testing.assert_allclose(found.norm_by_position.numpy(), [norms[p::10].mean() for p in range(10)], rtol=1e-5)
    np.testing.assert_allclose(found.large.numpy(), (np.abs(x) >= 6).mean(0), atol=1e-6)
    kept = site_statistics(activations(model, file, site, tmp_path / "acts", tokenizer=words, batch=2, context=10))[site]
    for name in ("mean", "variance", "kurtosis", "norm_by_position"):
        torch.testing.assert_close(getattr(kept, name), getattr(found, name), rtol=1e-5, atol=1e-6)


def test_a_planted_outlier_is_found_and_nothing_else(words):
    model = zoo.model("gpt2")
    with torch.no_grad():
        model.blocks[1].ffn.down.bias[5] += 80.0
    found = site_statistics(model, [TEXT], "blocks.*.resid_post", tokenizer=words, context=32)
    assert 5 in found["blocks.1.resid_post"].outliers and 5 not in found["blocks.0.resid_post"].outliers
    assert found["blocks.1.resid_post"].large[5] == 1.0
    assert found["blocks.2.resid_post"].outliers == (5,)


def test_statistics_show_themselves(model, words, tmp_path):
    found = site_statistics(model, [TEXT], tokenizer=words, context=16)
    assert "Statistics of 3 sites over" in str(found) and "blocks.2.resid_post" in str(found)
    found.save(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5000
    with pytest.raises(SiteError, match="'x' is none of these sites"):
        found["x"]
    with pytest.raises(SiteError, match="statistics are of numbers per token"):
        site_statistics(model, [TEXT], "blocks.0.attn.pattern", tokenizer=words)
    with pytest.raises(InputError, match="Statistics are over a text"):
        site_statistics(model)


def test_on_the_command_line(file, tmp_path, capsys):
    gf.save(zoo.SPECS["llama"].replace(vocab_size=zoo.words().vocab_size).build(seed=0), tmp_path / "m", tokenizer=zoo.words())
    acts = str(tmp_path / "acts")
    command = ["look", "activations", str(file), "-m", str(tmp_path / "m"), "-s", "blocks.*.resid_post", "-o", acts, "--context", "16", "--as", "float16"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "3 sites, float16" in first and "already" not in first
    assert main(command) == 0
    assert capsys.readouterr().out == f"all of it was there already: {first}"
    for options in ([acts], [str(file), "-m", str(tmp_path / "m"), "--context", "16"]):
        assert main(["look", "statistics", *options, "-o", str(tmp_path / "s.json")]) == 0
        assert "blocks.2.resid_post" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "s.json").read_text())["sites"]) == 3
    assert main([*command[:5], "-s", "blocks.*.resid_psot", "-o", str(tmp_path / "none")]) == 2
    assert "Did you mean 'blocks.*.resid_post'" in (said := capsys.readouterr().err) and "'glassformer dimensions MODEL' lists them all." in said
    assert main(["look", "statistics", str(file)]) == 2
    assert "give --model" in capsys.readouterr().err
