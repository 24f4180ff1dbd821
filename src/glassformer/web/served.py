"""What a server serves: a model, its tokenizer, the engine under it, and what requests may do with them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from glassformer import __version__
from glassformer.infer.session import position_limit
from glassformer.parts.packed import Packed
from glassformer.parts.position import LearnedLayer
from glassformer.parts.readout import LanguageModel

from .inside import Anatomy
from .limits import Limits
from .metrics import Metrics
from .problems import Problem

T = TypeVar("T")
LATE = "The answer was not finished within {:g} seconds, the most that this server gives to one: ask for less."
FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
ON_TOKENS = ("repetition_penalty", "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id")
MOST_READ = 32_768
MOST_WAITING = 64
"""Pieces of work beside the engine (embeddings, values of sites) that may wait for their turn."""


@dataclass
class Gate:
    """Who is let in: whether the server is to stop, and how many answers are under way."""

    draining: bool = False
    running: int = 0


@dataclass
class Served:
    """One model under one name. ``engine`` is None for a model that predicts no tokens; ``worker`` does what is not the engine's, one by one."""

    loaded: Any
    name: str
    engine: Any = None
    limits: Limits = field(default_factory=Limits)
    allow_edits: bool = True
    allow_sites: bool = True
    gate: Gate = field(default_factory=Gate)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.anatomy = Anatomy(self.model)
        self.metrics = Metrics(self)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="glassformer-web")
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="glassformer-read")  # prompts and schemas, which may take long
        self._waiting, self._closed = 0, False
        said = f"{__version__} {self.name} {getattr(self.model, 'spec', None)!r} {self._numbers()}"
        self.fingerprint = f"gf-{hashlib.blake2b(said.encode(), digest_size=5).hexdigest()}"
        self.standing = standing(self.loaded.extra.get("generation", {}))

    def _numbers(self) -> list[str]:
        """What else decides the bits of an answer: how weights and cache are held."""
        weights = {str(x.dtype) for x in self.model.parameters()} | {kind for m in self.model.modules() if isinstance(m, Packed) for kind in m.types}
        return [*sorted(weights), *(f"{name}={getattr(self.engine, name, None)}" for name in ("cache_dtype", "deterministic"))]

    @property
    def pair(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return hasattr(self.model, "encode") and hasattr(self.model, "decode")

    @property
    def context(self) -> int:
        """How many tokens a row may have, prompt and answer together."""
        most = position_limit(self.model)
        capacity = getattr(self.engine, "capacity", None)
        return min([n for n in (most, capacity) if n is not None], default=1 << 30)

    @property
    def readable(self) -> int:
        """How many tokens a text may have that is read and not continued."""
        learned = [m.spec.max_positions for m in getattr(self.model, "encoder", self.model).modules() if isinstance(m, LearnedLayer)]
        return min([*learned, MOST_READ])

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer is not None and bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def writes(self) -> bool:
        """Whether the model predicts tokens."""
        return isinstance(getattr(getattr(self.model.spec, "decoder", self.model.spec), "readout", None), LanguageModel) and self.engine is not None

    def check_name(self, given: str | None) -> None:
        """Raise a :class:`Problem` for another model than the one that is served."""
        if given is not None and given != self.name:
            raise Problem(404, f"There is no model {given[:100]!r} here: this server serves {self.name!r}.", param="model", code="model_not_found")

    def check_text(self) -> Any:
        """The tokenizer. Raises a :class:`Problem` if there is none."""
        if self.tokenizer is None:
            raise Problem(400, "This model has no tokenizer, so texts mean nothing to it: give token ids.", code="no_tokenizer")
        return self.tokenizer

    async def work(self, job: Callable[[], T]) -> T:
        """Do something with the model in the worker's thread, after what waits there. Raises a :class:`Problem` where too much waits."""
        if self._waiting >= MOST_WAITING:
            raise Problem(429, f"{self._waiting} pieces of work wait, and no more than {MOST_WAITING} may: try again later.", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            return await self._within(self.worker, job)
        finally:
            self._waiting -= 1

    async def prepare(self, job: Callable[[], T]) -> T:
        """Read a request in a thread kept for that. Raises a :class:`Problem` where its time is over."""
        return await self._within(self.readers, job)

    async def _within(self, pool: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await asyncio.get_running_loop().run_in_executor(pool, job)
        except TimeoutError:
            raise Problem(504, LATE.format(self.limits.answer_seconds), code="timeout") from None

    def deadline(self) -> Callable[[], None]:
        """What a long piece of work calls now and then: it raises a :class:`Problem` once the time of an answer is over, or the server has ended."""
        until = time.monotonic() + self.limits.answer_seconds

        def check() -> None:
            if self._closed:
                raise Problem(503, "The server is stopping, and this answer was not finished in time: ask again.", headers={"Retry-After": "5"})
            if time.monotonic() > until:
                raise Problem(504, LATE.format(self.limits.answer_seconds), code="timeout")

        return check

    def cut(self) -> None:
        """Everything that runs or waits ends now, and its client is told."""
        self.close()
        if self.engine is not None:
            self.engine.stop(False)

    def close(self) -> None:
        """What waits is given up, and what runs ends at its next check."""
        self._closed = True
        for pool in (self.worker, self.readers):
            pool.shutdown(wait=False, cancel_futures=True)


def standing(generation: Any) -> dict[str, Any]:
    """The sampler's settings where a request says nothing: those that came with the checkpoint, else the model's own distribution."""
    said = generation if isinstance(generation, dict) else {}
    found: dict[str, Any] = {k: v for k, v in said.items() if k in (*FILTERS, *ON_TOKENS) and isinstance(v, int | float) and not isinstance(v, bool)}
    if isinstance(words := said.get("bad_words_ids"), list):
        found["bad_words_ids"] = words
    return {"temperature": 1.0} | found | ({"temperature": 0.0} if said.get("do_sample") is False else {})


def settings(standing: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """What a request says, and what stands where it says nothing. An order of its own, or Mirostat, has no place for filters that nobody asked for."""
    if said.get("mirostat"):
        standing = {k: v for k, v in standing.items() if k not in FILTERS or k == "temperature"}
    order = said.get("order") or said.get("samplers")
    if isinstance(order, list) or (isinstance(order, str) and ";" in order):
        named = order if isinstance(order, list) else order.split(";")
        standing = {k: v for k, v in standing.items() if k not in FILTERS or k in named or k.removesuffix("_p").removesuffix("_cutoff") in named}
    ours = {"repeat_penalty": "repetition_penalty", "typ_p": "typical_p", "bad_words": "bad_words_ids"}
    hidden = {ours[name] for name in said if name in ours}
    return {k: v for k, v in standing.items() if k not in hidden} | said
