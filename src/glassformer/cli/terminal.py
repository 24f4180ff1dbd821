"""The terminal of ``glassformer chat``: reads lines, prints tokens as they come, and knows the commands.

a line ──► begins with "/"? ──► command
                  │ no
                  └──► message ──► tokens, as they come (Ctrl-C stops them)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.errors import GlassformerError, InputError, did_you_mean
from .spoken import as_typed

if TYPE_CHECKING:
    from ..infer import Token
    from .talk import Talk

COMMANDS = {
    "/back": ("", "take the last message and its answer back"),
    "/branch": ("[N]", "another answer to the same message; with a number, go on from answer N"),
    "/why": ("[N]", "how the last token was chosen, or the N-th last"),
    "/set": ("NAME VALUE", "a setting: /set temperature 0.5, max_new_tokens 200, seed 7; off takes it away"),
    "/show": ("", "the settings, and how long the conversation is"),
    "/system": ("[TEXT]", "what the model is told before the first message; nothing takes it away"),
    "/save": ("FILE", "write the conversation: .json, .md or .txt"),
    "/help": ("", "this list"),
    "/quit": ("", "end; Ctrl-D does too"),
}


class Terminal:
    """``interactive`` False: what is read is no person's typing, so only the answers are printed, and mistakes go to standard error."""

    def __init__(self, talk: Talk, *, interactive: bool = True, console: Console | None = None, lines: Iterable[str] | None = None):
        self.talk, self.interactive = talk, interactive
        self.console = console or Console(highlight=False)
        self.lines = None if lines is None else iter(lines)
        self.mistakes = 0

    def run(self) -> int:
        """Until the lines end; the exit code: 2 if a line that was no person's typing was a mistake."""
        if self.interactive:
            self._greet()
            with suppress(ImportError):
                import readline  # noqa: F401 : arrow keys, and what was written before
        while (line := self._read()) is not None:
            try:
                if not self.line(line):
                    break
            except GlassformerError as error:
                self._complain(str(error))
            except KeyboardInterrupt:
                self.console.print()
        return 2 if self.mistakes and not self.interactive else 0

    def line(self, line: str) -> bool:
        """Do what a line says; whether to go on."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/") or text.startswith("//"):
            self._print(self.talk.say(text.removeprefix("/") if text.startswith("//") else text))
            return True
        name, _, rest = text.partition(" ")
        if name not in COMMANDS:
            raise InputError(f"There is no command {name}.{did_you_mean(name, COMMANDS)} /help lists them; a message that begins with / is written with two.")
        if name == "/quit":
            return False
        getattr(self, f"_{name[1:]}")(rest.strip())
        return True

    # Reading and printing

    def _read(self) -> str | None:
        if self.lines is not None:
            line = next(self.lines, None)
            if line is not None and self.interactive:
                self.console.print(Text.assemble(("> ", "bold cyan"), line.rstrip("\n")))
            return line
        if not self.interactive:
            raw = sys.stdin.buffer.readline()
            try:
                return raw.decode("utf-8") if raw else None
            except UnicodeDecodeError as error:
                raise InputError(f"Standard input is not UTF-8 text (byte {error.start} of a line is 0x{raw[error.start]:02x}): convert it first.") from error
        while True:
            try:
                said = input("\001\x1b[1;36m\002> \001\x1b[0m\002" if self.console.is_terminal and not self.console.no_color else "> ")
                while said.endswith("\\"):
                    said = said[:-1] + "\n" + input("  ")
                return said
            except EOFError:
                self.console.print()
                return None
            except KeyboardInterrupt:
                self.console.print("\n[dim]Ctrl-C stops an answer; /quit or Ctrl-D ends.[/]")

    def _print(self, tokens: Iterable[Token]) -> None:
        reason: str | None = "stopped"
        begun = self.talk.templated  # a transcript's answer begins with the space after "Assistant:"
        try:
            for token in tokens:
                text = token.text if begun else token.text.lstrip()
                begun = begun or bool(text)
                self._out(text)
                reason = token.finish_reason
        except KeyboardInterrupt:
            with suppress(AttributeError):
                tokens.close()  # type: ignore[attr-defined]
            reason = "stopped"
        self._out("\n")
        if self.interactive and reason not in ("eos", "stop"):
            said = {"length": f"after {self.talk.max_new_tokens} tokens, or where the context ends", "stopped": "stopped"}.get(str(reason), "stopped")
            self.console.print(f"[dim]({said})[/]")

    def _out(self, text: str) -> None:
        """Text as it is: nothing in it is markup, and no control character of it reaches the terminal."""
        plain = _harmless(text)
        if self.console.is_terminal or self.console.record:
            self.console.print(Text(plain), end="", soft_wrap=True)
        else:
            self.console.file.write(text)
        self.console.file.flush()

    def _complain(self, text: str) -> None:
        self.mistakes += 1
        text = as_typed(text, {})  # a setting here bears the name that it has in Python
        if self.interactive:
            self.console.print(Text.assemble(("error: ", "red"), text))
        else:
            print(f"error: {text}", file=sys.stderr)

    def _greet(self) -> None:
        talk = self.talk
        how = "its chat template" if talk.templated else "no chat template: it goes on with a transcript"
        size = f"{talk.loaded.model.params().total:,} parameters"
        self.console.print(f"[bold]{type(talk.loaded.model.spec).__name__}[/] [dim]{size} · {talk.engine.capacity:,} tokens · {how} · /help[/]")

    # Commands

    def _back(self, rest: str) -> None:
        _nothing("/back", rest)
        gone = self.talk.back()
        self.console.print(Text.assemble(("taken back: ", "dim"), _short(gone.message)))

    def _branch(self, rest: str) -> None:
        if rest:
            answer = self.talk.choose(_number("/branch", rest))
            self._out(answer.text + "\n")
            return
        self._print(self.talk.again())
        table = Table(box=None, show_header=False, padding=(0, 1))
        for i, answer in enumerate(self.talk.last.answers):
            here = i == self.talk.last.chosen
            table.add_row(Text("●" if here else " ", style="cyan"), Text(str(i + 1), style="bold"), Text(_short(answer.text), style="" if here else "dim"))
        self.console.print(table)
        self.console.print("[dim]/branch N goes on from answer N.[/]")

    def _why(self, rest: str) -> None:
        self.console.print(self.talk.why(_number("/why", rest) if rest else 1))

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        value = value.strip()
        if not name or not value:
            raise InputError("/set takes a name and a value: /set temperature 0.5; /set temperature off takes it away, /show says what is set.")
        self.talk.set(name, None if value == "off" else _value(value))
        if self.interactive:
            self.console.print(Text(self.talk.chain, style="dim"))

    def _show(self, rest: str) -> None:
        _nothing("/show", rest)
        talk = self.talk
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        held = f"{talk.engine.stats().prefix_tokens:,} tokens lay in the cache already and were not read again"
        rows: list[tuple[str, str]] = [("sampler", talk.chain), ("max_new_tokens", str(talk.max_new_tokens))]
        rows += [("seed", "none" if talk.seed is None else str(talk.seed)), ("system", talk.system or "none")]
        rows += [("messages", str(len(talk.exchanges))), ("tokens", f"{_tokens(talk)} of {talk.engine.capacity:,}"), ("reused", held)]
        for name, value in rows:
            table.add_row(Text(name, style="dim"), Text(value))
        self.console.print(table)

    def _system(self, rest: str) -> None:
        self.talk.system = rest or None
        if self.interactive:
            self.console.print("[dim]It holds from the next answer on.[/]")

    def _save(self, rest: str) -> None:
        if not rest:
            raise InputError("/save takes a file: /save talk.json, or talk.md.")
        self.console.print(Text(f"wrote {self.talk.save(rest)}", style="dim"))

    def _help(self, rest: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, (takes, does) in COMMANDS.items():
            table.add_row(Text.assemble((name, "bold"), " ", (takes, "cyan")), Text(does))
        self.console.print(table)
        self.console.print("[dim]A line that ends in \\ goes on in the next. Ctrl-C stops an answer.[/]")


def _nothing(name: str, rest: str) -> None:
    if rest:
        raise InputError(f"{name} takes nothing, but {rest!r} was given.")


def _number(name: str, rest: str) -> int:
    if not (rest.isascii() and rest.isdigit() and len(rest) < 9):
        raise InputError(f"{name} takes a number from 1 on, but {rest!r} was given.")
    return int(rest)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _harmless(text: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _short(text: str, most: int = 70) -> str:
    line = " ".join(_harmless(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _tokens(talk: Talk) -> int:
    if not talk.exchanges:
        return 0
    return len(talk.ids()) + len(talk.exchanges[-1].answer.choices)
