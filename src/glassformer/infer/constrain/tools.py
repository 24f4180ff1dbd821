"""Calls of tools: what the model may write so that it calls a function, and what it wrote, read back.

    form = ToolForm.of(tokenizer.chat_template)                       # how this family of models writes a call
    prompt = tokenizer.chat(messages, tools=tools)                    # the template shows the tools to the model
    rule = form.constraint(tools, tool_choice="auto")                 # None: nothing to rule
    out = generate(model, prompt, tokenizer=tokenizer, constraint=rule)
    content, calls = form.parse(out.text)                             # ("Let me see.", [ToolCall("weather", '{"city": "Rome"}')])

``tools`` and ``tool_choice`` are those of OpenAI's chat API. The forms, each by what a template of its family says:

========  ==================================================================================  =========================
hermes    ``<tool_call>`` line feed ``{"name": "f", "arguments": {…}}`` line feed             Hermes, Qwen 2.5 and 3
          ``</tool_call>``, as often as needed, with text in front
llama     ``{"name": "f", "parameters": {…}}`` as the whole answer                            Llama 3.1 to 3.3
mistral   ``[TOOL_CALLS]`` ``[{"name": "f", "arguments": {…}}, …]``                           Mistral, Nemo, Mixtral
args      ``[TOOL_CALLS]f[ARGS]{…}``, as often as needed                                      Mistral from 2025 on
plain     ``{"name": "f", "arguments": {…}}`` as the whole answer                             any other template
========  ==================================================================================  =========================

A template that reads no ``tools`` (:meth:`ToolForm.shown_by`) leaves the model in the dark: put :meth:`ToolForm.instructions` into the system message.
With "auto" a model may write text instead: in the forms with a mark the rule begins to bind at the mark, wherever it comes; in the others an
answer that begins with "{" is a call. "required" leaves no room for text, and so none for a model to think in before it calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from glassformer.core.errors import InputError
from glassformer.core.spec import Spec, part

from .rules import TextRule, embedded, quoted
from .vocabulary import Vocabulary

Kind = Literal["hermes", "llama", "mistral", "args", "plain"]
OPEN, ARGS = "[TOOL_CALLS]", "[ARGS]"  # Mistral's
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


@dataclass(frozen=True)
class ToolCall:
    """One call: the function's name, and its arguments as JSON text, as OpenAI's API hands them on."""

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments as a dict."""
        found: dict[str, Any] = json.loads(self.arguments)
        return found


