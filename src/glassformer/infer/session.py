"""A running generation at the level of ids: the model's cache, the ids so far, the sampler's memory.

    session = Session(model, [[5, 3, 8], [7]], TopK(40) | Draw(seed=0))
    session.step()                 # one token per row
    twins = session.fork(2)        # each row twice, to go on in two ways
    session.rewind(3)              # as if the last three tokens had never been drawn

The invariant that makes all of this simple: **the cache holds every token but the last one** of each
row (at the start: none). A step reads what the cache does not hold yet, draws, and appends:

    ids    p0 p1 p2 p3          step 0 reads p0…p3 (the prefill),   draws x0
    cache  ─────────────
    ids    p0 p1 p2 p3 x0       step 1 reads x0,                    draws x1
    cache  ━━━━━━━━━━━
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.cache import Cache
from glassformer.core.errors import CacheError, InputError, SamplerError
from glassformer.core.fields import check, described, hints
from glassformer.core.mask import Causal, Mask
from glassformer.core.modes import deterministic, evaluating
from glassformer.core.tap import Tap
from glassformer.models import program
from glassformer.parts import decoding, steady
from glassformer.parts.position import LearnedLayer
from glassformer.parts.readout import LanguageModel
from glassformer.parts.rotary import RotaryLayer

from .sampler import Chain, Link, Passed, as_history
from .state import State
from .trace import Choice
from .tracing import measure

MOST = 1e37
"""Of a logit: beyond this a temperature or a bias can make it infinite."""
COMPILED = "Deterministic mode runs a model as it is written, and this one was compiled by torch.compile: give the model itself."


@dataclass(frozen=True)
class Drawn:
    """One step: per row the token, ln p of it, and the most probable tokens with theirs (by the model, before any link).

    ``traces``: how each was chosen, if the session was asked for it.
    """

    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    traces: list[Choice] | None = None


class Session:
    """Rows of ids that grow by one token per :meth:`step`. Rows may be of different lengths.

    ``cache``: None makes one with room for ``room`` more tokens; a Cache of yours goes on from what it holds, and is yours afterwards: it
    holds all tokens but the last (penalties see the tokens of this session only); False computes everything anew at each step, the slow
    twin. ``seeds`` are the rows' own. ``top``: how many of the most probable tokens to report. ``source``: an encoder-decoder's.
    ``trace``: how many candidates of every stage of the sampler to keep (0: no trace). ``deterministic``: the same bits in any batch, cached or not
    (see :func:`glassformer.deterministic`).
    Raises :class:`InputError` or :class:`CacheError` before anything runs if the tokens will not fit, and :class:`InputError` for a model that
    predicts no tokens.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        sampler: Chain | Link,
        *,
        room: int = 128,
        cache: Cache | bool | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        tap: Tap | None = None,
        top: int = 0,
        source: Source | None = None,
        trace: int = 0,
        deterministic: bool = False,
    ):
        check("Session", {"prompts": prompts, "sampler": sampler, "room": room, "cache": cache}, hints(Session.__init__), InputError)
        if room < 0:
            raise InputError(f"room is how many tokens may be drawn, 0 or more; {room} was given.")
        if not prompts or not all(len(p) for p in prompts):
            raise InputError(f"Generation needs at least one token in every row, but the rows have {[len(p) for p in prompts]} tokens.")
        _check_readout(model)
        self.model, self.tap, self.top, self.source, self.trace = model, tap, top, source, trace
        self.deterministic = deterministic
        if deterministic and hasattr(model, "_orig_mod"):
            raise InputError(COMPILED)
        self.sampler = sampler if isinstance(sampler, Chain) else Chain((sampler,))
        self.lengths = [len(p) for p in prompts]
        longest, device = max(self.lengths), _device(model)
        if device.type == "meta":
            raise InputError("This model stands on the meta device, where tensors have shapes but no numbers: build it without device='meta', or load one.")
        self._check_room(cache, longest, room)
        self._owns_cache = not isinstance(cache, Cache)  # what a given one held is known to its owner only
        self._boundaries = _boundaries(model) if self._owns_cache else frozenset()
        self.cache: Cache | None = cache if isinstance(cache, Cache) else None if cache is False else model.cache(batch=len(prompts), capacity=longest + room)
        self.state: State = self.sampler.state(len(prompts), seeds=seeds, seed=seed, device=device)
        history = as_history(prompts, len(prompts), device)
        assert history is not None
        self._ids = torch.cat([history, history.new_full((len(prompts), room), -1)], dim=1)
        self._width, self._prompt, self._begun = longest, longest, False

    @property
    def ids(self) -> list[list[int]]:
        """Prompt and generated tokens of every row."""
        return [row[-n:] for row, n in zip(self._ids[:, : self._width].tolist(), self.lengths, strict=True)]

    @property
    def drawn(self) -> int:
        """How many tokens each row has been given so far."""
        return self._width - self._prompt

    @property
    def _seeded(self) -> tuple[Link, ...]:
        return _seeded(self.sampler, self.state)

    @property
    def ended(self) -> list[bool]:
        """Which rows a link of the sampler calls finished: a constraint whose text is whole, and which nothing can follow."""
        return self.sampler.ended(self._ids[:, : self._width], self.state)

    def read(self) -> Tensor:
        """The logits that the next step will choose from, before any link, ``[b v]``; the session stays where it is."""
        return self.fork(1)._read(())

    def step(self) -> Drawn:
        """Draw one token for every row.

        Raises :class:`SamplerError` if the links leave a row nothing to choose from, or the model gave NaN.
        """
        with deterministic(self.deterministic):
            return self._step(frozen=())

    def _step(self, frozen: Sequence[int], over: Sequence[int] = ()) -> Drawn:
        """A step in which the cache takes no token of the ``frozen`` rows; what they and the rows that are ``over`` draw means nothing."""
        logits = self._read(frozen)
        with torch.no_grad():
            passed: list[Passed] | None = [] if self.trace else None
            chosen = self.sampler(logits, self._ids[:, : self._width], self.state, passed)
            drawn = _measure(logits, chosen, self.top)
            if passed is not None:
                drawn = replace(drawn, traces=measure(logits, passed, self._seeded, chosen, self.trace, self.drawn))
        for row, token in enumerate(drawn.ids):
            if token < 0 and row not in frozen and row not in over:
                raise SamplerError(self._why_nothing(logits[row], row))
        self._append(chosen.clamp(min=0))  # where nothing was left, in a row that is over
        return drawn

    def _append(self, tokens: Tensor) -> None:
        """One token more in every row, ``[b]``."""
        if self._width == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.full_like(self._ids, -1)], dim=1)
        self._ids[:, self._width] = tokens
        self._width += 1
        self.lengths = [n + 1 for n in self.lengths]

    # The tree of continuations

    def fork(self, n: int, seeds: Sequence[int] | None = None) -> Session:
        """Each row ``n`` times, in a new session that shares the model and the tap with this one, and nothing else.

        With ``seeds``, one per new row, they draw differently from here on; without, the copies draw the same.
        """
        if not isinstance(n, int) or n < 1:
            raise InputError(f"fork(n) makes every row n times, 1 or more; {n!r} was given.")
        twins = self.select([row for row in range(len(self.lengths)) for _ in range(n)])
        if seeds is not None:
            if len(seeds) != len(twins.lengths):
                raise SamplerError(f"fork({n}) makes {len(twins.lengths)} rows, but {len(seeds)} seeds were given; give one per new row.")
            twins.state.seeds = [int(s) for s in seeds]
        return twins

    def select(self, rows: Sequence[int]) -> Session:
        """A new session of these rows."""
        wrong = [r for r in rows if not isinstance(r, int) or not 0 <= r < len(self.lengths)] if isinstance(rows, Sequence) else [rows]
        if wrong:
            raise InputError(f"select() takes rows of this session, a list of numbers from 0 to {len(self.lengths) - 1}; {wrong[0]!r} was given.")
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.lengths = [self.lengths[r] for r in rows]
        new.cache = None if self.cache is None else self.cache.select(rows)
        new.state = self.state.select(rows)
        new.source = None if self.source is None else self.source.select(rows)
        new._ids = self._ids[torch.tensor(list(rows), device=self._ids.device)]
        return new

    def rewind(self, k: int) -> None:
        """Forget the last ``k`` tokens that were drawn.

        Where a layer's window has lost what came before, the next step reads the row anew.
        Raises :class:`InputError` if there are fewer, and :class:`CacheError` for a cache of yours whose ring has lost too much.
        """
        if not 0 <= k <= self.drawn:
            raise InputError(f"{self.drawn} tokens were drawn, so {k} cannot be forgotten: a session is wound back to its prompt at most.")
        if k == 0:
            return
        if self.cache is not None and any(n - k <= b < n for n in self._counted() for b in self._boundaries):
            self.cache, self._begun = self.model.cache(batch=len(self.lengths), capacity=self._ids.shape[1]), False  # its keys fit longer rows only
        elif self.cache is not None:
            try:
                self.cache.rewind(k)
            except CacheError:  # a window's ring has lost what came before
                if not self._owns_cache:
                    raise
                self.cache, self._begun = self.model.cache(batch=len(self.lengths), capacity=self._ids.shape[1]), False
        self.state.rewind(k)
        self._ids[:, self._width - k :] = -1
        self._width -= k
        self.lengths = [n - k for n in self.lengths]

    # How a step reads

    def _read(self, frozen: Sequence[int]) -> Tensor:
        """Run the model over the tokens that the cache does not hold; logits after the last one, ``[b v]``."""
        ids, lengths, path = self._ids[:, : self._width], self.lengths, f"step.{self.drawn}"
        if self._outgrown():
            self.cache, self._begun = self.model.cache(batch=len(lengths), capacity=self._ids.shape[1]), False
        if self.cache is not None and self._begun:
            ids, lengths = ids[:, -1:], [1] * len(lengths)
            if self.tap is None and self.source is None and not frozen and (quick := program.decode(self.model, ids, self.cache)) is not None:
                return quick
        tokens, ragged = _left_aligned(ids, lengths), len(set(lengths)) > 1
        keep: Tensor | int = torch.tensor(lengths, device=tokens.device) - 1 if ragged else 1
        fed = [0 if row in frozen else n for row, n in enumerate(lengths)] if frozen else lengths if ragged else None
        with torch.no_grad(), evaluating(self.model):
            if self.source is None:
                told = {"drawn": self.drawn} if getattr(self.model, "tells_drawn", False) else {}  # a guided model asks where the prompt ends
                logits: Tensor = self.model(tokens, lengths=fed, cache=self.cache, keep=keep, tap=self.tap, path=path, **told)
            else:
                logits = self.source.decode(tokens, lengths=fed, cache=self.cache, keep=keep, tap=self.tap, path=path)
        self._begun = True
        return logits[:, -1]

    def _outgrown(self) -> bool:
        """Whether a row has just grown so long that its cached keys were turned by other angles than its new ones are (LongRoPE)."""
        return self._begun and self.cache is not None and any(n - 1 in self._boundaries for n in self._counted())

    def _counted(self) -> list[int]:
        """The lengths of all rows, and of what another branch of a guided model has read in place of the prompt."""
        beside: int = getattr(self.model, "beside", 0)
        return [*self.lengths, *([beside + self.drawn] if beside else ())]

    def _check_room(self, cache: Cache | bool | None, longest: int, room: int) -> None:
        held = cache.length if isinstance(cache, Cache) else 0
        need = held + longest + room - 1  # the last new token is never read
        if isinstance(cache, Cache):
            if cache.batch != len(self.lengths):
                raise CacheError(
                    f"The cache was made for {cache.batch} rows and there are {len(self.lengths)} prompts. Make it with model.cache(batch={len(self.lengths)})."
                )
            if cache.capacity is not None and need > cache.capacity:
                raise CacheError(
                    f"The cache has a capacity of {cache.capacity} tokens and holds {held}: a prompt of {longest} and {room} new tokens "
                    f"need {need} (the last one is not read). Make it larger, or ask for fewer new tokens."
                )
        most = position_limit(self.model)
        longest = max(longest, getattr(self.model, "beside", 0) - held)  # another branch of a guided model may begin with a longer text
        need = held + longest + room - 1
        if most is not None and need > most:
            raise InputError(
                f"The model has {most} learned positions, but {held + longest} tokens of prompt and {room} new ones need {need} (the last one is not read). "
                f"Shorten the prompt, or ask for at most {max(0, most - held - longest + 1)} new tokens."
            )

    def _why_nothing(self, logits: Tensor, row: int) -> str:
        return _why_nothing(logits, self.sampler, f"in row {row} at step {self.drawn}")


