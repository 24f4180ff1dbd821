"""``glassformer look``: one command per question, and the page that shows a whole text at once.

    glassformer look "some text" --model DIR             the page (short for: look page "some text" --model DIR)
    glassformer look lens "some text" --model DIR        a table here; --out lens.svg draws it

Each command stands in a file of its own, parses, asks :mod:`glassformer.look`, and prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ...core.errors import InputError, did_you_mean
from ..shorts import Command
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
    sampling,
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
            if _is_word(args[0]) and not any(_names_model(a) or a in ("-h", "--help") for a in args):
                raise InputError(
                    f"{args[0]!r} is no command of look, and a text needs a model: glassformer look TEXT --model RUN, or one of {', '.join(self.commands)}."
                    + did_you_mean(args[0], self.commands)
                )
            if _is_word(args[0]) and len(args) > 1 and not args[1].startswith("-"):  # a page has one text
                raise InputError(
                    f"{args[0]!r} is no command of look.{did_you_mean(args[0], self.commands)} Of a text of several words a page takes one argument: quote it."
                )
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def _is_word(text: str) -> bool:
    """Whether it may have been meant as a command."""
    return text.replace("-", "").replace("_", "").isalnum() and not text.startswith("-")


def _names_model(option: str) -> bool:
    return option.startswith(("--model", "-m"))


app = typer.Typer(
    cls=_PageByDefault,
    help="Look inside a model: a page for a text, or one question at a time.",
    epilog='With a text and no command a page is written: glassformer look "some text" --model DIR. A text that is the name of a command: look page "lens".',
    rich_markup_mode=None,
    no_args_is_help=True,
)
COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (  # in the order of docs/look
    ("page", page.page, "One HTML page: tokens, every head, every layer's guess."),
    ("tokens", tokens.tokens, "Why a tokenizer cuts a text as it does."),
    ("journey", journey.journey, "Every step from the text to the next token."),
    ("candidates", candidates.candidates, "The most probable next tokens."),
    ("sampling", sampling.sampling, "What a sampler leaves of the next token's distribution."),
    ("compare", compare.compare, "What another prompt changes, and what carries it."),
    ("lens", lens.lens, "What the model would say at each depth."),
    ("attribute", attribute.attribute, "Which parts or tokens wrote a logit."),
    ("ablate", ablate.ablate, "What changes when a part is taken away."),
    ("patch", patch.patch, "What changes when a value comes from another run."),
    ("trace", trace.trace, "Where a fact is restored after noise."),
    ("steer", steer.steer, "Push the text along a direction."),
    ("heads", heads.heads, "What each head does: roles and their scores."),
    ("redundancy", redundancy.redundancy, "Which heads are alike, which can go."),
    ("syntax", syntax.syntax, "Which heads follow grammatical relations."),
    ("circuits", circuits.circuits, "What a head's matrices say, without a text."),
    ("neurons", neurons.neurons, "What single hidden units answer to."),
    ("probe", probe.probe, "What can be read from the vectors at a site."),
    ("activations", activations.activations, "Write a corpus' activations to disk."),
    ("statistics", statistics.statistics, "Mean, variance, outliers of sites."),
    ("forecast", forecast.forecast, "How much memory a recording will take."),
)
for _name, _run, _short in COMMANDS:
    app.command(_name, short_help=_short, cls=Command)(_run)
app.add_typer(embeddings.app, name="embeddings", short_help="Which words lie near which.")
