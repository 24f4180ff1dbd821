"""The one table of sites: complete, consistent, and met by the models."""

from __future__ import annotations

from glassformer.core.sites import HEAD_AXIS, TABLE
from tools import ALL, built

LETTERS = set("bthsgkdfvec1r")
# As the design names them.
DESIGN = {
    "model": {"embed", "pos_embed", "resid_final", "logits"},
    "block": {"resid_pre", "resid_mid", "resid_mid_cross", "resid_post"},
    "attention": {"in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "result", "out"},
    "latent": {"latent", "q_latent"},
    "feedforward": {"in", "pre", "gate", "post", "out"},
    "experts": {"in", "router", "chosen", "out"},
    "norm": {"scale"},
}


def test_the_sites_of_the_design_are_all_present():
    assert {part: {s.name for s in sites} for part, sites in TABLE.items()} == DESIGN


def test_every_site_has_known_axes_and_one_line_of_meaning():
    for sites in TABLE.values():
        assert len({s.name for s in sites}) == len(sites)
        for s in sites:
            assert set(s.axes.split()) <= LETTERS and s.meaning and "\n" not in s.meaning and not s.meaning.endswith("."), s


def test_head_axes_follow_from_the_table():
    assert HEAD_AXIS == {"q": 2, "k": 2, "v": 2, "q_rot": 2, "k_rot": 2, "scores": 1, "pattern": 1, "z": 2, "result": 2}


def test_every_site_of_the_table_is_met_by_some_model():
    met = {s.path.rsplit(".", 1)[-1] for name in ALL for s in built(name).sites()}
    assert met == {s.name for sites in TABLE.values() for s in sites}


def test_paths_are_unique_and_ordered_by_layer():
    for name in ALL:
        paths = [s.path for s in built(name).sites()]
        assert len(set(paths)) == len(paths), name


def test_the_paths_of_one_model():
    attention = ["in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "result", "out"]
    layer = lambda i: [
        *(f"blocks.{i}.{n}" for n in ("resid_pre", "resid_mid", "resid_post")),
        *(f"blocks.{i}.attn.{n}" for n in attention),
        *(f"blocks.{i}.ffn.{n}" for n in ("in", "pre", "gate", "post", "out")),
        *(f"blocks.{i}.{n}.scale" for n in ("norm1", "norm2")),
    ]
    assert sorted(s.path for s in built("llama").sites()) == sorted(["embed", *layer(0), *layer(1), "final_norm.scale", "resid_final", "logits"])
