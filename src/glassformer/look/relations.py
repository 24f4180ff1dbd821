"""Relations between words: analogies, and whether a feature lies along one axis or along a direction.

    a - b + c        king - man + woman: which rows of the table lie nearest?

The usual answer leaves the three inputs out of the candidates. Mostly the nearest row of all is an input (``c`` or ``a``), so the exclusion does most of
the work (Linzen 2016, arXiv 1606.07736): both answers are given here, and what simpler rules reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.errors import InputError, TokenizerError
from glassformer.core.fields import described
from glassformer.text import Tokenizer

from .figure import Theme, bars, plain_text
from .result import Cell, Grid, Result
from .subject import check_whole
from .vectors import Table, table_of
from .windows import read_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = {
    "a - b + c": ((1.0, -1.0, 1.0), True),
    "inputs allowed": ((1.0, -1.0, 1.0), False),
    "only c": ((0.0, 0.0, 1.0), True),
    "only a": ((1.0, 0.0, 0.0), True),
    "a + c": ((1.0, 0.0, 1.0), True),
    "b - a + c": ((-1.0, 1.0, 1.0), True),
}
"""Weights of a, b and c in the query, and whether a, b and c are left out of the candidates. The last turns the relation round."""


@dataclass(frozen=True, eq=False)
class Analogy(Result):
    """The rows nearest to ``a - b + c``, with the three inputs left out and with them allowed: ids, pieces and cosines [k] each."""

    words: tuple[str, str, str]
    which: str
    excluded_ids: Tensor
    excluded: tuple[str, ...]
    excluded_values: Tensor
    included_ids: Tensor
    included: tuple[str, ...]
    included_values: Tensor
    nearest_to_c: tuple[str, ...]
    """What lies nearest to ``c`` alone, the inputs left out: a rule that knows nothing of ``a`` and ``b``."""

    @property
    def title(self) -> str:
        a, b, c = self.words
        return f"{a} − {b} + {c} in the {self.which} table"

    def grid(self) -> Grid:
        rows = tuple(
            (i + 1, x, float(xv), y, float(yv), z)
            for i, (x, xv, y, yv, z) in enumerate(zip(self.excluded, self.excluded_values, self.included, self.included_values, self.nearest_to_c, strict=True))
        )
        note = "Without the inputs, the usual way; with them; and what lies nearest to the third word alone."
        return Grid(("rank", "inputs left out", "cosine", "inputs allowed", "cosine ", "only c"), rows, note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        bars(left, theme, self.excluded, self.excluded_values, title=f"{self.title}\ninputs left out", x="cosine")
        bars(right, theme, self.included, self.included_values, title="\ninputs allowed", x="cosine")

    def size(self) -> tuple[float, float]:
        return (9.0, 1.6 + 0.25 * len(self.excluded))


def analogy(
    model: Any,
    a: int | str,
    b: int | str,
    c: int | str,
    k: int = 5,
    *,
    table: str = "input",
    centre: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Analogy:
    """The ``k`` tokens nearest by cosine to ``a - b + c`` (``analogy(model, " king", " man", " woman")``), vectors at length one first.

    ``centre`` subtracts the table's mean before. Raises :class:`InputError` for a word that is not one token.
    """
    check_whole(1, k=k)
    t = table_of(model, table, tokenizer, centre)
    ids = torch.tensor([[t.id(w) for w in (a, b, c)]])
    unit = t.unit()
    k = min(k, int(t.usable.sum()) - 3)
    if k < 1:
        raise InputError(f"The table has {int(t.usable.sum())} usable tokens: beside the three of the question there is none to answer with.")
    found = [_ranked(t, unit, ids, *RULES[rule], k) for rule in ("a - b + c", "inputs allowed", "only c")]
    pieces = [tuple(t.subject.piece(int(i)) for i in best[0]) for _, best in found]
    names = tuple(t.subject.piece(int(i)) for i in ids[0])
    (outside, outside_ids), (inside, inside_ids), _ = found
    return Analogy((names[0], names[1], names[2]), table, outside_ids[0], pieces[0], outside[0], inside_ids[0], pieces[1], inside[0], pieces[2])


def _ranked(t: Table, unit: Tensor, ids: Tensor, weights: tuple[float, float, float], exclude: bool, k: int) -> tuple[Tensor, Tensor]:
    """The best ``k`` of every question [n 3]: cosines [n k] and ids [n k]."""
    query = (unit[ids] * torch.tensor(weights)[:, None]).sum(1)
    score = F.normalize(query, dim=-1) @ unit.T
    score[:, ~t.usable] = -torch.inf
    if exclude:
        score.scatter_(1, ids, -torch.inf)
    best = score.topk(k, dim=1)
    return best.values, best.indices


@dataclass(frozen=True, eq=False)
class Analogies(Result):
    """Accuracy [category rule] over a file of questions, the last row over all. ``asked``: questions whose four words are single tokens; ``given``: all."""

    categories: tuple[str, ...]
    rules: tuple[str, ...]
    accuracy: Tensor
    asked: tuple[int, ...]
    given: tuple[int, ...]
    which: str

    @property
    def title(self) -> str:
        return f"Analogies in the {self.which} table: {self.asked[-1]:,} of {self.given[-1]:,} questions have words of one token each"

    def __getitem__(self, rule: str) -> float:
        """The accuracy of a rule over all questions."""
        if rule not in self.rules:
            raise InputError(f"{rule!r} is no rule. Known: {', '.join(self.rules)}.")
        return float(self.accuracy[-1, self.rules.index(rule)])

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = [
            (name, n, *(float(v) for v in values)) for name, n, values in zip(self.categories, self.asked, self.accuracy, strict=True) if n or name == "all"
        ]
        note = "Share of questions answered right. Inputs are left out of the candidates except under 'inputs allowed'."
        return Grid(("category", "questions", *self.rules), tuple(rows), note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        bars(figure.subplots(), theme, self.rules, self.accuracy[-1], title=self.title, x="share of questions answered right")

    def size(self) -> tuple[float, float]:
        return (8.5, 2.8)


def analogies(
    model: Any,
    questions: str | Path | Sequence[Sequence[str]],
    *,
    table: str = "input",
    centre: bool = False,
    tokenizer: Tokenizer | None = None,
    at_once: int = 512,
) -> Analogies:
    """Answer a file of questions (lines ``b a c answer`` such as ``man king woman queen``; ``: name`` begins a category), or a list of such fours.

    Only questions whose four words are single tokens are asked; a word is looked for with a space before it first, then as it is, then with a
    capital (" athens", "athens", " Athens", "Athens"). Given are the accuracy of ``a - b + c`` with the inputs left out, with them allowed, and of
    rules that leave parts away (Linzen 2016, arXiv 1606.07736): what those reach is not evidence for the relation.
    Raises :class:`InputError` for a file without questions, and a vocabulary without their words.
    """
    t = table_of(model, table, tokenizer, centre)
    if t.subject.tokenizer is None:
        raise InputError("Questions are words, but there is no tokenizer to read them: give tokenizer=, or what gf.load gave.")
    check_whole(1, at_once=at_once)
    grouped = _questions(questions)
    forms: dict[str, int | None] = {}
    unit, given, asked, right = t.unit(), [], [], []
    for fours in grouped.values():
        ids = [[_one_token(t, w, forms) for w in four] for four in fours]
        known = torch.tensor([i for i in ids if None not in i and len(set(i)) == 4], dtype=torch.long).reshape(-1, 4)
        hits = torch.zeros(len(RULES))
        for part in known.split(at_once):
            inputs = part[:, [1, 0, 2]]
            hits += torch.tensor([float((_ranked(t, unit, inputs, *rule, 1)[1][:, 0] == part[:, 3]).sum()) for rule in RULES.values()])
        given.append(len(fours))
        asked.append(len(known))
        right.append(hits)
    if not sum(asked):
        raise InputError(f"None of the {sum(given):,} questions has four words of one token each in this vocabulary: use a model with more whole words.")
    counts = torch.tensor([*asked, sum(asked)], dtype=torch.float32)
    accuracy = torch.stack([*right, torch.stack(right).sum(0)]) / counts[:, None]
    return Analogies((*grouped, "all"), tuple(RULES), accuracy, (*asked, sum(asked)), (*given, sum(given)), table)


def _questions(given: str | Path | Sequence[Sequence[str]]) -> dict[str, list[Sequence[str]]]:
    if isinstance(given, str | Path):
        lines = [line.split() for line in read_file(Path(given)).split("\n")]
    else:
        wrong = [four for four in given if isinstance(four, str) or not isinstance(four, Sequence)] if isinstance(given, Sequence) else [given]
        wrong = wrong or [word for four in given for word in four if not isinstance(word, str)]
        if wrong:
            raise InputError(f"{wrong[0]!r} is no question: a question is four words, such as ('man', 'king', 'woman', 'queen').")
        lines = [list(four) for four in given]
    found: dict[str, list[Sequence[str]]] = {}
    name = "questions"
    for number, line in enumerate(lines, 1):
        if line and line[0].startswith(":"):
            name = " ".join(line).lstrip(": ")
        elif len(line) == 4:
            found.setdefault(name, []).append(line)
        elif line:
            raise InputError(f"Line {number} of the questions has {len(line)} words ({' '.join(line[:6])}), but a question has 4: man king woman queen.")
    if not found:
        raise InputError("There is no question: a question is a line of four words, such as 'man king woman queen'.")
    return found


def _one_token(t: Table, word: str, known: dict[str, int | None]) -> int | None:
    if word not in known:
        encode: Any = getattr(t.subject.tokenizer, "encode", None)
        known[word] = None
        for form in (" " + word, word, f" {word.capitalize()}", word.capitalize()):
            try:
                ids = encode(form)
            except TokenizerError:  # a tokenizer of words knows no others
                continue
            if len(ids) == 1 and ids[0] != getattr(t.subject.tokenizer, "unk_id", None):
                known[word] = ids[0]
                break
    return known[word]


# Axis or direction


@dataclass(frozen=True, eq=False)
class Axis(Result):
    """Whether a feature lies along one coordinate or along a direction across many. Rows: ``names``; ``share`` [r] of the differences' squared length that
    the line carries, ``sides`` [r] share of held-out pairs that it puts the right way round."""

    names: tuple[str, ...]
    share: Tensor
    sides: Tensor
    pairs: int
    width: int
    best: int
    """The coordinate that carries most."""
    projections: Tensor
    """[n 2]: every pair on the mean direction of the others, second less first; and on their best coordinate."""

    @property
    def title(self) -> str:
        return f"Axis or direction: differences of {self.pairs} pairs in {self.width} dimensions"

    def grid(self) -> Grid:
        rows = tuple((n, float(s), float(a)) for n, s, a in zip(self.names, self.share, self.sides, strict=True))
        note = (
            "share: of the squared length of the differences, learnt and measured on other pairs; right way round: held-out pairs, chance is 0.5. "
            "A feature lies along an axis if the best coordinate carries about as much as the mean direction, and far more than in turned bases."
        )
        return Grid(("line", "share", "right way round"), rows, note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        bars(left, theme, self.names, self.share, title="share of the differences", x="share of squared length")
        bars(right, theme, ["" for _ in self.names], self.sides, title="held-out pairs the right way round", x="share (0.5 by chance)")
        right.axvline(0.5, color=theme.dim, linewidth=1, linestyle=":")
        figure.suptitle(plain_text(self.title), color=theme.ink, fontsize=11, x=0.01, ha="left")

    def size(self) -> tuple[float, float]:
        return (10.0, 3.0)


def direction_against_axis(
    model: Any,
    pairs: Sequence[tuple[int | str, int | str]] | Tensor,
    *,
    table: str = "input",
    folds: int = 5,
    turns: int = 20,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Axis:
    """How a feature lies that the second words of ``pairs`` have and the first have not: along one coordinate, or along a direction.

    Of the differences ``d_i = v(second) - v(first)``, every line is learnt on some pairs and measured on the others (``folds``): the mean direction, the
    best single coordinate (largest ``|mean|^3 / mean of squares``: consistent and large), the best coordinate of the space turned at random (averaged over
    ``turns`` rotations: what a basis without meaning gives), and a random direction (1 / d). ``pairs`` may be vectors [n 2 d], then ``model`` may be None.
    Raises :class:`InputError` for fewer than 4 pairs.
    """
    both = _vectors_of_pairs(model, pairs, table, tokenizer)
    n, d = len(both), both.shape[-1]
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise InputError(
            f"folds={folds if isinstance(folds, int) else described(type(folds))}: lines are learnt on some pairs and measured on others, in at least 2 folds."
        )
    check_whole(1, turns=turns)
    check_whole(0, seed=seed)
    if n < 4:
        raise InputError(f"{n} pairs were given, but a direction is learnt on some and measured on others: give at least 4, better 20.")
    draw = torch.Generator().manual_seed(seed)
    difference = both[:, 1] - both[:, 0]
    lines = _lines(difference, folds, turns, draw)
    whole = difference.square().sum()
    shares = [float(torch.stack([p.square().sum() for p in each]).sum() / whole) / len(each) for each in lines.values()]
    right = [float(torch.stack([(p > 0).double() + 0.5 * (p == 0) for p in each]).mean()) for each in lines.values()]
    right[-1] = 0.5  # a random direction has no side that is meant
    best = int(_best_coordinate(difference).abs().argmax())
    projections = torch.stack([lines["mean direction"][0], lines["best coordinate"][0]], 1).float()
    return Axis(tuple(lines), torch.tensor(shares), torch.tensor(right), n, d, best, projections)


def _vectors_of_pairs(model: Any, pairs: Any, table: str, tokenizer: Tokenizer | None) -> Tensor:
    """[n 2 d] in float64. Raises :class:`InputError` for what are no pairs."""
    if isinstance(pairs, Tensor):
        if pairs.ndim != 3 or pairs.shape[1] != 2:
            raise InputError(f"The pairs are a tensor of shape {tuple(pairs.shape)}, but two vectors for each are read: [n 2 d].")
        both = pairs.detach().cpu().double()
        if not both.isfinite().all():
            raise InputError("The pairs hold numbers that are not finite, so they have no directions: leave those vectors out.")
        return both
    t = table_of(model, table, tokenizer)
    if not isinstance(pairs, Sequence):
        raise InputError(f"pairs is {described(type(pairs))}, but a list of pairs of words is read, or a tensor [n 2 d].")
    for p in pairs:
        if isinstance(p, str) or not isinstance(p, Sequence) or len(p) != 2:
            raise InputError(f"{p!r} is no pair: give two words for each, such as ('small', 'smaller').")
    return t.vectors[torch.tensor([[t.id(w) for w in p] for p in pairs], dtype=torch.long).reshape(-1, 2)].double()


def _lines(difference: Tensor, folds: int, turns: int, draw: torch.Generator) -> dict[str, list[Tensor]]:
    """Differences [n d] on every kind of line, learnt from other folds: [n] each, several of the kinds that are drawn at random."""
    n, d = difference.shape
    fold = torch.empty(n, dtype=torch.long)
    fold[torch.randperm(n, generator=draw)] = torch.arange(n) % min(folds, n)
    turned = [difference @ torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q for _ in range(turns)]
    random = torch.randn(d, turns, generator=draw, dtype=torch.float64)
    return {
        "mean direction": [_held_out(difference, fold, _mean_direction)],
        "best coordinate": [_held_out(difference, fold, _best_coordinate)],
        "best coordinate, turned": [_held_out(x, fold, _best_coordinate) for x in turned],
        "random direction": list((difference @ (random / random.norm(dim=0))).unbind(1)),
    }


def _held_out(x: Tensor, fold: Tensor, learn: Any) -> Tensor:
    """Every difference on the line learnt from the other folds [n]."""
    out = torch.empty(len(x), dtype=x.dtype)
    for f in fold.unique():
        out[fold == f] = x[fold == f] @ learn(x[fold != f])
    return out


def _mean_direction(x: Tensor) -> Tensor:
    return F.normalize(x.mean(0), dim=0)


def _best_coordinate(x: Tensor) -> Tensor:
    mean, square = x.mean(0), x.square().mean(0)
    strength = torch.where(square > 0, mean.square() / square, torch.zeros_like(square)) * (mean.square() / mean.square().max().clamp_min(1e-300)).sqrt()
    at = int(strength.argmax())
    line = torch.zeros_like(mean)
    line[at] = 1.0 if mean[at] >= 0 else -1.0
    return line
