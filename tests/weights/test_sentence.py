"""Sentence encoders: what modules.json may ask for, what it may not, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.models import Block, Encoder
from glassformer.models.init import BERT_INIT
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding
from glassformer.parts.feedforward import Plain
from glassformer.parts.norm import LayerNorm, NoNorm
from glassformer.parts.position import Learned
from glassformer.parts.readout import Dense, First, Last, Mean, States, Tagger, Vector
from glassformer.parts.wiring import PostNorm
from tools import fresh, tokens

NAMES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
NORM = LayerNorm(eps=1e-12)
BLOCK = Block(Attention(4, qkv_bias=True, out_bias=True), Plain(20, bias=True), norm=NORM, wiring=PostNorm())


def encoder(readout: Any) -> Any:
    fields: dict[str, Any] = {"final_norm": NoNorm(), "embedding": Embedding(n_types=2, norm=NORM), "position": Learned(16), "init": BERT_INIT}
    return fresh(Encoder(31, 16, (BLOCK,) * 2, readout=readout, **fields))


def asked(folder: Path, kinds: list[str], pooling: dict[str, Any] | None = None) -> Path:
    """A folder with a bare encoder and a modules.json that asks for ``kinds``."""
    weights.export_hf(encoder(States()), folder)
    modules = [{"idx": i, "name": str(i), "path": NAMES[k], "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | (pooling or {})))
    return folder


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({}, Mean()),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "pooling_mode_max_tokens": False}, Mean()),
        ({"pooling_mode_cls_token": True}, First()),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, Last()),
        ({"pooling_mode": "cls", "embedding_dimension": 16}, First()),
        ({"pooling_mode": ["lasttoken"]}, Last()),
    ],
)
def test_the_ways_of_pooling(tmp_path, pooling, pool):
    folder = asked(tmp_path, ["Transformer", "Pooling"], pooling)
    assert weights.open(folder).spec.readout == Vector(pool=pool)
    assert weights.open(asked(tmp_path, ["Transformer", "Pooling", "Normalize"], pooling)).spec.readout == Vector(pool=pool, normalise=True)


@pytest.mark.parametrize("readout", [Vector(pool=Mean(), normalise=True), Vector(pool=First()), Vector(pool=Last())])
def test_a_sentence_encoder_goes_and_comes_back(tmp_path, readout):
    model = encoder(readout)
    weights.export_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    again, _ = weights.open(tmp_path).load()
    assert again.spec.readout == readout
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 7), lengths=[7, 3]), model(tokens(2, 7), lengths=[7, 3]))


def test_the_vector_is_pooled_states_of_length_one(tmp_path):
    model, _ = weights.open(asked(tmp_path, ["Transformer", "Pooling", "Normalize"])).load()
    x = tokens(2, 7)
    with torch.no_grad():
        states, vectors = model.states(x, lengths=[7, 3]), model(x, lengths=[7, 3])
    want = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    torch.testing.assert_close(vectors, want / want.norm(dim=-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_another_models_modules_do_not_stay(tmp_path):
    weights.export_hf(encoder(Vector()), tmp_path)
    weights.export_hf(encoder(Tagger(3)), tmp_path)
    assert not (tmp_path / "modules.json").exists()
    assert weights.open(tmp_path).spec.readout == Tagger(3)


def test_a_vector_with_a_map_after_pooling_has_no_such_form(tmp_path):
    with pytest.raises(WeightsError, match="No published family computes what this Encoder does"):
        weights.export_hf(encoder(Vector(transform=Dense("tanh"))), tmp_path)


@pytest.mark.parametrize(
    ("kinds", "pooling", "said"),
    [
        (
            ["Transformer", "Pooling", "Dense", "Normalize"],
            {},
            "asks for Transformer then Pooling then Dense then Normalize, but only Transformer then Pooling",
        ),
        (["Transformer"], {}, "asks for Transformer, but only Transformer then Pooling, and Normalize after them, are supported"),
        ([], {}, "asks for nothing, but only"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pools by max, but only one of cls, mean, lasttoken is supported"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pools by cls and mean, but only one of"),
        (["Transformer", "Pooling"], {"word_embedding_dimension": 24}, "pools vectors of width 24, but the encoder's states are 16 wide"),
        (["Transformer", "Pooling"], {"include_prompt": False}, "include_prompt is False, but only True is supported"),
        (["Transformer", "Pooling"], {"pooling_mode_new_tokens": True}, "pooling_mode_new_tokens is True, which is not understood here"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, kinds, pooling, said):
    with pytest.raises(WeightsError, match=said):
        weights.open(asked(tmp_path, kinds, pooling))


def test_files_that_are_wrong_are_named(tmp_path):
    folder = asked(tmp_path, ["Transformer", "Pooling"])
    modules = json.loads((folder / "modules.json").read_text())
    for text, said in (("{", "modules.json cannot be read as JSON"), ('{"a": 1}', "modules.json is JSON, but no list of modules")):
        (folder / "modules.json").write_text(text)
        with pytest.raises(WeightsError, match=said):
            weights.open(folder)
    for path in ("../elsewhere", "", "a/b"):
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(WeightsError, match="for its Pooling, but only folders beside it are opened"):
            weights.open(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    with pytest.raises(WeightsError, match="pools the states of a bare encoder, but config.json describes Encoder with Tagger"):
        weights.open(folder)


def test_a_list_of_modules_that_is_no_list_of_modules_is_not_read(tmp_path):
    folder = asked(tmp_path, ["Transformer", "Pooling"])
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules) + " " * (1 << 20))
    with pytest.raises(WeightsError, match=r"modules\.json has 1,048,\d+ bytes, and a list of modules a few hundred: it is another file"):
        weights.open(folder)
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "a" * 100_000}] * 3))
    with pytest.raises(WeightsError, match="asks for Transformer then Pooling then 'aaa") as caught:
        weights.open(folder)
    assert len(str(caught.value)) < 1_000
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(" " * (65 << 20))
    with pytest.raises(WeightsError, match="are not believed of such a file"):
        weights.open(folder)
