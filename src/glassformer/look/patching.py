"""Activation patching: put a value of one run into another run, and see how much of the answer comes with it.

    denoise   base run: corrupted text     one value from the clean run put in     1 = the clean answer is back, 0 = nothing changed
    noise     base run: clean text         one value from the corrupted run put in 0 = the clean answer is gone, 1 = nothing changed

Vig et al. (arXiv 2004.12265), Meng et al. (arXiv 2202.05262), Wang et al. (arXiv 2211.00593); good practice: Zhang and Nanda (arXiv 2309.16042).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.fields import described
from glassformer.core.tap import Record

from .figure import Theme, heatmap
from .result import Grid, Result
from .subject import Positions, Subject, Text, check_layer, check_reads_tokens, choose, feedforward_of, read, read_pair
from .sweep import Patch, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIASES = {"attn_out": "attn.out", "mlp_out": "ffn.out", "ffn_out": "ffn.out", "head_out": "z", "cross_out": "cross.out"}
HEAD_SITES = ("z", "q", "k", "v", "q_rot", "k_rot", "pattern", "scores", "result")
AXES = ("layer", "position", "head")
OPTIONS = ("tokenizer", "source", "corrupted_source", "target", "metric", "position", "direction", "normalise", "memory", "progress")
METRICS = ("logit_diff", "logit", "prob", "logprob", "kl")


def site_path(s: Subject, site: str, layer: int) -> str:
    """The path of a site named in short (``z``, ``attn_out``, ``mlp_out``, ``cross.q``, ``resid_pre``) in a layer; raises :class:`SiteError`."""
    name = ALIASES.get(site, site)
    name = f"attn.{name}" if name in HEAD_SITES else name
    if name.startswith("ffn."):
        name = f"{feedforward_of(s.stack, layer)}.{name[4:]}"
    path = f"blocks.{layer}.{name}"
    s.path(path)
    return path


@dataclass(frozen=True, eq=False)
class Patched(Result):
    """What every patch does to the metric. ``values`` has an axis for each name in ``by``, whose places are named in ``names``.

    ``clean``, ``corrupted``: the metric of the two runs without patches. With ``normalised`` they stand for 1 and 0. ``exact`` (of an
    approximation): the values of the exact sweep, and how both agree over all patches (``pearson``, ``spearman``).
    """

    site: str
    by: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    values: Tensor
    clean: float
    corrupted: float
    metric: str
    direction: str
    normalised: bool
    kind: str = "activation patching"
    exact: Tensor | None = None
    pearson: float | None = None
    spearman: float | None = None

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.site} by {', '.join(self.by)} ({self.direction}): {self.metric}"

    @property
    def _still(self) -> float:
        """The value of a patch that changes nothing."""
        if self.kind.startswith("attribution"):
            return 0.0
        low, high = (0.0, 1.0) if self.normalised else (self.corrupted, self.clean)
        return low if self.direction == "denoise" else high

    def best(self, n: int = 5) -> list[tuple[tuple[str, ...], float]]:
        """The ``n`` patches that change the metric most, as names and values."""
        flat = self.values.flatten()
        order = (flat - self._still).abs().argsort(descending=True)[:n].tolist()
        places = list(itertools.product(*self.names))
        return [(places[i], float(flat[i])) for i in order]

    def grid(self) -> Grid:
        both = self.exact is not None
        rows = [(*(place), value, *((float(self.exact[self._index(place)]),) if self.exact is not None else ())) for place, value in self.best(10**9)]
        scale = "1 is the clean run, 0 the corrupted one" if self.normalised else f"clean run {self.clean:.4g}, corrupted run {self.corrupted:.4g}"
        if self.kind.startswith("attribution"):
            scale = "estimated change of the metric by the patch, " + ("in units of clean less corrupted" if self.normalised else "as it is")
        agree = "" if self.pearson is None else f"; against the exact sweep: Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}"
        return Grid((*self.by, "value", *(("exact",) if both else ())), tuple(rows), f"{scale}{agree}")

    def _index(self, place: Sequence[str]) -> tuple[int, ...]:
        return tuple(names.index(p) for names, p in zip(self.names, place, strict=True))

    def draw(self, figure: Figure, theme: Theme) -> None:
        rows, columns = self._rows(), self.names[-1]
        panels = [(self.values, self.title)] if self.exact is None else [(self.values, "estimate"), (self.exact, f"exact (Pearson {self.pearson:.3f})")]
        for axes, (values, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = values.reshape(len(rows), len(columns)) - (self._still if not self.kind.startswith("attribution") or values is not self.exact else 0.0)
            low = " and ".join(self.by[:-1]) or ""
            heatmap(axes, theme, shown, rows, columns, title=title, x=self.by[-1], y=low, label="change", signed=True)
        if self.exact is not None:
            figure.suptitle(self.title, color=theme.ink, fontsize=11)

    def _rows(self) -> tuple[str, ...]:
        return tuple(".".join(p) for p in itertools.product(*self.names[:-1])) or ("",)

    def size(self) -> tuple[float, float]:
        wide = min(14.0, 3.2 + 0.28 * len(self.names[-1]))
        return (max(8.5, wide * (1.6 if self.exact is not None else 1.0)), max(3.0, min(14.0, 1.6 + 0.24 * len(self._rows()))))


@dataclass(frozen=True, eq=False)
class Question:
    """Two runs and a number asked of each: what all patching functions begin with."""

    base: Subject
    other: Subject
    sweep: Sweep
    score: Callable[[Tensor], Tensor]
    """[n k v] -> [n]."""
    at: tuple[int, ...]
    clean: float
    corrupted: float
    label: str
    direction: str

    def scaled(self, values: Tensor, normalise: bool, change: bool = False) -> Tensor:
        """On the scale where 0 is the corrupted run and 1 the clean one (``change``: of a difference)."""
        values = values.double()
        scaled = (values - (0.0 if change else self.corrupted)) / (self.clean - self.corrupted) if normalise else values
        return scaled.float()


def ask(
    model: Any,
    clean: Text,
    corrupted: Text,
    *,
    tokenizer: Any = None,
    source: Any = None,
    corrupted_source: Text | None = None,
    target: Any = None,
    metric: str | Callable[[Tensor], Tensor] = "logit_diff",
    position: Positions = None,
    direction: str = "denoise",
    normalise: bool = True,
    keep: Sequence[str] = (),
    memory: int | None = None,
    progress: bool | None = None,
    **unknown: Any,
) -> Question:
    """Read both texts, run the base, measure both ends. Raises :class:`InputError` for texts of different token counts and for equal ends."""
    if unknown:
        name = next(iter(unknown))
        raise InputError(f"There is no option {name!r} here.{did_you_mean(name, OPTIONS)} Options are {', '.join(OPTIONS)}.")
    choose(direction, ("denoise", "noise"), "direction")
    if corrupted_source is None:
        a, b = read_pair(model, clean, corrupted, tokenizer, source=source)
    else:
        a = read(model, clean, tokenizer, source=source)
        _, b = read_pair(model, clean, corrupted, tokenizer, source=corrupted_source)
    check_reads_tokens(a.stack, "Patching")
    at = (a.position(position),)
    base, other = (b, a) if direction == "denoise" else (a, b)
    sweep = Sweep(base, keep, memory=memory, progress=progress)
    _, far = other.run("logits")
    ends = (far, sweep.logits) if direction == "denoise" else (sweep.logits, far)
    score, label = read_metric(a, metric, target, ends[0][at[0]], ends[1][at[0]])
    measured = [float(score(e[list(at)][None])[0]) for e in ends]
    if normalise and abs(measured[0] - measured[1]) < 1e-9:
        raise InputError(
            f"The metric ({label}) is {measured[0]:.4g} in both runs, so there is nothing to restore: "
            "name a target that the texts decide differently, or give normalise=False."
        )
    return Question(base, other, sweep, score, at, measured[0], measured[1], label, direction)


def read_metric(s: Subject, metric: Any, target: Any, clean: Tensor, corrupted: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The metric as a function of logits [n k v] (its first position counts), and its name. ``clean``, ``corrupted`` [v]: logits of the two runs."""
    if callable(metric):

        def own(logits: Tensor) -> Tensor:
            value = metric(logits[:, 0])
            if not isinstance(value, Tensor) or value.shape != (logits.shape[0],):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"The metric gave {got} for {logits.shape[0]} rows of logits [b v]: it gives one number per row, [b].")
            return value

        return own, getattr(metric, "__name__", "metric").strip("<>")
    choose(metric, METRICS, "metric")
    if metric == "kl":
        reference = clean.double().log_softmax(-1)
        return lambda x: (reference.exp() * (reference - x[:, 0].double().log_softmax(-1))).sum(-1), "KL from the clean run"
    if metric == "logit_diff" and target is None:
        a, b = int(clean.argmax()), int(corrupted.argmax())
        target = (a, b) if a != b else a
    chosen = s.target(target, clean)
    if metric == "prob":
        return lambda x: x[:, 0].double().softmax(-1)[:, chosen.token], f"probability of {s.piece(chosen.token)}"
    if metric == "logprob":
        return lambda x: x[:, 0].double().log_softmax(-1)[:, chosen.token], f"log-probability of {s.piece(chosen.token)}"
    return lambda x: chosen.of(x[:, 0]), f"logit {chosen.label}"


