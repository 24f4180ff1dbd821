"""What must hold for every registered part, and that none is forgotten."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from glassformer.core.spec import Spec, registered
from glassformer.models import Block, Decoder
from glassformer.models.init import Declared, Fill, Init, Normal, ResidualNormal, Rule
from glassformer.models.presets import names, preset
from glassformer.parts.attention import Attention
from glassformer.weights import own
from shapes import check_shapes
from tools import ALL, VOCAB, D, built, call, each, fresh, same, tokens

# Parts that a variant can only hold implicitly: the model's own mask, the product of `&`, an initialisation by hand.
IMPLICIT = {"And"}


def parts_of(value: Any) -> set[str]:
    """The names of all Specs inside a Spec."""
    if isinstance(value, tuple):
        return {n for v in value for n in parts_of(v)}
    if not isinstance(value, Spec):
        return set()
    return {type(value).__name__} | {n for f in dataclasses.fields(value) for n in parts_of(getattr(value, f.name))}


def test_every_registered_part_is_in_a_variant():
    known = {n for n, c in registered().items() if c.__module__.startswith(("glassformer.core", "glassformer.parts", "glassformer.models"))}
    used = {n for spec in ALL.values() for n in parts_of(spec)} | {"States"}  # what an encoder-decoder's encoder ends in
    assert known - used - IMPLICIT == set()


@each(ALL)
def test_a_variant_runs_and_differentiates(name):
    model = fresh(name)
    out = call(model, tokens())
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    for path, x in model.named_parameters():
        if not x.requires_grad:  # a correction that only a choice depends on
            continue
        assert x.grad is not None and torch.isfinite(x.grad).all(), path
        if not path.endswith("types") and "experts" not in path:
            assert x.grad.abs().sum() > 0, f"no gradient reaches {path}"


@each(ALL)
def test_saved_and_loaded_a_variant_is_the_same_to_the_bit(name, tmp_path):
    model = built(name)
    own.save(model, tmp_path / "m", extra={"note": 1})
    loaded = own.load(tmp_path / "m")
    assert loaded.model.spec == model.spec and loaded.extra == {"note": 1} and loaded.tokenizer is None
    theirs = dict(loaded.model.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for path, x in model.named_parameters():
        assert torch.equal(x, theirs[path]) and x.dtype == theirs[path].dtype, path
    with torch.no_grad():
        assert torch.equal(call(model, tokens()), call(loaded.model, tokens()))


@pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in ALL.items()] + [pytest.param(preset(n), id=f"preset-{n}") for n in names()])
def test_a_spec_survives_plain_data(spec):
    again = type(spec).from_dict(spec.to_dict())
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert again == spec and hash(again) == hash(spec) and repr(again) == repr(spec) and again.diff(spec) == ""


@each(ALL)
def test_the_spec_is_built_as_its_repr_says(name):
    scope: dict[str, Any] = dict(registered())
    assert eval(repr(ALL[name]), scope) == ALL[name]


@each(ALL)
def test_the_same_seed_gives_the_same_weights_and_another_gives_others(name):
    spec: Any = ALL[name]
    a, b, c = (dict(spec.build(seed=s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


@each(ALL)
def test_a_variant_holds_the_shapes_that_its_sites_declare(name):
    check_shapes(built(name), tokens(2, 5))


@each([n for n in ALL if not n.startswith("experts")])
def test_a_variant_runs_in_bfloat16_close_to_float32(name):
    wide, narrow = built(name), fresh(name, torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
            a.copy_(b)
        low, high = call(narrow, tokens()), call(wide, tokens())
    assert low.dtype == torch.bfloat16 and torch.isfinite(low).all()
    # bfloat16 keeps 8 bits: two layers of it agree with float32 to a few per cent of the spread.
    assert (low.float() - high).abs().mean() < 0.08 * high.std()


def test_every_part_of_a_user_joins_with_one_decorator():
    from glassformer.core import spec as specs
    from glassformer.core.spec import part
    from glassformer.parts.norm import Norm, NormLayer

    class HalfLayer(NormLayer):
        def forward(self, x, p):
            return x / 2

    try:

        @part
        class Half(Norm):
            by: float = 2.0

            def build(self, d: int) -> NormLayer:
                return HalfLayer()

        model = Decoder(VOCAB, D, (Block(Attention(4), norm=Half()),)).build(seed=0)
        assert model(tokens()).shape == (2, 9, VOCAB)
        # Half is unknown to type hints of other modules, yet plain data finds it by name.
        assert Decoder.from_dict(model.spec.to_dict()) == model.spec
    finally:
        specs._REGISTRY.pop("Half", None)


def test_an_initialisation_by_hand_fills_what_it_names():
    rules = Init(
        (
            Rule(("weight",), Normal(0.5)),
            Rule(("readout.matrix",), ResidualNormal(0.1)),
            Rule(("norm1.weight",), Declared()),
            Rule(("bias",), Fill(3.0)),
        )
    )
    model = Decoder(VOCAB, D, (Block(Attention(4, out_bias=True)),), init=rules).build(seed=0)
    same(model.blocks[0].attn.out.bias.detach(), torch.full((D,), 3.0))
    assert model.embed.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.readout.matrix.std().item() == pytest.approx(0.1 / 2**0.5, rel=0.1)
