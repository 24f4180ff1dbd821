"""What Python says about its arguments, said about the options that were typed.

    min_new_tokens is 9, but max_new_tokens is 3     ─►     --min-new-tokens is 9, but -n is 3

The library speaks of arguments, and one place here knows the parser's options: at the door every sentence that was not
written by the command line itself is read again. A name with an underscore is an argument wherever it stands; a plain word
(``seed``, ``weights``) is one only before ``=`` or where a sentence treats it as a name, for it is an English word too.
Texts in quotation marks, paths, calls such as ``TopK(k=5)`` and lists of links stay as they are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

ARGUMENTS = {
    "prompt_lookup_num_tokens": "prompt_lookup",
    "num_assistant_tokens": "draft_tokens",
    "assistant_model": "draft",
    "contrast": "amateur",
    "bad_words": "bad_word",
    "force_words": "force_word",
    "choices": "choice",
}
"""Arguments whose option has another name."""
REMEDIES = {
    "draft=a smaller model or draft=PromptLookup()": "--draft MODEL or --prompt-lookup N",
    "draft=PromptLookup(), which": "--prompt-lookup N, which",
    "prompt_lookup_num_tokens=n is short for draft=PromptLookup(), draft_tokens=n: give it, or those.": "--prompt-lookup N guesses by itself, N tokens "
    "at a time: leave it out, or --draft and --draft-tokens.",
    "Give a dict, its JSON text, or a pydantic model class.": "Give --json-schema a file, or the schema itself.",
    "Encode plain text, put the checkpoint's chat_template.jinja beside tokenizer.json, or give Tokenizer(…, chat_template=…) one.": "Leave --chat out, "
    "or put the checkpoint's chat_template.jinja beside tokenizer.json.",
    ", or None for the model's own.": "; leave --cache-dtype out for the model's own.",
    "give eos_id=…, or a tokenizer that has one.": "this model's texts have no end, so leave --min-new-tokens out.",
    "model.sites() lists them all.": "'glassformer dimensions MODEL' lists them all.",
    "Use None for the whole history": "Use -1 for the whole history",
}
"""Remedies that only Python can say so."""

_KEPT = r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|Known: .*|the order has no place for it: .*"
_CALL = r"[\w.]+\((?:[^()]|\([^()]*\))*\)"
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\w+\([^()]*\)|[^\s,;:()]*[^\s,;:().]"
_GIVEN = rf"(?<![\w./-])(?P<given>[a-z]\w*)=(?:(?P<value>{_VALUE})|(?= ))"
_LONG = r"(?<![\w./\\-])(?P<long>[a-z]+(?:_[a-z0-9]+)+)(?![\w/(\\=-]|\.\w)"
_NUMBER = r"(?<![\w./-])(?P<number>-?[0-9]+\.[0-9]+(?:e[+-]?[0-9]+)?)(?!\w|\.\w)"
_FIRST = r"(?:^|(?<=\. ))(?P<first>[a-z]+)(?= (?:is|are|was|were|has|takes|makes|keeps|needs|brings|does|steers|and)\b)"
_NAMED = "|".join(  # a word, where a sentence treats it as a name
    rf"(?<={before})(?P<named{i}>[a-z]+)(?={after})"
    for i, (before, after) in enumerate(
        (
            ("without ", r"[,.:](?:\s|$)|$"),
            ("give ", r" too\b"),
            ("[Ll]eave ", r" out\b"),
            ("out, or ", r"\.|$"),
            (" and ", r"(?: were)? both\b"),
            (", ", r" makes\b|, …"),
            (r"\(", r"(?:, \w+)*, …\)"),
        )
    )
)
_ARGUMENT = re.compile("|".join((_KEPT, _GIVEN, _CALL, _LONG, _NUMBER, _FIRST, _NAMED)))


def as_typed(text: str, options: Mapping[str, str], words: Sequence[str] = ()) -> str:
    """``text`` with the ``options`` (argument: as it is typed) in place of the arguments, and numbers as they stand among the ``words``."""
    for python, typed in REMEDIES.items():
        text = text.replace(python, typed) if _typeable(typed, options) else text
    text = re.sub(r"^\w+\((\w+)=(.*?)\): \1 is (.*?)(?: or None)?, but ", r"\1=\2: it is \3, but ", text)  # build_chain(top_a='x'): top_a is ...
    text = re.sub(r"^Engine\(([^()]*)\): ", r"\1: ", text)
    text = re.sub(r"(\w+=\S+) and \w+=None were given|\w+=None and (\w+=\S+) were given", r"\1\2 was given", text)
    numbers = _numbers(words)

    def read(found: re.Match[str]) -> str:
        if found.lastgroup is None:  # what stays as it is
            return found[0]
        if found.lastgroup == "number":
            return numbers.get(found[0], found[0])
        option, value = options.get(found["given"] or found[0], found[0]), found["value"]
        return option if value is None or option == found[0] else option + _value(numbers.get(value, value), option)

    return _ARGUMENT.sub(read, text)


def _typeable(text: str, options: Mapping[str, str]) -> bool:
    return all(any(option in typed.split() for typed in options.values()) for option in re.findall(r"--[a-z-]+", text))


def _numbers(words: Sequence[str]) -> dict[str, str]:
    """Numbers as Python writes them (``-1.0``), and as they were typed (``-1``)."""
    found = {}
    for word in words:
        typed = word.rpartition("=")[2]
        with suppress(ValueError):
            found[repr(float(typed))] = typed
    return found


def _value(written: str, option: str) -> str:
    """What stands behind an option: nothing for a flag that is set."""
    if written == "True" and not option.startswith("--set "):
        return ""
    quoted = len(written) > 1 and written[0] == written[-1] and written[0] in "'\""
    return ("=" if option.startswith("--set ") else " ") + (shlex.quote(written[1:-1]) if quoted else written)


def options_of(group: Any, given: Sequence[str]) -> dict[str, str]:
    """The arguments of the command in these words, each as the option that was typed for it (or its long one)."""
    command, words = _command(group, given)
    options = {param.name: param for param in command.params if param.param_type_name == "option"}
    found = {name: f"--set {name}" for name in _settings()} if "more" in options else {}
    found |= {name: _typed(param.opts, words) for name, param in options.items() if name != "more"}
    found |= {python: found[name] for python, name in ARGUMENTS.items() if name in options}
    if "more" in options:
        found |= {word.partition("=")[0].replace("-", "_"): f"--set {word.partition('=')[0]}" for word in _set(words)}
    return found


def _command(group: Any, given: Sequence[str]) -> tuple[Any, list[str]]:
    """The command that these words reach, and its own words."""
    words = list(given)
    while commands := getattr(group, "commands", None):
        default = commands.get(getattr(group, "default", None))
        at = next((i for i, word in enumerate(words) if word in commands), None)
        if default is not None and at != 0:
            return default, words
        if at is None:
            break
        group, words = commands[words[at]], words[at + 1 :]
    return group, words


def _typed(spellings: Sequence[str], words: Sequence[str]) -> str:
    """The spelling that stands among the words (``-n``, ``-n5``, ``--top-k=5``), or the longest."""
    longest = max(spellings, key=len)
    short = [option for option in spellings if len(option) == 2 and any(word.startswith(option) for word in words)]
    return short[0] if short and not any(word.split("=")[0] == longest for word in words) else longest


def _set(words: Sequence[str]) -> list[str]:
    """What was said by ``--set``."""
    return [b for a, b in pairwise(words) if a == "--set" and "=" in b] + [w[6:] for w in words if w.startswith("--set=")]


def _settings() -> list[str]:
    from ..core.fields import hints
    from ..infer.named import Settings
    from .sampling import BEYOND

    return [*hints(Settings), *BEYOND]


def said(error: Exception, group: Any, given: Sequence[str]) -> str:
    """The sentence of an error as a person at the command line can use it; what the command line wrote itself is so already."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    if where.startswith("glassformer.cli") and (error.__cause__ is None or str(error.__cause__) != str(error)):
        return str(error)
    return as_typed(str(error), options_of(group, given), given)
