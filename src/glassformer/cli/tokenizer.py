"""``glassformer tokenizer``: train a tokenizer, and see how one cuts a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shorts import Command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from ..text import Piece

app = typer.Typer(help="Train a tokenizer, or see how one cuts a text.", no_args_is_help=True, rich_markup_mode=None)

COLOURS = ("#c6dbef", "#fdd0a2", "#c7e9c0", "#dadaeb")
"""Pale backgrounds under black letters: they read alike on a light and on a dark terminal, and neighbours differ for colour-blind eyes too."""
FEW_COLOURS = ("cyan", "yellow", "green", "bright_magenta")
"""The same where the terminal has sixteen colours only, which would make two of the pale ones alike."""


@app.command("train", cls=Command)
def train(
    files: Annotated[list[Path], typer.Argument(help="Texts in UTF-8, also .gz and .xz.")],
    kind: Annotated[str, typer.Option("--kind", help="bpe, wordpiece, unigram, bytes, characters or words.")] = "bpe",
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", "-v", metavar="N", help="Tokens in all; by default 32000, or all there are for characters and words.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder (or .json file) to write.")] = Path("tokenizer"),
    special: Annotated[list[str] | None, typer.Option("--special", metavar="TOKEN", help="A special token; again for the next one.")] = None,
    role: Annotated[list[str] | None, typer.Option("--role", metavar="ROLE=TOKEN", help="What a special token is for, such as eos='###'.")] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="bpe: how words are cut first: gpt2, cl100k, qwen2 or o200k.")] = "gpt2",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="wordpiece: make everything lower case.")] = False,
    min_frequency: Annotated[int, typer.Option("--min-frequency", metavar="N", help="How often a piece must occur to be learnt.")] = 2,
) -> None:
    """Learn a tokenizer from texts and write its tokenizer.json."""
    import time

    from ..core.errors import TokenizerError
    from ..core.files import trouble
    from ..text import train as learn

    start = time.perf_counter()
    tokenizer = learn(
        kind, files, vocab_size=vocab_size, special=special or [], roles=_roles(role or []), pattern=pattern, lowercase=lowercase, min_frequency=min_frequency
    )
    try:
        path = tokenizer.save(out)
    except OSError as error:
        reason, todo = trouble(error)
        raise TokenizerError(f"The tokenizer could not be written to {out}: {reason}. {todo}.") from error
    print(
        f"wrote {path}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB read, "
        f"{time.perf_counter() - start:.1f} s"
    )
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        print(f"{vocab_size:,} were asked for: the text has no more pieces that occur {min_frequency} times (--min-frequency)")
    print(f"look at it: glassformer tokenizer show {out} 'some text'")


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A tokenizer.json, or the folder with one (a trained model has one too).")],
    text: Annotated[str | None, typer.Argument(help="The text; without it, standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the text from a file.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids only.")] = False,
    no_special: Annotated[bool, typer.Option("--no-special", help="Read the spelling of a special token as ordinary text.")] = False,
) -> None:
    """Print a text in coloured pieces, and under it the id and the place of each.

    Where the output is no terminal, or NO_COLOR is set: the pieces with bars between them, then a table with tabs.
    """
    from ..text import Tokenizer

    tokenizer = Tokenizer.load(path)
    given = _text(text, file)
    if ids:
        print(*tokenizer.encode(given, allow_special=not no_special))
        return
    pieces = tokenizer.offsets(given, allow_special=not no_special)
    special = frozenset(tokenizer.special.values())
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal and not console.no_color:
        _print_coloured(console, pieces, given, special)
    else:
        _print_plain(pieces, given, special)


def _print_coloured(console: Console, pieces: Sequence[Piece], text: str, special: frozenset[int]) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = FEW_COLOURS if console.color_system in ("standard", "windows") else COLOURS
    console.print(coloured(pieces, special, colours), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "piece", "place"):
        table.add_column(name, justify="left" if name == "piece" else "right", overflow="fold")
    for at, piece in enumerate(pieces):
        table.add_row(str(piece.id), Text.assemble((visible(piece.text), _style(at, piece, special, colours))), f"{piece.start}-{piece.end}")
    console.print(table)
    console.print(_summary(pieces, text))


def coloured(pieces: Sequence[Piece], special: frozenset[int] = frozenset(), colours: Sequence[str] = COLOURS) -> Text:
    """The pieces one after the other, each on its own background; line feeds also break the line."""
    from rich.text import Text

    line = Text()
    for at, piece in enumerate(pieces):
        shown = visible(piece.text)
        line.append(shown, style=_style(at, piece, special, colours))
        if "\n" in piece.text:
            line.append("\n")
    return line


def _style(at: int, piece: Piece, special: frozenset[int], colours: Sequence[str]) -> str:
    return "bold #ffffff on #6a3d9a" if piece.id in special else f"black on {colours[at % len(colours)]}"


def _print_plain(pieces: Sequence[Piece], text: str, special: frozenset[int]) -> None:
    print("|".join(visible(piece.text) for piece in pieces))
    print()
    print("id\tpiece\tstart\tend")
    for piece in pieces:
        print(piece.id, visible(piece.text), piece.start, piece.end, sep="\t")
    print(_summary(pieces, text))


def _summary(pieces: Sequence[Piece], text: str) -> str:
    size = len(text.encode("utf-8"))
    return f"{len(pieces)} tokens, {len(text)} characters, {size} bytes" + (f": {size / len(pieces):.2f} bytes per token" if pieces else "")


_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(piece: str) -> str:
    """A piece on one line: line feeds and tabs as signs, whatever would command the terminal as its code point."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in piece)


def _text(text: str | None, file: Path | None) -> str:
    import sys

    from ..core.errors import TokenizerError

    if text is not None and file is not None:
        raise TokenizerError("a text was given and a file too: give one of the two.")
    if text is not None:
        return text
    if file is None and sys.stdin.isatty():
        raise TokenizerError("there is no text to show: give one, such as glassformer tokenizer show DIR 'The car is red', or --file.")
    try:
        return (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise TokenizerError(f"there is no file {file}: check the path.") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{file or 'standard input'} is not UTF-8: byte {error.object[error.start]:02X} at {error.start} is part of no character."
        ) from None


def _roles(given: Sequence[str]) -> dict[str, str]:
    from ..core.errors import TokenizerError

    roles = {}
    for entry in given:
        role, equals, spelling = entry.partition("=")
        if not equals or not spelling:
            raise TokenizerError(f"--role {entry!r} is not of the form ROLE=TOKEN: write --role eos='<|endoftext|>'.")
        roles[role] = spelling
    return roles
