"""Which parts of the model make a logit: a sum, exact to rounding.

    logit = read-out . final norm( embedding + positions + every head + every feed-forward + biases )

    direct_logit_attribution(model, "The old man", target=" and")                each part's share, in logits
    direct_logit_attribution(model, text, target=(" he", " she"), by="source")   … of every head, by the token that it was read from
    decompose(model, text)                                                       the same sum, as vectors of the last stream

The norms on the way are held at the scale that they had for this text (:mod:`.linear`), and every bias is a part with a name.
"Direct" means the straight way of a part to the read-out: what a head does by being read by a later layer counts for that layer.
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; final norm held as in arXiv 2211.00593.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, did_you_mean
from glassformer.core.flow import Pass
from glassformer.core.numerics import wide
from glassformer.parts.attention import matrix_of
from glassformer.parts.experts import ExpertsLayer

from . import figure as drawing
from .linear import Frozen, Part, Pulled, Step, Walk, freeze_transform, units, walk
from .result import Grid, Result
from .subject import Positions, Subject, Target, Text, check_reads_tokens, choose, feedforward_of, read

BY = ("head", "layer", "neuron", "source")


def direct_logit_attribution(
    model: Any,
    text: Text,
    *,
    target: Any = None,
    positions: Positions = None,
    by: str = "head",
    top: int = 10,
    tokenizer: Any = None,
    source: Text | None = None,
) -> Attribution:
    """A logit (or the difference of two) at a position as a sum of parts: exact to rounding, ``.sum == .actual``.

    ``by``: ``"head"`` every head, feed-forward and bias; ``"layer"`` what each sublayer adds, its biases included; ``"neuron"`` the ``top`` units of
    every feed-forward by name and the others as one; ``"source"`` each head split over the tokens that it reads, ``pattern[t, s] v_s W_O`` (a
    :class:`BySource`). ``target`` None: the model's own choice. ``positions`` None: the last; of several, ``values`` are means and ``each`` holds all.
    A soft-cap on the logits is not linear: what is attributed is the logit before it. Of BERT's transform before the read-out the activation is held
    at the factor ``act(z) / z`` that it multiplied each feature by. Raises :class:`InputError` for a model that predicts no tokens, and for wrong names.
    """
    s = read(model, text, tokenizer, source=source)
    choose(by, BY, "way to split a logit")
    check_reads_tokens(s.stack, "direct_logit_attribution()")
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InputError(f"top={top!r} units of a layer were asked for by name, but that is a whole number of at least 1.")
    rows = s.positions(positions) if positions is not None and not isinstance(positions, str) else [s.position(positions)]
    sites = {"neuron": ["blocks.*.ffn.post"], "source": ["blocks.*.attn.pattern", "blocks.*.attn.v", "blocks.*.cross.pattern", "blocks.*.cross.v"]}.get(by, [])
    with torch.no_grad():
        w = walk(s, rows, "direct_logit_attribution()", *(site for site in sites if s.has(site)))
        reading = _Reading.of(w, target)
        pulled = w.pull(reading.direction, reading.maps)
        if by == "source":
            return _by_source(w, reading, pulled)
        summed = _sum_up(w, reading, pulled, top if by == "neuron" else None)
    return _by_layer(s, summed) if by == "layer" else summed


def decompose(model: Any, text: Text, position: Positions = None, *, tokenizer: Any = None, source: Text | None = None) -> Decomposition:
    """The stream after the final norm at one position (None: the last) as a sum of vectors, one for every part [n d].

    Works for every model of glassformer, also for one that predicts no tokens. Each vector is what the part is worth in the last stream: carried
    through every norm on its way, held at the scale that it had. Raises :class:`InputError` for a position that the text has not.
    """
    s = read(model, text, tokenizer, source=source)
    row = s.position(position)
    with torch.no_grad():
        w = walk(s, [row], "decompose()")
        parts, vectors = w.push()
    return Decomposition(_place(s, [row]), tuple(parts), vectors[:, 0].cpu(), w["resid_final"][0].cpu(), w)


# The answers


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """A logit as a sum. ``values`` [n]: one number for each of ``parts`` (means over positions); ``each`` [p n]; ``wholes`` [p]: the logits themselves."""

    target: str
    place: str
    parts: tuple[Part, ...]
    values: Tensor
    each: Tensor
    wholes: Tensor
    remark: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names: ``embed``, ``3.1`` (layer and head), ``3.cross.1``, ``3.ffn``, ``3.attn.bias``, ``final_norm.bias``…"""
        return tuple(p.name for p in self.parts)

    @property
    def sum(self) -> float:
        """What the parts sum to."""
        return float(self.values.sum())

    @property
    def actual(self) -> float:
        """The logit (or difference) that the model computed."""
        return float(self.wholes.mean())

    @property
    def error(self) -> float:
        """The largest difference between sum and logit at any position."""
        return float((self.each.sum(-1) - self.wholes).abs().max())

    def __getitem__(self, name: str) -> float:
        if name not in self.names:
            raise InputError(f"{name!r} is no part of this sum.{did_you_mean(name, self.names)} Parts are, for example, {', '.join(self.names[:4])}.")
        return float(self.values[self.names.index(name)])

    def best(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` parts that add or take away most."""
        return [(self.names[i], float(self.values[i])) for i in _largest(self.values)[:k]]

    @property
    def title(self) -> str:
        return f"Direct logit attribution of {self.target} at {self.place}"

    def grid(self) -> Grid:
        rows = tuple((self.parts[i].name, self.parts[i].kind, float(self.values[i])) for i in _largest(self.values))
        return Grid(("part", "kind", "logits"), rows, self.note)

    @property
    def note(self) -> str:
        """What the parts sum to, and what was held."""
        return f"{len(self.parts):,} parts sum to {self.sum:.4f}; the model computed {self.actual:.4f} (largest difference {self.error:.1e}). {self.remark}"

    def size(self) -> tuple[float, float]:
        return _size(self.parts)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        _draw(figure, theme, self.parts, self.values, self.title, "logits")


@dataclass(frozen=True, eq=False)
class BySource(Attribution):
    """An :class:`Attribution` whose heads are split: ``split`` [n s] of the self-attention heads, in the order of ``parts``, by the token that
    is read; ``cross_split`` [n s] of the cross-attention heads by the encoder's token (None without)."""

    pieces: tuple[str, ...]
    split: Tensor
    source_pieces: tuple[str, ...]
    cross_split: Tensor | None

    def total(self) -> Tensor:
        """What comes from each token of the text through all self-attention heads [s]."""
        return self.split.sum(0)

    def layers(self) -> Tensor:
        """The same by layer [l s] (tokens of the encoder's text follow those of the decoder's)."""
        heads = [[p.layer for p in self.parts if p.kind == kind] for kind in ("head", "cross head")]
        made = [_per_layer(self.split, heads[0])]
        if self.cross_split is not None:
            made.append(_per_layer(self.cross_split, heads[1]))
        return torch.cat(made, 1)

    @property
    def _tokens(self) -> list[str]:
        return [*_numbered(self.pieces), *(f"source {p}" for p in _numbered(self.source_pieces))]

    def grid(self) -> Grid:
        rows: list[tuple[Any, ...]] = []
        split = [(self.split, "head", _numbered(self.pieces))]
        if self.cross_split is not None:
            split.append((self.cross_split, "cross head", [f"source {p}" for p in _numbered(self.source_pieces)]))
        for values, kind, tokens in split:
            names = [p.name for p in self.parts if p.kind == kind]
            for i, token in enumerate(tokens):
                h = int(values[:, i].abs().argmax())
                rows.append((token, float(values[:, i].sum()), names[h], float(values[h, i])))
        rows += [(p.name, float(self.values[i]), None, None) for i, p in enumerate(self.parts) if p.kind not in ("head", "cross head")]
        note = f"{self.note} A token's row sums what all heads read from it; rows without a head are parts that read no other position."
        return Grid(("token or part", "logits", "largest head", "its logits"), tuple(sorted(rows, key=lambda r: -abs(float(r[1] or 0)))), note)

    def size(self) -> tuple[float, float]:
        return (min(16.0, 7.5 + 0.22 * len(self._tokens)), max(4.5, 0.3 * (1 + max(p.layer or 0 for p in self.parts)) + 2.5))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        values = self.layers()
        drawing.heatmap(left, theme, values, [str(i) for i in range(len(values))], self._tokens, title=self.title, x="token read", y="layer", signed=True)
        total = values.sum(0)
        chosen = _largest(total)[:16]
        drawing.bars(right, theme, [self._tokens[i] for i in chosen], total[chosen], title="through all heads, the largest", x="logits")


@dataclass(frozen=True, eq=False)
class Decomposition(Result):
    """The last stream as a sum: ``vectors`` [n d], one for each of ``parts``, which sum to ``final`` [d] (the site ``resid_final``)."""

    place: str
    parts: tuple[Part, ...]
    vectors: Tensor
    final: Tensor
    _walk: Walk = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names, as in :class:`Attribution`."""
        return tuple(p.name for p in self.parts)

    @property
    def error(self) -> float:
        """The largest difference between the sum of the vectors and the stream, in any feature."""
        return float((self.vectors.sum(0) - self.final).abs().max())

    @property
    def along(self) -> Tensor:
        """How far each vector goes along the stream, ``v . final / |final|^2`` [n]: these sum to 1."""
        return self.vectors @ self.final / self.final.pow(2).sum()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise InputError(f"{name!r} is no part of this sum.{did_you_mean(name, self.names)} Parts are, for example, {', '.join(self.names[:4])}.")
        return self.vectors[self.names.index(name)]

    def logits(self, target: Any = None) -> Attribution:
        """What every part adds to a logit or a difference of two (None: the model's own choice): each vector times the read-out's direction."""
        check_reads_tokens(self._walk.subject.stack, "logits()")
        with torch.no_grad():
            reading = _Reading.of(self._walk, target)
            parts, vectors = Walk.through(list(self.parts), self.vectors[:, None].to(reading.direction.device), reading.maps)
            values = (vectors * reading.direction).sum(-1)  # [n 1]
        return _answer(self._walk, reading, [*zip(parts, values, strict=True)])

    def by_layer(self) -> Decomposition:
        """The same sum with one vector for everything that a sublayer adds, its biases included."""
        parts, columns = _grouped(self._walk.subject, self.parts)
        vectors = torch.stack([self.vectors[c].sum(0) for c in columns])
        return Decomposition(self.place, parts, vectors, self.final, self._walk)

    def accumulated(self) -> tuple[tuple[str, ...], Tensor]:
        """The sum as it grows, sublayer after sublayer: names, and vectors [n d] of which the last is ``final``.

        This is what a logit lens reads when the final norm keeps the scale that it has at the end.
        """
        steps = self.by_layer()
        return steps.names, steps.vectors.cumsum(0)

    @property
    def title(self) -> str:
        return f"The last stream at {self.place} as a sum of {len(self.parts):,} vectors"

    def grid(self) -> Grid:
        rows = tuple((self.parts[i].name, self.parts[i].kind, float(self.vectors[i].norm()), float(self.along[i])) for i in _largest(self.along))
        note = f"along: v . x / |x|^2 of the whole x, which has length {float(self.final.norm()):.4g}; sums to 1. Largest difference: {self.error:.1e}."
        return Grid(("part", "kind", "length", "along"), rows, note)

    def size(self) -> tuple[float, float]:
        return _size(self.parts)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        _draw(figure, theme, self.parts, self.along, self.title, "share along the whole")


# How a logit is read


@dataclass(frozen=True, eq=False)
class _Reading:
    """``logit = direction . maps(stream) + constant`` at every position: direction [p d'], maps held at what they did, wholes [p]."""

    target: Target
    direction: Tensor
    maps: list[Frozen]
    constant: float
    has_bias: bool
    wholes: Tensor
    remark: str

    @staticmethod
    def of(w: Walk, target: Any) -> _Reading:
        s, readout = w.subject, w.subject.stack.readout
        h = w.record[s.prefix + "resid_final"]
        index = torch.arange(len(h), device=h.device)
        made = h if readout.transform is None else readout.transform(h[None], Pass(positions=index, index=index))[0]
        raw = readout.scores(made * readout.factor)
        if target is None and len(w.rows) > 1:
            raise InputError(f"{len(w.rows)} positions were given without a target, and the model's own choice differs between them: name the target.")
        asked = s.target(target, raw[0])
        ids = torch.tensor(asked.ids, device=h.device)
        table = wide(readout._embed[0].rows(ids) if readout.tied else readout.weight[ids])
        biases = None if readout.bias is None else wide(readout.bias[ids])
        sign = torch.tensor([1.0, -1.0], device=h.device, dtype=table.dtype)[: len(ids)]
        remarks = ["Norms are held at the scale that they had for this text."]
        if readout.transform is not None:
            remarks.append("The activation before the read-out is held at the factor by which it multiplied each feature.")
        if readout.spec.cap is not None:
            remarks.append(f"The read-out's soft-cap of {readout.spec.cap:g} is not linear: these are logits before it.")
        constant = 0.0 if biases is None else float((sign * biases).sum())
        maps = [] if readout.transform is None else freeze_transform(readout.transform, h)
        direction = (readout.factor * (sign @ table)).expand(len(h), -1)
        return _Reading(asked, direction, maps, constant, biases is not None, wide(asked.of(raw)), " ".join(remarks))


def _answer(w: Walk, reading: _Reading, summands: list[tuple[Part, Tensor]]) -> Attribution:
    """The answer from the value of every part at every position [p]."""
    if reading.has_bias:
        summands = [*summands, (Part("readout.bias", "bias"), torch.full_like(reading.wholes, reading.constant))]
    each = torch.stack([v for _, v in summands], 1).cpu()
    label = reading.target.label if reading.target.against is not None else repr(reading.target.label).strip("'")
    return Attribution(label, _place(w.subject, w.rows), tuple(p for p, _ in summands), each.mean(0), each, reading.wholes.cpu(), reading.remark)


def _sum_up(w: Walk, reading: _Reading, pulled: Pulled, top: int | None) -> Attribution:
    """Every part's vector where it arises, times the direction that is read there; ``top``: with feed-forwards in units."""
    parts, vectors = w.origin()
    found = [*zip(parts, (vectors * pulled.embed).sum(-1), strict=True)]
    for step in w.steps:
        parts, vectors = w.parts(step)
        values = (vectors * pulled.at[step.layer, step.sublayer]).sum(-1)  # [n p]
        pairs = [*zip(parts, values, strict=True)]
        if top is not None and step.sublayer == feedforward_of(w.subject.stack, step.layer):
            pairs = [*_units(w, step, pulled.at[step.layer, step.sublayer], top), *pairs[1:]]
        found += pairs
    return _answer(w, reading, found + pulled.biases)


def _units(w: Walk, step: Step, direction: Tensor, top: int) -> list[tuple[Part, Tensor]]:
    """The ``top`` units of a feed-forward (of experts: of all that were chosen) that add or take away most, and the others as one."""
    module = w.module(step)
    names, values = [], []
    if isinstance(module, ExpertsLayer):
        x = w.record[w.subject.prefix + f"{step.path}.in"]
        inner = [(f"{e}.", layer, units(layer, x) * weight[:, None]) for e, layer, weight in w.experts(step)]
    else:
        inner = [("", module, w[f"{step.path}.post"])]
    for prefix, layer, hidden in inner:
        values.append(hidden * (direction @ wide(matrix_of(layer.down))))  # [p f]
        names += [f"{step.layer}.{step.sublayer}.{prefix}{f}" for f in range(hidden.shape[-1])]
    all_values = torch.cat(values, 1)
    chosen = all_values.mean(0).abs().topk(min(top, len(names))).indices
    made = [(Part(names[int(f)], "unit", step.layer), all_values[:, f]) for f in chosen]
    rest = all_values.index_fill(1, chosen, 0.0).sum(1)
    return [*made, (Part(f"{step.layer}.{step.sublayer}.rest", "other units", step.layer), rest)]


def _by_source(w: Walk, reading: _Reading, pulled: Pulled) -> BySource:
    s = w.subject
    whole = _sum_up(w, reading, pulled, None)
    each = whole.each.clone()
    split: dict[str, list[Tensor]] = {"attn": [], "cross": []}
    column = {name: i for i, name in enumerate(whole.names)}
    for step in w.steps:
        if step.sublayer not in split:
            continue
        values = _read_from(w, step, pulled.at[step.layer, step.sublayer]).cpu()  # [p h s]
        within = "" if step.sublayer == "attn" else "cross."
        for h in range(values.shape[1]):
            each[:, column[f"{step.layer}.{within}{h}"]] = values[:, h].sum(-1)
        split[step.sublayer].append(values.mean(0))
    cross = torch.cat(split["cross"]) if split["cross"] else None
    given = (whole.target, whole.place, whole.parts, each.mean(0), each, whole.wholes, whole.remark)
    return BySource(*given, s.pieces, torch.cat(split["attn"]), s.source_pieces if cross is not None else (), cross)


def _read_from(w: Walk, step: Step, direction: Tensor) -> Tensor:
    """``pattern[h, t, s] (v_s W_O^h) . direction_t``: [p h s]. The values' bias is in ``v``; what a sink takes carries no value."""
    module = w.module(step)
    pattern, v = w[f"{step.path}.pattern"], w[f"{step.path}.v"]  # [h p s], [s g k]
    out = wide(matrix_of(module.out)).view(module.d, module.n_heads, module.d_value)
    wanted = torch.einsum("pd,dhk->phk", direction, out)
    v = v.repeat_interleave(module.n_heads // v.shape[1], 1)
    return torch.einsum("hps,shk,phk->phs", pattern, v, wanted)


# Grouping and showing


def _grouped(s: Subject, parts: Sequence[Part]) -> tuple[tuple[Part, ...], list[list[int]]]:
    """Parts by the sublayer that adds them, and which of the given ones each takes in."""
    groups: dict[str, tuple[Part, list[int]]] = {}
    for i, part in enumerate(parts):
        made = part
        if part.layer is not None:
            own = feedforward_of(s.stack, part.layer)
            second = part.name.split(".")[1]
            sub = "cross" if second in ("cross", "norm_cross", "norm_cross_post") else own if second == own or second.startswith("norm2") else "attn"
            made = Part(f"{part.layer}.{sub}", {"attn": "attention", "cross": "cross-attention"}.get(sub, "feed-forward"), part.layer)
        groups.setdefault(made.name, (made, []))[1].append(i)
    return tuple(part for part, _ in groups.values()), [columns for _, columns in groups.values()]


def _by_layer(s: Subject, a: Attribution) -> Attribution:
    parts, columns = _grouped(s, a.parts)
    each = torch.stack([a.each[:, c].sum(1) for c in columns], 1)
    return Attribution(a.target, a.place, parts, each.mean(0), each, a.wholes, a.remark)


def _place(s: Subject, rows: list[int]) -> str:
    if len(rows) == 1:
        return f"{s.pieces[rows[0]]} (position {rows[0]} of {len(s)})"
    return f"{len(rows)} positions ({', '.join(s.labels(rows)[:4])}{', …' if len(rows) > 4 else ''}), their mean"


def _per_layer(split: Tensor, layers: list[int | None]) -> Tensor:
    index = torch.tensor(layers)
    return split.new_zeros(int(index.max()) + 1, split.shape[1]).index_add(0, index, split)


def _numbered(pieces: Sequence[str]) -> list[str]:
    return [p if pieces.count(p) == 1 else f"{p} {i}" for i, p in enumerate(pieces)]


def _largest(values: Tensor) -> list[int]:
    order: list[int] = values.abs().argsort(descending=True, stable=True).tolist()
    return order


_COLUMNS = {"attention": "attn", "cross-attention": "cross", "feed-forward": "ffn", "unit": "ffn", "other units": "ffn"}


def _table(parts: Sequence[Part], values: Tensor) -> tuple[Tensor, list[str]]:
    """Values by layer and column (heads, cross heads, sublayers); NaN where a layer has none."""

    def column(p: Part) -> str:
        return f"{'x' if p.kind == 'cross head' else ''}{p.head}" if p.head is not None else _COLUMNS[p.kind]

    cells = [(p.layer, column(p), float(v)) for p, v in zip(parts, values, strict=True) if p.layer is not None and p.kind != "bias"]
    order = {"attn": (0, 0), "cross": (2, 0), "ffn": (4, 0)}
    names = sorted({c for _, c, _ in cells}, key=lambda c: order.get(c) or ((3, int(c[1:])) if c[0] == "x" else (1, int(c))))
    made = torch.full((1 + max(layer for layer, _, _ in cells), len(names)), torch.nan)
    for layer, name, value in cells:
        at = layer, names.index(name)
        made[at] = value + (0.0 if made[at].isnan() else float(made[at]))
    return made, names


def _size(parts: Sequence[Part]) -> tuple[float, float]:
    layers, columns = _table(parts, torch.zeros(len(parts)))[0].shape
    return (min(16.0, 8.0 + 0.3 * columns), max(4.8, 0.3 * layers + 2.0))


def _draw(figure: Any, theme: drawing.Theme, parts: Sequence[Part], values: Tensor, title: str, what: str) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    table, columns = _table(parts, values)
    rows = [str(i) for i in range(len(table))]
    drawing.heatmap(left, theme, table, rows, columns, title=title, x="head, and feed-forward (ffn)", y="layer", label=what, signed=True)
    chosen = _largest(values)[:16]
    drawing.bars(right, theme, [parts[i].name for i in chosen], values[chosen], title="the largest parts", x=what)
