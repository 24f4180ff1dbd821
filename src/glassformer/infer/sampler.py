"""From logits to the next token: a chain of small links in the order that the user wrote.

    sampler = Penalties(1.1) | TopK(40) | MinP(0.05) | Temperature(0.8) | Draw(seed=7)
    ids = sampler(logits, history, state)                       # [b v] -> [b]
    for step in sampler.steps(logits, history):
        print(step)                                             # what each link left, in tokens and bits

A link takes logits and returns logits; a token that it removes gets ``-inf``. The last link is a
:class:`Final`: it picks one token of those left. Links hold no state: what they remember from
step to step is in a :class:`~glassformer.infer.state.State` that the caller holds.

    logits [b v] ── link ── link ── TopK ══ link ══ link ══ Final ── ids [b]
                    on the whole vocabulary ↑       ↑ on the few tokens left

**Why it is fast.** A link that leaves few tokens (:class:`Narrowing`) hands on only those, ``[b k]`` with
their ids, instead of ``[b v]`` full of ``-inf``. Links that look at values only never notice; a link
that looks at which token is which gets the whole vocabulary back. ``steps`` always takes the plain way
over ``[b v]``, and a test holds the two together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from glassformer.core.errors import GlassformerError, SamplerError
from glassformer.core.spec import Spec, part

from .state import Own, Room, State, fresh_seed

History = Tensor | Sequence[Sequence[int]] | None

GONE = float("-inf")
WIDE = 2048  # so many columns are worth thinning out


class Link(Spec):
    """One step of a sampler. ``a | b`` makes a :class:`Chain`.

    ``by_value`` says that the link looks at the values of the logits only, not at which token has
    which: such a link may be given ``[b k]`` logits of some tokens in place of ``[b v]``. ``observes``
    says that what it remembers depends on what went in and came out: :meth:`observe` is then called in place of :meth:`learn`.
    ``ends`` says that it knows when a row is finished: :meth:`ended`. ``writes`` says that :meth:`write` saves a copy.
    """

    by_value: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    ends: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    _error: ClassVar[type[GlassformerError]] = SamplerError

    @property
    def off(self) -> bool:
        """Whether the settings of this link make it do nothing."""
        return False

    @abstractmethod
    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        """Logits ``[b v]`` float32 -> ``[b v]``, ``-inf`` for a removed token. ``history [b n]`` holds token ids, right-aligned, -1 = none."""

    def write(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        """:meth:`apply`, but it may write into the logits that it is given; called in its place where ``writes``."""
        return self.apply(logits, history, state)

    def thin(self, logits: Tensor, room: Room, state: Own | None = None) -> tuple[Tensor, Tensor | None] | None:
        """:meth:`apply` on a CPU and a whole vocabulary, leaving only the tokens that stay: ``[b k]`` and their columns in order (None: all of them).

        None is the answer of a link that has no faster way, in general or with these logits. Nothing is written into the logits.
        """
        return None

    def start(self, rows: int, device: torch.device) -> Tensor | None:
        """What this link remembers before the first token (first axis: rows), or None if it remembers nothing."""
        return None

    def learn(self, memory: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """What it remembers (a new tensor) once ``chosen [b]`` was drawn with the model's own ``probabilities [b]``."""
        return memory

    def observe(self, memory: Tensor, before: Tensor, after: Tensor, column: Tensor) -> Tensor:
        """What it remembers (a new tensor) once ``column [b]`` of the ``[b c]`` logits ``before`` and ``after`` it was drawn; -1: none was."""
        return memory

    def ended(self, rows: int, history: Tensor | None, state: Own | None = None) -> list[bool]:
        """Which rows are finished, so that nothing can follow; ``history [b n]`` ends with the tokens last drawn."""
        return [False] * rows

    def __or__(self, other: Link | Chain) -> Chain:
        return Chain((self,)) | other


