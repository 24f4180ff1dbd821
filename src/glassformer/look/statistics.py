"""What the values at a site are like over a text: mean, variance, skew, kurtosis, outlier dimensions, norm by position.

One pass over the text, in float64, with the merging of Chan, Golub and LeVeque (and Pébay for the third and fourth moment): two sets a, b with
means m and central sums M become one with

    d = m_b - m_a,   m = m_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n,   ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.modes import evaluating
from glassformer.core.tap import Pattern, Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .corpus import Activations, _read_text
from .figure import Theme, lines
from .forecasting import check_sizes, dry_run, model_of, patterns_of
from .result import Grid, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTLIER = 6.0
LARGE = 6.0


class Moments:
    """Running moments of every feature, [f] in float64; :meth:`add` takes [n f]."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.m2 = self.m3 = self.m4 = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Merge the moments of ``x`` [n f] into these."""
        x = x.double()
        nb, mean = x.shape[0], x.mean(0)
        if not nb:
            return
        c = x - mean
        b2, b3, b4 = (c**2).sum(0), (c**3).sum(0), (c**4).sum(0)
        if not self.n:
            self.n, self.mean, self.m2, self.m3, self.m4 = nb, mean, b2, b3, b4
            return
        na, n, d = self.n, self.n + nb, mean - self.mean
        m4 = self.m4 + b4 + d**4 * na * nb * (na * na - na * nb + nb * nb) / n**3
        m4 = m4 + 6 * d**2 * (na * na * b2 + nb * nb * self.m2) / n**2 + 4 * d * (na * b3 - nb * self.m3) / n
        m3 = self.m3 + b3 + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * b2 - nb * self.m2) / n
        self.m2 = self.m2 + b2 + d**2 * na * nb / n
        self.mean, self.m3, self.m4, self.n = self.mean + d * nb / n, m3, m4, n


@dataclass(frozen=True, eq=False)
class SiteMoments:
    """One site, its features in one row [f] (heads one after another), float64. ``variance``: of the population; ``skew``, ``kurtosis``:
    ``M3 / sd^3``, ``M4 / sd^4`` (3 for a normal distribution). ``norm``: mean length of the vectors. ``norm_by_position``: [t].

    ``outliers``: features whose ``|mean|``, or whose standard deviation, is above 6 times the median of it over the features. ``large``: [f]
    the share of tokens at which a feature is 6 or more in size (the threshold of arXiv 2208.07339).
    """

    site: str
    tokens: int
    mean: Tensor
    variance: Tensor
    skew: Tensor
    kurtosis: Tensor
    norm: float
    norm_by_position: Tensor
    outliers: tuple[int, ...]
    large: Tensor


