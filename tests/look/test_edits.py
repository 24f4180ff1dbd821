"""Edits as files: they do what an Edit by hand does, at the positions and steps that they name, and a file brings back the same edits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import glassformer as gf
from glassformer import look
from glassformer.cli.app import main
from glassformer.core.errors import CheckpointError, GlassformerError, InputError, SiteError
from glassformer.look.edits import Add, Intervention, Remove, Scale, Set, Zero, load_edits
from glassformer.train import checkpoint
from glassformer.train.recipe import Recipe
from glassformer.train.run import check_settings
from look import zoo

D = zoo.D
F64 = torch.float64


def tokens(t: int = 9) -> torch.Tensor:
    return torch.tensor([zoo.ids(t)])


def run(name: str, tap: Any = None, t: int = 9) -> torch.Tensor:
    model = zoo.model(name).double()
    with torch.no_grad():
        return model(*((tokens(6),) if name == "t5" else ()), tokens(t), tap=tap)


def vector(n: int = D, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


V = vector()

CASES: dict[str, tuple[Any, Any]] = {
    "zero": (Zero("blocks.1.attn.z[1]"), gf.Edit("blocks.1.attn.z[1]", torch.zeros_like)),
    "scale": (Scale("blocks.*.attn.pattern[0,2]", 0.5), gf.Edit("blocks.*.attn.pattern[0,2]", lambda x: 0.5 * x)),
    "add": (Add("blocks.0.resid_post", V, 4.0), gf.Edit("blocks.0.resid_post", lambda x: x + 4.0 * V.to(x))),
    "number": (Add("blocks.1.attn.q", 0.25), gf.Edit("blocks.1.attn.q", lambda x: x + 0.25)),
    "set": (Set("blocks.1.attn.z[3]", [0.1, 0.2, 0.3, 0.4]), gf.Edit("blocks.1.attn.z[3]", lambda x: torch.tensor([0.1, 0.2, 0.3, 0.4]).to(x).expand_as(x))),
    "heads": (Add("blocks.1.attn.z[0,2]", V[:8].view(2, 4)), gf.Edit("blocks.1.attn.z[0,2]", lambda x: x + V[:8].view(2, 4).to(x))),
    "remove": (Remove("blocks.1.resid_pre", V), gf.Edit("blocks.1.resid_pre", lambda x: x - (x @ V.to(x))[..., None] * V.to(x) / (V.to(x) @ V.to(x)))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "experts"])
def test_an_edit_does_what_one_by_hand_does(name, case):
    change, by_hand = CASES[case]
    edited = run(name, Intervention(case, (change,)).tap(zoo.model(name)))
    torch.testing.assert_close(edited, run(name, by_hand), atol=1e-10, rtol=1e-10)
    assert (edited - run(name)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_positions_are_those_and_no_others(name):
    site = ("decoder." if name == "t5" else "") + "blocks.1.resid_pre"
    plain, edited = gf.Record(site), gf.Record(site)
    run(name, plain)
    run(name, Intervention("p", (Add(site, V, positions="0,3:5,7:"),)).tap(zoo.model(name)) | edited)
    moved = (plain[site] - edited[site]).abs().sum(-1)[0] > 0
    assert moved.tolist() == [i in (0, 3, 4, 7, 8) for i in range(9)]


def test_positions_of_patterns_are_those_of_queries_and_of_keys_those_of_keys():
    model = zoo.model("llama").double()
    for site, axis in (("blocks.0.attn.pattern", 2), ("blocks.0.attn.k", 1), ("blocks.0.attn.z[2]", 1)):
        record = gf.Record(site)
        model(tokens(), tap=Intervention("p", (Zero(site, positions=4),)).tap(model) | record)
        value = record[site.split("[")[0]].movedim(axis, 0).flatten(1)
        assert [bool((row == 0).all()) for row in value] == [i == 4 for i in range(9)], site


@pytest.mark.parametrize("name", [*zoo.DECODERS, "t5"])
def test_edits_hold_in_cached_generation_as_in_uncached(name):
    """Rows of different lengths; positions count in the whole row although a step sees one token."""
    model = zoo.model(name)
    half = "decoder." if name == "t5" else ""
    made = Intervention("g", (Zero(f"{half}blocks.1.attn.z[1]"), Add(f"{half}blocks.0.resid_post", V, 3.0, positions="2:6")))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
    cached, uncached = (gf.generate(model, prompts, tap=made.tap(model), cache=c, **options) for c in (None, False))
    plain = gf.generate(model, prompts, **options)
    for a, b in zip(cached, uncached, strict=True):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert [a.logprobs for a in cached] != [a.logprobs for a in plain]


def test_steps_are_those_of_a_generation_only():
    model = zoo.model("llama")
    tap = Intervention("s", (Add("blocks.0.resid_post", V, 30.0, steps="2:"),)).tap(model)
    assert torch.equal(model(tokens(), tap=tap), model(tokens()))
    a, b = (gf.generate(model, [1, 2, 3], max_new_tokens=5, temperature=0.0, tap=t) for t in (tap, None))
    assert a.logprobs[:2] == b.logprobs[:2] and a.logprobs[2] != b.logprobs[2]
    prompt_only = Intervention("s", (Add("blocks.0.resid_post", V, 30.0, steps=0),)).tap(model)
    assert gf.generate(model, [1, 2, 3], max_new_tokens=1, temperature=0.0, tap=prompt_only).logprobs != b.logprobs[:1]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_brings_back_the_same_edits(tmp_path, suffix):
    made = Intervention("alle Ärten", (*(c for c, _ in CASES.values()), Zero("blocks.0.attn.z", positions=slice(2, None), steps="0")))
    back = load_edits(made.save(tmp_path / f"all{suffix}"))
    assert back == made and back.hash == made.hash and hash(back) == hash(made) and str(back) == str(made)
    assert torch.equal(run("llama", back.tap(zoo.model("llama"))), run("llama", made.tap(zoo.model("llama"))))
    assert [p.name for p in tmp_path.iterdir()] == [f"all{suffix}"]


def test_the_hash_is_of_the_content():
    a, b = Intervention("a", (Zero("blocks.0.attn.z[1]"),)), Intervention("b", (Zero("blocks.0.attn.z[1]"),))
    assert a.hash == b.hash and a != b and len({a, b, Intervention("a", a.edits)}) == 2
    others = [Zero("blocks.0.attn.z[1]", positions="7:"), Zero("blocks.0.attn.z[2]"), Scale("blocks.0.attn.z[1]", 0.0), Add("blocks.0.attn.z[1]", 0.0)]
    assert len({Intervention("a", (o,)).hash for o in others} | {a.hash}) == 5
    near = V.clone()
    near[0] += 1e-7
    assert Intervention("a", (Add("embed", V),)).hash != Intervention("a", (Add("embed", near),)).hash


def test_a_readable_file_is_readable(tmp_path):
    made = Intervention("off", (Zero("blocks.0.attn.z[1]", positions="7:"), Scale("blocks.1.ffn.out", 2)))
    text = made.save(tmp_path / "off.json").read_text()
    assert '    {"type": "Zero", "site": "blocks.0.attn.z[1]", "positions": "7:"},\n' in text
    assert json.loads(text)["edits"][1] == {"type": "Scale", "site": "blocks.1.ffn.out", "by": 2.0}
    assert str(made).splitlines()[1:] == ["  blocks.0.attn.z[1]: set to zero, at positions 7:", "  blocks.1.ffn.out: multiplied by 2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"version": 2}, "version 2 was given, and version 1 is read here"),
        (lambda d: d | {"format": "x"}, 'this is no file of edits, which has "format": "glassformer.edits"'),
        (lambda d: d | {"nam": 1}, "there is no field 'nam'. Did you mean 'name'"),
        (lambda d: d | {"edits": [d["edits"][0] | {"position": "1:"}]}, "edit 0: there is no field 'position'. Did you mean 'positions'"),
        (lambda d: d | {"edits": [{"type": "Zerro", "site": "embed"}]}, "edit 0: there is no edit 'Zerro'. Did you mean 'Zero'"),
        (lambda d: d | {"edits": [{"type": "Zero"}]}, "edit 0: it names no site"),
        (lambda d: d | {"edits": ["Zero"]}, "edit 0: an edit is a mapping"),
        (lambda d: d | {"edits": {}}, '"edits" is a list of edits, but a dict was given'),
        (lambda d: d | {"edits": []}, "holds one or more of Zero, Scale, Add, Set, Remove, but none was given"),
        (lambda d: d | {"edits": [d["edits"][0] | {"positions": "2:"}]}, 'it was changed; remove "hash" if that was meant'),
        (lambda d: d | {"name": ""}, "has a name to be known by"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, said):
    file = Intervention("off", (Zero("blocks.0.attn.z[1]"),)).save(tmp_path / "off.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError) as error:
        load_edits(file)
    assert said in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="There is no file of edits at"):
        load_edits(tmp_path / "no.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json is no JSON"):
        load_edits(tmp_path / "x.json")
    from safetensors.torch import save_file

    save_file({"a": V}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors holds tensors, but no edits"):
        load_edits(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"'x\.pt' ends in '\.pt', but edits are saved as \.json or \.safetensors"):
        Intervention("x", (Zero("embed"),)).save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="cannot be written"):
        Intervention("x", (Zero("embed"),)).save(tmp_path / "none" / "x.json")


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: Zero("blocks.1.attn.z[9]"), SiteError, r"Zero\('blocks\.1\.attn\.z\[9\]'\) picks head 9, but 'blocks\.1\.attn\.z' has 4 heads, 0 to 3"),
        (lambda: Zero("blocks.1.attn.k[3]"), SiteError, r"picks head 3, but 'blocks\.1\.attn\.k' has 2 heads"),
        (lambda: Zero("blocks.9.attn.z"), SiteError, r"'blocks\.9\.attn\.z' meets no site of this model"),
        (lambda: Add("blocks.0.resid_post", V[:5]), InputError, r"vector has shape \[5\], but at 'blocks\.0\.resid_post' it must be \[16\] \(d\)"),
        (lambda: Set("blocks.0.attn.z[1,2]", torch.ones(3, 4)), InputError, r"value has shape \[3, 4\], but at .* it must be \[2, 4\] \(h k\)"),
        (lambda: Add("blocks.0.attn.scores", V), InputError, "it must be a single number, because its other axes grow with the text"),
        (lambda: Zero("logits", positions="3:"), SiteError, "edit 'resid_final'"),
        (lambda: Zero("embed", positions="-1"), InputError, "positions are counted from the beginning of the row"),
        (lambda: Zero("embed", positions="5:3"), InputError, r"written as '7:' \(from 7 on\)"),
        (lambda: Zero("embed", positions=slice(0, 9, 2)), InputError, "runs without gaps"),
        (lambda: Zero("step.2.embed"), SiteError, r"begins with 'step\.': give the path without it, and steps='2'"),
        (lambda: Scale("embed", float("nan")), InputError, "by is a finite number, but nan was given"),
        (lambda: Add("embed", [float("inf")]), InputError, "holds nothing, or what is no number"),
        (lambda: Add("embed"), InputError, "needs vector"),
        (lambda: Remove("embed", torch.zeros(D)), InputError, "a direction is a vector that is not zero"),
        (lambda: Zero("embed[1]"), SiteError, "has no head axis"),
        (lambda: Add("blocks.0.attn.pattern", 0.1), SiteError, "would also look at what is masked: Zero or Scale the pattern"),
        (lambda: Set("blocks.0.attn.pattern[1]", 0.5), SiteError, "would also look at what is masked"),
        (lambda: Remove("embed", [1.0]), InputError, r"direction has shape \[1\], but at 'embed' it must be as long as the last axis, 16"),
        (lambda: Remove("blocks.0.attn.scores", [1.0]), InputError, "no direction has their length"),
        (lambda: Remove("blocks.0.attn.z", torch.eye(4)[:, :4] * torch.tensor([1.0, 0, 1, 1])[:, None]), InputError, "a vector that is not zero"),
        (lambda: Zero("embed", positions="9" * 5000), InputError, "positions are written as"),
        (lambda: Zero("embed", positions=[1.5]), InputError, "positions are written as"),
        (lambda: Zero("embed", steps=[]), InputError, "steps are written as"),
        (lambda: Scale("embed", 10**400), InputError, "by is a finite number, but 1000"),
        (lambda: Add("embed", 10**400), InputError, "vector is a tensor or numbers, but a whole number was given"),
        (lambda: Zero("blocks.0.attn.z[0-999999999999]"), SiteError, "'0-999999999999' is no number up to 100,000"),
        (lambda: Zero("blocks.{3-1}.attn.z"), SiteError, "nor a range from a smaller to a larger one"),
        (lambda: Zero("blocks.0.attn.z[\u00b2]"), SiteError, "is neither a number nor a range"),
        (lambda: Zero(".".join(["**"] * 2000)), SiteError, "has 2000 segments, but no site's path has more than 12"),
        (lambda: Zero(None), SiteError, "A site is named by a text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_runs(make, kind, said):
    with pytest.raises(kind, match=said):
        Intervention("x", (make(),)).tap(zoo.model("llama"))


def test_positions_along_a_source_are_refused():
    with pytest.raises(SiteError, match=r"'decoder\.blocks\.0\.cross\.k' stands along the source: edit 'encoder\.resid_final'"):
        Intervention("x", (Zero("decoder.blocks.0.cross.k", positions="1:"),)).tap(zoo.model("t5"))
    with pytest.raises(SiteError, match="holds numbers of experts: only Set fits"):
        Intervention("x", (Scale("blocks.0.experts.chosen", 2.0),)).tap(zoo.model("experts"))


@pytest.mark.parametrize("name", ["llama", "bert", "sigmoid"])
def test_what_is_masked_stays_so_whatever_is_done_to_the_scores(name):
    """Nothing later reaches a position, and no weight becomes NaN."""
    model, site = zoo.model(name), "blocks.1.attn.scores"
    for change in (Zero(site), Scale(site, 0.0), Scale(site, -2.0), Set(site, 3.0), Add(site, 1.0), Zero(f"{site}[1]", positions="2:")):
        tap, seen = Intervention("s", (change,)).tap(model), gf.Record("blocks.1.attn.pattern", "logits")
        with torch.no_grad():
            model(tokens(), tap=tap | seen)
            pattern = seen["blocks.1.attn.pattern"]
            assert seen["logits"].isfinite().all() and pattern.isfinite().all()
            if name != "bert":
                assert not pattern.triu(1).any(), change
                torch.testing.assert_close(model(tokens()[:, :5], tap=tap), seen["logits"][:, :5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(zoo.SPECS))
def test_every_edit_holds_at_every_site(name):
    """A value set by hand may lie anywhere in memory: the pass goes on from it in every kind of model."""
    model = zoo.model(name)
    inputs = (*((tokens(6),) if name == "t5" else ()), tokens())
    sites = [x.path for x in model.sites() if not x.path.endswith(".chosen")]
    for kind, by in ((Zero, ()), (Scale, (0.5,)), (Set, (0.25,)), (Add, (0.25,))):
        chosen = [site for site in sites if kind in (Zero, Scale) or not site.endswith("pattern")]
        tap, seen = Intervention("e", tuple(kind(site, *by) for site in chosen)).tap(model), gf.Record(*chosen)
        with torch.no_grad():
            model(*inputs, tap=tap | seen)
        for site in chosen if kind in (Zero, Set) else ():
            held = seen[site][seen[site].isfinite()]
            assert torch.equal(held, torch.full_like(held, *(by or (0.0,)))), site


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Intervention("x", 5), "holds one or more of Zero, Scale, Add, Set, Remove, but a whole number was given"),
        (lambda: Intervention("x", None), "but None"),
        (lambda: Intervention("\udc80", (Zero("embed"),)), "cannot be written as text"),
        (lambda: Intervention(5, (Zero("embed"),)), "has a name to be known by, but 5"),
        (lambda: Intervention("x", (Zero("embed"),)).tap("model"), "Edits are checked against a model, but a text was given"),
        (lambda: Intervention("x", (Zero("embed"),)).save(5), "is named by its path, but a whole number was given"),
        (lambda: load_edits(None), "is named by its path"),
        (lambda: load_edits("a\0b.json"), "There is no file of edits at"),
        (lambda: load_edits("/"), "There is no file of edits at"),
    ],
)
def test_nonsense_is_answered_in_a_sentence(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_no_edit_no_intervention():
    for given in ((), ("zero",)):
        with pytest.raises(InputError, match="An intervention holds one or more of Zero"):
            Intervention("x", given)  # type: ignore[arg-type]


def test_under_compile():
    torch._dynamo.reset()
    model = zoo.model("llama")
    tap = Intervention("c", (Zero("blocks.1.attn.z[1]"), Add("blocks.0.resid_post", V, positions="3:"))).tap(model)
    with torch.no_grad():
        want = model(tokens(), tap=tap)
        got = torch.compile(model, backend="eager", fullgraph=True)(tokens(), tap=tap)
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


# Training


@pytest.fixture
def small() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    import small

    return small


def test_a_head_that_is_off_in_training_learns_nothing_and_the_run_remembers_it(tmp_path, small):
    made = small.model()
    before = made.blocks[0].attn.out.weight.detach().clone()
    k = made.blocks[0].attn.d_head
    tap = Intervention("off", (Zero("blocks.0.attn.z[1]"),)).tap(made)
    optimizer = gf.AdamW(3e-3, weight_decay=0.0)
    options: dict[str, Any] = {"optimizer": optimizer, "steps": 4, "validation": small.data(400)}
    trainer = small.trainer(made, tap=tap, folder=tmp_path / "run", **options)
    trainer.run()
    moved = (made.blocks[0].attn.out.weight.detach() - before).abs().view(before.shape[0], -1, k).amax((0, 2))
    assert moved[1] == 0 and moved[0] > 0
    with torch.no_grad():
        assert trainer.last.validation.loss == pytest.approx(gf.evaluate(made, gf.NextToken(), small.data(400), batch=4, context=16, tap=tap).loss)
        assert trainer.last.validation.loss != pytest.approx(gf.evaluate(made, gf.NextToken(), small.data(400), batch=4, context=16).loss, abs=1e-9)
    with pytest.raises(CheckpointError, match=r"settings: tap was '[0-9a-f]{64}' and is None"):
        small.trainer(small.model(), folder=tmp_path / "run", resume=True, **options)


# The command line


@pytest.fixture
def saved(tmp_path) -> Path:
    spec = zoo.SPECS["llama"].replace(vocab_size=zoo.words().vocab_size)
    gf.save(spec.build(seed=0), tmp_path / "model", tokenizer=zoo.words())
    (tmp_path / "text.txt").write_text(" ".join(zoo.WORDS * 3))
    Intervention("loud", (Add("blocks.0.resid_post", V, 50.0, positions="1:"),)).save(tmp_path / "loud.json")
    Intervention("bad", (Zero("blocks.0.attn.z[8]"),)).save(tmp_path / "bad.json")
    return tmp_path


def test_edits_on_the_command_line(saved, capsys):
    model, edits = str(saved / "model"), str(saved / "loud.json")
    texts = []
    for options in ([], ["--edits", edits]):
        assert main(["generate", model, "the old man", "-n", "6", "--temperature", "0", *options]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["evaluate", model, "--data", str(saved / "text.txt"), "--context", "8", "--json", *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["loss"])
    assert texts[0] != texts[2] and texts[1] != pytest.approx(texts[3])
    assert main(["generate", model, "the old man", "--edits", str(saved / "bad.json")]) == 2
    assert "picks head 8, but 'blocks.0.attn.z' has 4 heads, 0 to 3." in capsys.readouterr().err
    assert main(["generate", model, "the old man", "--edits", str(saved / "none.json")]) == 2
    assert "There is no file of edits" in capsys.readouterr().err


def test_edits_hold_in_what_is_looked_at(saved, capsys):
    """The same file in the commands that look: what is shown is what the edited model computes."""
    model, edits = str(saved / "model"), str(saved / "loud.json")
    loaded = gf.load(model)
    tap = load_edits(edits).tap(loaded)
    with torch.no_grad():
        want = loaded.model(torch.tensor([loaded.tokenizer.prompt("the old man")]), tap=tap)[0, -1].softmax(-1)
    best = look.candidates(loaded, "the old man", 3, tap=tap)
    torch.testing.assert_close(best.p, want.topk(3).values)
    lens = look.logit_lens(loaded, "the old man", tap=tap)
    torch.testing.assert_close(lens.p[-1, -1, 0], want.max())
    seen = {}
    for command in ("candidates", "lens", "page"):
        file = saved / f"{command}.{'html' if command == 'page' else 'json'}"
        for options in ([], ["--edits", edits]):
            assert main(["look", command, "the old man", "-m", model, "-o", str(file), *options]) == 0
            seen[command, bool(options)] = file.read_text()
        assert seen[command, False] != seen[command, True]
        capsys.readouterr()
        assert main(["look", command, "the old man", "-m", model, "-o", str(file), "--edits", str(saved / "bad.json")]) == 2
        assert "picks head 8, but 'blocks.0.attn.z' has 4 heads, 0 to 3." in capsys.readouterr().err
    assert json.loads(seen["candidates", True])["p"][0] == pytest.approx(float(want.max()), rel=1e-4)
    with pytest.raises(InputError, match=r"tap= sees or edits a pass, but a text was given"):
        look.candidates(loaded, "the old man", tap="loud.json")


def test_samples_while_training_are_of_the_edited_model(saved, capsys):
    spec = zoo.SPECS["llama"]
    recipe = Recipe(spec, str(saved / "text.txt"), steps=2, batch=2, context=8, sample="the", compile=False, tensorboard=False, validation=0.0)
    Intervention("mute", (Scale("resid_final", 0.0), Add("resid_final", V, 500.0))).save(saved / "mute.json")
    (saved / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert main(["train", str(saved / "recipe.yaml"), "-o", str(saved / "none"), "--edits", str(saved / "no.json")]) == 2
    assert "There is no file of edits" in capsys.readouterr().err and not (saved / "none").exists()
    samples = []
    for name, tap in (("plain", None), ("edited", load_edits(saved / "mute.json").tap)):
        trainer = recipe.trainer(saved / name, progress=False, tap=tap)
        samples.append(trainer.sample(trainer.model))
    assert samples[0] != samples[1] and len(set(samples[1][3:])) <= 2  # one token is all that it says


def test_a_run_from_before_there_were_taps_goes_on(small):
    now = small.trainer(small.model(), steps=4)._settings()
    assert now["tap"] is None
    check_settings({k: checkpoint.plain(v) for k, v in now.items() if k != "tap"}, now)
    with pytest.raises(CheckpointError, match="tap was None and is 'ab'"):
        check_settings({k: checkpoint.plain(v) for k, v in now.items() if k != "tap"}, now | {"tap": "ab"})


def test_errors_are_of_one_family():
    assert issubclass(SiteError, GlassformerError) and issubclass(InputError, GlassformerError)
