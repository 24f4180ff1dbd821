"""``glassformer look heads``: what the heads of a model attend to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Rows, Source, open_loaded, show


def heads(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="A text file, or a text; without one everything is measured on repeated random tokens.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rows of random tokens that are repeated.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the text that are read.")] = 4096,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Tokens of a window that the text is cut into.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Only the heads that hold this role, the highest score first.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="With --role: from which share of the way from an even head to all weight on the target; 0.5 (uniform: 0.9)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random tokens.")] = 0,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Score every head for the roles previous, first, local, same token, duplicate, induction and others, each beside what an even head would get."""
    from ...core.errors import InputError
    from ...look.roles import ROLES, check_threshold, head_roles
    from ...look.subject import choose

    if role is not None:
        choose(role, ROLES, "role")
    if threshold is not None:
        check_threshold(threshold)
        if role is None:
            raise InputError(f"--threshold {threshold:g} says from where on a head holds a role, but no role was asked for: add --role.")
    read = text_or_file(text) if text is not None else None
    found = head_roles(open_loaded(model, device, dtype), read, source=source, repeats=repeats, tokens=tokens, context=context, seed=seed)
    show(found if role is None else found.only(role, threshold), out, rows)


def text_or_file(given: str) -> str | Path:
    """A file if there is one of that name, else the text itself. Raises :class:`InputError` for what can only be the name of a file that is not there."""
    from ...core.errors import InputError

    try:
        if given and Path(given).exists():  # a folder too: what reads it says that it is none
            return Path(given)
    except (OSError, ValueError):
        return given
    if len(given.split()) == 1 and ("/" in given or re.fullmatch(r"\S+\.(txt|md|gz|xz|bz2|text|csv|tsv|json|jsonl|html)", given, re.IGNORECASE)):
        raise InputError(f"There is no file {given!r}: give the path of a text file, or a text of several words.")
    return given
