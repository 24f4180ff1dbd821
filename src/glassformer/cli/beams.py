"""The options of ``glassformer generate`` that concern a search, and how it prints what the search found."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import sampling

if TYPE_CHECKING:
    from ..infer.search import BeamTree


def _check_trees(places: list[str] | None) -> list[str] | None:
    """``--beam-tree`` is refused before anything is computed for it."""
    if places:
        from ..infer.search.tree import check_place

        for place in places:
            if place != "-":
                check_place(place)
    return places


def _read_early(text: str | None) -> str | None:
    if text not in (None, "yes", "no", "never"):
        raise typer.BadParameter(f"{text!r} is none of yes, no, never.")
    return text


NumBeams = Annotated[int | None, typer.Option("--num-beams", min=1, help="Search for the most probable text, with so many beginnings kept at every step.")]
NumReturn = Annotated[
    int | None, typer.Option("--num-return-sequences", metavar="N", help="Print the N best texts of the search; by default all that are kept.")
]
LengthPenalty = Annotated[
    float | None, typer.Option("--length-penalty", help="Divide scores by the length to this power: above 0 favours long texts, below 0 short ones; 1.")
]
EarlyStopping = Annotated[
    str | None,
    typer.Option(
        "--early-stopping", metavar="yes|no|never", callback=_read_early, help="End the search as soon as it has enough texts; no. never: once for certain."
    ),
]
CoveragePenalty = Annotated[
    float | None, typer.Option("--coverage-penalty", help="How much it costs to leave parts of the source unattended (encoder-decoders).")
]
NumGroups = Annotated[int | None, typer.Option("--num-beam-groups", help="Divide the beams into groups that keep apart.")]
DiversityPenalty = Annotated[float | None, typer.Option("--diversity-penalty", help="What a token costs that another group has chosen at the same step.")]
ForceWord = Annotated[list[str] | None, typer.Option("--force-word", metavar="TEXT", help="A text that must come. Repeatable.")]
BeamTrees = Annotated[
    list[str] | None,
    typer.Option(
        "--beam-tree",
        metavar="FILE",
        callback=_check_trees,
        help="Write every hypothesis of the search, and why it died: a page (.html) or its numbers (.json); '-' prints a tree. Repeatable.",
    ),
]


def said(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the command that concern a search and were said, under the names of ``generate``."""
    plain = ("num_beams", "num_return_sequences", "length_penalty", "coverage_penalty", "num_beam_groups", "diversity_penalty")
    found = {name: options[name] for name in plain if options[name] is not None}
    if options["force_word"]:
        found["force_words"] = options["force_word"]
    if options["early_stopping"] is not None:
        found["early_stopping"] = {"yes": True, "no": False, "never": "never"}[options["early_stopping"]]
    return found | ({"beam_tree": True} if options["beam_tree"] else {})


def settings(known: dict[str, Any], given: dict[str, Any], more: list[str] | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Sampler and search: what was said; where nothing was, what came with the checkpoint. Nothing is drawn unless something is said about drawing."""
    came: dict[str, Any] = {name: known[name] for name in sampling.ON_TOKENS if isinstance(known.get(name), int | float)}
    if isinstance(words := known.get("bad_words_ids"), list):
        came["bad_words_ids"] = words
    if isinstance(power := known.get("length_penalty"), int | float) and not isinstance(power, bool):
        came["length_penalty"] = float(power)
    if known.get("early_stopping") in (True, False, "never"):
        came["early_stopping"] = known["early_stopping"]
    return came | sampling.only_said(given, more, sampling.BEYOND) | asked


def run(model: Any, prompt: Any, beginning: str, places: list[str] | None, **options: Any) -> None:
    """Search, print the n best with their scores (one alone as a plain text behind ``beginning``), and the tree wherever ``--beam-tree`` says."""
    from ..core.errors import SamplerError
    from ..infer import generate

    if options.pop("logprobs"):
        raise SamplerError("--logprobs says what stood beside each token drawn; for a search --beam-tree - shows every hypothesis. Leave one of them out.")
    found = generate(model, prompt, **options)
    if len(found.beams) <= 1:
        print(f"{beginning}{found}")
    for i, beam in enumerate(found.beams if len(found.beams) > 1 else (), 1):
        print(f"{i:>2}  {beam.score:.4f}  {beam.finish_reason:<6}  {beginning}{beam}")
    for place in places or ():
        assert found.tree is not None
        if place == "-":
            _print(found.tree)
        else:
            print(f"wrote {found.tree.save(place)}", file=sys.stderr)


def _print(tree: BeamTree) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=160, color_system=None)
    print()
    console.print(tree)
