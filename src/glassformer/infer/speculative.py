"""Speculative decoding: many cheap guesses, checked in one forward pass of the model.

    generate(model, prompt, draft=small, draft_tokens=5, seed=7)
    session = Speculative(model, [ids], chain, draft=PromptLookup())       # steps, forks and rewinds as a Session does

                                    g0   g1   g2   g3          the draft's guesses
    one forward of the model:  x    g0   g1   g2   g3          reads them all behind the last token x
                               │    │    │    │    │
                               p0   p1   p2   p3   p4          what the model says after each
                               g0 ✓ g1 ✓ y  ✗                  y is the model's own choice where a guess is refused:
                                                               three tokens for one forward; g2 and g3 are forgotten

A forward over a few tokens costs hardly more than one over one token, because it is the weights that have to be read. Two rules say
which guesses stay, and both are exact:

``coupled``
    At each place the model draws as it would have drawn without guesses: random numbers are counted, not consumed
    (:mod:`glassformer.infer.state`), so its choice there is fixed by its logits, the seeds and the step. A guess stays while it is that choice.
    The text is that of plain generation with the same seed, up to the rounding of a forward over several tokens, whatever guesses and however
    many. Right for a greedy sampler, for guesses without probabilities, and behind :class:`~glassformer.infer.gumbel.Gumbel`.
``rejection``
    A guess g, drawn by the draft with probability q(g), stays with the chance min(1, p(g) / q(g)); where it is refused the token is
    drawn from max(0, p - q), scaled to one. Then every token is drawn from p (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318),
    p and q both after all links of the sampler. No rule can accept more. The text of a seed is another than without a draft, and as likely.

If nothing is said it is ``rejection`` for a draft model whose sampler ends in ``Draw``, and else ``coupled``. ``Draw`` takes the token at which the
cumulative probability passes a number, so a small change of any probability before it changes the token: with a 4-layer model of books
and 3 of its layers as the draft, coupled ``Draw`` accepted 15 % of the guesses where rejection accepts 47 %, coupled ``Gumbel`` 41 %.
For a guess without a probability (prompt lookup) the two rules accept equally often, p(g).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError, did_you_mean
from glassformer.core.tap import Tap

from .combined import Combined
from .guessing import DRAFT_TOKENS, DraftModel, Guesser, Guesses, read_draft
from .links import Draw
from .reading import Reader
from .sampler import Chain, Link, Passed, spread
from .session import Drawn, Session, Source, _measure, vocabulary
from .state import Own, State
from .trace import Choice
from .tracing import measure

RULES = ("coupled", "rejection")


NONE = Guesses(0, 0, 0, 0)


@dataclass
class _Item:
    """A token that is settled and not yet given out."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    trace: Choice | None
    guessed: bool  # whether it was a guess
    offered: int | None  # the first token of a forward: how many guesses were checked in it
    ended: bool = False  # whether a link calls the row finished behind it
    logits: Tensor | None = None  # where nothing could be drawn: why

    @property
    def last(self) -> bool:
        """Whether nothing can follow."""
        return self.ended or self.logits is not None


@dataclass
class _Row:
    """One row: how many of its tokens are settled (prompt, given out, and waiting), and what came of the guesses."""

    settled: int
    waiting: deque[_Item] = field(default_factory=deque)
    count: Guesses = NONE
    frozen: bool = False

    def copy(self) -> _Row:
        return _Row(self.settled, deque(self.waiting), self.count, self.frozen)


