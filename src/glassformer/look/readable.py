"""Probes that need no labels: which token stood k places back, at which place a token stands, how long its vector is.

Each is a ridge regression in closed form, fitted on some windows of the texts and measured on the others. Windows of equal content go together:
what is repeated in the texts is not seen in fitting and then asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.errors import InputError
from glassformer.text import Tokenizer

from .figure import Theme, dress, heatmap, lines
from .fitting import folds_of, half_width, predicted, ridge_predicted, scores_by_fold
from .probing import check_folds, draw_by_site
from .result import Cell, Grid, Result
from .subject import check_whole, choose
from .vectors import Table, table_of
from .windows import Batch, Reading, Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAM = ("embed", "blocks.*.resid_post")
CONTEXT = 64
"""Tokens of a window here: a window is what a fold consists of, so there must be many."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """Vectors of every token by path [n d], and each token's window, place in it, and id [n]. ``group`` [n]: one for all windows of equal content."""

    x: dict[str, Tensor]
    window: Tensor
    place: Tensor
    ids: Tensor
    group: Tensor


def _rows(reading: Reading, paths: Sequence[str], folds: int) -> _Rows:
    x: dict[str, list[Tensor]] = {p: [] for p in paths}
    window: list[Tensor] = []
    place: list[Tensor] = []
    ids: list[Tensor] = []
    content: list[tuple[int, ...]] = []

    def look(path: str, values: Tensor, batch: Batch) -> None:
        if values.shape[:2] != batch.tokens.shape:
            raise InputError(f"{reading.short(path)!r} has the shape {tuple(values.shape)}: a probe reads one vector for each token, [b t d].")
        real = batch.real.clone()
        for row, w in enumerate(batch.windows):
            real[row, : w.before] = False  # what stands around a text is none of its tokens
            real[row, len(w.ids) - w.after :] = False
        x[path].append(values.flatten(2)[real].float().cpu())
        if path == paths[0]:
            content.extend(w.ids[w.before : len(w.ids) - w.after] for w in batch.windows)
            rows, at = real.nonzero(as_tuple=True)
            before = torch.tensor([w.before for w in batch.windows], device=rows.device)
            window.append((rows + batch.number).cpu())
            place.append((at - before[rows]).cpu())
            ids.append(batch.tokens[real].cpu())

    reading.run(paths, look)
    windows = torch.cat(window)
    made = _Rows({p: torch.cat(parts) for p, parts in x.items()}, windows, torch.cat(place), torch.cat(ids), _groups(content)[windows])
    n = len(made.group.unique())
    if n < max(folds, 3):
        raise InputError(
            f"{folds} folds need at least {max(folds, 3)} different windows, but the texts make {n} of {reading.context} tokens: "
            "give more text, or a smaller context."
        )
    return made


def _read(model: Any, texts: Texts, site: Any, folds: int, seed: int, **options: Any) -> tuple[Reading, list[str], _Rows]:
    """What a probe begins with: the texts read, the full paths of its sites, and their rows."""
    check_folds(folds)
    check_whole(0, seed=seed)
    reading = Reading(model, texts, **options)
    paths = reading.vector_sites(site)
    return reading, paths, _rows(reading, paths, folds)


def _groups(content: Sequence[tuple[int, ...]]) -> Tensor:
    """A number for every window [w], the same for equal content. The last, which may be cut short, also belongs to an earlier one that begins with it."""
    last = content[-1]
    begun = next((c for c in content[:-1] if c[: len(last)] == last), last)
    number: dict[tuple[int, ...], int] = {}
    return torch.tensor([number.setdefault(c, len(number)) for c in (*content[:-1], begun)])


def _by_fold(right: Tensor, fold: Tensor) -> Tensor:
    return torch.stack([right[fold == f].double().mean() for f in range(int(fold.max()) + 1)]).float()


