"""How probes are fitted: regularised, cross-validated by group, with nothing of a test fold seen before it is predicted.

logistic   W, b = argmin  mean cross-entropy + s/2 |W|^2          by L-BFGS
ridge      W    = argmin  mean |X W - Y|^2   + s   |W|^2          in closed form, all s at once
mlp        one hidden layer of tanh units before the same losses  by L-BFGS from a seeded start

Columns are standardised by the training fold's mean and deviation. ``s`` is the one of a few that does best on a fifth of the training fold's groups,
which are left out while it is chosen; then the whole training fold is fitted with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOGISTIC = (1e-1, 1e-2, 1e-3, 1e-4)
MLP = (1e-2, 1e-3, 1e-4)
RIDGE = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Strengths that are tried, the strongest first (each fit starts where the last one ended)."""
HIDDEN = 64

T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)
"""The 97.5 % point of Student's t for 1, 2, … degrees of freedom."""


def half_width(values: Tensor) -> Tensor:
    """Half of the 95 % interval of the mean over folds [.. f] -> [..]; folds share training data, so it is only roughly that."""
    n = values.shape[-1]
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return t * values.std(-1) / n**0.5


def folds_of(groups: Tensor, folds: int, seed: int, labels: Tensor | None = None) -> Tensor:
    """The fold of every row [n], equal for all rows of a group; with ``labels`` (one for each group) every fold gets its share of each."""
    names, rows = groups.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        first = torch.full((len(names),), len(groups), dtype=torch.long).scatter_reduce(0, rows, torch.arange(len(groups)), "amin")
        order = order[labels[first][order].argsort(stable=True)]
    fold = torch.empty(len(names), dtype=torch.long)
    fold[order] = torch.arange(len(names)) % folds
    return fold[rows]


