"""Units of feed-forward layers: what they answer to, and what they add.

    x ──► W_in ──► act (and gate) ──► post_i ──► post_i * W_out[:, i] is added to the stream

``post_i`` is the number that the unit's column of ``W_out`` is multiplied by, so it alone says how much of that column a token gets.

neurons(model, path, layer=2)     units with their statistics, top contexts and directions as words
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.models.transformer import TransformerModel
from glassformer.parts.feedforward import GatedLayer
from glassformer.text import Tokenizer

from .directions import Words, words_read, words_written
from .figure import Theme
from .moments import Moments
from .result import Cell, Grid, Result
from .subject import check_whole, choose
from .unit_figure import draw_contexts
from .unit_places import feedforward_layer, unit_sites
from .windows import Batch, Context, Reading, Texts, Window, context_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKINGS = ("extreme", "largest", "smallest", "absolute")
"""Which values' contexts are shown: those of the end that lies further from the mean, of either end, or of those furthest from zero."""
SHOWN = {"largest": "largest", "smallest": "smallest", "absolute": "absolutely largest"}
BELOW_ZERO = "Where post is below zero, a unit lowers what it is said to raise, and raises what it is said to lower."


def side_of(mean: float, smallest: float, largest: float) -> str:
    """On which side of the mean the value furthest from it lies: ``"above"`` or ``"below"``."""
    return "above" if largest - mean >= mean - smallest else "below"


@dataclass(frozen=True, eq=False)
class Neuron(Result):
    """One unit: statistics of its ``post``, the contexts where it lies furthest out, its directions as words (``None`` where they cannot be read)."""

    layer: int
    unit: int
    site: str
    positive: float
    """Share of tokens where it is above zero."""
    mean: float
    deviation: float
    smallest: float
    largest: float
    kurtosis: float
    """Fourth standardised moment (a normal distribution has 3): large where the unit is silent but for a few tokens."""
    tokens: int
    contexts: tuple[Context, ...]
    by: str
    """Of which values: ``"largest"``, ``"smallest"`` or ``"absolute"``."""
    raises: Words | None
    lowers: Words | None
    reads: Words | None
    """Tokens whose embedding points along what the unit multiplies the stream by (in gated layers: the gate's row)."""
    values_read: Words | None
    """Gated layers: the same for the row that the gate multiplies."""

    @property
    def name(self) -> str:
        """``"2.17"``."""
        return f"{self.layer}.{self.unit}"

    @property
    def side(self) -> str:
        """On which side of the mean the value furthest from it lies: ``"above"`` or ``"below"``."""
        return side_of(self.mean, self.smallest, self.largest)

    @property
    def extreme(self) -> float:
        """The value furthest from the mean."""
        return self.largest if self.side == "above" else self.smallest

    def words(self, reads: str = "reads", values_read: str = "value reads") -> list[tuple[str, Words | None]]:
        """The directions by name."""
        return [("raises", self.raises), ("lowers", self.lowers), (reads, self.reads), (values_read, self.values_read)]

    @property
    def title(self) -> str:
        return f"Unit {self.unit} of the feed-forward layer {self.layer}, over {self.tokens:,} tokens"

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = [(float(c.value), c.pieces[c.at], str(c)) for c in self.contexts]
        said = [
            f"above zero at {self.positive:.1%} of tokens; mean {self.mean:.3g}, deviation {self.deviation:.3g}, smallest {self.smallest:.3g}, "
            f"largest {self.largest:.3g}, kurtosis {self.kurtosis:.3g}; the value furthest from the mean lies {self.side} it",
            f"contexts of the {SHOWN[self.by]} values",
        ]
        said += [f"{name}: {words}" for name, words in self.words("gate reads" if self.values_read else "reads") if words is not None]
        if self.extreme < 0:
            said.append(BELOW_ZERO)
        return Grid(("post", "token", "context"), tuple(rows), "\n".join(said))

    def draw(self, figure: Figure, theme: Theme) -> None:
        draw_contexts(figure.subplots(), theme, self)

    def size(self) -> tuple[float, float]:
        return (10.0, 1.1 + 0.27 * (len(self.contexts) + sum(w is not None for _, w in self.words())))


