"""Which head finds which syntactic relation, against gold dependency trees (Clark et al., arXiv 1906.04341).

    sentence ──► tokens ──► patterns [h t s] ──► words [h w w] ──► most attended word ──► is it the gold one?
                                                            best fixed offset ("the word before") ──► is it?

The head and the offset are chosen on one half of the sentences; the accuracies that are reported come from the other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .conllu import Sentence, read_conllu
from .patterns import each_pattern, head_names
from .result import Cell, Grid, Result
from .subject import check_whole, most_positions, n_layers
from .windows import Batch, Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .figure import Theme

FINDS_HEAD, FINDS_DEPENDENT = "dependent → head", "head → dependent"
OFFSETS = tuple(o for o in range(-10, 11) if o)
"""Fixed offsets in words that a head is compared with."""
DRAWS = 1000
"""Samples of sentences, with replacement, behind the 95 % intervals."""
SHOWN = 24
"""Rows of the figure."""


@dataclass(frozen=True, eq=False)
class SyntacticHeads(Result):
    """One row ``r`` for every relation and direction; ``n`` counts heads (:attr:`heads`).

    ``best`` [r]: the head with the highest accuracy on the half that chooses; ``offset`` [r]: the best fixed offset there (in words; -1 is the word before).
    ``accuracy`` [r n], ``baseline`` [r]: shares of right answers on the other half, over the ``counts`` [r] questions that it holds.
    ``interval`` [r 2]: of the best head's accuracy; ``gain`` [r] and ``gain_interval`` [r 2]: of its accuracy less the baseline's, on the same questions.
    """

    relations: tuple[str, ...]
    directions: tuple[str, ...]
    heads: tuple[str, ...]
    best: tuple[str, ...]
    offset: tuple[int, ...]
    counts: tuple[int, ...]
    accuracy: Tensor
    baseline: Tensor
    interval: Tensor
    gain: Tensor
    gain_interval: Tensor
    sentences: int
    unseen: int
    """Edges, each counted in both directions, that could not be asked about: target not visible, no other word to choose, or a word without a token."""
    skipped: int
    """Sentences longer than the model's positions."""
    causal: bool

    @property
    def title(self) -> str:
        return f"Syntactic relations found by {len(self.heads)} heads on {self.sentences:,} sentences"

    def own(self, row: int) -> float:
        """Accuracy of the chosen head of a row."""
        return float(self.accuracy[row, self.heads.index(self.best[row])])

    def order(self) -> list[int]:
        """Rows, those first whose head is furthest above its baseline."""
        return sorted(range(len(self.relations)), key=lambda r: -float(self.gain[r]))

    def grid(self) -> Grid:
        rows: list[tuple[Cell, ...]] = []
        for r in self.order():
            low, high = (round(float(x), 3) for x in self.interval[r])
            glow, ghigh = (round(float(x), 3) for x in self.gain_interval[r])
            names = (self.relations[r], self.directions[r], self.counts[r], self.best[r], round(self.own(r), 3), f"{low:.3f} to {high:.3f}")
            rows.append((*names, f"{self.offset[r]:+d}", round(float(self.baseline[r]), 3), round(float(self.gain[r]), 3), f"{glow:+.3f} to {ghigh:+.3f}"))
        causal = " The model sees only what came before: edges whose target comes later are left out." if self.causal else ""
        note = (
            "Head and offset are chosen on one half of the sentences; accuracies, 95 % intervals (by resampling sentences) and counts are of the other half. "
            f"Special tokens and the word itself do not count.{causal} {self.unseen:,} times an edge could not be asked about in one direction."
        )
        return Grid(("relation", "direction", "count", "head", "accuracy", "95 %", "offset", "its accuracy", "gain", "95 % of gain"), tuple(rows), note)

    def size(self) -> tuple[float, float]:
        return (9.0, 1.2 + 0.28 * min(SHOWN, len(self.relations)))

    def draw(self, figure: Figure, theme: Theme) -> None:
        from .figure import dress, plain_text

        axes = figure.subplots()
        rows = self.order()[:SHOWN]
        at = list(range(len(rows)))
        own = [self.own(r) for r in rows]
        axes.hlines(at, [float(self.interval[r, 0]) for r in rows], [float(self.interval[r, 1]) for r in rows], color=theme.series[0], linewidth=3, alpha=0.45)
        axes.plot(own, at, "o", color=theme.series[0], markersize=6, label="best head (bar: 95 %)")
        axes.plot([float(self.baseline[r]) for r in rows], at, "D", color=theme.series[1], markersize=5, label="best fixed offset")
        arrow = {FINDS_HEAD: "to its head", FINDS_DEPENDENT: "to its dependent"}
        names = [f"{self.relations[r]}, {arrow[self.directions[r]]}  ({self.best[r]}, {self.offset[r]:+d}, n={self.counts[r]})" for r in rows]
        dress(axes, theme, f"{len(rows)} of {len(self.relations)}: accuracy of the most attended word", "accuracy")
        axes.set_yticks(at, [plain_text(n) for n in names])
        axes.set_xlim(-0.02, 1.02)
        axes.invert_yaxis()
        axes.legend(fontsize=8, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid, loc="lower left")


