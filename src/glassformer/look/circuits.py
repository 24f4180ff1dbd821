"""Circuits of a head: what it moves (OV) and what it looks for (QK), as matrices between tokens that are never formed.

    OV     W_E ─► W_V ─► W_O ─► W_U        source token ─► logits that the head raises where it attends to that token
    QK     W_E ─► W_Q ─► R_n ─► W_K^T ─► W_E^T    query token ─► keys that it attends to, n positions back

Both have rank ``d_head`` at most, so eigenvalues come from [k k], singular values from two QR decompositions, and the largest entries
from blocks of rows (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", transformer-circuits.pub).

    w = weights(model).folded                        for many heads: the norms are folded in once
    [ov_circuit(w, 3, h) for h in range(12)]

These are paths through the embedding and one head. What other heads and feed-forward layers have written to the stream by then goes
through the same matrices and is not in these tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.numerics import wide

from .bilinear import check_plain_attention, query_and_key, view_of
from .composition import Composition, composition_scores
from .extremes import largest_entries, share_on_diagonal
from .factored import FactoredMatrix
from .figure import Theme, bars, below_above, dress, plain_text
from .matrices import Weights
from .result import Grid, Result
from .subject import check_reads_tokens, piece_of, read_head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer


@dataclass(frozen=True)
class Direction:
    """One singular direction read as tokens: its singular value, and the tokens that lie furthest along it on the way in and on the way out."""

    value: float
    reads: tuple[tuple[str, float], ...]
    writes: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """One circuit of one head.

    ``kind``: ``"ov"`` or ``"qk"``. ``matrix``: the factored [d d] in the stream's space (of QK without ``scale``). ``full``: the factored
    [v v] between tokens, with ``scale``. ``eigenvalues`` [r 2]: real and imaginary parts of those of ``full``, the longest first.
    ``singular`` [r]: singular values of ``matrix``. ``copying``: sum of the eigenvalues by the sum of their lengths, from -1 to 1.
    ``diagonal``: share of tokens whose own entry is larger than all others of its row (OV: the head raises the token that it reads; QK: a token looks
    for itself).
    ``pairs``: for each of the rows that have the largest one, its largest entry of ``full`` above the row's mean, as (row token,
    column token, value). ``distance``: query position less key position (QK with rotary positions).
    """

    kind: str
    layer: int
    head: int
    matrix: FactoredMatrix = field(repr=False)
    full: FactoredMatrix = field(repr=False)
    eigenvalues: Tensor
    singular: Tensor
    copying: float
    diagonal: float
    pairs: tuple[tuple[str, str, float], ...]
    directions: tuple[Direction, ...]
    distance: int
    folded: bool

    @property
    def title(self) -> str:
        name = "OV circuit: source token → raised token" if self.kind == "ov" else "QK circuit: query token → key token"
        apart = f", {self.distance} back" if self.kind == "qk" and self.distance else ""
        return f"Head {self.layer}.{self.head}, {name}{apart}"

    def grid(self) -> Grid:
        rows: list[tuple[Any, ...]] = [(a, b, value) for a, b, value in self.pairs]
        names = ("source", "raised", "logit above the row's mean") if self.kind == "ov" else ("query", "key", "score above the row's mean")
        own = "raise themselves most" if self.kind == "ov" else "look for themselves most"
        lines = [f"eigenvalues: sum / sum of lengths = {self.copying:+.3f}; {self.diagonal:.1%} of tokens {own}"]
        for i, d in enumerate(self.directions):
            lines.append(f"direction {i} ({d.value:.3g}): {' '.join(t for t, _ in d.reads)}  →  {' '.join(t for t, _ in d.writes)}")
        norm = "norm weights folded in" if self.folded else "norm weights not folded in"
        lines.append(f"{norm}; the division by each token's own scale is left out: compare entries of a row, not of different rows")
        return Grid(names, tuple(rows), "\n".join(lines))

    def size(self) -> tuple[float, float]:
        return (11.0, 1.6 + 0.24 * max(12, len(self.pairs)))

    def draw(self, figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        top = float(self.eigenvalues.norm(dim=-1).max()) or 1.0
        around = torch.linspace(0, 2 * torch.pi, 200)
        left.plot(around.cos(), around.sin(), color=theme.grid, linewidth=1)
        real, imaginary = (self.eigenvalues / top).T.tolist()
        below, above = below_above(theme)
        left.scatter(real, imaginary, s=22, color=[above if r >= 0 else below for r in real], alpha=0.85, linewidths=0)
        left.axhline(0, color=theme.grid, linewidth=0.8)
        left.axvline(0, color=theme.grid, linewidth=0.8)
        left.set_aspect("equal")
        left.set_xlim(-1.12, 1.12)
        left.set_ylim(-1.12, 1.12)
        dress(left, theme, f"eigenvalues, by the longest ({top:.3g})", "real part", "imaginary part", grid=False)
        left.text(0.0, -1.06, f"sum / sum of lengths = {self.copying:+.2f}", color=theme.dim, fontsize=9, ha="center")
        bars(
            right,
            theme,
            [f"{a} → {b}" for a, b, _ in self.pairs],
            [v for *_, v in self.pairs],
            title="largest pairs",
            x=f"{'logit' if self.kind == 'ov' else 'score'} above the row's mean",
        )
        figure.suptitle(plain_text(self.title), color=theme.ink, fontsize=12, x=0.01, ha="left")


def ov_circuit(
    model: Any,
    layer: int | str | tuple[int, int],
    head: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    fold: bool | None = None,
    k: int = 20,
    directions: int = 4,
) -> Circuit:
    """What a head moves: ``W_E W_V W_O W_U`` [v v], its eigenvalues, singular directions and the largest entries of ``k`` rows.

    Nothing of [v v] is held; finding ``pairs`` and ``diagonal`` costs at most ``4 v^2 d_head`` operations (:mod:`.extremes`): for GPT-2's vocabulary
    some seconds to tens of seconds of a processor, for one of 2,048 pieces milliseconds.

    ``model``: also a view ``weights(model).folded``, which is then read as it is; asking many heads of one view folds once.
    ``layer, head``: two numbers, or ``"1.3"``. ``fold``: norm weights multiplied into the matrices (None: where that is exact).
    Raises :class:`InputError` for a model without scores over its vocabulary, :class:`SiteError` for a head that it has not.
    """
    w, stack, tokenizer, at = _opened(model, layer, head, tokenizer, fold)
    check_reads_tokens(stack, "The OV circuit between tokens")
    if stack.readout.transform is not None:
        raise InputError(
            f"The OV circuit ends in W_U, but this model's read-out has a {type(stack.readout.spec.transform).__name__} before it, which is no matrix: "
            "qk_circuit() needs no read-out."
        )
    V, O, E, U = (wide(x) for x in (w.W_V[at], w.W_O[at], _readable(w, stack), w.W_U))
    return _circuit("ov", at, FactoredMatrix(V, O), FactoredMatrix(E @ V, O @ U), E, U.T, tokenizer, k, directions, 0, w)


def qk_circuit(
    model: Any,
    layer: int | str | tuple[int, int],
    head: int | None = None,
    *,
    distance: int = 0,
    tokenizer: Tokenizer | None = None,
    fold: bool | None = None,
    k: int = 20,
    directions: int = 4,
) -> Circuit:
    """What a head looks for: ``scale W_E W_Q R_n W_K^T W_E^T`` [v v], row: query token, column: key token, ``n = distance`` positions back.

    With rotary positions ``R_n`` turns the query by ``n`` positions (0: the part that content alone decides); positions that are added or biased
    are not in it, nor are the biases of queries and keys, nor a norm on the embedding itself (BERT's).
    An RMSNorm on queries and keys enters by its weights. Arguments and cost as of :func:`ov_circuit`.
    Raises :class:`InputError` where scores are no bilinear form (a LayerNorm on queries and keys), and for a distance below 0 in a causal model.
    """
    w, stack, tokenizer, at = _opened(model, layer, head, tokenizer, fold)
    q, key = query_and_key(w, stack, at, distance)
    matrix = FactoredMatrix(q, key.T)
    E = wide(_readable(w, stack))
    full = FactoredMatrix(E @ q * stack.blocks[at[0]].attn.scale, (E @ key).T)
    return _circuit("qk", at, matrix, full, E, E, tokenizer, k, directions, distance, w)


def _opened(model: Any, layer: Any, head: int | None, tokenizer: Tokenizer | None, fold: bool | None) -> tuple[Weights, Any, Tokenizer | None, tuple[int, int]]:
    """The view that is read, its stack, the tokenizer, (layer, head)."""
    w, stack = view_of(model, fold)
    at = read_head(stack, layer if head is None else (layer, head))
    check_plain_attention(at[0], stack.blocks[at[0]].attn, "there is no W_K and W_V to multiply")
    return w, stack, w.tokenizer if tokenizer is None else tokenizer, at


def _readable(w: Weights, stack: Any) -> Tensor:
    """The token vectors [v d] as they enter the stream. Raises :class:`InputError` where they are narrower."""
    E = w.W_E
    d = stack.spec.d_model
    if E.shape[1] != d:
        raise InputError(
            f"The stream is {d} wide, but the embedding's table {E.shape[1]}, and is lifted with the positions: there is no matrix from tokens to the stream."
        )
    return E


def _circuit(
    kind: str,
    at: tuple[int, int],
    matrix: FactoredMatrix,
    full: FactoredMatrix,
    E: Tensor,
    out: Tensor,
    tokenizer: Tokenizer | None,
    k: int,
    n: int,
    distance: int,
    w: Weights,
) -> Circuit:
    """Everything that is said of the two factored matrices; ``E`` and ``out`` [v d] read their two sides as tokens."""
    if any(isinstance(x, bool) or not isinstance(x, int) for x in (k, n)) or k < 1 or n < 0:
        raise InputError(f"k={k!r} pairs and directions={n!r} were asked for: at least 1 pair, and 0 or more directions.")
    pairs, diagonal = largest_entries(full, k), share_on_diagonal(full)  # also refuses NaN
    values = torch.linalg.eigvals(full.BA.double())
    values = values[values.abs().argsort(descending=True)]
    name = lambda i: piece_of(tokenizer, int(i))
    u, s, v = matrix.svd()
    found = []
    for i in range(min(n, len(s))):
        reads, writes = E @ u[:, i], out @ v[:, i]
        if writes.max() < -writes.min():  # a direction and its opposite are one: the side on which more is written is shown
            reads, writes = -reads, -writes
        tops = [tuple((name(j), float(x[j])) for j in x.topk(min(8, len(x))).indices) for x in (reads, writes)]
        found.append(Direction(float(s[i]), tops[0], tops[1]))
    total = float(values.abs().sum())
    return Circuit(
        kind=kind,
        layer=at[0],
        head=at[1],
        matrix=matrix,
        full=full,
        eigenvalues=torch.view_as_real(values).float().cpu(),
        singular=s.float().cpu(),
        copying=float(values.real.sum()) / total if total else 0.0,
        diagonal=diagonal,
        pairs=tuple((name(a), name(b), value) for a, b, value in pairs),
        directions=tuple(found),
        distance=distance,
        folded=w.fold_norms,
    )


__all__ = ["Circuit", "Composition", "Direction", "FactoredMatrix", "composition_scores", "ov_circuit", "qk_circuit"]
