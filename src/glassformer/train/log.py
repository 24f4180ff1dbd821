"""The log of a run: lines of JSON, TensorBoard files, a progress bar, a curve.

    run/metrics.jsonl     one line a step, one line an evaluation, one line a sample text
    run/tensorboard/      the same numbers for TensorBoard
    run/loss.png          the loss curve, at the end

Losses are written with all their digits, so that two runs can be compared to the bit. On resume the
lines after the checkpoint are cut off: the file reads as if the run had never been interrupted.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from glassformer.core.errors import CheckpointError
from glassformer.core.files import trouble

from .evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .loop import Step

METRICS, CURVE = "metrics.jsonl", "loss.png"
FLUSH_SECONDS = 2.0
REFRESH_SECONDS = 0.5  # drawing the bar costs milliseconds, as much as a tenth of a small model's step
LINE_SECONDS = 30.0  # between lines where there is no terminal
TENSORBOARD_EVERY = 10


class Log:
    """Writes what happens to the run folder; with ``folder=None`` nothing is written."""

    def __init__(self, folder: Path | None, *, after: int = 0, tensorboard: bool = True):
        self._file: IO[str] | None = None
        self._board: Any = None
        self._flushed = time.monotonic()
        if folder is None:
            return
        path = folder / METRICS
        try:
            cut(path, after)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1, flush_secs=10)

    def step(self, step: Step, parts: dict[str, float]) -> None:
        """One line for a step."""
        if self._file is None:
            return
        more = "".join(f', "{name}": {value!r}' for name, value in parts.items())
        self._line(
            f'{{"step": {step.number}, "loss": {step.loss!r}, "lr": {step.lr!r}, "grad_norm": {step.grad_norm!r}, "tokens": {step.tokens}, '
            f'"epoch": {step.epoch:.6f}, "elapsed": {step.elapsed:.4f}, "tokens_per_second": {step.tokens_per_second:.1f}{more}}}'
        )
        if self._board is not None and step.number % TENSORBOARD_EVERY == 0:
            for name, value in {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "tokens_per_second": step.tokens_per_second, **parts}.items():
                self._board.add_scalar(f"train/{name}", value, step.number)

    def evaluation(self, number: int, found: Evaluation) -> None:
        """One line for an evaluation."""
        low, high = found.interval
        row = {"step": number, "validation": found.loss, "error": None if math.isnan(found.error) else found.error, "windows": found.windows}
        self._write(row | {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte})
        if self._board is not None:
            self._board.add_scalar("validation/loss", found.loss, number)
            if low == low:
                self._board.add_scalar("validation/low", low, number)
                self._board.add_scalar("validation/high", high, number)

    def sample(self, number: int, text: str) -> None:
        """One line for a sample text."""
        self._write({"step": number, "sample": text})
        if self._board is not None:
            self._board.add_text("sample", text, number)

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._line(json.dumps(row, ensure_ascii=False))

    def _line(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text + "\n")
        except OSError as error:
            raise _unwritable(METRICS, error) from error
        now = time.monotonic()
        if now - self._flushed > FLUSH_SECONDS:
            self.flush()
            self._flushed = now

    def flush(self) -> None:
        """Everything up to now is in the files. Raises :class:`CheckpointError` if it cannot be written."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise _unwritable(METRICS, error) from error

    def close(self) -> None:
        """Close the files; what cannot be written any more is left out."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._board is not None:
            self._board.close()
        self._file = self._board = None


def _unwritable(path: str | Path, error: OSError) -> CheckpointError:
    reason, todo = trouble(error, movable=False)
    return CheckpointError(f"{path} could not be written: {reason}. {todo}, then go on with --resume.")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, in order."""
    path = Path(folder) / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run
            continue
    return rows


def cut(path: Path, after: int) -> None:
    """Remove the lines of later steps than ``after``, and a last line that is not whole."""
    if not path.is_file():
        return
    kept = 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > after:
                    break
            except (ValueError, KeyError):
                break
            kept += len(line)
    if kept < path.stat().st_size:
        with path.open("rb+") as stream:
            stream.truncate(kept)


