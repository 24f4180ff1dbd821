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
from glassformer.core.numerics import wide
from glassformer.core.tap import Tap
from glassformer.parts.attention import matrix_of
from glassformer.parts.experts import ExpertsLayer

from . import figure as drawing
from .attribution_results import Attribution, BySource, draw_parts, largest, size_of
from .linear import Part, Pulled, Step, Walk, units, walk
from .logit_reading import Reading, answer, check_sum, place_of
from .result import Grid, Result
from .subject import Positions, Subject, Text, check_reads_tokens, choose, feedforward_of, read

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
    tap: Tap | None = None,
) -> Attribution:
    """A logit (or the difference of two) at a position as a sum of parts: exact to rounding, ``.sum == .actual``.

    ``by``: ``"head"`` every head, feed-forward and bias; ``"layer"`` what each sublayer adds, its biases included; ``"neuron"`` the ``top`` units of
    every feed-forward by name and the others as one; ``"source"`` each head split over the tokens that it reads, ``pattern[t, s] v_s W_O`` (a
    :class:`BySource`). ``target`` None: the model's own choice. ``positions`` None: the last; of several, ``values`` are means and ``each`` holds all.
    A soft-cap on the logits is not linear: what is attributed is the logit before it. Of BERT's transform before the read-out the activation is held
    at the factor ``act(z) / z`` that it multiplied each feature by. ``tap``: edits that hold meanwhile, if the parts still sum to the edited model's
    logit (edits of what a part is made of: ``z``, ``pattern``, ``ffn.post``); others are refused.
    Raises :class:`InputError` for a model that predicts no tokens, and for wrong names.
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    choose(by, BY, "way to split a logit")
    check_reads_tokens(s.stack, "direct_logit_attribution()")
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InputError(f"top={top!r} units of a layer were asked for by name, but that is a whole number of at least 1.")
    rows = s.positions(positions) if positions is not None and not isinstance(positions, str) else [s.position(positions)]
    sites = {"neuron": ["blocks.*.ffn.post"], "source": ["blocks.*.attn.pattern", "blocks.*.attn.v", "blocks.*.cross.pattern", "blocks.*.cross.v"]}.get(by, [])
    with torch.no_grad():
        w = walk(s, rows, "direct_logit_attribution()", *(site for site in sites if s.has(site)))
        reading = Reading.of(w, target)
        pulled = w.pull(reading.direction, reading.maps)
        if by == "source":
            return _by_source(w, reading, pulled)
        summed = _sum_up(w, reading, pulled, top if by == "neuron" else None)
    return _by_layer(s, summed) if by == "layer" else summed


def decompose(
    model: Any, text: Text, position: Positions = None, *, tokenizer: Any = None, source: Text | None = None, tap: Tap | None = None
) -> Decomposition:
    """The stream after the final norm at one position (None: the last) as a sum of vectors, one for every part [n d].

    Works for every model of glassformer, also for one that predicts no tokens. Each vector is what the part is worth in the last stream: carried
    through every norm on its way, held at the scale that it had. ``tap`` as in :func:`direct_logit_attribution`.
    Raises :class:`InputError` for a position that the text has not.
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    row = s.position(position)
    with torch.no_grad():
        w = walk(s, [row], "decompose()")
        parts, vectors = w.push()
        check_sum(w, vectors[:, 0].sum(0), w["resid_final"][0])
    return Decomposition(place_of(s, [row]), tuple(parts), vectors[:, 0].cpu(), w["resid_final"][0].cpu(), w)


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
            reading = Reading.of(self._walk, target)
            parts, vectors = Walk.through(list(self.parts), self.vectors[:, None].to(reading.direction.device), reading.maps)
            values = (vectors * reading.direction).sum(-1)  # [n 1]
        return answer(self._walk, reading, [*zip(parts, values, strict=True)])

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
        rows = tuple((self.parts[i].name, self.parts[i].kind, float(self.vectors[i].norm()), float(self.along[i])) for i in largest(self.along))
        note = f"along: v . x / |x|^2 of the whole x, which has length {float(self.final.norm()):.4g}; sums to 1. Largest difference: {self.error:.1e}."
        return Grid(("part", "kind", "length", "along"), rows, note)

    def size(self) -> tuple[float, float]:
        return size_of(self.parts)

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        draw_parts(figure, theme, self.parts, self.along, self.title, "share along the whole")


# The sums


def _sum_up(w: Walk, reading: Reading, pulled: Pulled, top: int | None) -> Attribution:
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
    return answer(w, reading, found + pulled.biases)


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


def _by_source(w: Walk, reading: Reading, pulled: Pulled) -> BySource:
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
    check_sum(w, each.sum(-1), whole.wholes)
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


__all__ = ["Attribution", "BySource", "Decomposition", "decompose", "direct_logit_attribution"]
