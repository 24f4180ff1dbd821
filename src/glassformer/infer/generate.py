"""Generation: from a prompt to text, all at once or token by token.

    out = generate(model, "Once upon", tokenizer=tok, max_new_tokens=50, temperature=0.8, top_k=40, seed=7)
    out.text, out.logprobs, out.finish_reason

    for token in stream(model, ["one prompt", "another"], tokenizer=tok, stop=["\\n\\n"], logprobs=3):
        print(token.row, token.text, token.logprob, token.top)

    prompt ──► ids ──► Session.step ──► Detokenizer ──► StopStrings ──► Token, Token, …
                          ▲    │                                            │
                          └────┘ until every row has finished               └──► Generated

``generate`` is ``stream`` with the events put together. What a row gets does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.fields import hints
from glassformer.core.modes import deterministic, deterministically
from glassformer.core.tap import Tap

from .combining import combine
from .guessing import Guesses, read_draft
from .links import Draw
from .named import Settings, eos_ids
from .options import MAX_NEW_TOKENS, Options, Prompt, _checked, _read_sampler, _read_seed, _read_start, read_prompts
from .sampler import Chain, Link
from .search import BeamRun, BeamTree
from .searching import NO_STREAM, Searching, read_searching
from .session import Session, Source, opened, vocabulary
from .speculative import Speculative
from .text import Detokenizer, StopStrings
from .trace import Choice, Names, Trace, read_trace

FinishReason = Literal["stop", "eos", "length"]


@dataclass(frozen=True)
class Candidate:
    """A token that the model found probable at one place: ``logprob`` is ln p before any link of the sampler."""

    id: int
    text: str | None
    logprob: float


@dataclass(frozen=True)
class Token:
    """One event of a stream.

    ``text`` is what may be shown now: a character whose bytes are not complete, or a tail that may begin a stop string, comes
    with a later token. ``logprob`` is ln p of the token by the model, before any link. ``finish_reason`` is set on a row's last event.
    ``trace`` (if asked for): how it was chosen, link by link.
    """

    row: int
    id: int
    text: str
    logprob: float
    top: tuple[Candidate, ...] = ()
    finish_reason: FinishReason | None = None
    trace: Choice | None = None
    guesses: Guesses | None = None  # on the last event of a row with a draft: what came of its guesses


@dataclass(frozen=True)
class Generated:
    """What one row became.

    ``text`` (None without a tokenizer) is the new text, without end-of-sequence and from a stop string on cut off. ``ids``, ``logprobs`` and
    ``top`` hold every token that was drawn, the last one too. ``finish_reason``: ``"eos"``, ``"stop"`` (a stop string, or a constraint that is met
    and that nothing can follow), or ``"length"``.
    ``trace`` (if asked for): how each token was chosen; it prints, and saves itself as a page. ``guesses`` (with a draft): how many were accepted.
    After a search (``num_beams``) this is the best text, and ``beams`` are the n best, this one first, each with its ``score``; ``tree`` (if asked for)
    holds every hypothesis that was considered.
    """

    text: str | None
    ids: list[int]
    logprobs: list[float]
    top: list[tuple[Candidate, ...]]
    finish_reason: FinishReason
    prompt_ids: list[int]
    trace: Trace | None = None
    guesses: Guesses | None = None
    score: float | None = None
    beams: tuple[Generated, ...] = field(default=(), repr=False)
    tree: BeamTree | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return " ".join(map(str, self.ids)) if self.text is None else self.text


@overload
def generate(model: Any, prompt: str | list[int], *, stream: Callable[[Token], object] | None = None, **options: Unpack[Options]) -> Generated: ...


@overload
def generate(
    model: Any, prompt: list[str] | list[list[int]], *, stream: Callable[[Token], object] | None = None, **options: Unpack[Options]
) -> list[Generated]: ...


@overload
def generate(model: Any, prompt: Tensor, *, stream: Callable[[Token], object] | None = None, **options: Unpack[Options]) -> Generated | list[Generated]: ...


def generate(model: Any, prompt: Prompt, *, stream: Callable[[Token], object] | None = None, **options: Unpack[Options]) -> Generated | list[Generated]:
    """Continue a prompt: a text, a list of ids, a batch of either (ragged), or a tensor ``[t]`` or ``[b t]``.

    One prompt gives one :class:`Generated`, a batch gives a list. ``stream`` is called with every :class:`Token` as it comes; the other options
    are those of :class:`Options`. Nothing said about sampling means greedy. With one ``seed`` each row draws from a stream of its own, made from
    the seed and its prompt, so that a row gets the same in any batch, and equal prompts in one batch go different ways.

    For an encoder-decoder the prompt is the source, and the target begins with ``decoder_start``.

    ``model`` may be what ``load`` gives: then its tokenizer and its end-of-sequence are used if no others are said.

    Raises :class:`InputError` for prompts that cannot be read or will not fit, :class:`CacheError` for a cache too small,
    :class:`SamplerError` for an option of another name and for settings that make no sense; all before the model runs.
    """
    run = _Run.prepare(model, prompt, **options)
    if run.search is not None and stream is not None:
        raise SamplerError(NO_STREAM)
    for token in run.events() if run.search is None else ():
        if stream is not None:
            stream(token)
    with deterministic(run.session.deterministic):
        done = [row.result() for row in run.rows] if run.search is None else run.found(run.search)
    return done[0] if run.single else done


def stream(model: Any, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Token]:
    """The tokens of :func:`generate` as they come: one :class:`Token` per row and step, rows in order within a step.

    Errors in the options are raised here, not at the first token. The texts of a row's events, joined, are its ``Generated.text``.
    """
    run = _Run.prepare(model, prompt, **options)
    if run.search is not None:
        raise SamplerError(NO_STREAM)
    return run.events()


def generation(model: Any, **options: Unpack[Options]) -> Chain:
    """The chain that :func:`generate` builds from these options; print it to see what is done, and in which order.

        print(generation(model, temperature=0.8, top_k=40, seed=7))          # Temperature(t=0.8) | TopK(k=40) | Draw(seed=7)

    ``model`` may be what ``load`` gives: then its tokenizer and its end-of-sequence are used if no others are said. Options that do not
    concern the choice (``stop``, ``cache``, …) may stand there too. Raises what :func:`generate` raises, and :class:`SamplerError` for
    tokens outside the model's vocabulary.
    """
    model, own = opened(model)
    given = _checked(own | options)
    tokenizer, eos_id, seed = given.get("tokenizer"), given.get("eos_id"), given.get("seed")
    sampling = {name: value for name, value in given.items() if name in hints(Settings)}
    if given.get("penalty_alpha"):
        sampling["do_sample"] = False  # contrastive search chooses by itself
    chain = _read_sampler(given.get("sampler"), seed, sampling, tokenizer, eos_id, given.get("max_new_tokens", MAX_NEW_TOKENS))
    if given.get("sampler") is None and isinstance(seed, int):
        chain = chain.replace(links=tuple(Draw(seed) if isinstance(link, Draw) else link for link in chain.links))
    size = vocabulary(model)
    for _ in chain.steps(torch.zeros(1, size)) if size else ():  # every link meets the vocabulary
        pass
    return chain


# One run


@dataclass
class _Row:
    """One row on its way: what was drawn, and what of it was shown."""

    index: int
    prompt_ids: list[int]
    tokenizer: Any
    limit: int
    eos: frozenset[int]
    stops: StopStrings
    context: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[Candidate, ...]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    choices: list[Choice] | None = None  # if a trace is asked for
    guesses: Guesses | None = None

    def __post_init__(self) -> None:
        self.names = Names(self.tokenizer)
        self.detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, self.context)

    def take(self, token: int, logprob: float, top: list[tuple[int, float]], choice: Choice | None = None, ended: bool = False) -> Token:
        """Add a token, decide whether the row ends (``ended``: a link of the sampler says so), and say what may be shown."""
        if choice is not None and self.choices is not None:
            choice = replace(choice, names=self.names)
            self.choices.append(choice)
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.top.append(tuple(Candidate(i, None if self.tokenizer is None else self.tokenizer.decode([i]), p) for i, p in top))
        text, stopped = "", False
        if token in self.eos:
            self.finish = "eos"
        elif ended:
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = "length"
        if self.detokenizer is not None:
            text, stopped = self.stops.push("" if self.finish == "eos" else self.detokenizer.push(token))
            if self.finish and not stopped:
                rest, stopped = self.stops.push(self.detokenizer.flush())
                text += rest + self.stops.flush()
        if stopped:
            self.finish = "stop"
        self.shown.append(text)
        return Token(self.index, token, text, logprob, self.top[-1], self.finish, choice)

    def fresh(self) -> _Row:
        """The same row, with nothing drawn."""
        return _Row(self.index, self.prompt_ids, self.tokenizer, self.limit, self.eos, StopStrings(self.stops.stops), self.context)

    def result(self) -> Generated:
        assert self.finish is not None
        text = None if self.tokenizer is None else "".join(self.shown)
        trace = None if self.choices is None else Trace(tuple(self.choices), None if self.tokenizer is None else self.tokenizer.decode(self.prompt_ids))
        return Generated(text, self.ids, self.logprobs, self.top, self.finish, self.prompt_ids, trace, self.guesses)


@dataclass
class _Run:
    """All rows of one call."""

    session: Session
    rows: list[_Row]
    single: bool
    drops: bool  # whether finished rows may leave the batch
    searching: Searching | None = None
    search: BeamRun | None = None

    @staticmethod
    def prepare(
        model: Any,
        prompt: Prompt,
        **options: Any,
    ) -> _Run:
        """Read the options and check them against each other; nothing runs but an encoder."""
        model, own = opened(model)
        searching, given = read_searching(_checked(own | options))
        model, given = combine(model, given)
        with deterministic(bool(given.get("deterministic"))):
            run = _Run._read(model, prompt, **given)
            if searching is not None:
                run.searching, run.search = searching, searching.over(run.session, run.rows, given.get("logprobs", 0))
        return run

    @staticmethod
    def _read(
        model: Any,
        prompt: Prompt,
        *,
        tokenizer: Any = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampler: Chain | Link | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        eos_id: int | Iterable[int] | None = None,
        cache: Cache | bool | None = None,
        tap: Tap | None = None,
        logprobs: int = 0,
        trace: bool | int = False,
        deterministic: bool | None = False,
        decoder_start: int | Sequence[int] | None = None,
        draft: Any = None,
        draft_tokens: int | None = None,
        draft_rule: str | None = None,
        prompt_lookup_num_tokens: int | None = None,
        **known: Any,
    ) -> _Run:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1.")
        if logprobs < 0:
            raise InputError(f"logprobs is {logprobs}; it is the number of candidates to report, 0 or more.")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and tokenizer is None:
            raise InputError("Stop strings are text, and without a tokenizer there is only ids: give tokenizer=…, or end on ids by eos_id=….")
        prompts, single = read_prompts(prompt, tokenizer)
        kept = read_trace(trace)
        chain = _read_sampler(sampler, seed, known, tokenizer, eos_id, max_new_tokens)
        seeds, run_seed = _read_seed(seed, prompts)
        source, starts = None, prompts
        if hasattr(model, "encode") and hasattr(model, "decode"):
            starts = [_read_start(decoder_start, model)] * len(prompts)
            source = Source.read(model, prompts, tap)
        elif decoder_start is not None:
            raise InputError("decoder_start is for encoder-decoder models; this one continues the prompt itself.")
        eos = eos_ids(eos_id, tokenizer)
        running: dict[str, Any] = {"room": max_new_tokens, "cache": cache, "seed": run_seed, "seeds": seeds, "tap": tap, "top": logprobs, "trace": kept}
        running["deterministic"] = bool(deterministic)
        guesser, n = read_draft(model, draft, draft_tokens, prompt_lookup_num_tokens, draft_rule, tokenizer)
        if guesser is None:
            session = Session(model, starts, chain, source=source, **running)
        else:
            sources = None if source is None else prompts
            running |= {"draft": guesser, "draft_tokens": n, "rule": draft_rule, "ends": eos, "sources": sources}
            session = Speculative(model, starts, chain, source=source, **running)
        rows = [
            _Row(i, p, tokenizer, max_new_tokens, eos, StopStrings(stops), s if source is None else [], choices=[] if kept else None)
            for i, (p, s) in enumerate(zip(prompts, starts, strict=True))
        ]
        return _Run(session, rows, single, drops=tap is None and not isinstance(cache, Cache))

    def found(self, search: BeamRun) -> list[Generated]:
        """Search to the end: every prompt's best text, with the n best and the tree."""
        assert self.searching is not None
        done = []
        for row, found in zip(self.rows, search.run(), strict=True):
            texts = []
            for end in found.best[: self.searching.search.num_return_sequences]:
                one = row.fresh()
                for node in end.path():
                    one.take(node.token, node.logprob, node.top, ended=node is end and node.ending == "stop")
                texts.append(replace(one.result(), score=end.score))
            tree = self.searching.tree(search, found, row.prompt_ids, row.tokenizer)
            done.append(replace(texts[0], beams=tuple(texts), tree=tree))
        return done

    def events(self) -> Iterator[Token]:
        """Step until every row has finished."""
        return deterministically(self._events()) if self.session.deterministic else self._events()

    def _events(self) -> Iterator[Token]:
        session, live = self.session, self.rows
        while True:
            over = [j for j, row in enumerate(live) if row.finish]
            drawn = session._step(frozen=over if not self.drops else (), over=over)
            traces = drawn.traces or repeat(None)
            for j, (row, token, logprob, top, choice, ended) in enumerate(zip(live, drawn.ids, drawn.logprobs, drawn.top, traces, session.ended, strict=False)):
                if row.finish is None:
                    event = row.take(token, logprob, top, choice, ended)
                    if event.finish_reason and isinstance(session, Speculative):
                        row.guesses = session.guesses[j]
                        event = replace(event, guesses=row.guesses)
                    yield event
            going = [j for j, row in enumerate(live) if row.finish is None]
            if not going:
                if isinstance(session, Speculative):
                    session.settle()  # a cache of the caller's holds what was given out and no more
                return
            # Leaving the batch copies the cache of those who stay: worth it when half have finished, and then at most log2(b) times.
            if self.drops and 2 * len(going) <= len(live):
                session, live = session.select(going), [live[j] for j in going]
