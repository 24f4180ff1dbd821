"""A small model and a small text, for tests that train."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from glassformer.models.presets import preset
from glassformer.tasks import NextToken
from glassformer.train import AdamW, Cosine, TokenData, Trainer

VOCABULARY = 13


def spec(dropout: float = 0.0) -> Any:
    """Two layers of width 32."""
    tiny = preset("tiny", vocab_size=VOCABULARY)
    return tiny.replace(d_model=32, blocks=tiny.blocks[:2]).at("blocks.*.feedforward.d_ff").set(64).at("blocks.*.dropout").set(dropout)


def model(seed: int = 0, dropout: float = 0.0) -> Any:
    return spec(dropout).build(seed=seed)


def ids(n: int = 4000) -> np.ndarray[Any, Any]:
    """A row with something to learn: mostly ``x -> 3 x + 1``, now and then a random token."""
    draw = random.Random(1)
    row = [1]
    for _ in range(n - 1):
        row.append((3 * row[-1] + 1) % VOCABULARY if draw.random() < 0.9 else draw.randrange(VOCABULARY))
    return np.asarray(row)


def data(n: int = 4000) -> TokenData:
    return TokenData.from_ids(ids(n), vocab_size=VOCABULARY)


def trainer(made: Any = None, **options: Any) -> Trainer:
    torch.set_num_threads(1)
    rows = options.pop("data", None) or data()
    settings: dict[str, Any] = {
        "optimizer": AdamW(3e-3),
        "schedule": Cosine(warmup=0.1),
        "batch": 4,
        "context": 16,
        "steps": 12,
        "compile": False,
        "progress": False,
        "tensorboard": False,
    }
    return Trainer(model() if made is None else made, options.pop("task", NextToken()), rows, **(settings | options))


def losses(of: Trainer) -> list[float]:
    return [step.loss for step in of]
