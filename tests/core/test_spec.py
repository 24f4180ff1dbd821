"""The verbs of Specs: replace, at, set, diff, print, plain data; and what their errors say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import SpecError, did_you_mean
from glassformer.core.mask import Causal, Everything, Mask, Window
from glassformer.core.spec import Spec, _unplain, part, part_named, registered
from glassformer.models import Block, Decoder, Encoder, Transformer
from glassformer.models.presets import preset
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import FeedForward, Gated, Plain
from glassformer.parts.norm import LayerNorm, Norm, RMSNorm
from glassformer.parts.position import ALiBi
from glassformer.parts.rotary import LinearScaling, Rotary

BLOCK = Block(Attention(4, position=Rotary()), Gated(32), norm=RMSNorm(eps=1e-5))
SPEC = Decoder(31, 24, (BLOCK,) * 3)


# Being a value


def test_specs_are_frozen_comparable_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.d_model = 5
    assert Decoder(31, 24, (BLOCK,) * 3) == SPEC and hash(SPEC) == hash(Decoder(31, 24, (BLOCK,) * 3))
    assert SPEC.replace(d_model=32) != SPEC
    assert LayerNorm() != RMSNorm()
    assert len({SPEC, SPEC.replace(), SPEC.replace(tied=True)}) == 2


def test_replace_gives_a_changed_copy():
    other = SPEC.replace(d_model=48, tied=True)
    assert (other.d_model, other.tied, SPEC.d_model, SPEC.tied) == (48, True, 24, False)
    with pytest.raises(SpecError, match=r"Decoder has no field 'd_modle'\. Did you mean 'd_model'\? It has: vocab_size, d_model, blocks, "):
        SPEC.replace(d_modle=3)


# Paths


def test_at_reads_and_changes_deep_inside():
    assert SPEC.at("blocks.*.attention.n_heads").get() == [4, 4, 4]
    assert SPEC.at("blocks.1.norm.eps").get() == [1e-5] == SPEC.at("blocks.-2.norm.eps").get()
    assert SPEC.at("").get() == [SPEC]
    one = SPEC.at("blocks.-1.attention.position").set(ALiBi())
    assert [type(b.attention.position) for b in one.blocks] == [Rotary, Rotary, ALiBi]
    all_ = SPEC.at("blocks.*.attention.position").set(ALiBi())
    assert {b.attention.position for b in all_.blocks} == {ALiBi()}
    wider = SPEC.at("blocks.*.feedforward.d_ff").update(lambda n: 2 * n)
    assert wider.at("blocks.*.feedforward.d_ff").get() == [64] * 3 and SPEC.blocks[0].feedforward.d_ff == 32
    assert SPEC.at("blocks").update(lambda b: b[:1]).blocks == (BLOCK,)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("block.0", r"Decoder \(at the top\) has no field 'block'\. Did you mean 'blocks'"),
        ("blocks.3.norm", r"blocks has 3 items, so index 3 is outside it\."),
        ("blocks.-4.norm", r"blocks has 3 items, so index -4 is outside it\."),
        ("blocks.attention", r"blocks is a tuple of 3 items: go on with an index or '\*', not 'attention'\."),
        ("blocks.-.norm", r"blocks is a tuple of 3 items: go on with an index"),
        ("blocks.0.atention", r"Block \(at blocks\.0\) has no field 'atention'\. Did you mean 'attention'\?"),
        ("d_model.x", r"d_model is 24, which has nothing inside: the path cannot go on with 'x'\."),
        ("position.base", r"NoPosition \(at position\) has no field 'base'\. It has: none\."),
    ],
)
def test_a_path_that_leads_nowhere_says_so(path, said):
    with pytest.raises(SpecError, match=said):
        SPEC.at(path).get()
    with pytest.raises(SpecError, match=said):
        SPEC.at(path).set(1)


def test_an_edit_that_cannot_be_built_is_refused_where_it_is_made():
    with pytest.raises(SpecError, match="n_heads=4 and n_kv_heads=3"):
        SPEC.at("blocks.*.attention.n_kv_heads").set(3)


# Differences


def test_diff_names_each_difference_once():
    other = SPEC.at("blocks.*.attention.position").set(ALiBi()).replace(tied=True)
    assert other.diff(SPEC) == "blocks.0-2.attention.position: Rotary() -> ALiBi()\ntied: False -> True"
    assert SPEC.diff(SPEC) == ""
    assert SPEC.at("blocks.1.norm.eps").set(0.1).diff(SPEC) == "blocks.1.norm.eps: 1e-05 -> 0.1"
    mixed = SPEC.at("blocks.0.norm.eps").set(0.1).at("blocks.2.norm.eps").set(0.1)
    assert mixed.diff(SPEC) == "blocks.0,2.norm.eps: 1e-05 -> 0.1"
    assert Encoder(31, 24, (BLOCK,) * 3).diff(SPEC).startswith(": Decoder(")
    fewer = SPEC.replace(blocks=(BLOCK,)).diff(SPEC)
    assert fewer.startswith("blocks: (Block(") and " * 3 -> (Block(" in fewer.replace("...", " * 3 ")


# Printing


def test_repr_leaves_defaults_out_and_counts_equal_neighbours():
    assert repr(RMSNorm()) == "RMSNorm()" and repr(RMSNorm(eps=1e-5)) == "RMSNorm(eps=1e-05)"
    assert repr(Attention(4, mask=Causal() & Window(3))) == "Attention(n_heads=4, mask=And(terms=(Causal(),) + (Window(size=3),)))"
    assert repr(SPEC) == (
        "Decoder(vocab_size=31, d_model=24, blocks=(Block(attention=Attention(n_heads=4, position=Rotary()), "
        "feedforward=Gated(d_ff=32), norm=RMSNorm(eps=1e-05)),) * 3)"
    )


def test_print_draws_a_tree():
    text = str(SPEC)
    assert text.startswith("Decoder\n  vocab_size: 31\n  d_model: 24\n  blocks: 3 x Block\n    attention: Attention\n      n_heads: 4\n")
    assert "    feedforward: Gated(d_ff=32)\n    norm: RMSNorm(eps=1e-05)\n" in text
    assert str(SPEC.at("blocks.1.norm.eps").set(1.0)).count(" x Block") == 3
    assert str(RMSNorm()) == "RMSNorm\n  eps: 1e-06\n  offset: 0.0\n  cast: 'early'"


# Plain data


def test_plain_data_folds_runs_and_names_types():
    data = SPEC.to_dict()
    assert (
        data["type"] == "Decoder"
        and data["blocks"][0]["repeat"] == 3
        and data["blocks"][0]["of"]["norm"]
        == {
            "type": "RMSNorm",
            "eps": 1e-5,
            "offset": 0.0,
            "cast": "early",
        }
    )
    assert Transformer.from_dict(data) == SPEC
    local = BLOCK.at("attention.mask").set(Window(4))
    mixed = SPEC.replace(blocks=((local,) * 5 + (BLOCK,)) * 2)
    assert [b.get("repeat") for b in mixed.to_dict()["blocks"]] == [5, None, 5, None]
    assert Decoder.from_dict(mixed.to_dict()) == mixed


def test_plain_data_may_be_short():
    assert Norm.from_dict("LayerNorm") == LayerNorm()
    assert RMSNorm.from_dict({}) == RMSNorm()
    assert FeedForward.from_dict({"type": "Gated", "d_ff": 8}) == Gated(8)
    assert Attention.from_dict({"n_heads": 4, "position": "ALiBi", "mask": {"type": "Window", "size": 3}}) == Attention(4, position=ALiBi(), mask=Window(3))
    assert Norm.from_dict(LayerNorm()) == LayerNorm()


def test_numbers_of_yaml_become_what_the_field_needs():
    assert RMSNorm.from_dict({"eps": "1e-5"}) == RMSNorm(eps=1e-5)  # YAML 1.1 reads 1e-5 as a string
    made = RMSNorm.from_dict({"eps": 1})
    assert made.eps == 1.0 and type(made.eps) is float
    assert Attention.from_dict({"n_heads": 4, "cap": 5}).cap == 5.0
    assert Attention.from_dict({"n_heads": 4, "cap": None}).cap is None


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (Norm, "LayerNrm", r"No part of kind Norm is named 'LayerNrm'\. Did you mean 'LayerNorm'\? Known: DynamicTanh, Joint, LayerNorm, NoNorm, RMSNorm\."),
        (Norm, "Gated", r"No part of kind Norm is named 'Gated'\."),
        (Norm, {"type": "RMSNorm", "epsilon": 1}, r"Norm: RMSNorm has no field 'epsilon'\..* It has: eps, offset, cast\."),
        (Norm, {"type": "RMSNorm", "eps": "small"}, r"Norm\.eps is a number, but 'small' was given\."),
        (Norm, {"type": "RMSNorm", "eps": True}, r"Norm\.eps is a number, but True was given\."),
        (Norm, 3, r"Norm is a Norm \(a name, or fields with a 'type'\), but 3 was given\."),
        (FeedForward, "Gated", r"FeedForward: Gated needs d_ff\."),
        (FeedForward, {"type": "Gated", "d_ff": 1.5}, r"FeedForward\.d_ff is a whole number, but 1\.5 was given\."),
        (FeedForward, {"type": "Gated", "d_ff": True}, r"FeedForward\.d_ff is a whole number, but True was given\."),
        (FeedForward, {"type": "Plain", "d_ff": 8, "act": "jelu"}, r"No activation is named 'jelu'\. Did you mean 'relu', 'gelu'"),
        (Decoder, {"vocab_size": 3, "d_model": 4, "blocks": 5}, r"Decoder\.blocks is a list, but 5 was given\."),
        (Decoder, {"vocab_size": 3, "d_model": 4, "blocks": [{"attention": {"n_head": 3}}]}, r"Decoder\.blocks\.0\.attention: Attention has no field 'n_head'"),
        (Decoder, {"vocab_size": 3, "d_model": 4, "tied": "yes", "blocks": []}, r"Decoder\.tied is True or False, but 'yes' was given\."),
        (Attention, {"n_heads": 4, "cap": "high"}, r"Attention\.cap is a number, but 'high' was given\."),
    ],
)
def test_plain_data_that_cannot_be_read_says_where(kind, data, said):
    with pytest.raises(SpecError, match=said):
        kind.from_dict(data)


leaves = st.sampled_from([LayerNorm(), LayerNorm(eps=0.1, bias=False), RMSNorm(), RMSNorm(offset=1.0, cast="late")])
positions = st.one_of(st.just(ALiBi()), st.builds(Rotary, base=st.floats(10, 1e6), scaling=st.builds(LinearScaling, st.floats(1, 64))))
masks: st.SearchStrategy[Mask] = st.recursive(
    st.one_of(st.just(Causal()), st.just(Everything()), st.builds(Window, st.integers(1, 9))),
    lambda m: st.one_of(st.builds(lambda a, b: a & b, m, m), st.builds(lambda a, b: a | b, m, m), st.builds(lambda a: ~a, m)),
    max_leaves=4,
)
blocks = st.builds(
    Block,
    attention=st.builds(Attention, st.sampled_from([2, 4]), position=positions, mask=masks, cap=st.one_of(st.none(), st.floats(1, 50))),
    feedforward=st.one_of(st.builds(Gated, st.integers(1, 64)), st.builds(Plain, st.integers(1, 64), bias=st.booleans())),
    norm=leaves,
)


@settings(max_examples=40, deadline=None)
@given(st.builds(Decoder, st.integers(1, 99), st.just(8), st.lists(blocks, max_size=4).map(tuple), final_norm=leaves, tied=st.booleans()))
def test_any_spec_survives_plain_data_and_its_own_repr(spec):
    assert Transformer.from_dict(spec.to_dict()) == spec
    assert eval(repr(spec), dict(registered())) == spec
    assert spec.diff(spec) == "" and str(spec)


# The registry


def test_the_registry_lists_by_kind():
    assert list(registered(Norm)) == ["DynamicTanh", "Joint", "LayerNorm", "NoNorm", "RMSNorm"]
    assert part_named("LayerNorm") is LayerNorm and set(registered(Norm)) < set(registered())
    with pytest.raises(SpecError, match=r"No part is named 'Laier'"):
        part_named("Laier")


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(SpecError, match=r"A part named 'LayerNorm' is already registered by glassformer\.parts\.norm; choose another name for the one in "):
        part(type("LayerNorm", (Spec,), {"__module__": __name__, "__qualname__": "LayerNorm"}))
    assert part_named("LayerNorm") is LayerNorm


def test_presets_print_and_diff():
    assert preset("llama3.1-8b").diff(preset("llama3-8b")) == "blocks.0-31.attention.position.scaling: Unscaled() -> Llama3Scaling()"
    assert "blocks: 12 x Block" in str(preset("gpt2"))


def test_did_you_mean():
    assert did_you_mean("attension", ["attention", "norm"]) == " Did you mean 'attention'?"
    assert did_you_mean("zzz", ["attention", "norm"]) == ""


def test_a_fresh_process_knows_every_part_at_the_door():
    for asked in ('assert "RMSNorm" in gf.registered() and "NextToken" in gf.registered()', 'assert gf.Spec.from_dict({"type": "RMSNorm"}).eps == 1e-6'):
        subprocess.run([sys.executable, "-c", f"import glassformer as gf; {asked}"], check=True)


def test_tuples_of_fixed_and_of_any_length():
    def read(betas):
        return _unplain(betas, tuple[float, float], "betas")

    assert read([0.9, 1]) == (0.9, 1.0) == read((0.9, 1.0)) and read([{"repeat": 2, "of": 0.5}]) == (0.5, 0.5)
    for wrong, n in (([0.9, 0.95, 0.99], 3), ([0.9], 1), ([{"repeat": 3, "of": 0.5}], 3)):
        with pytest.raises(SpecError, match=rf"betas has 2 items, but .* has {n}\."):
            read(wrong)
    assert _unplain([{"repeat": 2, "of": 1}, 3], tuple[int, ...], "many") == (1, 1, 3)
    for times in ("many", True, -1, 1.5):
        with pytest.raises(SpecError, match=r"many: 'repeat' is a whole number of times, but .* was given\."):
            _unplain([{"repeat": times, "of": 1}], tuple[int, ...], "many")
