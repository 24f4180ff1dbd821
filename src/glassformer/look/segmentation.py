"""Tokenizers opened: why a text is cut as it is, word by word.

    text ──► normalised ──► words ──► BPE         the pair that was learnt first is joined, again and again   (arXiv 1508.07909)
                                  ├─► Unigram     every piece that fits is an edge, the best path wins        (arXiv 1804.10959)
                                  ├─► WordPiece   the longest piece that fits, then the longest of the rest   (arXiv 1609.08144)
                                  └─► words, bytes, characters    looked up

What was learnt, and from what, is settled when a tokenizer is trained: BPE's merges come from counts in a corpus, not from the model that
reads them later. Cutting a text is deterministic. Each trail here is followed step by step, and its end is compared with what the tokenizer itself gives.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glassformer.core.errors import InputError, TokenizerError
from glassformer.text import Tokenizer
from glassformer.text.alphabet import bytes_of, readable
from glassformer.weights.own import Loaded

from .figure import Theme, dress, plain_text
from .result import Grid, Result
from .shown import shown
from .subject import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


@dataclass(frozen=True, eq=False)
class Segmentation(Result):
    """Every word of a text with the trail to its tokens (see :func:`segment`)."""

    text: str
    kind: str
    words: tuple[Trail, ...]

    @property
    def title(self) -> str:
        n = sum(len(w.ids) for w in self.words)
        return f"{n:,} token{'' if n == 1 else 's'} of {shorten(self.text)!r}, by {self.kind}"

    def grid(self) -> Grid:
        rows: list[tuple[Any, ...]] = []
        for word in self.words:
            where = f"{word.offsets[0][0]}–{word.offsets[-1][1]}" if word.offsets else ""
            for i, told in enumerate(_told(word) or ("looked up",)):
                rows.append((_word(word) if not i else "", where if not i else "", told, " ".join(word.pieces) if not i else ""))
        return Grid(("word", "characters", "step", "tokens"), tuple(rows), NOTES.get(self.kind, ""))

    def size(self) -> tuple[float, float]:
        word = self._drawn()
        return (min(14.0, max(7.0, 0.7 * len(word.text) + 2)), min(12.0, max(3.0, 0.36 * len(_told(word)) + 2)))

    def draw(self, figure: Figure, theme: Theme) -> None:
        """The word with the longest trail."""
        axes, word = figure.add_subplot(), self._drawn()
        if word.steps and isinstance(word.steps[0], Edge):
            _draw_lattice(axes, theme, word)
        else:
            _draw_rows(axes, theme, word)

    def _drawn(self) -> Trail:
        return max(self.words, key=lambda w: len(w.steps), default=Trail("", (), (), (), ()))


NOTES = {
    "bpe": "rank: the merge's place in the learnt list; of all adjacent pairs the one with the lowest rank is joined, the leftmost of equals",
    "unigram": "score: ln p of a piece; the path with the largest sum wins",
    "wordpiece": "the longest piece that fits is taken, from left to right; ## begins a piece inside a word",
}


def segment(tokenizer: Tokenizer | Loaded, text: str) -> Segmentation:
    """Follow a tokenizer through ``text``: BPE's merges in order, Unigram's lattice and best path, WordPiece's trail of matches.

    ``tokenizer``: one, or what ``gf.load`` gave. Raises :class:`InputError` for an empty text, and :class:`TokenizerError` for a tokenizer that cuts in a
    way that is not followed here (what it does then differs from the trail, which is never shown).
    """
    if isinstance(tokenizer, Loaded):
        if tokenizer.tokenizer is None:
            raise InputError("This model was saved without a tokenizer, so there is none to open: give Tokenizer.load(path).")
        tokenizer = tokenizer.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise InputError("segment(tokenizer, text) opens a tokenizer: give gf.Tokenizer.load(path), or what gf.load(folder) gave.")
    if not isinstance(text, str) or not text:
        raise InputError("The text is empty, so no word of it can be followed: give some text.")
    library = tokenizer.library
    config = json.loads(library.to_str())
    offsets = tokenizer.offsets(text)
    follow = _follower(config["model"], library)
    trails: list[Trail] = []
    at = 0
    for word, added in _words(library, config, text):
        steps, ids, note = ((), (added,), "a token of its own") if added is not None else follow(word)
        mine = offsets[at : at + len(ids)]
        if tuple(p.id for p in mine) != tuple(ids):
            raise TokenizerError(
                f"The word {word!r} comes to the ids {list(ids)} here, but the tokenizer gives {[p.id for p in mine]}: it cuts in a way that is not followed."
            )
        trails.append(Trail(word, steps, tuple(ids), tuple(shown(p.text) for p in mine), tuple((p.start, p.end) for p in mine), note))
        at += len(ids)
    if at != len(offsets):
        raise TokenizerError(f"The trail ends after {at} tokens, but the tokenizer gives {len(offsets)}: it cuts in a way that is not followed.")
    kind = {"BPE": "bpe", "Unigram": "unigram", "WordPiece": "wordpiece"}.get(config["model"]["type"], "lookup")
    return Segmentation(text, kind, tuple(trails))


# From text to words


def _words(library: Any, config: Mapping[str, Any], text: str) -> list[tuple[str, int | None]]:
    """The words as the model of the tokenizer sees them; an added token (a special one) with its id."""
    added = sorted((t for t in config["added_tokens"]), key=lambda t: -len(t["content"]))
    found: list[tuple[str, int | None]] = []
    for part, id in _cut(text, added):
        if id is not None:
            found.append((part, id))
            continue
        normal = library.normalizer.normalize_str(part) if library.normalizer is not None else part
        pieces = [w for w, _ in library.pre_tokenizer.pre_tokenize_str(normal)] if library.pre_tokenizer is not None else [normal]
        found += [(w, None) for w in pieces if w]
    return found


def _cut(text: str, added: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None]]:
    parts: list[tuple[str, int | None]] = []
    begin = at = 0
    while at < len(text):
        token = next((t for t in added if text.startswith(t["content"], at)), None)
        if token is None:
            at += 1
            continue
        if at > begin:
            parts.append((text[begin:at], None))
        parts.append((token["content"], token["id"]))
        begin = at = at + len(token["content"])
    return [*parts, (text[begin:], None)] if begin < len(text) else parts


# The algorithms


def _follower(model: Mapping[str, Any], library: Any) -> Any:
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
        steps.append(Merge(rank, _letters(left), _letters(right), tuple(map(_letters, pieces))))
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


def _letters(piece: str) -> str:
    """A piece of a byte-level vocabulary as a person reads it; others are so already."""
    raw = bytes_of(piece)
    return shown(readable(raw)) if raw is not None else shown(piece)


# Showing


def _word(word: Trail) -> str:
    """The word as a person reads it: a byte-level one is written in letters that stand for bytes."""
    return _letters(word.text) if any(isinstance(s, Merge) for s in word.steps) or not word.steps else shown(word.text)


def _tried(step: Match) -> str:
    return "" if step.piece is None or not step.tried else f"  ({step.tried} longer one{'s are' if step.tried > 1 else ' is'} not in the vocabulary)"


def _told(word: Trail) -> list[str]:
    told: list[str] = []
    for step in word.steps:
        if isinstance(step, Merge):
            told.append(f"rank {step.rank:,}: {step.left} + {step.right}  →  {' '.join(step.pieces)}")
        elif isinstance(step, Match):
            told.append(f"from {step.start}: {'nothing fits' if step.piece is None else shown(step.piece)}{_tried(step)}")
    edges = [s for s in word.steps if isinstance(s, Edge)]
    if edges:
        told.append(
            "  ".join(f"{shown(e.piece)} {e.score:.2f}" for e in edges if e.taken)
            + f"  ({len(edges)} piece{'s' * (len(edges) != 1)} of the vocabulary fit{'s' * (len(edges) == 1)})"
        )
    return told + ([word.note] if word.note else [])


def _draw_rows(axes: Axes, theme: Theme, word: Trail) -> None:
    """The word after every step, one row each, boxes as wide as their text."""
    rows: list[tuple[str, tuple[str, ...], str]] = []
    first = next((s for s in word.steps if isinstance(s, Merge)), None)
    if first is not None:
        rows.append(("letters", _before(word), ""))
    for step in word.steps:
        if isinstance(step, Merge):
            rows.append((f"rank {step.rank:,}", step.pieces, step.left + step.right))
    if not rows:
        rows = [("tokens", word.pieces, "")]
    for y, (_, pieces, new) in enumerate(rows):
        x = 0.0
        for piece in pieces:
            width = max(1, len(piece))
            fill = theme.series[1] if piece == new else theme.grid
            axes.add_patch(_box(x, y, width, fill))
            axes.text(
                x + width / 2, y, plain_text(piece), ha="center", va="center", fontsize=10, family="monospace", color=theme.paper if piece == new else theme.ink
            )
            x += width + 0.15
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.3, max(sum(max(1, len(p)) + 0.15 for p in r[1]) for r in rows) + 0.2)
    dress(axes, theme, shorten(_word(word)), grid=False)
    axes.set_xticks([])


def _before(word: Trail) -> tuple[str, ...]:
    """The letters before the first merge: the first state with its new piece taken apart again."""
    first = next(s for s in word.steps if isinstance(s, Merge))
    pieces = list(first.pieces)
    at = next(i for i, p in enumerate(pieces) if p == first.left + first.right)
    pieces[at : at + 1] = [first.left, first.right]
    return tuple(pieces)


def _box(x: float, y: float, width: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y - 0.32), width, 0.64, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor=colour, edgecolor="none")


def _draw_lattice(axes: Axes, theme: Theme, word: Trail) -> None:
    """Every edge as a bar from its first letter to its last, long ones on top; the best path in colour."""
    edges = sorted((s for s in word.steps if isinstance(s, Edge)), key=lambda e: (e.start - e.end, e.start))
    free: list[int] = []  # per row, the place from which it is free
    for e in edges:
        row = next((r for r, until in enumerate(free) if until <= e.start), len(free))
        if row == len(free):
            free.append(0)
        free[row] = e.end
        axes.add_patch(_box(e.start + 0.04, row, e.end - e.start - 0.08, theme.series[0] if e.taken else theme.grid))
        ink = theme.paper if e.taken else theme.ink
        axes.text(
            (e.start + e.end) / 2, row, plain_text(f"{shown(e.piece)}\n{e.score:.1f}"), ha="center", va="center", fontsize=8, family="monospace", color=ink
        )
    axes.set_xlim(-0.2, len(word.text) + 0.2)
    axes.set_ylim(len(free) - 0.4, -0.6)
    dress(axes, theme, word.note, grid=False)
    axes.set_xticks([i + 0.5 for i in range(len(word.text))], [plain_text(shown(c)) for c in word.text])
    axes.set_yticks([])