def places(s: Subject, site: str, by: Sequence[str], base: Mapping[str, Tensor], layers: Sequence[int], positions: Sequence[int] | None) -> Places:
    """Every patch that a sweep ``by`` these axes has, as names along its axes and as places."""
    first = base[site_path(s, site, layers[0])]
    axes = next(i.axes for i in s.model.sites() if i.path == s.prefix + site_path(s, site, layers[0])).split()
    heads = [0]
    if "head" in by:
        kind = next((axes.index(a) for a in ("h", "g") if a in axes), None)
        if kind is None:
            raise InputError(f"{site!r} has no heads to patch one by one: use by=('layer', 'position'), or a site of heads ({', '.join(HEAD_SITES)}).")
        heads = list(range(min(base[site_path(s, site, n)].shape[kind] for n in layers)))
    place = next((axes.index(a) for a in ("t", "s") if a in axes), None)
    if place is None:
        raise InputError(f"{site!r} has no positions: patch a site with axes b t ...")
    cross = ".cross." in site_path(s, site, layers[0]) and axes[place] == "s"
    labels = s.labels() if not cross else list(s.source_pieces)
    shown = list(range(first.shape[place])) if positions is None else list(positions)
    names = {"layer": tuple(str(n) for n in layers), "position": tuple(labels[p] for p in shown), "head": tuple(map(str, heads))}
    return Places(site, tuple(by), axes, tuple(layers), tuple(shown), positions is not None, tuple(heads), tuple(names[b] for b in by))


