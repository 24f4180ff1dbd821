"""``glassformer look``: one command per question, and the page that shows a whole text at once.

    glassformer look "some text" --model DIR             the page (short for: look page "some text" --model DIR)
    glassformer look lens "some text" --model DIR        a table here; --out lens.svg draws it

Each command stands in a file of its own, parses, asks :mod:`glassformer.look`, and prints.
"""

from __future__ import annotations

from typing import Any

import typer

from . import (
    ablate,
    activations,
    attribute,
    candidates,
    circuits,
    compare,
    embeddings,
    forecast,
    heads,
    journey,
    lens,
    neurons,
    page,
    patch,
    probe,
    redundancy,
    statistics,
    steer,
    syntax,
    tokens,
    trace,
)


class _PageByDefault(typer.core.TyperGroup):
    """What is no command is the text of a page."""

    default = "page"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_PageByDefault,
    help="Look inside a model: a page for a text, or one question at a time.",
    epilog='With a text and no command a page is written: glassformer look "some text" --model DIR. A text that is the name of a command: look page "lens".',
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.command("page")(page.page)
app.command("journey")(journey.journey)
app.command("circuits")(circuits.circuits)
app.command("tokens")(tokens.tokens)
app.command("heads")(heads.heads)
app.command("neurons")(neurons.neurons)
app.add_typer(embeddings.app, name="embeddings")
app.command("probe")(probe.probe)
app.command("lens")(lens.lens)
app.command("candidates")(candidates.candidates)
app.command("compare")(compare.compare)
app.command("syntax")(syntax.syntax)
app.command("redundancy")(redundancy.redundancy)
app.command("forecast")(forecast.forecast)
app.command("activations")(activations.activations)
app.command("statistics")(statistics.statistics)
app.command("attribute")(attribute.attribute)
app.command("ablate")(ablate.ablate)
app.command("patch")(patch.patch)
app.command("steer")(steer.steer)
app.command("trace")(trace.trace)