@dataclass(frozen=True, eq=False)
class _Question:
    """From one word, the words that would be right, and those that could be chosen."""

    row: tuple[str, str]
    query: int
    gold: tuple[int, ...]


def syntactic_heads(
    model: Any,
    sentences: str | Path | Iterable[Sentence],
    *,
    tokenizer: Tokenizer | None = None,
    max_sentences: int | None = 1000,
    least: int = 20,
    seed: int = 0,
) -> SyntacticHeads:
    """For every dependency relation and both directions: how often a head's most attended word is the gold one, against the best fixed offset.

    ``sentences``: a CoNLL-U file (plain, .gz, .xz) or :class:`Sentence` s. Attention *to* a word is the sum over its tokens, *from* a word the mean over
    its tokens; a token that touches two words belongs to the one that it shares most characters with. Special tokens and the word itself cannot be chosen.
    From dependent to head the answer is one word; from head to dependent any dependent by that relation is right. A question counts if a right answer and
    at least one other word are visible: a decoder is asked only about edges that lead back. ``least``: fewest questions in either half for a relation
    to be reported. ``seed`` divides the sentences into the half that chooses and the half that reports.
    Raises :class:`InputError` for an encoder-decoder, a model without tokenizer, and too few sentences.
    """
    if isinstance(model, Loaded):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    if isinstance(model, EncoderDecoderModel):
        raise InputError("A sentence is read by one stack, but an encoder-decoder has two: give its encoder (model.encoder) and tokenizer=.")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError("Sentences are texts, but there is no tokenizer to read them: give tokenizer=, or what gf.load gave in place of the model.")
    check_whole(1, least=least)
    check_whole(0, seed=seed)
    if max_sentences is not None:
        check_whole(1, max_sentences=max_sentences)
    given = list(islice(read_conllu(sentences) if isinstance(sentences, str | Path) else _checked(sentences), max_sentences))
    asked = _Asked(model, tokenizer, given)
    if len(asked.kept) < 2:
        raise InputError(f"{len(asked.kept)} sentences can be read, but one half chooses and the other reports: give at least 2.")
    each_pattern(asked.reading, asked.take)
    return asked.result(least, seed)


def _checked(sentences: Any) -> Iterator[Sentence]:
    """Sentences that were made by hand; raises :class:`InputError` for one whose parts do not fit together."""
    if not isinstance(sentences, Iterable) or isinstance(sentences, Tensor):
        raise InputError(f"sentences is {described(type(sentences))}, but a CoNLL-U file or a list of Sentence is read.")
    for i, s in enumerate(sentences):
        if not isinstance(s, Sentence):
            raise InputError(f"Sentence {i} is {described(type(s))}, but a Sentence with its tree is needed: read_conllu(path) gives them.")
        n = len(s.words)
        if {len(s.spans), len(s.governors), len(s.relations)} != {n} or not n:
            sizes = f"{n} words, {len(s.spans)} spans, {len(s.governors)} governors and {len(s.relations)} relations"
            raise InputError(f"Sentence {i} has {sizes}: a sentence has at least 1 word, and one of each for every word.")
        if wrong := [g for g in s.governors if not -1 <= g < n]:
            raise InputError(f"Sentence {i} has {n} words, 0 to {n - 1}, but a word hangs on {wrong[0]} (-1 is the root).")
        yield s


