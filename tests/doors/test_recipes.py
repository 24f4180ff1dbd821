"""Recipes: every one that comes with the package parses, builds and survives being written down."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import torch
import yaml

import glassformer as gf
from glassformer.cli.recipe import built_in, override, read_recipe
from glassformer.train.recipe import built_in_texts, find_text, prompt_for

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the car is red and the sky is blue\n" * 20


def small() -> gf.Recipe:
    """A recipe of a few milliseconds a step."""
    block = gf.Block(attention=gf.Attention(n_heads=2, position=gf.Rotary()), feedforward=gf.Plain(d_ff=16), norm=gf.RMSNorm())
    return gf.Recipe(gf.Decoder(vocab_size=7, d_model=8, blocks=(block,)), steps=4, batch=2, context=16, evaluate_windows=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", built_in())
def test_built_in_recipes_parse_build_and_round_trip(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.model.build(device="meta").params().total > 0
    assert all(find_text(text).exists() for text in recipe.texts)
    assert gf.Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_the_documented_recipes_are_there() -> None:
    assert {"shakespeare_char", "shakespeare_quick"} <= set(built_in())


def test_the_shipped_text_is_tiny_shakespeare_with_its_note() -> None:
    folder = built_in_texts()["tinyshakespeare"]
    text = lzma.decompress((folder / "input.txt.xz").read_bytes()).decode()
    assert len(text) == 1_115_394
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert "public domain" in (folder / "LICENCE-NOTE").read_text()


def test_a_python_recipe_and_the_same_in_yaml_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import glassformer as gf\ndef recipe():\n    return gf.Recipe(gf.preset('tiny'), steps=3, optimizer=gf.Muon(lr=1e-3), data=('a', 'b'))\n"
    )
    (tmp_path / "b.yaml").write_text("model: tiny\nsteps: 3\noptimizer: {type: Muon, lr: 1e-3}\ndata: [a, b]\n")
    assert read_recipe(str(tmp_path / "a.py")) == read_recipe(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("batch=5", "batch", [5]),
        ("optimizer.lr=3e-4", "optimizer.lr", [3e-4]),
        ("steps=null", "steps", [None]),
        ("data=[a.txt, b]", "data", [("a.txt", "b")]),
        ("data=a.txt", "data", ["a.txt"]),
        ("compile=false", "compile", [False]),
        ("schedule={type: WSD, decay: 0.5}", "schedule", [gf.WSD(decay=0.5)]),
        ("model.blocks.*.attention.position=ALiBi", "model.blocks.*.attention.position", [gf.ALiBi()] * 4),
        ("model.blocks.1.norm=LayerNorm", "model.blocks.*.norm", [gf.RMSNorm(), gf.LayerNorm(), gf.RMSNorm(), gf.RMSNorm()]),
        ("model.blocks.0.attention.n_heads=2", "model.blocks.*.attention.n_heads", [2, 4, 4, 4]),
        ("model=gpt2", "model.d_model", [768]),
    ],
)
def test_set_reads_a_value_as_the_type_of_its_field(text: str, path: str, expected: list[object]) -> None:
    recipe = override(read_recipe("shakespeare_quick"), ["seconds=1", text])
    assert recipe.at(path).get() == expected


def test_later_sets_see_earlier_ones() -> None:
    assert override(small(), ["optimizer=Muon", "optimizer.momentum=0.5"]).optimizer == gf.Muon(momentum=0.5)


def test_a_run_keeps_the_recipe_that_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    recipe = small().replace(data="text.txt", sample="the ")
    first = recipe.trainer("one")
    last = first.run()
    again = read_recipe("one/recipe.yaml")
    assert again.data == (str(tmp_path / "text.txt"),)  # so that it can be repeated from anywhere
    assert again.replace(data="text.txt") == recipe
    monkeypatch.chdir("/")
    second = again.trainer(tmp_path / "two").run()
    assert last is not None
    assert second is not None
    assert (last.loss, last.validation, last.sample) == (second.loss, second.validation, second.sample)
    assert str(last.sample).startswith("the ")


def test_the_vocabulary_of_the_model_follows_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    trainer = small().replace(data=str(tmp_path / "text.txt")).trainer(tmp_path / "run")
    assert trainer.model.spec.vocab_size == len(set(TEXT)) != small().model.vocab_size


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    gf.text.train("words", texts=[TEXT]).save(tmp_path / "tokenizer.json")
    data = small().replace(data=str(tmp_path / "text.txt"), tokenizer=gf.LoadTokenizer(str(tmp_path / "tokenizer.json"))).prepare(tmp_path / "shards")
    assert data.vocab_size == gf.Tokenizer.load(tmp_path / "tokenizer.json").vocab_size
    with pytest.raises(gf.TokenizerError, match=r"There is no tokenizer at 'nowhere.json': give a tokenizer.json"):
        gf.LoadTokenizer("nowhere.json").make(list)


def test_a_left_over_tokenizer_does_not_win_over_the_one_asked_for(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = small().replace(data=str(tmp_path / "text.txt"))
    first = recipe.prepare(tmp_path / "run/data")
    words = recipe.replace(tokenizer=gf.TrainTokenizer("words"))
    trainer = words.trainer(tmp_path / "run")  # no run was begun with those shards: they are made again
    assert trainer.tokenizer.hash != first.tokenizer_hash
    trainer.run()
    with pytest.raises(
        gf.CheckpointError,
        match=r"run was begun with another text or tokenizer than .*text\.txt and TrainTokenizer\(.*\): go on with what it has",
    ):
        recipe.trainer(tmp_path / "run", resume=True)
    assert words.trainer(tmp_path / "run", resume=True).finished


def test_a_left_over_text_does_not_win_over_the_one_asked_for(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "two.txt").write_text(TEXT.upper())
    (tmp_path / "none.txt").write_text("")
    one, two = (small().replace(data=str(tmp_path / name)) for name in ("one.txt", "two.txt"))
    first = one.prepare(tmp_path / "run/data")
    (tmp_path / "run/data/notes.md").write_text("mine")
    with pytest.raises(gf.DataError, match="already holds shards of another text or tokenizer: choose another folder"):
        two.prepare(tmp_path / "run/data")
    with pytest.raises(gf.GlassformerError, match="empty"):
        two.replace(data=str(tmp_path / "none.txt")).trainer(tmp_path / "run")
    assert (tmp_path / "run/data/notes.md").exists()  # nothing goes before what takes its place is there
    trainer = two.trainer(tmp_path / "run")  # no run was begun with that text: shards and tokenizer are made again
    assert trainer.tokenizer.hash != first.tokenizer_hash
    trainer.run()
    with pytest.raises(
        gf.CheckpointError, match=r"The run in .*run was begun with another text or tokenizer than .*one\.txt and .*: go on with what it has, or start in a new"
    ):
        one.trainer(tmp_path / "run", resume=True)
    assert two.trainer(tmp_path / "run", resume=True).finished


def test_the_validation_part_is_the_end_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    trainer = small().replace(data=str(tmp_path / "text.txt"), validation=0.25).trainer(tmp_path / "run")
    assert len(trainer.validation) == round(len(TEXT) * 0.25)
    without = small().replace(data=str(tmp_path / "text.txt"), validation=0.0).trainer(tmp_path / "other")
    assert without.validation is None


def test_a_recipe_says_how_often_to_save_and_to_write_samples(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = small().replace(data=str(tmp_path / "text.txt"), steps=6, sample="a", sample_every=2, save_every=3, keep=5, tensorboard=False)
    samples = [step.number for step in recipe.trainer(tmp_path / "run") if step.sample is not None]
    assert samples == [2, 4, 6]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000000", "step-00000003", "step-00000006"]
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_sample_prompt_that_the_text_does_not_know_is_replaced_and_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = small().replace(data=str(tmp_path / "text.txt"), steps=4, sample="Ωmega", sample_every=2)
    trainer = recipe.trainer(tmp_path / "run")
    own = prompt_for(None, trainer.data)
    assert own and TEXT.strip().startswith(own)
    assert any(f"'Ωmega' has what this text has not; samples begin with the text's own {own!r}" in note for note in trainer.notes)
    samples = [step.sample for step in trainer if step.sample is not None]
    assert len(samples) == 2 and all(s.startswith(own) for s in samples)
    assert prompt_for("Ωmega", trainer.data) == own
    assert prompt_for(own[:1], trainer.data) == own[:1]


def test_impossible_recipes_are_refused() -> None:
    with pytest.raises(gf.SpecError, match=r"A recipe needs a budget: steps=2000, seconds=100, or both"):
        small().replace(steps=None)
    with pytest.raises(gf.SpecError, match=r"A budget is above zero; steps=0 and seconds=None were given"):
        small().replace(steps=0)
    with pytest.raises(gf.SpecError, match=r"A budget is above zero; steps=4 and seconds=nan were given"):
        small().replace(seconds=float("nan"))
    with pytest.raises(gf.SpecError, match=r"validation is a share of the text, from 0 up to but not including 1; 1.5 was given"):
        small().replace(validation=1.5)
    with pytest.raises(gf.DataError, match=r"There is no file or folder 'tinyshakespear'\. Did you mean 'tinyshakespeare'"):
        find_text("tinyshakespear")


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = small().replace(data=str(tmp_path / "text.txt"))
    recipe.trainer(tmp_path / "run").run()
    with pytest.raises(gf.CheckpointError, match=r"already holds a run: go on with it \(--resume\) or choose another folder"):
        recipe.trainer(tmp_path / "run")
    with pytest.raises(gf.CheckpointError, match=r"There is no run to resume in .*: check the folder, or leave out --resume"):
        recipe.trainer(tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()