@part
class Tool(Spec):
    """A function that may be called: its name, and the JSON schema of its arguments as text."""

    name: str
    schema: str

    @staticmethod
    def read(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
        """From ``[{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}]``; the inner dict alone is fine too.

        No ``parameters`` is a function without arguments. Raises :class:`InputError`, which says the number of the tool, for anything else.
        """
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise InputError("tools is a list of functions: [{'type': 'function', 'function': {'name': …, 'parameters': {…}}}].")
        made: dict[str, Tool] = {}
        for at, given in enumerate(tools):
            if not isinstance(given, Mapping) or given.get("type", "function") != "function":
                raise InputError(f"tools[{at}] is no function: only {{'type': 'function', 'function': {{…}}}} is known here.")
            function = given.get("function", given)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise InputError(f"tools[{at}] has the name {name!r}: a function's name is 1 to 128 letters, digits, '_', '-' and '.'.")
            schema = function.get("parameters")
            schema = {"type": "object", "properties": {}, "additionalProperties": False} if schema is None or schema == {} else schema
            if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
                raise InputError(f"The parameters of tools[{at}] ({name}) are a JSON schema of type 'object', but {str(schema)[:80]} was given.")
            if name in made:
                raise InputError(f"tools[{at}] is the second function named {name!r}: names tell them apart.")
            made[name] = Tool(name, json.dumps({"type": "object", **schema}, ensure_ascii=False))
        return tuple(made.values())


@part
class Calls(TextRule):
    """The rule of calls: made by :meth:`ToolForm.constraint`. ``text``: whether the answer may be text in place of a call."""

    kind: str
    tools: tuple[Tool, ...]
    text: bool
    parallel: bool = True
    what: ClassVar[str] = "form of tool calls"

    def __repr__(self) -> str:
        return f"Calls({self.kind!r}, {[tool.name for tool in self.tools]}, text={self.text}, parallel={self.parallel})"

    def lark(self, vocabulary: Vocabulary) -> str:
        key = "parameters" if self.kind == "llama" else "arguments"
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(self.tools)))}"]
        for i, tool in enumerate(self.tools):
            head, schema = quoted(f'{{"name": {json.dumps(tool.name)}, "{key}": '), embedded(json.loads(tool.schema))
            plain = f'call_{i}: {head} {schema} "}}"'
            rules.append(f"call_{i}: {quoted(tool.name)} {_mark(ARGS, vocabulary)} {schema}" if self.kind == "args" else plain)
        return "\n".join([*getattr(self, f"_{self.kind}")(vocabulary), *rules]) + "\n"

    def _hermes(self, vocabulary: Vocabulary) -> list[str]:
        again = "*" if self.parallel else ""
        close = _mark("</tool_call>", vocabulary)
        rules = [f'body: "\\n" call "\\n" {close}']
        first, lead = _lead("<tool_call>", vocabulary)
        if not self.text:
            opening = _mark("<tool_call>", vocabulary)
            return [f'start: {opening} body ("\\n" {opening} body){again}' if self.parallel else f"start: {opening} body", *rules]
        return [f"start: ({first} body){again or '?'} TEXT", *lead, *rules]

    def _mistral(self, vocabulary: Vocabulary) -> list[str]:
        many = '(", " call)*' if self.parallel else ""
        rules = [f'body: /\\[/ call {many} "]"']
        first, lead = _lead(OPEN, vocabulary)
        opening = _mark(OPEN, vocabulary)
        if not self.text:
            return [f"start: {opening} / ?/ body", *rules]
        return [f"start: {first} / ?/ body | TEXT", *lead, *rules]

    def _args(self, vocabulary: Vocabulary) -> list[str]:
        opening = _mark(OPEN, vocabulary)
        more = f"({opening} call)*" if self.parallel else ""
        if not self.text:
            return [f"start: {opening} call {more}"]
        first, lead = _lead(OPEN, vocabulary)
        return [f"start: {first} call {more} | TEXT", *lead]

    def _llama(self, vocabulary: Vocabulary) -> list[str]:
        return [f"start: call{' | TEXT' if self.text else ''}", *([r"TEXT: /([ \t\r\n]*[^{ \t\r\n](?s:.)*)?/"] if self.text else [])]

    _plain = _llama


def _mark(text: str, vocabulary: Vocabulary) -> str:
    """A mark in a grammar: the special token of that spelling, or else its text."""
    return f"<[{vocabulary.special[text]}]>" if text in vocabulary.special else quoted(text)


def _lead(mark: str, vocabulary: Vocabulary) -> tuple[str, list[str]]:
    """What stands for "any text up to the mark" in a grammar, and the rules that it needs."""
    spelled = re.escape(mark).replace("/", r"\/")
    text = f"TEXT: /(?s:.)*/ & ~/(?s:.)*{spelled}(?s:.)*/"  # the mark is never mere text
    if mark in vocabulary.special:
        return f"TEXT {_mark(mark, vocabulary)}", [text]
    return "lead", [f"lead[lazy]: /(?s:.)*/ {quoted(mark)}", text]


