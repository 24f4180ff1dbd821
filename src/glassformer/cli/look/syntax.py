"""``glassformer look syntax``: which head finds which dependency relation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Rows, open_loaded, show


def syntax(
    trees: Annotated[Path, typer.Argument(metavar="CONLLU", help="Gold dependency trees: a CoNLL-U file, plain, .gz or .xz.")],
    model: Model,
    sentences: Annotated[int, typer.Option("--sentences", min=2, help="Sentences that are read, from the first on.")] = 1000,
    least: Annotated[int, typer.Option("--least", min=1, help="Fewest questions in either half for a relation to be reported.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Divides the sentences into the half that chooses and the half that reports.")] = 0,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """For every relation, the head that finds it best and its accuracy on other sentences, against the best fixed offset."""
    from ...core.errors import InputError
    from ...look.syntax import syntactic_heads

    if not trees.is_file():
        raise InputError(f"There is no file {str(trees)!r}: give the path of a CoNLL-U file.")
    show(syntactic_heads(open_loaded(model, device, dtype), trees, max_sentences=sentences, least=least, seed=seed), out, rows)
