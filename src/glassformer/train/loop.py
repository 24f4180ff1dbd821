"""The loop: a trainer is an iterator of steps, and what is done with each step is the caller's.

    trainer = Trainer(model, NextToken(), data, optimizer=AdamW(3e-4), schedule=Cosine(warmup=200), steps=5_000, folder="run")
    for step in trainer:
        if step.every(100):
            print(step.loss, step.tokens_per_second)

One step:

    loader ──► micro-batches ──► loss sums ──► backward ──► gradients / count ──► norm ──► clip ──► optimiser
               (accumulate)                                                       └─ finite? else NotFinite

With a ``folder`` the run survives everything: ``Trainer(…, folder="run", resume=True)`` goes on from the newest
whole checkpoint. With a budget of steps it has the same bits that an unbroken run would have had (same machine, versions
and threads); with a budget of seconds it goes on, but the learning rate follows the clock, which never runs the same twice.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glassformer.core.errors import CheckpointError, DataError, GlassformerError, TrainingError
from glassformer.core.fields import typed
from glassformer.core.modes import evaluating
from glassformer.core.numerics import seed_everything
from glassformer.core.tap import Tap
from glassformer.parts.packed import Packed
from glassformer.tasks import Loss, Task

from . import checkpoint
from .accumulate import Gradient, gradient, scale_gradients
from .checkpoint import Checkpoint
from .data import TokenData
from .evaluate import Evaluation, evaluate
from .finite import explain_gradient, explain_loss
from .interrupt import Interrupts
from .loader import Loader
from .log import Log, Progress, draw_curve
from .optimise import AdamW, Optimizer
from .peak import matrix_peak, training_flops_per_token
from .run import Run, check_settings, versions_note
from .schedule import Cosine, Schedule
from .speed import Compiler, Rate, autocast_dtype

SAVE_SECONDS = 15.0, 300.0  # between saves, at least and at most
SAVE_SHARE = 0.02  # of the time that saving may take, between these two
EVALUATIONS = 10  # in a run, unless evaluate_every says otherwise
EVALUATED_WINDOWS = 200
FIRST_GUESS = 1000  # steps of a run with a budget of seconds, before its first step was timed


@runtime_checkable
class Source(Protocol):
    """Where batches come from, if not from :class:`TokenData`: anything with an exact state."""

    @property
    def epoch(self) -> float: ...
    def next(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class Step:
    """What one step was. ``tokens``: predicted since the run began; ``elapsed`` and ``remaining``: seconds;
    ``peak_share``: of the machine's matrix peak, if it was measured; ``validation``: if it was evaluated."""

    number: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    epoch: float
    elapsed: float
    remaining: float
    peak_share: float | None = None
    validation: Evaluation | None = None
    sample: str | None = None

    def every(self, n: int) -> bool:
        """Whether the step's number is a multiple of ``n``. Raises :class:`TrainingError` for an ``n`` below 1."""
        if not isinstance(n, int) or n < 1:
            raise TrainingError(f"step.every(n) counts steps: n is a whole number of 1 or more, and {n!r} was given.")
        return self.number % n == 0