# What is seen while it runs


class Progress:
    """A bar on a terminal, a line now and then elsewhere; silent if ``shown`` is False (None: shown on a terminal)."""

    def __init__(self, shown: bool | None, *, steps: int | None, seconds: float | None):
        terminal = sys.stderr.isatty()
        self.shown = terminal if shown is None else shown
        self._steps, self._seconds = steps, seconds
        self._every = REFRESH_SECONDS if terminal else LINE_SECONDS
        self._last = time.monotonic() - (self._every if terminal else self._every - 2.0)
        self._bar: Any = None
        self._drawn: int | None = None
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._console = Console(stderr=True)
            if terminal:
                columns = TextColumn("{task.fields[head]}"), BarColumn(bar_width=24), TextColumn("{task.fields[tail]}")
                self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=False)
                self._task = self._bar.add_task("", total=1.0, head="", tail="compiling or warming up")
                self._bar.start()

    def step(self, step: Step) -> None:
        """Show where the run is, if it is time."""
        now = time.monotonic()
        if not self.shown or now - self._last < self._every:
            return
        self._last = now
        self.draw(step)

    def draw(self, step: Step) -> None:
        """Show where the run is, now."""
        if not self.shown or step.number == self._drawn:
            return
        self._drawn = step.number
        done = share_done(step.number, step.elapsed, self._steps, self._seconds)
        head = f"step {step.number:,}" + (f"/{self._steps:,}" if self._steps else "")
        tail = f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s"
        if step.peak_share is not None:
            tail += f"  {step.peak_share:.0%} of peak"
        tail += f"  {clock(step.elapsed)} passed, {clock(step.remaining)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, head=head, tail=tail)
            self._bar.refresh()
        else:
            self._console.print(f"{head}  {tail}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def share_done(number: int, elapsed: float, steps: int | None, seconds: float | None) -> float:
    """How much of the run is done, from 0 to 1, by whichever budget ends first."""
    shares = [number / steps if steps else 0.0, elapsed / seconds if seconds else 0.0]
    return min(max(shares), 1.0)


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``; hours when there are any."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# The curve


def draw_curve(folder: str | Path) -> Path | None:
    """Draw ``loss.png`` from a run's metrics: the loss of the steps, smoothed, and the evaluations with their intervals.

    None if there is nothing to draw. The axis is cut above the first losses when these would flatten the rest.
    """
    rows = read_metrics(folder)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held_out = [(r["step"], r["validation"], r["error"] or 0.0) for r in rows if "validation" in r]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_losses(axes, train, held_out)
    path = Path(folder) / CURVE
    figure.savefig(path, facecolor="white")
    return path


def _draw_losses(axes: Axes, train: list[tuple[int, float]], held_out: list[tuple[int, float, float]]) -> None:
    steps, losses = [s for s, _ in train], [x for _, x in train]
    smooth = smoothed(losses, max(len(losses) // 50, 1))
    thin = max(len(steps) // 4000, 1)
    axes.plot(steps[::thin], losses[::thin], color="#9bb8d3", linewidth=0.7, alpha=0.7, label="training, each step")
    axes.plot(steps[::thin], smooth[::thin], color="#1f5a94", linewidth=1.8, label="training, smoothed")
    if held_out:
        x, y, e = zip(*held_out, strict=True)
        axes.errorbar(x, y, yerr=[1.96 * v for v in e], fmt="o", color="#c2410c", markersize=4.5, capsize=3, label="validation, 95 % interval")
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), textcoords="offset points", xytext=(-4, 9), ha="right", color="#c2410c")
    low = min([min(smooth), *(y - 1.96 * e for _, y, e in held_out)])
    high = max([smooth[min(len(smooth) // 50, len(smooth) - 1)], *(y for _, y, _ in held_out)])
    margin = 0.08 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def smoothed(values: list[float], span: int) -> list[float]:
    """Mean over a centred window of up to ``2 span + 1`` values."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    ends = [(max(i - span, 0), min(i + span + 1, len(values))) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]
