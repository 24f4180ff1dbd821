"""Path patching: not whether a part matters, but along which way.

    sender ──► the stream ──► receiver's input        patched: this way only, straight through the residual stream (and the norms on it)
       └─────► every other part                       frozen at what it gave in the base run

Exact (Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969), in two steps: what the receiver would read if the sender's output
alone were the other run's and every part between gave what it gave; then the base run with that read. Edge attribution (Syed et al.,
arXiv 2310.10348) is the first-order estimate of all these edges at once: ``(other - base) of the sender * d metric / d receiver's input``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record
from glassformer.parts.wiring import SequentialBlock

from .figure import Theme, heatmap
from .frozen import Frozen, Node, all_nodes, read_node, sites_of
from .patching import correlations, slopes_of
from .patching_question import Question, ask
from .patching_results import agreement, column_of, scale_of, unchanged
from .result import Grid, Result
from .subject import Subject, Text, check_whole, n_heads, read, with_weights
from .sweep import Patch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PathPatched(Result):
    """The metric with one path patched from each sender to the receivers: ``values`` [senders], normalised like :class:`Patched`."""

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    values: Tensor
    clean: float
    corrupted: float
    metric: str
    direction: str
    normalised: bool

    @property
    def title(self) -> str:
        where = ", ".join(self.receivers[:4]) + (f" and {len(self.receivers) - 4} more" if len(self.receivers) > 4 else "")
        return f"path patching to {where} ({self.direction}): {self.metric}"

    @property
    def _still(self) -> float:
        return unchanged(self.clean, self.corrupted, self.direction, self.normalised)

    def __getitem__(self, sender: str) -> float:
        if sender not in self.senders:
            raise SiteError(f"{sender!r} is none of the senders: {', '.join(self.senders[:12])} ...")
        return float(self.values[self.senders.index(sender)])

    def best(self, n: int = 5) -> list[tuple[str, float]]:
        """The senders whose direct path changes the metric most."""
        order = (self.values - self._still).abs().argsort(descending=True)[:n].tolist()
        return [(self.senders[i], float(self.values[i])) for i in order]

    def grid(self) -> Grid:
        note = scale_of(self.clean, self.corrupted, self.normalised)
        return Grid(
            ("sender", column_of(self.metric, self.normalised)),
            tuple(self.best(len(self.senders))),
            f"{note}; every other part is frozen at the base run on the way",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        layers, columns, shown = _by_layer(self.senders, self.values - self._still)
        heatmap(figure.subplots(), theme, shown, layers, columns, title=self.title, x="sender", y="layer", label="change", signed=True)

    def size(self) -> tuple[float, float]:
        return (9.0, max(3.0, min(12.0, 1.8 + 0.35 * len({n.split(".")[0] for n in self.senders}))))


def _by_layer(names: Sequence[str], values: Tensor) -> tuple[list[str], list[str], Tensor]:
    """Values by layer and kind: heads, cross heads, ffn, embed."""
    places: list[tuple[str, str]] = []
    for name in names:
        if name == "embed":
            places.append(("embed", "ffn"))
        elif name.startswith("ffn "):
            places.append((name[4:], "ffn"))
        else:
            cross, plain = ("cross ", name[6:]) if name.startswith("cross ") else ("", name)
            layer, head = plain.split(".")[:2]
            places.append((layer, cross + head))
    rows = sorted({r for r, _ in places}, key=lambda r: -1 if r == "embed" else int(r))
    columns = sorted({c for _, c in places}, key=lambda c: (c == "ffn", c.startswith("cross"), int(c.split()[-1]) if c != "ffn" else 0))
    shown = torch.full((len(rows), len(columns)), math.nan)
    for (row, column), value in zip(places, values, strict=True):
        shown[rows.index(row), columns.index(column)] = value
    return rows, columns, shown


def path_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    senders: Sequence[Any] | None = None,
    receivers: Sequence[Any] | str = "logits",
    *,
    normalise: bool = True,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> PathPatched:
    """Exact path patching from each sender (None: embedding, every head, every feed-forward layer) to all ``receivers`` together.

    Senders: ``"5.1"``, ``"cross 2.0"``, ``"ffn 3"``, ``"embed"``. Receivers: ``"5.1.q"`` (k, v; without: all three), ``"cross 2.0.q"``, ``"ffn 3"``,
    ``"logits"``; those that a sender
    does not reach are left out for it. The other arguments are those of :func:`~glassformer.look.patching.activation_patch`.
    Raises :class:`SiteError` for an end that the model has not, :class:`InputError` for texts of different token counts.
    """
    q, frozen = _question(model, clean, corrupted, normalise, memory, progress, question)
    s = q.base
    sending = all_nodes(s, False) if senders is None else [n for g in _several(senders) for n in read_node(s, g, False)]
    receiving = [n for g in _several(receivers) for n in read_node(s, g, True)]
    if not sending or not receiving:
        raise InputError("A path has two ends: give at least one sender and one receiver.")
    for a in sending if senders is not None else ():
        if not any(frozen.reaches(a, r) for r in receiving):
            raise InputError(f"There is no path from {a.name} to {' or '.join(r.name for r in receiving)}: a sender stands before what it writes to.")
    found = _exact(frozen, [(a, receiving) for a in sending])
    names = tuple(n.name for n in receiving)
    return PathPatched(tuple(n.name for n in sending), names, q.scaled(found, normalise), q.clean, q.corrupted, q.label, q.direction, normalise)


def _several(given: Any) -> list[Any]:
    """One end of a path (a text, or a tuple), or several."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str | tuple) else [given]


