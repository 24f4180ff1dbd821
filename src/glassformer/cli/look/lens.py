"""``glassformer look lens``: what the read-out makes of every depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.errors import InputError, WeightsError
from .common import Device, Dtype, Edits, Looked, Model, Out, Position, Rows, Source, Target, edits_of, open_loaded, position_of, show, target_of

if TYPE_CHECKING:
    from ...look.tuned import TunedLens


def lens(
    text: Looked,
    model: Model,
    of: Annotated[
        str, typer.Option("--of", help="What is read: resid_post, resid_mid (streams), attn, cross or ffn (what a sublayer adds alone).")
    ] = "resid_post",
    norm: Annotated[str, typer.Option("--norm", help="For attn, cross, ffn: own (a norm of their own) or final (at the scale of the final stream).")] = "own",
    words: Annotated[
        list[str] | None, typer.Option("--words", "-w", metavar="TOKEN", help="A token whose rank and probability are followed. Repeatable.")
    ] = None,
    position: Position = None,
    target: Target = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens that are kept at each place.")] = 5,
    tune: Annotated[
        Path | None, typer.Option("--tune", metavar="TEXTFILE", help="Use a tuned lens; if none for this model is saved, train one on this file.")
    ] = None,
    tuned: Annotated[Path | None, typer.Option("--tuned", metavar="DIR", help="Where the tuned lens is kept; with --tune by default beside the model.")] = None,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
    edits: Edits = None,
) -> None:
    """Read the stream at every depth with the model's own final norm and read-out (logit lens, or tuned lens)."""
    from ...look.lenses import logit_lens

    loaded = open_loaded(model, device, dtype)
    maps = _tuned(loaded, model, tune, tuned)
    found = logit_lens(
        loaded,
        text,
        of=of,
        norm=norm,
        words=words or (),
        positions=position_of(position),
        target=target_of(target),
        top=top,
        tuned=maps,
        source=source,
        tap=edits_of(edits, loaded),
    )
    show(found, out, rows)


def _tuned(loaded: Any, model: str, tune: Path | None, folder: Path | None) -> TunedLens | None:
    """The lens that was saved for this model, or a new one."""
    if tune is None and folder is None:
        return None
    from ...look.tuned import FILES, load_tuned_lens, tuned_lens

    if folder is None:
        folder = Path(model)
        if not folder.is_dir():
            raise InputError(f"A tuned lens is kept beside the model, but {model!r} is no folder: say where with --tuned DIR.")
    if tune is None:
        return load_tuned_lens(folder, loaded)
    if not tune.is_file():
        raise InputError(f"{str(tune)!r} is no file: --tune reads the text that a lens is trained on, also where one is saved already.")
    if (folder / FILES[1]).exists():
        try:
            return load_tuned_lens(folder, loaded)
        except WeightsError as error:
            print(f"note: a new lens is trained, for the one in {folder} cannot be used: {error}")
    try:
        text = tune.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(tune)!r} cannot be read as text ({error}): give a text file in UTF-8.") from error
    made = tuned_lens(loaded, text)
    made.save(folder)
    show(made)
    print(f"wrote {', '.join(FILES)} to {folder}")
    return made
