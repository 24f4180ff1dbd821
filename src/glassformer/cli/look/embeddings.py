"""``glassformer look embeddings``: neighbours, analogies, axes, and two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Model, Out, Rows, open_loaded, show

app = typer.Typer(help="Which words lie near which in a model's tables.", rich_markup_mode=None, no_args_is_help=True)

Table = Annotated[str, typer.Option("--table", help="input (the embedding) or output (what the read-out multiplies by).")]
Count = Annotated[int, typer.Option("--top", "-k", min=1, help="How many tokens are shown.")]
Centre = Annotated[bool, typer.Option("--centre", help="Subtract the mean of the table first.")]


@app.command("nearest")
def nearest(
    word: Annotated[str, typer.Argument(help="A word that is one token; with its space if it has one ('\" king\"').")],
    model: Model,
    top: Count = 10,
    table: Table = "input",
    by: Annotated[str, typer.Option("--by", help="cosine, euclid or dot.")] = "cosine",
    centre: Centre = False,
    text: Annotated[
        str | None, typer.Option("--text", help="A text in which the word stands: compares its vector there with those of --file's tokens.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="With --text: the text file whose tokens are compared.")] = None,
    site: Annotated[str, typer.Option("--site", help="With --text: where vectors are taken.")] = "resid_final",
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The tokens nearest to a word, in a table or (with --text and --file) in context."""
    from ... import look
    from ...core.errors import InputError

    if (text is None) != (file is None):
        raise InputError("--text and --file go together: the word is taken from the text, and compared with the tokens of the file.")
    loaded = open_loaded(model, device, dtype)
    if text is not None:
        show(look.nearest_in_context(loaded, text, word, file, site=site, k=top, by=by), out, rows)
        return
    show(look.nearest(loaded, word, top, table=table, by=by, centre=centre), out, rows)


@app.command("analogy")
def analogy(
    a: Annotated[str, typer.Argument(help="king")],
    b: Annotated[str, typer.Argument(help="less man")],
    c: Annotated[str, typer.Argument(help="plus woman")],
    model: Model,
    top: Count = 5,
    table: Table = "input",
    centre: Centre = False,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The tokens nearest to A - B + C, with the three left out and with them allowed."""
    from ... import look

    show(look.analogy(open_loaded(model, device, dtype), a, b, c, top, table=table, centre=centre), out, rows)


@app.command("analogies")
def analogies(
    file: Annotated[Path, typer.Argument(help="Questions: lines of four words (man king woman queen); ': name' begins a category.")],
    model: Model,
    table: Table = "input",
    centre: Centre = False,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The share of a file's analogy questions answered right, beside what simpler rules reach."""
    from ... import look

    show(look.analogies(open_loaded(model, device, dtype), file, table=table, centre=centre), out, rows)


@app.command("axis")
def axis(
    file: Annotated[Path, typer.Argument(help="Pairs: lines of two words that differ in one feature (small smaller), parted by a space or a tab.")],
    model: Model,
    table: Table = "input",
    folds: Annotated[int, typer.Option("--folds", help="Parts of the pairs; each is measured with what was learnt on the others.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the folds and of the random rotations.")] = 0,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Whether what the second words of pairs have lies along one coordinate, or along a direction."""
    from ... import look
    from ...core.errors import InputError
    from ...look.windows import read_file

    lines = [line for line in read_file(file).split("\n") if line.strip()]
    pairs = [tuple(line.split("\t") if "\t" in line else line.split()) for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise InputError(f"Pair {number} of {str(file)!r} has {len(pair)} words ({' '.join(pair)}), but a pair has 2: small smaller.")
    show(look.direction_against_axis(open_loaded(model, device, dtype), pairs, table=table, folds=folds, seed=seed), out, rows)  # type: ignore[arg-type]


@app.command("align")
def align(
    model: Model,
    other: Annotated[str, typer.Option("--other", metavar="MODEL", help="The model to compare with.")],
    table: Table = "input",
    anchors: Annotated[int | None, typer.Option("--anchors", help="Anchor words of relative representations; by default as many as the width.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the words that are held out.")] = 0,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Whether the words that two models share lie in the same arrangement."""
    from ... import look

    first, second = open_loaded(model, device, dtype), open_loaded(other, device, dtype)
    show(look.align(first, second, table=table, anchors=anchors, seed=seed), out, rows)
