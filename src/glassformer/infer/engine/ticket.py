"""A ticket: where the tokens of a request come out, for the thread, the callback or the coroutine that waits for them.

engine ──► _push(token) ──► tokens ─┬─► for token in ticket
             _end()                 ├─► ticket.on_token(fn), ticket.on_done(fn)     (called by the thread that steps)
                                    └─► async for token in ticket.astream()
"""

from __future__ import annotations

import asyncio
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from glassformer.core.errors import Cancelled, EngineError, GlassformerWarning

from ..generate import Generated, Token

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Request


@dataclass(eq=False)
class _Listener:
    """Somebody who is told of every token: which is next, and whether a thread is about to tell it."""

    fn: Callable[[Token], object]
    at: int = 0
    busy: bool = False


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
        self._on_token: list[_Listener] = []
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
        """Call ``fn(token)`` with every token once, in order: at once with those that have come, later ones in the thread that steps.

        An exception of ``fn`` ends the request; one at a token that has come already is raised here instead, and ``fn`` hears no more.
        """
        listener = _Listener(fn)
        with self._changed:
            if not self.done:
                self._on_token.append(listener)
        try:
            self._tell(listener)
        except BaseException:
            with self._changed:
                self._on_token = [other for other in self._on_token if other is not listener]
            raise

    def on_done(self, fn: Callable[[Ticket], object]) -> None:
        """Call ``fn(ticket)`` once nothing more will come: finished, cancelled or failed; at once if that is so already.

        The answer may have been handed out by then, so an exception of ``fn`` changes nothing about it and is a :class:`GlassformerWarning`.
        """
        with self._changed:
            if not self.done:
                self._on_done.append(fn)
                return
        self._tell_end(fn)

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
            listeners = list(self._on_token)
        wrong: list[Exception] = []
        for listener in listeners:
            try:
                self._tell(listener)
            except Exception as error:  # the others hear of the token nevertheless
                wrong.append(error)
        if wrong:
            raise wrong[0]

    def _tell(self, listener: _Listener) -> None:
        """Tell of all tokens that have come; where another thread is about that already, it does these, too."""
        with self._changed:
            if listener.busy:
                return
            listener.busy = True
        while True:
            with self._changed:
                if listener.at == len(self.tokens):
                    listener.busy = False
                    return
                token = self.tokens[listener.at]
                listener.at += 1
            listener.fn(token)  # without the lock: it may take its time, and ask the ticket; one that raises stays busy, and hears no more

    def _end(self, generated: Generated | None, error: Exception | None = None) -> None:
        with self._changed:
            self._generated, self.error = generated, error
            self.finished, self.done = perf_counter(), True
            self.cancelled = isinstance(error, Cancelled)
            told, self._on_done = self._on_done, []
            self._on_token = []
            self._changed.notify_all()
        for fn in told:
            self._tell_end(fn)

    def _tell_end(self, fn: Callable[[Ticket], object]) -> None:
        try:
            fn(self)
        except Exception as error:
            said = f"A callback of on_done, {fn!r}, raised {type(error).__name__}: {error}. The request had ended before, and stays as it was."
            try:
                warnings.warn(said, GlassformerWarning, stacklevel=3)
            except GlassformerWarning as strict:  # where warnings are errors: other requests of this step are to go on
                traceback.print_exception(strict)

    def __repr__(self) -> str:
        state = "waiting or running" if not self.done else "cancelled" if self.cancelled else "failed" if self.error else "finished"
        return f"Ticket({state}, {len(self.tokens)} tokens)"
