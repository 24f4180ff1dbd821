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

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError, did_you_mean
from glassformer.core.fields import check, described, hints
from glassformer.core.modes import deterministic, deterministically
from glassformer.core.tap import Tap

from .combining import combine
from .guessing import Guesses, read_draft
from .links import Draw
from .named import Settings, build_chain, eos_ids, renamed
from .sampler import Chain, Link
from .search import BeamRun, BeamTree
from .searching import NO_STREAM, Searching, read_searching
from .session import Session, Source
from .speculative import Speculative
from .text import Detokenizer, StopStrings
from .trace import Choice, Names, Trace, read_trace

FinishReason = Literal["stop", "eos", "length"]
Prompt = str | list[int] | list[str] | list[list[int]] | Tensor
MAX_NEW_TOKENS = 128


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


class Options(Settings, total=False):
    """The options of :func:`generate` and :func:`stream`: these and the names of :class:`~glassformer.infer.named.Settings`; all have defaults."""

    tokenizer: Any  # to read a text prompt and to write text
    max_new_tokens: int  # 128
    sampler: Chain | Link | None  # a chain of links; or say some of the names of Settings (see build_chain for their order)
    seed: int | Sequence[int] | None  # one seed, or one per row
    stop: str | Sequence[str]  # texts that end a row
    stop_strings: str | Sequence[str] | None  # another name of stop
    eos_id: int | Iterable[int] | None  # ids that end a row; default the tokenizer's; () for none
    eos_token_id: int | Iterable[int] | None  # another name of eos_id
    cache: Cache | bool | None  # yours, or False for none (slow; for comparison)
    tap: Tap | None  # sees every call of the model; paths begin with step.{n}., step 0 is the prefill
    logprobs: int  # how many of the most probable tokens to report beside each
    trace: bool | int  # record what each link did to the candidates; a number says how many of every stage are kept (True: 10)
    deterministic: bool | None  # the same bits whatever the batch, the cache and the drafts are (slower: docs/generate/deterministic.md)
    decoder_start: int | Sequence[int] | None  # encoder-decoder: how the target begins; default the model's own (spec.start)
    # Speculative decoding: many tokens from one forward pass
    draft: Any  # who guesses: a smaller model of the same vocabulary, PromptLookup(), or anything with propose(ids, n)
    draft_tokens: int | None  # how many tokens are guessed at a time; 5
    draft_rule: str | None  # which guesses stay: "coupled" keeps the text of a seed, "rejection" accepts most; None chooses
    prompt_lookup_num_tokens: int | None  # short for draft=PromptLookup(), draft_tokens=n
    assistant_model: Any  # another name of draft
    num_assistant_tokens: int | None  # another name of draft_tokens
    num_speculative_tokens: int | None  # another name of draft_tokens
    # Combined models: logprobs and a trace's first stage are then those of the combination
    guidance_scale: float | None  # follow the prompt more (classifier-free guidance); 1 is off
    negative_prompt: str | Sequence[Any] | None  # a text or ids to go away from; default no prompt at all
    negative_prompt_ids: str | Sequence[Any] | None  # another name of negative_prompt
    contrast: Any  # a weaker model of the same vocabulary to go away from (contrastive decoding)
    contrast_alpha: float | None  # 0.1: tokens below this part of the best one's probability go
    contrast_beta: float | None  # 0.5: how strongly
    dola_layers: str | Sequence[int] | None  # "low", "high" or numbers: go away from an early layer (DoLa)
    penalty_alpha: float | None  # contrastive search among the top_k (4) most probable; 0 is off
    # Beam search (search.BeamSearch says how): the most probable text; with do_sample, temperature, … the beams are drawn
    num_beams: int | None  # how many beginnings are kept at every step; 1 is no search
    num_return_sequences: int | None  # how many of the best to give in .beams; default all that are kept
    length_penalty: float | None  # a score is divided by the length to this power: above 0 favours long texts, below 0 short ones; 1
    early_stopping: bool | Literal["never"] | None  # end: True: at num_beams texts; False (default): once the best beginning is behind; "never": for certain
    coverage_penalty: float | None  # encoder-decoder: how much it costs to leave parts of the source unattended
    num_beam_groups: int | None  # groups of beams that keep apart
    diversity_penalty: float | None  # what a token costs each time that another group has chosen it at this step
    force_words: str | Iterable[Any] | None  # phrases that must come: texts, lists of ids, or lists of alternatives
    force_words_ids: Iterable[Any] | None  # another name of force_words
    beam_tree: bool | None  # keep every hypothesis, alive and dead, in .tree


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
        searching, given = read_searching(_checked(options))
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


