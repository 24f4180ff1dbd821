"""``glassformer train``: run a recipe."""

from __future__ import annotations

import shlex
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .look.common import Edits

if TYPE_CHECKING:
    from ..train import Trainer
    from ..train.recipe import Recipe

STOPPED = {"SIGINT": 130, "SIGTERM": 143}


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe (shakespeare_char), a .py or .yaml file, or the folder of a run.")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe: --set optimizer.lr=3e-4. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where the run is kept; by default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Stop after so many steps.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Stop after so many seconds; the schedule follows the clock.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE_OR_FOLDER", help="The text to learn from. Repeatable.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    edits: Edits = None,
) -> None:
    """Train a model by a recipe and keep the run in a folder."""
    from ..core.errors import CheckpointError, RecipeError, TrainingError
    from ..look.edits import load_edits
    from .models import pick_device
    from .recipe import PYTHON, built_in, read_recipe, read_run

    if resume and not Path(recipe).exists() and recipe not in built_in():
        raise RecipeError(f"There is no run in {recipe!r} to go on with, and no recipe of that name: check the folder.")
    if Path(recipe).is_dir():  # a run: its own recipe, in its own folder
        out, found = out or Path(recipe), read_run(Path(recipe), sets or ())
    else:
        found = read_recipe(recipe, sets or ())
    made = None if edits is None else load_edits(edits)  # before anything is written
    chosen = _with_options(found, steps, seconds, data)
    usual = Path("runs") / Path(recipe).stem
    folder = out or (usual if resume else _free_folder(usual))
    own = " (the recipe's own text; --data takes yours)" if recipe in built_in() and not data and chosen.texts == read_recipe(recipe).texts else ""
    print(f"{Path(recipe).stem}: {', '.join(chosen.texts)}{own} -> {folder}", file=sys.stderr)
    try:
        trainer = chosen.trainer(folder, device=pick_device(device), resume=resume, progress=True, tap=None if made is None else made.tap)
    except (TrainingError, CheckpointError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        # before the first step, and not the disk's doing: the command asks for what cannot be
        raise RecipeError(str(error)) from error
    print(_described(trainer), file=sys.stderr)
    if resume:
        print(f"going on from step {trainer.number:,}", file=sys.stderr)
    python = Path(recipe) / PYTHON if Path(recipe).is_dir() else Path(recipe)
    if python.suffix == ".py" and python.is_file() and python.resolve() != (folder / PYTHON).resolve():  # it may register parts of its own
        shutil.copyfile(python, folder / PYTHON)
    trainer.run()
    _report(trainer, folder, chosen.sample)
    if trainer.stopped:
        raise typer.Exit(STOPPED.get(trainer.stopped, 1))


def _described(trainer: Trainer) -> str:
    """What is trained, where, and for how long, in one line."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    budget = " or ".join(x for x in (f"{trainer.steps:,} steps" if trainer.steps else "", f"{trainer.seconds:g} s" if trainer.seconds else "") if x)
    tokens = f"{trainer.batch * trainer.accumulate} x {trainer.context} tokens a step"
    return f"{parameters:,} parameters on {trainer.device} in {trainer.dtype}, {tokens}, for {budget}"


def _with_options(recipe: Recipe, steps: int | None, seconds: float | None, data: list[str] | None) -> Recipe:
    """The options that say the same as a --set; a new budget replaces the old one, of either kind."""
    if steps is not None or seconds is not None:
        recipe = recipe.replace(steps=steps, seconds=seconds)
    return recipe.replace(data=tuple(data)) if data else recipe


def _free_folder(wanted: Path) -> Path:
    """``runs/name``, or the first of ``runs/name-2``, ``runs/name-3``, … that is not there yet."""
    return next(p for n in count(1) if not (p := wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")).exists())


def _report(trainer: Trainer, folder: Path, sample: str | None) -> None:
    """What came out, where it is, and what to type next."""
    last = trainer.last
    found = "" if last is None or last.validation is None else f"; on text it has not seen: {last.validation}"
    if trainer.stopped:
        print(f"stopped after step {trainer.number:,} and saved. Go on with: glassformer train {folder} --resume")
        return
    print(f"trained {trainer.number:,} steps in {trainer.elapsed:.0f} s{found}")
    print(f"saved in {folder} (loss curve: {folder / 'loss.png'})")
    from ..train.data import TokenData
    from ..train.recipe import prompt_for

    assert isinstance(trainer.data, TokenData)  # a recipe's are
    prompt, where = shlex.quote(prompt_for(sample, trainer.data)), shlex.quote(str(folder))
    print(f"next: glassformer generate {where} {prompt}\n      glassformer look {prompt} --model {where}")
