"""``glassformer look``: a page that shows what a model computes for a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Edits, Looked, Model, edits_of


def page(
    text: Looked,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML page to write.")] = Path("look.html"),
    dtype: Dtype = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    device: Device = None,
    edits: Edits = None,
) -> None:
    """Run a text through a model and write one self-contained HTML page: tokens, attention, predictions."""
    from ...look.pages import write_page
    from ..models import open_model, tokenizer_of

    loaded = open_model(model, device, dtype, packed)
    written = write_page(out, loaded.model, tokenizer_of(loaded, model), text, title=Path(model).name, tap=edits_of(edits, loaded))
    print(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB): open it in a browser")