def _seeded(chain: Chain, state: State) -> tuple[Link, ...]:
    """The links, the last one with the seed that is in use."""
    final = chain.final
    return (*chain.links[:-1], replace(final, seed=state.seed) if hasattr(final, "seed") else final)


def _why_nothing(logits: Tensor, chain: Chain, where: str) -> str:
    """Why a chain left a row nothing to choose from."""
    if torch.isnan(logits).any():
        return f"The model gave NaN logits {where}. Record('**') as tap shows at which site they begin."
    if (top := float(logits.max())) > MOST:
        return f"The model gave a logit of {top:.3g} {where}, of which no probability can be worked out. Record('**') as tap shows at which site it begins."
    return f"No token is left to choose from {where}: every logit is -inf after {chain!r}. Let one of the links keep more."


class Source:
    """The encoder's side of an encoder-decoder: read once, handed to every step."""

    def __init__(self, model: Any, memory: Tensor, lengths: list[int]):
        self.model, self.memory, self.lengths = model, memory, lengths

    @staticmethod
    def read(model: Any, sources: Sequence[Sequence[int]], tap: Tap | None = None) -> Source:
        """Encode ragged sources, right-padded."""
        _check_readout(model)
        lengths = [len(s) for s in sources]
        if not all(lengths):
            raise InputError(f"Every source needs at least one token, but the rows have {lengths}.")
        history = as_history(sources, len(sources), _device(model))
        assert history is not None
        with torch.no_grad(), evaluating(model):
            memory = model.encode(_left_aligned(history, lengths), lengths, tap=tap, path="step.0")
        return Source(model, memory, lengths)

    def decode(self, tokens: Tensor, **rest: Any) -> Tensor:
        """The decoder's logits for these target tokens."""
        logits: Tensor = self.model.decode(tokens, self.memory, source_lengths=self.lengths, **rest)
        return logits

    def select(self, rows: Sequence[int]) -> Source:
        """These rows of the memory."""
        return Source(self.model, self.memory[torch.tensor(list(rows), device=self.memory.device)], [self.lengths[r] for r in rows])