def _question(
    model: Any, clean: Text, corrupted: Text, normalise: bool, memory: int | None, progress: bool | None, question: dict[str, Any]
) -> tuple[Question, Frozen]:
    if question.get("tap") is not None:
        raise InputError("Path patching computes each way by itself, where edits of a tap would not be seen: leave tap out, or use activation_patch(tap=...).")
    stack = with_weights(read(model, clean, question.get("tokenizer"), source=question.get("source")).stack, "Path patching")
    q = ask(model, clean, corrupted, normalise=normalise, memory=memory, progress=progress, keep=sites_of(stack), **question)
    with torch.no_grad(), evaluating(q.base.model):
        return q, Frozen(q)


def _exact(frozen: Frozen, edges: Sequence[tuple[Node, Sequence[Node]]]) -> Tensor:
    """The metric for each (sender, receivers): [len(edges)]."""
    q, s = frozen.q, frozen.s
    variants: list[list[Patch]] = []
    finals: dict[int, Tensor] = {}
    last, read = frozen.before((s.layers, 0)), [i % len(s) for i in q.at]
    with torch.no_grad(), evaluating(s.model):
        for n, (sender, receivers) in enumerate(edges):
            streams = dict(frozen.walk(sender, frozen.output(sender)))
            patches: list[Patch] = []
            made: dict[tuple[str, int], dict[str, Tensor]] = {}
            for r in receivers:
                if not frozen.reaches(sender, r):
                    continue
                stream = streams[frozen.order(r)]
                if r.kind == "logits":
                    finals[n] = stream
                    continue
                key = (r.kind, r.layer)
                if key not in made:
                    made[key] = frozen.received(*key, stream)
                patches.append(_patch_of(r, made[key], s))
            variants.append(patches)
    # The way straight to the scores adds to whatever the patched receivers do: their run's last stream, and the sender's change on it.
    values = _with_logits(frozen, edges, variants, finals) if finals else q.sweep.run(variants, q.score, q.at, "patching paths")
    for n in range(len(edges)):
        # Where nothing arrives the run is the base run: to the bit, and not to the rounding of another batch.
        if not variants[n] and (n not in finals or torch.equal(finals[n][:, read], last[:, read])):
            values[n] = q.corrupted if q.direction == "denoise" else q.clean
    return values