@dataclass(frozen=True, eq=False)
class SiteStatistics(Result):
    """One :class:`SiteMoments` for each site; ``result["blocks.0.resid_post"]``."""

    sites: tuple[SiteMoments, ...]

    @property
    def title(self) -> str:
        return f"Statistics of {len(self.sites)} sites over {self.sites[0].tokens:,} tokens"

    def __getitem__(self, site: str) -> SiteMoments:
        for s in self.sites:
            if s.site == site:
                return s
        raise SiteError(f"{site!r} is none of these sites: {', '.join(s.site for s in self.sites)}.")

    def grid(self) -> Grid:
        columns = ("site", "norm", "norm at 0", "|mean|", "sd", "kurtosis", "largest", "outliers")
        rows = tuple(
            (
                s.site,
                s.norm,
                float(s.norm_by_position[0]),
                float(s.mean.abs().mean()),
                float(s.variance.mean().sqrt()),
                float(s.kurtosis.nanmedian()),
                float(s.kurtosis.nan_to_num(0.0).max()),
                ", ".join(map(str, s.outliers[:8])) + (" …" if len(s.outliers) > 8 else ""),
            )
            for s in self.sites
        )
        return Grid(
            columns,
            rows,
            "Outliers: features whose |mean| or standard deviation is above 6 times its median over the features. |mean| and sd: over all features; "
            "kurtosis: the median and the largest feature's, 3 is normal.",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.add_subplot()
        few = self.sites[:: -(-len(self.sites) // 8)]
        t = max(len(s.norm_by_position) for s in few)
        named = {s.site: [*s.norm_by_position.tolist(), *[float("nan")] * (t - len(s.norm_by_position))] for s in few}
        lines(axes, theme, list(range(t)), named, title="Mean norm by position", x_name="position in the window", y_name="norm")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        between = (2, 5) if high < 1000 * low else ()  # over less than three decades the powers of ten alone are too few names
        axes.yaxis.set_minor_locator(LogLocator(subs=between) if between else NullLocator())
        for kind in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            kind(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.tick_params(which="both", colors=theme.dim, labelsize=8)
        axes.legend(fontsize=8, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def site_statistics(
    model: Any,
    texts: str | os.PathLike[str] | Sequence[str] | None = None,
    sites: str | Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    batch: int = 8,
    context: int = 128,
    most: int | None = None,
) -> SiteStatistics:
    """Statistics by site of a text file (or texts), or of :class:`Activations` that were written before (``texts`` is then left out).

    ``sites``: patterns of values per token (None: ``blocks.*.resid_post``, or all that were written). Nothing but running sums is kept, and of a
    text its token ids.
    Raises :class:`InputError` or :class:`SiteError` for what cannot be read.
    """
    if isinstance(model, Activations):
        if texts is not None or most is not None:
            raise InputError("Activations hold a text of their own, all of which is counted: leave texts and most out.")
        patterns = patterns_of("**" if sites is None else sites)
        return _finished({site: _of_rows(model, site) for site in _kept(model, patterns)})
    if texts is None:
        raise InputError("Statistics are over a text: give a text file or texts, or the Activations that were written of one.")
    tokenizer = tokenizer if tokenizer is not None or not isinstance(model, Loaded) else model.tokenizer
    net = model_of(model)
    if isinstance(net, EncoderDecoderModel):
        raise InputError("An encoder-decoder reads pairs of texts, and a corpus is one text: use its encoder, model.encoder.")
    check_sizes(net, batch, context)
    ids, _ = _read_text(texts, tokenizer, net, most)
    patterns = patterns_of("blocks.*.resid_post" if sites is None else sites)
    return _finished(_of_model(net, ids, patterns, batch, min(context, len(ids))))


class _Sums:
    """All that is kept of a site."""

    def __init__(self) -> None:
        self.moments, self.large, self.norms, self.count = Moments(), torch.zeros(()), torch.zeros(0).double(), torch.zeros(0).double()

    def add(self, x: Tensor, first: int, context: int) -> None:
        """[n ..]: consecutive tokens, the first at place ``first`` of the text."""
        x = x.detach().cpu().flatten(1).double()
        self.moments.add(x)
        self.large = self.large + (x.abs() >= LARGE).double().sum(0)
        if not len(self.norms):
            self.norms, self.count = torch.zeros(context).double(), torch.zeros(context).double()
        at = (torch.arange(len(x)) + first) % context
        self.norms.index_add_(0, at, x.norm(dim=1))
        self.count.index_add_(0, at, torch.ones(len(x)).double())


def _kept(acts: Activations, patterns: tuple[str, ...]) -> list[str]:
    """The sites on disk that the patterns meet, in the order of computation."""
    read = [Pattern.read(p) for p in patterns]
    for p in read:
        if p.heads is not None:
            raise SiteError(f"{p.text!r} picks heads, but what was written is read whole: leave the brackets out.")
        if not any(p.meets(site) for site in acts.sites):
            acts[p.text]  # says what there is
    return [site for site in acts.sites if any(p.meets(site) for p in read)]


def _of_rows(acts: Activations, site: str) -> _Sums:
    sums, at = _Sums(), 0
    for _, x in acts.batches(site):
        sums.add(x, at, acts.context)
        at += len(x)
    return sums


def _of_model(model: Any, ids: list[int], patterns: tuple[str, ...], batch: int, context: int) -> dict[str, _Sums]:
    held, _, infos = dry_run(model, Record(*patterns), 1, context)
    for path in held:
        axes = infos[path].axes.split()
        if axes[:2] not in (["b", "t"], ["b", "s"]) or {"t", "s"} & set(axes[2:]) or not held[path].is_floating_point():
            raise SiteError(f"{path!r} has the axes {' '.join(axes)}, but statistics are of numbers per token (b t ...).")
    sums = {path: _Sums() for path in held}
    tap = Record(*patterns)  # which may pick heads
    with torch.no_grad(), evaluating(model):
        for at, tokens in _windows(ids, batch, context, next(model.parameters()).device):
            model(tokens, tap=tap)
            for path, one in sums.items():
                one.add(tap[path].flatten(0, 1), at, context)
            tap.clear()
    return sums


def _windows(ids: list[int], batch: int, context: int, device: Any) -> Iterator[tuple[int, Tensor]]:
    at = 0
    while at < len(ids):
        n = min(batch, (len(ids) - at) // context)
        take = n * context if n else len(ids) - at
        yield at, torch.tensor(ids[at : at + take], device=device).view(max(n, 1), -1)
        at += take


def _finished(sums: dict[str, _Sums]) -> SiteStatistics:
    made = []
    for site, s in sums.items():
        m = s.moments
        variance = m.m2 / m.n
        sd = variance.sqrt()
        outliers = sorted(set(_beyond(m.mean.abs())) | set(_beyond(sd)))
        norms = s.norms / s.count.clamp(min=1)
        made.append(
            SiteMoments(
                site, m.n, m.mean, variance, m.m3 / m.n / sd**3, m.m4 / m.n / variance**2, float(s.norms.sum() / m.n), norms, tuple(outliers), s.large / m.n
            )
        )
    return SiteStatistics(tuple(made))


def _beyond(x: Tensor) -> list[int]:
    return [int(i) for i in (x > OUTLIER * x.median()).nonzero().flatten()] if len(x) > 2 else []


__all__ = ["Moments", "SiteMoments", "SiteStatistics", "site_statistics"]
