"""Laws of rules: every form undoes itself, placeholders stand for what they should, and every family's table says each name once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch import Tensor

from glassformer.core.errors import WeightsError
from glassformer.weights import assign
from glassformer.weights.family import families
from glassformer.weights.rules import Form, Joined, PerHead, Place, Rule, Same, Table, Transposed, pattern
from glassformer.weights.stored import Stored

# Forms


def every_form() -> dict[str, type[Form]]:
    families()  # those of the families' own
    found, open_ = {}, [Form]
    while open_:
        for kind in open_.pop().__subclasses__():
            if kind.__module__.startswith("glassformer."):
                found[kind.__name__] = kind
                open_.append(kind)
    return found


def place(name: str = "qkv", **fields: Any) -> Place:
    return Place(SimpleNamespace(**fields), name)


def joined(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(widths=(a, b, b), n_heads=1), (a + 2 * b, d)


def heads(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(n_heads=a, widths=(a * b,) * 3), (3 * a * b, d)


def paired(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(n_heads=a, n_kv_heads=b, widths=(a * 2 * c, b * 2 * c, b * 2 * c)), (2 * c * (a + 2 * b), d)


def latent(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(n_heads=a, d_nope=b, d_value=c), (a * (b + c), d)


def any_matrix(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(), (2 * a, d)


def vector(a: int, b: int, c: int, d: int) -> tuple[Place, tuple[int, ...]]:
    return place(), (a,)


CASES: dict[str, Callable[..., tuple[Place, tuple[int, ...]]]] = {
    "Same": any_matrix,
    "Joined": joined,
    "Transposed": any_matrix,
    "PerHead": heads,
    "Paired": paired,
    "PlusOne": vector,
    "OutOfLatent": latent,
    "TakingTurns": any_matrix,
    "Row": vector,
    "Repeated": vector,
}
READ_ONLY = {"FromMXFP4", "TakingTurnsInMXFP4"}
MANY_TO_ONE = {"Repeated"}  # one vector under two names: what differs there cannot come back

SIZE = st.integers(1, 5)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """All different, and whole, so that adding and taking away one is exact."""
    n = torch.Size(shape).numel()
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float().reshape(shape)


def test_every_form_has_its_case():
    assert every_form().keys() == CASES.keys() | READ_ONLY


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=30, deadline=None)
@given(a=SIZE, b=SIZE, c=SIZE, d=SIZE)
def test_every_form_undoes_itself(name, a, b, c, d):
    form: Any = every_form()[name]()
    where, shape = CASES[name](a, b, c, d)
    y = numbers(shape)
    theirs = list(form.theirs(y, where))
    assert torch.equal(form.ours(theirs, where), y)
    xs = theirs if name in MANY_TO_ONE else [numbers(tuple(t.shape), seed=i + 1) for i, t in enumerate(theirs)]
    for x, again in zip(xs, form.theirs(form.ours(xs, where), where), strict=True):
        assert torch.equal(x, again)
    assert sum(t.numel() for t in theirs) >= y.numel()

    meta = form.theirs(torch.empty(shape, device="meta"), where)
    assert [t.shape for t in meta] == [t.shape for t in theirs] and all(t.is_meta for t in meta)
    assert form.ours(list(meta), where).shape == y.shape and form.ours(list(meta), where).is_meta


@pytest.mark.parametrize("form", [Transposed(), Same()])
def test_vectors_stay_as_they_are(form):
    assert torch.equal(form.ours([torch.arange(3.0)], place()), torch.arange(3.0))


def test_forms_by_hand():
    q, k, v = torch.zeros(4, 1), torch.ones(2, 1), torch.full((2, 1), 2.0)
    assert Joined().ours([q, k, v], place()).flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    gate_up = place("gate_up", gate_up=SimpleNamespace(out_features=6))
    assert [t.tolist() for t in Joined().theirs(torch.arange(6.0), gate_up)] == [[0, 1, 2], [3, 4, 5]]
    rows = torch.tensor([[10 * h + kind] for h in range(2) for kind in (1, 2, 3) for _ in range(2)])
    assert PerHead().ours([rows], place(n_heads=2)).flatten().tolist() == [1, 1, 11, 11, 2, 2, 12, 12, 3, 3, 13, 13]
    with pytest.raises(NotImplementedError):
        Form().ours([], place())
    with pytest.raises(NotImplementedError):
        Form().theirs(q, place())


@pytest.mark.parametrize("form", [Same(), Joined(), Transposed(), PerHead()])
def test_filling_is_the_form_of_what_was_read(form, tmp_path):
    where, shape = {Joined: joined, PerHead: heads}.get(type(form), any_matrix)(3, 2, 1, 4)
    y = numbers(shape)
    stored, at = [], 0
    with (tmp_path / "data").open("wb") as f:
        for x in form.theirs(y, where):
            stored.append(Stored("x", tuple(x.shape), "F32", tmp_path / "data", at, 4 * x.numel()))
            at += f.write(x.contiguous().numpy().tobytes())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = torch.empty(shape, dtype=dtype)
        form.fill(out, stored, where)
        assert torch.equal(out, y.to(dtype))


# Placeholders

WORD = st.text("abcxyz_", min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(i=st.integers(0, 10**6), e=st.integers(0, 999), w=st.sampled_from(["weight", "bias"]), word=WORD)
def test_placeholders_read_and_write(i, e, w, word):
    rule = Rule("blocks.{i}.experts.{e}.{name}.{w}", "layers.{i}.x{e}.{name}.{w}", "again.{i}.{i}.{e}.{w}")
    holes = rule.match(f"blocks.{i}.experts.{e}.{word}.{w}")
    assert holes == {"i": str(i), "e": str(e), "name": word, "w": w} and not rule.stacked
    assert rule.names(holes) == (f"layers.{i}.x{e}.{word}.{w}", f"again.{i}.{i}.{e}.{w}")
    assert pattern(rule.theirs[1]).fullmatch(f"again.{i}.{i}.{e}.{w}") and not pattern(rule.theirs[1]).fullmatch(f"again.{i}.{i + 1}.{e}.{w}")


@pytest.mark.parametrize(
    "path",
    [
        "blocks.x.a.weight",
        "blocks..a.weight",
        "blocks.1.2.a.weight",
        "blocks.1.a.scale",
        "blocks.1.a.b.weight",
        "blocks.1.a.weight.",
        "xblocks.1.a.weight",
        "blocks.٣.a.weight",
    ],
)
def test_what_a_placeholder_does_not_stand_for(path):
    assert Rule("blocks.{i}.{name}.{w}", "t").match(path) is None


def test_a_full_stop_is_a_full_stop_and_a_star_anything():
    assert pattern("a.b").fullmatch("axb") is None and pattern("*.inv_freq").fullmatch("a.7.rotary.inv_freq")
    assert pattern("h.{i}.attn.bias").fullmatch("h.11.attn.bias") and pattern("h.{i}.attn.bias").fullmatch("h.11.attn.biases") is None


def test_the_form_that_is_meant_where_none_is_said():
    assert type(Rule("a", "b").form) is Same and type(Rule("a", "b", "c").form) is Joined
    assert Rule("x.{e}.w", "x.w").stacked and not Rule("x.{e}.w", "x.{e}.w").stacked and not Rule("x.w", "x.w").stacked


def test_a_table_gives_all_rules_in_order_the_first_is_canonical():
    first, second, other = Rule("blocks.{i}.a.{w}", "one.{i}.{w}"), Rule("blocks.{i}.{name}.weight", "two.{i}"), Rule("final.weight", "f")
    table = Table([first, second, other])
    for i in (0, 7, 123):
        assert table.rules_for(f"blocks.{i}.a.weight") == (first, second)
        assert table.rules_for(f"blocks.{i}.a.bias") == (first,) and table.rules_for(f"blocks.{i}.b.weight") == (second,)
    assert table.rules_for("final.weight") == (other,) and table.rules_for("nothing") == ()


# Every family's table

# A path of ours: words, numbers in braces, no more; the first word is a place that models have.
OURS = re.compile(r"(?:(?:encoder|decoder|\{half\})\.)?(?:embed|position|final_norm|readout|blocks\.\{i\})(?:\.(?:[a-z_0-9]+|\{[a-z]+\}))*")


@pytest.mark.parametrize("kind", sorted(families()))
def test_a_table_is_well_formed(kind):
    family = families()[kind]
    for rule in family.rules:
        assert OURS.fullmatch(rule.ours), rule.ours
        left = set(re.findall(r"\{(\w+)\}", rule.ours))
        for name in rule.theirs:
            right = set(re.findall(r"\{(\w+)\}", name))
            assert right <= left, f"{name} has holes that {rule.ours} cannot fill"
            assert left - right <= {"e"}, f"{name} is one name for several of {rule.ours}"
    for copy, original in (family.tied or {}).items():
        assert pattern(copy) and pattern(original) and copy != original
    pairs = [(r.ours, r.theirs) for r in family.rules]
    assert len(set(pairs)) == len(pairs)


FEW = {"num_hidden_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
FEW_EXPERTS = {"num_local_experts": 16, "num_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 2}


def reference_config(kind: str) -> dict[str, Any]:
    """The reference library's usual config of this kind, with two layers and few experts."""
    usual = transformers.CONFIG_MAPPING[kind]()
    few = {k: v for k, v in FEW.items() if getattr(usual, k, None)} | {k: v for k, v in FEW_EXPERTS.items() if hasattr(usual, k)}
    made: dict[str, Any] = transformers.CONFIG_MAPPING[kind](**few).to_dict()
    return made


@pytest.mark.parametrize("kind", sorted(families()))
def test_what_a_family_writes_is_what_it_reads(kind):
    """A model of the reference's usual config: every tensor of its checkpoint has a name of its own, and fills its parameter again."""
    family = families()[kind]
    spec = family.read(reference_config(kind), "config.json", ignore=("vocab_size",))
    model = spec.build(device="meta")
    written = list(assign.theirs(model, family.fitted(spec)))
    names = [name for name, _ in written]
    assert len(set(names)) == len(names)
    tensors = {n: Stored(n, tuple(x.shape), "F32", Path("made"), 0, 4 * x.numel()) for n, x in written}
    plan = assign.plan(model, family, tensors, "made")
    assert [f.path for f in plan.fillings] == [path for path, _ in model.named_parameters()] and not plan.left and not plan.tied
    used = [s.name.split("[")[0] for f in plan.fillings for s in f.stored]
    assert set(used) == set(names)
    with pytest.raises(
        WeightsError, match=rf"does not fit the family {family.name} \(\d+ missing, \d+ left over\): the parameter .* needs the tensor '{re.escape(names[-1])}'"
    ):
        assign.plan(model, family, {n: s for n, s in tensors.items() if n != names[-1]}, "made")
