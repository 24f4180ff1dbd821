"""Chat templates: messages to the one text that a model was trained to continue.

    messages ──► checked, copied to plain data ──► template (Jinja, in a sandbox) ──► text ──► Tokenizer.encode
                                                        ▲
                    special tokens, tools, documents, add_generation_prompt

A template is a small program that came with a checkpoint, so a stranger wrote it. The sandbox keeps it from the interpreter: no attribute that begins
with an underscore, no import, no file, nothing of the caller changed, and it sees copies made of strings, numbers, lists and dicts only. It also
bounds what a template can waste:

- the length of one text or list (:data:`LONGEST`), whether it is repeated, added, joined, sliced, replaced, padded, indented, captured or written as JSON;
- rounds of loops, calls, filters and the length of all that is made, out of one budget (:data:`STEPS`): a macro that calls itself twice ends, and so
  does a list of large texts;
- the bits of products and powers (:data:`BITS`), one ``range`` (Jinja's own 100,000), recursion (Python's own).

It does **not** bound what one step costs beyond that (sorting, comparing or searching a text of the largest size again and again can take hours), and a
rendering within its bounds may hold one or two gigabytes for a moment. It cannot tell whether the text is what the model's makers meant. Run templates
of people you do not trust at all in a process that may be killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from ..core.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

STEPS = 2_000_000
"""What one rendering may spend: a round of a loop, a filter and 64 characters of a text cost 1, a call 4. Some seconds; real templates take thousands."""
LONGEST = 16_000_000
"""Characters of a text, items of a list."""
BITS = 10_000
"""Bits of a product or power."""
HALF = "\U000f0f0f"
"""Marks where the last message ends while it is being continued: a private character that no text holds."""
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
        text = self._run(given)
        return _until_mark(text) if continue_final_message else text

    def _run(self, given: dict[str, Any]) -> str:
        import jinja2

        parts, length = [], 0
        token = _BUDGET.set(_Steps())
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
        finally:
            _BUDGET.reset(token)
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
    """One message as plain data; entries that are ``None`` are left out, as the reference library does: services send them, and templates trip over them."""
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


_BUDGET: ContextVar[_Steps] = ContextVar("steps")


def _too_much(what: str) -> Exception:
    import jinja2.exceptions

    return jinja2.exceptions.SecurityError(what)


def _spend(steps: int) -> None:
    budget = _BUDGET.get(None)
    if budget is None:  # a constant that the compiler would compute: it is left for the rendering, where it counts
        from jinja2 import nodes

        raise nodes.Impossible
    budget.left -= steps
    if budget.left < 0:
        raise _too_much(f"its loops, calls and texts take more than {STEPS:,} steps")


def _fits(size: int) -> None:
    if size > LONGEST:
        raise _too_much(f"it makes a text or list longer than {LONGEST:,}")


def _made(value: Any, each: int = 8) -> Any:
    """``value``, paid for by its length: texts by 64 characters, lists by ``each`` items (8 places in memory, 1 if the items were made as well)."""
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _fits(len(value))
        _spend(len(value) // (64 if isinstance(value, (str, bytes)) else each))
    return value


def _written(value: Any, width: int = 0) -> int:
    """About how many characters ``value`` has when it is written out, ``width`` more per item and level; an error above :data:`LONGEST`.

    A list may hold another one many times, so that a few dozen steps make one that no memory could hold in writing.
    """
    if isinstance(value, (str, bytes)):
        return len(value)
    total, todo = 0, [(value, 1)]
    while todo:
        one, depth = todo.pop()
        one = getattr(one, "_Namespace__attrs", one) if not isinstance(one, (str, Mapping)) else one
        inside: Any = ()
        if isinstance(one, Mapping):
            inside = [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, KeysView, ValuesView, ItemsView)):
            inside = one
        total += len(one) if isinstance(one, (str, bytes)) else 4 + len(inside) * (2 + width * depth)
        _fits(total)
        todo += [(x, depth + 1) for x in inside]
    _spend(total // 64)
    return total


def _widest(values: Any) -> int:
    return max((_written(value) for value in values), default=0)


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
    import markupsafe
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Generation(jinja2.ext.Extension):
        """``{% generation %} … {% endgeneration %}`` marks what the model says; the text is the same with it and without."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, *arguments: Any) -> Any:
            return Counting().visit(super()._parse(*arguments))

        def unsafe_undefined(self, owner: Any, name: str) -> Any:
            raise _too_much(f"it asks for {name!r} of a {type(owner).__name__}")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int) and len(many) * times > LONGEST:
                        raise _too_much(f"it repeats {len(many)} {'characters' if isinstance(many, str) else 'items'} {times} times")
                if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > BITS:
                    raise _too_much(f"it computes a product of more than {BITS:,} bits")
            elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > BITS:
                raise _too_much(f"it computes a power of more than {BITS:,} bits")
            elif operator == "%" and isinstance(left, (str, bytes)):
                _check_format(left, "%", right if isinstance(right, tuple) else (right,))
            return _made(super().call_binop(context, operator, left, right))

        def call(self, context: Any, function: Any, *values: Any, **named: Any) -> Any:
            function_of_text = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format in its own
            owner = getattr(function_of_text, "__self__", None)
            _spend(4)
            if isinstance(owner, (str, bytes, int)):
                for value in (*values, *named.values()):
                    _fits(value if isinstance(value, int) else 0)
            if isinstance(owner, (str, bytes)):
                values = _checked_method(function_of_text.__name__, owner, values, named)
            return _made(super().call(context, function, *values, **named), each=1)

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

    class Counting(NodeTransformer):
        """Puts a filter around all that makes texts or takes steps without a call of its own: loops, ``~``, slices, captured blocks, long literals."""

        def visit_For(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.iter = around(node.iter, "counted")
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return around(nodes.List(node.nodes).set_lineno(node.lineno), "glued")

        def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return around(node, "made") if isinstance(node.arg, nodes.Slice) else node

        def visit_AssignBlock(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.filter = nodes.Filter(node.filter, "made", [], [], None, None).set_lineno(node.lineno)
            return node

        def visit_Output(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            long = lambda n: isinstance(n, nodes.TemplateData) and len(n.data) > 64
            node.nodes = [around(nodes.Const(n.data).set_lineno(node.lineno), "literal") if long(n) else n for n in node.nodes]
            return node

    def around(node: Any, name: str) -> Any:
        return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)

    def counted(items: Any) -> Iterator[Any]:
        for item in items:
            _spend(1)
            yield item

    @jinja2.pass_eval_context
    def glued(context: Any, items: list[Any]) -> str:
        _written(items)
        return (jinja2.runtime.markup_join if context.autoescape else jinja2.runtime.str_join)(items)

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            _spend(len(value) // 64)
        elif not isinstance(value, (int, float, type(None))):
            _written(value)
        return value

    # Nothing is computed while a template is read: what it computes is bounded only while it runs.
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=shown, extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters |= {"tojson": _json, "glued": glued, "made": lambda value: value, "literal": markupsafe.Markup}
    sandbox.filters = {name: _bounded(name, function) for name, function in sandbox.filters.items()} | {"counted": counted}
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": Namespace, "dict": lambda *rest, **named: dict(*rest, **named)}
    del sandbox.globals["lipsum"]  # words at random
    return sandbox


def _no_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise _too_much(f"it gives a namespace the name {name!r}")


_WIDTH = re.compile(r"\d{7,}|\*")


def _check_widths(pattern: str) -> None:
    if found := _WIDTH.search(pattern) if "%" in pattern or "{" in pattern else None:
        raise _too_much(f"it pads a text to the width {found.group()}")


def _check_format(pattern: Any, sign: str, values: Any) -> None:
    """Refuse a pattern that pads widely, or whose values together are too long."""
    _check_widths(pattern if isinstance(pattern, str) else pattern.decode("latin-1"))
    _fits(len(pattern) + pattern.count(sign if isinstance(pattern, str) else sign.encode()) * _widest(values))


def _checked_method(name: str, owner: Any, values: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a method of a text, if what it makes of them is not too long."""
    if name in ("format", "format_map"):
        _check_format(owner, "{", (*values, *named.values()))
    elif name == "replace" and len(values) > 1:
        _fits(len(owner) + owner.count(values[0]) * len(values[1]))
    elif name == "join" and values:
        values = (list(values[0]),)
        _fits(_written(values[0]) + len(owner) * len(values[0]))
    elif name == "expandtabs":
        size = next((v for v in (*values, *named.values()) if isinstance(v, int)), 8)
        _fits(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * size)
    elif name == "translate" and values and isinstance(values[0], Mapping):
        _fits(len(owner) * (1 + _widest(values[0].values())))
    elif "split" in name:
        _spend(len(owner) // 16)
    return values


WRITES: tuple[str, ...] = (
    "string",
    "pprint",
    "upper",
    "lower",
    "capitalize",
    "title",
    "trim",
    "truncate",
    "striptags",
    "urlize",
    "urlencode",
    "escape",
    "e",
    "forceescape",
)
WRITES += ("safe", "wordcount", "wordwrap", "xmlattr", "center", "replace", "indent", "format")
"""Filters that write their value out as a text first."""


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that costs a step and what it makes, and that refuses first what would become too long."""
    first = int(hasattr(function, "jinja_pass_arg"))  # Jinja gives some of them its own state before the value

    @wraps(function)
    def filtered(*given: Any, **named: Any) -> Any:
        _spend(1)
        values = list(given[first:])
        if values and name in WRITES:
            _check_text(name, values[0] if isinstance(values[0], str) else " " * _written(values[0]), values[1:], named)
        elif values and name in ("join", "sum"):
            values[0] = list(values[0])
            _fits(_written(values[0]) + _widest(values[1:2] or [named.get("d", "")]) * len(values[0]))
        elif name in ("batch", "slice"):
            _spend(max((v for v in (*values, *named.values()) if isinstance(v, int)), default=0))
        return _made(function(*given[:first], *values, **named), each=1)

    return filtered


def _check_text(name: str, text: str, rest: list[Any], named: Mapping[str, Any]) -> None:
    """Refuse what a filter would make longer than :data:`LONGEST` of ``text``."""
    options = [*rest, *named.values()]
    if name == "format":
        _check_format(text, "%", options)
    elif name == "replace" and len(options) > 1:
        _fits(len(text) + text.count(str(options[0])) * _widest(options[1:2]))
    elif name in ("indent", "center"):
        width = rest[0] if rest else named.get("width", 4)
        _fits(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else _written(width)))
    elif name in ("wordwrap", "urlize", "truncate"):
        _fits(len(text) * (1 + sum(len(option) for option in options if isinstance(option, str))))


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter writes ``\\u003c`` for ``<``, for web pages; models were trained on plain JSON."""
    _written(value, width=sum(x if isinstance(x, int) else len(x) for x in (indent, *(separators or ())) if x is not None))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    _written(message)
    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
