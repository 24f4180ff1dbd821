"""Units of feed-forward layers: what they answer to, and what they add.

    x ──► W_in ──► act (and gate) ──► post_i ──► post_i * W_out[:, i] is added to the stream

``post_i`` is the number that the unit's column of ``W_out`` is multiplied by, so it alone says how much of that column a token gets.

neurons(model, path, layer=2)     units with their statistics, top contexts and directions as words
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.models.transformer import TransformerModel
from glassformer.parts.feedforward import GatedLayer
from glassformer.text import Tokenizer

from .directions import Words, words_read, words_written
from .figure import Theme, dress, plain_text
from .moments import Moments
from .result import Cell, Grid, Result
from .subject import check_layer, check_whole, choose, feedforward_of
from .windows import Batch, Context, Reading, Texts, Window, context_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANKINGS = ("largest", "smallest", "absolute")


@dataclass(frozen=True, eq=False)
class Neuron(Result):
    """One unit: statistics of its ``post``, the contexts where it is largest, its directions as words (``None`` where they cannot be read)."""

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
    def title(self) -> str:
        return f"Unit {self.unit} of the feed-forward layer {self.layer}, over {self.tokens:,} tokens"

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = [(float(c.value), c.pieces[c.at], str(c)) for c in self.contexts]
        said = [
            f"above zero at {self.positive:.1%} of tokens; mean {self.mean:.3g}, deviation {self.deviation:.3g}, smallest {self.smallest:.3g}, "
            f"largest {self.largest:.3g}, kurtosis {self.kurtosis:.3g}"
        ]
        named = {"raises": self.raises, "lowers": self.lowers, "gate reads" if self.values_read else "reads": self.reads, "value reads": self.values_read}
        said += [f"{name}: {words}" for name, words in named.items() if words is not None]
        return Grid(("post", "token", "context"), tuple(rows), "\n".join(said))

    def draw(self, figure: Figure, theme: Theme) -> None:
        draw_contexts(figure.subplots(), theme, self)

    def size(self) -> tuple[float, float]:
        return (10.0, 1.1 + 0.27 * (len(self.contexts) + sum(w is not None for w in (self.raises, self.lowers, self.reads, self.values_read))))


@dataclass(frozen=True, eq=False)
class Neurons(Result):
    """Several units, the most peaked first; ``result["2.17"]`` or ``result[2, 17]`` is one of them."""

    units: tuple[Neuron, ...]
    considered: int
    """Of how many units these are the most peaked (or the ones asked for)."""
    chosen: str

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
            rows.append((u.name, u.positive, u.mean, u.largest, u.kurtosis, tokens, str(u.raises) if u.raises else None, str(u.lowers) if u.lowers else None))
        return Grid(("unit", "positive", "mean", "largest", "kurtosis", "top tokens", "raises", "lowers"), tuple(rows))

    def draw(self, figure: Figure, theme: Theme) -> None:
        shown = self.units[:4]
        for axes, unit in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            draw_contexts(axes, theme, unit, 5)

    def size(self) -> tuple[float, float]:
        return (
            10.0,
            sum(0.7 + 0.27 * (min(5, len(u.contexts)) + sum(w is not None for w in (u.raises, u.lowers, u.reads, u.values_read))) for u in self.units[:4]),
        )


def draw_contexts(axes: Axes, theme: Theme, unit: Neuron, most: int = 20) -> None:
    """The unit's contexts as lines of text, every token shaded by its value; below them the unit's words."""
    dress(axes, theme, f"{unit.name}   above zero at {unit.positive:.1%}, kurtosis {unit.kurtosis:.3g}", grid=False)
    shown = unit.contexts[:most]
    top = max((abs(v) for c in shown for v in c.values or (c.value,)), default=1.0) or 1.0
    width, row = 118, 0
    for c in shown:
        room = width - 11 - len(c.pieces[c.at])
        before, after = c.pieces[: c.at], c.pieces[c.at + 1 :]
        while sum(map(len, before)) > room * 2 // 3:
            before = before[1:]
        while sum(map(len, before + after)) > room:
            after = after[:-1]
        first = c.at - len(before)
        axes.text(0, row, f"{c.value:9.3g}", family="monospace", fontsize=9, color=theme.dim, va="center")
        x = 10 + room * 2 // 3 - sum(map(len, before))
        for i, piece in enumerate((*before, c.pieces[c.at], *after), first):
            value = c.values[i] if c.values else c.value if i == c.at else 0.0
            colour = theme.series[0] if value > 0 else theme.series[1]
            axes.barh(row, len(piece), left=x, height=0.86, color=colour, alpha=min(1.0, abs(value) / top) * 0.75, linewidth=0)
            axes.text(x, row, plain_text(piece), family="monospace", fontsize=9, color=theme.ink, va="center", fontweight="bold" if i == c.at else "normal")
            x += len(piece)
        row += 1
    for name, words in (("raises", unit.raises), ("lowers", unit.lowers), ("reads", unit.reads), ("× reads", unit.values_read)):
        if words is not None:
            line = ""
            for piece in words.pieces:
                line = line if len(line) + len(piece) + 2 > width - 11 else f"{line}  {piece}"
            axes.text(0, row, f"{name:>9}", family="monospace", fontsize=9, color=theme.dim, va="center")
            axes.text(9, row, plain_text(line), family="monospace", fontsize=9, color=theme.dim, va="center")
            row += 1
    axes.set_xlim(-0.5, width)
    axes.set_ylim(row - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


# Where units are


def unit_site(stack: Any, layer: int, what: str = "Its units") -> str:
    """The site of a layer's hidden units. Raises :class:`InputError` for a mixture of experts that has no expert for every token."""
    kind = feedforward_of(stack, layer)
    if kind == "ffn":
        return f"blocks.{layer}.ffn.post"
    block: Any = stack.blocks[layer]
    if block.experts.shared is not None:
        return f"blocks.{layer}.experts.shared.post"
    raise InputError(
        f"Layer {layer} is a mixture of experts: each expert sees only the tokens that chose it, so its hidden units are no site. {what} can be looked at "
        "in layers with a plain feed-forward layer or a shared expert; look at the router's choices with the site "
        f"'blocks.{layer}.experts.chosen' instead."
    )