class Trainer:
    """Trains ``model`` on ``data`` for ``task``; iterate over it.

    ``steps`` or ``seconds`` (of wall clock, all included) is the budget; with seconds the schedule follows the clock.
    ``batch`` rows of ``context`` tokens make a micro-batch, ``accumulate`` of them a step; gradients are
    those of the mean over all predictions of the step, whatever the split. ``documents=True`` keeps attention and
    prediction within documents. ``repeats``: the share of rows that say a passage twice (:class:`~glassformer.train.loader.Loader`).
    ``clip``: largest gradient norm, None for no clipping. ``dtype``: ``"fp32"``, ``"bf16"``
    (autocast; parameters stay float32) or ``"auto"``. ``compile``: True, False, or ``"auto"``: after a few steps, if
    the rest of the run is long enough to earn it back. ``seed``: of the order
    of the data and, at the first step, of the global generators (dropout). ``folder``: where the run is kept (None: nowhere).
    ``validation``: data to evaluate on every ``evaluate_every`` steps; ``sample``: a function of the model that
    gives a text, called every ``sample_every`` steps. ``save_every``: steps (None: as often
    as 2 % of the time allow, from every 15 seconds to every five minutes); the newest ``keep`` stay. ``tap``: sees, or edits, every call of
    the model, in training and evaluation.

    Raises :class:`TrainingError`, :class:`DataError` or :class:`CheckpointError` before the first step for what cannot
    work, :class:`NotFinite` when the loss or its gradient is no number.
    """

    @typed(TrainingError)
    def __init__(
        self,
        model: nn.Module,
        task: Task,
        data: TokenData | Source,
        *,
        optimizer: Optimizer = AdamW(),  # noqa: B008  (frozen)
        schedule: Schedule = Cosine(),  # noqa: B008
        steps: int | None = None,
        seconds: float | None = None,
        batch: int = 16,
        context: int = 256,
        accumulate: int = 1,
        documents: bool = False,
        repeats: float = 0.0,
        clip: float | None = 1.0,
        dtype: str = "auto",
        compile: bool | str = "auto",
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        validation: TokenData | Iterable[Any] | None = None,
        evaluate_every: int | None = None,
        evaluate_windows: int = EVALUATED_WINDOWS,
        sample: Callable[[nn.Module], str] | None = None,
        sample_every: int | None = None,
        save_every: int | None = None,
        keep: int = 2,
        tokenizer: Any = None,
        progress: bool | None = None,
        tensorboard: bool = True,
        tap: Tap | None = None,
    ):
        _check_budget(steps, seconds, accumulate)
        _check_counts(
            batch=batch,
            context=context,
            evaluate_every=evaluate_every,
            evaluate_windows=evaluate_windows,
            sample_every=sample_every,
            save_every=save_every,
            keep=keep,
        )
        if not 0 <= seed < 2**63:
            raise TrainingError(f"seed is a whole number from 0 to 2^63 - 1; {seed} was given.")
        if clip is not None and not clip > 0:
            raise TrainingError(f"clip is the largest gradient norm, above zero, or None for no clipping; {clip} was given.")
        if isinstance(data, TokenData):
            _check_vocabulary(model, data)
            if tokenizer is not None and data.tokenizer_hash is not None and getattr(tokenizer, "hash", None) != data.tokenizer_hash:
                raise DataError(f"The tokenizer {tokenizer!r} is not the one that made the data ({data.tokenizer!r}): leave it out, or give that one.")
        elif repeats:
            raise TrainingError(
                f"repeats={repeats} is for TokenData, but the data here is of type {type(data).__name__}, which makes its own batches: leave repeats out."
            )
        if any(p.device.type == "meta" for p in model.parameters()):
            raise TrainingError("This model stands on the meta device, where tensors have shapes but no numbers: build it without device='meta', or load one.")
        if any(isinstance(m, Packed) for m in model.modules()) or any(hasattr(p, "tensor_data_names") for p in model.parameters()):
            raise TrainingError("This model's matrices are held in few bits and cannot learn: load it without packed and quantise, with dtype='float32'.")
        task.check(model)
        if steps is not None:
            schedule.check(steps)
        self.model, self.task, self.optimizer, self.schedule = model, task, optimizer, schedule
        self.steps, self.seconds, self.accumulate, self.clip = steps, seconds, accumulate, clip
        self.batch, self.context, self.documents, self.repeats, self.seed = batch, context, documents, repeats, seed
        self.validation, self.evaluate_every, self.evaluate_windows = validation, evaluate_every, evaluate_windows
        self.sample, self.sample_every, self.save_every = sample, sample_every, save_every
        self.device = next(model.parameters()).device
        self.number, self.tokens, self.elapsed = 0, 0, 0.0
        self.stopped: str | None = None
        self.notes: list[str] = []
        self.last: Step | None = None
        self.tokenizer = tokenizer if tokenizer is not None else getattr(data, "tokenizer", None)
        self.data, self._tensorboard, self._progress_shown = data, tensorboard, progress
        self._loader: Source = Loader(data, batch, context, seed=seed, documents=documents, repeats=repeats) if isinstance(data, TokenData) else data
        self._autocast = autocast_dtype(dtype, model, self.device)
        self._optimisers = optimizer.build(model)
        self.tap, self._seen = tap, {} if tap is None else {"tap": tap}
        self._compiler = Compiler(self._loss, compile, self.device, layers=_layers(model))
        self._flops, self._peak = training_flops_per_token(model, context), 0.0
        self._rate, self._tenth, self._saved, self._save_took = Rate(), 0, -1, 0.0
        self._random: Callable[[], dict[str, Any]] = checkpoint.random_state
        self._run = None if folder is None else Run(folder, resume, keep)
        self._log, self._progress = Log(None), Progress(False, steps=steps, seconds=seconds)
        if self._run is not None:
            self._open(self._run)
        elif resume:
            raise CheckpointError("resume=True needs the folder of the run to go on with.")

    # The run

    def __iter__(self) -> Iterator[Step]:
        """Train; yields each step after it was taken. Ends at the budget, or after SIGINT or SIGTERM (see ``stopped``).

        Leaving the loop (``break``) saves a run that has a folder, and lets go of the folder.
        """
        if self._run is not None and self._run.closed:
            if self.finished:
                return
            raise TrainingError(
                f"This trainer let go of {self._run.folder} when its loop ended, after step {self.number}: go on with a new Trainer(…, folder=…, resume=True)."
            )
        was_training = self.model.training
        self.model.train()
        self._log = Log(self.folder, after=self.number, tensorboard=self._tensorboard)
        self._progress = Progress(self._progress_shown, steps=self.steps, seconds=self.seconds)
        for note in self.notes:
            self._progress.say(note)
        try:
            with Interrupts(self._progress.shown) as interrupts:
                self._began = time.perf_counter() - self.elapsed
                saved = self._begin()
                while not self.finished and interrupts.caught is None:
                    step = self._step()
                    self._between(step)
                    self._progress.step(step)
                    yield step
                    # Saved here, not before the yield: what the caller's loop did (random draws too) is part of the state.
                    if self._run is not None and self._save_due(saved) and not self.finished:
                        begin = time.monotonic()
                        self.save()
                        saved = time.monotonic()
                        self._save_took = saved - begin
                self.stopped = interrupts.caught
                self._finish()
        except GeneratorExit:  # the caller left the loop
            self._finish()
            raise
        finally:
            self.model.train(was_training)
            self._progress.close()
            self._log.close()
            if self._run is not None:
                self._run.close()

    def run(self) -> Step | None:
        """The whole run; returns its last step."""
        for _ in self:
            pass
        return self.last

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        return (self.steps is not None and self.number >= self.steps) or (self.seconds is not None and self.elapsed >= self.seconds)

    @property
    def dtype(self) -> str:
        """The format of the products: ``"fp32"``, or ``"bf16"`` by autocast."""
        return "fp32" if self._autocast is None else "bf16"

    @property
    def folder(self) -> Path | None:
        """Where the run is kept."""
        return None if self._run is None else self._run.folder

    def evaluate(self) -> Evaluation:
        """The loss on the validation data now. Raises :class:`DataError` if there is none."""
        if self.validation is None:
            raise DataError("There is no validation data: give Trainer(validation=…), for example from data.split(0.1).")
        return evaluate(
            self.model,
            self.task,
            self.validation,
            batch=self.batch,
            context=self.context,
            most=self.evaluate_windows,
            documents=self.documents,
            autocast=self._autocast,
            tap=self.tap,
        )

    def save(self) -> Path:
        """Write a checkpoint of this moment; returns its folder. Raises :class:`CheckpointError` if it cannot be written."""
        if self._run is None:
            raise CheckpointError("This run has no folder to be saved in: give Trainer(folder=…).")
        self._log.flush()
        state = {
            "settings": self._settings(),
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "decision": self._compiler.decision,
            "loader": self._loader.state(),
            "random": self._random(),
        }
        self._saved = self.number
        return self._run.save(self.number, self._write_model, self._optimisers.state(), state)

    # One step

    def _step(self) -> Step:
        begin = time.perf_counter()
        self._optimisers.set_factor(self.schedule.factor(self.number, self._total()))
        batches = [self._fetch() for _ in range(self.accumulate)]
        random = torch.get_rng_state()
        found = self._gradient(batches, random)
        loss, norm, predicted, parts = found.numbers()
        if not math.isfinite(loss):
            torch.set_rng_state(random)
            raise explain_loss(self.model, self.task, batches, self.number + 1, loss, self._autocast, self.tap)
        if not math.isfinite(norm):
            raise explain_gradient(self.model.named_parameters(), self.number + 1, norm)
        clipping = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        scale_gradients(self._optimisers.parameters, found.scale * clipping)
        self._optimisers.step()
        self._optimisers.zero_grad()
        self.number += 1
        self.tokens += int(predicted)
        now = time.perf_counter()
        self.elapsed = now - self._began
        self._rate.add(now - begin, predicted)
        if self._compiler.decide(self.number, self._remaining()):
            self._decided()
        rate = self._rate.tokens_per_second
        share = self._flops * rate / self._peak if self._peak else None
        step = Step(self.number, loss, norm, self._optimisers.lr, self.tokens, rate, self._loader.epoch, self.elapsed, self._remaining(), share)
        self._log.step(step, parts)
        self.last = step
        return step

    def _gradient(self, batches: list[Any], random: Tensor) -> Gradient:
        """The gradients of a step; if its compilation fails and was not insisted on, those of the eager loss."""
        try:
            found = gradient(self._compiler.function(self.number), batches, self._optimisers.parameters)
        except Exception as error:
            self._note(self._compiler.give_up(error, self.number))
            if self._run is not None:
                self._run.write(decision=self._compiler.decision)
            self._optimisers.zero_grad()
            torch.set_rng_state(random)
            return gradient(self._loss, batches, self._optimisers.parameters)
        if self._compiler.worked() and self._run is not None:
            self._run.write(products=self._compiler.products)
        return found

    def _loss(self, batch: Any) -> Loss:
        with torch.autocast(self.device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            return self.task.loss(self.model, batch, **self._seen)

    def _fetch(self) -> Any:
        batch = self._loader.next()
        if self.device.type == "cpu":
            return batch
        return batch.to(self.device)

    def _decided(self) -> None:
        decision = self._compiler.decision
        if self._run is not None:  # at once: a run killed before its next checkpoint must change over at the same step
            self._run.write(decision=decision)
        if decision is not None and decision["compile"]:
            self._note(f"Compiling from step {self.number + 1} on: the {self._remaining():.0f} s left are enough to earn it back.")

    # Between steps

    def _begin(self) -> float:
        """What is done before the first step of this process; the time of the last save."""
        if not self.number:
            seed_everything(self.seed)
        if self._run is not None and not self.finished:
            if self._run.found is not None:
                checkpoint.restore_random_state(self._run.found.state["random"])
            self._random = checkpoint.random_state
            if self._run.is_empty():
                self.save()  # step 0: the first values too must survive
            self._run.unpublish()
        if not self._peak and (self._run is not None or self._progress.shown):
            self._peak = matrix_peak(self.device, self._autocast or torch.float32)
            if self._run is not None:
                self._run.write(matrix_peak=self._peak)
        return time.monotonic()

    def _between(self, step: Step) -> None:
        """Evaluation and sample texts; neither moves the random generators nor anything else that training depends on."""
        tenth = self._next_tenth(step)
        if self.validation is not None and self._due(step, self.evaluate_every, tenth):
            with checkpoint.same_randomness():
                step.validation = self.evaluate()
            self._log.evaluation(step.number, step.validation)
            self._progress.say(f"step {step.number:,}  validation {step.validation}")
        if self.sample is not None and self._due(step, self.sample_every, tenth):
            with checkpoint.same_randomness(), evaluating(self.model):
                try:
                    step.sample = self.sample(self.model)
                except GlassformerError as error:  # a sample is worth less than the run
                    step.sample = None
                    self._note(f"No sample text at step {step.number:,}: {error}")
            if step.sample is not None:
                self._log.sample(step.number, step.sample)
                self._progress.say(f"step {step.number:,}  sample: {step.sample}")

    def _next_tenth(self, step: Step) -> bool:
        """Whether another tenth of a budget of seconds has passed with this step."""
        if self.seconds is None:
            return False
        before, self._tenth = self._tenth, int(step.elapsed / self.seconds * EVALUATIONS)
        return self._tenth > before

    def _due(self, step: Step, every: int | None, tenth: bool) -> bool:
        """Whether it is time to look: every so many steps, or ten times in the run, and at its end."""
        if self.finished:
            return True
        if every is not None:
            return step.number % every == 0
        if self.seconds is not None:
            return tenth
        return step.number % max((self.steps or 1) // EVALUATIONS, 1) == 0

    def _save_due(self, saved: float) -> bool:
        if self.save_every:
            return self.number % self.save_every == 0
        least, most = SAVE_SECONDS
        return time.monotonic() - saved > min(most, max(least, self._save_took / SAVE_SHARE))

    def _total(self) -> float:
        """Steps of the whole run; with a budget of seconds, as many as fit at the pace so far."""
        totals = [] if self.steps is None else [float(self.steps)]
        if self.seconds is not None:
            passed = time.perf_counter() - self._began
            totals.append(self.number * self.seconds / passed if self.number else FIRST_GUESS)
        return min(totals)

    def _remaining(self) -> float:
        by_steps = math.inf if self.steps is None else (self.steps - self.number) * self._rate.step_seconds
        return max(min(by_steps, math.inf if self.seconds is None else self.seconds - self.elapsed), 0.0)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._progress.say(text)

    # The folder

    def _open(self, run: Run) -> None:
        """Take what the folder knows: the checkpoint to go on from, decisions, the machine's peak."""
        try:
            self.notes += run.notes
            self._peak = float(run.record.get("matrix_peak") or 0.0)
            self._compiler.products = run.record.get("products")
            if run.found is not None:
                self._restore(run.found)
            if self._compiler.wanted == "auto" and self._compiler.decision is None:
                self._compiler.decision = run.record.get("decision")
            run.write(settings=self._settings(), steps=self.steps, seconds=self.seconds)
        except BaseException:
            run.close()
            raise

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        check_settings(state["settings"], self._settings())
        if (note := versions_note(state["made_with"])) is not None:
            self.notes.append(note)
        found.load_model(self.model)
        self._optimisers.restore(found.optimiser())
        self._loader.restore(state["loader"])
        self.number, self.tokens, self.elapsed = found.step, int(state["tokens"]), float(state["elapsed"])
        self._tenth = int(self.elapsed / self.seconds * EVALUATIONS) if self.seconds else 0
        self._random = lambda: state["random"]  # until the first step: what happens before it is not the run's
        if self._compiler.wanted == "auto":
            self._compiler.decision = state["decision"]

    def _settings(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation."""
        spec = getattr(self.model, "spec", None)
        data = self.data
        return {
            "model": None if spec is None else spec.to_dict(),
            "task": self.task.to_dict(),
            "optimizer": self.optimizer.to_dict(),
            "schedule": self.schedule.to_dict(),
            "data": data.fingerprint if isinstance(data, TokenData) else None,
            "tokenizer": data.tokenizer_hash if isinstance(data, TokenData) else None,
            "batch": self.batch,
            "context": self.context,
            "accumulate": self.accumulate,
            "documents": self.documents,
            "repeats": self.repeats or None,  # None as in runs from before it was there
            "clip": self.clip,
            "dtype": self.dtype,
            "compile": self._compiler.wanted,
            "seed": self.seed,
            "tap": getattr(self.tap, "hash", None),  # of edits from a file
        }

    def _write_model(self, folder: Path) -> None:
        if getattr(self.model, "spec", None) is None:
            checkpoint.save_parameters(self.model, folder / checkpoint.MODEL)
            return
        from glassformer.weights import own

        own.save(self.model, folder, tokenizer=self.tokenizer, extra={"step": self.number, "tokens": self.tokens})

    def _finish(self) -> None:
        if self.last is not None:
            self._progress.draw(self.last)
        if self._run is None or self.last is None:
            return
        if self._saved != self.number:
            self.save()
        if self.finished:
            self._run.publish(self._write_model)
        self._log.flush()
        try:
            draw_curve(self._run.folder)
        except OSError as error:  # everything that matters is saved
            self._note(f"The loss curve could not be drawn: {error.strerror or error}.")


# What is checked before the first step


def _check_budget(steps: int | None, seconds: float | None, accumulate: int) -> None:
    if steps is None and seconds is None:
        raise TrainingError("A run needs a budget: give steps=… or seconds=….")
    if (steps is not None and not steps >= 1) or (seconds is not None and not seconds > 0):
        raise TrainingError(f"The budget is above zero; steps={steps} and seconds={seconds} were given.")
    if accumulate < 1:
        raise TrainingError(f"A step has at least one micro-batch; accumulate={accumulate} was given.")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise TrainingError(f"{name} is 1 or more; {name}={value} was given.")


def _layers(model: nn.Module) -> int:
    """Blocks of the model, of encoder and decoder together; 4 where it has no spec to ask."""
    spec = getattr(model, "spec", None)
    return sum(len(getattr(half, "blocks", ())) for half in (spec, getattr(spec, "encoder", None), getattr(spec, "decoder", None))) or 4


def _check_vocabulary(model: nn.Module, data: TokenData) -> None:
    size = getattr(getattr(model, "spec", None), "vocab_size", None)
    if size is not None and data.vocab_size is not None and data.vocab_size > size:
        raise DataError(f"The data has a vocabulary of {data.vocab_size} tokens, but the model has {size}: use the model's tokenizer, or a model of that size.")
