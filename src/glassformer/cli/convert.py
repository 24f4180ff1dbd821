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
    kind: Annotated[str | None, typer.Option("--type", help="Of a .gguf file's matrices: F32, F16, BF16, Q8_0 or Q4_0; by default F16 (BF16 of BF16).")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of a folder's tensors: float32, bfloat16, float16; by default as the source has them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Write a model in another format. Tokenizer and chat template travel along; generation settings between folders (a .gguf file has the end tokens)."""
    from ..weights import export_gguf, export_hf, open, save
    from .models import is_checkpoint, open_model

    form = to or ("gguf" if target.suffix == ".gguf" else "hf")
    if form not in FORMATS:
        raise WeightsError(f"--to {form} is no format that is known here: it is one of {', '.join(FORMATS)}.")
    if form == "gguf" and dtype is not None:
        raise WeightsError("A .gguf file's numbers are chosen by --type (F16, BF16, Q8_0, ...), those of a folder by --dtype: leave --dtype out.")
    if form != "gguf" and kind is not None:
        raise WeightsError("--type is of .gguf files; the numbers of a folder are chosen by --dtype: leave --type out, or give a TARGET that ends in .gguf.")
    if target.exists() and (target.is_file() or any(target.iterdir())) and not force:
        raise WeightsError(f"{target} exists already, and what is in it would be lost: choose another TARGET, or add --force.")
    if dtype is None and is_checkpoint(source) and (opened := open(source)).family is not None:
        dtype = str(opened.stored_dtype).removeprefix("torch.")  # as it is stored, and not as it is best computed with
    loaded = open_model(source, "cpu", dtype)
    if form == "gguf":
        written = export_gguf(loaded.model, target, type=kind or ("BF16" if dtype == "bfloat16" else "F16"), tokenizer=loaded.tokenizer)
    elif form == "hf":
        written = export_hf(loaded.model, target, tokenizer=loaded.tokenizer)
    else:
        written = save(loaded.model, target, tokenizer=loaded.tokenizer, extra=loaded.extra)
    size = sum(p.stat().st_size for p in written.rglob("*") if p.is_file()) if written.is_dir() else written.stat().st_size
    print(f"wrote {written} ({size / 1e6:,.1f} MB)")
