"""What the commands of ``glassformer look`` have in common: how a model is named, and where an answer goes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.errors import InputError

if TYPE_CHECKING:
    from ...core.tap import Tap
    from ...look.result import Result
    from ...weights.own import Loaded

Looked = Annotated[str, typer.Argument(help="The text to look at.")]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")
]


def _check_places(paths: list[Path] | None) -> list[Path] | None:
    """``--out`` is refused before anything is computed for it."""
    if paths:
        from ...look.result import check_place

        for path in paths:
            check_place(path)
    return paths


Out = Annotated[
    list[Path] | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        callback=_check_places,
        help="Write the answer too; the ending says as what: .png .svg .pdf .html .json .csv. Repeatable.",
    ),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of the table that are printed; files hold all.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")]
Source = Annotated[str | None, typer.Option("--source", metavar="TEXT", help="What an encoder-decoder's encoder reads.")]
Position = Annotated[str | None, typer.Option("--position", metavar="N_OR_WORD", help="A position, counted from 0 (-1 is the last), or a word of the text.")]
Target = Annotated[
    list[str] | None,
    typer.Option("--target", metavar="TOKEN", help="The token that is asked about; twice for the difference of two. By default the model's own choice."),
]
Edits = Annotated[Path | None, typer.Option("--edits", metavar="FILE", help="Edits that hold meanwhile: a .json or .safetensors of Intervention.save.")]


def edits_of(path: Path | None, model: Any) -> Tap | None:
    """The edits of ``--edits`` as a tap, checked against the model."""
    if path is None:
        return None
    from ...core.errors import GlassformerError
    from ...look.edits import load_edits

    edits = load_edits(path)
    try:
        return edits.tap(model)
    except GlassformerError as error:
        raise type(error)(f"The edits of {path.name} do not fit this model. {error}") from error


def open_loaded(model: str, device: str | None = None, dtype: str | None = None) -> Loaded:
    """The model and its tokenizer, ready to run."""
    from ..models import open_model

    return open_model(model, device, dtype)


def position_of(given: str | None) -> int | str | None:
    """``"3"`` and ``"-1"`` are numbers, all else is a word of the text."""
    return int(given) if given is not None and re.fullmatch(r"-?[0-9]+", given) else given


def target_of(given: list[str] | None) -> str | tuple[str, str] | None:
    """No token, one, or two whose logits are subtracted. Raises :class:`InputError` for more."""
    if not given:
        return None
    if len(given) > 2:
        raise InputError(f"--target was given {len(given)} times, but a target is one token, or two whose logits are subtracted.")
    return given[0] if len(given) == 1 else (given[0], given[1])


def show(result: Result, out: list[Path] | None = None, rows: int = 40) -> None:
    """Write the answer wherever ``--out`` says, and print it as a table: in this order, so that a reader who closes the pipe early costs no file."""
    from rich.console import Console

    written = [result.save(path) for path in out or ()]
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=160, color_system=None)
    console.print(result.table(rows))
    for path in written:
        print(f"wrote {path}")
