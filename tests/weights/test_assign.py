"""Loading is total: what does not fit names both sides and the nearest; what is left over says why that is no harm."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm
from glassformer.weights import assign
from glassformer.weights.family import Family, families
from glassformer.weights.rules import Form, Place, Rule, Transposed
from glassformer.weights.stored import Stored
from weights.made import configured, llama, model, published, rewritten, spec, tensors

LLAMA = "model.layers.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        weights.open(folder).load()
    assert str(folder) in str(caught.value)
    return str(caught.value)


# Total


def test_every_parameter_is_filled_with_what_was_published(folder):
    loaded, report = weights.open(folder).load()
    own = model()
    for (path, x), (other, y) in zip(loaded.named_parameters(), own.named_parameters(), strict=True):
        assert path == other and torch.equal(x, y)
    assert report.used["blocks.1.attn.qkv.weight"] == tuple(f"{LLAMA}.self_attn.{n}_proj.weight" for n in "qkv")
    assert {n for names in report.used.values() for n in names} == tensors(folder).keys() and not report.left and not report.tied
    assert "21 tensors fill 15 parameters" in str(report) and "missing: none" in str(report) and not loaded.training


def test_a_tensor_that_is_missing(folder):
    rewritten(folder, {f"{LLAMA}.mlp.up_proj.weight": None})
    said = refused(folder)
    assert "does not fit the family Llama (1 missing, 1 left over)" in said  # the gate alone belongs nowhere either
    assert f"the parameter 'blocks.1.ffn.gate_up.weight' needs the tensor '{LLAMA}.mlp.up_proj.weight', which is not there." in said
    assert f"And the tensor '{LLAMA}.mlp.gate_proj.weight' is claimed by no parameter." in said


def test_a_tensor_of_another_name_is_the_nearest(folder):
    x = tensors(folder)[f"{LLAMA}.input_layernorm.weight"]
    rewritten(folder, {f"{LLAMA}.input_layernorm.weight": None, f"{LLAMA}.input_norm.weight": x})
    said = refused(folder)
    assert "(1 missing, 1 left over)" in said
    assert f"needs the tensor '{LLAMA}.input_layernorm.weight', which is not there. Did you mean '{LLAMA}.input_norm.weight'?" in said
    assert f"the tensor '{LLAMA}.input_norm.weight' is claimed by no parameter. Did you mean '{LLAMA}.input_layernorm.weight'?" in said


def test_a_tensor_that_is_left_over(folder):
    rewritten(folder, {f"{LLAMA}.self_attn.q_proj.bias": torch.zeros(8)})
    said = refused(folder)
    assert f"(0 missing, 1 left over): the tensor '{LLAMA}.self_attn.q_proj.bias' is claimed by no parameter." in said


@pytest.mark.parametrize(("layers", "words"), [(1, r"\(0 missing, 9 left over\)"), (3, r"\(6 missing, 0 left over\): the parameter 'blocks\.2\.")])
def test_another_number_of_layers(layers, words, folder):
    with pytest.raises(WeightsError, match=words):
        weights.open(configured(folder, num_hidden_layers=layers)).load()


@pytest.mark.parametrize("number", ["01", "1 ", "٣", "-1", "2"])
def test_numbers_that_are_no_layer(number, folder):
    x = tensors(folder)["model.norm.weight"]
    rewritten(folder, {f"model.layers.{number}.input_layernorm.weight": x})
    assert f"the tensor 'model.layers.{number}.input_layernorm.weight' is claimed by no parameter" in refused(folder)


# Shapes


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.norm.weight", (9,), "'model.norm.weight' (9,) would make 'final_norm.weight' of shape (9,), but by its config the model needs (8,)"),
        ("model.norm.weight", (), "'model.norm.weight' () would make 'final_norm.weight' of shape (), but by its config the model needs (8,)"),
        ("lm_head.weight", (8, 13), "'lm_head.weight' (8, 13) would make 'readout.matrix' of shape (8, 13), but by its config the model needs (13, 8)"),
        (f"{LLAMA}.self_attn.k_proj.weight", (4, 9), "cannot become 'blocks.1.attn.qkv.weight' of shape (16, 8)"),
        (f"{LLAMA}.self_attn.k_proj.weight", (8, 8), "of shape (20, 8), but by its config the model needs (16, 8)"),
        (f"{LLAMA}.mlp.down_proj.weight", (8, 12, 1), "of shape (8, 12, 1), but by its config the model needs (8, 12)"),
    ],
)
def test_shapes_that_disagree_are_named_both(name, shape, words, folder):
    rewritten(folder, {name: torch.zeros(shape)})
    said = refused(folder)
    assert words in said and f"'{name}' {shape}" in said


def test_parts_of_the_wrong_size_whose_sum_is_right(folder):
    """Queries as wide as the keys should be: joined, they would pass."""
    at = f"{LLAMA}.self_attn"
    rewritten(folder, {f"{at}.q_proj.weight": torch.zeros(4, 8), f"{at}.k_proj.weight": torch.zeros(8, 8)})
    said = refused(folder)
    assert f"'{at}.q_proj.weight' (4, 8) and '{at}.k_proj.weight' (8, 8) and '{at}.v_proj.weight' (4, 8)" in said
    assert "together have the size of 'blocks.1.attn.qkv.weight', but by its config they must be (8, 8) and (4, 8) and (4, 8)" in said
    assert "config and tensors belong to different models" in said


def test_gpt2_matrices_are_turned(tmp_path):
    """A square matrix would pass either way; one that is not says in which order the checkpoint has it."""
    family = families()["gpt2"]
    rule = next(r for r in family.rules if r.ours.endswith("ffn.up.{w}"))
    assert isinstance(rule.form, Transposed)
    assert rule.form.ours([torch.empty(8, 32, device="meta")], Place(None, "up")).shape == (32, 8)


# Names


def renamed(folder: Path, change: Any) -> Path:
    given = tensors(folder)
    return rewritten(folder, dict.fromkeys(given) | {change(n): x for n, x in given.items()})


def test_files_of_the_bare_stack_lack_the_prefix(folder):
    """Without the read-out, as the reference's bare model writes: the same names without what stands before them all."""
    folder = llama(folder.parent / "tied", tied=True)
    renamed(folder, lambda n: n.removeprefix("model."))
    loaded, report = weights.open(folder).load()
    assert report.used["embed.weight"] == ("embed_tokens.weight",)
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model(tied=True).blocks[1].attn.qkv.weight)


