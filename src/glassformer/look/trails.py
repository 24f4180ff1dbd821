"""How the algorithms of tokenizers cut one word: BPE's merges, Unigram's best path, WordPiece's matches, each followed step by step."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glassformer.core.errors import InputError
from glassformer.text.alphabet import bytes_of, readable
from glassformer.text.shown import shown

MOST_LETTERS = 2000
"""Letters of a word that BPE is followed through: its trail holds the whole word after every merge, so it grows with their square."""
UNKNOWN_PENALTY = 10.0
"""How far below the worst piece of a Unigram vocabulary an unknown character stands (SentencePiece's constant)."""


@dataclass(frozen=True)
class Merge:
    """One join of BPE: ``rank`` is the merge's place in the learnt list (0 was learnt first), ``pieces`` what the word is after it."""

    rank: int
    left: str
    right: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """One piece that fits between two places of a word in Unigram's lattice: ``score`` is ln p of it, ``taken`` whether the best path uses it."""

    start: int
    end: int
    piece: str
    score: float
    taken: bool


@dataclass(frozen=True)
class Match:
    """One step of WordPiece: from ``start`` on, how many longer pieces were ``tried`` and are not in the vocabulary, and the ``piece`` that is (or None)."""

    start: int
    tried: int
    piece: str | None


@dataclass(frozen=True)
class Trail:
    """How one word came to its tokens. ``text``: the word as the algorithm sees it (normalised).

    ``steps``: Merges, Edges or Matches, or none where it is looked up.
    ``ids``, ``pieces`` and ``offsets`` are its tokens, their display forms, and the characters ``[start, end)`` of the whole text that they cover.
    """

    text: str
    steps: tuple[Merge | Edge | Match, ...]
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    note: str = ""


# The algorithms


def follower(model: Mapping[str, Any], library: Any) -> Any:
    """``word -> (steps, ids, note)`` for this kind of model."""
    if model["type"] == "BPE":
        ranks = {tuple(m.split(" ", 1) if isinstance(m, str) else m): i for i, m in enumerate(model["merges"])}
        return lambda word: _merge(word, model, ranks)
    if model["type"] == "Unigram":
        scores = {piece: (i, score) for i, (piece, score) in enumerate(model["vocab"])}
        longest = max(map(len, scores), default=1)
        return lambda word: _best_path(word, model, scores, longest)
    if model["type"] == "WordPiece":
        return lambda word: _match(word, model)
    return lambda word: ((), tuple(t.id for t in library.model.tokenize(word)), "looked up")


def _merge(word: str, model: Mapping[str, Any], ranks: Mapping[tuple[str, ...], int]) -> tuple[tuple[Merge, ...], list[int], str]:
    """Byte-pair encoding of one word: O(steps * length), as short as words are."""
    vocab: Mapping[str, int] = model["vocab"]
    if len(word) > MOST_LETTERS:
        raise InputError(
            f"A word of {len(word):,} letters stands in this text as the tokenizer cuts it, but at most {MOST_LETTERS:,} are followed: give less text."
        )
    if model.get("ignore_merges") and word in vocab:
        return (), [vocab[word]], "the whole word is in the vocabulary"
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    letters = [(prefix if i else "") + c + (suffix if i == len(word) - 1 else "") for i, c in enumerate(word)]
    pieces = _known(letters, vocab, model)
    steps: list[Merge] = []
    while len(pieces) > 1:
        rank, at = min((ranks.get((pieces[i], pieces[i + 1]), len(ranks)), i) for i in range(len(pieces) - 1))
        if rank == len(ranks):
            break
        left, right = pieces[at], pieces[at + 1]
        pieces[at : at + 2] = [left + right.removeprefix(prefix) if prefix else left + right]
        steps.append(Merge(rank, as_read(left), as_read(right), tuple(map(as_read, pieces))))
    return tuple(steps), [vocab[p] for p in pieces], ""


def _known(letters: Sequence[str], vocab: Mapping[str, int], model: Mapping[str, Any]) -> list[str]:
    """The letters as the vocabulary has them: bytes, or the unknown token, for those it has not."""
    found: list[str] = []
    for c in letters:
        as_bytes = [f"<0x{b:02X}>" for b in c.encode("utf-8")]
        if c in vocab:
            found.append(c)
        elif model.get("byte_fallback") and all(b in vocab for b in as_bytes):
            found += as_bytes
        elif (unk := model.get("unk_token")) in vocab and unk is not None and not (model.get("fuse_unk") and found and found[-1] == unk):
            found.append(unk)
    return found


def _best_path(word: str, model: Mapping[str, Any], scores: Mapping[str, tuple[int, float]], longest: int) -> tuple[tuple[Edge, ...], list[int], str]:
    """Viterbi over the lattice of all pieces that fit."""
    unk, worst = model["unk_id"], min(s for _, s in scores.values()) - UNKNOWN_PENALTY
    n = len(word)
    best: list[tuple[float, int, str | None]] = [(0.0, 0, None), *[(float("-inf"), 0, None)] * n]  # score, where from, piece (None: unknown)
    edges: list[tuple[int, int, str, float]] = []
    for i in range(n):
        single = False
        for j in range(i + 1, min(n, i + longest) + 1):
            if (piece := word[i:j]) in scores:
                edges.append((i, j, piece, scores[piece][1]))
                single |= j == i + 1
                if best[i][0] + scores[piece][1] > best[j][0]:
                    best[j] = (best[i][0] + scores[piece][1], i, piece)
        if not single and best[i][0] + worst > best[i + 1][0]:
            best[i + 1] = (best[i][0] + worst, i, None)
    path: list[tuple[int, int, str | None]] = []
    end = n
    while end:
        _, start, took = best[end]
        path.append((start, end, took))
        end = start
    path.reverse()
    taken = {(a, b) for a, b, known in path if known is not None}
    ids: list[int] = []
    for k, (a, b, known) in enumerate(path):
        as_bytes = [f"<0x{x:02X}>" for x in word[a:b].encode("utf-8")]
        if known is not None:
            ids.append(scores[known][0])
        elif model.get("byte_fallback") and all(x in scores for x in as_bytes):
            ids += [scores[x][0] for x in as_bytes]
        elif not (k and path[k - 1][2] is None):  # unknown characters side by side are one token
            ids.append(unk)
    note = f"the best of all paths: {best[n][0]:.2f}" + (f"; the next one {second:.2f}" if (second := _second(edges, n, best[n][0])) is not None else "")
    return tuple(Edge(a, b, p, s, (a, b) in taken) for a, b, p, s in edges), ids, note


def _second(edges: Sequence[tuple[int, int, str, float]], n: int, best: float) -> float | None:
    """The sum of the second-best path of known pieces, or None if there is none."""
    at: list[list[float]] = [[0.0], *[[] for _ in range(n)]]
    for i, j, _, score in sorted(edges):
        at[j] = heapq.nlargest(2, at[j] + [s + score for s in at[i]])
    return at[n][1] if len(at[n]) > 1 and abs(at[n][0] - best) < 1e-6 else None


def _match(word: str, model: Mapping[str, Any]) -> tuple[tuple[Match, ...], list[int], str]:
    """Greedy longest match from the left."""
    vocab: Mapping[str, int] = model["vocab"]
    prefix, unk, most = model["continuing_subword_prefix"], model["unk_token"], model["max_input_chars_per_word"]
    if len(word) > most:
        return (), [vocab[unk]], f"longer than {most} characters: unknown as a whole"
    steps: list[Match] = []
    ids: list[int] = []
    start = 0
    while start < len(word):
        ends = range(len(word), start, -1)
        found = next(((tried, piece) for tried, end in enumerate(ends) if (piece := (prefix if start else "") + word[start:end]) in vocab), None)
        if found is None:
            return (*steps, Match(start, len(ends), None)), [vocab[unk]], "no piece fits the rest, so the whole word is unknown"
        tried, piece = found
        steps.append(Match(start, tried, piece))
        ids.append(vocab[piece])
        start += len(piece) - (len(prefix) if start else 0)
    return tuple(steps), ids, ""


def as_read(piece: str) -> str:
    """A piece of a byte-level vocabulary as a person reads it; others are so already."""
    raw = bytes_of(piece)
    return shown(readable(raw)) if raw is not None else shown(piece)


def word_of(word: Trail) -> str:
    """The word as a person reads it: a byte-level one is written in letters that stand for bytes."""
    return as_read(word.text) if any(isinstance(s, Merge) for s in word.steps) or not word.steps else shown(word.text)