@dataclass(frozen=True, eq=False)
class Neurons(Result):
    """Several units, the most peaked first; ``result["2.17"]`` or ``result[2, 17]`` is one of them."""

    units: tuple[Neuron, ...]
    considered: int
    """Of how many units these are the most peaked (or the ones asked for)."""
    chosen: str
    by: str

    def __getitem__(self, which: str | int | tuple[int, int]) -> Neuron:
        for i, u in enumerate(self.units):
            if which in (i, u.name, (u.layer, u.unit)):
                return u
        raise InputError(f"Unit {which!r} is none of those looked at: {', '.join(u.name for u in self.units)}. Ask for it with layer= and units=.")

    def __iter__(self) -> Iterator[Neuron]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def title(self) -> str:
        return f"{len(self.units)} of {self.considered:,} feed-forward units, {self.chosen}, over {self.units[0].tokens:,} tokens"

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = []
        for u in self.units:
            tokens = " ".join(dict.fromkeys(c.pieces[c.at] for c in u.contexts))
            words = (str(u.raises) if u.raises else None, str(u.lowers) if u.lowers else None)
            rows.append((u.name, u.positive, u.mean, u.side, u.extreme, u.kurtosis, tokens, *words))
        shown = "those values of that side" if self.by == "extreme" else f"the {SHOWN[self.by]} values"
        note = f"side: of the mean, on which the value furthest from it (extreme) lies; tokens: of {shown}."
        if any(u.extreme < 0 for u in self.units):
            note += f" {BELOW_ZERO}"
        return Grid(("unit", "positive", "mean", "side", "extreme", "kurtosis", "tokens", "raises", "lowers"), tuple(rows), note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        shown = self.units[:4]
        for axes, unit in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            draw_contexts(axes, theme, unit, 5)

    def size(self) -> tuple[float, float]:
        return (10.0, sum(0.7 + 0.27 * (min(5, len(u.contexts)) + sum(w is not None for _, w in u.words())) for u in self.units[:4]))


# Top contexts


class _Top:
    """The ``k`` largest values of every unit so far, and where they stand: [f k], merged batch by batch."""

    def __init__(self, k: int, by: str):
        self.k, self.by = k, by
        self.values, self.rows, self.places = torch.empty(0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def add(self, x: Tensor, rows: Tensor, places: Tensor) -> None:
        """Values [n f] with the number of the window and the place in it of each [n]."""
        score = x.T if self.by == "largest" else -x.T if self.by == "smallest" else x.T.abs()
        at = score.contiguous().topk(min(self.k, len(x)), dim=1).indices
        values, rows, places = x.T.gather(1, at), rows[at], places[at]
        if self.values.numel():
            values, rows, places = (torch.cat(pair, 1) for pair in ((self.values, values), (self.rows, rows), (self.places, places)))
            score = values if self.by == "largest" else -values if self.by == "smallest" else values.abs()
            at = score.topk(min(self.k, score.shape[1]), dim=1).indices
            values, rows, places = (a.gather(1, at) for a in (values, rows, places))
        self.values, self.rows, self.places = values, rows, places


def neurons(
    model: Any,
    texts: Texts,
    *,
    layer: int | None = None,
    units: int | Sequence[int] | None = None,
    top: int = 10,
    count: int = 8,
    by: str = "extreme",
    words: int = 8,
    around: int = 12,
    skip: int = 0,
    tokens: int | None = 200_000,
    context: int | None = None,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Neurons:
    """Hidden units of feed-forward layers over many texts: statistics, the ``top`` contexts of each, and their directions as words.

    ``texts``: a text, a list, token ids, or a file (``pathlib.Path``), read in windows of ``context`` tokens, at most ``tokens`` in all. ``layer``, ``units``:
    which (units need a layer); without ``units`` the ``count`` of largest kurtosis are shown. ``by``: contexts of the ``"largest"``, ``"smallest"`` or
    ``"absolute"``-ly largest ``post``, or (``"extreme"``) of the largest or the smallest, whichever end lies further from the unit's mean.
    ``skip``: so many tokens at the beginning of every window, which see next to nothing, do not count.
    ``words``: how many tokens a direction is read as, among those that occur in the texts (rows that training never met point anywhere).

    Held at a time: one layer's hidden units of one batch, and ``top`` values for every unit.
    Raises :class:`InputError` for layers whose units are inside experts, and :class:`SiteError` for layers and units that the model has not.
    """
    choose(by, RANKINGS, "ranking of contexts")
    check_whole(1, top=top, count=count)
    check_whole(0, words=words, around=around, skip=skip)
    wanted = None if units is None else _chosen(units, layer)
    reading = Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    paths = unit_sites(reading, layer)
    seen = _Survey(paths, wanted, top, by, skip)
    reading.run(list(paths), seen.look)
    if not seen.counted:
        raise InputError(f"skip={skip} leaves no token of the windows, which have {reading.context} tokens at most: skip fewer.")
    picked = seen.picked(count)
    contexts = _around(reading, [(p.path, p.unit, p.places) for p in picked], around)
    among = torch.tensor(sorted({i for w in seen.windows for i in w.ids}))
    made = tuple(seen.neuron(reading, p, c, _words(reading.subject, p.layer, p.unit, words, among)) for p, c in zip(picked, contexts, strict=True))
    how = "as asked for" if wanted is not None else "of the largest kurtosis"
    return Neurons(made, sum(len(k) for k in seen.kurtosis.values()), how, by)


@dataclass(frozen=True, eq=False)
class _Picked:
    """A unit that is shown: where it is, its column among those that were gathered, and the places of its values furthest out."""

    layer: int
    unit: int
    path: str
    column: int
    by: str
    places: list[tuple[Window, int, float]]


class _Survey:
    """Statistics of the units at some sites (``paths``: layer by path; ``wanted``: some of one layer) and where their top values stand, batch by batch."""

    def __init__(self, paths: dict[str, int], wanted: Tensor | None, top: int, by: str, skip: int):
        self.paths, self.wanted, self.by, self.skip = paths, wanted, by, skip
        self.windows: list[Window] = []
        self.moments = {p: Moments() for p in paths}
        self.positive = dict.fromkeys(paths, torch.zeros(()))
        ends = ("largest", "smallest") if by == "extreme" else (by,)  # which end lies further out is known when all has been read
        self.tops = {p: {end: _Top(top, end) for end in ends} for p in paths}

    @property
    def counted(self) -> int:
        """Tokens that count."""
        return next(iter(self.moments.values())).n

    def look(self, path: str, x: Tensor, batch: Batch) -> None:
        """Take a batch's values [b t f] at one site."""
        if path == next(iter(self.paths)):
            self.windows.extend(batch.windows)
        if self.wanted is not None:
            if int(self.wanted.max()) >= x.shape[-1]:
                raise SiteError(f"Unit {int(self.wanted.max())} was asked for, but layer {self.paths[path]} has {x.shape[-1]} units, 0 to {x.shape[-1] - 1}.")
            x = x[..., self.wanted.to(x.device)]
        counts = batch.real.clone()
        counts[:, : self.skip] = False
        if not counts.any():
            return
        values = x[counts].float().cpu()
        rows, places = (i.cpu() for i in counts.nonzero(as_tuple=True))
        self.moments[path].add(values)
        self.positive[path] = self.positive[path] + (values > 0).sum(0)
        for kept in self.tops[path].values():
            kept.add(values, rows + batch.number, places)

    @cached_property
    def kurtosis(self) -> dict[str, Tensor]:
        """[f] by path."""
        return {p: m.kurtosis() for p, m in self.moments.items()}

    def picked(self, count: int) -> list[_Picked]:
        """The units that were asked for, or the ``count`` of largest kurtosis."""
        every = [(float(k), path, i) for path in self.paths for i, k in enumerate(self.kurtosis[path])]
        chosen = every if self.wanted is not None else sorted(every, key=lambda c: (-c[0], c[1], c[2]))[:count]
        return [self._picked(path, i) for _, path, i in chosen]

    def _picked(self, path: str, column: int) -> _Picked:
        by, m = self.by, self.moments[path]
        if by == "extreme":
            above = side_of(*(float(x[column]) for x in (m.mean, m.smallest, m.largest))) == "above"
            by = "largest" if above else "smallest"
        top = self.tops[path][by]
        each = zip(top.rows[column].tolist(), top.places[column].tolist(), top.values[column].tolist(), strict=True)
        unit = column if self.wanted is None else int(self.wanted[column])
        return _Picked(self.paths[path], unit, path, column, by, [(self.windows[row], place, value) for row, place, value in each])

    def neuron(self, reading: Reading, p: _Picked, contexts: tuple[Context, ...], words: Sequence[Words | None]) -> Neuron:
        """A unit with its statistics."""
        m, i = self.moments[p.path], p.column
        raises, lowers, reads, values_read = words
        return Neuron(
            layer=p.layer,
            unit=p.unit,
            site=reading.short(p.path),
            positive=float(self.positive[p.path][i]) / m.n,
            mean=float(m.mean[i]),
            deviation=float(m.deviation()[i]),
            smallest=float(m.smallest[i]),
            largest=float(m.largest[i]),
            kurtosis=float(self.kurtosis[p.path][i]),
            tokens=m.n,
            contexts=contexts,
            by=p.by,
            raises=raises,
            lowers=lowers,
            reads=reads,
            values_read=values_read,
        )


def _chosen(units: Any, layer: int | None) -> Tensor:
    """The units that were asked for by number; raises :class:`InputError` for what are none."""
    if layer is None:
        raise InputError("units= names units within a layer, but no layer was given: add layer=.")
    given = units.reshape(-1).tolist() if isinstance(units, Tensor) else list(units) if isinstance(units, Sequence) and not isinstance(units, str) else [units]
    if not given or any(isinstance(u, bool) or not isinstance(u, int) or u < 0 for u in given):
        raise InputError(f"units={units!r}: units are whole numbers from 0, one or several.")
    return torch.tensor(list(dict.fromkeys(given)))


def _around(reading: Reading, wanted: list[tuple[str, int, list[tuple[Window, int, float]]]], around: int) -> list[tuple[Context, ...]]:
    """The contexts of each unit, with the unit's value at every piece: the windows that hold them are read once more."""
    held = {id(w): w for _, _, places in wanted for w, _, _ in places}
    paths = list(dict.fromkeys(path for path, _, _ in wanted))
    inside: dict[tuple[str, int], Tensor] = {}
    units = {path: sorted({unit for p, unit, _ in wanted if p == path}) for path in paths}

    def look(path: str, x: Tensor, batch: Batch) -> None:
        for row, w in enumerate(batch.windows):
            inside[path, id(w)] = x[row, : len(w.ids)][:, units[path]].float().cpu()

    order = {s.path: i for i, s in enumerate(reading.model.sites())}
    paths.sort(key=order.__getitem__)
    reading.run(paths, look, reading.together(held.values()))
    found = []
    for path, unit, places in wanted:
        column = units[path].index(unit)
        found.append(tuple(context_of(reading.tokenizer, w, t, v, around, inside[path, id(w)][:, column].tolist()) for w, t, v in places))
    return found


def _words(subject: Any, layer: int, unit: int, k: int, among: Tensor) -> tuple[Words | None, Words | None, Words | None, Words | None]:
    """What the unit raises, lowers, reads by its (gate's) row, and by the row that the gate multiplies."""
    stack = subject.stack
    if not k or not isinstance(stack, TransformerModel):
        return None, None, None, None
    ffn = feedforward_layer(stack, layer)
    raises, lowers = words_written(subject, layer, ffn, unit, k, among)
    reads = [words_read(subject, layer, row, k, among) for row in _rows(ffn, unit)]
    return raises, lowers, reads[0], reads[1] if len(reads) > 1 else None


def _rows(ffn: Any, unit: int) -> list[Tensor]:
    """What a unit multiplies its input by: the gate's row and the value's, or its only one."""
    from .vectors import matrix_of

    if isinstance(ffn, GatedLayer):
        both = matrix_of(ffn.gate_up)
        return [both[unit], both[unit + len(both) // 2]]
    return [matrix_of(ffn.up)[unit]]