def test_two_names_of_one_tensor(folder):
    rewritten(folder, {"norm.weight": torch.ones(8)})
    said = refused(folder)
    assert "'model.norm.weight' and 'norm.weight' both mean 'model.norm.weight' in the family Llama: nobody can say which is right" in said.replace(
        "'norm.weight' and 'model.norm.weight'", "'model.norm.weight' and 'norm.weight'"
    )
    assert "Remove the one that does not belong there." in said


def test_what_other_programs_put_before_the_names(folder):
    family = replace(families()["llama"], strips=("_orig_mod.", "module."))
    for before in family.strips:
        stored = {before + n: s for n, s in weights.open(folder).tensors.items()}
        made = assign.plan(model(), family, stored, folder)
        assert len(made.fillings) == 15 and made.fillings[0].stored[0].name == "model.embed_tokens.weight"


def test_what_holds_nothing_learnt_is_left_with_a_reason(folder):
    rewritten(folder, {f"{LLAMA}.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    _, report = weights.open(folder).load()
    assert report.left == {f"{LLAMA}.self_attn.rotary_emb.inv_freq": "holds nothing learnt"}
    assert f"left over, holds nothing learnt: {LLAMA}.self_attn.rotary_emb.inv_freq" in str(report)


def test_heads_that_the_model_does_not_have(folder):
    family = replace(families()["llama"], unused=("score.{w}",))
    stored = dict(weights.open(folder).tensors)
    stored["score.weight"] = replace(stored["model.norm.weight"], name="score.weight")
    assert assign.plan(model(), family, stored, folder).left == {"score.weight": "belongs to a head that this model does not have"}


def test_a_fault_of_a_table_is_called_so(folder):
    family = replace(families()["llama"], rules=tuple(r for r in families()["llama"].rules if r.ours != "final_norm.weight"), by_spec=None)
    with pytest.raises(WeightsError, match=r"No rule of the family Llama says where the parameter 'final_norm\.weight' comes from: this is a fault of the"):
        assign.plan(model(), family, weights.open(folder).tensors, folder)
    with pytest.raises(WeightsError, match=r"No rule of the family Llama says what the parameter 'final_norm\.weight' is called there"):
        list(assign.theirs(model(), family))


def test_errors_of_fifty_thousand_names_are_found_among_a_dozen_kinds(folder):
    """Comparing all names with one would take half a minute."""
    stored = dict(weights.open(folder).tensors)
    one = stored["model.norm.weight"]
    names = [f"model.layers.{i}.mlp.experts.{e}.{n}.weight" for i in range(61) for e in range(256) for n in ("gate_projection", "up_projection")]
    stored |= {n: replace(one, name=n) for n in names}
    del stored[f"{LLAMA}.mlp.gate_proj.weight"]
    with pytest.raises(WeightsError, match=rf"'{LLAMA}\.mlp\.gate_proj\.weight', which is not there\. Did you mean .*{LLAMA}"):
        assign.plan(model(), families()["llama"], stored, folder)


def test_a_long_name_makes_no_long_error(folder):
    stored = dict(weights.open(folder).tensors)
    stored["n" * 1_000_000] = replace(stored["model.norm.weight"], name="n" * 1_000_000)
    with pytest.raises(WeightsError, match="is claimed by no parameter") as caught:
        assign.plan(model(), families()["llama"], stored, folder)
    assert len(str(caught.value)) < 1_000


# The model before its memory


def test_more_blocks_than_tensors_are_not_built(folder):
    opened = weights.open(configured(folder, num_hidden_layers=2_000))
    with pytest.raises(WeightsError, match=r"by its config the model has 2000 blocks, but there are 21 tensors in all: they belong to different models"):
        assign.skeleton(opened.spec, opened.tensors, opened.path)


def test_more_experts_than_tensors_and_slices_are_not_built(tmp_path):
    """A config of a few bytes asks for ten layers of 4,096 experts: refused before any is made."""
    stored = as_stored(dict(assign.theirs(mixture().build(), stacking())), tmp_path / "data")  # two layers of three experts, three tensors each
    assert assign.skeleton(mixture(), stored, "made").params().total == mixture().build().params().total
    block = mixture(4096).blocks[0]
    begun = time.process_time()
    with pytest.raises(WeightsError, match=r"made: by its config the model has 40960 experts, but there are no more than 37 tensors and slices of tensors"):
        assign.skeleton(mixture().replace(blocks=(block,) * 10), stored, "made")
    empty = {n: replace(s, shape=(10**9, 0, 4), nbytes=0) for n, s in stored.items()}  # costs its writer nothing
    with pytest.raises(WeightsError, match=r"8192 experts, but there are no more than 19 tensors"):
        assign.skeleton(mixture(4096), empty, "made")
    assert time.process_time() - begun < 2


def test_places_are_those_that_each_parameter_says(folder):
    """Listed once for all parameters, and looked up one by one."""
    for given in (model(), mixture().build(device="meta")):
        place = assign._places(given)
        for path, _ in given.named_parameters():
            assert place(path) == assign.place_of(given, path)


def test_thousands_of_experts_are_planned_in_a_moment(tmp_path):
    """No module is asked for what it lacks, no rule matched twice: 2 x 512 experts take a tenth of a second."""
    stored = as_stored(dict(assign.theirs(mixture(512).build(), stacking())), tmp_path / "data")
    given = mixture(512).build(device="meta")
    begun = time.process_time()
    made = assign.plan(given, stacking(), stored, "made")
    assert time.process_time() - begun < 2 and len(made.fillings) == len(list(given.named_parameters()))


@pytest.mark.parametrize("d", [2**40, 10**12])
def test_a_model_that_no_memory_could_hold(d, folder):
    opened = weights.open(folder)
    enormous = opened.spec.replace(vocab_size=d, d_model=d)
    with pytest.raises(WeightsError, match=r"the model that its config describes cannot be built: .*\d"):
        assign.skeleton(enormous, opened.tensors, folder)
    assert assign.skeleton(opened.spec, opened.tensors, folder).params().total == model().params().total


# Experts, stacked in one tensor

ONE = "blocks.{i}.experts.experts.{e}"


def mixture(n: int = 3) -> Decoder:
    block = Block(Attention(2), Experts(n, 2, Gated(6)), norm=RMSNorm())
    return Decoder(13, 8, (block,) * 2, final_norm=RMSNorm())


def stacking() -> Family:
    rules = (
        Rule("embed.weight", "embed"),
        Rule("final_norm.weight", "norm"),
        Rule("readout.matrix", "head"),
        Rule("blocks.{i}.attn.{name}.weight", "h.{i}.{name}"),
        Rule("blocks.{i}.{name}.weight", "h.{i}.{name}"),
        Rule("blocks.{i}.experts.router.weight", "h.{i}.router"),
        Rule(f"{ONE}.gate_up.weight", "h.{i}.gates", "h.{i}.ups"),
        Rule(f"{ONE}.down.weight", "h.{i}.downs", form=Transposed()),
    )
    return Family("Stacking", ("stacking",), lambda c: None, lambda s: {}, rules)


def as_stored(x: dict[str, torch.Tensor], file: Path) -> dict[str, Stored]:
    found, at = {}, 0
    with file.open("wb") as f:
        for name, t in x.items():
            found[name] = Stored(name, tuple(t.shape), "F32", file, at, 4 * t.numel())
            at += f.write(t.contiguous().numpy().tobytes())
    return found


def test_stacked_experts_go_there_and_back(tmp_path):
    torch.manual_seed(0)
    given = mixture().build()
    written = dict(assign.theirs(given, stacking()))
    assert written["h.1.gates"].shape == (3, 6, 8) and written["h.1.downs"].shape == (3, 6, 8)
    assert torch.equal(written["h.0.downs"][2], given.blocks[0].experts.experts[2].down.weight.mT)
    made = assign.plan(mixture().build(device="meta"), stacking(), as_stored(written, tmp_path / "data"), "made")
    parameters = dict(given.named_parameters())
    assert len(made.fillings) == len(parameters)
    for filling in made.fillings:
        out = torch.empty_like(parameters[filling.path])
        filling.form.fill(out, filling.stored, filling.place)
        assert torch.equal(out, parameters[filling.path]), filling.path


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (4, r"'h\.0\.gates' has shape \(3, 6, 8\), but the model needs its slice 3: the config asks for more experts than there are"),
        (2, r"'h\.0\.gates' has 3 slices, but by its config the model takes 2: some would be left out|router"),
    ],
)
def test_another_number_of_experts(n, words, tmp_path):
    stored = as_stored(dict(assign.theirs(mixture().build(), stacking())), tmp_path / "data")
    stored |= {f"h.{i}.router": replace(stored[f"h.{i}.router"], shape=(n, 8), nbytes=4 * n * 8) for i in range(2)}
    with pytest.raises(WeightsError, match=words):
        assign.plan(mixture(n).build(device="meta"), stacking(), stored, "made")


