"""The tables of a model: which tokens lie near which.

nearest(model, " king")                       rows of the embedding (or the read-out) that point the same way
nearest_in_context(model, text, "bank", texts)   tokens of other texts whose vectors at a site do

The vector of a token at a site is made by everything before that site, so the second answers another question than the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core.errors import InputError, TokenizerError
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.parts.norm import DynamicTanhLayer, LayerNormLayer, NormLayer, RMSNormLayer
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .figure import Theme, bars
from .result import Cell, Grid, Result
from .subject import Positions, Subject, Text, check_reads_tokens, check_whole, choose, read, with_weights
from .windows import Batch, Context, Reading, Texts, Window, context_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("input", "output")
MEASURES = ("cosine", "euclid", "dot")


# Tables


@dataclass(frozen=True, eq=False)
class Table:
    """The vector of every token. ``vectors`` [v d] in float32, on the CPU; ``usable`` [v]: rows that some text of the tokenizer can reach."""

    subject: Subject
    which: str
    vectors: Tensor
    usable: Tensor

    def id(self, word: int | str) -> int:
        """The token that is meant: the text as it is, or with a space before it if that alone is one token. Raises :class:`InputError` otherwise."""
        if isinstance(word, str) and self.subject.tokenizer is not None and word[:1] != " ":
            encode = self.subject.tokenizer.encode
            try:
                if len(encode(word)) != 1 and len(spaced := encode(" " + word)) == 1:
                    return spaced[0]
            except TokenizerError as error:
                raise InputError(f"{word!r} is no token of this vocabulary: {error}") from error
        return self.subject.token(word)

    def unit(self) -> Tensor:
        """Every vector at length one [v d]."""
        return F.normalize(self.vectors, dim=-1)


def subject_of(model: Any, tokenizer: Tokenizer | None = None) -> Subject:
    """The model itself, without a text; raises :class:`InputError` for what is no model."""
    inner = model.model if isinstance(model, Loaded) else model
    return read(model, [0], tokenizer, source=[0] if isinstance(inner, EncoderDecoderModel) else None)


def table_of(model: Any, which: str = "input", tokenizer: Tokenizer | None = None, centre: bool = False) -> Table:
    """A table of vectors: ``"input"``, as tokens enter the model (scaled, lifted), or ``"output"``, what the read-out multiplies by.

    ``centre`` subtracts the mean of all rows (arXiv 1702.01417: tables have a large common part, which makes all cosines alike).
    Raises :class:`InputError` for a model without that table.
    """
    s = subject_of(model, tokenizer)
    stack = with_weights(s.stack, f"The {choose(which, TABLES, 'table of vectors')} table")
    with torch.no_grad():
        if which == "input":
            embed: Any = stack.embed
            vectors = embed.lift_tokens(embed.weight * embed.factor)
        else:
            check_reads_tokens(s.stack, "The output table")
            readout: Any = stack.readout
            vectors = readout.weight
        vectors = vectors.detach().float().cpu()
        known = torch.ones(len(vectors), dtype=torch.bool)
        if s.tokenizer is not None:
            known = torch.tensor([_has_piece(s.tokenizer, i) for i in range(len(vectors))])
        if centre:
            vectors = vectors - vectors[known].mean(0)
    return Table(s, which, vectors.clone() if vectors.data_ptr() == stack.embed.weight.data_ptr() else vectors, known)


def _has_piece(tokenizer: Tokenizer, i: int) -> bool:
    try:
        tokenizer.piece(i)
    except (TokenizerError, LookupError):
        return False
    return True


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix [out in] of a linear layer in float32 on the CPU, whatever it is held in."""
    weight: Any = layer.weight
    weight = weight.dequantize() if hasattr(weight, "tensor_data_names") else weight
    made: Tensor = weight.detach().float().cpu()
    return made