@dataclass(frozen=True)
class Places:
    """The places of a sweep (see :func:`places`)."""

    site: str
    by: tuple[str, ...]
    axes: list[str]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    limited: bool
    heads: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]

    def each(self) -> Iterator[dict[str, int]]:
        """Layer, position and head of every patch, in the order of the axes."""
        known = {"layer": self.layers, "position": self.positions, "head": self.heads}
        for combination in itertools.product(*(known[b] for b in self.by)):
            yield dict(zip(self.by, combination, strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(map(len, self.names))

    def picked(self, s: Subject, values: Mapping[str, Tensor], place: Mapping[str, int]) -> list[Patch]:
        """The patches of one place: values [1 ..] of another run put in (a sweep without ``layer`` patches all layers at once)."""
        made = []
        for layer in (place["layer"],) if "layer" in place else self.layers:
            path = site_path(s, self.site, layer)
            value, head = values[path][0], place.get("head")
            names = self.axes[1:]
            positions = (place["position"],) if "position" in place else self.positions if self.limited else None
            if head is not None:
                at = next(names.index(a) for a in ("h", "g") if a in names)
                value, names = value.select(at, head), names[:at] + names[at + 1 :]
            if positions is not None:
                along = next(names.index(a) for a in ("t", "s") if a in names)
                value = value.index_select(along, torch.tensor(positions, device=value.device))
            made.append(Patch(path, value, positions, head))
        return made


def read_by(s: Subject, site: str, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes of a sweep; by default heads of every layer for sites of heads, positions for all others."""
    if not isinstance(site, str):
        raise SiteError(f"A site is named by a text, such as 'resid_pre' or 'z', but {described(type(site))} was given.")
    if by is None:
        return ("layer", "head") if ALIASES.get(site, site).rsplit(".", 1)[-1] in HEAD_SITES else ("layer", "position")
    given = tuple(x.strip() for x in by.split(",")) if isinstance(by, str) else tuple(by) if isinstance(by, Iterable) else (by,)
    for name in given:
        choose(name, AXES, "axis of a sweep")
    if not given or len(set(given)) != len(given):
        raise InputError(f"by={by!r}: name one or more of {', '.join(AXES)}, each once.")
    return given


def activation_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    site: str = "resid_pre",
    *,
    by: str | Sequence[str] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    normalise: bool = True,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> Patched:
    """Put the value at ``site`` of one run into the other, for every place along ``by``: layer, position, head.

    ``site``: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, result, cross.z, ... ``metric``: ``"logit_diff"`` (of
    ``target``, a token
    or a pair; by default the two runs' own choices), ``"logit"``, ``"prob"``, ``"logprob"``, ``"kl"``, or a function of logits [b v] that gives [b],
    read at ``position``
    (the last). ``direction``: ``"denoise"`` patches clean values into the corrupted run, ``"noise"`` the other way. Values are normalised: 0 the
    corrupted run, 1 the clean one.
    ``positions``, ``layers``: only these. Further: ``tokenizer``, ``source``, ``corrupted_source``, ``memory`` (bytes), ``progress``.
    Raises :class:`InputError` for texts of different token counts and a metric that is the same in both runs, :class:`SiteError` for an unknown site.
    """
    q = ask(model, clean, corrupted, normalise=normalise, memory=memory, progress=progress, **question)
    where, values = _values(q, site, by, positions, layers)
    variants = [where.picked(q.base, values, place) for place in where.each()]
    found = q.sweep.run(variants, q.score, q.at, f"patching {site}").reshape(where.shape)
    return Patched(site, where.by, where.names, q.scaled(found, normalise), q.clean, q.corrupted, q.label, q.direction, normalise)


def _values(q: Question, site: str, by: Any, positions: Positions, layers: Sequence[int] | None) -> tuple[Places, dict[str, Tensor]]:
    """The places of a sweep and what the other run has there."""
    s = q.base
    given = range(s.layers) if layers is None else layers if isinstance(layers, Iterable) else [layers]
    chosen = [check_layer(s.stack, n) for n in given]
    if not chosen:
        raise InputError(f"No layer was given: name at least one of 0 to {s.layers - 1}, or leave layers out for all.")
    axes = read_by(s, site, by)
    record, _ = q.other.run(*(site_path(s, site, n) for n in chosen))
    values = {p.removeprefix(s.prefix): v for p, v in record.values.items()}
    return places(s, site, axes, values, chosen, None if positions is None else s.positions(positions)), values


def attribution_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    site: str = "resid_pre",
    *,
    by: str | Sequence[str] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    normalise: bool = True,
    exact: bool = False,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> Patched:
    """The change that every patch of :func:`activation_patch` would make, to first order: ``(other - base) * d metric / d base``, summed over what is patched.

    Two forward passes and one backward, whatever the number of patches (Nanda 2023, "Attribution patching"; Kramar et al., arXiv 2403.00745, on
    where it fails).
    ``exact=True`` runs the sweep too and reports the correlation of the estimate with it. Other arguments as in :func:`activation_patch`.
    """
    q = ask(model, clean, corrupted, normalise=normalise, memory=memory, progress=progress, **question)
    where, values = _values(q, site, by, positions, layers)
    s = q.base
    record = Record(*(s.prefix + p for p in values), grad=True)
    slopes = slopes_of(q, record, [s.prefix + p for p in values])
    parts = {}
    for path, value in values.items():
        new, old = value, record[s.prefix + path].detach()
        parts[path] = ((new - old).masked_fill(new.isinf() | old.isinf(), 0.0) * slopes[s.prefix + path])[0]
    total = torch.stack([_summed(where, s, parts, place) for place in where.each()]).reshape(where.shape)
    estimate = q.scaled(total.detach().cpu(), normalise, change=True)
    made = Patched(site, where.by, where.names, estimate, q.clean, q.corrupted, q.label, q.direction, normalise, "attribution patching (estimate)")
    if not exact:
        return made
    variants = [where.picked(s, values, place) for place in where.each()]
    found = q.sweep.run(variants, q.score, q.at, f"patching {site}").reshape(where.shape)
    start = q.corrupted if q.direction == "denoise" else q.clean
    truth = q.scaled(found.double() - start, normalise, change=True)
    p, r = correlations(estimate, truth)
    return Patched(**(vars(made) | {"exact": truth, "pearson": p, "spearman": r}))


def slopes_of(q: Question, record: Record, paths: Sequence[str]) -> dict[str, Tensor]:
    """The gradient of the metric by each recorded value in the base run; no parameter's ``grad`` is touched."""
    with torch.enable_grad():
        logits = q.base.run("logits", tap=record, grad=True)[1]
        score = q.score(logits[list(q.at)][None]).sum()
        if not score.requires_grad:
            raise InputError(f"The metric ({q.label}) gives no gradient, but an estimate is made of it: compute it from the logits by differentiable steps.")
        values = [record[p] for p in paths]
        found = torch.autograd.grad(score, values, allow_unused=True)
    return {p: torch.zeros_like(v) if g is None else g.detach() for p, v, g in zip(paths, values, found, strict=True)}


def _summed(where: Places, s: Subject, parts: Mapping[str, Tensor], place: Mapping[str, int]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for patch in where.picked(s, {p: v[None] for p, v in parts.items()}, place):
        total = total + patch.value.sum().double().cpu()
    return total


def correlations(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of two tensors of one shape (NaN where one of them is constant)."""

    def pearson(x: Tensor, y: Tensor) -> float:
        x, y = x - x.mean(), y - y.mean()
        size = float(x.norm() * y.norm())
        return float(x @ y) / size if size else math.nan

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        return (ends - (counts.double() - 1) / 2)[inverse]

    x, y = a.flatten().double(), b.flatten().double()
    return pearson(x, y), pearson(ranks(x), ranks(y))


# The sweeps by the names that people know


def _named(site: str, by: tuple[str, ...], text: str) -> Callable[..., Patched]:
    @functools.wraps(activation_patch, assigned=())
    def patch(model: Any, clean: Text, corrupted: Text, **options: Any) -> Patched:
        return activation_patch(model, clean, corrupted, site, by=by, **options)

    patch.__doc__ = f":func:`activation_patch` of {text}."
    return patch


get_act_patch_resid_pre = _named("resid_pre", ("layer", "position"), "the stream that enters each block, by position")
get_act_patch_resid_mid = _named("resid_mid", ("layer", "position"), "the stream after attention, by position")
get_act_patch_attn_out = _named("attn.out", ("layer", "position"), "what attention adds, by position")
get_act_patch_mlp_out = _named("ffn.out", ("layer", "position"), "what the feed-forward layer adds, by position")
get_act_patch_attn_head_out_all_pos = _named("z", ("layer", "head"), "each head's output at all positions")
get_act_patch_attn_head_out_by_pos = _named("z", ("layer", "position", "head"), "each head's output, by position")
get_act_patch_attn_head_q_all_pos = _named("q", ("layer", "head"), "each head's queries at all positions")
get_act_patch_attn_head_k_all_pos = _named("k", ("layer", "head"), "each head's keys at all positions")
get_act_patch_attn_head_v_all_pos = _named("v", ("layer", "head"), "each head's values at all positions")
get_act_patch_attn_head_pattern_all_pos = _named("pattern", ("layer", "head"), "each head's pattern at all positions")
get_act_patch_attn_head_q_by_pos = _named("q", ("layer", "position", "head"), "each head's queries, by position")
get_act_patch_attn_head_k_by_pos = _named("k", ("layer", "position", "head"), "each head's keys, by position")
get_act_patch_attn_head_v_by_pos = _named("v", ("layer", "position", "head"), "each head's values, by position")
get_act_patch_attn_head_pattern_by_pos = _named("pattern", ("layer", "position", "head"), "each head's pattern, by query position")
