"""``glassformer look tokens``: why a tokenizer cuts a text as it does."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Out, Rows, show


def tokens(
    text: Annotated[str, typer.Argument(help="The text that is cut.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="A model's folder, or a tokenizer.json.")],
    out: Out = None,
    rows: Rows = 200,
) -> None:
    """BPE's merges in order, Unigram's lattice and best path, WordPiece's trail of matches, word by word."""
    from ...look.segmentation import segment
    from ...text import Tokenizer

    show(segment(Tokenizer.load(model), text), out, rows)
