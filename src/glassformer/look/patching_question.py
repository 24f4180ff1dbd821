"""What every patching function begins with: two texts, a base run, and a number that is asked of each run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.tap import Tap

from .subject import Positions, Subject, Text, check_reads_tokens, choose, feedforward_of, read, read_pair
from .sweep import Sweep

ALIASES = {"attn_out": "attn.out", "mlp_out": "ffn.out", "ffn_out": "ffn.out", "head_out": "z", "cross_out": "cross.out"}
HEAD_SITES = ("z", "q", "k", "v", "q_rot", "k_rot", "pattern", "scores", "result")
OPTIONS = ("tokenizer", "source", "corrupted_source", "target", "metric", "position", "direction", "normalise", "tap", "memory", "progress")
METRICS = ("logit_diff", "logit", "prob", "logprob", "kl")


def site_path(s: Subject, site: str, layer: int) -> str:
    """The path of a site named in short (``z``, ``attn_out``, ``mlp_out``, ``cross.q``, ``resid_pre``) in a layer; raises :class:`SiteError`."""
    name = ALIASES.get(site, site)
    name = f"attn.{name}" if name in HEAD_SITES else name
    if name.startswith("ffn."):
        name = f"{feedforward_of(s.stack, layer)}.{name[4:]}"
    if whole := re.fullmatch(r"(?:encoder\.|decoder\.)?blocks\.[^.]+\.(.+)", site):
        raise SiteError(
            f"{site!r} is the path of one layer's site, but every layer from 0 to {s.layers - 1} is asked: give the name within a block, {whole[1]!r}."
        )
    path = f"blocks.{layer}.{name}"
    s.path(path)
    return path


@dataclass(frozen=True, eq=False)
class Question:
    """Two runs and a number asked of each: what all patching functions begin with."""

    base: Subject
    other: Subject
    sweep: Sweep
    score: Callable[[Tensor], Tensor]
    """[n k v] -> [n]."""
    at: tuple[int, ...]
    clean: float
    corrupted: float
    label: str
    direction: str

    def scaled(self, values: Tensor, normalise: bool, change: bool = False) -> Tensor:
        """On the scale where 0 is the corrupted run and 1 the clean one (``change``: of a difference)."""
        values = values.double()
        scaled = (values - (0.0 if change else self.corrupted)) / (self.clean - self.corrupted) if normalise else values
        return scaled.float()


def ask(
    model: Any,
    clean: Text,
    corrupted: Text,
    *,
    tokenizer: Any = None,
    source: Any = None,
    corrupted_source: Text | None = None,
    target: Any = None,
    metric: str | Callable[[Tensor], Tensor] = "logit_diff",
    position: Positions = None,
    direction: str = "denoise",
    normalise: bool = True,
    keep: Sequence[str] = (),
    tap: Tap | None = None,
    memory: int | None = None,
    progress: bool | None = None,
    **unknown: Any,
) -> Question:
    """Read both texts, run the base, measure both ends. ``tap``: edits that hold in every run.

    Raises :class:`InputError` for texts of different token counts and for equal ends.
    """
    if unknown:
        name = next(iter(unknown))
        raise InputError(f"There is no option {name!r} here.{did_you_mean(name, OPTIONS)} Options are {', '.join(OPTIONS)}.")
    choose(direction, ("denoise", "noise"), "direction")
    if corrupted_source is None:
        a, b = read_pair(model, clean, corrupted, tokenizer, source=source, tap=tap)
    else:
        a = read(model, clean, tokenizer, source=source, tap=tap)
        _, b = read_pair(model, clean, corrupted, tokenizer, source=corrupted_source, tap=tap)
    check_reads_tokens(a.stack, "Patching")
    at = (a.position(position),)
    base, other = (b, a) if direction == "denoise" else (a, b)
    sweep = Sweep(base, keep, memory=memory, progress=progress)
    _, far = other.run("logits")
    ends = (far, sweep.logits) if direction == "denoise" else (sweep.logits, far)
    score, label = read_metric(a, metric, target, ends[0][at[0]], ends[1][at[0]])
    measured = [float(score(e[list(at)][None])[0]) for e in ends]
    if normalise:
        _check_ends(a, b, at[0], label, measured, ends[0].dtype)
    return Question(base, other, sweep, score, at, measured[0], measured[1], label, direction)


def _check_ends(a: Subject, b: Subject, at: int, label: str, ends: Sequence[float], dtype: torch.dtype) -> None:
    """Raise :class:`InputError` where both runs give the same number, so that a scale from one to the other has no length."""
    if abs(ends[0] - ends[1]) > max(1e-9, 8 * torch.finfo(dtype).eps * max(map(abs, ends))):
        return
    differ = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y), None)
    todo = "name a target that the texts decide differently, or give normalise=False"
    if a.source_ids == b.source_ids:
        if differ is None:
            todo = "give two texts that differ"
        elif a.causal and at < differ:
            todo = f"it is read at position {at}, which does not see position {differ}, where the texts differ first: give position={differ} or a later one"
    raise InputError(f"The metric ({label}) is {ends[0]:.4g} in both runs, so there is nothing to restore: {todo}.")


def read_metric(s: Subject, metric: Any, target: Any, clean: Tensor, corrupted: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The metric as a function of logits [n k v] (its first position counts), and its name. ``clean``, ``corrupted`` [v]: logits of the two runs."""
    if callable(metric):

        def own(logits: Tensor) -> Tensor:
            value = metric(logits[:, 0])
            if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"The metric gave {got} for {logits.shape[0]} rows of logits [b v]: it gives one number per row, [b].")
            return value

        return own, getattr(metric, "__name__", "metric").strip("<>")
    choose(metric, METRICS, "metric")
    if metric == "kl":
        reference = clean.double().log_softmax(-1)
        return lambda x: (reference.exp() * (reference - x[:, 0].double().log_softmax(-1))).sum(-1) / math.log(2), "KL from the clean run, bits"
    if metric == "logit_diff" and target is None:
        a, b = int(clean.argmax()), int(corrupted.argmax())
        target = (a, b) if a != b else a
    chosen = s.target(target, clean)
    if metric == "prob":
        return lambda x: x[:, 0].double().softmax(-1)[:, chosen.token], f"probability of {s.piece(chosen.token)}"
    if metric == "logprob":
        return lambda x: x[:, 0].double().log_softmax(-1)[:, chosen.token], f"log-probability of {s.piece(chosen.token)}"
    return lambda x: chosen.of(x[:, 0]), f"{'logit' if chosen.against is None else 'logit difference'} of {chosen.label}"