def _patch_of(r: Node, made: dict[str, Tensor], s: Subject) -> Patch:
    path = f"blocks.{r.layer}.{r.kind}"
    if r.kind not in ("attn", "cross"):
        return Patch(f"{path}.in", made["in"][0])
    value = made[r.part]
    group = n_heads(s.stack, r.layer, r.kind) // value.shape[2]
    return Patch(f"{path}.{r.part}", value[0, :, r.head // group], head=r.head // group)


def _with_logits(frozen: Frozen, edges: Sequence[Any], variants: list[list[Patch]], finals: dict[int, Tensor]) -> Tensor:
    q, last = frozen.q, frozen.before((frozen.s.layers, 0))
    out = torch.zeros(len(edges))
    alone = [n for n in range(len(edges)) if n in finals and not variants[n]]
    mixed = [n for n in range(len(edges)) if n in finals and variants[n]]
    rest = [n for n in range(len(edges)) if n not in finals]
    n_layers = frozen.s.layers
    block = f"blocks.{n_layers - 1}.resid_post"
    if mixed:
        wrong = not all(
            (isinstance(b, SequentialBlock) and not any(after for *_, after in b.steps)) or not isinstance(b, SequentialBlock) for b in frozen.stack.blocks
        )
        if wrong:
            raise InputError("With norms after each sum, a path to the logits cannot be added to other receivers in one run: ask for 'logits' alone.")
    made: list[list[Patch]] = [[Patch(block, finals[n][0])] for n in alone]
    made += [variants[n] for n in rest]
    values = q.sweep.run(made, q.score, q.at, "patching paths")
    for n, value in zip([*alone, *rest], values, strict=True):
        out[n] = value
    for n in mixed:  # the receivers' own effect on the last stream, then the direct change on top of it
        probe = q.sweep.streams(variants[n])
        value = q.sweep.run([[Patch(block, (probe + finals[n] - last)[0])]], q.score, q.at)
        out[n] = value[0]
    return out.to(values.dtype if len(values) else torch.float32)


# Edge attribution


@dataclass(frozen=True, eq=False)
class EdgeAttribution(Result):
    """The estimated change of the metric by each path: ``values`` [senders, receivers], NaN where there is none.

    With a check: ``pearson`` and ``spearman`` against ``exact`` path patching on ``checked`` edges (sender, receiver).
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    values: Tensor
    metric: str
    direction: str
    normalised: bool
    checked: tuple[tuple[str, str], ...] = ()
    exact: Tensor | None = None
    pearson: float | None = None
    spearman: float | None = None

    @property
    def title(self) -> str:
        return f"edge attribution ({self.direction}): {self.metric}"

    def __getitem__(self, edge: tuple[str, str]) -> float:
        sender, receiver = edge
        if sender not in self.senders or receiver not in self.receivers:
            raise SiteError(f"{edge!r} is no edge here: senders are such as {self.senders[-1]!r}, receivers such as {self.receivers[0]!r}.")
        return float(self.values[self.senders.index(sender), self.receivers.index(receiver)])

    def best(self, n: int = 10) -> list[tuple[str, str, float]]:
        """The edges with the largest estimates."""
        flat = self.values.flatten()
        order = flat.abs().nan_to_num(-1.0).argsort(descending=True)[: min(n, int((~flat.isnan()).sum()))].tolist()
        return [(self.senders[i // len(self.receivers)], self.receivers[i % len(self.receivers)], float(flat[i])) for i in order]

    def grid(self) -> Grid:
        agree = agreement(self.pearson, self.spearman, f"exact path patching of {len(self.checked)} edges")
        unit = "estimated change, " + ("in units of clean less corrupted" if self.normalised else "of the metric as it is")
        return Grid(("sender", "receiver", "estimate"), tuple(self.best(self.values.numel())), unit + agree)

    def draw(self, figure: Figure, theme: Theme) -> None:
        heatmap(figure.subplots(), theme, self.values, self.senders, self.receivers, title=self.title, x="receiver", y="sender", label="estimate", signed=True)

    def size(self) -> tuple[float, float]:
        return (max(6.0, min(14.0, 3.0 + 0.2 * len(self.receivers))), max(3.5, min(12.0, 2.0 + 0.2 * len(self.senders))))


def edge_attribution(
    model: Any,
    clean: Text,
    corrupted: Text,
    *,
    exact: int = 0,
    seed: int = 0,
    normalise: bool = True,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> EdgeAttribution:
    """The first-order estimate of :func:`path_patch` for every edge between embedding, heads, feed-forward layers and the logits (EAP, arXiv 2310.10348).

    Norms between the ends are taken at their slope in the base run. ``exact``: as many edges, drawn by ``seed``, are patched exactly, and the
    correlation is reported.
    Other arguments as in :func:`~glassformer.look.patching.activation_patch`.
    """
    check_whole(0, exact=exact, seed=seed)
    q, frozen = _question(model, clean, corrupted, normalise, memory, progress, question)
    s, sending, receiving = q.base, all_nodes(q.base, False), all_nodes(q.base, True)
    slopes = _slopes(frozen, receiving)
    values = torch.full((len(sending), len(receiving)), math.nan, dtype=torch.float64)
    with evaluating(s.model):
        for i, sender in enumerate(sending):
            moved = _moved(frozen, sender)
            for j, r in enumerate(receiving):
                if frozen.reaches(sender, r):
                    values[i, j] = (moved[frozen.order(r)].double() * slopes[r].double()).sum().cpu()
    estimate = q.scaled(values, normalise, change=True)
    made = EdgeAttribution(tuple(n.name for n in sending), tuple(n.name for n in receiving), estimate, q.label, q.direction, normalise)
    if not exact:
        return made
    edges = [(i, j) for i, a in enumerate(sending) for j, b in enumerate(receiving) if frozen.reaches(a, b)]
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:exact].tolist()
    picked = [edges[k] for k in order]
    found = _exact(frozen, [(sending[i], [receiving[j]]) for i, j in picked])
    truth = q.scaled(found.double() - (q.corrupted if q.direction == "denoise" else q.clean), normalise, change=True)
    pearson, spearman = correlations(torch.stack([estimate[i, j] for i, j in picked]), truth)
    named = tuple((sending[i].name, receiving[j].name) for i, j in picked)
    return EdgeAttribution(**(vars(made) | {"checked": named, "exact": truth, "pearson": pearson, "spearman": spearman}))


def _moved(frozen: Frozen, sender: Node) -> dict[tuple[int, int], Tensor]:
    """The first-order change [t d] of the stream at every later place."""
    out = frozen.output(sender).detach()
    start = frozen.base["blocks.0.resid_pre"] if sender.kind == "embed" else frozen.base[f"blocks.{sender.layer}.{sender.kind}.out"]
    found: list[tuple[int, int]] = []

    def streams(y: Tensor) -> tuple[Tensor, ...]:
        walked = frozen.walk(sender, y)
        found[:] = [place for place, _ in walked]
        return tuple(x for _, x in walked)

    with torch.no_grad():
        moved = torch.func.jvp(streams, (start,), (out - start,))[1]
    return {place: x[0] for place, x in zip(found, moved, strict=True)}


def _slopes(frozen: Frozen, receivers: Sequence[Node]) -> dict[Node, Tensor]:
    """The gradient [t d] of the metric by the stream as each receiver alone reads it."""
    q, s = frozen.q, frozen.s
    places = sorted({(r.layer, r.kind) for r in receivers if r.kind != "logits"})
    sites = [f"blocks.{n}.{k}.{x}" for n, k in places for x in (("q", "k", "v") if k == "attn" else ("q",) if k == "cross" else ("in",))]
    last = f"blocks.{s.layers - 1}.resid_post"
    record = Record(*(s.prefix + x for x in (*sites, last)), grad=True)
    slopes = slopes_of(q, record, [s.prefix + x for x in (*sites, last)])
    found: dict[Node, Tensor] = {}
    with torch.enable_grad(), evaluating(s.model):
        for layer, kind in places:
            own = [r for r in receivers if (r.layer, r.kind) == (layer, kind)]
            stream = frozen.before(frozen.order(own[0])).detach().expand(len(own), -1, -1).clone().requires_grad_()
            made = frozen.received(kind, layer, stream, grad=True)
            outs, grads = [], []
            for name in ("q", "k", "v") if kind == "attn" else ("q",) if kind == "cross" else ("in",):
                slope = slopes[f"{s.prefix}blocks.{layer}.{kind}.{name}"].expand_as(made[name])
                keep = torch.zeros_like(slope)
                for i, r in enumerate(own):
                    if name == "in":
                        keep[i] = slope[i]
                    elif r.part == name:
                        g = r.head // (n_heads(s.stack, layer, kind) // slope.shape[2])
                        keep[i, :, g] = slope[i, :, g]
                outs.append(made[name])
                grads.append(keep)
            (by_row,) = torch.autograd.grad(outs, stream, grads)
            found |= {r: by_row[i].detach() for i, r in enumerate(own)}
    for r in receivers:
        if r.kind == "logits":
            found[r] = slopes[s.prefix + last][0]
    return found
