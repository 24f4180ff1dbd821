"""Two spaces side by side: do the same words lie in the same arrangement?

Procrustes    the rotation that brings one table nearest to the other, ``R = argmin |X R - Y|`` over ``R^T R = 1``: ``X^T Y = U S V^T``, ``R = U V^T``
relative      every word as its cosines to some anchor words, which no rotation changes (Moschella et al., arXiv 2209.15430)

Both are learnt on some words and measured on others: how often a word of the one finds its own among all held-out words of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.text import Tokenizer

from .figure import Theme, bars
from .result import Grid, Result
from .subject import check_whole
from .vectors import Table, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Alignment(Result):
    """How well held-out words find themselves in another space. Rows: ``ways``; ``accuracy`` [r] share whose own word is nearest, ``top10`` [r] among the
    ten nearest, ``rank`` [r] mean of 1 / rank. ``rotation`` [d e] of Procrustes; ``overlap``: share of ``Y``'s squared length that ``X R`` explains."""

    ways: tuple[str, ...]
    accuracy: Tensor
    top10: Tensor
    rank: Tensor
    rotation: Tensor
    overlap: float
    learnt_on: int
    measured_on: int
    anchors: int

    def __getitem__(self, way: str) -> float:
        if way not in self.ways:
            raise InputError(f"{way!r} is none of the ways: {', '.join(self.ways)}.")
        return float(self.accuracy[self.ways.index(way)])

    @property
    def title(self) -> str:
        return f"Two spaces: learnt on {self.learnt_on:,} words, measured on {self.measured_on:,} others"

    def grid(self) -> Grid:
        rows = tuple((w, float(a), float(t), float(r)) for w, a, t, r in zip(self.ways, self.accuracy, self.top10, self.rank, strict=True))
        note = f"Share of held-out words that find themselves (chance {1 / self.measured_on:.2g}); the rotation explains {self.overlap:.1%} of the other space."
        return Grid(("way", "nearest", "among 10", "1 / rank"), rows, note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        bars(figure.subplots(), theme, self.ways, self.accuracy, title=self.title, x="share of held-out words that find themselves")

    def size(self) -> tuple[float, float]:
        return (8.5, 2.8)


def align(
    a: Any,
    b: Any,
    words: Sequence[str] | None = None,
    *,
    table: str = "input",
    train: float = 0.8,
    anchors: int | None = None,
    centre: bool = True,
    most: int = 20_000,
    seed: int = 0,
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
) -> Alignment:
    """Compare the tables of two models on the words that both have as one token (or on ``words``).

    ``a``, ``b``: what ``gf.load`` gives, or models with ``tokenizers``. Without ``words``, tokens of the same spelling are taken, special ones left out, at
    most ``most``. Further options and what is measured as in :func:`align_vectors`. Raises :class:`InputError` if fewer than 20 words are common.
    """
    if tokenizers is not None and not (isinstance(tokenizers, tuple | list) and len(tokenizers) == 2):
        raise InputError(f"tokenizers={tokenizers!r}: there are two, one for each model, or None for those that the models were saved with.")
    first, second = tokenizers or (None, None)
    ta, tb = table_of(a, table, first), table_of(b, table, second)
    if words is not None and (isinstance(words, str) or not isinstance(words, Sequence)):
        raise InputError(f"words is {described(type(words))}, but a list of words is read; without it, tokens of the same spelling are taken.")
    check_whole(1, most=most)
    check_whole(0, seed=seed)
    # Two spellings of one token ("king", " king") are one word: it would stand on both sides of what is learnt and what is held out.
    pairs = _common(ta, tb) if words is None else list(dict.fromkeys((ta.id(w), tb.id(w)) for w in words))
    if len(pairs) < 20:
        raise InputError(
            f"The two models have {len(pairs)} words in common, but at least 20 are needed, better thousands: give words that both have as one token."
        )
    if len(pairs) > most:
        keep = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:most].sort().values
        pairs = [pairs[int(i)] for i in keep]
    x, y = ta.vectors[torch.tensor([p[0] for p in pairs])], tb.vectors[torch.tensor([p[1] for p in pairs])]
    return align_vectors(x, y, train=train, anchors=anchors, centre=centre, seed=seed)