class Narrowing(Link):
    """A link that leaves few tokens: it says which, and :meth:`apply` follows from that."""

    by_value = True

    @abstractmethod
    def narrow(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """``[b c]`` -> the logits left ``[b k]`` (``-inf`` where a row has fewer) and their columns ``[b k]``, in order."""

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        return logits if self.off else spread(*self.narrow(logits.float()), logits.shape[-1])


class Final(Link):
    """The last link: it picks one of the tokens that are left."""

    by_value = True

    @abstractmethod
    def choose(self, logits: Tensor, state: Own | None = None) -> Tensor:
        """The column chosen in each row, ``[b c] -> [b]``; -1 where no token is left or a logit is NaN. Columns are in the order of the ids."""

    def apply(self, logits: Tensor, history: Tensor | None = None, state: Own | None = None) -> Tensor:
        chosen = self.choose(logits.float(), state)
        column = chosen.clamp(min=0)[:, None]
        return spread(torch.where(chosen[:, None] < 0, GONE, logits.float().gather(1, column)), column, logits.shape[-1])


def spread(logits: Tensor, columns: Tensor, width: int) -> Tensor:
    """The inverse of narrowing: ``[b k]`` put at their columns of ``[b width]``, ``-inf`` elsewhere."""
    return torch.full((logits.shape[0], width), GONE, dtype=logits.dtype, device=logits.device).scatter_(1, columns, logits)


# The chain


@part
class Chain(Spec):
    """Links in the order in which they work; written ``a | b | c`` and printed the same way.

    Raises :class:`SamplerError` if a link follows the final one, and, when used, if there is no final one.
    """

    _error: ClassVar[type[GlassformerError]] = SamplerError

    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        for i, link in enumerate(self.links):
            if isinstance(link, Final) and i + 1 < len(self.links):
                raise SamplerError(
                    f"{link!r} picks the token, so nothing can follow it, but {self.links[i + 1]!r} does. Move {type(link).__name__} to the end."
                )

    def __or__(self, other: Link | Chain) -> Chain:
        return Chain(self.links + (other.links if isinstance(other, Chain) else (other,)))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.links)) or "Chain(links=())"

    __str__ = __repr__

    @property
    def final(self) -> Final:
        """The link that picks the token. Raises :class:`SamplerError` if the chain has none."""
        if not self.links or not isinstance(self.links[-1], Final):
            raise SamplerError(f"The chain {self!r} ends without a link that picks the token. Add one: … | Draw(seed=0), or … | Greedy().")
        return self.links[-1]

    def state(self, rows: int, seeds: Sequence[int] | None = None, seed: int | None = None, device: torch.device | str = "cpu") -> State:
        """The memory of ``rows`` rows that have drawn nothing yet.

        ``seeds`` are the rows' own (default 0, 1, 2, …); ``seed`` stands in for that of the final link. If neither
        says a seed, one is taken from torch's generator and can be read from the result.
        """
        own = list(range(rows)) if seeds is None else [int(s) for s in seeds]
        if len(own) != rows:
            raise SamplerError(f"{len(own)} row seeds were given for {rows} rows; give one per row.")
        chosen = seed if seed is not None else getattr(self.final, "seed", 0)
        memory = [link.start(rows, torch.device(device)) for link in self.links]
        return State(fresh_seed() if chosen is None else chosen, own, [0] * rows, memory)

    def __call__(self, logits: Tensor, history: History = None, state: State | None = None, watch: list[Passed] | None = None) -> Tensor:
        """Draw the next token of each row: ``[b v] -> [b]``, and advance ``state`` by one step.

        -1 stands in a row where the links left nothing, or the model gave NaN. Without a state each call is a first step.
        ``watch``: a list that gets what went into each link at work and what came out (see :mod:`glassformer.infer.trace`).
        """
        final, whole = self.final, _rows(logits)
        state = self._state_for(whole, state)
        past = as_history(history, whole.shape[0], whole.device)
        seen: dict[int, Passed] = {}
        left, ids = self._left(whole, past, state, seen, watch, state._room if watch is None else None)
        column = final.choose(left, state.own(len(self.links) - 1, type(final).__name__))
        chosen = column if ids is None else torch.where(column < 0, column, ids.gather(1, column.clamp(min=0)[:, None])[:, 0])
        state.advance(self._learn(whole, chosen, state, seen))
        return chosen

    def ended(self, history: Tensor, state: State) -> list[bool]:
        """Which rows a link calls finished, after a draw: no token can follow there, whether or not the last one was end-of-sequence.

        ``history [b n]`` is as in the next call. Whoever runs a chain asks this after every step, and draws no more in such rows.
        """
        done = [False] * len(state)
        for i, link in enumerate(self.links):
            if link.ends and not link.off:
                done = [a or b for a, b in zip(done, link.ended(len(state), history, state.own(i, type(link).__name__)), strict=True)]
        return done

    def steps(self, logits: Tensor, history: History = None, state: State | None = None) -> Iterator[Step]:
        """What each link does to these logits, link by link; ``state`` is read and not advanced.

        The last :class:`Step` therefore shows the token that the next call will draw. Works without a final link too.
        """
        now = _rows(logits)
        past = as_history(history, now.shape[0], now.device)
        if state is None and self.links and isinstance(self.links[-1], Final):
            state = self._state_for(now, state)
        for i, link in enumerate(self.links):
            memory = (
                state.own(i, type(link).__name__) if state is not None else Own(_blank(now.shape[0]), link.start(now.shape[0], now.device), type(link).__name__)
            )
            after = link.apply(now, past, memory)
            yield Step(link, now, after)
            now = after

    def _left(
        self,
        logits: Tensor,
        history: Tensor | None,
        state: State,
        seen: dict[int, Passed],
        watch: list[Passed] | None = None,
        room: Room | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logits that reach the final link: ``[b v]`` and None, or ``[b k]`` and their ids; ``seen`` gets what passed the links that observe.

        With a ``room``, what is returned and what was seen is good until that room is used again.
        """
        width, room = logits.shape[1], Room() if room is None else room
        room.borrowed = 0
        mine: Tensor | None = None  # the logits, if nobody but this pass knows them
        ids: Tensor | None = None
        for i, link in enumerate(self.links[:-1]):
            if link.off:
                continue
            if ids is not None and not link.by_value:
                logits, ids = spread(logits, ids, width), None
            before, named, own = logits, ids, state.own(i, type(link).__name__)
            thick = logits.device.type == "cpu" and logits.shape[1] >= WIDE and not logits.requires_grad
            thinned = link.thin(logits, room, own) if thick else None
            if thinned is not None:
                logits, columns = thinned
                ids = ids if columns is None else columns if ids is None else ids.gather(1, columns)
            elif isinstance(link, Narrowing):
                logits, columns = link.narrow(logits)
                ids = columns if ids is None else ids.gather(1, columns)
            elif link.writes:
                free = logits if logits is mine else room.copy(logits) if thick else logits.clone()
                logits = mine = link.write(free, history, own)
            else:
                logits = link.apply(logits, history, own)
            if watch is not None or link.observes:
                mine = None
                passed = Passed(link, before, named, logits, ids)
                if watch is not None:
                    watch.append(passed)
                if link.observes:
                    seen[i] = passed
        return logits, ids

    def _learn(self, logits: Tensor, chosen: Tensor, state: State, seen: dict[int, Passed]) -> list[Tensor | None]:
        memory = list(state.memory)
        if any(m is not None and not link.observes for link, m in zip(self.links, memory, strict=True)):
            p = (logits.gather(1, chosen.clamp(min=0)[:, None]) - logits.logsumexp(1, keepdim=True)).exp()[:, 0]
            memory = [m if m is None or link.observes else link.learn(m, p, chosen) for link, m in zip(self.links, memory, strict=True)]
        for i, passed in seen.items():
            own = memory[i]
            if own is not None:
                memory[i] = passed.link.observe(own, passed.before, passed.after, passed.column(chosen))
        return memory

    def _state_for(self, logits: Tensor, state: State | None) -> State:
        if state is None:
            return self.state(logits.shape[0], device=logits.device)
        if len(state) != logits.shape[0]:
            raise SamplerError(
                f"The logits have {logits.shape[0]} rows and the sampler's state has {len(state)}. Make one with chain.state({logits.shape[0]})."
            )
        return state


@dataclass(frozen=True, eq=False)
class Passed:
    """One link at work in the chain's own pass: the logits before and after it ``[b c]``, and which token each column is (None: the whole vocabulary)."""

    link: Link
    before: Tensor
    before_ids: Tensor | None
    after: Tensor
    after_ids: Tensor | None

    def column(self, chosen: Tensor) -> Tensor:
        """Where the tokens ``chosen [b]`` stand among the columns before it; -1 for -1."""
        return chosen if self.before_ids is None else torch.where(chosen < 0, chosen, (self.before_ids == chosen[:, None]).long().argmax(dim=-1))


@dataclass(frozen=True, eq=False)
class Step:
    """What one link did, for every row: ``before`` and ``logits`` are ``[b v]``, the rest follows from them."""

    link: Link
    before: Tensor
    logits: Tensor

    @property
    def name(self) -> str:
        """The kind of the link: ``"TopK"``."""
        return type(self.link).__name__

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax of what is left, ``[b v]``."""
        return self.logits.softmax(dim=-1)

    @cached_property
    def entropy(self) -> Tensor:
        """H = -Σ p log2 p in bits, ``[b]``: 0 means that the token is certain."""
        nats: Tensor = torch.special.entr(self.probabilities).sum(dim=-1)
        return nats / log(2)

    @cached_property
    def support(self) -> Tensor:
        """How many tokens are left, ``[b]``."""
        return (self.logits > GONE).sum(dim=-1)

    @cached_property
    def removed(self) -> list[list[int]]:
        """The ids that this very link removed, per row, in order."""
        return [torch.nonzero(row)[:, 0].tolist() for row in (self.before > GONE) & (self.logits == GONE)]

    @property
    def chosen(self) -> list[int] | None:
        """The token picked in each row (-1: none was left), or None if this is no final link."""
        if not isinstance(self.link, Final):
            return None
        found: list[int] = torch.where(self.support > 0, self.logits.argmax(dim=-1), -1).tolist()
        return found

    def __str__(self) -> str:
        rows = [f"{n} tokens left, {h:.2f} bits" for n, h in zip(self.support.tolist(), self.entropy.tolist(), strict=True)]
        return f"{self.link!r}: {'; '.join(rows)}"


# What the chain is given


def as_history(history: History, rows: int, device: torch.device) -> Tensor | None:
    """Token ids per row as ``[b n]``, right-aligned, -1 in front of the shorter ones. Raises :class:`SamplerError` if the rows disagree."""
    if history is None:
        return None
    if not isinstance(history, Tensor):
        longest = max((len(row) for row in history), default=0)
        history = torch.tensor([[-1] * (longest - len(row)) + list(row) for row in history], dtype=torch.long, device=device).reshape(len(history), longest)
    history = history if history.dim() > 1 else history[None]
    if history.shape[0] != rows:
        raise SamplerError(f"The history has {history.shape[0]} rows and the logits have {rows}. Give one list of token ids per row.")
    return history


def _rows(logits: Tensor) -> Tensor:
    logits = logits[None] if logits.dim() == 1 else logits
    if logits.dim() != 2 or 0 in logits.shape:
        raise SamplerError(f"A sampler takes logits of shape [b v], but got {list(logits.shape)}. For a model's [b t v] take logits[:, -1].")
    return logits.float()


def _blank(rows: int) -> State:
    return State(0, [0] * rows, [0] * rows, [])