def position_limit(model: Any) -> int | None:
    """How many positions a model can tell apart: the smallest learned table, or None if any length will do."""
    decoder = getattr(model, "decoder", model)
    if not isinstance(decoder, nn.Module):
        return None
    return min((m.spec.max_positions for m in decoder.modules() if isinstance(m, LearnedLayer)), default=None)


def opened(model: Any) -> tuple[Any, dict[str, Any]]:
    """A model as it may be given: itself, or what ``load`` gives, whose tokenizer and ends of a text then hold where no others are said."""
    if hasattr(model, "model") and hasattr(model, "eos_ids"):
        return model.model, {"tokenizer": model.tokenizer, "eos_id": model.eos_ids}
    return model, {}


def vocabulary(model: Any) -> int | None:
    """How many tokens a model's logits tell apart; None for one whose Spec does not say."""
    spec = getattr(getattr(model, "decoder", model), "spec", None)
    size = getattr(getattr(spec, "decoder", spec), "vocab_size", None)
    return None if size is None else int(size)


def _boundaries(model: Any) -> frozenset[int]:
    """The lengths beyond which a model's earlier keys do not fit any more."""
    layers = (m for m in model.modules() if isinstance(m, RotaryLayer)) if isinstance(model, nn.Module) else ()
    return frozenset(b for m in layers if (b := m.spec.scaling.boundary) is not None)


