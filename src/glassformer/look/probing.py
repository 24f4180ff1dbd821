"""Probes: what can be read from a vector by a small model that is trained for it.

    texts ──► model ──► vectors at a site ──► probe, fitted on some texts ──► accuracy on the others
                                   └────────► the same probe for labels drawn at random by word ──► control

That a label can be read does not say that the model uses it. The control task (Hewitt & Liang 2019, arXiv 1909.03368) gives every word type a random label
of its own: a probe that learns it too remembers words. Selectivity is the accuracy less the control's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.text import Tokenizer

from .features import PER, Examples, examples_of
from .figure import Theme, dress, plain_text
from .fitting import folds_of, half_width, predicted, scores_by_fold
from .result import Cell, Grid, Result
from .subject import check_whole, choose
from .windows import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("linear", "mlp")
POOLS = ("mean", "last", "first")


@dataclass(frozen=True, eq=False)
class Probes(Result):
    """How well a label can be read at each of ``sites``. ``accuracy``, ``control`` [l f] by fold (``R^2`` where labels are numbers; control NaN if it was not
    asked for); ``majority`` [f] what the commonest label reaches (0 for numbers). ``confusion`` [l c c]: held-out examples by label and prediction."""

    sites: tuple[str, ...]
    accuracy: Tensor
    control: Tensor
    majority: Tensor
    classes: tuple[str, ...]
    confusion: Tensor
    kind: str
    per: str
    examples: int
    texts: int

    @property
    def measure(self) -> str:
        """``"accuracy"``, or ``"R²"`` for numbers."""
        return "accuracy" if self.classes else "R²"

    @property
    def selectivity(self) -> Tensor:
        """Accuracy less control, mean over folds [l]."""
        return (self.accuracy - self.control).mean(-1)

    @property
    def best(self) -> str:
        """The site of the highest accuracy."""
        return self.sites[int(self.accuracy.mean(-1).argmax())]

    def __getitem__(self, site: str) -> float:
        """The accuracy at a site, mean over folds."""
        if site not in self.sites:
            raise InputError(f"{site!r} was not probed: {', '.join(self.sites)}.")
        return float(self.accuracy[self.sites.index(site)].mean())

    @property
    def title(self) -> str:
        of = f"{len(self.classes)} labels" if self.classes else "a number"
        kind = "MLP" if self.kind == "mlp" else self.kind
        return f"{kind[:1].upper()}{kind[1:]} probe for {of} per {self.per}: {self.examples:,} examples of {self.texts:,} texts, {self.accuracy.shape[1]} folds"

    def grid(self) -> Grid:
        width, base = half_width(self.accuracy), float(self.majority.mean())
        rows: list[tuple[Cell, ...]] = []
        for i, site in enumerate(self.sites):
            mean, control = float(self.accuracy[i].mean()), float(self.control[i].mean())
            rows.append((site, mean, float(width[i]), control, mean - control, base))
        note = f"±: half of a 95 % interval over folds; control: the same probe for random labels by {'text' if self.per == 'text' else self.per + ' type'}."
        if self.classes:
            note += f" Labels: {', '.join(self.classes[:20])}{' …' if len(self.classes) > 20 else ''}."
        return Grid(("site", self.measure, "±", "control", "selectivity", "majority" if self.classes else "mean"), tuple(rows), note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        named = {self.measure: (self.accuracy.mean(-1), half_width(self.accuracy)), "control": (self.control.mean(-1), half_width(self.control))}
        draw_by_site(axes, theme, self.sites, named, float(self.majority.mean()), "majority" if self.classes else "mean of the labels")
        dress(axes, theme, self.title, "site", self.measure)
        if self.classes:
            axes.set_ylim(-0.02, 1.02)


def draw_by_site(axes: Axes, theme: Theme, sites: Sequence[str], named: dict[str, tuple[Tensor, Tensor]], base: float | None, base_name: str) -> None:
    """A line over the sites for each name, with its interval, and the level that needs no probe."""
    for i, (name, (values, width)) in enumerate(named.items()):
        if not values.isnan().all():
            axes.errorbar(
                range(len(sites)), values, yerr=width, label=plain_text(name), color=theme.series[i], marker="o", markersize=4, linewidth=1.8, capsize=3
            )
    if base is not None:
        axes.axhline(base, color=theme.dim, linestyle="--", linewidth=1, label=base_name)
    names = list(sites)
    slanted = sum(map(len, names)) > 80
    axes.set_xticks(range(len(names)), names, rotation=35 if slanted else 0, ha="right" if slanted else "center", rotation_mode="anchor" if slanted else None)
    axes.legend(fontsize=8, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid)


def probe(
    model: Any,
    texts: Sequence[Any],
    labels: Sequence[Any],
    site: str | Sequence[str] = "blocks.*.resid_post",
    *,
    kind: str = "linear",
    per: str = "token",
    folds: int = 5,
    control: bool = True,
    pool: str | None = None,
    seed: int = 0,
    context: int | None = None,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Probes:
    """How well ``labels`` can be read from the vectors at ``site`` (a pattern such as ``"blocks.*.resid_post"`` gives one probe for each layer).

    ``per="token"``: for each text a list, one label for each of its tokens; ``"word"``: one for each word between spaces (read at the word's last token);
    ``"text"``: one for each text, read from ``pool`` of its vectors (``"mean"``, ``"last"``, ``"first"``; by default the last in a causal model, else the
    mean). Labels of texts and whole numbers are classes, labels of floats are numbers (ridge regression, ``R^2``), None is left out. ``kind``:
    ``"linear"`` (multinomial logistic regression) or ``"mlp"`` (one hidden layer of 64). Folds part texts (equal texts go together), so nothing of a test
    text is seen in training; the regularisation is chosen within the training fold. ``control``: also fit random labels by token or word type; per text
    there are no types, and labels are exchanged among texts. Held: the vectors of all labelled examples at the chosen sites, in float32.
    Raises :class:`InputError` for labels that do not fit, fewer texts than folds, and a single class.
    """
    choose(kind, KINDS, "kind of probe")
    choose(per, PER, "place of labels")
    check_folds(folds)
    check_whole(0, seed=seed)
    reading = Reading(model, texts, tokenizer, source=source, context=context)
    pool = choose(pool or ("last" if reading.subject.causal else "mean"), POOLS, "way to make one vector of a text")
    paths = reading.vector_sites(site)
    got = examples_of(reading, paths, labels, per, pool)
    y, classes = _encoded(got.labels)
    check_folds(folds, len(got.groups.unique()))
    fold = folds_of(got.groups, folds, seed, y if per == "text" and classes else None)
    other = _control(got, y, bool(classes), seed) if control else None
    n = len(classes)
    accuracy, controls, confusion = [], [], []
    for path in paths:
        x = got.x[path]
        guess = predicted(x, y, n, fold, got.groups, kind, seed)
        accuracy.append(scores_by_fold(guess, y, fold, n))
        confusion.append(
            torch.zeros(n, n, dtype=torch.long).index_put_((y, guess), torch.ones(len(y), dtype=torch.long), accumulate=True) if n else torch.zeros(0, 0)
        )
        if other is None:
            controls.append(torch.full((folds,), torch.nan))
        else:
            controls.append(scores_by_fold(predicted(x, other, n, fold, got.groups, kind, seed), other, fold, n))
    majority = torch.tensor([_majority(y, fold, f) if n else 0.0 for f in range(folds)])
    names = tuple(reading.short(p) for p in paths)
    return Probes(names, torch.stack(accuracy), torch.stack(controls), majority, classes, torch.stack(confusion), kind, per, len(y), len(got.groups.unique()))


def check_folds(folds: Any, texts: int | None = None) -> None:
    """Raise :class:`InputError` for what is no number of folds, or more than the texts can fill."""
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise InputError(f"folds={folds!r}: a probe is fitted on some texts and tested on others, in at least 2 folds.")
    if texts is not None and texts < max(folds, 3):
        raise InputError(f"{folds} folds need at least {max(folds, 3)} different texts, but there are {texts}: give more texts or fewer folds.")


def _encoded(labels: list[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as class numbers with the classes' names, or as float32 with none."""
    labels = [label.item() if isinstance(label, Tensor | np.generic) else label for label in labels]
    if wrong := [label for label in labels if not isinstance(label, str | int | float)]:
        raise InputError(f"A label is a text or a number, but {wrong[0]!r} was given; with per='token' or 'word' give a list of them for each text.")
    if any(isinstance(label, float) for label in labels):
        if wrong := [label for label in labels if isinstance(label, bool) or not isinstance(label, int | float)]:
            raise InputError(f"Some labels are numbers, but {wrong[0]!r} is none: give numbers throughout, or texts throughout.")
        y = torch.tensor(labels, dtype=torch.float32)
        if not y.isfinite().all() or float(y.std()) == 0:
            raise InputError(f"All {len(y)} labels are {float(y[0]):g} or not finite: there is nothing to tell apart.")
        return y, ()
    names = sorted(set(labels), key=lambda label: (str(type(label)), label))
    if len(names) < 2:
        raise InputError(f"All {len(labels)} labels are {names[0]!r}: a probe tells at least 2 classes apart.")
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[label] for label in labels]), tuple(str(name) for name in names)


def _control(got: Examples, y: Tensor, classes: bool, seed: int) -> Tensor:
    """A random label for every type, drawn from the labels as often as they are; per text, the labels exchanged among texts."""
    draw = torch.Generator().manual_seed(seed + 1)
    if got.types[0] is None:
        return y[torch.randperm(len(y), generator=draw)]
    kinds = {kind: i for i, kind in enumerate(sorted(set(got.types), key=str))}
    drawn = y[torch.randint(len(y), (len(kinds),), generator=draw)]
    return drawn[torch.tensor([kinds[t] for t in got.types])]


def _majority(y: Tensor, fold: Tensor, f: int) -> float:
    common = y[fold != f].mode().values
    return float((y[fold == f] == common).double().mean())
