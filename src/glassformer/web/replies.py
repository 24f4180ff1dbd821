"""What comes back, as the OpenAPI document describes it."""

from __future__ import annotations

from typing import Any

USUAL = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
"""What any request with a body may be answered by, beside 200."""

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def _or_none(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _object(required: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | (more or {})}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


INSIDE = {"trace": {"type": "object"}, "sites": _list(_ref("SiteValue"))}
ABOUT = {"id": TEXT, "created": WHOLE, "model": TEXT}
MORE = {"system_fingerprint": TEXT, "edits": _object({"name": TEXT, "hash": TEXT})}

SCHEMAS: dict[str, Any] = {
    "Error": _object({"error": _object({"message": TEXT, "type": TEXT, "param": _or_none(TEXT), "code": _or_none(TEXT)})}),
    "Model": _object({"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT}, {"max_model_len": WHOLE}),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Usage": _object({"prompt_tokens": WHOLE, "total_tokens": WHOLE}, {"completion_tokens": WHOLE}),
    "SiteValue": _object(
        {"site": TEXT, "axes": TEXT, "shape": _list(WHOLE), "dtype": {"const": "float32"}},
        {"heads": _list(WHOLE), "positions": TEXT, "base64": TEXT, "values": {}},
    ),
    "CompletionLogprobs": _object(
        {"tokens": _list(TEXT), "token_logprobs": _list(_or_none(NUMBER)), "top_logprobs": _list(_or_none({"type": "object"})), "text_offset": _list(WHOLE)}
    ),
    "CompletionChoice": _object({"index": WHOLE, "text": TEXT, "finish_reason": TEXT, "logprobs": _or_none(_ref("CompletionLogprobs"))}, INSIDE),
    "Completion": _object(ABOUT | {"object": {"const": "text_completion"}, "choices": _list(_ref("CompletionChoice")), "usage": _ref("Usage")}, MORE),
    "ToolCall": _object({"id": TEXT, "type": {"const": "function"}, "function": _object({"name": TEXT, "arguments": TEXT})}),
    "Answer": _object({"role": {"const": "assistant"}, "content": _or_none(TEXT)}, {"refusal": _or_none(TEXT), "tool_calls": _list(_ref("ToolCall"))}),
    "TokenLogprob": _object({"token": TEXT, "logprob": NUMBER, "bytes": _or_none(_list(WHOLE))}, {"top_logprobs": _list(_ref("TokenLogprob"))}),
    "ChatChoice": _object(
        {"index": WHOLE, "message": _ref("Answer"), "finish_reason": TEXT, "logprobs": _or_none(_object({"content": _list(_ref("TokenLogprob"))}))}, INSIDE
    ),
    "ChatCompletion": _object(ABOUT | {"object": {"const": "chat.completion"}, "choices": _list(_ref("ChatChoice")), "usage": _ref("Usage")}, MORE),
    "Embedding": _object({"object": {"const": "embedding"}, "index": WHOLE, "embedding": {"anyOf": [_list(NUMBER), TEXT]}}),
    "Embeddings": _object({"object": {"const": "list"}, "data": _list(_ref("Embedding")), "model": TEXT, "usage": _ref("Usage")}),
    "Tokens": _object({"ids": _list(WHOLE), "count": WHOLE, "pieces": _list(TEXT)}, {"max_model_len": _or_none(WHOLE)}),
    "Site": _object({"site": TEXT, "axes": TEXT, "meaning": TEXT}),
    "SiteList": _object({"object": {"const": "list"}, "data": _list(_ref("Site"))}),
    "Text": _object({"text": TEXT}),
    "Health": _object({"status": {"enum": ["ok", "draining"]}, "model": TEXT}),
}


def of(name: str, *errors: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a path: what it gives, and with which errors."""
    made: dict[int | str, dict[str, Any]] = {200: {"description": name, "content": {"application/json": {"schema": _ref(name)}}}}
    if name in ("Completion", "ChatCompletion"):
        made[200]["content"]["text/event-stream"] = {"schema": TEXT}
    wrong = {"description": "Error", "content": {"application/json": {"schema": _ref("Error")}}}
    for status in (*errors, 401, 403, 405, 503):
        made[status] = wrong
    if name == "Health":
        made[503] = made[200]
    return made
