"""``glassformer look``: a page that shows what a model computes for a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def look(
    text: Annotated[str, typer.Argument(help="The text to look at.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="DIR", help="The folder of a trained model.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML page to write.")] = Path("look.html"),
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
) -> None:
    """Run a text through a model and write one self-contained HTML page: tokens, attention, predictions."""
    from ..look.page import write_page
    from .models import open_model, tokenizer_of

    loaded = open_model(model, device)
    page = write_page(out, loaded.model, tokenizer_of(loaded, model), text, title=Path(model).name)
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")
