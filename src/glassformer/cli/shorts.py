"""Letters that mean one thing in every command, and what some of them meant before.

``-n`` is ``--max-new-tokens``, ``-t`` ``--temperature``, ``-s`` ``--site``, ``-k`` ``--top``, ``-w`` ``--words``: that is what the help shows.
A command in which such a letter stood for something else still reads it so, without showing it.
"""

from __future__ import annotations

import copy
from typing import Any

import typer

BEFORE = {
    "steer": {"-n": "--negative", "-s": "--strength"},
    "ablate": {"-t": "--target", "-w": "--what"},
    **{command: {"-t": "--target"} for command in ("compare", "lens", "attribute", "patch", "trace")},
    "verify": {"-t": "--text"},
    "tokenizer train": {"-k": "--kind", "-s": "--special"},
}
"""By command: the letter, and the option that it still is."""


class Command(typer.core.TyperCommand):
    """A command that reads the letters of before, too."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        for letter, option in next((BEFORE[end] for end in BEFORE if f" {ctx.command_path}".endswith(f" {end}")), {}).items():
            param = next(p for p in self.params if option in p.opts)
            twin = copy.copy(param)
            twin.opts = [letter]
            twin.add_to_parser(parser, ctx)
        return parser