def splits(fold: Tensor, groups: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every fold: rows to train on, rows to test on, and the training rows parted into those to fit and those to choose the strength by."""
    for f in range(int(fold.max()) + 1):
        train, test = (fold != f).nonzero()[:, 0], (fold == f).nonzero()[:, 0]
        names = groups[train].unique()
        held = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed + 1 + f))[: max(1, len(names) // 5)]]
        inner = torch.isin(groups[train], held)
        yield train, test, train[~inner], train[inner]


class Standard:
    """Columns less their mean, over their deviation, as the training rows have them."""

    def __init__(self, x: Tensor):
        self.mean = x.mean(0)
        scale = x.std(0, correction=0)
        self.scale = torch.where(scale > 1e-6 * scale.max().clamp_min(1e-30), scale, torch.ones_like(scale))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


Predict = Callable[[Tensor], Tensor]


class _Linear:
    def __init__(self, w: Tensor, b: Tensor):
        self.w, self.b = w, b

    def __call__(self, z: Tensor) -> Tensor:
        return torch.addmm(self.b, z, self.w).argmax(1)


def logistic(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float]) -> Iterator[Predict]:
    """A classifier for every strength: rows [n d] -> class [n]."""
    n, d = x.shape
    w, b = torch.zeros(d, classes, dtype=x.dtype), torch.zeros(classes, dtype=x.dtype)
    once = F.one_hot(y, classes).to(x.dtype)
    for s in strengths:

        def loss(s: float = s) -> Tensor:
            scores = torch.addmm(b, x, w)
            log_p = scores.log_softmax(1)
            error = (log_p.exp() - once) / n
            w.grad, b.grad = x.T @ error + s * w, error.sum(0)
            return -(log_p * once).sum() / n + 0.5 * s * w.square().sum()

        _descend([w, b], loss, 60)
        yield _Linear(w.clone(), b.clone())


class _Perceptron:
    def __init__(self, value: Predict, classes: int, mean: Tensor | float, scale: Tensor | float):
        self.value, self.classes, self.mean, self.scale = value, classes, mean, scale

    def __call__(self, z: Tensor) -> Tensor:
        made = self.value(z).detach()
        return made.argmax(1) if self.classes else made[:, 0] * self.scale + self.mean


def mlp(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], seed: int) -> Iterator[Predict]:
    """One hidden layer; ``classes`` 0 means a number [n], predicted by least squares."""
    draw = torch.Generator().manual_seed(seed)
    d, out = x.shape[1], classes or 1
    mean, scale = (y.mean(), y.std().clamp_min(1e-30)) if not classes else (0.0, 1.0)
    target = y if classes else (y - mean) / scale
    for s in strengths:
        weights = [
            torch.randn(d, HIDDEN, generator=draw) / d**0.5,
            torch.zeros(HIDDEN),
            torch.randn(HIDDEN, out, generator=draw) / HIDDEN**0.5,
            torch.zeros(out),
        ]
        weights = [w.to(x.dtype).requires_grad_() for w in weights]

        def value(z: Tensor, weights: list[Tensor] = weights) -> Tensor:
            a, b, c, e = weights
            return torch.addmm(e, torch.addmm(b, z, a).tanh(), c)

        def loss(s: float = s, weights: list[Tensor] = weights, value: Predict = value) -> Tensor:
            with torch.enable_grad():
                fit = F.cross_entropy(value(x), target) if classes else F.mse_loss(value(x)[:, 0], target)
                whole = fit + 0.5 * s * (weights[0].square().sum() + weights[2].square().sum())
                for w, g in zip(weights, torch.autograd.grad(whole, weights), strict=True):
                    w.grad = g
            return whole.detach()

        _descend(weights, loss, 80)
        yield _Perceptron(value, classes, mean, scale)


def _descend(weights: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    search = torch.optim.LBFGS(weights, max_iter=steps, history_size=10, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe")
    with torch.no_grad():
        search.step(loss)


class Ridge:
    """Least squares with every strength at once: one eigendecomposition of the covariance."""

    def __init__(self, x: Tensor, y: Tensor):
        self.mean = y.mean(0)
        values, self.basis = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
        self.values = values.clamp_min(0)
        self.cross = self.basis.T @ (x.T @ (y - self.mean) / len(x)).double()

    def weights(self, strength: float) -> Tensor:
        """[d m]"""
        return self.basis @ (self.cross / (self.values + strength)[:, None])

    def predict(self, x: Tensor, strength: float) -> Tensor:
        """[n d] -> [n m]"""
        made: Tensor = torch.addmm(self.mean, x, self.weights(strength).to(x.dtype))
        return made


def ridge_predicted(x: Tensor, y: Tensor, fold: Tensor, groups: Tensor, seed: int, parts: Sequence[slice]) -> Tensor:
    """Held-out predictions of ``y`` [n m] by ridge regression; the strength is chosen for each of the ``parts`` of the columns by itself."""
    out = torch.empty_like(y)
    for train, test, fit, choose in splits(fold, groups, seed):
        best = [RIDGE[0]] * len(parts)
        if len(fit) and len(choose):
            norm = Standard(x[fit])
            ridge, inside = Ridge(norm(x[fit]), y[fit]), norm(x[choose])
            squares = [(ridge.predict(inside, s) - y[choose]).double().square() for s in RIDGE]
            best = [min(zip(squares, RIDGE, strict=True), key=lambda c, p=p: float(c[0][:, p].mean()))[1] for p in parts]  # type: ignore[misc]
        norm = Standard(x[train])
        ridge, unseen = Ridge(norm(x[train]), y[train]), norm(x[test])
        made = {s: ridge.predict(unseen, s) for s in set(best)}
        for p, s in zip(parts, best, strict=True):
            out[test, p] = made[s][:, p]
    return out


def predicted(x: Tensor, y: Tensor, classes: int, fold: Tensor, groups: Tensor, kind: str, seed: int) -> Tensor:
    """What every row [n] is predicted to be by a probe that was fitted without its fold. ``classes``: of ``y`` [n]; 0 means numbers."""
    if kind == "linear" and not classes:
        return ridge_predicted(x, y[:, None], fold, groups, seed, [slice(0, 1)])[:, 0]
    out = torch.empty_like(y)
    for f, (train, test, fit, choose) in enumerate(splits(fold, groups, seed)):
        options: dict[str, Any] = {"classes": classes, "kind": kind, "seed": seed + f}
        strengths = MLP if kind == "mlp" else LOGISTIC
        best = strengths[0]
        if len(fit) and len(choose):
            norm = Standard(x[fit])
            scored = [_score(p(norm(x[choose])), y[choose], classes) for p in _fits(norm(x[fit]), y[fit], strengths=strengths, **options)]
            best = strengths[max(range(len(scored)), key=lambda i: scored[i])]
        norm = Standard(x[train])
        path = strengths[: strengths.index(best) + 1] if kind == "linear" else (best,)
        probe = list(_fits(norm(x[train]), y[train], strengths=path, **options))[-1]
        out[test] = probe(norm(x[test])).to(out.dtype)
    return out


def _fits(x: Tensor, y: Tensor, *, classes: int, kind: str, seed: int, strengths: Sequence[float]) -> Iterator[Predict]:
    if kind == "mlp":
        yield from mlp(x, y, classes, strengths, seed)
    else:
        yield from logistic(x, y, classes, strengths)


def _score(guess: Tensor, y: Tensor, classes: int) -> float:
    return float((guess == y).double().mean()) if classes else -float((guess - y).double().square().mean())


def scores_by_fold(guess: Tensor, y: Tensor, fold: Tensor, classes: int) -> Tensor:
    """Accuracy, or for numbers ``R^2 = 1 - squared error / squared distance from the training folds' mean``, in every fold [f]."""
    found = []
    for f in range(int(fold.max()) + 1):
        test = fold == f
        if classes:
            found.append(float((guess[test] == y[test]).double().mean()))
        else:
            naive = (y[test] - y[~test].mean()).double().square().sum()
            found.append(1 - float((guess[test] - y[test]).double().square().sum() / naive.clamp_min(1e-300)))
    return torch.tensor(found)
