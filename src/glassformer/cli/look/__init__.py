"""``glassformer look``: one command per question, and the page that shows a whole text at once.

    glassformer look "some text" --model DIR             the page (short for: look page "some text" --model DIR)
    glassformer look lens "some text" --model DIR        a table here; --out lens.svg draws it

Each command stands in a file of its own, parses, asks :mod:`glassformer.look`, and prints.
"""

from __future__ import annotations

from typing import Any

import typer

from . import page


class _PageByDefault(typer.core.TyperGroup):
    """What is no command is the text of a page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = next((a for a in args if not a.startswith("-")), None)
        if args and first not in self.commands and args[0] not in ("-h", "--help"):
            args = ["page", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_PageByDefault,
    help="Look inside a model: a page for a text, or one question at a time.",
    epilog='With a text and no command a page is written: glassformer look "some text" --model DIR. A text that is the name of a command: look page "lens".',
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.command("page")(page.page)