def test_a_stack_that_is_none(tmp_path):
    stored = as_stored(dict(assign.theirs(mixture().build(), stacking())), tmp_path / "data")
    for shape in ((), (0, 6, 8)):
        broken = stored | {"h.0.gates": replace(stored["h.0.gates"], shape=shape)}
        with pytest.raises(WeightsError, match=r"'h\.0\.gates' has shape .*, but the model needs its slice 0"):
            assign.plan(mixture().build(device="meta"), stacking(), broken, "made")


# A form that reads only


class Doubled(Form):
    def ours(self, theirs, place):
        return theirs[0] * 2

    def theirs(self, ours, place):
        raise WeightsError("read only")


def test_a_form_that_only_reads_is_checked_one_way(folder):
    family = replace(families()["llama"], rules=(Rule("final_norm.weight", "model.norm.weight", form=Doubled()), *families()["llama"].rules))
    made = assign.plan(model(), family, weights.open(folder).tensors, folder)
    filling = next(f for f in made.fillings if f.path == "final_norm.weight")
    out = torch.empty(8)
    filling.form.fill(out, filling.stored, filling.place)
    assert torch.equal(out, 2 * published(model())["model.norm.weight"])


def test_the_spec_may_change_before_loading(folder):
    opened = weights.open(folder)
    opened.spec = opened.spec.at("blocks.0.attention.cap").set(5.0)
    loaded, _ = opened.load()
    assert loaded.spec != spec() and loaded.spec.blocks[0].attention.cap == 5.0
    opened.spec = spec(d=16)
    with pytest.raises(WeightsError, match=r"'model\.embed_tokens\.weight' \(13, 8\) would make 'embed\.weight' of shape \(13, 8\), but .* needs \(13, 16\)"):
        opened.load()
