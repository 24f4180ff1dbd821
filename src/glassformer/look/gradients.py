"""Which tokens an output depends on, by its gradient.

    gradient x input        sum_d x_d dF/dx_d                                    one backward pass; local
    integrated gradients    sum_d (x_d - x'_d) int_0^1 dF/dx_d(x' + a (x - x')) da    arXiv 1703.01365; sums to F(x) - F(x')

``x`` are the rows of the embedding table that the text's tokens name (positions stay as they are), ``F`` a logit, a difference of two, or any
number that a function makes of the model's output. A model takes such vectors in place of tokens: ``model(inputs_embeds=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.numerics import wide
from glassformer.core.tap import Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel

from . import figure as drawing
from .result import Grid, Result
from .subject import Positions, Subject, Text, read, reads_tokens, with_weights

NODES = 8
"""Gauss-Legendre nodes of one interval: exact for polynomials of degree 15."""
FEATURES = "dkrw"
"""Axes that are summed over: the features of one vector."""


def gradient_x_input(
    model: Any,
    text: Text,
    target: Any = None,
    *,
    site: str | None = None,
    positions: Positions = None,
    tokenizer: Any = None,
    source: Text | None = None,
) -> TokenAttribution | SiteAttribution:
    """Gradient times value, summed over features: for every token's embedding, or at any ``site`` (``"blocks.3.attn.z"``: a number per position and head).

    ``target``: a token, a pair (difference of logits), or a function of the output [b ..] that gives one number per row [b]; None: the model's choice.
    ``positions`` None: the last. First order only: what the number would lose if the value shrank to zero along its tangent.
    Raises :class:`InputError` for a target that the model does not have, :class:`SiteError` for an unknown site.
    """
    s = read(model, text, tokenizer, source=source)
    row = s.position(positions)
    if site is not None:
        return _at_site(s, site, target, row)
    embeds = _embeds(s)
    asked = _ask(s, target, row, embeds)
    outputs, grads = _gradients(s, embeds, asked)
    values = [(wide(e) * wide(g)).sum(-1)[0].cpu() for e, g in zip(embeds, grads, strict=True)]
    return _answer(s, "Gradient x input", asked, values, float(outputs[0]), None, "", 1)


def integrated_gradients(
    model: Any,
    text: Text,
    target: Any = None,
    *,
    baseline: str | int | Sequence[int] = "zero",
    steps: int = 32,
    most: int = 2048,
    tolerance: float = 1e-3,
    batch: int = 16,
    positions: Positions = None,
    tokenizer: Any = None,
    source: Text | None = None,
) -> TokenAttribution:
    """Integrated gradients of every token's embedding along the straight line from a baseline (arXiv 1703.01365).

    ``baseline``: ``"zero"`` vectors, the ``"mean"`` row of the table, one token id for every place, or as many ids as the text has tokens (then an
    encoder's source stays as it is). The line is cut into intervals of 8 Gauss-Legendre nodes, at least ``steps`` in all. On each interval the
    integral must give the difference of the outputs at its ends, so its error is known, and the worst intervals are halved until the errors sum
    to less than ``tolerance`` times the whole difference, or ``most`` gradients were made. ``batch`` of them are computed at a time. Norms make the output
    change most near zero vectors, where intervals become short. Where the output jumps (a mixture of experts chooses others) no gradient sees it: the
    jumps are left, as the completeness error. Raises :class:`InputError` for a baseline or numbers that do not fit.
    """
    s = read(model, text, tokenizer, source=source)
    for name, given in (("steps", steps), ("most", most), ("batch", batch)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InputError(f"{name}={given!r} is a number of gradients: a whole number of at least 1.")
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not tolerance > 0:
        raise InputError(f"tolerance={tolerance!r} is the error that is allowed, as a part of the difference of the outputs: a number above 0, such as 1e-3.")
    if most < steps:
        raise InputError(f"most={most} gradients are allowed, but steps={steps} are made at least: give most={steps} or more, or fewer steps.")
    row, ends = s.position(positions), _embeds(s)
    starts = _baseline(s, baseline, ends)
    asked = _ask(s, target, row, ends)
    line = _Line(s, starts, ends, asked, batch)
    line.integrate(steps, most, tolerance)
    named = baseline if isinstance(baseline, str) else s.piece(baseline) if isinstance(baseline, int) else "given ids"
    return _answer(s, "Integrated gradients", asked, line.values(), line.output(1.0), line.output(0.0), named, line.used)


# The outputs


@dataclass(frozen=True, eq=False)
class _Asked:
    """The number ``of(output)`` [b] that is asked about; ``keep``: the one position that is read out, where that can be chosen."""

    label: str
    place: str
    keep: int | None
    of: Callable[[Tensor], Tensor]


def _ask(s: Subject, target: Any, row: int, embeds: list[Tensor]) -> _Asked:
    """What is asked about; raises :class:`InputError` for a target that the output does not have."""
    place = f"{s.pieces[row]} (position {row} of {len(s)})"
    if callable(target):
        return _Asked(getattr(target, "__name__", "a function").replace("<lambda>", "a function of the output"), "", None, _checked(target))
    if reads_tokens(s.stack):
        with torch.no_grad(), evaluating(s.model):
            asked = s.target(target, _forward(s, embeds, row)[0, 0] if target is None else torch.empty(0))
        return _Asked(asked.label, place, row, lambda out: asked.of(out[:, 0]))
    readout = s.stack.readout
    if not readout.SITES or type(readout.spec).__name__ == "Vector":
        raise InputError(
            f"This model ends in {type(s.stack.spec.readout).__name__}, which has no scores: give target= as a function of its output, "
            "such as lambda v: v @ other."
        )
    with torch.no_grad(), evaluating(s.model):
        scores = _forward(s, embeds, None)[0]
    scores = scores if readout.pooled else scores[row]
    given = int(scores.argmax()) if target is None else target
    classes = list(given) if isinstance(given, tuple | list) else [given]
    if len(classes) > 2 or any(isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < len(scores) for c in classes):
        raise InputError(f"target={target!r} is no class of this model: give a number from 0 to {len(scores) - 1}, or two whose scores are subtracted.")

    def of(out: Tensor) -> Tensor:
        at = out if readout.pooled else out[:, row]
        return at[:, classes[0]] if len(classes) == 1 else at[:, classes[0]] - at[:, classes[1]]

    return _Asked("class " + " - ".join(map(str, classes)), "" if readout.pooled else place, None, of)


def _checked(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def of(out: Tensor) -> Tensor:
        made = function(out)
        if not isinstance(made, Tensor) or made.shape != (len(out),):
            got = tuple(made.shape) if isinstance(made, Tensor) else described(type(made))
            raise InputError(f"The target function gave {got} for an output of shape {tuple(out.shape)}, but one number per row is needed: ({len(out)},).")
        return made

    return of


def _embeds(s: Subject) -> list[Tensor]:
    """The rows of the table that the tokens name [1 t w]; of an encoder-decoder the source's first."""
    stack: Any = with_weights(s.stack, "The gradient of the token embeddings")
    made = [(s.model.encoder, s.source_ids)] if isinstance(s.model, EncoderDecoderModel) else []
    with torch.no_grad():
        return [m.embed.rows(torch.tensor([ids], device=s.device)) for m, ids in (*made, (stack, s.ids))]


def _forward(s: Subject, embeds: list[Tensor], keep: int | None) -> Tensor:
    """The output for vectors in place of tokens; ``keep``: of one position only [b 1 v]."""
    chosen = None if keep is None else torch.full((len(embeds[0]),), keep, device=s.device)
    names = ("source_embeds", "inputs_embeds")[-len(embeds) :]
    output: Tensor = s.model(**dict(zip(names, embeds, strict=True)), keep=chosen)
    return output


def _gradients(s: Subject, embeds: list[Tensor], asked: _Asked) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The numbers [b] and their gradients."""
    leaves = [e.detach().requires_grad_() for e in embeds]
    with torch.enable_grad(), evaluating(s.model):
        outputs = _differentiable(asked.of(_forward(s, leaves, asked.keep)), asked)
        return outputs.detach(), torch.autograd.grad(outputs.sum(), leaves)


def _differentiable(outputs: Tensor, asked: _Asked) -> Tensor:
    """The numbers themselves; raises :class:`InputError` where no gradient leads back from them."""
    if not outputs.requires_grad:
        raise InputError(
            f"The target ({asked.label}) has no gradient: what it returns is constant, a whole number, or detached; return a smooth function of the output."
        )
    return outputs


def _at_site(s: Subject, site: str, target: Any, row: int) -> SiteAttribution:
    if not isinstance(site, str):
        raise InputError(f"site={site!r} is no name of a site: give one as text, such as 'blocks.0.attn.z'.")
    full = s.path(site)
    info = next((i for i in s.model.sites() if i.path == full), None)
    if info is None:
        raise InputError(f"{site!r} names several sites: name one, such as {site.replace('**', 'blocks.0').replace('*', '0')!r}.")
    record = Record(full, grad=True)
    asked = _ask(s, target, row, _embeds(s) if isinstance(s.stack, TransformerModel) else [])
    with torch.enable_grad(), evaluating(s.model):
        keep = {} if asked.keep is None else {"keep": torch.tensor([asked.keep], device=s.device)}
        output = _differentiable(asked.of(s.model(*s.inputs, tap=record, **keep)), asked)
        value = record[full]
        if not value.is_floating_point():
            raise InputError(f"{site!r} holds whole numbers ({value.dtype}), which have no gradient: name a site of continuous values.")
        grad = torch.autograd.grad(output.sum(), value, allow_unused=True)[0]
    product = torch.zeros_like(value) if grad is None else value.detach() * grad
    axes = info.axes.split()
    features = [i for i, axis in enumerate(axes) if axis in FEATURES]
    product = wide(product).sum(features) if features else wide(product)
    kept = [axis for axis in axes if axis not in FEATURES]
    if kept[:1] == ["b"]:
        product, kept = product[0], kept[1:]
    return SiteAttribution(site, tuple(kept), asked.label, asked.place, s.pieces, s.source_pieces if ".cross." in full else s.pieces, product.cpu())


# The line from baseline to text


def _baseline(s: Subject, given: Any, ends: list[Tensor]) -> list[Tensor]:
    """Where the line begins, in the shapes of where it ends."""
    if isinstance(given, str):
        if given not in ("zero", "mean"):
            raise InputError(f"baseline={given!r} is unknown: 'zero', 'mean', a token id, or a list of ids as long as the text.")
        if given == "zero":
            return [torch.zeros_like(e) for e in ends]
        with torch.no_grad():
            return [wide(s.stack.embed.weight).mean(0).to(e.dtype).expand_as(e) for e in ends]
    one = isinstance(given, int) and not isinstance(given, bool)
    ids: list[Any] = [given] * len(s) if one else list(given) if isinstance(given, Sequence | Tensor) else [None]
    if len(ids) != len(s):
        raise InputError(f"The baseline has {len(ids)} ids, but the text has {len(s)} tokens: a baseline holds one id for each, or is a single id for all.")
    plain: list[Any] = [i.item() if isinstance(i, Tensor) else i for i in ids]
    tokens = torch.tensor([[s.token(i) for i in plain]], device=s.device)
    with torch.no_grad():
        rows = s.stack.embed.rows(tokens)
        if len(ends) == 1:
            return [rows]
        return [rows[:, :1].expand_as(ends[0]) if one else ends[0], rows]


class _Line:
    """The integral along the line, interval by interval: ``parts[(a, b)]`` holds the attributions [t] of each input on it, and its error."""

    def __init__(self, s: Subject, starts: list[Tensor], ends: list[Tensor], asked: _Asked, batch: int):
        self.s, self.starts, self.ends, self.asked, self.batch = s, starts, ends, asked, batch
        self.parts: dict[tuple[float, float], tuple[list[Tensor], float]] = {}
        self.outputs: dict[float, float] = {}
        self.used = 0
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        self.nodes, self.weights = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)  # on [0, 1]

    def integrate(self, steps: int, most: int, tolerance: float) -> None:
        """Halve the worst intervals until their errors sum to less than ``tolerance`` of the difference."""
        n = -(-steps // NODES)  # whole intervals: at most 7 more than steps
        self.add([(i / n, (i + 1) / n) for i in range(n)])
        whole, size = abs(self.output(1.0) - self.output(0.0)), max(abs(self.output(1.0)), abs(self.output(0.0)))
        allowed = tolerance * max(whole, 1e-3 * size)
        while (total := sum(error for _, error in self.parts.values())) > allowed:
            bad = [key for key, (_, error) in self.parts.items() if error > max(allowed / len(self.parts), total / 64)]
            bad = sorted(bad, key=lambda key: -self.parts[key][1])[: (most - self.used) // (2 * NODES)]
            bad = [(a, b) for a, b in bad if b > 1e-30 and b - a > 1e-3 * b]  # what is narrower is a jump
            if not bad:
                return
            for key in bad:
                del self.parts[key]
            middles = [(a + b) / 2 if a > 0 else b / 16 for a, b in bad]  # norms within norms: near zero vectors all happens at small powers of ten
            self.add([half for (a, b), m in zip(bad, middles, strict=True) for half in ((a, m), (m, b))])

    def add(self, intervals: list[tuple[float, float]]) -> None:
        """Integrate over new intervals."""
        at = [float(a + (b - a) * x) for a, b in intervals for x in self.nodes]
        ends = [p for p in dict.fromkeys(p for interval in intervals for p in interval) if p not in self.outputs]
        for i in range(0, len(ends), self.batch):
            chosen = ends[i : i + self.batch]
            with torch.no_grad(), evaluating(self.s.model):
                found = self.asked.of(_forward(self.s, self.points(chosen), self.asked.keep))
            self.outputs.update(zip(chosen, found.double().tolist(), strict=True))
        made: list[list[Tensor]] = [[] for _ in self.ends]
        for i in range(0, len(at), self.batch):
            _, grads = _gradients(self.s, self.points(at[i : i + self.batch]), self.asked)
            for into, grad, start, end in zip(made, grads, self.starts, self.ends, strict=True):
                into.append((wide(grad) * wide(end - start)).sum(-1).double())
        self.used += len(at)
        joined = [torch.cat(m).unflatten(0, (len(intervals), NODES)) for m in made]  # [intervals nodes t]
        for i, (a, b) in enumerate(intervals):
            parts = [torch.einsum("n,nt->t", self.weights.to(m), m[i]) * (b - a) for m in joined]
            self.parts[a, b] = parts, abs(sum(float(p.sum()) for p in parts) - (self.outputs[b] - self.outputs[a]))

    def points(self, at: Sequence[float]) -> list[Tensor]:
        """The inputs at these places of the line [b t w]."""
        return [a + torch.tensor(at, dtype=b.dtype, device=b.device)[:, None, None] * (b - a) for a, b in zip(self.starts, self.ends, strict=True)]

    def output(self, at: float) -> float:
        """The number at an end of an interval."""
        return self.outputs[at]

    def values(self) -> list[Tensor]:
        """The whole integral for each input [t]."""
        found = [torch.stack(list(p)).sum(0) for p in zip(*(parts for parts, _ in self.parts.values()), strict=True)]
        return [f.to(wide(e).dtype).cpu() for f, e in zip(found, self.ends, strict=True)]


# The answers


def _answer(s: Subject, method: str, asked: _Asked, values: list[Tensor], actual: float, baseline: float | None, named: str, steps: int) -> TokenAttribution:
    sources = values[0] if len(values) == 2 else None
    return TokenAttribution(method, asked.label, asked.place, s.pieces, values[-1], s.source_pieces, sources, actual, baseline, named, steps)


@dataclass(frozen=True, eq=False)
class TokenAttribution(Result):
    """A number for every token: ``values`` [t], of an encoder's text ``source_values`` [s] (None without).

    ``actual``: the number asked about; ``baseline``: that of the baseline (None where there is none); ``steps``: gradients made.
    """

    method: str
    target: str
    place: str
    pieces: tuple[str, ...]
    values: Tensor
    source_pieces: tuple[str, ...]
    source_values: Tensor | None
    actual: float
    baseline: float | None
    baseline_name: str
    steps: int

    @property
    def sum(self) -> float:
        """What the tokens' numbers sum to."""
        return float(self.values.sum()) + (0.0 if self.source_values is None else float(self.source_values.sum()))

    @property
    def error(self) -> float | None:
        """Completeness: how far the sum is from ``actual - baseline``; None for a method that promises no sum."""
        return None if self.baseline is None else abs(self.sum - (self.actual - self.baseline))

    def best(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` tokens with the largest numbers, either way."""
        rows = self._rows()
        return [(rows[i][0], rows[i][2]) for i in range(min(k, len(rows)))]

    def _rows(self) -> list[tuple[str, int, float]]:
        rows = [(p, i, float(v)) for i, (p, v) in enumerate(zip(self.pieces, self.values, strict=True))]
        if self.source_values is not None:
            rows += [(f"source {p}", i, float(v)) for i, (p, v) in enumerate(zip(self.source_pieces, self.source_values, strict=True))]
        return sorted(rows, key=lambda r: -abs(r[2]))

    @property
    def title(self) -> str:
        return f"{self.method}: {self.target}" + (f" at {self.place}" if self.place else "")

    def grid(self) -> Grid:
        if self.baseline is None:
            note = f"The number is {self.actual:.4f}; first-order shares need not sum to it (their sum: {self.sum:.4f})."
        else:
            note = f"Sum {self.sum:.4f}; from {self.baseline:.4f} (baseline: {self.baseline_name}) to {self.actual:.4f} is {self.actual - self.baseline:.4f}: "
            note += f"completeness error {self.error:.1e} after {self.steps:,} gradients."
            if self.error is not None and self.error > 0.01 * abs(self.actual - self.baseline):
                note += " That is much: the output jumps on the line (experts change) or bends sharply; try another baseline, or a larger most=."
        return Grid(("token", "position", "attribution"), tuple(self._rows()), note)

    def size(self) -> tuple[float, float]:
        lines = sum(-(-len(p) // WIDE) for p in (self.pieces, self.source_pieces if self.source_values is not None else ()))
        return (11.0, max(3.6, min(16.0, 0.42 * lines + 1.6)))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        rows = self._rows()[:14]
        strips = [(self.pieces, self.values, "")]
        if self.source_values is not None:
            strips.insert(0, (self.source_pieces, self.source_values, "encoder's text"))
        heights = [-(-len(p) // WIDE) for p, _, _ in strips]
        cells = figure.add_gridspec(len(strips), 2, width_ratios=(2, 1), height_ratios=heights)
        limit = max(float(v.abs().max()) for _, v, _ in strips)
        for i, (pieces, values, name) in enumerate(strips):
            token_strip(figure.add_subplot(cells[i, 0]), theme, pieces, values, limit, (self.title if i == 0 else "") + (f"   ({name})" if name else ""))
        drawing.bars(figure.add_subplot(cells[:, 1]), theme, [f"{p} {i}" for p, i, _ in rows], [v for _, _, v in rows], title="the largest", x="attribution")


WIDE = 8
"""Tokens in a line of a strip."""


def token_strip(axes: Any, theme: drawing.Theme, pieces: Sequence[str], values: Tensor, limit: float, title: str = "") -> None:
    """The text, token by token in lines, each on the colour of its number."""
    lines = -(-len(pieces) // WIDE)
    cells = torch.full((lines * WIDE,), torch.nan)
    cells[: len(pieces)] = values
    texts = [p if len(p) <= 11 else p[:10] + "…" for p in pieces] + [""] * (lines * WIDE - len(pieces))
    rows = [str(WIDE * i) for i in range(lines)]
    drawing.heatmap(
        axes,
        theme,
        cells.view(lines, WIDE),
        rows,
        [str(i) for i in range(WIDE)],
        title=title,
        signed=True,
        limit=limit,
        texts=[texts[WIDE * i : WIDE * (i + 1)] for i in range(lines)],
    )


@dataclass(frozen=True, eq=False)
class SiteAttribution(Result):
    """Gradient times value at a site, summed over features: ``values`` with the axes that are left (``t`` position, ``h`` head, ``f`` unit…)."""

    site: str
    axes: tuple[str, ...]
    target: str
    place: str
    pieces: tuple[str, ...]
    key_pieces: tuple[str, ...]
    values: Tensor

    @property
    def title(self) -> str:
        return f"Gradient x value at {self.site}: {self.target}" + (f" at {self.place}" if self.place else "")

    def _label(self, axis: str, i: int) -> str:
        pieces = {"t": self.pieces, "s": self.key_pieces}.get(axis)
        return f"{pieces[i]} {i}" if pieces is not None else str(i)

    def grid(self) -> Grid:
        order = self.values.abs().flatten().argsort(descending=True)[:1000]
        places = torch.stack(torch.unravel_index(order, self.values.shape), 1).tolist()
        rows: tuple[tuple[str | float, ...], ...] = tuple(
            (*(self._label(a, i) for a, i in zip(self.axes, at, strict=True)), float(self.values[tuple(at)])) for at in places
        )
        return Grid(
            (*(NAMES.get(a, a) for a in self.axes), "attribution"), rows, "First order: the tangent at this text, summed over the features of each vector."
        )

    def size(self) -> tuple[float, float]:
        return (9.0, 4.8) if len(self.axes) != 1 else (9.0, max(3.0, 0.42 * -(-len(self.values) // WIDE) + 1.6))

    def draw(self, figure: Any, theme: drawing.Theme) -> None:
        axes, values = list(self.axes), self.values
        if axes == ["t"]:
            token_strip(figure.subplots(), theme, self.pieces, values, float(values.abs().max()), self.title)
            return
        summed = "" if len(axes) <= 2 else f" (summed over {', '.join(NAMES.get(a, a) for a in axes[1:-1])})"
        while len(axes) > 2:
            values = values.sum(1)
            del axes[1]
        values = values[:, None] if len(axes) < 2 else values
        axes = axes if len(axes) == 2 else [*axes, ""]
        rows, columns = ([self._label(a, i) for i in range(n)] for a, n in zip(axes, values.shape, strict=True))
        drawing.heatmap(
            figure.subplots(),
            theme,
            values,
            rows,
            columns,
            title=self.title + summed,
            x=NAMES.get(axes[1], axes[1]),
            y=NAMES.get(axes[0], axes[0]),
            signed=True,
        )


NAMES = {"t": "position", "s": "key position", "h": "head", "g": "key/value head", "f": "unit", "e": "expert", "c": "choice", "v": "token id", "1": ""}