class _Asked:
    """All questions of all sentences, and which heads and offsets answer them."""

    def __init__(self, model: Any, tokenizer: Tokenizer, sentences: Sequence[Sentence]):
        limit = most_positions(model)
        before = Reading(model, [[0]], tokenizer).around
        kept: list[tuple[Sentence, list[int], Tensor]] = []
        self.skipped = 0
        for s in sentences:
            pieces = tokenizer.offsets(s.text)
            row = [*before[0], *(p.id for p in pieces), *before[1]]
            if len(row) > (limit or len(row)):
                self.skipped += 1
                continue
            kept.append((s, row, _members(s, [(p.start, p.end) for p in pieces], len(before[0]), len(row))))
        kept.sort(key=lambda k: len(k[1]))  # rows of like length share a batch: little is padded
        self.kept = [k[0] for k in kept]
        self.members = [k[2] for k in kept]
        ids = [k[1] for k in kept]
        self.reading = Reading(model, ids, tokenizer, context=len(ids[-1])) if ids else Reading(model, [[0]], tokenizer)
        self.names = head_names(self.reading.stack)
        self.first = [self.names.index(f"{i}.0") for i in range(n_layers(self.reading.stack))]
        self.rows: list[tuple[str, str]] = []
        self.sentence: list[int] = []
        self.by_offset: list[list[bool]] = []
        self.right: list[Tensor] = []
        self.unseen = 0
        self._now: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}

    def take(self, layer: int, heads: slice, pattern: Tensor, visible: Tensor, batch: Batch) -> None:
        """Answer the questions of a batch's sentences by some heads of one layer."""
        if layer == 0 and heads.start == 0:
            self._now = {row: self._ask(w.text, visible[row % len(visible)]) for row, w in enumerate(batch.windows)}
        place = slice(self.first[layer] + heads.start, self.first[layer] + heads.stop)
        for row, (queries, gold, to, choices, right) in self._now.items():
            if len(queries):
                n = to.shape[1]
                given = (to / to.sum(-1, keepdim=True).clamp_min(1)) @ pattern[row, :, :n, :n] @ to.T  # [h w w]
                picks = given.masked_fill(~choices, -1).argmax(-1)[:, queries]  # [h q]
                right[:, place] = gold[torch.arange(len(queries)), picks].T

    def _ask(self, text: int, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of a sentence's questions: from which words [q], which answers are right [q w]; its words' tokens [w t], the words that each may choose [w w],
        and where the heads' answers go [q n].
        """
        s, to = self.kept[text], self.members[text]
        n = to.shape[1]
        choices = (to @ visible[:n, :n].double() @ to.T) > 0
        choices.fill_diagonal_(False)
        enough = choices.sum(-1) > 1
        questions, dependents = [], dict[tuple[int, str], list[int]]()
        for word, (governor, relation) in enumerate(zip(s.governors, s.relations, strict=True)):
            if governor < 0:
                continue
            for query, target, way in ((word, governor, FINDS_HEAD), (governor, word, FINDS_DEPENDENT)):
                if not (choices[query, target] and enough[query]):
                    self.unseen += 1
                elif way == FINDS_HEAD:
                    questions.append(_Question((relation, way), query, (target,)))
                else:
                    dependents.setdefault((query, relation), []).append(target)
        questions += [_Question((relation, FINDS_DEPENDENT), query, tuple(gold)) for (query, relation), gold in dependents.items()]
        right = torch.zeros(len(questions), len(self.names), dtype=torch.bool)
        gold = torch.zeros(len(questions), len(s.words), dtype=torch.bool)
        for i, q in enumerate(questions):
            gold[i, list(q.gold)] = True
            self.rows.append(q.row)
            self.sentence.append(text)
            self.by_offset.append([q.query + o in q.gold for o in OFFSETS])
        self.right.append(right)
        return torch.tensor([q.query for q in questions], dtype=torch.long), gold, to, choices, right

    def result(self, least: int, seed: int) -> SyntacticHeads:
        """Choose on one half, report on the other."""
        draw = torch.Generator().manual_seed(seed)
        n = len(self.kept)
        chooses = torch.zeros(n, dtype=torch.bool)
        chooses[torch.randperm(n, generator=draw)[: n // 2]] = True
        place = torch.tensor(self.sentence, dtype=torch.long)
        right = torch.cat([torch.zeros(0, len(self.names), dtype=torch.bool), *self.right])
        offsets = torch.tensor(self.by_offset, dtype=torch.bool).reshape(len(self.rows), len(OFFSETS))
        first_half = chooses[place]
        samples = _samples(int((~chooses).sum()), draw)
        number = (~chooses).cumsum(0) - 1
        found: dict[str, list[Any]] = {k: [] for k in ("row", "best", "offset", "count", "accuracy", "baseline", "interval", "gain", "gain_interval")}
        kinds = sorted(set(self.rows))
        kind = torch.tensor([kinds.index(r) for r in self.rows], dtype=torch.long)
        for i, row in enumerate(kinds):
            mine = kind == i
            choose, report = mine & first_half, mine & ~first_half
            if min(int(choose.sum()), int(report.sum())) < least:
                continue
            head, offset = int(right[choose].double().mean(0).argmax()), int(offsets[choose].double().mean(0).argmax())
            own, base = right[report, head].double(), offsets[report, offset].double()
            interval, gain_interval = _intervals(own, base, number[place[report]], samples)
            values = (
                row,
                self.names[head],
                OFFSETS[offset],
                int(report.sum()),
                right[report].float().mean(0),
                base.mean(),
                interval,
                (own - base).mean(),
                gain_interval,
            )
            for k, v in zip(found, values, strict=True):
                found[k].append(v)
        if not found["row"]:
            raise InputError(f"No relation has {least} questions in both halves of {n} sentences: give more sentences, or a smaller least=.")
        stack = {k: torch.stack(found[k]).float() for k in ("accuracy", "baseline", "interval", "gain", "gain_interval")}
        relations, directions = zip(*found["row"], strict=True)
        return SyntacticHeads(
            relations, directions, self.names, tuple(found["best"]), tuple(found["offset"]), tuple(found["count"]), **stack,
            sentences=n, unseen=self.unseen, skipped=self.skipped, causal=self.reading.subject.causal,
        )  # fmt: skip


def _members(s: Sentence, spans: Sequence[tuple[int, int]], before: int, t: int) -> Tensor:
    """[w t]: 1 where a token belongs to a word; each token to the word that it shares most characters with, or to none."""
    to = torch.zeros(len(s.words), t, dtype=torch.float64)
    for i, (start, end) in enumerate(spans):
        shared = [min(end, b) - max(start, a) for a, b in s.spans]
        word = max(range(len(shared)), key=shared.__getitem__)
        if shared[word] > 0:
            to[word, before + i] = 1
    return to


def _samples(n: int, draw: torch.Generator) -> Tensor:
    """How often each of ``n`` sentences stands in each of :data:`DRAWS` samples: [draws n]."""
    picked = torch.randint(n, (DRAWS, n), generator=draw)
    return torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(1, picked, torch.ones(DRAWS, n, dtype=torch.float64))


def _intervals(own: Tensor, base: Tensor, sentence: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """95 % intervals of the accuracy and of the gain, sentences resampled whole (their questions are not independent)."""
    sums = torch.zeros(samples.shape[1], 3, dtype=torch.float64).index_add_(0, sentence, torch.stack([own, base, torch.ones_like(own)], -1))
    right, fixed, count = (samples @ sums).T
    kept = count > 0
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    accuracy, gain = right[kept] / count[kept], (right - fixed)[kept] / count[kept]
    return accuracy.quantile(ends), gain.quantile(ends)


__all__ = ["Sentence", "SyntacticHeads", "read_conllu", "syntactic_heads"]
