"""Chat templates: messages to the one text that a model was trained to continue.

    messages ──► checked, copied to plain data ──► template (Jinja, in a sandbox) ──► text ──► Tokenizer.encode
                                                        ▲
                    special tokens, tools, documents, add_generation_prompt

A template is a small program that came with a checkpoint, so a stranger wrote it. The sandbox keeps it from the interpreter: no attribute that begins
with an underscore, no import, no file, nothing of the caller changed, and it sees copies made of strings, numbers, lists and dicts only. It also
bounds what a template can waste by the obvious means: the steps of all loops together, one ``range``, repetition of strings and lists, powers, padding,
and the length of the text. It does **not** bound time or memory in general (a string that doubles itself in a loop grows fast), and it cannot tell whether the
text is what the model's makers meant. Run templates of people you do not trust at all in a process that may be killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

STEPS = 5_000_000
"""Rounds that all loops of one rendering may take together: some seconds; real templates take thousands."""
LONGEST = 100_000_000
"""Characters of a text, items of a list, bits of a power."""
HALF = "\U000f0f0f"
"""Marks where the last message ends while it is being continued: a private character that no text holds."""
BUDGET = "loop steps"  # a variable of every rendering; no template can say a name with a space
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which templates and services know what a model thought before it answered; the first is the usual one."""


