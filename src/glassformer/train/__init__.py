"""Training: data, loop, optimisers, schedule, checkpoints, log."""

from __future__ import annotations

from .data import TokenData, prepare
from .evaluate import Evaluation, evaluate
from .loader import Loader
from .loop import Source, Step, Trainer
from .optimise import AdamW, Muon, Optimizer
from .schedule import WSD, Constant, Cosine, InverseSqrt, Schedule

__all__ = [
    "WSD",
    "AdamW",
    "Constant",
    "Cosine",
    "Evaluation",
    "InverseSqrt",
    "Loader",
    "Muon",
    "Optimizer",
    "Schedule",
    "Source",
    "Step",
    "TokenData",
    "Trainer",
    "evaluate",
    "prepare",
]