def _check_readout(model: Any) -> None:
    """Raise :class:`InputError` for what does not predict tokens from left to right."""
    if not callable(model):
        raise InputError(f"Generation needs a model, but {described(type(model))} was given: spec.build() makes one of a Spec, load(folder) reads one.")
    spec = getattr(getattr(model, "decoder", model), "spec", None)
    readout, mask = getattr(spec, "readout", None), getattr(spec, "mask", None)
    if readout is not None and not isinstance(readout, LanguageModel):
        raise InputError(
            f"Generation draws tokens of a vocabulary, but the model's read-out is {readout!r}, which predicts none: give a model with readout=LanguageModel()."
        )
    if isinstance(mask, Mask) and not isinstance(mask, Causal):
        raise InputError(
            f"Generation goes from left to right, but this {type(spec).__name__} has the mask {mask!r} and sees the whole text at once: give a Decoder."
        )


def _measure(logits: Tensor, chosen: Tensor, top: int) -> Drawn:
    """Log-probabilities of what was drawn; everything comes to the host in one transfer."""
    logits = logits.float()
    quick = decoding.logsumexp(logits)
    if quick is None:
        quick = steady.logsumexp(logits) if steady.on() else logits.logsumexp(dim=-1, keepdim=True)
    total = quick
    columns = [chosen[:, None].double(), (logits.gather(1, chosen[:, None].clamp(min=0)) - total).double()]
    if top:
        values, ids = logits.topk(min(top, logits.shape[-1]), dim=-1)
        columns += [ids.double(), (values - total).double()]  # ids below 2^53 are exact in float64
    rows = torch.cat(columns, dim=1).tolist()
    half = (len(rows[0]) - 2) // 2
    best = [[(int(i), p) for i, p in zip(r[2 : 2 + half], r[2 + half :], strict=True)] for r in rows]
    return Drawn([int(r[0]) for r in rows], [r[1] for r in rows], best)


def _left_aligned(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Right-aligned rows ``[b n]`` moved to the left; what is behind a row's end is 0 (any id: nobody sees it)."""
    if len(set(lengths)) == 1:
        return ids[:, ids.shape[1] - lengths[0] :]
    width = max(lengths)
    return torch.stack([torch.cat([row[len(row) - n :], row.new_zeros(width - n)]) for row, n in zip(ids, lengths, strict=True)])


def _device(model: Any) -> torch.device:
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device
