"""Methods that no graph holds: eager under compilation, and no compiler where nobody compiles."""

from __future__ import annotations

import torch

from glassformer.core.eager import eagerly


class Counter:
    def __init__(self) -> None:
        self.inside: list[bool] = []

    @eagerly
    def odd(self, x: torch.Tensor) -> torch.Tensor:
        """As it is written."""
        self.inside.append(torch.compiler.is_compiling())
        return x + float(x.sum())  # a number that no graph knows


class Below(Counter):
    pass


def test_a_method_runs_as_it_is_written_within_a_compiled_function():
    frames: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        frames.append(str(graph.graph))
        return graph.forward

    below = Below()
    run = torch.compile(lambda x: 2 * below.odd(3 * x), backend=backend)
    for n in (2, 3, 4):
        x = torch.ones(n)
        torch.testing.assert_close(run(x), 2 * (3 * x + 9 * n / 3))
    assert below.inside == [False] * 3
    assert frames and not any("sum" in f for f in frames)  # what is inside the method is in no graph


def test_once_something_was_compiled_nothing_of_this_file_stands_in_between():
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    Counter().odd(torch.ones(2))
    assert Counter.odd.__name__ == "odd" and Counter.odd.__doc__ == "As it is written."
    assert Counter.odd.__code__.co_filename != eagerly.__code__.co_filename
    assert vars(Below).get("odd") is None  # the class that has the method was changed, not the one that was called
