"""``glassformer look probe``: what can be read from a model's vectors."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Dtype, Model, Out, Rows, Source, open_loaded, show

WHATS = ("labels", "back", "order", "norm", "mean")


def probe(
    file: Annotated[
        Path, typer.Argument(help="Labels and texts: lines LABEL<TAB>TEXT, or a .conllu file. With --what back, order, norm or mean any text file.")
    ],
    model: Model,
    what: Annotated[
        str, typer.Option("--what", help="labels of the file; back (the token k places back), order, norm or mean, which need no labels.")
    ] = "labels",
    site: Annotated[list[str] | None, typer.Option("--site", help="Where vectors are read, such as 'blocks.*.resid_post'; repeatable.")] = None,
    per: Annotated[str, typer.Option("--per", help="text: one label for each text; word: as many labels, parted by spaces, as the text has words.")] = "text",
    kind: Annotated[str, typer.Option("--kind", help="linear or mlp.")] = "linear",
    numbers: Annotated[bool, typer.Option("--numbers", help="Labels are numbers, and R² is measured.")] = False,
    column: Annotated[str, typer.Option("--column", help="Of a .conllu file: upos, xpos, deprel or another column.")] = "upos",
    folds: Annotated[int, typer.Option("--folds", help="Parts of the texts; each is measured with what was learnt on the others.")] = 5,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Also fit random labels, to see how much the probe itself learns by heart.")] = True,
    pool: Annotated[str | None, typer.Option("--pool", help="With --per text: mean, last or first of the text's vectors.")] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, help="Read at most so many texts.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="With --what back, order, norm, mean: read at most so many tokens.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Of the folds and the control.")] = 0,
    source: Source = None,
    out: Out = None,
    rows: Rows = 40,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Fit probes: how well a label, an earlier token, a place or a length can be read at each layer."""
    from ... import look
    from ...look.subject import choose

    choose(what, WHATS, "thing to read")
    options: dict[str, Any] = {"folds": folds, "seed": seed, "source": source}
    if what != "labels":
        options["tokens"] = tokens
        if site and what in ("back", "order"):
            options["site"] = site
        loaded = open_loaded(model, device, dtype)
        if what == "back":
            show(look.probe_position_back(loaded, file, **options), out, rows)
        elif what == "order":
            show(look.probe_order(loaded, file, **options), out, rows)
        else:
            show(look.probe_norm(loaded, file, target=what, **options), out, rows)
        return
    texts, labels, per = _read(file, per, numbers, column, most)
    options |= {"kind": kind, "per": per, "control": control, "pool": pool}
    show(look.probe(open_loaded(model, device, dtype), texts, labels, site or "blocks.*.resid_post", **options), out, rows)


def _read(file: Path, per: str, numbers: bool, column: str, most: int | None) -> tuple[list[str], list[Any], str]:
    """Texts, labels, and what the labels belong to."""
    from ...core.errors import InputError
    from ...look.conllu import read_conllu
    from ...look.subject import choose
    from ...look.windows import read_file

    if ".conllu" in file.suffixes:
        sentences = list(islice(read_conllu(file), most))
        # A word is what stands between spaces here, so the words are parted by spaces, not written as in the sentence's own text.
        return [" ".join(w.replace(" ", "") for w in s.words) for s in sentences], [list(s.column(column)) for s in sentences], "word"
    choose(per, ("text", "word"), "place of labels")
    texts, labels = [], []
    for number, line in enumerate(read_file(file).split("\n"), 1):
        if not line.strip():
            continue
        label, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise InputError(f"Line {number} of {str(file)!r} is no label and text parted by a tab: {line[:60]!r}.")
        given: list[Any] = label.split() if per == "word" else [label]
        if numbers:
            try:
                given = [float(g) for g in given]
            except ValueError:
                raise InputError(f"Line {number} of {str(file)!r} has the label {label[:40]!r}, which is no number: leave --numbers out.") from None
        texts.append(text)
        labels.append(given if per == "word" else given[0])
    return texts[:most], labels[:most], per
