"""A ticket: where the tokens of a request come out, for the thread, the callback or the coroutine that waits for them.

engine ──► _push(token) ──► tokens ─┬─► for token in ticket
             _end()                 ├─► ticket.on_token(fn), ticket.on_done(fn)     (called by the thread that steps)
                                    └─► async for token in ticket.astream()
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from glassformer.core.errors import Cancelled, EngineError

from ..generate import Generated, Token

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Request


class Ticket:
    """One request on its way; made by :meth:`Engine.submit`.

    ``tokens``: what has come so far. ``done``: whether nothing more will. ``error``: what ended it, if something did. ``cancelled``: whether
    somebody asked for that. ``prompt_ids``: the prompt as it was read. Times are of ``time.perf_counter()``, None while they are to come.
    """

    def __init__(self, engine: Engine, request: Request, prompt_ids: list[int]):
        self.engine, self.request, self.prompt_ids = engine, request, prompt_ids
        self.tokens: list[Token] = []
        self.done, self.cancelled = False, False
        self.error: Exception | None = None
        self.submitted: float = perf_counter()
        self.first: float | None = None
        self.finished: float | None = None
        self._generated: Generated | None = None
        self._changed = threading.Condition()
        self._on_token: list[Callable[[Token], object]] = []
        self._on_done: list[Callable[[Ticket], object]] = []

    # What a user does with it

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come; waits for the next, or makes the engine's steps itself where no thread does. Raises what ended the request.

        After :meth:`cancel` it ends without an error.
        """
        at = 0
        while True:
            while at == len(self.tokens) and not self.done:
                self._await(None)
            if at == len(self.tokens):
                break
            yield self.tokens[at]
            at += 1
        if self.error is not None and not isinstance(self.error, Cancelled):
            raise self.error

    def result(self, timeout: float | None = None) -> Generated:
        """All of it, once it has finished. Raises what ended the request (:class:`Cancelled`, too), and :class:`EngineError` after ``timeout`` seconds."""
        until = None if timeout is None else perf_counter() + timeout
        while not self.done:
            if until is not None and perf_counter() >= until:
                raise EngineError(f"The request has not finished within {timeout} seconds; {len(self.tokens)} tokens have come. Wait longer, or cancel() it.")
            self._await(until)
        if self.error is not None:
            raise self.error
        assert self._generated is not None
        return self._generated

    def cancel(self) -> None:
        """End it before the engine's next step; what has come stays. Does nothing once it is done."""
        self.engine._cancel(self)

    def on_token(self, fn: Callable[[Token], object]) -> None:
        """Call ``fn(token)`` with every token, those that have come first; in the thread that steps. An exception of ``fn`` ends the request."""
        with self._changed:
            for token in self.tokens:
                fn(token)
            self._on_token.append(fn)

    def on_done(self, fn: Callable[[Ticket], object]) -> None:
        """Call ``fn(ticket)`` once nothing more will come: finished, cancelled or failed; at once if that is so already.

        An exception of ``fn`` becomes the request's ``error`` if it has none.
        """
        with self._changed:
            if not self.done:
                self._on_done.append(fn)
                return
        fn(self)

    async def astream(self) -> AsyncIterator[Token]:
        """The tokens as they come, for a coroutine; needs a started engine. Leaving the loop early cancels the request."""
        if not self.done and not self.engine.running:
            raise EngineError("A coroutine waits for an engine that runs by itself, and this one does not: engine.start(), or `with engine:`.")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Token | None]()
        self.on_token(lambda token: loop.call_soon_threadsafe(queue.put_nowait, token))
        self.on_done(lambda _: loop.call_soon_threadsafe(queue.put_nowait, None))
        try:
            while (token := await queue.get()) is not None:
                yield token
        finally:
            self.cancel()
        if self.error is not None and not isinstance(self.error, Cancelled):
            raise self.error

    def _await(self, until: float | None) -> None:
        """Wait for a change, or bring it about where nobody else does."""
        self.engine.check_thread()
        if self.engine.running:
            with self._changed:
                if not self.done:
                    # Woken now and then: the engine may be stopped meanwhile, and then the steps are this thread's.
                    self._changed.wait(0.1 if until is None else min(0.1, max(0.0, until - perf_counter())))
        elif not self.engine.step() and not self.done:
            raise EngineError("The engine has nothing to do, and yet this request has not finished: it was submitted to another one.")

    # What the engine does with it

    def _push(self, token: Token) -> None:
        with self._changed:
            self.first = self.first or perf_counter()
            self.tokens.append(token)
            self._changed.notify_all()
            for fn in self._on_token:
                fn(token)

    def _end(self, generated: Generated | None, error: Exception | None = None) -> None:
        with self._changed:
            self._generated, self.error = generated, error
            self.finished, self.done = perf_counter(), True
            self.cancelled = isinstance(error, Cancelled)
            told, self._on_done = self._on_done, []
            self._on_token = []
            self._changed.notify_all()
        for fn in told:
            try:
                fn(self)
            except Exception as wrong:  # whose callback it was is to know, and nobody else
                self.error = self.error or wrong

    def __repr__(self) -> str:
        state = "waiting or running" if not self.done else "cancelled" if self.cancelled else "failed" if self.error else "finished"
        return f"Ticket({state}, {len(self.tokens)} tokens)"
