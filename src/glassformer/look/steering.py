"""Steering: add a direction to the stream while the model writes.

    vector = steering_vector(model, positive texts, negative texts, layer=3)       the difference of their means
    steer(model, "The old man", vector, strength=[2, 4, 8])                         continuations side by side
    generate(model, "The old man", tokenizer=tok, tap=vector.tap(4, positions=7))   in any call: from position 7 on

Difference of means over sets of texts (Marks and Tegmark, arXiv 2310.06824; Rimsky et al., arXiv 2312.06681), or of one pair: activation
addition (Turner et al., arXiv 2308.10248).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.tap import Tap

from .figure import Theme, bars
from .result import Grid, Result
from .steering_vectors import AddVector, At, SteeringVector, number, steering_vector
from .subject import Subject, Text, check_reads_tokens, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Steered(Result):
    """Continuations of one text, one per strength (0: unsteered). ``kl`` [n]: how far the next token's prediction is moved, in bits; ``logprob``
    [n]: what the unsteered model thinks of each new token on the way, on average (ln p)."""

    text: str
    label: str
    path: str
    strengths: tuple[float, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    kl: Tensor
    logprob: Tensor

    @property
    def title(self) -> str:
        return f"steering along {self.label} at {self.path}"

    def grid(self) -> Grid:
        rows = tuple((s, t.replace("\n", "⏎"), float(k), float(p)) for s, t, k, p in zip(self.strengths, self.texts, self.kl, self.logprob, strict=True))
        return Grid(
            ("strength", "continuation", "KL, bits", "log-probability"),
            rows,
            "KL from the unsteered prediction of the next token; mean log-probability (ln p) of the new tokens by the unsteered model",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        names = [f"{s:g}" for s in self.strengths]
        bars(left, theme, names, self.kl, title="moved (KL, bits)", x="from the unsteered prediction")
        bars(right, theme, names, self.logprob, title="unsteered model's log-probability", x="mean per new token (ln p)")
        left.set_ylabel("strength", color=theme.dim, fontsize=9)

    def size(self) -> tuple[float, float]:
        return (9.0, max(2.4, 1.4 + 0.35 * len(self.strengths)))


def steer(
    model: Any,
    text: Text,
    vector: SteeringVector,
    strength: float | Sequence[float] = (1.0, 2.0, 4.0),
    *,
    positions: At = None,
    max_new_tokens: int = 24,
    tokenizer: Any = None,
    source: Text | None = None,
    tap: Tap | None = None,
    **options: Any,
) -> Steered:
    """Continue a text with the vector added, once per strength and once without: side by side.

    ``positions``: where it is added, counted in the whole row (an int: from there on). ``options``: of :func:`~glassformer.infer.generate.generate`
    (temperature, seed, ...). ``tap``: edits that hold in every run, the unsteered one too.
    An encoder-decoder continues nothing: use ``generate(model, source, tap=vector.tap(4))``. Raises :class:`InputError` for a vector of another width.
    """
    from glassformer.infer.generate import generate

    s = read(model, text, tokenizer, source=source, tap=tap)
    check_reads_tokens(s.stack, "Steering")
    if s.prefix or not s.causal:
        raise InputError("A continuation is steered, but this model continues no text: for an encoder-decoder use generate(model, source, tap=vector.tap(4)).")
    if not isinstance(vector, SteeringVector):
        raise InputError(f"A steering vector is added, but {described(type(vector))} was given: steering_vector(...) makes one.")
    s.path(vector.path)
    vector.check(s.model)
    chosen = tuple(map(number, strength)) if isinstance(strength, Iterable) else (number(strength),)
    if not chosen:
        raise InputError("No strength was given: name at least one number.")
    strengths = (0.0, *(c for c in chosen if c))
    outs, first = [], []
    for value in strengths:
        push = vector.tap(value, positions) if value else None
        both = push if tap is None else tap if push is None else tap | push
        with torch.no_grad():
            first.append(s.run("logits", tap=push)[1][-1].double().log_softmax(-1))
        outs.append(generate(s.model, list(s.ids), tokenizer=s.tokenizer, max_new_tokens=max_new_tokens, tap=both, **options))
    kl = torch.stack([(first[0].exp() * (first[0] - f)).sum() / math.log(2) for f in first]).float()
    plain = torch.stack([_plain(s, out.ids) for out in outs]).float()
    texts = tuple(o.text if o.text is not None else " ".join(map(str, o.ids)) for o in outs)
    shown = text if isinstance(text, str) else " ".join(s.pieces)
    return Steered(shown, vector.label, vector.path, strengths, texts, tuple(tuple(o.ids) for o in outs), kl, plain)


def _plain(s: Subject, ids: Sequence[int]) -> Tensor:
    """The mean of ln p of new tokens by the unsteered model."""
    whole = read(s.model, [*s.ids, *ids], s.tokenizer, tap=s.tap, note=False)  # its length is the model's own doing
    log = whole.run("logits")[1].double().log_softmax(-1)[len(s) - 1 : -1]
    return log.gather(-1, torch.tensor(ids, device=log.device)[:, None]).mean()


__all__ = ["AddVector", "Steered", "SteeringVector", "steer", "steering_vector"]