@part
class ToolForm(Spec):
    """How a family of models writes calls: ``ToolForm("hermes")``, or :meth:`of` its chat template."""

    kind: Kind = "plain"

    @staticmethod
    def of(chat_template: str | None) -> ToolForm:
        """By what the template's text says; "plain" where it says nothing of tools, or in a way not known here."""
        text = chat_template or ""
        if OPEN in text and "[CALL_ID]" not in text:
            return ToolForm("args" if ARGS in text else "mistral")
        if "<tool_call>" in text and "<function=" not in text and "<arg_key>" not in text:
            return ToolForm("hermes")
        if re.search(r"\"parameters\\?\"\s*:", text) and re.search(r"\\?\"name\\?\"\s*:", text) and ("<|python_tag|>" in text or "ipython" in text):
            return ToolForm("llama")
        return ToolForm("plain")

    @property
    def mark(self) -> str | None:
        """What begins a call within a text; None: a call is the whole answer."""
        return {"hermes": "<tool_call>", "mistral": OPEN, "args": OPEN}.get(self.kind)

    @staticmethod
    def shown_by(chat_template: str | None) -> bool:
        """Whether a template reads ``tools``, and so shows them to the model."""
        return re.search(r"{[%{](?:(?![%}]}).)*\btools\b", chat_template or "", re.DOTALL) is not None

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A text for the system message that shows the tools and the form of a call, for templates that do not. Raises as :meth:`constraint`."""
        known = Tool.read(tools)
        functions = [given.get("function", given) for given in tools]
        shown = "\n".join(json.dumps({k: f[k] for k in ("name", "description", "parameters") if k in f}, ensure_ascii=False) for f in functions)
        key = "parameters" if self.kind == "llama" else "arguments"
        call = f'{{"name": "{known[0].name if known else "f"}", "{key}": {{…}}}}'
        said = {"hermes": f"<tool_call>\n{call}\n</tool_call>", "mistral": f"{OPEN} [{call}]", "args": f"{OPEN}{known[0].name if known else 'f'}{ARGS}{{…}}"}
        return f"You can call these functions:\n{shown}\nTo call one, answer in this form alone:\n{said.get(self.kind, call)}"

    def constraint(self, tools: Sequence[Mapping[str, Any]], tool_choice: Any = "auto", *, parallel: bool = True) -> TextRule | None:
        """The rule of an answer: give it to ``generate(constraint=…)``. None where there is nothing to rule: no tools, or "none".

        ``tool_choice``: "auto" (text, or calls), "required" (a call or more), "none", or ``{"type": "function", "function": {"name": …}}`` (one call of it).
        ``parallel=False``: one call at most. Raises :class:`InputError` for tools and choices that are none; a schema of arguments that cannot be
        used is a :class:`SamplerError` of ``generate``, before the model runs.
        """
        known = Tool.read(tools)
        if isinstance(tool_choice, Mapping):
            function = tool_choice.get("function", tool_choice)
            name = function.get("name") if isinstance(function, Mapping) else None
            chosen = tuple(tool for tool in known if tool.name == name)
            if not chosen:
                raise InputError(f"tool_choice asks for the function {name!r}, but tools has {', '.join(tool.name for tool in known) or 'none'}.")
            return Calls(self.kind, chosen, text=False, parallel=False)
        if tool_choice is None:
            tool_choice = "auto"
        if tool_choice not in ("auto", "none", "required"):
            raise InputError(f"tool_choice is 'auto', 'none', 'required' or {{'type': 'function', 'function': {{'name': …}}}}, but {tool_choice!r} was given.")
        if tool_choice == "required" and not known:
            raise InputError("tool_choice is 'required', but there are no tools: give some, or take 'auto'.")
        return None if tool_choice == "none" or not known else Calls(self.kind, known, text=tool_choice == "auto", parallel=parallel)

    def parse(self, text: str) -> tuple[str | None, list[ToolCall]]:
        """What an answer says: its text (None if there is none beside calls), and its calls. What is no whole call stays text."""
        parser = self.parser()
        parts = [*parser.push(text), *parser.flush()]
        calls = [part for part in parts if isinstance(part, ToolCall)]
        content = "".join(part for part in parts if isinstance(part, str))
        if calls:
            content = content.strip()
        return content or (None if calls else ""), calls

    def parser(self) -> ToolParser:
        """For an answer that comes in pieces."""
        return ToolParser(self)


class ToolParser:
    """Text that comes in pieces, told apart: :meth:`push` gives the text that may be shown and the calls that are whole, in order.

    What may become a call is held back until it is one, or is none; :meth:`flush` gives what is held at the end.
    """

    def __init__(self, form: ToolForm):
        self.form = form
        self._held = ""
        self._begun = False  # whether text was given out
        self._after = False  # whether a call was: then space between calls is no text

    def push(self, text: str) -> list[str | ToolCall]:
        """The parts that this text makes certain."""
        self._held += text
        return self._marked() if self.form.mark else self._whole(last=False)

    def flush(self) -> list[str | ToolCall]:
        """What is left."""
        parts = self._marked(last=True) if self.form.mark else self._whole(last=True)
        rest, self._held = self._held, ""
        return parts + self._text(rest)

    def _text(self, text: str) -> list[str | ToolCall]:
        if not text or (self._after and not text.strip()):
            return []
        self._begun = True
        return [text]

    def _marked(self, last: bool = False) -> list[str | ToolCall]:
        parts: list[str | ToolCall] = []
        mark = self.form.mark or ""
        while True:
            at = self._held.find(mark)
            if at < 0:
                keep = 0 if last else next((n for n in range(min(len(mark) - 1, len(self._held)), 0, -1) if mark.startswith(self._held[-n:])), 0)
                end = len(self._held) - keep
                if self._after and not self._held[:end].strip():
                    return parts
                text, self._held = self._held[:end], self._held[end:]
                return parts + self._text(text)
            parts += self._text(self._held[:at])
            self._held = self._held[at:]
            found, used = self._body(self._held[len(mark) :])
            if found is None:
                if used < 0:  # it is no call: the mark was text
                    parts += self._text(mark)
                    self._held = self._held[len(mark) :]
                    continue
                return parts
            parts += found
            self._after = True
            self._held = self._held[len(mark) + used :]

    def _body(self, text: str) -> tuple[list[ToolCall] | None, int]:
        """The calls behind a mark and how much of the text they take; None and 0 if more must come, None and -1 if it is none."""
        if self.form.kind == "args":
            name, sign, rest = text.partition(ARGS)
            if not sign:
                started = any(name.endswith(ARGS[:n]) for n in range(1, len(ARGS)))
                whole = name.rpartition("[")[0] if started else name
                return None, 0 if not whole or NAME.fullmatch(whole) else -1
            value, used = _json(rest)
            if used > 0 and (not NAME.fullmatch(name) or not isinstance(value, dict)):
                return None, -1
            return ([ToolCall(name, json.dumps(value, ensure_ascii=False))], len(name) + len(sign) + used) if used > 0 else (None, used)
        value, used = _json(text)
        if used <= 0:
            return None, used
        calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
        found = [call for call in calls if call is not None]
        if len(found) < len(calls) or not found:
            return None, -1
        if self.form.kind == "hermes":
            rest = text[used:].lstrip()
            if not rest.startswith("</tool_call>"):
                return None, 0 if "</tool_call>".startswith(rest) else -1
            used = len(text) - len(rest) + len("</tool_call>")
        return found, used

    def _whole(self, last: bool) -> list[str | ToolCall]:
        """A call as the whole answer; more of them with line feeds, commas or semicolons between."""
        start = self._held.removeprefix("<|python_tag|>") if not self._begun else ""
        if self._begun or (start.strip() and not start.lstrip().startswith(("{", "[", "<"))):
            text, self._held = self._held, ""
            return self._text(text)
        if not last:
            return []
        found: list[ToolCall] = []
        rest = start
        while rest.strip(" \n\t;,"):
            value, used = _json(rest.lstrip(" \n\t;,"))
            call = [_call(one) for one in (value if isinstance(value, list) else [value])] if used > 0 else []
            if not call or None in call:
                return []
            found += [one for one in call if one is not None]
            rest = rest.lstrip(" \n\t;,")[used:]
        if found:
            self._held, self._after = "", True
        return [*found]


_DECODER = json.JSONDecoder()


def _json(text: str) -> tuple[Any, int]:
    """The JSON value at the beginning of a text and its length; 0 if more must come, -1 if it is none."""
    start = len(text) - len(text.lstrip())
    if start == len(text):
        return None, 0
    if text[start] not in "{[":
        return None, -1
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1 if _closed(text[start:]) else 0
    return value, end


def _closed(text: str) -> bool:
    """Whether every bracket of a text that begins with one is closed, and yet it is no JSON."""
    depth, inside, escaped = 0, False, False
    for character in text:
        if inside:
            inside, escaped = (character != '"' or escaped), (character == "\\" and not escaped)
        elif character == '"':
            inside = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return True
    return False


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as text, as the API does
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