class Speculative(Session):
    """A :class:`~glassformer.infer.session.Session` in which ``draft`` guesses ``draft_tokens`` at a time; every :meth:`step` still gives one token per row.

    ``rule``: see the head of this file (None chooses). Rows run on by themselves: one that has more guesses accepted waits for the others with
    its tokens ready, and ``state`` and ``cache`` are as far as that. ``ends``: tokens behind which a row need not run on. ``sources``: an encoder-decoder's,
    which a draft reads too. A tap sees forwards with several positions, guesses that are refused among them, under ``step.{n}``, n the tokens given out before.
    Raises what Session raises, :class:`InputError` for a draft of another vocabulary, :class:`CacheError` for a cache of yours that cannot be wound back,
    :class:`SamplerError` for a rule that the sampler cannot follow.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampler: Chain | Link,
        *,
        draft: Any,
        draft_tokens: int = DRAFT_TOKENS,
        rule: str | None = None,
        room: int = 128,
        cache: Cache | bool | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        tap: Tap | None = None,
        top: int = 0,
        source: Source | None = None,
        sources: Sequence[Sequence[int]] | None = None,
        trace: int = 0,
        ends: frozenset[int] = frozenset(),
        deterministic: bool = False,
    ):
        guesser, n = read_draft(model, draft, None if draft is None else draft_tokens)
        if guesser is None:
            raise InputError("Speculative() needs a draft: a smaller model, PromptLookup(), or something with propose(ids, n). Session() goes without.")
        if isinstance(model, Combined):
            raise InputError(
                f"A draft guesses for one model, but {type(model).__name__} combines several passes in each step: leave the draft out, or the combination."
            )
        held = cache if isinstance(cache, Cache) else False
        own: dict[str, Any] = {"seed": seed, "seeds": seeds, "tap": tap, "top": top, "source": source, "trace": trace, "deterministic": deterministic}
        super().__init__(model, prompts, sampler, room=room, cache=held, **own)
        self.draft_tokens, self.ends, self.forwards = n, ends, 0
        self.rule = _rule(rule, guesser, self.sampler)
        b, longest = len(self.lengths), max(self.lengths)
        capacity = longest + room + n + 1
        self._reader = Reader(model, b, capacity, n, cache if isinstance(cache, Cache) else cache is not False, source, tap)
        if isinstance(cache, Cache):
            self._reader.check_slack()
        self._guesser = _Proposer(guesser, sources, vocabulary(model)) if not isinstance(guesser, DraftModel) else _Drafter(guesser, b, capacity, n, sources)
        self._rows = [_Row(k) for k in self.lengths]
        self._limits, self._ended = [k + room for k in self.lengths], [False] * b
        self._known = self._ids.new_zeros(b, capacity)
        for row, ids in enumerate(prompts):
            self._known[row, : len(ids)] = torch.tensor(list(ids))
        self._ids = self._known  # the ids are kept once, left-aligned

    @property
    def ids(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self._known.tolist(), self.lengths, strict=True)]

    @property
    def guesses(self) -> list[Guesses]:
        """Per row: forwards, tokens given out, guesses checked and accepted."""
        return [row.count for row in self._rows]

    @property
    def accepted(self) -> float:
        """The share of the checked guesses that stayed; NaN if none was checked."""
        total = sum(self.guesses, NONE)
        return total.accepted / total.guessed if total.guessed else float("nan")

    # A step

    @property
    def ended(self) -> list[bool]:
        return list(self._ended)

    def _step(self, frozen: Sequence[int], over: Sequence[int] = ()) -> Drawn:
        for r in {*frozen, *over}:
            if not self._rows[r].frozen:
                self._settle([r])
                self._rows[r].frozen = True
        if not all(row.waiting or row.frozen for row in self._rows):
            self._forward()
            self.cache = self._reader.cache
        items = [_Item(0, 0.0, [], None, False, None) if row.frozen else row.waiting[0] for row in self._rows]
        for r, item in enumerate(items):
            if item.logits is not None:
                raise SamplerError(self._why_nothing(item.logits, r))
        for row, item in zip(self._rows, items, strict=True):
            if row.frozen:
                row.settled += 1
            else:
                row.waiting.popleft()
                row.count += Guesses(int(item.offered is not None), 1, item.offered or 0, int(item.guessed))
        self._ended = [item.ended for item in items]
        self.lengths = [n + 1 for n in self.lengths]
        self._width += 1
        stand_in = next((i.trace for i in items if i.trace is not None), None)  # for rows that have ended
        traces = [i.trace or stand_in for i in items] if stand_in is not None else None
        return Drawn([i.token for i in items], [i.logprob for i in items], [i.top for i in items], traces)

    def _forward(self) -> None:
        """One forward of the model for all rows that have not come to their end."""
        live = [r for r in range(len(self._rows)) if self._runs(r)]
        self._grow(max(self._rows[r].settled for r in live) + self.draft_tokens + 1)
        guesses, chances = self._guess(live)
        ends = [0] * len(self._rows)
        for r in live:
            ends[r] = self._rows[r].settled + len(guesses[r])
            self._known[r, self._rows[r].settled : ends[r]] = torch.tensor(guesses[r], dtype=torch.long)
        logits, first = self._reader.read(self._known, ends, f"step.{self.drawn}", last=not any(guesses))
        self.forwards += 1
        self._check(live, guesses, chances, logits, first)
        self._keep()

    def _runs(self, r: int) -> bool:
        """Whether a row takes part in the next forward; one with tokens waiting may run ahead, but not to where it would stop the others."""
        row = self._rows[r]
        stuck = any(item.token in self.ends or item.last for item in row.waiting)
        ahead = row.settled < self._limits[r] and self._reader.free(r, row.settled) >= 0
        return not row.frozen and not stuck and (not row.waiting or ahead)

    def _guess(self, live: Sequence[int]) -> tuple[list[list[int]], Tensor | None]:
        """What may come next in each row, and with what probabilities ``[n b v]`` the draft drew it (None: it says none)."""
        wanted = [0] * len(self._rows)
        fresh = self._reader.fresh([(r, self._rows[r].settled) for r in live])  # what is read at length is read out at its end only
        wide = self._reader.width() - 1
        for r in live if not fresh else ():
            n = self._rows[r].settled
            wanted[r] = max(0, min(self.draft_tokens, self._limits[r] - n - 1, self._reader.room(r, n), self._reader.free(r, n), wide))
        if not any(wanted):
            return [[] for _ in self._rows], None
        lengths = [row.settled for row in self._rows]
        return self._guesser.guess(self._known, lengths, wanted, self.sampler, self.state, self.rule == "rejection")

    def _check(self, live: Sequence[int], guesses: Sequence[Sequence[int]], chances: Tensor | None, logits: Tensor, first: Sequence[int]) -> None:
        """Draw at each place in turn, in the rows whose guesses have stayed so far."""
        starts, active = [row.settled for row in self._rows], list(live)
        for j in range(max(len(guesses[r]) for r in live) + 1):
            now = logits[active, [starts[r] - 1 + j - first[r] for r in active]]
            offered = [guesses[r][j] if j < len(guesses[r]) else -1 for r in active]
            state = self.state if len(active) == len(self._rows) else self.state.select(active)
            drawn = self._draw(now, state, offered, None if chances is None or j >= len(chances) else chances[j][active], active)
            if state is not self.state:
                self.state.put(active, state)
            for r, token in zip(active, drawn.ids, strict=True):
                self._known[r, self._rows[r].settled] = max(token, 0)
                self._rows[r].settled += 1
            ended = self._finished(active, state)
            going = []
            for i, r in enumerate(active):
                row, token = self._rows[r], drawn.ids[i]
                stays = token >= 0 and token == offered[i]
                row.waiting.append(
                    _Item(
                        token,
                        drawn.logprobs[i],
                        drawn.top[i],
                        None if drawn.traces is None else drawn.traces[i],
                        guessed=stays,
                        offered=len(guesses[r]) if j == 0 else None,
                        ended=ended[i],
                        logits=now[i] if token < 0 else None,
                    )
                )
                if stays and not ended[i] and token not in self.ends:
                    going.append(r)
            active = going
            if not active:
                return

    def _finished(self, rows: Sequence[int], state: State) -> list[bool]:
        """Which of these rows a link of the sampler calls finished."""
        if not any(link.ends and not link.off for link in self.sampler.links):
            return [False] * len(rows)
        return self.sampler.ended(right_aligned(self._known, [self._rows[r].settled for r in rows], rows), state)

    def _draw(self, logits: Tensor, state: State, offered: Sequence[int], q: Tensor | None, rows: Sequence[int]) -> Drawn:
        """The model's own choice at one place ``[a v]``, or a guess by the rule of rejection; ``state`` goes on by one."""
        history = right_aligned(self._known, [self._rows[r].settled for r in rows], rows)
        with torch.no_grad():
            passed: list[Passed] | None = [] if self.trace else None
            if self.rule == "coupled" or max(offered) < 0:
                chosen = self.sampler(logits, history, state, passed)
            else:
                chosen = reject(self.sampler, logits, history, state, torch.tensor(offered, device=logits.device), q, passed)
            drawn = _measure(logits, chosen, self.top)
            if passed is not None:
                steps = [self._rows[r].settled - self.lengths[r] + self.drawn for r in rows]
                made = measure(logits, passed, self._seeded, chosen, self.trace)
                drawn = replace(drawn, traces=[replace(choice, step=n) for choice, n in zip(made, steps, strict=True)])
        return drawn

    def _keep(self) -> None:
        """Let the caches hold every settled token but the last."""
        ends = [row.settled - 1 for row in self._rows]
        self._reader.keep(ends)
        self._guesser.keep(ends)

    def _grow(self, n: int) -> None:
        if n > self._known.shape[1]:
            self._known = self._ids = torch.cat([self._known, self._known.new_zeros(len(self._rows), n)], dim=1)

    # The tree of continuations

    def _settle(self, rows: Sequence[int] | None = None) -> None:
        """Forget the tokens of these rows (None: all) that were not given out yet."""
        chosen = range(len(self._rows)) if rows is None else rows
        forget = [len(row.waiting) if r in chosen and not row.frozen else 0 for r, row in enumerate(self._rows)]
        for row, n in zip(self._rows, forget, strict=True):
            row.settled -= n
            if n:
                row.waiting.clear()
        if any(forget):
            self.state.rewind(forget)
            self._keep()

    def settle(self) -> None:
        """Let cache and state be as far as the tokens that were given out: what ran ahead is forgotten."""
        self._settle()

    def fork(self, n: int, seeds: Sequence[int] | None = None) -> Session:
        twins = super().fork(n, seeds)
        if seeds is not None:
            assert isinstance(twins, Speculative)
            twins.settle()  # what waits was drawn with the old ones
        return twins

    def select(self, rows: Sequence[int]) -> Session:
        cache, self.cache = self.cache, None  # the reader copies it
        try:
            new = super().select(rows)
        finally:
            self.cache = cache
        assert isinstance(new, Speculative)
        new._known = new._ids
        new._rows = [self._rows[r].copy() for r in rows]
        new._limits, new._ended = [self._limits[r] for r in rows], [self._ended[r] for r in rows]
        new._reader, new._guesser = self._reader.select(rows), self._guesser.select(rows)
        new.cache = new._reader.cache
        return new

    def rewind(self, k: int) -> None:
        if not 0 <= k <= self.drawn:
            raise InputError(f"{self.drawn} tokens were drawn, so {k} cannot be forgotten: a session is wound back to its prompt at most.")
        self.settle()
        if k == 0:
            return
        self.state.rewind(k)
        for row in self._rows:
            row.settled -= k
        self.lengths = [n - k for n in self.lengths]
        self._width -= k
        self._ended = [False] * len(self._rows)
        self._keep()