def _r2(x: Tensor, y: Tensor, fold: Tensor, group: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Held-out ``R^2`` by fold [f] of one number [n], and what every row of it was predicted to be [n]."""
    guess = predicted(x, y, 0, fold, group, "linear", seed)
    return scores_by_fold(guess, y, fold, 0), guess


# Tokens back


@dataclass(frozen=True, eq=False)
class PositionBack(Result):
    """Share of tokens ``k`` places back that are named rightly from the vector at a place. ``accuracy`` [l k]; ``majority``: the share of the commonest token.

    The row ``embed`` reads from the token alone: what it reaches for ``k > 0`` is what texts make predictable, not what the model carried.
    """

    sites: tuple[str, ...]
    back: tuple[int, ...]
    accuracy: Tensor
    width: Tensor
    majority: float
    candidates: int
    examples: int

    @property
    def title(self) -> str:
        return f"Which of {self.candidates:,} tokens stood k places back, read linearly ({self.examples:,} examples)"

    def __getitem__(self, which: tuple[str, int]) -> float:
        site, k = which
        if site not in self.sites or k not in self.back:
            raise InputError(f"{which!r} was not probed: sites are {', '.join(self.sites)}, places back {self.back}.")
        return float(self.accuracy[self.sites.index(site), self.back.index(k)])

    def grid(self) -> Grid:
        rows: tuple[tuple[Cell, ...], ...] = tuple((site, *(float(v) for v in row)) for site, row in zip(self.sites, self.accuracy, strict=True))
        note = f"Always naming the commonest token reaches {self.majority:.3f}. The row of the embedding has seen no other token: compare with it."
        return Grid(("site", *(f"{k} back" for k in self.back)), rows, note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        texts = [[f"{float(v):.2f}" for v in row] for row in self.accuracy]
        axes = figure.subplots()
        heatmap(
            axes, theme, self.accuracy, self.sites, [str(k) for k in self.back], title=self.title, x="places back", label="accuracy", texts=texts, limit=1.0
        )

    def size(self) -> tuple[float, float]:
        return (8.5, 1.6 + 0.32 * len(self.sites))


def probe_position_back(
    model: Any,
    texts: Texts | None = None,
    back: int | Sequence[int] = (0, 1, 2, 3, 4, 5),
    *,
    site: str | Sequence[str] = STREAM,
    folds: int = 5,
    tokens: int | None = 10_000,
    context: int = CONTEXT,
    seed: int = 0,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> PositionBack:
    """Whether the token ``k`` places back can be read linearly from the vectors at ``site``, for every ``k`` of ``back``.

    The probe maps a vector to the embedding of the token back there (centred, at length one) by ridge regression; the answer is the token of the nearest
    embedding by cosine among all that occur in the texts. ``texts`` None: tokens drawn at random, where nothing but memory can tell what stood where.
    All ``k`` are measured at the same places (those that have so many before them). Windows are parted into folds, equal ones together.
    Raises :class:`InputError` for places back that no window has, and too few windows.
    """
    ks = _places_back(back, context)
    check_whole(0, seed=seed)
    check_whole(1, context=context, **({} if tokens is None else {"tokens": tokens}))
    table = table_of(model, "input", tokenizer)
    if texts is None:
        texts = _random_texts(table, max(20, (tokens or 10_000) // context), context, seed)
    reading, paths, got = _read(model, texts, site, folds, seed, tokenizer=tokenizer, source=source, context=context, tokens=tokens)
    far = (got.place >= max(ks)).nonzero()[:, 0]
    if not len(far):
        raise InputError(f"No window has {max(ks)} tokens before another: give longer texts, or fewer places back.")
    kinds, kind = got.ids.unique(return_inverse=True)
    vectors = F.normalize(table.vectors[kinds] - table.vectors[kinds].mean(0), dim=-1)
    group = got.group[far]
    check_folds(folds, len(group.unique()))
    fold = folds_of(group, folds, seed)
    y = torch.cat([vectors[kind[far - k]] for k in ks], 1)  # rows of a window stand one after the other, so k rows up is k places back
    w = vectors.shape[1]
    parts = [slice(i * w, (i + 1) * w) for i in range(len(ks))]
    accuracy = torch.empty(len(paths), len(ks), folds)
    for i, path in enumerate(paths):
        guess = ridge_predicted(got.x[path][far], y, fold, group, seed, parts)
        for j, (k, part) in enumerate(zip(ks, parts, strict=True)):
            named = torch.cat([(F.normalize(g, dim=-1) @ vectors.T).argmax(1) for g in guess[:, part].split(4096)])
            accuracy[i, j] = _by_fold(named == kind[far - k], fold)
    common = float(torch.stack([kind[far - k].bincount().max() / len(far) for k in ks]).max())
    return PositionBack(tuple(reading.short(p) for p in paths), ks, accuracy.mean(-1), half_width(accuracy), common, len(kinds), len(far))


def _places_back(back: int | Sequence[int], context: int) -> tuple[int, ...]:
    """The places that are asked about; raises :class:`InputError` for what is none, or further back than a window reaches."""
    check_whole(1, context=context)
    ks = tuple(back) if isinstance(back, Sequence) else (back,)
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in ks):
        raise InputError(f"back={back!r}: places back are whole numbers from 0 (the token itself).")
    if max(ks) >= context:
        raise InputError(f"The token {max(ks)} places back was asked for, but windows have {context} tokens: give a larger context.")
    return ks


def _random_texts(table: Table, rows: int, context: int, seed: int) -> Tensor:
    """Tokens drawn evenly from those that some text can reach: [rows context]."""
    usable = table.usable.nonzero()[:, 0]
    return usable[torch.randint(len(usable), (rows, context), generator=torch.Generator().manual_seed(seed))]


# Order


@dataclass(frozen=True, eq=False)
class Order(Result):
    """Whether places can be read: ``position`` [l f] is ``R^2`` of the place in the window, ``order`` [l f] the share of pairs of tokens of one window
    (at most ``within`` apart) whose order the read places give rightly, 0.5 by chance."""

    sites: tuple[str, ...]
    position: Tensor
    order: Tensor
    within: int
    examples: int

    @property
    def title(self) -> str:
        return f"Place and order, read linearly ({self.examples:,} tokens; pairs at most {self.within} apart)"

    def grid(self) -> Grid:
        place, pairs = half_width(self.position).tolist(), half_width(self.order).tolist()
        rows = [
            (s, float(self.position[i].mean()), place[i], float(self.order[i].mean()), pairs[i])
            for i, s in enumerate(self.sites)
        ]  # fmt: skip
        return Grid(("site", "place R²", "±", "order", "± "), tuple(rows), "Order: share of pairs put the right way round, 0.5 by chance.")

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        # A probe that does worse than the mean has an R^2 below zero, however far: such a point is drawn at -0.2.
        named = {
            "order of two tokens": (self.order.mean(-1), half_width(self.order)),
            "place (R²)": (self.position.mean(-1).clamp_min(-0.2), half_width(self.position).clamp_max(0.3)),
        }
        draw_by_site(axes, theme, self.sites, named, 0.5, "order by chance")
        dress(axes, theme, self.title, "site", "accuracy, R²")


def probe_order(
    model: Any,
    texts: Texts,
    *,
    site: str | Sequence[str] = STREAM,
    within: int = 8,
    folds: int = 5,
    tokens: int | None = 10_000,
    context: int = CONTEXT,
    seed: int = 0,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Order:
    """Whether a token's place in its window, and the order of two tokens, can be read linearly from the vectors at ``site``.

    A ridge regression reads the place; the order of a pair at most ``within`` apart is the order of the two places read. In a causal model a place can
    be read also where no position is put in: what a token sees grows along the row. Raises :class:`InputError` for too few windows.
    """
    if isinstance(within, bool) or not isinstance(within, int) or within < 1:
        raise InputError(f"within={within!r}: two tokens of a pair are at least 1 apart.")
    reading, paths, got = _read(model, texts, site, folds, seed, tokenizer=tokenizer, source=source, context=context, tokens=tokens)
    fold = folds_of(got.group, folds, seed)
    y = got.place.float()
    if float(y.std()) == 0:
        raise InputError("Every window has one token, so there are no places to tell apart: give longer texts.")
    draw = torch.Generator().manual_seed(seed)
    second = torch.arange(len(y))
    first = second - torch.randint(1, min(within, int(y.max())) + 1, (len(y),), generator=draw)
    real = (first >= 0) & (got.window[first.clamp_min(0)] == got.window)
    first, second = first[real], second[real]
    position, order = [], []
    for path in paths:
        r2, guess = _r2(got.x[path], y, fold, got.group, seed)
        position.append(r2)
        gap = guess[second] - guess[first]
        order.append(_by_fold((gap > 0).double() + 0.5 * (gap == 0), fold[second]))
    return Order(tuple(reading.short(p) for p in paths), torch.stack(position), torch.stack(order), within, len(y))


# The norm


@dataclass(frozen=True, eq=False)
class Scalar(Result):
    """How well a number of the vector that enters each layer can be read linearly from it, and from what attention reads of it (behind the norm, where
    there is one): ``R^2`` [l f] each."""

    target: str
    layers: tuple[int, ...]
    stream: Tensor
    normed: Tensor
    examples: int

    @property
    def title(self) -> str:
        what = "logarithm of the length" if self.target == "norm" else "mean"
        return f"The {what} of the stream's vectors, read before and behind the norm ({self.examples:,} tokens)"

    def grid(self) -> Grid:
        width = half_width(self.normed).tolist()
        rows = [(n, float(a.mean()), float(b.mean()), w) for n, a, b, w in zip(self.layers, self.stream, self.normed, width, strict=True)]
        return Grid(
            ("layer", "from the stream", "behind the norm", "±"), tuple(rows), "R² on held-out windows: 1 if it can be read, 0 if the mean does as well."
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        named = {"from the stream": self.stream.mean(-1).clamp_min(-0.2), "behind the norm": self.normed.mean(-1).clamp_min(-0.2)}
        what = "log length" if self.target == "norm" else "mean"
        lines(axes, theme, self.layers, named, title=f"Reading the stream's {what} before and behind the norm", x_name="layer", y_name="R²")
        axes.set_xticks(self.layers)


def probe_norm(
    model: Any,
    texts: Texts,
    *,
    target: str = "norm",
    skip: int = 1,
    folds: int = 5,
    tokens: int | None = 10_000,
    context: int = CONTEXT,
    seed: int = 0,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Scalar:
    """Whether the length of the stream's vectors (``target="norm"``, its logarithm) or their ``"mean"`` can still be read behind the norm.

    A norm divides the length away, and a LayerNorm subtracts the mean; yet a length may be told from the direction, where the two go together.
    ``skip``: first tokens of every window left out (in many models the first one's vector is by far the longest). In models whose attention reads the
    stream as it is both columns are equal. Raises :class:`InputError` for too few windows.
    """
    choose(target, ("norm", "mean"), "number of a vector")
    check_whole(0, skip=skip)
    ends = ("resid_pre", "attn.in")
    sites = [f"blocks.*.{end}" for end in ends]
    reading, paths, got = _read(model, texts, sites, folds, seed, tokenizer=tokenizer, source=source, context=context, tokens=tokens)
    before, behind = ([p for p in paths if p.endswith(end)] for end in ends)
    kept = (got.place >= skip).nonzero()[:, 0]
    if not len(kept):
        raise InputError(f"skip={skip} leaves no token of windows of {reading.context}: skip fewer.")
    group = got.group[kept]
    check_folds(folds, len(group.unique()))
    fold = folds_of(group, folds, seed)
    stream, normed = [], []
    for a, b in zip(before, behind, strict=True):
        x, z = got.x[a][kept], got.x[b][kept]
        y = x.norm(dim=1).clamp_min(1e-30).log() if target == "norm" else x.mean(1)
        stream.append(_r2(x, y, fold, group, seed)[0])
        normed.append(_r2(z, y, fold, group, seed)[0])
    return Scalar(target, tuple(range(len(before))), torch.stack(stream), torch.stack(normed), len(kept))
