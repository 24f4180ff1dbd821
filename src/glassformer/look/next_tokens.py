"""Candidates: what may come next.

    candidates(model, "White hare upon")        the k most probable tokens, their logits, the entropy

What changes when the text does is in :mod:`~glassformer.look.comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.numerics import wide
from glassformer.core.tap import Tap

from .distributions import entropy
from .figure import Theme, bars
from .result import Grid, Result
from .subject import Positions, Subject, Text, check_reads_tokens, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer


@dataclass(frozen=True, eq=False)
class Candidates(Result):
    """The most probable tokens (k) at one place, best first, under ``softmax(logits / temperature)``."""

    text: str
    position: int
    temperature: float
    ids: Tensor
    """[k]"""
    pieces: tuple[str, ...]
    p: Tensor
    """[k]"""
    logits: Tensor
    """[k] As the model gives them, before the temperature."""
    cumulative: Tensor
    """[k] Sum of the probabilities down to here."""
    entropy: float
    """Of the whole distribution, in bits."""
    vocab_size: int

    @property
    def title(self) -> str:
        heat = "" if self.temperature == 1 else f" at temperature {self.temperature:g}"
        return f"After {self.text}{heat}: entropy {self.entropy:.2f} bits, as uncertain as {2**self.entropy:.3g} equal choices of {self.vocab_size:,}"

    def best(self, n: int = 5) -> list[tuple[str, float]]:
        """The first ``n`` tokens with their probabilities."""
        return [(piece, float(p)) for piece, p in zip(self.pieces[:n], self.p, strict=False)]

    def grid(self) -> Grid:
        rows = tuple(
            (r + 1, *row) for r, row in enumerate(zip(self.pieces, *(x.tolist() for x in (self.ids, self.p, self.cumulative, self.logits)), strict=True))
        )
        return Grid(("rank", "token", "id", "p", "sum of p", "logit"), rows)

    def size(self) -> tuple[float, float]:
        return (7.0, 1.3 + 0.24 * len(self.pieces))

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        bars(axes, theme, self.pieces, self.p, title=f"After {self.text}", x=f"probability (entropy {self.entropy:.2f} bits)")


@torch.no_grad()
def candidates(
    model: Any,
    text: Text,
    k: int = 20,
    *,
    temperature: float = 1.0,
    position: Positions = None,
    tokenizer: Tokenizer | None = None,
    source: Text | None = None,
    tap: Tap | None = None,
) -> Candidates:
    """The ``k`` most probable tokens at one position (None: the last; in an encoder the mask token's place), ``p = softmax(logits / temperature)``.

    A decoder's candidates follow the position, an encoder's stand at it. ``tap``: edits that hold meanwhile.
    Raises :class:`InputError` for a model without scores over tokens, a temperature
    that is not above 0, and ``k`` below 1; ``k`` above the vocabulary gives all of it.
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    check_reads_tokens(s.stack, "candidates()")
    check_k(k)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise InputError(f"temperature={temperature}: logits are divided by it, so it is above 0; close to 0 only the most probable token is left.")
    at = s.position(position)
    _, every = s.run()
    logits = wide(every[at])
    # The best one at 0: divided by a very small number the others go to minus infinity, and none to plus infinity.
    logp = ((logits.double() - logits.max()) / temperature).log_softmax(-1).to(logits.dtype)
    best = logp.topk(min(k, len(logp)))
    p = best.values.exp()
    return Candidates(
        text=quoted(s, at),
        position=at,
        temperature=temperature,
        ids=best.indices.cpu(),
        pieces=tuple(s.piece(i) for i in best.indices.tolist()),
        p=p.cpu(),
        logits=logits[best.indices].cpu(),
        cumulative=p.cumsum(0).cpu(),
        entropy=float(entropy(logp)),
        vocab_size=len(logp),
    )


def check_k(k: int) -> None:
    """Raise :class:`InputError` unless ``k`` is a number of tokens."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: at least 1 token is listed.")


def joined(pieces: Sequence[str]) -> str:
    """Pieces as running text."""
    return "".join(p.replace("·", " ") for p in pieces) if any("·" in p for p in pieces) else " ".join(pieces)


def quoted(s: Subject, at: int | None = None) -> str:
    """The text in quotes, up to a position; its end if it is long."""
    pieces = s.pieces if at is None or not s.causal else s.pieces[: at + 1]
    text = joined(pieces)
    return f"“{text if len(text) <= 48 else '…' + text[-47:]}”"


__all__ = ["Candidates", "candidates"]
