"""Methods that stay out of compiled graphs, at no cost to those who compile nothing.

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


def eagerly(method: Callable[P, R]) -> Callable[P, R]:
    """``method`` as it is written, also when it is called from a compiled function.

    The first call after the compiler was imported puts ``torch.compiler.disable(method)`` into the class, in place of this.
    """

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet
            return method(*args, **kwargs)
        disabled: Callable[P, R] = torch.compiler.disable(method)
        owner: Any = next((c for c in type(args[0]).__mro__ if vars(c).get(method.__name__) is run), None)
        if owner is not None:
            setattr(owner, method.__name__, disabled)
        return disabled(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # the mark that torch.compiler.disable leaves: a graph ends here
    return run
