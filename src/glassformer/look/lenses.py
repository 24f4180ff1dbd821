"""The logit lens: the model's own final norm and read-out, applied at depths where the model itself does not apply them.

    embedding ──► block 0 ──► block 1 ──► … ──► block n-1 ──► final norm ──► read-out ──► logits
        │            │           │                                ▲             ▲
        └────────────┴───────────┴───── read as if it were last ──┘─────────────┘

The lens is a view by the observer (nostalgebraist, "interpreting GPT: the logit lens", 2020): no layer computes it, and a layer may hold what
the read-out does not show. A tuned lens (:mod:`~glassformer.look.tuned`) maps each stream by a trained affine map first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.numerics import wide
from glassformer.core.tap import Tap
from glassformer.text.shown import short, shown

from .distributions import entropy, js, kl
from .figure import Theme, heatmap, lines
from .lens_reading import FrozenReadOut, added, added_of, check_linear, norms_after, plain_pass, stream_sites, streams_of
from .result import Cell, Grid, Result
from .subject import Positions, Subject, Text, check_reads_tokens, choose, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer

    from .tuned import TunedLens

STREAMS = ("resid_post", "resid_mid")
OF = (*STREAMS, "attn", "cross", "ffn")
NORMS = ("own", "final")
MOST_WRITTEN = 40
"""Columns of a figure that hold their token in writing; of more only the colours are drawn."""


@dataclass(frozen=True, eq=False)
class LogitLens(Result):
    """What the read-out makes of a text at every depth.

    Axes: ``r`` depths (named by ``rows``), ``t`` the asked positions, ``k`` the most probable tokens, ``w`` the chosen words.
    Rank 1 is the most probable token; entropy and divergence are in bits.
    """

    of: str
    norm: str
    rows: tuple[str, ...]
    positions: tuple[int, ...]
    pieces: tuple[str, ...]
    """[t] Display form of the token at each asked position."""
    ids: Tensor
    """[r t k] The most probable tokens, best first."""
    p: Tensor
    """[r t k] Their probabilities."""
    scores: Tensor
    """[r t k] Their scores before soft-max (with ``norm="final"``: what is added to their logits)."""
    entropy: Tensor
    """[r t] Of the distribution read there, in bits."""
    kl: Tensor
    """[r t] Divergence KL(model's output || distribution read there), in bits; 0 in a last row that is the output."""
    choice: Tensor
    """[t] The model's own most probable token."""
    choice_p: Tensor
    """[r t] Its probability at each depth."""
    choice_rank: Tensor
    """[r t]"""
    words: tuple[str, ...]
    word_ids: tuple[int, ...]
    word_p: Tensor
    """[w r t]"""
    word_rank: Tensor
    """[w r t]"""
    target: str | None
    target_value: Tensor | None
    """[r t] The logit, or difference of two logits, that ``target`` names."""
    vocabulary: dict[int, str]
    """Display form of every token id that occurs."""
    tuned: bool
    logits: Tensor | None = field(default=None, repr=False)
    """[r t v] All scores (only with ``keep_logits=True``)."""

    @property
    def title(self) -> str:
        kind = "Tuned lens" if self.tuned else "Logit lens"
        what = {"resid_post": "the stream after each block", "resid_mid": "the stream after each sublayer", "attn": "what attention adds alone"}
        what |= {"cross": "what cross-attention adds alone", "ffn": "what the feed-forward adds alone"}
        scaled = "" if self.of.startswith("resid") else f", {'a norm of its own' if self.norm == 'own' else 'at the scale of the final stream'}"
        return f"{kind}: {what[self.of]}{scaled}"

    def best(self, row: int | str = -1, position: int = -1) -> list[tuple[str, float]]:
        """The most probable tokens at a depth (number or name of the row) and one of the asked positions, with their probabilities."""
        r = self.rows.index(choose(row, self.rows, "depth of this lens")) if isinstance(row, str) else row
        for what, i, n in (("depths", r, len(self.rows)), ("asked positions", position, len(self.positions))):
            if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n:
                raise InputError(f"This lens has {n} {what}, counted from 0, but {i!r} was asked for.")
        return [(self.vocabulary[int(i)], float(p)) for i, p in zip(self.ids[r, position], self.p[r, position], strict=True)]

    def rank(self, word: int | str) -> Tensor:
        """[r t] The rank of one of the chosen words."""
        return self.word_rank[self._word(word)]

    def probability(self, word: int | str) -> Tensor:
        """[r t] The probability of one of the chosen words."""
        return self.word_p[self._word(word)]

    def _word(self, word: int | str) -> int:
        known: Sequence[Any] = self.word_ids if isinstance(word, int) else self.words
        if isinstance(word, str) and word not in known:
            word = shown(word)  # as it stands in the text: " man"
        if word not in known:
            raise InputError(f"{word!r} was not followed: name it in words=; followed are {', '.join(map(repr, known)) or 'none'}.")
        return known.index(word)

    def grid(self) -> Grid:
        columns = [
            "position",
            "token",
            "depth",
            "reads",
            "adds" if self.norm == "final" else "p",
            *(() if self.words else ("then",)),
            "entropy (bits)",
            "KL (bits)",
            "rank of choice",
        ]
        columns += [f"{kind} {name!r}" for name in self.words for kind in ("rank", "p")]
        columns += [] if self.target is None else [f"logit {self.target}"]
        rows: list[tuple[Cell, ...]] = []
        for j in reversed(range(len(self.positions))):
            for i, name in enumerate(self.rows):
                found = self.best(i, j)
                then = [] if self.words else ["  ".join(w for w, _ in found[1:3])]
                cells: list[Cell] = [
                    self.positions[j],
                    self.pieces[j],
                    name,
                    found[0][0],
                    digits(self.scores[i, j, 0] if self.norm == "final" else found[0][1]),
                    *then,
                ]
                cells += [digits(self.entropy[i, j]), digits(self.kl[i, j]), int(self.choice_rank[i, j])]
                for w in range(len(self.words)):
                    cells += [int(self.word_rank[w, i, j]), digits(self.word_p[w, i, j])]
                cells += [] if self.target_value is None else [digits(self.target_value[i, j])]
                rows.append(tuple(cells))
        note = "Entropy and KL in bits, KL(model's output || what is read there). Rank of choice: of the token that the model's output holds most probable at "
        note += "that position; 1 is first."
        if self.norm == "final":
            note += "\nWhat is added is no distribution: entropy, KL and p are those of its soft-max, as if nothing else were added."
        return Grid(tuple(columns), tuple(rows), note)

    def size(self) -> tuple[float, float]:
        t, r = len(self.positions), len(self.rows)
        wide_enough = min(26.0, max(6.5, 2.4 + 0.68 * t))
        return (wide_enough, 1.6 + 0.3 * r + (2.6 if self.words else 0.0))

    def draw(self, figure: Figure, theme: Theme) -> None:
        below = 2.6 if self.words else 0.0
        heights = [self.size()[1] - below, *([below] if below else [])]
        axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        t = len(self.positions)
        order = list(reversed(range(len(self.rows))))  # the output on top, as in the first figures of this kind
        texts = [[short(self.vocabulary[int(self.ids[i, j, 0])]) for j in range(t)] for i in order] if t <= MOST_WRITTEN else None
        names, columns = [self.rows[i] for i in order], [short(p) for p in self.pieces]
        # What a sublayer adds is no distribution of its own: there the colour is the number that it adds.
        alone = self.norm == "final"
        values, label = (self.scores[order, :, 0], "added to the best token's logit") if alone else (self.p[order, :, 0], "probability of the best")
        heatmap(axes[0], theme, values, names, columns, title=self.title, label=label, texts=texts, limit=None if alone else 1.0)
        if self.words:
            named = {short(w): self.word_p[i, :, -1] for i, w in enumerate(self.words[:8])}
            at = f"position {self.positions[-1]}, {self.pieces[-1]}"
            what = "Chosen words in the soft-max of what is added alone" if alone else "Probability of the chosen words"
            lines(axes[1], theme, range(len(self.rows)), named, title=f"{what} at {at}")
            axes[1].set_yscale("log")  # words of very different probability stand in one figure
            axes[1].set_xticks(range(len(self.rows)), self.rows, rotation=0 if len(self.rows) < 8 else 45)


@torch.no_grad()
def logit_lens(
    model: Any,
    text: Text,
    *,
    of: str = "resid_post",
    norm: str = "own",
    positions: Positions = None,
    words: Sequence[int | str] | int | str = (),
    target: Any = None,
    top: int = 5,
    tuned: TunedLens | None = None,
    keep_logits: bool = False,
    tokenizer: Tokenizer | None = None,
    source: Text | None = None,
    tap: Tap | None = None,
) -> LogitLens:
    """Read every depth as the model reads its last: ``logits_r = readout(final_norm(h_r))``.

    ``of`` says what ``h_r`` is: ``"resid_post"`` the stream that enters block 0 and the one after each block (the last row is the model's own output, to
    the bit); ``"resid_mid"`` the streams between attention and feed-forward besides; ``"attn"``, ``"cross"``, ``"ffn"`` what that sublayer adds, alone
    (behind a norm that stands on its way into the stream; before one that normalises the sum, as in post-norm).
    ``norm``: ``"own"`` reads a sublayer's output as if it were a stream, so the final norm brings it to full size; ``"final"`` divides it by the scale that
    the final norm finds in the final stream, and leaves the biases of norm and read-out and the cap out: then the scores are what the sublayer adds to
    the model's logits, and those of embedding and all sublayers sum to the logits before cap, less the biases.
    ``words``: tokens (ids, or texts of one token) whose rank and probability are followed. ``target``: a token or a pair, whose logit or difference is.
    ``tuned``: a :class:`TunedLens` whose maps are applied before the read-out. ``positions``: None means all. In an encoder each position is read as the
    masked-token head reads it; in an encoder-decoder the decoder is looked at.
    ``tap``: edits that hold meanwhile (the reading itself is not edited).

    Raises :class:`InputError` for a model without scores over tokens, a kind of sublayer that it has not, and ``norm="final"`` where a part of the stream
    does not reach the logits by a linear map. Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    s = read(model, text, tokenizer, source=source, tap=tap)
    check_reads_tokens(s.stack, "A lens")
    _check(of, norm, words, top, tuned)
    if tuned is not None:
        tuned.check(s.model)
    at = s.positions(positions)
    ids = [s.token(w) for w in ([words] if isinstance(words, int | str) else words)]
    rows, hidden, logits = streams_of(s, of) if of in STREAMS else added_of(s, of, norm)
    final = logits[at]
    reader = _Reader(s, final, ids, target, min(top, logits.shape[-1]), keep_logits)
    for r, scores in enumerate(_scores(s, hidden, at, final, of, norm, tuned)):
        reader.add(scores, own=of in STREAMS and r == len(hidden) - 1)
    return reader.result(of=of, norm=norm, rows=rows, positions=tuple(at), pieces=tuple(s.pieces[i] for i in at), tuned=tuned is not None)


def _check(of: str, norm: str, words: Any, top: int, tuned: Any) -> None:
    """Raise :class:`InputError` for what no lens can be asked."""
    choose(of, OF, "stream or sublayer that a lens reads")
    choose(norm, NORMS, "norm of a lens")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top={top!r}: at least 1 token is kept at each place.")
    if of in STREAMS and norm == "final":
        raise InputError(
            f"norm='final' is for what a sublayer adds, but of={of!r} reads whole streams, which have a norm of their own: use of='attn' or 'ffn'."
        )
    if tuned is not None and of != "resid_post":
        raise InputError(f"A tuned lens maps the streams between blocks, but of={of!r} was asked for: use of='resid_post'.")
    if tuned is not None and not hasattr(tuned, "map"):
        raise InputError(
            f"tuned= is a TunedLens, but {described(type(tuned))} was given: load_tuned_lens(folder) opens one, tuned_lens(model, texts) trains one."
        )
    if not isinstance(words, int | str) and not (hasattr(words, "__iter__") and hasattr(words, "__len__")):
        raise InputError(f"words= is a token (its id or its text) or a list of tokens, but {described(type(words))} was given.")


def _scores(s: Subject, hidden: Sequence[Tensor], at: Sequence[int], final: Tensor, of: str, norm: str, tuned: TunedLens | None) -> Iterator[Tensor]:
    """[t v] What the read-out makes of each depth; the last stream's is the model's own output."""
    frozen = None if norm == "own" else FrozenReadOut(s, at)
    for r, h in enumerate(hidden):
        x = h[list(at)]
        if of in STREAMS and r == len(hidden) - 1:
            yield final
        elif frozen is not None:
            yield frozen(x)
        else:
            yield s.stack.read((x if tuned is None else tuned.map(x, r))[None], normed=False)[0]


class _Reader:
    """Takes the scores of one depth after the other and keeps what the answer holds of each."""

    def __init__(self, s: Subject, final: Tensor, ids: list[int], target: Any, top: int, keep: bool):
        self.s, self.top, self.keep = s, top, keep
        self.final = wide(final).log_softmax(-1)
        self.choice = final.argmax(-1)
        self.ids = ids
        self.target = None if target is None else s.target(target, final[-1])
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, scores: Tensor, own: bool) -> None:
        scores = wide(scores)
        logp = self.final if own else scores.log_softmax(-1)
        p = logp.exp()
        best = scores.topk(self.top, -1)  # of scores: probabilities that are 0 in this precision stand in no order
        followed = torch.stack([self.choice, *(torch.full_like(self.choice, i) for i in self.ids)])  # 1+w t
        chosen = scores.gather(-1, followed.T)  # t 1+w
        rank = torch.stack([(scores > chosen[:, i : i + 1]).sum(-1) + 1 for i in range(chosen.shape[1])])
        row = {
            "ids": best.indices,
            "p": p.gather(-1, best.indices),
            "scores": best.values,
            "entropy": entropy(logp),
            "kl": kl(self.final, logp),
            "rank": rank,
            "followed": p.gather(-1, followed.T).T,
        }
        row |= {} if self.target is None else {"target": self.target.of(scores)}
        row |= {"logits": scores} if self.keep else {}
        for name, value in row.items():
            self.kept.setdefault(name, []).append(value.cpu())

    def result(self, **rest: Any) -> LogitLens:
        made = {name: torch.stack(values) for name, values in self.kept.items()}
        rank, p = made["rank"].movedim(1, 0), made["followed"].movedim(1, 0)  # 1+w r t
        seen = sorted({*made["ids"].flatten().tolist(), *self.choice.tolist(), *self.ids})
        return LogitLens(
            **rest,
            ids=made["ids"],
            p=made["p"],
            scores=made["scores"],
            entropy=made["entropy"],
            kl=made["kl"],
            choice=self.choice.cpu(),
            choice_p=p[0],
            choice_rank=rank[0],
            words=tuple(self.s.piece(i) for i in self.ids),
            word_ids=tuple(self.ids),
            word_p=p[1:],
            word_rank=rank[1:],
            target=None if self.target is None else self.target.label,
            target_value=made.get("target"),
            vocabulary={i: self.s.piece(i) for i in seen},
            logits=made.get("logits"),
        )


def digits(value: Any) -> float:
    """A number to three digits: a table of many columns stays narrow, and the fields hold all digits."""
    return float(f"{float(value):.3g}")


__all__ = ["FrozenReadOut", "LogitLens", "added", "check_linear", "entropy", "js", "kl", "logit_lens", "norms_after", "plain_pass", "stream_sites"]
