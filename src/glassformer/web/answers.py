"""From the engine's tickets to replies: whole JSON objects, or server-sent events that end in ``data: [DONE]``.

Plan ──► tickets ──► queue of (which, token) ──► chunks ──► client
            │                                        │
            └──── cancelled when the client leaves, when its time is over, or when the server has to stop
"""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from glassformer.core.errors import Cancelled, EngineError, GlassformerError, InputError, QueueFull, SamplerError
from glassformer.core.modes import evaluating
from glassformer.infer.constrain import ToolCall
from glassformer.infer.engine import Request, Ticket
from glassformer.infer.generate import Token
from glassformer.infer.text import REPLACEMENT

from .prepare import Plan
from .problems import Problem, of_error
from .served import LATE, Served

T = TypeVar("T")
LEAST = -9999.0
"""What OpenAI writes for the logarithm of nothing."""
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
ROWS = 256
"""Positions of a prompt whose probabilities are worked out at once."""


def encoded(value: Any) -> bytes:
    """JSON as bytes; a lone surrogate that came with the request becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


async def answer(served: Served, plan: Plan, http: HTTPRequest) -> Response:
    """The reply to a request that was read. Raises a :class:`Problem` for what ends it before its first byte."""
    reply = Reply(served, plan)
    if plan.most[0] == 0:
        return Response(encoded(await while_there(served, http, reply.scored)), media_type="application/json")
    try:
        await served.prepare(reply.submit)
    except BaseException:
        reply.leave()  # also what the thread still hands over
        raise
    if plan.stream:
        return Stream(reply)
    left = asyncio.ensure_future(_gone(http))
    done = asyncio.ensure_future(reply.made())
    try:
        await asyncio.wait({left, done}, timeout=served.limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            raise Problem(499, "The client has gone.")
        if not done.done():
            raise Problem(504, LATE.format(served.limits.answer_seconds), code="timeout")
        return Response(done.result(), media_type="application/json")
    finally:
        for task in (left, done):
            task.cancel()
        reply.leave()


async def while_there(served: Served, http: HTTPRequest, do: Callable[[Callable[[], None]], T]) -> T:
    """``do(check)`` beside the engine; the check ends it once its time is over, or its client has gone."""
    over = threading.Event()

    def begun() -> T:
        deadline = served.deadline()

        def check() -> None:
            if over.is_set():
                raise Problem(499, "The client has gone.")
            deadline()

        return do(check)

    left, done = asyncio.ensure_future(_gone(http)), asyncio.ensure_future(served.work(begun))
    try:
        await asyncio.wait({left, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Problem(499, "The client has gone.")
        return done.result()
    finally:
        over.set()
        for task in (left, done):
            task.cancel()


async def _gone(http: HTTPRequest) -> None:
    """Returns when the client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """Server-sent events; whatever ends it, the tickets are given up."""

    def __init__(self, reply: Reply):
        self.reply = reply
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(reply.events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(2 * self.reply.served.limits.answer_seconds):  # also for a client that reads nothing
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return
        finally:
            self.reply.leave()


class Reply:
    """One request while it is answered."""

    def __init__(self, served: Served, plan: Plan):
        self.served, self.plan = served, plan
        self.id = f"{'chatcmpl' if plan.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.tickets: list[Ticket] = []
        self._left = False

    # The engine's side

    def submit(self) -> None:
        """Hand every answer to the engine, or none. Raises a :class:`Problem`."""
        plan = self.plan
        try:
            for prompt, most in zip(plan.prompts, plan.most, strict=True):
                for i in range(plan.n):
                    options = {**plan.options, "max_new_tokens": most, "seed": plan.seed, "tap": plan.wanted.tap()}
                    options = {k: v for k, v in options.items() if v is not None and v is not False and not (k == "logprobs" and v == 0)}
                    self.tickets.append(self.served.engine.submit(Request(prompt, user=plan.user, sample=i, **options)))
                    self.tickets[-1].on_done(self._count)
                    if self._left:
                        return self.leave()
        except QueueFull as error:
            self.leave()
            raise Problem(429, str(error).replace(", or make Engine(queue=…) longer", ""), code="queue_full", headers={"Retry-After": "1"}) from None
        except EngineError as error:
            self.leave()
            raise Problem(503, str(error), headers={"Retry-After": "1"}) from None
        except GlassformerError as error:
            self.leave()
            raise of_error(error, plan.params) from None
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Give up what is not finished, and what is still to be submitted."""
        self._left = True
        for ticket in self.tickets:
            if not ticket.done:
                ticket.cancel()

    async def made(self) -> bytes:
        """The whole reply, once every answer has ended."""
        await self.finished()
        self.check()
        return encoded(await self.whole())

    async def finished(self) -> None:
        """Waits until every ticket is done."""
        loop = asyncio.get_running_loop()
        for ticket in self.tickets:
            done = asyncio.Event()
            ticket.on_done(partial(_tell, loop, done.set))
            await done.wait()

    def check(self) -> None:
        """Raise the :class:`Problem` of a ticket that failed."""
        for ticket in self.tickets:
            if ticket.error is not None:
                raise of_ticket(ticket.error, self.plan.params, self.plan.wanted.edits is not None)

    def _count(self, ticket: Ticket) -> None:
        reason = "cancelled" if ticket.cancelled else "failed" if ticket.error else str(ticket.tokens[-1].finish_reason) if ticket.tokens else "empty"
        self.served.metrics.ticket(ticket, reason)

    # The whole reply

    async def whole(self) -> dict[str, Any]:
        """The reply in one object."""
        choices = [self._choice(i, t) for i, t in enumerate(self.tickets)]
        for i, choice in enumerate(choices):
            choice |= await self._extras(i)
        if self.plan.echo and self.plan.top is not None:
            before = await self.served.work(lambda: self._scores(self.served.deadline()))
            for i, choice in enumerate(choices):
                choice["logprobs"] = _joined(before[i // self.plan.n], choice["logprobs"], len(self.plan.texts[i // self.plan.n]))
        return self._about("") | {"choices": choices, "usage": self.usage()} | self._edited()

    def _choice(self, i: int, ticket: Ticket) -> dict[str, Any]:
        plan, made = self.plan, ticket.result()
        text = made.text if made.text is not None else ""
        if not plan.chat:
            text = plan.texts[i // plan.n] + text if plan.echo else text
            return {"index": i, "text": text, "finish_reason": REASONS[made.finish_reason], "logprobs": self._legacy(ticket.tokens, 0)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reason = REASONS[made.finish_reason]
        if plan.form is not None:
            message["content"], calls = self.parsed(text)
            if calls:
                message["tool_calls"], reason = calls, "tool_calls" if reason == "stop" else reason
        return {"index": i, "message": message, "finish_reason": reason, "logprobs": self._content(ticket.tokens)}

    def parsed(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """What was said, and the calls of tools in it."""
        said, calls = self.plan.form.parse(text)
        return said, [called(call) for call in calls]

    async def _extras(self, i: int) -> dict[str, Any]:
        """The inside of one answer."""
        ticket, wanted = self.tickets[i], self.plan.wanted
        made = ticket.result()
        extra: dict[str, Any] = {}
        if wanted.trace and made.trace is not None:
            extra["trace"] = await asyncio.to_thread(made.trace.to_dict)
        if wanted.entries:
            start = self.served.model.spec.start if self.served.pair else ()
            start = [start] if isinstance(start, int) else list(start)
            try:
                extra["sites"] = await self.served.work(lambda: wanted.values(ticket.prompt_ids, made.ids, start))
            except GlassformerError as error:
                raise of_error(error, ("return_sites",)) from None
        return extra

    def _edited(self) -> dict[str, Any]:
        edits = self.plan.wanted.edits
        return {} if edits is None else {"edits": {"name": edits.name, "hash": edits.hash}}

    def usage(self) -> dict[str, Any]:
        """How many tokens were read and written."""
        read = sum(len(p) for p in self.plan.prompts)
        written = sum(len(t.tokens) for t in self.tickets)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _about(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.plan.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name, "system_fingerprint": self.served.fingerprint}

    # Events

    async def events(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events. A failure on the way is an event of its own, and then nothing follows."""
        try:
            async for chunk in self._chunks():
                yield b"data: " + encoded(chunk) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            yield b"data: " + encoded(Problem(504, LATE.format(self.served.limits.answer_seconds), code="timeout").body()) + b"\n\n"
        except Problem as problem:
            yield b"data: " + encoded(problem.body()) + b"\n\n"
        finally:
            self.leave()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        plan, base = self.plan, self._about(".chunk")
        empty = {"usage": None} if plan.usage else {}
        writers = [(_ChatWriter if plan.chat else _TextWriter)(self, i) for i in range(len(self.tickets))]
        for writer in writers:
            for choice in writer.begin():
                yield base | {"choices": [choice]} | empty
        async for i, token in self._tokens():
            for choice in writers[i].push(token) if token is not None else ():
                yield base | {"choices": [choice]} | empty
            if token is None:
                if (error := self.tickets[i].error) is not None:
                    raise of_ticket(error, plan.params, plan.wanted.edits is not None)
                extra = await self._extras(i)
                for choice in writers[i].end():
                    yield base | {"choices": [choice | (extra if choice.get("finish_reason") else {})]} | empty | self._edited()
        if plan.usage:
            yield base | {"choices": [], "usage": self.usage()}

    async def _tokens(self) -> AsyncIterator[tuple[int, Token | None]]:
        """The tokens of all answers as they come, and None at the end of each."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Token | None]]()

        def put(i: int, token: Token) -> None:
            _tell(loop, partial(queue.put_nowait, (i, token)))

        for i, ticket in enumerate(self.tickets):
            ticket.on_token(partial(put, i))
            ticket.on_done(partial(_tell, loop, partial(queue.put_nowait, (i, None))))
        going, until = len(self.tickets), loop.time() + self.served.limits.answer_seconds
        while going:
            async with asyncio.timeout_at(until):
                i, token = await queue.get()
            going -= token is None
            yield i, token

    # Logprobs

    def text_of(self, token: int) -> str:
        """A token by itself; one that is no whole character by its bytes, as OpenAI writes them."""
        if self.served.tokenizer is None:
            return f"token_id:{token}"
        text: str = self.served.tokenizer.decode([token])
        if REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{b:02x}" for b in self.served.tokenizer.decode_bytes([token]))

    def _content(self, tokens: list[Token]) -> dict[str, Any] | None:
        """``logprobs`` of a chat."""
        return None if self.plan.top is None else {"content": [self.of_token(t) for t in tokens], "refusal": None}

    def of_token(self, token: Token) -> dict[str, Any]:
        """One token in the form of a chat's logprobs."""
        return self._one(token.id, token.logprob) | {"top_logprobs": [self._one(c.id, c.logprob) for c in token.top]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.served.tokenizer
        return {"token": self.text_of(token), "logprob": _finite(logprob), "bytes": None if tokenizer is None else list(tokenizer.decode_bytes([token]))}

    def _legacy(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        """``logprobs`` of a completion: four lists; ``offset`` is where the first token begins in the text."""
        if self.plan.top is None:
            return None
        made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            _add(made, self.text_of(token.id), token.logprob, {self.text_of(c.id): c.logprob for c in token.top} if self.plan.top else None, offset)
            offset += len(token.text)
        return made

    def _scores(self, check: Callable[[], None]) -> list[dict[str, Any]]:
        """``logprobs`` of every prompt, each worked out once however many answers it has."""
        made = []
        for prompt in self.plan.prompts:
            check()
            made.append(self._score(prompt))
        return made

    def _score(self, prompt: list[int]) -> dict[str, Any]:
        """``logprobs`` of a prompt's own tokens, from one pass over it, edits at work; the first has none, since nothing predicts it."""
        model = self.served.model
        with torch.no_grad(), evaluating(model):
            logits = model(torch.tensor([prompt], device=next(model.parameters()).device), tap=self.plan.wanted.whole(len(prompt)))[0]
        made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset, top = 0, self.plan.top or 0
        whole = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be split over tokens
        for i, token in enumerate(prompt):
            text = self.text_of(token)
            if i == 0:
                _add(made, text, None, None, offset)
            else:
                if (i - 1) % ROWS == 0:
                    logprobs = logits[i - 1 : i - 1 + ROWS].float().log_softmax(-1).cpu()
                row = logprobs[(i - 1) % ROWS]
                best = row.topk(min(top, len(row)))
                named = {self.text_of(t): p for t, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
                _add(made, text, float(row[token]), named if top else None, offset)
            offset += len(whole.decode(self.served.tokenizer.decode_bytes([token]))) if self.served.tokenizer is not None else 0
        return made

    def scored(self, check: Callable[[], None]) -> dict[str, Any]:
        """The reply to ``max_tokens=0`` with ``echo``: the prompts, how probable they are, and the values at their sites."""
        plan = self.plan
        choices: list[dict[str, Any]] = []
        scores = [None] * len(plan.prompts) if plan.top is None else self._scores(check)
        for text, prompt, score in zip(plan.texts, plan.prompts, scores, strict=True):
            check()
            sites = {"sites": plan.wanted.values(prompt, ())} if plan.wanted.entries else {}
            choices += [{"index": len(choices) + i, "text": text, "finish_reason": "length", "logprobs": score} | sites for i in range(plan.n)]
        return self._about("") | {"choices": choices, "usage": self.usage()} | self._edited()


class _TextWriter:
    """The chunks of one completion."""

    def __init__(self, reply: Reply, index: int):
        self.reply, self.index, self.offset, self.reason = reply, index, 0, "stop"

    def begin(self) -> Iterator[dict[str, Any]]:
        plan = self.reply.plan
        if plan.echo:
            text = plan.texts[self.index // plan.n]
            self.offset = len(text)
            yield {"index": self.index, "text": text, "finish_reason": None, "logprobs": None}

    def push(self, token: Token) -> Iterator[dict[str, Any]]:
        logprobs = self.reply._legacy([token], self.offset)
        self.offset += len(token.text)
        if token.finish_reason is not None:
            self.reason = REASONS[token.finish_reason]
        if token.text or logprobs is not None:
            yield {"index": self.index, "text": token.text, "finish_reason": None, "logprobs": logprobs}

    def end(self) -> Iterator[dict[str, Any]]:
        yield {"index": self.index, "text": "", "finish_reason": self.reason, "logprobs": None}


class _ChatWriter:
    """The chunks of one answer in a chat. Where tools may be called, the text waits until it is certain that it is no call."""

    def __init__(self, reply: Reply, index: int):
        self.reply, self.index, self.reason = reply, index, "stop"
        self.parser = None if reply.plan.form is None else reply.plan.form.parser()
        self.calls = 0

    def begin(self) -> Iterator[dict[str, Any]]:
        yield self._delta({"role": "assistant", "content": "", "refusal": None})

    def push(self, token: Token) -> Iterator[dict[str, Any]]:
        logprobs = None if self.reply.plan.top is None else {"content": [self.reply.of_token(token)], "refusal": None}
        if token.finish_reason is not None:
            self.reason = REASONS[token.finish_reason]
        parts = [token.text] if self.parser is None else self.parser.push(token.text)
        if logprobs is not None and not (parts and isinstance(parts[0], str)):
            parts = ["", *parts]
        for part in parts:
            if part or logprobs is not None:
                yield self._part(part, logprobs)
            logprobs = None

    def end(self) -> Iterator[dict[str, Any]]:
        if self.parser is not None:
            yield from (self._part(part) for part in self.parser.flush())
        yield self._delta({}) | {"finish_reason": "tool_calls" if self.calls and self.reason == "stop" else self.reason}

    def _part(self, part: str | ToolCall, logprobs: Any = None) -> dict[str, Any]:
        if isinstance(part, str):
            return self._delta({"content": part}, logprobs)
        self.calls += 1
        return self._delta({"tool_calls": [{"index": self.calls - 1} | called(part)]})

    def _delta(self, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": None, "logprobs": logprobs}


def called(call: ToolCall) -> dict[str, Any]:
    """A call of a tool as OpenAI writes it."""
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def of_ticket(error: Exception, params: tuple[str, ...] = (), edited: bool = False) -> Problem:
    """What ended a request after it had begun."""
    if isinstance(error, Cancelled):
        return Problem(503, "The server is stopping, and this answer was not finished in time: ask again.", headers={"Retry-After": "5"})
    if isinstance(error, SamplerError | InputError):
        if not str(error).startswith("The model gave"):
            return of_error(error, params)
        if edited:
            return Problem(400, "With these edits the model's numbers are no longer finite, so no token can be chosen: edit less strongly.", param="edits")
    return Problem(500, str(error) if isinstance(error, GlassformerError) else f"The answer failed inside the server ({type(error).__name__}).")


def _tell(loop: asyncio.AbstractEventLoop, do: Callable[[], object], _: object = None) -> None:
    """Do something on the loop, from the engine's thread; a loop that has ended needs to know nothing."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(do)


def _finite(x: float) -> float:
    return x if math.isfinite(x) else LEAST


def _add(made: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
    made["tokens"].append(text)
    made["token_logprobs"].append(None if logprob is None else _finite(logprob))
    made["top_logprobs"].append(None if top is None else {k: _finite(v) for k, v in top.items()} | ({} if logprob is None else {text: _finite(logprob)}))
    made["text_offset"].append(offset)


def _joined(before: dict[str, Any], after: dict[str, Any], offset: int) -> dict[str, Any]:
    """The logprobs of a prompt and of what follows it."""
    after["text_offset"] = [offset + at for at in after["text_offset"]]
    return {name: before[name] + after[name] for name in before}