# Reading what was given


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under our own names, each of the kind that it should be."""
    kinds = hints(Options)
    for name in options:
        if name not in kinds:
            raise SamplerError(f"There is no option {name!r}.{did_you_mean(name, kinds)} Known: {', '.join(kinds)}.")
    check("generate", options, kinds, SamplerError)
    if options.get("tokenizer") is not None and not hasattr(options["tokenizer"], "decode"):
        raise InputError(f"tokenizer is {described(type(options['tokenizer']))}, but it has to encode and decode: gf.load(folder).tokenizer is one.")
    return renamed(options)


def read_prompts(prompt: Prompt, tokenizer: Any = None) -> tuple[list[list[int]], bool]:
    """The ids of every row, and whether a single prompt was given. Raises :class:`InputError` for anything that is no prompt."""
    given: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    single = isinstance(given, str) or (isinstance(given, (list, tuple)) and bool(given) and all(isinstance(i, int) for i in given))
    rows = [given] if single else given
    if not isinstance(rows, (list, tuple)) or not rows:
        raise InputError(f"A prompt is a text, a list of ids, or a list of either, but got {prompt!r}.")
    return [_read_prompt(row, i, tokenizer) for i, row in enumerate(rows)], single


def _read_prompt(row: Any, i: int, tokenizer: Any) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise InputError(f"Prompt {i} is a text ({row[:40]!r}), and without a tokenizer it cannot be read: give tokenizer=…, or ids.")
        row = getattr(tokenizer, "prompt", tokenizer.encode)(row) or _beginning(tokenizer)  # with what a text is to begin with
    if not isinstance(row, (list, tuple)) or not all(isinstance(t, int) for t in row):
        raise InputError(f"Prompt {i} is neither a text nor a list of ids: {row!r}.")
    if not row:
        raise InputError(f"Prompt {i} is empty, and the tokenizer has no beginning-of-text token to start from: give at least one token.")
    return list(row)


def _beginning(tokenizer: Any) -> list[int]:
    """What an empty text starts from: the beginning-of-text token, or (as in GPT-2) the one between texts."""
    known = (getattr(tokenizer, name, None) for name in ("bos_id", "eos_id"))
    return [token for token in known if token is not None][:1]


def _read_sampler(
    sampler: Chain | Link | None,
    seed: int | Sequence[int] | None,
    known: dict[str, Any],
    tokenizer: Any = None,
    eos_id: int | Iterable[int] | None = None,
    max_new_tokens: int | None = None,
) -> Chain:
    said = {name: value for name, value in known.items() if value is not None}
    if sampler is None:
        # The session is given the real seed; here it says that there is one, so that it is drawn.
        chain = build_chain(**said, seed=None if seed is None else 0, tokenizer=tokenizer, eos_id=eos_id, max_new_tokens=max_new_tokens)
    elif said:
        raise SamplerError(f"sampler={sampler!r} and {', '.join(said)} were both given: put what you want into the sampler, or leave it out.")
    else:
        chain = sampler if isinstance(sampler, Chain) else Chain((sampler,))
    _ = chain.final  # a chain without one is an error now, not at the first token
    return chain


def generation(model: Any, **options: Unpack[Options]) -> Chain:
    """The chain that :func:`generate` builds from these options; print it to see what is done, and in which order.

        print(generation(model, temperature=0.8, top_k=40, seed=7))          # Temperature(t=0.8) | TopK(k=40) | Draw(seed=7)

    ``model`` may be what ``load`` gives: then its tokenizer and its end-of-sequence are used if no others are said. Options that do not
    concern the choice (``stop``, ``cache``, …) may stand there too. Raises what :func:`generate` raises, and :class:`SamplerError` for
    tokens outside the model's vocabulary.
    """
    loaded = hasattr(model, "model") and hasattr(model, "eos_ids")
    given = _checked(options)
    tokenizer = given.get("tokenizer", model.tokenizer if loaded else None)
    eos_id = given.get("eos_id", model.eos_ids if loaded else None)
    seed = given.get("seed")
    sampling = {name: value for name, value in given.items() if name in hints(Settings)}
    chain = _read_sampler(given.get("sampler"), seed, sampling, tokenizer, eos_id, given.get("max_new_tokens", MAX_NEW_TOKENS))
    if given.get("sampler") is None and isinstance(seed, int):
        chain = chain.replace(links=tuple(Draw(seed) if isinstance(link, Draw) else link for link in chain.links))
    spec = getattr(model.model if loaded else model, "spec", None)
    size = getattr(getattr(spec, "decoder", spec), "vocab_size", None)
    for _ in chain.steps(torch.zeros(1, size)) if size else ():  # every link meets the vocabulary
        pass
    return chain


def _read_seed(seed: int | Sequence[int] | None, prompts: list[list[int]]) -> tuple[list[int], int | None]:
    """The rows' own seeds, and the run's (None: as the chain says)."""
    if seed is None or isinstance(seed, int):
        seen: dict[tuple[int, ...], int] = {}
        own = []
        for ids in prompts:
            times = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            own.append(int.from_bytes(hashlib.blake2b(struct.pack(f"<{len(ids) + 1}q", times, *ids), digest_size=8).digest(), "little"))
        return own, seed
    if len(seed) != len(prompts):
        raise SamplerError(f"{len(seed)} seeds were given for {len(prompts)} prompts; give one seed, or one per prompt.")
    return [int(s) for s in seed], 0


def _read_start(decoder_start: int | Sequence[int] | None, model: Any) -> list[int]:
    start = model.spec.start if decoder_start is None else decoder_start
    return [start] if isinstance(start, int) else list(start)
