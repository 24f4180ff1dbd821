"""config.json: every field is read, harmless, or an error that names it; rotary positions go there and back."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.parts.rotary import DynamicNTKScaling, LinearScaling, Llama3Scaling, LongRope, NTKScaling, Rotary, Unscaled, YaRNScaling
from glassformer.weights import assign
from glassformer.weights.config import Config, context_config, magnitude, rotary, rotary_config
from glassformer.weights.family import families, family_of
from weights.made import CONFIG, llama, spec


def opened(tmp_path, **changes: Any) -> Any:
    return weights.open(llama(tmp_path / "model", **changes))


# Fields


def test_the_config_is_read_as_the_spec(tmp_path):
    found = opened(tmp_path)
    assert found.spec == spec()
    assert found.config["hidden_size"] == 8 and found.kind == "hf" and "Llama, Hugging Face folder, 21 tensors" in repr(found)


REQUIRED = ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_field_that_is_missing_is_named(key, tmp_path):
    with pytest.raises(WeightsError, match=rf"config\.json lacks '{key}', without which the model cannot be built"):
        opened(tmp_path, **{key: None})


def test_a_field_that_is_missing_and_one_like_it(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json lacks 'hidden_size'.* Did you mean 'hiddensize'"):
        opened(tmp_path, hidden_size=None, hiddensize=8)


WRONG = ["32", -1, 0, 1e9, 8.0, True, [8], {"a": 1}, [[[[[[8]]]]]], "x" * 1_000_000]


@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("key", [*REQUIRED, "num_key_value_heads", "head_dim"])
def test_a_field_that_is_no_whole_number_is_named_with_its_value(key, value, tmp_path):
    with pytest.raises(WeightsError, match=rf"config\.json: {key} is .*, but a whole number above 0 is needed") as caught:
        opened(tmp_path, **{key: value})
    said = str(caught.value)
    assert str(tmp_path) in said and len(said) < 600
    if len(repr(value)) < 20 and not isinstance(value, list):
        assert f"{key} is {value!r}" in said


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [10**9, 10**12, 10**13, 2**63, 10**100])
def test_enormous_sizes_are_an_error_and_no_allocation(key, value, tmp_path):
    folder = llama(tmp_path / "model", **{key: value})
    tracemalloc.start()
    with pytest.raises(WeightsError, match=r"config\.json|by its config the model needs|describes no Llama that can be built"):
        weights.open(folder).load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20  # and what torch was asked for, it was asked for without memory: 10^12 rows of 8 would have failed otherwise


def test_a_vocabulary_that_is_not_the_tensors(tmp_path):
    with pytest.raises(
        WeightsError, match=r"'model\.embed_tokens\.weight' \(13, 8\) would make 'embed\.weight' of shape \(13, 8\).*needs \(1000000000000, 8\)"
    ):
        opened(tmp_path, vocab_size=10**12).load()


@pytest.mark.parametrize("n", [2_001, 10**9, 10**100])
def test_more_layers_than_any_model_has(n, tmp_path):
    with pytest.raises(WeightsError, match=r"num_hidden_layers is 1?.*, but no model has more than 2,000: fetch the file again"):
        opened(tmp_path, num_hidden_layers=n)


def test_heads_that_do_not_divide(tmp_path):
    for changes in ({"num_attention_heads": 3, "num_key_value_heads": 2}, {"num_attention_heads": 2, "num_key_value_heads": 4}):
        with pytest.raises(WeightsError, match=r"config\.json describes no Llama that can be built: .*\d"):
            opened(tmp_path / str(changes), **changes).load()
    with pytest.raises(WeightsError, match=r"the model that its config describes cannot be built: Rotary turns pairs, but .* of d_head 3 is 3 features"):
        opened(tmp_path / "odd", head_dim=3).load()


@pytest.mark.parametrize("value", ["nan", "eps", [1], {}, None])
def test_an_epsilon_that_is_no_number(value, tmp_path):
    if value is None:
        assert opened(tmp_path, rms_norm_eps=None).spec.final_norm.eps == 1e-6
        return
    with pytest.raises(WeightsError, match=r"config\.json"):
        opened(tmp_path, rms_norm_eps=value)


def test_a_field_that_nobody_knows_is_an_error_that_says_how_to_go_on(tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"config\.json: logit_softcap is 30\.0, which is not understood here and might change what the model computes\. "
        r"If it does not, open the model with ignore=\['logit_softcap'\]",
    ):
        opened(tmp_path, logit_softcap=30.0)
    with pytest.raises(WeightsError, match=r"scale_all is 2 \(and 1 more: twist\).*ignore=\['scale_all', 'twist'\]"):
        opened(tmp_path, scale_all=2, twist=[1])
    assert weights.open(llama(tmp_path / "model", scale_all=2, twist=[1]), ignore=["scale_all", "twist"]).spec == spec()
    assert opened(tmp_path, nothing=[], at_all={}).spec == spec()


def test_fields_of_training_and_generation_are_no_matter(tmp_path):
    harmless = {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [1, 2], "attention_dropout": 0.1, "use_cache": True, "transformers_version": "9"}
    assert opened(tmp_path, **harmless).spec == spec()


def test_a_thousand_unknown_fields_make_no_long_error(tmp_path):
    with pytest.raises(WeightsError, match="999 more") as caught:
        opened(tmp_path, **{f"unknown_{i}": 1 for i in range(1_000)})
    assert len(str(caught.value)) < 2_000


def test_an_activation_that_is_not_known(tmp_path):
    with pytest.raises(WeightsError, match=r"hidden_act is 'mish9', which is no activation known here: silu"):
        opened(tmp_path, hidden_act="mish9")


def test_the_reader_itself():
    c = Config({"a": 3, "b": None, "t": {"x": 1}, "f": 2.5, "n": math.nan}, "the file")
    assert c("a") == 3 and c("b", 7) == 7 and c("c", 8) == 8 and c("b") is None and c.whole("c", 5) == 5 and c.whole("a") == 3
    assert c.nullable("b", 4) is None and c.nullable("c", 4) == 4
    assert c.number("f") == 2.5 and c.number("a") == 3.0
    assert c.only("a", 3, 4) == 3 and c.only("c", "x") == "x" and c.only("c", "x", "y", default="y") == "y"
    with pytest.raises(WeightsError, match="the file: a is 3, but only 4 or 5 is supported: this model computes something that would be left out"):
        c.only("a", 4, 5)
    assert c.flag("c", True) is True and c.flag("b", False) is False
    for key in ("n", "t"):
        with pytest.raises(WeightsError, match=rf"the file: {key} is .*, but a finite number is needed"):
            c.number(key)
    with pytest.raises(WeightsError, match="the file: a is 3, but a table of fields is needed"):
        c.inner("a")
    inner = c.inner("t")
    with pytest.raises(WeightsError, match="the file, t: x is 1, which is not understood"):
        inner.finish()
    assert inner("x") == 1
    inner.finish()
    c.ignore("t")
    c.finish()
    c.defaults(a=9, z=10)
    assert c("a") == 3 and c("z") == 10


@pytest.mark.parametrize(("value", "said"), [(True, True), (False, False), (1, True), (0, False)])
def test_a_switch_is_true_or_false(value, said):
    assert Config({"a": value}).flag("a") is said


SWITCHES = [("llama", "attention_bias"), ("llama", "mlp_bias"), ("llama", "tie_word_embeddings"), ("gpt2", "tie_word_embeddings")]


@pytest.mark.parametrize("value", ["false", "true", 2, 1.0, [], {"a": 1}], ids=repr)
@pytest.mark.parametrize(("kind", "key"), SWITCHES)
def test_a_text_is_no_switch(kind, key, value):
    """``"false"`` is true where it is only asked whether there is something."""
    usual = {"n_embd": 8, "n_head": 2, "n_layer": 1}
    with pytest.raises(WeightsError, match=rf"config\.json: {key} is .*, but true or false is needed") as caught:
        families()[kind].read(CONFIG | usual | {"model_type": kind, key: value})
    assert f"{key} is {value!r}" in str(caught.value)


# Families


def test_no_family_and_a_family_that_nobody_knows(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json names no model_type, so the family of the model is unknown\. Known: .*llama"):
        opened(tmp_path, model_type=None)
    with pytest.raises(WeightsError, match=r"the model type 'llamma' is not supported\. Did you mean .*'llama'.* Known: .*gpt2") as caught:
        opened(tmp_path, model_type="llamma")
    assert "By its fields it is nearest to" in str(caught.value)


@pytest.mark.parametrize("kind", [3, ["llama"], {}, "x" * 1_000_000, ""])
def test_model_types_that_are_none(kind, tmp_path):
    with pytest.raises(WeightsError, match=r"is not supported|names no model_type") as caught:
        opened(tmp_path, model_type=kind)
    assert len(str(caught.value)) < 5_000


def test_every_model_type_finds_its_family():
    for kind, family in families().items():
        assert family_of({"model_type": kind}, "config.json") is family and kind in family.model_types


# Rotary positions

SCALINGS = {
    "none": Unscaled(),
    "linear": LinearScaling(2.5),
    "dynamic": DynamicNTKScaling(2.0, 64),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 8_192),
    "yarn": YaRNScaling(4.0, 32),
    "yarn-all": YaRNScaling(4.0, 32, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False),
    "longrope": LongRope((1.0, 1.5), (2.0, 3.0), 32, 4.0),
    "longrope-factor": LongRope((1.0, 1.5), (2.0, 3.0), 32, 4.0, 1.25),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_positions_go_there_and_back(name, fraction):
    encoding = Rotary(base=500.0, fraction=fraction, scaling=SCALINGS[name])
    values = json.loads(json.dumps({"rope_parameters": rotary_config(encoding)} | context_config(encoding)))
    c = Config(values)
    assert rotary(c) == encoding
    c.finish()
    assert rotary(Config(values), layout="interleaved") == encoding.replace(layout="interleaved")


def test_older_spellings():
    old = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}}
    assert rotary(Config(old)) == Rotary(base=500.0, fraction=0.5, scaling=LinearScaling(2.0))
    assert rotary(Config({})) == Rotary(base=10_000.0) and rotary(Config({"rope_scaling": None}), base=7.0, fraction=0.25) == Rotary(base=7.0, fraction=0.25)
    kinds = {"rope_parameters": {"full": {"rope_theta": 5.0}, "sliding": {"rope_theta": 6.0}}}
    assert rotary(Config(kinds), kind="full").base == 5.0 and rotary(Config(kinds), kind="sliding").base == 6.0


def test_the_stretch_follows_from_two_contexts_where_no_factor_is_said():
    c = Config({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}})
    assert rotary(c).scaling == YaRNScaling(4.0, 16)
    ratio = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
    assert rotary(Config({"rope_parameters": ratio})).scaling.attention_factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert magnitude(1.0) == 1.0 and magnitude(math.e, 2.0) == pytest.approx(1.2)


ROTARY_ERRORS: dict[str, tuple[Any, str]] = {
    "text": ("yes", r"rope_parameters is 'yes', but a table of fields is needed"),
    "number": (3, r"rope_parameters is 3, but a table of fields is needed"),
    "unknown": ({"rope_type": "spiral"}, r"config\.json, rope_parameters: rope_type is 'spiral', which is not supported\. Known: default, linear"),
    "list": ({"rope_type": ["linear"]}, r"rope_type is \['linear'\], which is not supported"),
    "no-factor": ({"rope_type": "linear"}, r"rope_parameters lacks 'factor'"),
    "text-factor": ({"rope_type": "linear", "factor": "2"}, r"rope_parameters: factor is '2', but a finite number is needed"),
    "nan": ({"rope_theta": math.nan}, r"rope_parameters: rope_theta is nan, but a finite number is needed"),
    "null": ({"rope_type": "linear", "factor": None}, r"factor is None, but a finite number is needed"),
    "infinite": ({"rope_type": "yarn", "factor": math.inf}, r"factor is inf, but a finite number is needed"),
    "left": ({"rope_theta": 5.0, "twist": 2}, r"config\.json, rope_parameters: twist is 2, which is not understood here"),
    "base": ({"rope_theta": -1.0}, r"config\.json describes no Llama that can be built|rope_theta is -1"),
    "fraction": ({"partial_rotary_factor": 7.0}, r"config\.json describes no Llama that can be built|needs"),
    "contexts": ({"rope_type": "yarn", "original_max_position_embeddings": 0}, r"config\.json"),
    "longrope": ({"rope_type": "longrope", "factor": 2, "short_factor": "ab", "long_factor": 3, "original_max_position_embeddings": 4}, r"config\.json"),
}


@pytest.mark.parametrize("case", ROTARY_ERRORS)
def test_rotary_errors(case, tmp_path):
    value, words = ROTARY_ERRORS[case]
    with pytest.raises(WeightsError, match=words):
        opened(tmp_path, rope_parameters=value).load()


def test_an_encoding_that_has_no_name_there():
    with pytest.raises(WeightsError, match=r"NTKScaling has no name in a config\.json, so this model cannot be written in that format"):
        rotary_config(Rotary(scaling=NTKScaling(2.0)))


# Whatever stands there

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**40, -1, 2**63, 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*CONFIG, "rope_scaling", "rope_theta", "layer_types", "sliding_window", "attention_bias", "mlp_bias", "hidden_act"]), value=JSON)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_value_of_any_field_is_read_or_refused(kind, key, value):
    """Also the build: what a config describes is built (without memory), or refused with its file named."""
    values = CONFIG | {"model_type": kind, key: value}
    try:
        family = family_of(values, "config.json")
        spec = family.read(values, "config.json")
        assert len(assign.skeleton(spec, dict.fromkeys(map(str, range(40))), "config.json").blocks) == len(spec.blocks)
    except WeightsError as error:
        said = str(error)
    else:
        said = "config.json"
    assert "config.json" in said and len(said) < 5_000
