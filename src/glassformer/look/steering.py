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

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.tap import Pattern, Tap

from .figure import Theme, bars
from .result import Grid, Result
from .subject import Subject, Text, check_layer, check_reads_tokens, feedforward_of, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

At = int | Sequence[int] | slice | None
"""Where a vector is added, counted in the whole row: from a position on (int), at some positions, in a slice, or everywhere (None)."""


class AddVector(Tap):
    """Add ``vector`` [d] (or rows [n d], one per position) times ``strength`` to the values at ``site``.

    ``positions`` are counted in the whole row, in cached generation too: an int means from there on. Rows [n d] stand at as many positions from there.
    """

    def __init__(self, site: str, vector: Tensor, strength: float = 1.0, positions: At = None):
        if not isinstance(vector, Tensor):
            raise InputError(f"The vector is a tensor [d], or [n d], but {described(type(vector))} was given: use torch.tensor(...).")
        if vector.ndim not in (1, 2) or not vector.is_floating_point():
            raise InputError(f"The vector has shape {tuple(vector.shape)}, but one direction [d] is added, or one for each of several positions [n d].")
        self.pattern, self.vector, self.strength = Pattern.read(site), vector, _number(strength)
        if (positions is not None and not isinstance(positions, int | slice | Sequence)) or isinstance(positions, str):
            raise InputError(f"positions={positions!r}: a number (from there on), several numbers, a slice, or None for everywhere.")
        given = [positions] if isinstance(positions, int) else positions if isinstance(positions, slice) or positions is None else list(positions)
        ends = [given.start or 0, given.stop or 0] if isinstance(given, slice) else given or []
        if any(isinstance(p, bool) or not isinstance(p, int) or p < 0 for p in ends):
            raise InputError(f"positions={positions!r}: places in a row that still grows are counted from 0, not from the end.")
        if isinstance(positions, slice) and positions.step is not None and (not isinstance(positions.step, int) or positions.step < 1):
            raise InputError(f"positions={positions!r}: a slice goes forward, by steps of at least 1.")
        if vector.ndim == 2 and not (positions is None or isinstance(positions, int)):
            raise InputError(f"positions={positions!r}: the rows of the vector stand one after another, so give the first of their positions only.")
        self.chosen = positions
        self._index: dict[str, tuple[Tensor, Tensor | None]] = {}

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        self._index = {k: v for k, v in self._index.items() if k.split(".")[-1] != path.split(".")[-1]} | {path: (index, lengths)}

    def visit(self, path: str, x: Tensor) -> Tensor:
        if not self.pattern.meets(path):
            return x
        if x.shape[-1] != self.vector.shape[-1]:
            raise InputError(
                f"The vector has {self.vector.shape[-1]} numbers, but the value at {path!r} has {x.shape[-1]}: it was made for another model or site."
            )
        place = self._place(path, x)
        add = self.strength * self.vector.to(x)
        if add.ndim == 2:
            start = self.chosen if isinstance(self.chosen, int) else 0
            at = place - start
            inside = (at >= 0) & (at < add.shape[0])
            return x + torch.where(inside[..., None], add[at.clamp(0, add.shape[0] - 1)], 0.0)
        return x + torch.where(self._chosen(place)[..., None], add, torch.zeros((), dtype=x.dtype, device=x.device))

    def _place(self, path: str, x: Tensor) -> Tensor:
        """The place in its row of every position of ``x`` [b t d]: [t] or [b t]."""
        known = [k for k in self._index if not k or path == k or path.startswith(f"{k}.")]
        index = self._index[max(known, key=len)][0] if known else None
        if index is None or index.shape[-1] != x.shape[1]:
            return torch.arange(x.shape[1], device=x.device)
        return index

    def _chosen(self, place: Tensor) -> Tensor:
        where = self.chosen
        if where is None:
            return torch.ones_like(place, dtype=torch.bool)
        if isinstance(where, int):
            return place >= where
        if isinstance(where, slice):
            step = where.step or 1
            start = where.start or 0
            inside = (place >= start) & ((place - start) % step == 0)
            return inside if where.stop is None else inside & (place < where.stop)
        return torch.isin(place, torch.tensor(list(where), device=place.device))

    def edits(self, path: str) -> bool:
        return self.pattern.meets(path)

    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction [d] (or one per position [n d]) and where it is added: ``site`` of block ``layer``.

    ``norm``: the mean length of the vectors it was made from, to judge a strength by.
    """

    vector: Tensor
    layer: int
    site: str = "resid_pre"
    label: str = ""
    norm: float = 0.0
    prefix: str = ""

    @property
    def path(self) -> str:
        """The full path of the site."""
        return f"{self.prefix}blocks.{self.layer}.{self.site}"

    def tap(self, strength: float = 1.0, positions: At = None) -> AddVector:
        """What adds ``strength`` times the vector in a call or while generating (see :class:`AddVector`)."""
        return AddVector(self.path, self.vector, strength, positions)

    def __mul__(self, by: float) -> SteeringVector:
        return SteeringVector(self.vector * by, self.layer, self.site, self.label, self.norm, self.prefix)

    __rmul__ = __mul__


def steering_vector(
    model: Any,
    positive: Text | Sequence[Text],
    negative: Text | Sequence[Text],
    layer: int,
    position: int | str | None = -1,
    *,
    site: str = "resid_pre",
    unit: bool = False,
    tokenizer: Any = None,
    source: Text | None = None,
) -> SteeringVector:
    """The mean value at ``site`` of block ``layer`` over the positive texts, less that over the negative ones: [d].

    ``position``: where it is read (the last); None: the mean over all positions; ``"each"``: one vector per position [n d] of a single pair of texts
    (activation addition; the shorter text is filled with its last token). ``unit``: made to length one. Texts or lists of texts (or of ids).
    Raises :class:`SiteError` for a layer or site that the model has not, :class:`InputError` for no texts and for equal means.
    """
    texts = [_several(g, name) for g, name in ((positive, "positive"), (negative, "negative"))]
    first = read(model, texts[0][0], tokenizer, source=source)
    check_layer(first.stack, layer)
    if not isinstance(site, str):
        raise SiteError(f"A site is named by a text, such as 'resid_pre', but {described(type(site))} was given.")
    name = f"{feedforward_of(first.stack, layer)}.{site[4:]}" if site.startswith("ffn.") else site
    if position != "each" and not (position is None or (isinstance(position, int) and not isinstance(position, bool))):
        raise InputError(f"position={position!r}: a number, None for the mean over all positions, or 'each' for a vector per position.")
    if position == "each" and any(len(side) > 1 for side in texts):
        raise InputError(f"A vector per position is the difference of two texts, but {len(texts[0])} and {len(texts[1])} were given: use position=-1 or None.")
    subjects = [[read(model, t, tokenizer, source=source) for t in side] for side in texts]
    if position == "each":
        longest = max(len(side[0]) for side in subjects)
        subjects = [[read(model, [*side[0].ids, *[side[0].ids[-1]] * (longest - len(side[0]))], tokenizer, source=source)] for side in subjects]
    sides = []
    for side in subjects:
        values = [s.run(f"blocks.{layer}.{name}")[0][f"{s.prefix}blocks.{layer}.{name}"][0].float() for s in side]
        if any(v.ndim != 2 for v in values):
            raise InputError(
                f"{site!r} has shape {tuple(values[0].shape)} for a text, but a direction of the stream is added: choose a site with axes b t d or b t f."
            )
        sides.append(torch.stack([_at(s, v, position) for s, v in zip(side, values, strict=True)]))
    vector = sides[0].mean(0) - sides[1].mean(0)
    if not float(vector.norm()):
        raise InputError("The positive and the negative texts give the same mean there, so there is no direction: read another position or a later layer.")
    norm = float(torch.cat([x.reshape(-1, x.shape[-1]) for x in sides]).norm(dim=-1).mean())
    label = f"{_shown(texts[0])} − {_shown(texts[1])}"
    return SteeringVector((vector / vector.norm() if unit else vector).cpu(), layer, name, label, norm, first.prefix)


def _several(given: Any, name: str) -> list[Any]:
    single = isinstance(given, str | Tensor) or (
        isinstance(given, Iterable) and bool(given) and all(hasattr(i, "__index__") and not isinstance(i, str) for i in given)
    )
    found = [given] if single else list(given) if isinstance(given, Iterable) else [given]
    if not found:
        raise InputError(f"No {name} text was given: a direction is a difference of texts, at least one of each kind.")
    return found


def _number(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise InputError(f"A strength is a finite number, but {strength!r} was given.")
    return float(strength)


def _shown(texts: Sequence[Any]) -> str:
    first = texts[0] if isinstance(texts[0], str) else "ids"
    return f"{first[:24]!r}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")


def _at(s: Subject, value: Tensor, position: int | str | None) -> Tensor:
    if position is None:
        return value.mean(0)
    if isinstance(position, str):
        return value
    (i,) = s.positions(position)
    return value[i]


@dataclass(frozen=True, eq=False)
class Steered(Result):
    """Continuations of one text, one per strength (0: unsteered). ``kl`` [n]: how far the next token's prediction is moved, in nats; ``logprob``
    [n]: what the unsteered model thinks of each new token on the way, on average."""

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
        rows = tuple((s, t, float(k), float(p)) for s, t, k, p in zip(self.strengths, self.texts, self.kl, self.logprob, strict=True))
        return Grid(
            ("strength", "continuation", "KL", "log-probability"),
            rows,
            "KL of the next token's prediction; mean log-probability of the new tokens by the unsteered model (nats)",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        names = [f"{s:g}" for s in self.strengths]
        bars(left, theme, names, self.kl, title="moved (KL, nats)", x="from the unsteered prediction")
        bars(right, theme, names, self.logprob, title="unsteered model's log-probability", x="mean per new token (nats)")
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
    **options: Any,
) -> Steered:
    """Continue a text with the vector added, once per strength and once without: side by side.

    ``positions``: where it is added, counted in the whole row (an int: from there on). ``options``: of :func:`~glassformer.infer.generate.generate`
    (temperature, seed, ...).
    An encoder-decoder continues nothing: use ``generate(model, source, tap=vector.tap(4))``. Raises :class:`InputError` for a vector of another width.
    """
    from glassformer.infer.generate import generate

    s = read(model, text, tokenizer, source=source)
    check_reads_tokens(s.stack, "Steering")
    if s.prefix or not s.causal:
        raise InputError("A continuation is steered, but this model continues no text: for an encoder-decoder use generate(model, source, tap=vector.tap(4)).")
    if not isinstance(vector, SteeringVector):
        raise InputError(f"A steering vector is added, but {described(type(vector))} was given: steering_vector(...) makes one.")
    if "tap" in options:
        raise InputError("steer() adds its own vector as a tap, so it takes no tap: generate(model, text, tap=vector.tap(4) | other) takes both.")
    s.path(vector.path)
    chosen = tuple(map(_number, strength)) if isinstance(strength, Iterable) else (_number(strength),)
    if not chosen:
        raise InputError("No strength was given: name at least one number.")
    strengths = (0.0, *(c for c in chosen if c))
    outs, first = [], []
    for value in strengths:
        tap = vector.tap(value, positions) if value else None
        with torch.no_grad():
            first.append(s.run("logits", tap=tap)[1][-1].double().log_softmax(-1))
        outs.append(generate(s.model, list(s.ids), tokenizer=s.tokenizer, max_new_tokens=max_new_tokens, tap=tap, **options))
    kl = torch.stack([(first[0].exp() * (first[0] - f)).sum() for f in first]).float()
    plain = []
    for out in outs:
        whole = read(s.model, [*s.ids, *out.ids], s.tokenizer)
        log = whole.run("logits")[1].double().log_softmax(-1)[len(s) - 1 : -1]
        plain.append(log.gather(-1, torch.tensor(out.ids, device=log.device)[:, None]).mean())
    texts = tuple(o.text if o.text is not None else " ".join(map(str, o.ids)) for o in outs)
    shown = text if isinstance(text, str) else " ".join(s.pieces)
    return Steered(shown, vector.label, vector.path, strengths, texts, tuple(tuple(o.ids) for o in outs), kl, torch.stack(plain).float())