def feedforward_layer(stack: TransformerModel, layer: int) -> Any:
    """The module behind :func:`unit_site`."""
    block: Any = stack.blocks[layer]
    return block.ffn if feedforward_of(stack, layer) == "ffn" else block.experts.shared


def unit_sites(reading: Reading, layer: int | None) -> dict[str, int]:
    """The layers that are looked at, by the full paths of their units."""
    stack = reading.stack
    if layer is not None:
        return {reading.subject.path(unit_site(stack, check_layer(stack, layer))): layer}
    found: dict[str, int] = {}
    trouble: InputError | None = None
    for i in range(reading.subject.layers):
        try:
            found[reading.subject.path(unit_site(stack, i))] = i
        except InputError as error:
            trouble = error
    if not found and trouble is not None:
        raise trouble
    return found


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
    by: str = "largest",
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
    ``"absolute"``-ly largest ``post``. ``skip``: so many tokens at the beginning of every window, which see next to nothing, do not count.
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
    moments, tops, positive = {p: Moments() for p in paths}, {p: _Top(top, by) for p in paths}, dict.fromkeys(paths, torch.zeros(()))
    windows: list[Window] = []

    def look(path: str, x: Tensor, batch: Batch) -> None:
        if path == first:
            windows.extend(batch.windows)
        if wanted is not None:
            if int(wanted.max()) >= x.shape[-1]:
                raise SiteError(f"Unit {int(wanted.max())} was asked for, but layer {layer} has {x.shape[-1]} units, 0 to {x.shape[-1] - 1}.")
            x = x[..., wanted.to(x.device)]
        counted = batch.real.clone()
        counted[:, :skip] = False
        if not counted.any():
            return
        values = x[counted].float().cpu()
        rows, places = counted.nonzero(as_tuple=True)
        moments[path].add(values)
        positive[path] = positive[path] + (values > 0).sum(0)
        tops[path].add(values, rows.cpu() + batch.number, places.cpu())

    first = next(iter(paths))
    reading.run(list(paths), look)
    if not moments[first].n:
        raise InputError(f"skip={skip} leaves no token of the windows, which have {reading.context} tokens at most: skip fewer.")
    peaked = [(float(k), p, i) for p in paths for i, k in enumerate(moments[p].kurtosis())]
    chosen = peaked if wanted is not None else sorted(peaked, key=lambda c: (-c[0], c[1], c[2]))[:count]
    made = []
    for _, path, i in chosen:
        unit = i if wanted is None else int(wanted[i])
        places = [(windows[int(r)], int(t), float(v)) for v, r, t in zip(tops[path].values[i], tops[path].rows[i], tops[path].places[i], strict=True)]
        made.append((paths[path], unit, path, i, places))
    around_them = _around(reading, [(path, unit, places) for _, unit, path, _, places in made], around)
    among = torch.tensor(sorted({i for w in windows for i in w.ids}))
    result = []
    for (number, unit, path, i, _), contexts in zip(made, around_them, strict=True):
        m = moments[path]
        raises, lowers, reads, values_read = _words(reading.stack, reading.subject, number, unit, words, among)
        result.append(
            Neuron(
                number, unit, reading.short(path), float(positive[path][i]) / m.n, float(m.mean[i]), float(m.deviation()[i]), float(m.smallest[i]),
                float(m.largest[i]), float(m.kurtosis()[i]), m.n, contexts, raises, lowers, reads, values_read,
            )
        )  # fmt: skip
    how = "as asked for" if wanted is not None else "of the largest kurtosis"
    return Neurons(tuple(result), len(peaked), how)


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


def _words(stack: Any, subject: Any, layer: int, unit: int, k: int, among: Tensor) -> tuple[Words | None, Words | None, Words | None, Words | None]:
    """What the unit raises, lowers, reads by its (gate's) row, and by the row that the gate multiplies."""
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
