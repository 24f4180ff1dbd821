"""``weights=``: how a loaded model holds its matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.cli.app import main
from glassformer.core.errors import WeightsError
from glassformer.models.presets import preset
from glassformer.parts.packed import PackedLinear
from glassformer.weights import holding, own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made: Any = preset("tiny", vocab_size=65, tied=True)
    own.save(made.build(), tmp_path / "m")
    return tmp_path / "m"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(12)[None]).float()
    return found


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.02), ("int4", 0.35)])
def test_blocks(folder: Path, kind: str, share: float) -> None:
    plain, held = gf.load(folder).model, gf.load(folder, weights=kind).model
    layers = [m for m in held.modules() if isinstance(m, PackedLinear)]
    assert layers
    assert {t for m in layers for t in m.types} == {holding.BLOCKS[kind]}
    assert held.embed.table.types == ("Q8_0",)
    a, b = logits(plain), logits(held)
    assert (a - b).norm() < share * a.norm()


def test_types(folder: Path) -> None:
    assert next(gf.load(folder, weights="bfloat16").model.parameters()).dtype == torch.bfloat16
    assert next(gf.load(folder, weights="float32").model.parameters()).dtype == torch.float32


def test_auto(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(holding, "SECONDS", 0.05)
    assert next(gf.load(folder, weights="auto").model.parameters()).dtype == torch.float32  # bfloat16 would not hold it exactly
    assert not list((tmp_path / "cache").glob("weights-*")) if (tmp_path / "cache").exists() else True
    model = gf.load(folder, weights="bfloat16").model
    before = logits(model)
    times = iter([1.0, 2.0])
    monkeypatch.setattr(holding, "_time", lambda *_: next(times))
    assert holding.faster(model, torch.bfloat16) == torch.float32
    assert torch.equal(logits(model), before)  # there and back changed nothing
    assert holding.faster(model, torch.bfloat16) == torch.float32  # remembered: `times` is empty
    (kept,) = (tmp_path / "cache").glob("weights-*")
    kept.write_text("{")
    times = iter([2.0, 1.0])
    assert holding.faster(model, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "int7"}, r"weights='int7' is no way of holding a model's matrices\. Did you mean .*Known: float32, bfloat16, int8, int4, auto"),
        ({"weights": "int8", "quantise": "int8"}, "weights='int8' and quantise='int8' both say how the matrices are held: leave one of them out"),
        ({"weights": "int8", "packed": True}, "weights='int8' and packed=True both say"),
        ({"weights": "float32", "dtype": "bfloat16"}, "weights='float32' and dtype='bfloat16' both say the type of the numbers"),
    ],
)
def test_refused(folder: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        gf.load(folder, **given)


def test_nothing_fits() -> None:
    with pytest.raises(WeightsError, match="no matrix with rows of a multiple of 32 numbers to hold in blocks"):
        holding.hold(torch.nn.Linear(31, 4), "int8")


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "x", "--weights", "int9"]) == 2
    assert "--weights int9 is no way of holding a model's matrices" in capsys.readouterr().err
