"""``glassformer look``: a page that shows what a model computes for a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Edits, edits_of


def page(
    text: Annotated[str, typer.Argument(help="The text to look at.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML page to write.")] = Path("look.html"),
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    edits: Edits = None,
) -> None:
    """Run a text through a model and write one self-contained HTML page: tokens, attention, predictions."""
    from ...look.page import write_page
    from ..models import open_model, tokenizer_of

    loaded = open_model(model, device, dtype, packed)
    written = write_page(out, loaded.model, tokenizer_of(loaded, model), text, title=Path(model).name, tap=edits_of(edits, loaded))
    print(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB): open it in a browser")
