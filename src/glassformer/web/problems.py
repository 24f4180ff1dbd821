"""What a client reads when something is wrong: OpenAI's form of an error, with a sentence for people in it.

    {"error": {"message": "top_p is …", "type": "invalid_request_error", "param": "top_p", "code": null}}

The official client makes of 400, 401, 404, 413, 429 and 5xx exceptions of their own, and shows the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from glassformer.core.errors import GlassformerError, did_you_mean

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """An error with its HTTP status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's word for it."""
        return KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def of_error(error: GlassformerError, params: tuple[str, ...] = ()) -> Problem:
    """A mistake in a request that a deeper room has found. ``params``: names to look for in its sentence."""
    text = str(error)
    for python, here in REMEDIES.items():
        text = text.replace(python, here)
    # A link is called like its setting (LogitBias), a rule by what it is (the JSON schema).
    found = next((p for p in params if re.search(rf"\b{'[-_ ]?'.join(map(re.escape, p.split('_')))}\b", text, re.IGNORECASE)), None)
    if found is None:
        found = next((p for p in params if (word := p.split("_")[0]) in _LINKS and re.search(rf"\b{word}\b", text, re.IGNORECASE)), None)
    if found is None and "schema" in text:
        found = next((p for p in ("response_format", "json_schema", "tools") if p in params), None)
    return Problem(400, text, param=found)


REMEDIES = {
    "model.sites() lists them all": "GET /v1/sites lists them all",
    "give eos_id=…, or a tokenizer that has one": "name one by stop_token_ids",
}
"""Remedies that only Python can say so."""

_LINKS = frozenset(["typical", "dry", "xtc", "epsilon", "eta", "mirostat", "adaptive"])
"""Links whose sentences name themselves and a field of theirs (``XTC(probability=3)``): the first word of the arguments that set them."""

NOT_SERVED = frozenset(
    [
        "num_beams",
        "num_return_sequences",
        "length_penalty",
        "early_stopping",
        "coverage_penalty",
        "num_beam_groups",
        "diversity_penalty",
        "force_words",
        "beam_tree",
        "draft",
        "draft_tokens",
        "draft_rule",
        "assistant_model",
        "prompt_lookup_num_tokens",
        "guidance_scale",
        "negative_prompt",
        "negative_prompt_ids",
        "contrast",
        "contrast_alpha",
        "contrast_beta",
        "dola_layers",
        "penalty_alpha",
    ]
)
"""What ``generate`` takes and the engine does not."""


def of_validation(errors: list[Any], known: Iterable[str]) -> Problem:
    """What pydantic found wrong with a body, in one sentence: the first argument that is wrong, and how many more are."""
    first = errors[0]
    mine = [e for e in errors if e["loc"][:1] == first["loc"][:1]]
    more = len({e["loc"][:1] for e in errors}) - 1
    others = f" {more} more {'argument is' if more == 1 else 'arguments are'} wrong." if more else ""
    if (unknown := next((e for e in mine if e["type"] == "extra_forbidden"), None)) is not None:
        place = _place(unknown)
        if len(place) == 1 and place[0] in NOT_SERVED:
            return Problem(
                400,
                f"{place[0]!r} is not served: it needs passes of its own. gf.generate and glassformer generate take it.{others}",
                param=str(place[0]),
                code="unsupported_parameter",
            )
        meant = did_you_mean(str(place[-1]), known) if len(place) == 1 else ""
        return Problem(400, f"There is no argument {'.'.join(map(str, place))!r}.{meant}{others}", param=".".join(map(str, place)), code="unknown_parameter")
    if (missing := next((e for e in mine if e["type"] == "missing"), None)) is not None:
        lacks = ".".join(map(str, _place(missing)))
        return Problem(400, f"{lacks} is missing, and it has to be given.{others}", param=lacks, code="missing_required_parameter")
    deepest = max(mine, key=lambda e: len(_place(e)))
    wrong = [e for e in mine if _place(e) == _place(deepest)]
    param = ".".join(map(str, _place(deepest))) or None
    value = _json(deepest.get("input"))
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    needed = " or ".join(dict.fromkeys(map(_needed, wrong)))
    return Problem(400, f"{param or 'The body'}: {needed} is needed, but {shown} was given.{others}", param=param, code="invalid_value")


def _json(value: Any) -> str:
    """A value as it stood in the body."""
    return json.dumps(value, ensure_ascii=False, default=repr) if isinstance(value, bool | None) else repr(value)


def _place(error: Any) -> tuple[Any, ...]:
    """Where in the body: the names and numbers of ``loc``, without pydantic's own words for the branches of a union."""
    return tuple(p for i, p in enumerate(error["loc"]) if i == 0 or isinstance(p, int) or (p.isidentifier() and p not in _BRANCHES and not p[:1].isupper()))


_BRANCHES = {"str", "int", "float", "bool", "dict", "list", "none"}
_WORDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("a number of {} or more", "ge"),
    "less_than": ("a number below {}", "lt"),
    "less_than_equal": ("a number of at most {}", "le"),
    "string_too_long": ("a text of at most {} characters", "max_length"),
    "too_long": ("a list of at most {} items", "max_length"),
    "too_short": ("a list of at least {} items", "min_length"),
}


def _needed(error: Any) -> str:
    kind, limits = error["type"], error.get("ctx", {})
    if kind in _WORDS:
        return _WORDS[kind]
    if kind == "literal_error":
        expected = re.sub(r"\bTrue\b", "true", re.sub(r"\bFalse\b", "false", limits["expected"]))
        return f"one of {expected.replace(' or ', ', ')}" if "," in expected else str(expected)
    if kind == "too_long" and isinstance(error.get("input"), str):
        kind = "string_too_long"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return words.format(f"{limits[name]:,.10g}")
    said = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return said[:1].lower() + said[1:]
