"""Training mode and evaluation mode of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the length of one call, whatever mode each module is in; then every module is back in its own."""
    training, left = [], [model]
    while left:  # model.modules() takes twice as long, and this runs at every token
        m = left.pop()
        left += [child for child in m._modules.values() if child is not None]
        if m.training:
            training.append(m)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
