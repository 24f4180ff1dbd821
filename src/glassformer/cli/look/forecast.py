"""``glassformer look forecast``: what a capture will hold, before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from ...core.errors import InputError
from .common import Device, Dtype, Model, Out, Rows, open_loaded, show

Site = Annotated[list[str], typer.Option("--site", "-s", metavar="PATTERN", help="What is recorded, such as 'blocks.*.attn.pattern'. Repeatable.")]
Budget = Annotated[float | None, typer.Option("--budget", metavar="GB", help="Memory that may be taken, in GB; by default half of what is available.")]


def forecast(
    model: Model,
    site: Site,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in a row.")] = 256,
    measure: Annotated[bool, typer.Option("--measure", help="Time a small pass and say how long the whole takes.")] = False,
    budget: Budget = None,
    rows: Rows = 40,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Say how many bytes a recording takes, and whether they fit, before anything runs."""
    from ...look.forecasting import forecast as ask

    loaded = open_loaded(model, device, dtype)
    show(ask(loaded, site, batch, tokens, budget=bytes_of(budget), measure=measure), out, rows)


def bytes_of(budget: float | None) -> int | None:
    """Gigabytes as bytes. Raises :class:`InputError` for what is no such number."""
    if budget is not None and not 0 < budget < 1e9:
        raise InputError(f"--budget is a number of GB above 0, such as 2.5, but {budget:g} was given.")
    return None if budget is None else max(1, int(budget * 1e9))