class ChatTemplate:
    """A template and the special tokens that it may write: ``ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})``.

    Raises TokenizerError if the source is not Jinja. The module's text says what the sandbox protects from, and what not.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        self.source, self.special = source, dict(special or {})
        self._template = _compiled(source)

    def __repr__(self) -> str:
        return f"ChatTemplate({self.source[:40]!r}, {self.special})"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        ``messages`` are ``{"role": "user", "content": "Hi"}`` and so on; ``content`` is text, or a list of ``{"type": "text", "text": …}``.
        ``add_generation_prompt`` ends with the beginning of an answer. ``continue_final_message`` ends in the middle of the last message instead,
        so that the model goes on with it. ``tools`` are JSON schemas of functions, ``documents`` are ``{"title": …, "text": …}``, where a template knows them;
        ``variables`` are whatever else it reads (``enable_thinking=False``).

        Raises TokenizerError for messages that are none, and with the template's own words where it refuses them.
        """
        chat = [_message(at, message) for at, message in enumerate(_listed(messages))]
        if continue_final_message:
            if add_generation_prompt:
                raise TokenizerError(
                    "continue_final_message=True goes on with the last message, add_generation_prompt=True begins another after it: "
                    "give add_generation_prompt=False, or leave continue_final_message out."
                )
            _mark_end(chat[-1])
        given = {
            **self.special,
            **{name: _plain(value, name) for name, value in variables.items()},
            "messages": chat,
            "tools": _mappings("tools", tools, "the JSON schema of a function"),
            "documents": _mappings("documents", documents, "{'title': …, 'text': …}"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        text = self._run({**given, BUDGET: _Steps()})
        return _until_mark(text) if continue_final_message else text

    def _run(self, given: dict[str, Any]) -> str:
        import jinja2

        parts, length = [], 0
        try:
            for part in self._template.generate(given):
                length += len(part)
                if length > LONGEST:
                    raise _too_much(f"the text is longer than {LONGEST:,} characters")
                parts.append(part)
        except jinja2.exceptions.SecurityError as error:
            raise TokenizerError(f"the chat template does what no template may: {error}. It was stopped; do not use this checkpoint's template.") from None
        except jinja2.UndefinedError as error:
            raise TokenizerError(
                f"the chat template reads what these messages lack: {error}. Give it with the messages, or as a variable of chat(…)."
            ) from None
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from None
        except TokenizerError:
            raise
        except Exception as error:  # whatever Python itself found wrong within the template: a sum of text and number, recursion without end
            raise TokenizerError(
                f"the chat template failed with {type(error).__name__}: {str(error)[:300]}. Compare the messages with those it was written for."
            ) from None
        return "".join(parts)


def template_in_config(config: Mapping[str, Any]) -> str | None:
    """The chat template of a ``tokenizer_config.json``: a string, or of several named ones the default."""
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        entry = {one.get("name"): one.get("template") for one in entry if isinstance(one, Mapping)}
    if isinstance(entry, Mapping):
        chosen = entry.get("default", next(iter(entry.values())) if len(entry) == 1 else None)
        return chosen if isinstance(chosen, str) else None
    return None


# ---------------------------------------------------------------------------------------------------------------------- messages


def _listed(messages: Any) -> list[Any]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TokenizerError(f"a conversation is a list of messages, [{{'role': 'user', 'content': 'Hi'}}], and this is {_kind(messages)}.")
    if not messages:
        raise TokenizerError("the conversation has no message: give at least one, [{'role': 'user', 'content': 'Hi'}].")
    return list(messages)


def _message(at: int, message: Any) -> dict[str, Any]:
    """One message as plain data; entries that are ``None`` are left out, as services send them and templates trip over them."""
    if not isinstance(message, Mapping):
        raise TokenizerError(f"message {at} is {_kind(message)}, not a message: write {{'role': 'user', 'content': 'Hi'}}.")
    made: dict[str, Any] = {str(key): _plain(value, f"message {at}") for key, value in message.items() if value is not None}
    role = made.get("role")
    if not isinstance(role, str):
        found = f"its role is {_kind(role)}" if role is not None else f"it has only {', '.join(map(repr, made)) or 'nothing'}"
        raise TokenizerError(f"message {at} has no 'role' that says who speaks ({found}): write 'system', 'user', 'assistant' or 'tool'.")
    content = made.get("content")
    if content is None and len(made) == 1:
        raise TokenizerError(f"message {at} of the {role} has no 'content': give the text, or '' if it says nothing.")
    if content is not None and not isinstance(content, str):
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise TokenizerError(f"the content of message {at} ({role}) is {_kind(content)}, not text: give a str, or a list of {{'type': 'text', 'text': …}}.")
        for block in content:
            if not isinstance(block.get("text", ""), str):
                raise TokenizerError(f"a part of message {at} ({role}) has a 'text' that is {_kind(block['text'])}: give a str.")
    thought = next((made[name] for name in REASONING if name in made), None)
    return made if thought is None else {"thinking": thought, **made, "reasoning_content": thought}


def _mappings(name: str, given: Any, shape: str) -> list[Any] | None:
    if given is None:
        return None
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or not all(isinstance(one, Mapping) for one in given):
        raise TokenizerError(f"{name} is a list of dicts, each {shape}, and this is {_kind(given)}.")
    return [_plain(one, name) for one in given]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of nothing but str, int, float, bool, None, list and dict: no method of the caller's objects comes near the template."""
    if depth > 100:
        raise TokenizerError(f"{where} is nested more than 100 deep: give plain data.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise TokenizerError(f"{where} holds {_kind(value)}, and a chat template takes str, int, float, bool, None, lists and dicts only.")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + HALF
        return
    for block in reversed(content or []):
        if "text" in block:
            block["text"] += HALF
            return
    raise TokenizerError(f"the last message ({message['role']}) has no text to go on with: give it a 'content', or leave continue_final_message out.")


def _until_mark(text: str) -> str:
    head, mark, _ = text.rpartition(HALF)
    if not mark:
        raise TokenizerError("the chat template leaves the last message out or rewrites it, so nothing can go on with it: use add_generation_prompt=True.")
    return head


# ---------------------------------------------------------------------------------------------------------------------- the sandbox


class _Steps:
    """What is left of :data:`STEPS` in one rendering."""

    def __init__(self) -> None:
        self.left = STEPS


def _too_much(what: str) -> Exception:
    import jinja2.exceptions

    return jinja2.exceptions.SecurityError(what)


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        line = source.splitlines()[error.lineno - 1].strip()[:80] if 0 < error.lineno <= len(source.splitlines()) else ""
        raise TokenizerError(f"the chat template is no Jinja template: line {error.lineno} ({line!r}): {error.message}. Copy the file again.") from None
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        raise TokenizerError(f"the chat template cannot be read: {error}. Copy the file again.") from None


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The dialect of Jinja that published templates are written in."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        """``{% generation %} … {% endgeneration %}`` marks what the model says; the text is the same with it and without."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def _parse(self, *arguments: Any) -> Any:
            tree = super()._parse(*arguments)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None).set_lineno(loop.lineno)
            return tree

        def unsafe_undefined(self, owner: Any, name: str) -> Any:
            raise _too_much(f"it asks for {name!r} of a {type(owner).__name__}")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, (str, list, tuple)) and isinstance(times, int) and len(many) * times > LONGEST:
                        raise _too_much(f"it repeats {len(many)} {'characters' if isinstance(many, str) else 'items'} {times} times")
            elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 10_000:
                raise _too_much(f"it computes {left} to the power of {right}")
            elif operator == "%" and isinstance(left, str):
                _check_widths(left)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *values: Any, **named: Any) -> Any:
            function_of_text = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format in its own
            owner = getattr(function_of_text, "__self__", None)
            if isinstance(owner, str):
                if any(isinstance(value, int) and value > LONGEST for value in (*values, *named.values())):
                    raise _too_much(f"it makes a text longer than {LONGEST:,} characters")
                if function_of_text.__name__ in ("format", "format_map"):
                    _check_widths(owner)
            return super().call(context, function, *values, **named)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without names that begin with an underscore: they are the interpreter's."""

        def __init__(*arguments: Any, **named: Any) -> None:
            self, rest = arguments[0], arguments[1:]
            values = dict(*rest, **named)
            for name in values:
                _no_underscore(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _no_underscore(name)
            super().__setitem__(name, value)

    @jinja2.pass_context
    def counted(context: Any, items: Any) -> Iterator[Any]:
        steps = context.resolve_or_missing(BUDGET)
        for item in items:
            steps.left -= 1
            if steps.left < 0:
                raise _too_much(f"its loops take more than {STEPS:,} steps")
            yield item

    def centred(text: Any, width: int = 80) -> str:
        return str(text).center(min(width, LONGEST))

    def formatted(text: str, *values: Any, **named: Any) -> str:
        _check_widths(str(text))
        return str(text) % (named or values)

    # Nothing is computed while a template is read: what it computes is bounded only while it runs.
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters |= {"tojson": _json, "counted": counted, "center": centred, "format": formatted}
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": Namespace, "dict": lambda *rest, **named: dict(*rest, **named)}
    del sandbox.globals["lipsum"], sandbox.globals["cycler"], sandbox.globals["joiner"]
    return sandbox


def _no_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise _too_much(f"it gives a namespace the name {name!r}")


_WIDTH = re.compile(r"\d{7,}|\*")


def _check_widths(pattern: str) -> None:
    if found := _WIDTH.search(pattern) if "%" in pattern or "{" in pattern else None:
        raise _too_much(f"it pads a text to the width {found.group()}")


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter writes ``\\u003c`` for ``<``, for web pages; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
