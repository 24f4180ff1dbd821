"""A forked child has none of its parent's threads: it computes alone, and builds anew what was being built."""

from __future__ import annotations

import os

import pytest
import torch

from glassformer.core import native
from glassformer.parts.linear import product

pytestmark = pytest.mark.skipif(not native.wait() or not hasattr(os, "fork"), reason="no compiler here, or no fork")


def test_a_child_of_a_process_whose_pool_is_running_computes_the_same() -> None:
    x, w = torch.randn(1, 768), torch.randn(2048, 768)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            here = product(x, w)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(product(x, w), here) else 1)
            _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(threads)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_child_of_a_process_that_is_compiling_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    state = native._State()
    state.asked = True
    monkeypatch.setattr(native, "_state", state)
    native._after_fork()
    assert not state.asked and not state.done.is_set()