def through(norm: NormLayer | None, u: Tensor) -> Tensor:
    """What a norm makes of a small step ``u`` [.. d] apart from its size: the norm's linear part (centring, gain), its division left out."""
    if isinstance(norm, LayerNormLayer):
        return (u - u.mean(-1, keepdim=True)) * norm.weight.detach().float().cpu()
    if isinstance(norm, RMSNormLayer):
        return u * (norm.offset + norm.weight.detach().float().cpu())
    if isinstance(norm, DynamicTanhLayer):
        return u * (norm.alpha * norm.weight).detach().float().cpu()
    return u


def back_through(norm: NormLayer | None, w: Tensor) -> Tensor:
    """The direction in the stream that ``w`` [.. d] reads behind a norm: the transpose of :func:`through`."""
    if isinstance(norm, LayerNormLayer):
        w = w * norm.weight.detach().float().cpu()
        return w - w.mean(-1, keepdim=True)
    return through(norm, w)


def closeness(query: Tensor, vectors: Tensor, by: str) -> Tensor:
    """How near every vector [v d] is to each query [n d]: [n v]; larger is nearer (``"euclid"``: the distance below zero)."""
    if by == "euclid":
        return -torch.cdist(query, vectors, compute_mode="donot_use_mm_for_euclid_dist" if vectors.numel() < 1 << 22 else "use_mm_for_euclid_dist")
    if by == "cosine":
        return F.normalize(query, dim=-1) @ F.normalize(vectors, dim=-1).T
    return query @ vectors.T


# Neighbours


@dataclass(frozen=True, eq=False)
class Neighbours(Result):
    """The tokens nearest to one. ``ids``, ``values`` [k], nearest first; ``by``: what ``values`` are (``"euclid"``: distances)."""

    word: str
    id: int | None
    which: str
    by: str
    ids: Tensor
    values: Tensor
    pieces: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"Nearest to {self.word} in the {self.which} table, by {self.by}"

    def grid(self) -> Grid:
        name = {"cosine": "cosine", "euclid": "distance", "dot": "product"}[self.by]
        rows = tuple((i + 1, p, int(n), float(v)) for i, (p, n, v) in enumerate(zip(self.pieces, self.ids, self.values, strict=True)))
        return Grid(("rank", "token", "id", name), rows, "The token itself is left out." if self.id is not None else "")

    def draw(self, figure: Figure, theme: Theme) -> None:
        bars(figure.subplots(), theme, self.pieces, self.values, title=self.title, x={"euclid": "distance", "dot": "product"}.get(self.by, self.by))

    def size(self) -> tuple[float, float]:
        return (7.0, 1.2 + 0.25 * len(self.pieces))


