"""Run a model once on a text and keep what a reader of the page wants to see.

    text ──► tokens ──► model(tokens, tap=Record(…)) ──► Inside
                              │
                              ├── patterns        per layer   h t s
                              ├── streams         l+1 t d ──► Lens: final norm, read-out, soft-max, top k
                              └── attn, ffn out   l t d   ──► Norms: how long is what each layer adds

Everything in :class:`Inside` is NumPy and plain Python: it can be made by hand, saved, compared,
and needs no model any more.

The *logit lens* (nostalgebraist, 2020) is a view by the observer: it applies the model's final norm and read-out
to a stream that the model itself reads out only after the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassformer.core.errors import InputError, TokenizerError
from glassformer.core.flow import Pass
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record, Tap
from glassformer.models import Encoder, Transformer
from glassformer.parts.readout import LanguageModel
from glassformer.text.shown import shown

from .subject import note_length

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MOST_TOKENS = 512
"""A pattern grows with the square of the text: beyond this a page is slow to open and too dense to read."""

HEAD_FIGURES = ("entropy", "distance", "itself", "previous", "first", "copy")
"""The numbers that :func:`head_figures` gives for every head, in this order."""


@dataclass(frozen=True)
class Card:
    """What is said about the model at the head of the page."""

    name: str
    kind: str  # "decoder": the model predicts the next token; "encoder": it predicts the token in its place
    layers: int
    d_model: int
    vocab_size: int
    parameters: int


@dataclass(frozen=True, eq=False)
class Lens:
    """The prediction read at each depth.

    Axis ``r`` counts depths: 0 is the stream that enters block 0, ``i`` the stream that leaves
    block ``i - 1``, and the last one the model's own output. ``ids`` and ``p`` [r t k] are the k
    most probable tokens, best first; ``entropy`` [r t] is in bits. ``choice_*`` [r t] follow the
    model's own most probable token through the depths, ``next_*`` [r t] the token that follows in
    the text (a decoder; at the last position probability NaN and rank 0, for nothing follows) or stands there (an encoder). Rank 1 is
    the most probable.
    """

    rows: tuple[str, ...]
    ids: Ints
    p: Floats
    entropy: Floats
    choice_p: Floats
    choice_rank: Ints
    next_p: Floats
    next_rank: Ints


@dataclass(frozen=True, eq=False)
class Norms:
    """Euclidean lengths: ``attn`` and ``ffn`` [l t] of the layers' outputs, ``stream`` [l+1 t] of the stream between blocks.

    ``adds`` says that stream after = stream before + attn + ffn holds here (it does not where a
    norm stands between a layer's output and the stream).
    """

    attn: Floats
    ffn: Floats
    stream: Floats
    adds: bool


@dataclass(frozen=True, eq=False)
class Inside:
    """All that the page shows of one model on one text (t tokens)."""

    text: str
    card: Card
    ids: tuple[int, ...]
    pieces: tuple[str, ...]  # display form of each token
    patterns: tuple[Floats, ...]  # per layer: h t s
    masked: tuple[Bools, ...]  # per layer: t s, True where the mask forbids (a weight may be 0 without: soft-max underflows)
    norms: Norms
    lens: Lens | None  # None: the model has no read-out over a vocabulary
    vocabulary: dict[int, str]  # display form of every token id that occurs

    @property
    def causal(self) -> bool:
        """Whether every layer's mask hides all later tokens."""
        later = np.triu(np.ones((len(self.ids), len(self.ids)), bool), 1)
        return all(bool(m[later].all()) for m in self.masked)

    @property
    def row_sums(self) -> tuple[float, float]:
        """The smallest and the largest sum of a pattern row; (1, 1) up to rounding under soft-max."""
        sums = [p.sum(-1, dtype=np.float64) for p in self.patterns if p.size]
        return (min(float(s.min()) for s in sums), max(float(s.max()) for s in sums)) if sums else (1.0, 1.0)

    def head_figures(self) -> list[NDArray[np.float64]]:
        """Per layer [h 6]: see :func:`head_figures`."""
        return [head_figures(p, self.ids) for p in self.patterns]


def gather(model: Any, tokenizer: Any, text: str, *, name: str | None = None, top: int = 5, most_tokens: int = MOST_TOKENS, tap: Tap | None = None) -> Inside:
    """Run ``model`` once on ``text`` and keep patterns, lens and norms.

    The model runs without dropout and without gradients, and is left as it was. ``name`` is
    shown as the model's name; ``top`` tokens are kept per lens cell. ``tap``: edits that hold meanwhile.

    Raises :class:`InputError` for a text without tokens or of more than ``most_tokens`` tokens, for
    a model that reads two texts, and for ids that the model's vocabulary does not hold.
    """
    card = _card(model, name)
    ids, pieces = _tokens(tokenizer, text, most_tokens, around=card.kind == "encoder")
    if max(ids) >= card.vocab_size:
        raise InputError(
            f"The tokenizer gave token id {max(ids)}, but the model's vocabulary ends at {card.vocab_size - 1}: "
            "use the tokenizer that was saved with this model."
        )
    note_length(model, len(ids))
    record, logits = _run(model, ids, tap)
    layers = range(card.layers)
    pre = [_rows(record[f"blocks.{i}.resid_pre"]) for i in layers]
    streams = [*pre, _rows(record[f"blocks.{card.layers - 1}.resid_post"])]
    patterns = tuple(_numpy(record[f"blocks.{i}.attn.pattern"][0]) for i in layers)
    masked = tuple(record[f"blocks.{i}.attn.scores"][0, 0].isneginf().cpu().numpy() for i in layers)
    reads_tokens = isinstance(model.spec.readout, LanguageModel)
    lens = _lens(model, streams, logits[0], ids, causal=card.kind == "decoder", top=top) if reads_tokens else None
    seen = sorted({*ids, *(lens.ids.ravel().tolist() if lens else ())})
    vocabulary = {i: _piece(tokenizer, i) for i in seen}
    return Inside(text, card, ids, pieces, patterns, masked, _norms(record, streams), lens, vocabulary)


# Text and model


def _tokens(tokenizer: Any, text: str, most: int, *, around: bool) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and display forms, with what the model was trained to see around a text: [CLS] and [SEP], a beginning.

    ``around`` asks a tokenizer that has no ``prompt`` for it.
    """
    made = tokenizer.prompt(text) if hasattr(tokenizer, "prompt") else tokenizer.encode(text, add_special=around)
    ids = tuple(int(i) for i in made)
    if not ids:
        raise InputError(f"The text {text!r} has 0 tokens, but a page needs at least 1: give some text.")
    if len(ids) > most:
        raise InputError(
            f"The text has {len(ids)} tokens, but a page shows at most {most} (a pattern grows with the square of the length): "
            f"give a shorter text, such as its first {most} tokens."
        )
    return ids, tuple(_piece(tokenizer, i) for i in ids)


def _piece(tokenizer: Any, i: int) -> str:
    """What the tokenizer calls an id; a model's vocabulary may have room beyond the tokenizer's."""
    try:
        return shown(tokenizer.piece(i))
    except TokenizerError:
        return f"‹{i}›"


def _card(model: Any, name: str | None) -> Card:
    spec = model.spec
    kind = type(spec).__name__
    if not isinstance(spec, Transformer):
        raise InputError(f"A page shows a decoder or an encoder, but this model is an {kind}, which reads two texts: give its encoder (model.encoder).")
    if any(block.cross is not None for block in spec.blocks):
        raise InputError("This decoder has cross-attention and reads a second text, but a page shows one text: give a model without cross-attention.")
    return Card(
        name=name or kind,
        kind="encoder" if isinstance(spec, Encoder) else "decoder",
        layers=len(spec.blocks),
        d_model=int(spec.d_model),
        vocab_size=int(spec.vocab_size),
        parameters=sum(p.numel() for p in model.parameters()),
    )


@torch.no_grad()
def _run(model: Any, ids: Sequence[int], tap: Tap | None) -> tuple[Record, Tensor]:
    known = {site.path for site in model.sites()}
    wanted = ("attn.pattern", "attn.scores[0]", "resid_pre", "resid_post", "attn.out", "ffn.out", "experts.out")
    # One head's scores say where they are minus infinity: the mask of all heads of the layer.
    # A pattern that meets no site is an error, so a model without experts is not asked for them.
    record = Record(*(f"blocks.*.{site}" for site in wanted if any(path.endswith(f".{site.removesuffix('[0]')}") for path in known)))
    device = next(model.parameters()).device
    with evaluating(model):
        logits = model(torch.tensor([list(ids)], device=device), tap=record if tap is None else tap | record)
    return record, logits


# The lens


@torch.no_grad()
def _lens(model: Any, streams: Sequence[Tensor], logits: Tensor, ids: Sequence[int], *, causal: bool, top: int) -> Lens:
    """Read every stream [t d] as the model reads its last; the last row is ``logits`` [t v], the model's own."""
    after = torch.tensor([*ids[1:], -1] if causal else list(ids), device=logits.device)
    choice = logits.argmax(-1)
    index = torch.arange(len(ids), device=logits.device)
    p = Pass(positions=index, index=index)
    rows: list[dict[str, Any]] = []
    for depth in range(len(streams)):
        last = depth == len(streams) - 1
        scores = logits if last else model.readout(model.final_norm(streams[depth][None], p), p)[0]
        rows.append(_read(scores.float(), choice, after, min(top, logits.shape[-1])))
    names = ("embedding", *(f"block {i}" for i in range(len(streams) - 2)), "output")

    def column(key: str) -> Any:
        return np.stack([row[key] for row in rows])

    return Lens(names, *(column(k) for k in ("ids", "p", "entropy", "choice_p", "choice_rank", "next_p", "next_rank")))


def _read(scores: Tensor, choice: Tensor, after: Tensor, top: int) -> dict[str, Any]:
    logp = scores.log_softmax(-1)
    p = logp.exp()
    best = p.topk(top, -1)
    # 0 * -inf is nan: a token that is excluded outright carries no surprise.
    entropy = -(p * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1) / np.log(2.0)

    def follow(token: Tensor) -> tuple[Any, Any]:
        own = p.gather(-1, token.clamp_min(0)[:, None])
        rank = (p > own).sum(-1) + 1
        nothing = token < 0
        return _numpy(own[:, 0].masked_fill(nothing, float("nan"))), rank.masked_fill(nothing, 0).cpu().numpy()

    choice_p, choice_rank = follow(choice)
    next_p, next_rank = follow(after)
    return {
        "ids": best.indices.cpu().numpy(),
        "p": _numpy(best.values),
        "entropy": _numpy(entropy),
        "choice_p": choice_p,
        "choice_rank": choice_rank,
        "next_p": next_p,
        "next_rank": next_rank,
    }


# Norms and heads


def _norms(record: Record, streams: Sequence[Tensor]) -> Norms:
    layers = len(streams) - 1

    def out(i: int, *parts: str) -> Tensor:
        found = [_rows(record[path]) for path in (f"blocks.{i}.{part}.out" for part in parts) if path in record]
        return torch.stack(found).sum(0) if found else torch.zeros_like(streams[i])

    attn = [out(i, "attn") for i in range(layers)]
    ffn = [out(i, "ffn", "experts") for i in range(layers)]
    adds = all(_close(streams[i] + attn[i] + ffn[i], streams[i + 1]) for i in range(layers))
    lengths: Callable[[Sequence[Tensor]], Floats] = lambda xs: np.stack([_numpy(x.float().norm(dim=-1)) for x in xs])
    return Norms(lengths(attn), lengths(ffn), lengths(streams), adds)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the model's own dtype, measured against the longest stream."""
    room = 8 * torch.finfo(a.dtype).eps * max(float(b.float().abs().max()), 1e-30)
    return bool((a.float() - b.float()).abs().max() <= room)


def head_figures(pattern: Floats, ids: Sequence[int]) -> NDArray[np.float64]:
    """Six numbers per head, [h t s] -> [h 6], each a mean over the queries of this text.

    - entropy: of the row, in bits (the row divided by its sum, where the sum is not 1); 0 = one key takes all
    - distance: mean of \\|t - s\\| under the row, in tokens (divided in the same way)
    - itself, previous, first: the weight on the query's own, the previous, and the first position (the last two over queries after the first)
    - copy: the weight on positions right after an earlier occurrence of the query's token (itself not counted), over the
      queries that have one; NaN if none does. High in induction heads (Olsson et al., arXiv 2209.11895)
    """
    h, t, _ = pattern.shape
    p = pattern.astype(np.float64)
    size = np.abs(p)
    share = size / np.maximum(size.sum(-1, keepdims=True), 1e-30)
    position = np.arange(t)
    entropy = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1).mean(-1)
    distance = (share * np.abs(position[:, None] - position)).sum((-1, -2)) / t
    itself = p[:, position, position].mean(-1)
    nothing = np.full(h, np.nan)
    previous = p[:, position[1:], position[:-1]].mean(-1) if t > 1 else nothing
    first = p[:, 1:, 0].mean(-1) if t > 1 else nothing
    same = np.equal.outer(np.asarray(ids), np.asarray(ids))
    copied = np.zeros((t, t), bool)
    copied[:, 1:] = same[:, :-1]  # key s follows an occurrence of the query's token at s - 1 …
    copied &= position[:, None] > position  # … and lies before the query
    has = copied.any(-1)
    copy = (p * copied).sum(-1)[:, has].mean(-1) if has.any() else nothing
    return np.stack([entropy, distance, itself, previous, first, copy], -1)


def _rows(x: Tensor) -> Tensor:
    """[1 t d] -> [t d]."""
    return x[0]


def _numpy(x: Tensor) -> Floats:
    return x.detach().float().cpu().numpy()
