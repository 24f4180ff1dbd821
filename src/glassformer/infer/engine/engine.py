"""The engine: many requests at once over one cache, each as if it were alone.

    with Engine(model, tokenizer, slots=16, capacity=2048) as engine:
        ticket = engine.submit(Request("Once upon", max_new_tokens=50, temperature=0.8, seed=7))
        for token in ticket:
            print(token.text, end="")

    submit ──► waiting ──► a free row? ──► read the prompt, at most prefill_chunk tokens a step ──► first token
               (turns)                                                                                 │
                                           one call for all rows that have read theirs  ◄──────────────┤
                                                └──► a token each ──► ticket ──► finished? ──► row free┘

All memory of the cache is taken at the start. Who joins a batch on its way is the idea of Orca (Yu et al. 2022); reading prompts in pieces
beside the decoding is that of Sarathi (arXiv 2308.16369).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, Literal, Unpack

import torch

from glassformer.core.cache import Ring
from glassformer.core.errors import Cancelled, EngineError, InputError, QueueFull, SamplerError
from glassformer.core.modes import deterministic as in_mode, evaluating
from glassformer.core.packed_cache import FORMS, scratch

from ..generate import Generated
from ..options import Options, Prompt, read_prompts
from ..session import COMPILED, _check_readout, _device, opened, position_limit
from .choosing import Outcome, choose
from .limits import check_job, slots_in
from .request import Job, Request, read
from .rows import Rows
from .stats import Counters, Stats
from .ticket import Ticket
from .waiting import Waiting


class Engine:
    """Continuous batching for one model (or what ``load`` gives: then its tokenizer and end-of-sequence are used if no others are said).

    ``slots``: requests at work at once; ``capacity``: tokens of one of them, prompt and new ones together; ``queue``: how many may wait.
    ``prefill_chunk``: prompt tokens read per step, so that a long prompt does not stop the others. ``cache_dtype``: None keeps keys and values as
    the model makes them, ``"bfloat16"`` and ``"int8"`` (a scale per vector) shorter. ``prefix``: take over what another row has read of the same
    beginning. ``deterministic``: a request's tokens and log-probabilities to the last bit what they are alone, whoever else is at work (slower).
    ``memory``: bytes for the cache (``"2 GB"``) and for what a call unpacks of it where ``cache_dtype`` is said, which may mean fewer slots.
    ``eos_id``, ``seed``: for requests that say none.

    What a step computes with comes on top of the cache: at most ``prefill_chunk`` tokens of prompts and one of every request. Prompts of requests
    with a tap, of encoders, and beyond the reach of rotary positions that look at the length (LongRope, DynamicNTKScaling) are read in one piece.

    Raises :class:`InputError` for a model that predicts no tokens, and for numbers below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        slots: int = 16,
        capacity: int = 2048,
        queue: int = 64,
        prefill_chunk: int = 256,
        cache_dtype: Literal["bfloat16", "int8"] | None = None,
        prefix: bool = True,
        memory: str | int | None = None,
        eos_id: int | Iterable[int] | None = None,
        seed: int | None = None,
        deterministic: bool = False,
    ):
        for name, number in {"slots": slots, "capacity": capacity, "queue": queue, "prefill_chunk": prefill_chunk}.items():
            if not isinstance(number, int) or number < 1:
                raise InputError(f"Engine({name}={number!r}): a whole number of 1 or more.")
        if cache_dtype is not None and cache_dtype not in FORMS:
            raise InputError(f"Engine(cache_dtype={cache_dtype!r}): {' or '.join(map(repr, FORMS))}, or None for the model's own.")
        model, own = opened(model)
        tokenizer, eos_id = own.get("tokenizer") if tokenizer is None else tokenizer, own.get("eos_id") if eos_id is None else eos_id
        _check_readout(model)
        if not hasattr(model, "cache") or getattr(model, "tells_drawn", False):
            raise InputError("An engine needs a model of one pass with a cache, not one combined of several: generate() runs those.")
        limit = position_limit(model)
        self.model, self.tokenizer, self.eos_id, self.seed = model, tokenizer, eos_id, seed
        self.slots, self.capacity, self.prefill_chunk = slots, capacity if limit is None else min(capacity, limit), prefill_chunk
        self.deterministic, self.cache_dtype = deterministic, cache_dtype
        if deterministic and hasattr(model, "_orig_mod"):
            raise InputError(COMPILED)
        self._device = _device(model)
        with torch.no_grad(), evaluating(model), in_mode(deterministic):
            if memory is not None:
                one = Rows(model, 1, self.capacity, self._device, 1, False, cache_dtype).cache
                self.slots = slots_in(memory, one.bytes + scratch(one), slots)
            self._rows = Rows(model, self.slots, self.capacity, self._device, prefill_chunk, prefix, cache_dtype)
        if deterministic and cache_dtype is not None and any(isinstance(slot, Ring) for layer in self._rows.cache.layers for slot in layer.values()):
            raise InputError(
                f"Engine(deterministic=True, cache_dtype={cache_dtype!r}): layers with a window read a call's tokens before they are made shorter, so what "
                "comes out depends on how a prompt is cut. Leave cache_dtype out."
            )
        self._waiting = Waiting(queue)
        self._counters = Counters()
        self._lock = threading.Condition()  # of the queue and of what is asked for
        self._turn = threading.Lock()  # of a step
        self._cancels: list[Ticket] = []
        self._number = 0
        self._thread: threading.Thread | None = None
        self._closing, self._aborting = False, False
        self._stepper = 0

    @property
    def bytes(self) -> int:
        """Bytes of the cache: taken at the start, the same for good."""
        return self._rows.cache.bytes

    @property
    def running(self) -> bool:
        """Whether a thread makes the steps."""
        return self._thread is not None and self._thread.is_alive()

    # Asking

    def submit(self, request: Request) -> Ticket:
        """Put a request in the queue.

        Raises :class:`QueueFull` if too many wait, :class:`EngineError` if the engine is stopping, and, before anything runs, what ``generate``
        raises for a prompt or options that cannot be: :class:`InputError`, :class:`SamplerError`.
        """
        if not isinstance(request, Request):
            raise InputError(f"submit() takes a Request, but {type(request).__name__} was given: engine.submit(Request(prompt, max_new_tokens=50)).")
        try:
            return self._submit(request)
        except QueueFull:
            with self._lock:
                self._counters.refused += 1
            raise

    def _submit(self, request: Request) -> Ticket:
        with self._lock:
            self._check_open(request.user)  # before the work of reading it, which a crowd at the door would make in vain
        job = read(request, self.model, self.tokenizer, self.eos_id, self.seed, self._device)
        check_job(job, self.model, self.capacity)
        job.ticket = Ticket(self, request, job.row.prompt_ids)
        with self._lock:
            self._check_open(job.user)
            self._number += 1
            job.number = self._number
            self._waiting.add(job)
            self._counters.submitted += 1
            self._lock.notify_all()
        ticket: Ticket = job.ticket
        return ticket

    def _check_open(self, user: str) -> None:
        if self._closing:
            raise EngineError("The engine is stopping and takes no more requests: start() makes it take them again.")
        self._waiting.check(user)

    def generate(self, prompts: Prompt, *, user: str = "", **options: Unpack[Options]) -> list[Generated]:
        """Many prompts, in order: what ``generate(model, prompts, **options)`` gives, however many there are. Raises what ended the first that failed."""
        rows, _ = read_prompts(prompts, self.tokenizer)
        seeds = options.get("seed")
        if isinstance(seeds, Sequence) and len(seeds) != len(rows):
            raise SamplerError(f"{len(seeds)} seeds were given for {len(rows)} prompts; give one seed, or one per prompt.")
        seen: dict[tuple[int, ...], int] = {}
        requests: list[Request] = []
        rest: dict[str, Any] = {name: value for name, value in options.items() if name != "seed"}
        for i, ids in enumerate(rows):
            times = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            seed = [seeds[i]] if isinstance(seeds, Sequence) else seeds
            own: dict[str, Any] = rest if seed is None else rest | {"seed": seed}
            requests.append(Request(ids, user=user, sample=times, **own))
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._submit_patiently(request))
            return [ticket.result() for ticket in tickets]
        except BaseException:
            for ticket in tickets:  # nobody would wait for them
                ticket.cancel()
            raise

    def _submit_patiently(self, request: Request) -> Ticket:
        self.check_thread()
        while True:
            try:
                return self._submit(request)
            except QueueFull:
                if not self.running:
                    self.step()
                else:
                    with self._lock:
                        self._lock.wait(0.05)

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            found = next((job for job in self._waiting if job.ticket is ticket), None)
            if found is not None:
                self._waiting.remove(found)
                self._counters.cancelled += 1
            elif not ticket.done:
                self._cancels.append(ticket)
            self._lock.notify_all()
        if found is not None:
            ticket._end(None, _cancelled(found))

    # Running

    def step(self) -> bool:
        """One step: some of the prompts is read, and every request that has read its own gets a token. Whether there was anything to do."""
        self.check_thread()
        with self._turn, torch.no_grad(), evaluating(self.model), in_mode(self.deterministic):
            self._stepper = threading.get_ident()
            try:
                return self._step()
            finally:
                self._stepper = 0

    def check_thread(self) -> None:
        """Raise :class:`EngineError` in a callback: what waits for a step may not stand inside one."""
        if self._stepper == threading.get_ident():
            raise EngineError("This is asked for from inside a step, by a callback: a step cannot wait for another one. Let another thread ask.")

    def _step(self) -> bool:
        begun = perf_counter()
        self._drop()
        self._admit()
        if not self._rows.jobs:
            return False
        self._counters.prefix_tokens += self._rows.catch_up()
        for job, n in self._rows.pieces():
            self._read(job, n)
        self._decode()
        self._counters.steps += 1
        self._counters.seconds += perf_counter() - begun
        return True

    def _drop(self) -> None:
        """End the requests that somebody wants to end."""
        with self._lock:
            asked, self._cancels = self._cancels, []
        for job in [j for j in self._rows.jobs if self._aborting or any(j.ticket is t for t in asked)]:
            self._end(job, _cancelled(job))

    def _admit(self) -> None:
        while True:
            with self._lock:
                if not self._rows.free or not len(self._waiting):
                    return
                job = self._waiting.take()
                self._lock.notify_all()  # somebody may wait for a place in the queue
            try:
                self._counters.prefix_tokens += self._rows.admit(job)
            except Exception as error:
                self._end(job, error)

    def _read(self, job: Job, n: int) -> None:
        before = job.held
        try:
            logits = self._rows.read(job, n)
        except Exception as error:
            self._end(job, error)
            return
        self._counters.prompt_tokens += job.held - before + (len(job.source or ()) if not before else 0)
        if logits is not None:
            self._give(choose([job], logits))

    def _decode(self) -> None:
        for jobs, logits in self._rows.decode():
            if isinstance(logits, Exception):
                for job in jobs:
                    self._end(job, logits)
            else:
                self._give(choose(jobs, logits))

    def _give(self, outcomes: list[Outcome]) -> None:
        """Hand the drawn tokens to those who wait for them."""
        for o in outcomes:
            if o.error is not None:
                self._end(o.job, o.error)
                continue
            try:
                o.job.ids.append(o.token)
                first = not o.job.row.ids
                token = o.job.row.take(o.token, o.logprob, o.top, o.choice, o.ended)
                self._counters.tokens += 1
                o.job.ticket._push(token)
                if first:
                    self._counters.first(o.job.ticket.first - o.job.ticket.submitted)
            except Exception as error:
                self._end(o.job, error)
                continue
            if o.job.row.finish is not None:
                self._end(o.job, None)

    def _end(self, job: Job, error: Exception | None) -> None:
        generated: Generated | None = None
        if error is None:
            try:
                generated = job.row.result()
            except Exception as wrong:
                error = wrong
        spoilt = job.tap is not None or (error is not None and not isinstance(error, Cancelled))
        try:
            self._rows.leave(job, spoilt)
        finally:  # whatever becomes of the row, nobody waits for ever
            self._count(error)
            job.ticket._end(generated, error)

    def _count(self, error: Exception | None) -> None:
        c = self._counters
        if error is None:
            c.finished += 1
        elif isinstance(error, Cancelled):
            c.cancelled += 1
        else:
            c.failed += 1

    # A thread of its own

    def start(self) -> Engine:
        """Have a thread make the steps while there is work; it sleeps otherwise."""
        with self._lock:
            self._closing = self._aborting = False
            if not self.running:
                self._thread = threading.Thread(target=self._run, name="glassformer-engine", daemon=True)
                self._thread.start()
        return self

    def most(self, user: str = "") -> int:
        """How many requests of one user may wait at once; more than that handed in together can be refused whatever else is at work."""
        return self._waiting.most(user)

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, finish those that there are or (``drain=False``) cancel them, and end the thread.

        What has not finished after ``timeout`` seconds is cancelled.
        """
        until = None if timeout is None else perf_counter() + timeout
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if not drain:
            self._cancel_all()
        thread = self._thread
        if thread is threading.current_thread():  # asked for by a callback: the thread ends by itself
            return
        if thread is not None and thread.is_alive():
            thread.join(None if until is None else max(0.0, until - perf_counter()))
            if thread.is_alive():
                self._cancel_all()
                thread.join()
        else:
            while (until is None or perf_counter() < until) and self.step():
                pass
            self._cancel_all()
            self.step()
        self._thread = None

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(drain=kind is None)

    def _cancel_all(self) -> None:
        with self._lock:
            waiting, self._aborting = list(self._waiting), True
        for job in waiting:
            self._cancel(job.ticket)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._closing and not len(self._waiting) and not self._rows.jobs:
                    self._lock.wait()
                if self._closing and not len(self._waiting) and not self._rows.jobs:
                    return
            try:
                self.step()
            except Exception as error:  # no request is left waiting for a thread that is no more
                with self._turn:
                    jobs = list(self._rows.jobs)
                    self._rows.empty()
                    for job in jobs:
                        if not job.ticket.done:
                            self._count(error)
                            job.ticket._end(None, error)

    # Counting

    def stats(self) -> Stats:
        """Counts so far and the state of the moment."""
        with self._lock:
            return self._counters.snapshot(waiting=len(self._waiting), running=len(self._rows.jobs), slots=self.slots, capacity=self.capacity, bytes=self.bytes)

    def __repr__(self) -> str:
        s = self.stats()
        return f"Engine({s.running} of {s.slots} slots at work, {s.waiting} waiting, {self.capacity} tokens each, {s.bytes:,} bytes)"


def _cancelled(job: Job) -> Cancelled:
    return Cancelled(f"The request was cancelled after {job.drawn} of at most {job.row.limit} new tokens.")
