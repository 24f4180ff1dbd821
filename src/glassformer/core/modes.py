"""Modes for the length of a call: evaluation (a model's modules), and determinism (this thread).

with deterministic():            # as with torch.no_grad(): for this thread, until the block ends
    logits = model(tokens)       # a row has the same bits in any batch, padded on any side, cached or not
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, TypeVar

import torch

from . import native

T = TypeVar("T")


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


class _Thread(local):
    """What is on in the running thread."""

    deterministic = False


_thread = _Thread()


def is_deterministic() -> bool:
    """Whether this thread is in deterministic mode."""
    return _thread.deterministic


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Deterministic mode for the length of a block, in this thread: what a model computes for a row depends on that row alone.

    Its bits are the same whatever the number of rows, their order, padding on either side, what a cache holds already, and the pieces in which
    a text is read. No gradients are recorded. Not the same from one machine, compiler or version of torch to another. ``on=False`` does nothing.
    The first use in a process waits until the compiled code is there (or never will be), so that all of them compute in one way.
    """
    if not on or _thread.deterministic:
        yield
        return
    native.wait()
    _thread.deterministic = True
    try:
        with torch.no_grad():
            yield
    finally:
        _thread.deterministic = False


def deterministically(events: Iterator[T]) -> Iterator[T]:
    """The same events, each made in deterministic mode; who takes them is not in it in between."""
    while True:
        with deterministic():
            try:
                event = next(events)
            except StopIteration:
                return
        yield event
