"""Patterns of paths, what a Record answers, and what the errors say. (What a tap does to a model is in tests/laws.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from glassformer.core.errors import SiteError
from glassformer.core.tap import Chain, Edit, Pattern, Record, Tap
from tools import built, call, source, tokens


@pytest.mark.parametrize(
    ("pattern", "path", "meets"),
    [
        ("blocks.0.attn.z", "blocks.0.attn.z", True),
        ("blocks.0.attn.z", "blocks.1.attn.z", False),
        ("blocks.*.attn.z", "blocks.11.attn.z", True),
        ("blocks.*.z", "blocks.1.attn.z", False),
        ("blocks.**.z", "blocks.1.attn.z", True),
        ("**", "anything.at.all", True),
        ("**.z", "z", True),
        ("**.z", "blocks.0.attn.z", True),
        ("**.scale", "blocks.0.attn.q_norm.scale", True),
        ("blocks.**", "blocks.0.resid_pre", True),
        ("blocks.**", "final_norm.scale", False),
        ("blocks.{0,3-5}.resid_mid", "blocks.4.resid_mid", True),
        ("blocks.{0,3-5}.resid_mid", "blocks.2.resid_mid", False),
        ("blocks.{0,3-5}.resid_mid", "blocks.45.resid_mid", False),
        ("blocks.0.attn.z[2,5]", "blocks.0.attn.z", True),
        ("*.blocks.0.attn.z", "encoder.blocks.0.attn.z", True),
        ("logits", "step.3.logits", True),
        ("step.3.logits", "step.3.logits", True),
        ("step.3.logits", "step.4.logits", False),
        ("step.{0-2}.logits", "step.1.logits", True),
        ("step.*.logits", "step.9.logits", True),
        ("decoder.**.z", "step.0.decoder.blocks.1.attn.z", True),
        ("step.3.logits", "logits", False),  # a plain call is no step
        ("step.3", "logits", False),
        ("blocks", "blocks.0", False),
    ],
)
def test_patterns(pattern, path, meets):
    assert Pattern.read(pattern).meets(path) is meets


@given(st.lists(st.sampled_from(["blocks", "0", "17", "attn", "z", "step", "encoder"]), min_size=1, max_size=6))
def test_every_path_is_met_by_itself_and_by_everything(names):
    path = ".".join(names)
    assert Pattern.read("**").meets(path)
    assert Pattern.read(path).meets(path)
    assert Pattern.read(".".join("*" for _ in names)).meets(path)
    assert Pattern.read(f"**.{names[-1]}").meets(path)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("blocks..z", r"'blocks\.\.z' has an empty segment: write names joined by single dots\."),
        ("", r"'' has an empty segment"),
        ("blocks.{0,x}.z", r"'blocks\.\{0,x\}\.z': 'x' is neither a number nor a range such as 3-5\."),
        ("blocks.{1-2-3}.z", r"'1-2-3' is neither a number nor a range"),
        ("blocks.{}.z", r"'' is neither a number nor a range"),
        ("blocks.0.attn.z[a]", r"'a' is neither a number nor a range"),
        ("blocks.0.attn.out[1]", r"'blocks\.0\.attn\.out\[1\]' picks heads, but 'out' has no head axis\. These have one: q, q_rot, "),
        ("blocks.0.resid_pre[1]", r"'resid_pre' has no head axis"),
    ],
)
def test_a_pattern_that_cannot_be_read_says_why(pattern, said):
    with pytest.raises(SiteError, match=said):
        Record(pattern)
    with pytest.raises(SiteError, match=said):
        Edit(pattern, lambda x: x)


# A pattern that meets nothing


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            "blocks.*.attn.patern",
            r"'blocks\.\*\.attn\.patern' meets no site of this model\. Did you mean 'blocks\.\*\.attn\.pattern'.* model\.sites\(\) lists them all\.",
        ),
        (
            "blocks.7.attn.z",
            r"'blocks\.7\.attn\.z' meets no site of this model\. Did you mean 'blocks\.0\.attn\.z', 'blocks\.1\.attn\.z'|Did you mean 'blocks\.1\.attn\.z'",
        ),
        ("step.0.blocks.0.ffn.gat", r"Did you mean 'blocks\.0\.ffn\.gate'"),
        ("encoder.**.z", r"'encoder\.\*\*\.z' meets no site"),
        ("blocks.0.cross.z", r"meets no site of this model"),
    ],
)
def test_a_misspelt_site_is_an_error_before_anything_runs(pattern, said):
    model = built("llama")
    for tap in (Record(pattern), Edit(pattern, lambda x: x), Record("logits") | Record(pattern)):
        with pytest.raises(SiteError, match=said):
            model(tokens(), tap=tap)


def test_a_misspelt_site_of_an_encoder_decoder():
    with pytest.raises(SiteError, match=r"'blocks\.0\.attn\.z' meets no site of this model\. Did you mean '(en|de)coder\.blocks\.0\.attn\.z', '(en|de)coder"):
        call(built("t5"), tokens(), tap=Record("blocks.0.attn.z"))
    with pytest.raises(SiteError, match="meets no site"):
        built("t5").encode(source(1), tap=Record("encoder.blocks.0.cross.z"))


def test_a_tap_goes_from_model_to_model():
    tap = Record("**.gate")
    built("llama")(tokens(), tap=tap)
    with pytest.raises(SiteError, match=r"'\*\*\.gate' meets no site"):
        built("gpt2")(tokens(), tap=tap)


@pytest.mark.parametrize("site", ["q", "k", "z", "pattern", "scores", "result"])
def test_a_head_beyond_the_last_is_an_error(site):
    model = built("llama")
    said = r"Head 7 was asked for at .*, which has [24] heads, counted from 0\."
    for tap in (Record(f"blocks.0.attn.{site}[1,7]"), Edit(f"blocks.0.attn.{site}[7]", lambda x: x), Record(f"blocks.0.attn.{site}[7]", grad=True)):
        with pytest.raises(SiteError, match=said):
            model(tokens(), tap=tap)


# What a Record answers


def recorded() -> Record:
    tap = Record("**.z", "logits", "embed")
    built("llama")(tokens(), tap=tap)
    return tap


def test_a_record_in_the_order_of_computation():
    tap = recorded()
    assert tap.paths == ["embed", "blocks.0.attn.z", "blocks.1.attn.z", "logits"]
    assert len(tap) == 4 and "logits" in tap and "blocks.0.attn.q" not in tap
    assert tap.find("blocks.*.attn.z") == tap.paths[1:3]
    assert tap.stack("blocks.*.attn.z").shape == (2, 2, 9, 4, 6)
    assert tap.bytes >= 4 * (2 * 2 * 9 * 24 + 2 * 9 * 31)
    tap.clear()
    assert len(tap) == 0 and tap.paths == []


def test_a_record_says_what_it_has_not():
    tap = recorded()
    with pytest.raises(
        SiteError, match=r"'blocks\.0\.attn\.zz' was not recorded\. Did you mean 'blocks\.0\.attn\.z', 'blocks\.1\.attn\.z'\? Recorded: 4 sites\."
    ):
        tap["blocks.0.attn.zz"]
    with pytest.raises(SiteError, match=r"'logits' was not recorded\. Nothing is recorded yet: pass this tap to a model call\."):
        Record("logits")["logits"]
    with pytest.raises(SiteError, match=r"'\*\*\.q' meets nothing that was recorded\."):
        tap.stack("**.q")
    with pytest.raises(SiteError, match=r"'\*\*' meets values of different shapes \(.*\(2, 9, 24\), \(2, 9, 31\).*\): stack them by a narrower pattern\."):
        tap.stack("**")
    with pytest.raises(SiteError, match=r"'logits' was recorded without its gradient: use Record\('logits', grad=True\)\."):
        tap.grad("logits")
    with pytest.raises(SiteError, match="was not recorded"):
        tap.grad("resid_final")


def test_a_gradient_that_never_came():
    tap = Record("blocks.0.attn.z", grad=True)
    said = r"No gradient has reached 'blocks\.0\.attn\.z': call backward\(\) on something computed from it, outside torch\.no_grad\(\)\."
    built("llama")(tokens(), tap=tap)
    with pytest.raises(SiteError, match=said):
        tap.grad("blocks.0.attn.z")
    with torch.no_grad():
        built("llama")(tokens(), tap=tap)
    with pytest.raises(SiteError, match=said):
        tap.grad("blocks.0.attn.z")


def test_a_record_may_live_elsewhere():
    tap = Record("**.z", "**.pattern", device="meta")
    built("llama")(tokens(), tap=tap)
    assert {tap[p].device.type for p in tap.paths} == {"meta"}


def test_an_edit_keeps_the_shape():
    with pytest.raises(
        SiteError, match=r"The edit at 'blocks\.0\.attn\.z' returned shape \(2, 9, 2, 6\), but the value has shape \(2, 9, 4, 6\): keep the shape\."
    ):
        built("llama")(tokens(), tap=Edit("blocks.0.attn.z", lambda z: z[:, :, :2]))
    with pytest.raises(SiteError, match=r"returned shape \(2, 9, 2, 6\), but the value has shape \(2, 9, 1, 6\)"):
        built("llama")(tokens(), tap=Edit("blocks.0.attn.z[3]", lambda z: z.expand(-1, -1, 2, -1)))


def test_chains_are_flat():
    a, b, c = Record("logits"), Edit("embed", lambda x: x), Tap()
    chain = (a | b) | c
    assert isinstance(chain, Chain) and chain.taps == (a, b, c) and (a | (b | c)).taps == (a, b, c)
    assert [p.text for p in chain.patterns()] == ["logits", "embed"]
    assert chain.edits("embed") and not chain.edits("logits")


def test_a_tap_of_one_s_own():
    class Largest(Tap):
        def __init__(self) -> None:
            self.found: dict[str, float] = {}

        def visit(self, path, x):
            self.found[path] = x.abs().max().item()
            return x

    tap = Largest()
    built("llama")(tokens(), tap=tap)
    assert "logits" in tap.found and "blocks.0.attn.pattern" not in tap.found


def test_a_pattern_of_a_step_is_known_to_a_model_but_meets_no_plain_call():
    pattern = Pattern.read("step.3.logits")
    assert pattern.may_meet("logits") and not pattern.may_meet("resid_final") and not Pattern.read("step.3").may_meet("logits")
    tap = Record("step.3.logits", "resid_final")
    built("llama")(tokens(), tap=tap | Edit("step.0.resid_final", lambda x: x / 0))
    assert tap.paths == ["resid_final"] and tap["resid_final"].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "latent"])
def test_a_record_holds_what_was_asked_for_and_no_more(name):
    """Queries are a view of what holds keys and values too."""
    model, ids = built(name), tokens()
    sites = [s.path for s in model.sites()]
    whole = Record("**")
    with torch.no_grad():
        plain = call(model, ids, tap=whole)
        for path in sites:
            tap = Record(path)
            assert torch.equal(call(model, ids, tap=tap), plain)
            assert tap.bytes <= 1.1 * tap[path].nbytes, path
            assert torch.equal(tap[path], whole[path])
    assert whole.bytes <= 1.1 * sum(x.nbytes for x in whole.values.values())
