"""A conversation with a model, without the terminal: messages, answers, other answers, the way back.

    talk.say("Hello")          the tokens of an answer, as they come
    talk.again()               another answer to the same message; talk.choose(1) goes back to the first
    talk.back()                as if the last message had never been sent

All of it goes through one engine, whose cache keeps what was read: only what is new of a conversation is computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import files
from ..core.errors import InputError, SamplerError, did_you_mean
from ..core.fields import hints
from ..infer import Token, generation
from ..infer.engine import Engine, Request
from ..infer.named import Settings
from ..infer.trace import Choice

if TYPE_CHECKING:
    from ..weights.own import Loaded

CANDIDATES = 10
"""Of every stage of a token's trace."""
USER, MODEL = "User:", "Assistant:"
"""Who speaks, in the transcript that a model without a chat template goes on with."""
OWN = ("max_new_tokens", "seed")
ENDINGS = (".json", ".md", ".txt")


@dataclass
class Answer:
    """One answer: its text, how each of its tokens was chosen, and how it ended (None: it was stopped)."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Exchange:
    """A message, the answers that were given to it, and the one that counts."""

    message: str
    answers: list[Answer] = field(default_factory=list)
    chosen: int = 0

    @property
    def answer(self) -> Answer:
        return self.answers[self.chosen]


class Talk:
    """A conversation. Raises :class:`InputError` and :class:`SamplerError` for settings that make no sense, before the model runs."""

    def __init__(
        self,
        loaded: Loaded,
        settings: dict[str, Any],
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        seed: int | None = None,
        capacity: int = 4096,
    ):
        self.loaded, self.settings, self.system = loaded, dict(settings), system
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.exchanges: list[Exchange] = []
        generation(loaded, **self.settings)
        self.engine = Engine(loaded.model, loaded.tokenizer, slots=2, capacity=capacity, eos_id=loaded.eos_ids)

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template; without one it goes on with a transcript."""
        return bool(getattr(self.loaded.tokenizer, "chat_template", None))

    @property
    def last(self) -> Exchange:
        """The last exchange. Raises :class:`InputError` if there is none."""
        if not self.exchanges:
            raise InputError("Nothing was said yet: write a message first.")
        return self.exchanges[-1]

    # Talking

    def say(self, message: str) -> Iterator[Token]:
        """The tokens of the answer to a new message. A message that cannot be answered is forgotten, and the error raised."""
        exchange = Exchange(message)
        self.exchanges.append(exchange)
        yield from self._answer(exchange)

    def again(self) -> Iterator[Token]:
        """The tokens of another answer to the last message."""
        yield from self._answer(self.last)

    def _answer(self, exchange: Exchange) -> Iterator[Token]:
        answer = Answer()
        try:
            ids = self.ids()
            room = self.engine.capacity - (0 if hasattr(self.loaded.model, "encode") else len(ids)) + 1
            if room < 1 or len(ids) > self.engine.capacity:
                raise InputError(
                    f"The conversation has {len(ids)} tokens, and {self.engine.capacity} are held: take some of it /back, or give more --capacity."
                )
            stop = {} if self.templated else {"stop": (f"\n{USER}",)}
            options: dict[str, Any] = {**self.settings, **stop, "max_new_tokens": min(self.max_new_tokens, room), "trace": CANDIDATES}
            ticket = self.engine.submit(Request(ids, seed=self.seed, sample=len(exchange.answers), **options))
        except Exception:
            if not exchange.answers:
                self.exchanges.remove(exchange)
            raise
        exchange.answers.append(answer)
        exchange.chosen = len(exchange.answers) - 1
        try:
            for token in ticket:
                answer.text += token.text
                if token.trace is not None:
                    answer.choices.append(token.trace)
                answer.finish = token.finish_reason
                yield token
        finally:
            if not ticket.done:
                ticket.cancel()
                self.engine.step()  # which lets go of it

    def ids(self) -> list[int]:
        """The conversation as the model reads it, up to where the next answer begins."""
        if self.templated:
            return self.loaded.chat(self.messages(open_ended=True))
        lines = [] if self.system is None else [self.system, ""]
        for exchange in self.exchanges[:-1]:
            lines += [f"{USER} {exchange.message}", f"{MODEL} {exchange.answer.text.strip()}"]
        text = "\n".join([*lines, f"{USER} {self.exchanges[-1].message}", MODEL])
        tokenizer: Any = self.loaded.tokenizer
        ids: list[int] = tokenizer.prompt(text)
        return ids

    def messages(self, open_ended: bool = False) -> list[dict[str, str]]:
        """The conversation as messages; ``open_ended``: without the last answer."""
        made = [] if self.system is None else [{"role": "system", "content": self.system}]
        for i, exchange in enumerate(self.exchanges):
            made.append({"role": "user", "content": exchange.message})
            if not (open_ended and i == len(self.exchanges) - 1):
                made.append({"role": "assistant", "content": exchange.answer.text})
        return made

    # The way back, and other ways

    def back(self) -> Exchange:
        """Take the last exchange back; it is returned."""
        _ = self.last
        return self.exchanges.pop()

    def choose(self, number: int) -> Answer:
        """Let the answer of that number (from 1) be the one that counts."""
        last = self.last
        count = len(last.answers)
        if not 1 <= number <= count:
            raise InputError(f"The last message has {count} answer{'s' if count > 1 else ''}, so there is no number {number}: /branch alone makes another.")
        last.chosen = number - 1
        return last.answer

    def why(self, back: int = 1) -> Choice:
        """How the last token of the last answer was chosen, or the ``back``-th last."""
        choices = self.last.answer.choices
        if not 1 <= back <= len(choices):
            raise InputError(f"The last answer has {len(choices)} tokens, so none is the {back}-th last: /why takes a number from 1 to {len(choices)}.")
        return choices[-back]

    # Settings

    def set(self, name: str, value: Any) -> None:
        """Change a setting; None takes it away. Raises :class:`SamplerError` for a name or a value that makes no sense, and changes nothing then."""
        name = name.replace("-", "_")
        known = (*OWN, *hints(Settings))
        if name not in known:
            raise SamplerError(f"There is no setting {name!r}.{did_you_mean(name, known)}")
        if name in OWN:
            least = 1 if name == "max_new_tokens" else 0
            if (value is None and least) or (value is not None and (type(value) is not int or value < least)):
                raise SamplerError(f"{name} is a whole number of {least} or more, but {value!r} was given.")
            setattr(self, name, value)
            return
        tried = {k: v for k, v in {**self.settings, name: value}.items() if v is not None}
        generation(self.loaded, **tried)
        if tried.get("temperature") == 0:  # which would leave a wrong filter unnoticed until the temperature rises
            generation(self.loaded, **{**tried, "temperature": 1.0})
        self.settings = tried

    @property
    def chain(self) -> str:
        """What is done with the model's distribution, in which order."""
        return str(generation(self.loaded, seed=self.seed, **self.settings))

    # Files

    def save(self, path: str) -> Path:
        """Write the conversation: .json has all of it, .md and .txt what was said. Raises :class:`InputError` if it cannot be written."""
        target = Path(path).expanduser()
        kind = target.suffix.lower()
        if kind not in ENDINGS:
            raise InputError(f"{target.name!r} ends in {kind or 'nothing'!r}, but the ending says how a conversation is written: {', '.join(ENDINGS)}.")
        return files.save(target, self._written(kind))

    def _written(self, kind: str) -> str:
        if kind == ".json":
            others = [{"message": e.message, "answers": [a.text for a in e.answers], "chosen": e.chosen} for e in self.exchanges]
            settings = {**self.settings, "seed": self.seed, "max_new_tokens": self.max_new_tokens}
            return json.dumps({"messages": self.messages(), "exchanges": others, "settings": settings}, ensure_ascii=False, indent=1, default=str) + "\n"
        marks = ("## {}\n\n{}\n", "\n") if kind == ".md" else ("{}: {}", "\n")
        return marks[1].join(marks[0].format(m["role"].capitalize(), m["content"].strip()) for m in self.messages()) + "\n"
