"""Functions that stay out of compiled graphs, at no cost to those who compile nothing.

``torch.compiler.disable`` imports the whole compiler where it is written, two seconds of every start of the program; here that waits
until somebody compiles, and whoever compiles has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn`` as it is written, also when it is called from a compiled function (``torch.compiler.disable``, applied at the first such call)."""
    kept: list[Any] = []

    def disabled() -> Any:
        if not kept:
            kept.append(torch.compiler.disable(fn))
        return kept[0]

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet
            return fn(*args, **kwargs)
        result: R = disabled()(*args, **kwargs)
        return result

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # the mark that torch.compiler.disable leaves: a graph ends here
    return run