def nearest(
    model: Any,
    word: int | str | Tensor,
    k: int = 10,
    *,
    table: str = "input",
    by: str = "cosine",
    centre: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Neighbours:
    """The ``k`` tokens whose vectors lie nearest to that of ``word`` (a token, or a vector [d] of your own); the token itself is left out.

    ``by``: ``"cosine"`` of the angle, ``"euclid"`` distance, or ``"dot"`` product, which favours long vectors. ``centre`` subtracts the table's mean.
    Raises :class:`InputError` for a word that is not one token, an unknown table or measure, and ``k`` below 1.
    """
    choose(by, MEASURES, "measure of nearness")
    check_whole(1, k=k)
    t = table_of(model, table, tokenizer, centre)
    at: int | None = None
    if isinstance(word, Tensor):
        if word.shape != (t.vectors.shape[1],):
            raise InputError(f"The vector has shape {tuple(word.shape)}, but the rows of the {table} table have {t.vectors.shape[1]} numbers: give [d].")
        query, name = word.detach().float().cpu(), "the given vector"
        if not query.isfinite().all():
            raise InputError("The vector holds numbers that are not finite, so nothing is near it.")
    else:
        at = t.id(word)
        query, name = t.vectors[at], t.subject.piece(at)
    score = closeness(query[None], t.vectors, by)[0].masked_fill(~t.usable, -torch.inf)
    if at is not None:
        score[at] = -torch.inf
    values, ids = score.topk(min(k, int(t.usable.sum()) - (at is not None)))
    return Neighbours(name, at, table, by, ids, values.abs() if by == "euclid" else values, tuple(t.subject.piece(int(i)) for i in ids))


# In context


@dataclass(frozen=True, eq=False)
class NeighboursInContext(Result):
    """Tokens of texts whose vectors at ``site`` lie nearest to that of one token of another text. ``values`` [k] and ``contexts``, nearest first."""

    word: str
    site: str
    by: str
    values: Tensor
    contexts: tuple[Context, ...]
    tokens: int
    """How many tokens were compared."""

    @property
    def title(self) -> str:
        return f"Nearest to {self.word} at {self.site}, by {self.by}, among {self.tokens:,} tokens"

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = [(i + 1, float(c.value), c.pieces[c.at], str(c), c.text, c.position) for i, c in enumerate(self.contexts)]
        return Grid(("rank", "distance" if self.by == "euclid" else self.by, "token", "context", "text", "position"), tuple(rows))

    def draw(self, figure: Figure, theme: Theme) -> None:
        names = [str(c)[:70] for c in self.contexts]
        bars(figure.subplots(), theme, names, self.values, title=self.title, x="distance" if self.by == "euclid" else self.by)

    def size(self) -> tuple[float, float]:
        return (10.0, 1.2 + 0.28 * len(self.contexts))


def nearest_in_context(
    model: Any,
    text: Text,
    position: Positions,
    texts: Texts,
    *,
    site: str = "resid_final",
    k: int = 10,
    by: str = "cosine",
    tokens: int | None = 100_000,
    context: int | None = None,
    around: int = 10,
    source: Any = None,
    tokenizer: Tokenizer | None = None,
) -> NeighboursInContext:
    """The ``k`` tokens of ``texts`` (a text, a list, a file) whose vectors at ``site`` lie nearest to that of the token at ``position`` of ``text``.

    Texts are read in windows of ``context`` tokens, at most ``tokens`` in all; held are the ``k`` best and one batch. ``source``: what an encoder-decoder's
    encoder reads. Raises :class:`InputError` and :class:`SiteError`.
    """
    choose(by, MEASURES, "measure of nearness")
    check_whole(1, k=k)
    check_whole(0, around=around)
    reading = Reading(model, texts, tokenizer, source=source, context=context, tokens=tokens)
    s = read(model, text, tokenizer, source=reading.source(0))
    at = s.position(position)
    full, *more = reading.vector_sites(site)
    if more:
        raise InputError(f"{site!r} meets {1 + len(more)} sites, but vectors of one are compared: name one, such as {reading.short(full)!r}.")
    record, _ = s.run(reading.short(full))
    query = record[full][0].flatten(1)[at].float()
    best: list[tuple[float, Window, int]] = []
    seen = 0

    def look(path: str, x: Tensor, batch: Batch) -> None:
        nonlocal best, seen
        score = closeness(query[None], x.flatten(2).flatten(0, 1).float(), by)[0].view(batch.real.shape).masked_fill(~batch.real, -torch.inf)
        for row, w in enumerate(batch.windows):
            score[row, : w.before] = -torch.inf  # what was put around a text is no token of it
            score[row, len(w.ids) - w.after : len(w.ids)] = -torch.inf
            seen += len(w.ids) - w.before - w.after
        values, places = score.flatten().topk(min(k, score.numel()))
        wide = batch.real.shape[1]
        found = [(v, batch.windows[i // wide], i % wide) for v, i in zip(values.tolist(), places.tolist(), strict=True) if v > -torch.inf]
        best = sorted(best + found, key=lambda b: -b[0])[:k]

    reading.run([full], look)
    contexts = tuple(context_of(s.tokenizer, w, i, abs(v) if by == "euclid" else v, around) for v, w, i in best)
    return NeighboursInContext(s.labels([at])[0], site, by, torch.tensor([c.value for c in contexts]), contexts, seen)