def align_vectors(x: Tensor, y: Tensor, *, train: float = 0.8, anchors: int | None = None, centre: bool = True, seed: int = 0) -> Alignment:
    """Compare two sets of vectors, [n d] and [n e], of which row ``i`` belongs to the same thing.

    Learnt on a share ``train`` of the rows, measured on the rest by cosine: as they are (where d = e), by Procrustes, by Procrustes learnt on wrongly
    paired rows (what the method itself can bring about), by relative representations with ``anchors`` learnt-on rows (None: as many as the smaller width,
    at most 512), and by those with wrongly paired anchors. ``centre`` subtracts the mean of the rows that are learnt on.
    Raises :class:`InputError` for sets of other sizes.
    """
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise InputError(f"Two tensors of vectors are compared, but {described(type(x))} and {described(type(y))} were given: [n d] and [n e].")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(f"The vectors have shapes {tuple(x.shape)} and {tuple(y.shape)}, but row i of both belongs to the same thing: [n d] and [n e].")
    if not isinstance(train, int | float) or not 0 < train < 1:
        raise InputError(f"train={train!r}: it is the share of the rows that is learnt on, between 0 and 1.")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise InputError("The vectors hold numbers that are not finite, so there is no rotation between them: leave those rows out.")
    n_train = round(train * len(x))
    if n_train < 2 or len(x) - n_train < 2:
        raise InputError(f"train={train} of {len(x)} rows leaves {n_train} to learn on and {len(x) - n_train} to measure on: at least 2 of each are needed.")
    check_whole(0, seed=seed)
    if anchors is not None:
        check_whole(1, anchors=anchors)
    n_anchors = min(n_train, min(x.shape[1], y.shape[1], 512) if anchors is None else anchors)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draw)
    learn, held = order[:n_train], order[n_train:]
    wrong, wrong_anchors = torch.randperm(n_train, generator=draw), torch.randperm(n_anchors, generator=draw)
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    if centre:
        x, y = x - x[learn].mean(0), y - y[learn].mean(0)
    rotation, false = procrustes(x[learn], y[learn]), procrustes(x[learn], y[learn][wrong])
    ax, ay = x[learn[:n_anchors]], y[learn[:n_anchors]]
    tried = {"as they are": (x[held], y[held])} if x.shape[1] == y.shape[1] else {}
    tried |= {
        "Procrustes": (x[held] @ rotation, y[held]),
        "Procrustes, wrong pairs": (x[held] @ false, y[held]),
        "relative": (relative(x[held], ax), relative(y[held], ay)),
        "relative, wrong pairs": (relative(x[held], ax), relative(y[held], ay[wrong_anchors])),
    }
    measured = torch.tensor([retrieval(p, q) for p, q in tried.values()])
    turned = x[held] @ rotation
    scale = (turned * y[held]).sum() / turned.square().sum().clamp_min(1e-300)
    overlap = 1 - float((scale * turned - y[held]).square().sum() / y[held].square().sum().clamp_min(1e-300))
    return Alignment(tuple(tried), measured[:, 0], measured[:, 1], measured[:, 2], rotation.float(), overlap, n_train, len(held), n_anchors)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The matrix [d e] with orthonormal rows or columns that brings ``x`` [n d] nearest to ``y`` [n e] (Schönemann 1966)."""
    u, _, vh = torch.linalg.svd(x.T @ y, full_matrices=False)
    return u @ vh


def relative(x: Tensor, anchors: Tensor) -> Tensor:
    """Every row as its cosines to the anchors: [n d], [a d] -> [n a]; the same for ``x R`` and ``anchors R``."""
    return F.normalize(x, dim=-1) @ F.normalize(anchors, dim=-1).T


def retrieval(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """How often row ``i`` of ``y`` is the nearest by cosine to row ``i`` of ``x``, is among the ten nearest, and the mean of 1 / rank."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    ranks = []
    for start in range(0, len(x), 1024):
        score = x[start : start + 1024] @ y.T
        own = score.diagonal(start)[: len(score)].unsqueeze(1)
        ranks.append((score > own + 1e-12).sum(1) + 1)
    rank = torch.cat(ranks).double()
    return float((rank == 1).double().mean()), float((rank <= 10).double().mean()), float((1 / rank).mean())


def _common(a: Table, b: Table) -> list[tuple[int, int]]:
    """The ids of the tokens that are spelt alike in both vocabularies, special ones left out."""
    for t in (a, b):
        if t.subject.tokenizer is None:
            raise InputError("Words are found by their spelling, but a model has no tokenizer: give what gf.load gave, or tokenizers=.")
    spelt = [{_spelling(t, int(i)): int(i) for i in t.usable.nonzero()} for t in (a, b)]
    shared = [w for w in spelt[0] if w is not None and w in spelt[1]]
    return [(spelt[0][w], spelt[1][w]) for w in shared]


def _spelling(t: Table, i: int) -> str | None:
    tokenizer: Any = t.subject.tokenizer
    return None if i in set(getattr(tokenizer, "special", {}).values()) else str(tokenizer.piece(i))
