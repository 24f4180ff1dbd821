"""What a text may be: a schema, a pattern, a grammar, a choice. A rule knows no tokens; :class:`~glassformer.infer.constrain.Constrained` brings both together.

    JSONSchema({"type": "object", …})      AnyJSON()      Regex(r"\\d{4}-\\d{2}")      Choices(("yes", "no"))      Grammar("start: …")

All of them become one text in llguidance's dialect of Lark.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, ClassVar, cast

from glassformer.core.errors import GlassformerError, SamplerError, did_you_mean
from glassformer.core.fields import described
from glassformer.core.spec import Spec, part

from .vocabulary import Vocabulary

WHITESPACE = r" |\n {0,24}"
"""Between the signs of JSON: nothing, one space, or a line feed with up to 24 spaces. Unbounded space would let a model go on with it for ever."""
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_PARTS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "anyOf", "oneOf", "allOf", "prefixItems")
_HEADER = re.compile(r"^\s*%llguidance\s*(\{.*?\})\s*$", re.MULTILINE)


class TextRule(Spec):
    """A set of texts. Raises :class:`SamplerError` when it is made from what is none, or when it is compiled."""

    _error: ClassVar[type[GlassformerError]] = SamplerError
    what: ClassVar[str] = "rule"

    @abstractmethod
    def lark(self, vocabulary: Vocabulary) -> str:
        """The grammar. Only what names special tokens needs the vocabulary."""


def with_header(lark: str) -> str:
    """The grammar without forcing: llguidance would else allow of a text that must come only the tokens into which its tokenizer cuts it."""
    options: dict[str, Any] = {}
    if found := _HEADER.search(lark):
        options, lark = json.loads(found.group(1)), lark[: found.start()] + lark[found.end() :]
    return f"%llguidance {json.dumps(options | {'no_forcing': True})}\n{lark.lstrip()}\n"


@part
class JSONSchema(TextRule):
    """JSON that a schema describes: a dict, its JSON text, or a ``pydantic`` model class. Kept as canonical text.

    Properties come in the order of the schema. ``whitespace`` is a pattern for what may stand between the signs; "" for nothing.
    A keyword that the library does not know is an error when it is compiled, never ignored.
    """

    schema: Any
    whitespace: str = WHITESPACE
    what: ClassVar[str] = "JSON schema"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", json.dumps(_schema(self.schema), ensure_ascii=False))

    def __repr__(self) -> str:
        return f"JSONSchema({self.schema!r})" if self.whitespace == WHITESPACE else f"JSONSchema({self.schema!r}, whitespace={self.whitespace!r})"

    def lark(self, vocabulary: Vocabulary) -> str:
        return f"start: {embedded(json.loads(self.schema), self.whitespace)}\n"


def embedded(schema: dict[str, Any], whitespace: str = WHITESPACE) -> str:
    """A schema as a part of a Lark rule. Raises :class:`SamplerError` for a type that there is none of, with its place in the schema."""
    _check_types(schema)
    spaces: dict[str, Any] = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return "%json " + json.dumps(schema | {"x-guidance": spaces | schema.get("x-guidance", {})}, ensure_ascii=False)


def _check_types(schema: dict[str, Any]) -> None:
    """What the schema reaches is looked at; a definition that nothing refers to may say anything."""
    left: list[tuple[Any, tuple[str, ...]]] = [(schema, ())]
    seen: set[str] = set()
    while left:
        node, path = left.pop()
        if isinstance(node, list):
            left += [(part, (*path, str(i))) for i, part in enumerate(node)]
        if not isinstance(node, dict):
            continue
        for kind in node["type"] if isinstance(node.get("type"), list) else [node["type"]] if "type" in node else []:
            if kind not in TYPES:
                raise SamplerError(f"{'.'.join((*path, 'type'))} is {kind!r}.{did_you_mean(kind, TYPES)} Known: {', '.join(TYPES)}")
        left += [(node[name], (*path, name)) for name in _PARTS if name in node]
        named = [(name, node[name]) for name in ("properties", "patternProperties") if isinstance(node.get(name), dict)]
        left += [(value, (*path, name, key)) for name, values in named for key, value in values.items()]
        if isinstance(ref := node.get("$ref"), str) and ref.startswith("#/") and ref not in seen:
            seen.add(ref)
            place = tuple(ref[2:].split("/"))
            left.append((reduce(lambda at, key: at.get(key) if isinstance(at, dict) else None, place, cast(Any, schema)), place))


def _schema(given: Any) -> dict[str, Any]:
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    if isinstance(given, str | bytes):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise SamplerError(f"The JSON schema is no JSON ({error}): {str(given)[:60]!r}. Give a dict, its JSON text, or a pydantic model class.") from None
    if given is True:
        return {}
    if given is False:
        raise SamplerError("The JSON schema is false, which nothing meets. Give a schema that allows something.")
    if not isinstance(given, Mapping):
        raise SamplerError(f"A JSON schema is a dict, its JSON text, or a pydantic model class, but {described(type(given))} was given: {str(given)[:60]!r}.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(given)))
    except (TypeError, ValueError) as error:
        raise SamplerError(f"The JSON schema holds what JSON cannot: {error}.") from None
    return plain


@part
class AnyJSON(TextRule):
    """Any JSON value, or with ``objects`` any JSON object (what OpenAI's API calls ``json_object``)."""

    objects: bool = False
    what: ClassVar[str] = "JSON"

    def lark(self, vocabulary: Vocabulary) -> str:
        return f"start: {embedded({'type': 'object'} if self.objects else {})}\n"


@part
class Regex(TextRule):
    r"""What a regular expression matches from end to end: ``Regex(r"\d{4}-\d{2}")``.

    The syntax is that of Rust's ``regex``, which is Python's without look-around, back-references and word borders. ``\d \w \s`` are ASCII, as with
    ``re.ASCII``; "^" in front and "$" behind are what is meant anyway.
    """

    pattern: str
    what: ClassVar[str] = "regular expression"

    def lark(self, vocabulary: Vocabulary) -> str:
        import llguidance

        pattern = re.sub(r"\A(?:\^|\\A)", "", self.pattern)
        if m := re.search(r"(\\*)(?:\$|\\Z|\\z)\Z", pattern):
            pattern = pattern if len(m.group(1)) % 2 and m.group().endswith("$") else pattern[: m.end(1)]
        return f"start: TEXT\nTEXT: /(?:{llguidance.regex_to_lark(pattern, 'dws')})/\n"


@part
class Choices(TextRule):
    """One of some texts: ``Choices(("yes", "no"))``."""

    texts: str | tuple[str, ...] | Iterable[str]
    what: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        texts = (self.texts,) if isinstance(self.texts, str) else tuple(self.texts)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise SamplerError(f"A choice is among one text or more, none of them empty, but {list(texts)!r} was given.")
        object.__setattr__(self, "texts", tuple(dict.fromkeys(texts)))

    def lark(self, vocabulary: Vocabulary) -> str:
        # One terminal: its automaton takes thousands of texts, where as many branches of a rule would be too much for the parser.
        return "start: CHOICE\nCHOICE: " + " | ".join(map(quoted, cast(tuple[str, ...], self.texts))) + "\n"


@part
class Grammar(TextRule):
    """What a context-free grammar derives: Lark (llguidance's dialect, from the rule ``start``) or GBNF (llama.cpp's, from ``root``).

    ``syntax`` is "lark" or "gbnf"; None tells by ``::=``, which only GBNF has.
    """

    text: str
    syntax: str | None = None
    what: ClassVar[str] = "grammar"

    def __post_init__(self) -> None:
        if self.syntax not in (None, "lark", "gbnf"):
            raise SamplerError(f"A grammar's syntax is 'lark' or 'gbnf', but {self.syntax!r} was given.")

    def lark(self, vocabulary: Vocabulary) -> str:
        plain = re.sub(r'"(?:\\.|[^"\\\n])*"', "", self.text)  # "::=" may be a text of a Lark grammar
        if self.syntax == "lark" or (self.syntax is None and "::=" not in plain):
            return self.text
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return str(gbnf_to_lark(self.text))
        except Exception as error:  # the converter raises whatever it meets
            raise SamplerError(f"it cannot be read as GBNF: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)
