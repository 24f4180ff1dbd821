"""For modules that call many commands: typer builds all of them anew at every call, here once for a module."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import typer


@pytest.fixture(scope="module", autouse=True)
def commands_built_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield
