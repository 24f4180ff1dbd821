"""An Inside made by hand: patterns of known shape (previous token, first token, induction, spread), no model."""

from __future__ import annotations

import numpy as np

from glassformer.core.errors import TokenizerError
from glassformer.look.inside import Card, Inside, Lens, Norms
from glassformer.text.shown import shown


def made(words: list[str], layers: int = 4, heads: int = 4, *, causal: bool = True, seed: int = 0, top: int = 5) -> Inside:
    """Head h of layer l: kinds in turn previous token, first token, induction, spread, nearest."""
    draw = np.random.default_rng(seed)
    t = len(words)
    vocabulary = sorted(set(words)) + [f" w{i}" for i in range(40)]
    ids = tuple(vocabulary.index(w) for w in words)
    patterns = tuple(np.stack([_pattern(ids, (layer * heads + h) % 5, causal, draw) for h in range(heads)]) for layer in range(layers))
    rows = ("embedding", *(f"block {i}" for i in range(layers - 1)), "output")
    lens = _lens(rows, ids, len(vocabulary), causal, draw, top)
    grow = np.linspace(4, 40, layers + 1)[:, None]
    first = np.where(np.arange(t) == 0, 3.0, 1.0)
    norms = Norms(
        *(np.abs(draw.normal(size=(layers, t), scale=0.2) + 1).astype(np.float32) * grow[1:].astype(np.float32) / k for k in (4, 3)),
        (grow * first + draw.normal(size=(layers + 1, t))).astype(np.float32),
        True,
    )
    card = Card("made by hand", "decoder" if causal else "encoder", layers, 64, len(vocabulary), 123_456)
    return Inside(
        "".join(words),
        card,
        ids,
        tuple(map(shown, words)),
        patterns,
        (np.triu(np.ones((t, t), bool), 1) & causal,) * layers,
        norms,
        lens,
        {i: shown(w) for i, w in enumerate(vocabulary)},
    )


def _pattern(ids: tuple[int, ...], kind: int, causal: bool, draw: np.random.Generator) -> np.ndarray:
    t = len(ids)
    scores = draw.normal(size=(t, t))
    q, s = np.indices((t, t))
    if kind == 0:
        scores += 7 * (s == q - 1)
    elif kind == 1:
        scores += 6 * (s == 0)
    elif kind == 2:
        before = np.roll(np.equal.outer(ids, ids), 1, axis=1) & (s > 0) & (s < q)
        scores += 8 * before + 5 * (s == 0)
    elif kind == 4:
        scores -= 0.6 * np.abs(q - s)
    scores = np.where((s > q) & causal, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def _lens(rows: tuple[str, ...], ids: tuple[int, ...], v: int, causal: bool, draw: np.random.Generator, top: int) -> Lens:
    t, r = len(ids), len(rows)
    after = np.array([*ids[1:], -1] if causal else ids)
    right = np.eye(v)[np.maximum(after, 0)]
    scores = draw.normal(size=(r, t, v)) + right * np.linspace(0, 6, r)[:, None, None] * (draw.random((t, 1)) > 0.3)
    p = np.exp(scores)
    p /= p.sum(-1, keepdims=True)
    best = np.argsort(-p, -1)[..., :top]
    choice = np.broadcast_to(best[-1, :, 0], (r, t))
    following = np.broadcast_to(np.maximum(after, 0), (r, t))

    def take(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = np.take_along_axis(p, index[..., None], -1)
        return own[..., 0].astype(np.float32), (p > own).sum(-1) + 1

    next_p, next_rank = take(following)
    return Lens(
        rows,
        best,
        np.take_along_axis(p, best, -1).astype(np.float32),
        -(p * np.log2(p)).sum(-1).astype(np.float32),
        *take(choice),
        np.where(after < 0, np.nan, next_p).astype(np.float32),
        np.where(after < 0, 0, next_rank),
    )


def induction(ids: tuple[int, ...]) -> np.ndarray:
    """A pattern [t s] that puts all weight right after the earlier copy of the token, else on the first token."""
    t = len(ids)
    out = np.zeros((t, t))
    for q in range(t):
        earlier = [s for s in range(q) if ids[s] == ids[q]]
        out[q, earlier[-1] + 1 if earlier else 0] = 1
    return out


class Letters:
    """A tokenizer of 31 ids: letters, a few signs, and two that stand around the texts of an encoder."""

    alphabet = "abcdefghijklmnopqrstuvwxyz ,.[]"
    vocab_size = len(alphabet)

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        return [self.alphabet.index(c) for c in (f"[{text}]" if add_special else text)]

    def piece(self, id: int) -> str:
        if id >= self.vocab_size:
            raise TokenizerError(f"{id} is not in this vocabulary")
        return self.alphabet[id]