def _rule(rule: str | None, guesser: DraftModel | Guesser, sampler: Chain) -> str:
    if rule is None:
        return "rejection" if isinstance(guesser, DraftModel) and type(sampler.final) is Draw else "coupled"
    if rule not in RULES:
        raise SamplerError(f"There is no rule {rule!r} for guesses.{did_you_mean(rule, dict.fromkeys(RULES))} Known: {', '.join(RULES)}.")
    if rule == "rejection" and type(sampler.final) is not Draw:
        raise SamplerError(f"The rule 'rejection' is about probabilities, but {sampler.final!r} picks without any: use Draw, or the rule 'coupled'.")
    return rule


def right_aligned(known: Tensor, lengths: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
    """Left-aligned ids ``[b n]`` of which ``lengths`` are real, as a history: right-aligned, -1 in front of the shorter ones."""
    known = known if rows is None else known[list(rows)]
    width = max(lengths)
    places = torch.arange(width, device=known.device) - width + torch.tensor(list(lengths), device=known.device)[:, None]
    return torch.where(places < 0, -1, known.gather(1, places.clamp(min=0)))


def left_by(chain: Chain, logits: Tensor, history: Tensor, state: State, passed: list[Passed] | None = None) -> tuple[Tensor, dict[int, Passed]]:
    """The distribution ``[b v]`` (float64) from which the last link draws; and what passed the links that observe."""
    seen: dict[int, Passed] = {}
    left, ids = chain._left(logits.float(), history, state, seen, passed)
    return (left if ids is None else spread(left, ids, logits.shape[-1])).softmax(dim=-1).double(), seen


def reject(chain: Chain, logits: Tensor, history: Tensor, state: State, offered: Tensor, q: Tensor | None, passed: list[Passed] | None = None) -> Tensor:
    """The token of each row by the rule of rejection ``[b]``: the guess ``offered [b]`` (-1: none), drawn from ``q [b v]`` (None: certain), or another.

    -1 where the links left nothing, or the model gave NaN. Advances ``state`` by one step, as the chain does.
    """
    p, seen = left_by(chain, logits, history, state, passed)
    guess = offered.clamp(min=0)[:, None]
    q = torch.zeros_like(p).scatter_(1, guess, 1.0) if q is None else q
    q = torch.where(offered[:, None] < 0, 0.0, q)  # without a guess the rest is all of p
    mine, theirs = p.gather(1, guess)[:, 0], q.gather(1, guess)[:, 0]
    stays = (offered >= 0) & (Own(state, None, "Accept").uniform(p.device) * theirs < mine)
    cumulative = (p - q).clamp_(min=0).cumsum(dim=-1)
    u = torch.where(offered < 0, Own(state, None, type(chain.final).__name__).uniform(p.device), Own(state, None, "Rest").uniform(p.device))
    other = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    # Where p and q are one, the guess is refused by rounding only.
    chosen = torch.where(stays | ((offered >= 0) & (cumulative[:, -1] <= 0)), guess[:, 0], other)
    chosen = torch.where(p.sum(dim=-1).isnan(), -1, chosen)
    state.advance(chain._learn(logits.float(), chosen, state, seen))
    return chosen


# Where guesses come from


class _Proposer:
    """Guesses of something with ``propose(ids, n)``."""

    def __init__(self, guesser: Guesser, sources: Sequence[Sequence[int]] | None, size: int | None):
        self.guesser, self.sources, self.size = guesser, sources, size

    def guess(
        self, known: Tensor, lengths: Sequence[int], wanted: Sequence[int], sampler: Chain, state: State, chances: bool
    ) -> tuple[list[list[int]], Tensor | None]:
        rows = known.tolist()
        return [self._one(r, rows[r][:n], want) if want else [] for r, (n, want) in enumerate(zip(lengths, wanted, strict=True))], None

    def _one(self, row: int, ids: list[int], n: int) -> list[int]:
        ids = ids if self.sources is None else [*self.sources[row], *ids]
        given: Any = self.guesser.propose(ids, n)
        if isinstance(given, Tensor):
            given = given.tolist()
        if not isinstance(given, Sequence) or not all(isinstance(i, int) and i >= 0 for i in given):
            raise InputError(f"{type(self.guesser).__name__}.propose(ids, n) gave {given!r}, but guesses are a list of token ids, [] for none.")
        outside = [i for i in given[:n] if self.size is not None and i >= self.size]
        if outside:
            raise InputError(
                f"{type(self.guesser).__name__} guessed the token {outside[0]}, but the model's {self.size} tokens are 0 to {self.size - 1}."  # type: ignore[operator]
            )
        return list(given[:n])

    def keep(self, ends: Sequence[int]) -> None:
        """Nothing is held."""

    def select(self, rows: Sequence[int]) -> _Proposer:
        return _Proposer(self.guesser, None if self.sources is None else [self.sources[r] for r in rows], self.size)


class _Drafter:
    """Guesses of a model: it draws through the chain as the model will, from a copy of the sampler's state."""

    def __init__(self, draft: DraftModel, rows: int, capacity: int, slack: int, sources: Sequence[Sequence[int]] | None):
        source = None
        if hasattr(draft.model, "encode") and hasattr(draft.model, "decode"):
            if sources is None:
                raise InputError("The draft is an encoder-decoder, which reads the sources too: give sources=, the ids of every row's.")
            source = Source.read(draft.model, sources, draft.tap)
        self.reader, self.calls = Reader(draft.model, rows, capacity, slack, True, source, draft.tap), 0

    def guess(
        self, known: Tensor, lengths: Sequence[int], wanted: Sequence[int], sampler: Chain, state: State, chances: bool
    ) -> tuple[list[list[int]], Tensor | None]:
        guesses: list[list[int]] = [[] for _ in lengths]
        wanted = self._possible(lengths, wanted)
        own = State(state.seed, list(state.seeds), list(state.steps), list(state.memory))
        scratch, drawn = known.clone(), []
        with torch.no_grad():
            for i in range(max(wanted)):
                live = [r for r, n in enumerate(wanted) if n > i]
                if not live:
                    break
                ends = [lengths[r] + i if r in live else 0 for r in range(len(lengths))]
                logits = self.reader.read(scratch, ends, f"step.{self.calls}", last=True)[0][:, -1]
                self.calls += 1
                mine = own if len(live) == len(lengths) else own.select(live)
                history = right_aligned(scratch, [ends[r] for r in live], live)
                if chances:
                    p = left_by(sampler, logits[live], history, State(mine.seed, mine.seeds, mine.steps, mine.memory))[0]
                    wide = p if len(live) == len(lengths) else p.new_zeros(len(lengths), p.shape[1]).index_copy(0, torch.tensor(live, device=p.device), p)
                    drawn.append(wide)
                chosen = sampler(logits[live], history, mine).tolist()
                if mine is not own:
                    own.put(live, mine)
                for r, token in zip(live, chosen, strict=True):
                    if token < 0:  # the links left the draft nothing: it stops here
                        wanted[r] = i
                        continue
                    guesses[r].append(token)
                    scratch[r, lengths[r] + i] = token
        return guesses, torch.stack(drawn) if drawn else None

    def _possible(self, lengths: Sequence[int], wanted: Sequence[int]) -> list[int]:
        """As many as wanted, or fewer where the draft has no more positions."""
        asked = [r for r, n in enumerate(wanted) if n]
        behind = max(lengths[r] - self.reader.held[r] for r in asked)
        if self.reader.most is None and behind <= self.reader.slack:
            return list(wanted)
        left = self.reader.limit - max(max(lengths[r] for r in asked), self.reader.longest)
        return [max(0, min(n, left)) if behind <= self.reader.width() else 0 for n in wanted]

    def keep(self, ends: Sequence[int]) -> None:
        self.reader.keep(ends)

    def select(self, rows: Sequence[int]) -> _Drafter:
        new = object.__new__(_Drafter)
        new.reader, new.calls = self.reader.select(rows), self.calls
        return new
