"""``glassformer look tokens``: why a tokenizer cuts a text as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Out, Rows, show


def tokens(
    text: Annotated[str, typer.Argument(help="The text that is cut.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="A model (folder, run, .gguf), or a tokenizer.json.")],
    out: Out = None,
    rows: Rows = 200,
) -> None:
    """BPE's merges in order, Unigram's lattice and best path, WordPiece's trail of matches, word by word."""
    from ...core.errors import TokenizerError
    from ...look.segmentation import segment
    from ...text import Tokenizer
    from ...weights import opened

    path = Path(model)
    beside = path.suffix == ".json" or (path / "tokenizer.json").exists() or not path.exists()
    found = Tokenizer.load(path) if beside and not model.startswith("hf://") else opened.open(model).tokenizer
    if found is None:
        raise TokenizerError(f"The model in {model} has no tokenizer: put the tokenizer.json that it was trained with into that folder, or name one.")
    show(segment(found, text), out, rows)
