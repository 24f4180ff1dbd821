"""A recipe: everything that decides a run, in one Spec.

    recipe = Recipe(
        model=preset("tiny"),
        data="books/",                                   a file, a folder, several, or a text of the package
        tokenizer=TrainTokenizer("bpe", vocab_size=4_096),
        optimizer=Muon(), schedule=Cosine(), seconds=100,
    )
    trainer = recipe.trainer("runs/books")
    trainer.run()

    text ──► tokenizer ──► shards ──► training part ──► Trainer ──► runs/books
                                 └──► validation part ──┘

The run folder keeps the recipe itself (``recipe.yaml``), so that the run can be repeated and resumed from it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from torch import nn

from ..core.errors import CheckpointError, DataError, SpecError, TokenizerError, did_you_mean
from ..core.spec import Spec, part
from ..core.tap import Tap
from ..infer import generate
from ..models import Decoder
from ..tasks import NextToken, Task
from . import data as text_data
from .data import OtherText, TokenData
from .loop import Trainer
from .optimise import AdamW, Optimizer
from .run import FILE as RUN
from .schedule import Cosine, Schedule
from .texts import read_texts

if TYPE_CHECKING:
    from ..text import Tokenizer

RECIPE, SHARDS = "recipe.yaml", "data"
SAMPLE_TOKENS = 160
PROMPT_TOKENS = 24


class TokenizerChoice(Spec):
    """Base: where the tokenizer of a run comes from."""

    @abstractmethod
    def make(self, texts: Callable[[], list[str]]) -> Tokenizer:
        """The tokenizer; ``texts()`` reads the documents of the run."""


@part
class TrainTokenizer(TokenizerChoice):
    """Train one on the text of the run. ``kind``: ``"bpe"``, ``"unigram"``, ``"wordpiece"``, ``"bytes"``, ``"characters"``, ``"words"``;
    ``vocab_size``: with the special tokens (None: as the kind has it); ``special``: tokens that stand for themselves."""

    kind: str = "bpe"
    vocab_size: int | None = None
    special: tuple[str, ...] = ()

    def make(self, texts: Callable[[], list[str]]) -> Tokenizer:
        from .. import text

        return text.train(self.kind, texts=texts(), vocab_size=self.vocab_size, special=self.special)


@part
class LoadTokenizer(TokenizerChoice):
    """One that was trained before: a ``tokenizer.json`` or a folder with one."""

    path: str

    def make(self, texts: Callable[[], list[str]]) -> Tokenizer:
        from ..text import Tokenizer

        if not Path(self.path).exists():
            raise TokenizerError(f"There is no tokenizer at {self.path!r}: give a tokenizer.json, a folder with one, or TrainTokenizer('bpe', 4096).")
        return Tokenizer.load(self.path)


@part
class Recipe(Spec):
    """Everything that decides a run.

    ``model``'s vocabulary is set to the tokenizer's when the run starts. ``validation``: the share of the text, from its end,
    that is not learnt from (0: none). ``sample``: a prompt that is continued ten times in the run (or every ``sample_every``
    steps), to see it learn. Budget: ``steps`` or ``seconds``, whichever ends first. The other fields are those of
    :class:`~glassformer.train.loop.Trainer`.
    """

    model: Decoder
    data: str | tuple[str, ...] = "tinyshakespeare"
    tokenizer: TokenizerChoice = TrainTokenizer("characters")
    task: Task = NextToken()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine()
    steps: int | None = None
    seconds: float | None = None
    batch: int = 32
    context: int = 128
    accumulate: int = 1
    documents: bool = False
    repeats: float = 0.0
    validation: float = 0.1
    clip: float | None = 1.0
    dtype: str = "auto"
    compile: bool | str = "auto"
    seed: int = 0
    evaluate_every: int | None = None
    evaluate_windows: int = 200
    sample: str | None = None
    sample_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise SpecError("A recipe needs a budget: steps=2000, seconds=100, or both.")
        if (self.steps is not None and not self.steps >= 1) or (self.seconds is not None and not self.seconds > 0):
            raise SpecError(f"A budget is above zero; steps={self.steps} and seconds={self.seconds} were given.")
        if not 0 <= self.seed < 2**63:
            raise SpecError(f"seed is a whole number from 0 to 2^63 - 1; {self.seed} was given.")
        if not 0 <= self.validation < 1:
            raise SpecError(f"validation is a share of the text, from 0 up to but not including 1; {self.validation} was given.")

    def trainer(
        self,
        folder: str | Path,
        *,
        device: str | None = None,
        resume: bool = False,
        progress: bool | None = None,
        tap: Callable[[nn.Module], Tap | None] | None = None,
    ) -> Trainer:
        """Prepare the text and build the model; the run is kept in ``folder``. ``tap`` makes of the model what sees or edits every call of it, samples too.

        Raises what these steps raise.
        """
        folder = Path(folder)
        _check_folder(folder, resume)
        data = self._prepare_in(folder)
        train, validation = data.split(self.validation) if self.validation else (data, None)
        assert data.tokenizer is not None  # prepare gave it one
        tokenizer = data.tokenizer
        prompt = None if self.sample is None else prompt_for(self.sample, data)
        model = self.model.replace(vocab_size=tokenizer.vocab_size).build(device=device, seed=self.seed)
        seen = None if tap is None else tap(model)
        trainer = Trainer(
            model,
            self.task,
            train,
            optimizer=self.optimizer,
            schedule=self.schedule,
            steps=self.steps,
            seconds=self.seconds,
            batch=self.batch,
            context=self.context,
            accumulate=self.accumulate,
            documents=self.documents,
            repeats=self.repeats,
            clip=self.clip,
            dtype=self.dtype,
            compile=self.compile,
            seed=self.seed,
            folder=folder,
            resume=resume,
            validation=validation,
            evaluate_every=self.evaluate_every,
            evaluate_windows=self.evaluate_windows,
            sample=None if prompt is None else _sampler(tokenizer, prompt, seen),
            sample_every=self.sample_every,
            save_every=self.save_every,
            keep=self.keep,
            tensorboard=self.tensorboard,
            tokenizer=tokenizer,
            progress=progress,
            tap=seen,
        )
        if prompt != self.sample:
            trainer.notes.append(f"The sample prompt {self.sample!r} has what this text has not; samples begin with the text's own {prompt!r}.")
        kept = self.replace(data=tuple(str(p.resolve()) if (p := Path(d)).exists() else d for d in self.texts))
        (folder / RECIPE).write_text(yaml.safe_dump(kept.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        return trainer

    @property
    def texts(self) -> tuple[str, ...]:
        """The files and folders of the data, as written."""
        return (self.data,) if isinstance(self.data, str) else self.data

    def prepare(self, out: str | Path) -> TokenData:
        """The text as token shards in ``out``; shards and a tokenizer that are already there are used again if they are of the same choices.

        Raises :class:`OtherText` if ``out`` holds those of another text or tokenizer, which stay as they are.
        """
        paths, out = [find_text(name) for name in self.texts], Path(out)
        wanted = json.loads(json.dumps(self.tokenizer.to_dict()))
        made_for = text_data.made_for(out)
        if made_for is not None and made_for != wanted:
            raise OtherText(f"{out} already holds shards of the tokenizer {made_for}, but {wanted} is asked for: choose another folder.")
        if (out / "tokenizer.json").exists():
            tokenizer = LoadTokenizer(str(out)).make(list)
        else:
            tokenizer = self.tokenizer.make(lambda: read_texts(paths))
        return text_data.prepare(paths, tokenizer, out, choice=wanted)

    def _prepare_in(self, run: Path) -> TokenData:
        """The shards of a run. Those of another choice make room, once the new ones are there, unless a run was begun with them: :class:`CheckpointError`."""
        shards, fresh = run / SHARDS, run / f".{SHARDS}.new"
        try:
            return self.prepare(shards)
        except OtherText as error:
            if (run / RUN).exists():
                raise CheckpointError(
                    f"The run in {run} was begun with another text or tokenizer than {', '.join(self.texts)} and {self.tokenizer!r}: "
                    "go on with what it has, or start in a new folder."
                ) from error
        shutil.rmtree(fresh, ignore_errors=True)
        self.prepare(fresh)
        shutil.rmtree(shards)
        fresh.rename(shards)
        return TokenData.open(shards)


def find_text(name: str) -> Path:
    """A file or folder, or a text that comes with the package (``"tinyshakespeare"``). Raises :class:`DataError`."""
    if Path(name).exists():
        return Path(name)
    known = built_in_texts()
    if name not in known:
        raise DataError(f"There is no file or folder {name!r}.{did_you_mean(name, known)} Texts that come with the package: {', '.join(known)}.")
    return known[name]


def built_in_texts() -> dict[str, Path]:
    """The texts that come with the package, by name."""
    return {p.name: p for p in sorted(Path(str(resources.files("glassformer"))).joinpath("data").iterdir()) if p.is_dir()}


def _check_folder(folder: Path, resume: bool) -> None:
    """Before anything is read or written: is this folder free, or a run to go on with?"""
    if (folder / RUN).exists() and not resume:
        raise CheckpointError(f"{folder} already holds a run: go on with it (--resume) or choose another folder (--out).")
    if resume and not (folder / RUN).exists():
        raise CheckpointError(f"There is no run to resume in {folder}: check the folder, or leave out --resume.")


def prompt_for(wanted: str | None, data: TokenData) -> str:
    """``wanted`` if the tokenizer of the data knows all of it, else the first words of the text."""
    assert data.tokenizer is not None
    with contextlib.suppress(TokenizerError):
        if wanted:
            data.tokenizer.encode(wanted)
            return wanted
    ids = data.read(np.zeros(1, dtype=np.int64), min(len(data), PROMPT_TOKENS))[0].tolist()
    words = data.tokenizer.decode(ids).strip().split("\n")[0]
    return " ".join(words.split(" ")[:3]) or data.tokenizer.decode(ids)


def _sampler(tokenizer: Tokenizer, prompt: str, tap: Tap | None) -> Callable[[nn.Module], str]:
    """A function that continues ``prompt``; the same seed each time, so that what changes is the model."""

    def sample(model: nn.Module) -> str:
        made = generate(model, prompt, tokenizer=tokenizer, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=40, seed=0, tap=tap)
        return prompt + (made.text or "")

    return sample
