"""``glassformer convert``: a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import WeightsError

FORMATS = ("hf", "gguf", "own")


def convert(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write, or a file that ends in .gguf.")],
    to: Annotated[str | None, typer.Option("--to", metavar="FORMAT", help="hf (config.json and safetensors), gguf, or own; by default as TARGET ends.")] = None,
    kind: Annotated[str, typer.Option("--type", help="Of a .gguf file's matrices: F32, F16, BF16, Q8_0 or Q4_0.")] = "F16",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of a folder's tensors: float32, bfloat16, float16; by default as the source has them.")] = None,
) -> None:
    """Write a model in another format: tokenizer, chat template and generation settings travel along."""
    from ..weights import export_gguf, export_hf, save
    from .models import open_model

    form = to or ("gguf" if target.suffix == ".gguf" else "hf")
    if form not in FORMATS:
        raise WeightsError(f"--to {form} is no format that is known here: it is one of {', '.join(FORMATS)}.")
    loaded = open_model(source, "cpu", dtype)
    settings = {k: loaded.extra.get(k) for k in ("config", "generation")}
    if form == "gguf":
        written = export_gguf(loaded.model, target, type=kind, tokenizer=loaded.tokenizer, settings=settings["config"])
    elif form == "hf":
        written = export_hf(loaded.model, target, tokenizer=loaded.tokenizer, config=settings["config"], generation=settings["generation"])
    else:
        written = save(loaded.model, target, tokenizer=loaded.tokenizer, extra=loaded.extra)
    size = sum(p.stat().st_size for p in written.rglob("*") if p.is_file()) if written.is_dir() else written.stat().st_size
    print(f"wrote {written} ({size / 1e6:,.1f} MB)")
