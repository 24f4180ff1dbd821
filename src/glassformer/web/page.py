"""The page at ``/``: how to ask this very server, by curl and by the openai client.

    page.html   the words and the places        page.css   the looks        page.js   the examples, and a button to copy each

It is one file and asks the network for nothing (``core/page``).
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from glassformer.core.page import scripted

if TYPE_CHECKING:
    from .served import Served

KEY = "$GLASSFORMER_API_KEY"


def page(served: Served, base: str) -> str:
    """The page of a server that is reached at ``base``."""
    files = ("page.html", "page.css", "page.js")
    return scripted(f"{served.name}, served by glassformer", data(served, base.rstrip("/")), "glassformer.web", *files)


def data(served: Served, base: str) -> dict[str, Any]:
    """What the page's script reads."""
    examples = _of_chat(served, base) if served.writes and served.chats else _of_text(served, base) if served.writes else []
    if served.tokenizer is not None or not served.writes:
        examples.append(_example("Vectors", _curl(f"{base}/v1/embeddings", {"model": served.name, "input": ["a text", "another"]})))
    return {"name": served.name, "base": base, "facts": _facts(served), "examples": examples, "paths": _paths(served)}


def _facts(served: Served) -> list[list[str]]:
    spec = served.model.spec
    made = [["Model", served.name], ["Kind", type(spec).__name__], ["Parameters", f"{served.model.params().total:,}"]]
    if served.writes:
        made += [["Context", f"{served.context:,} tokens"], ["Answers at once", f"{served.engine.slots}"]]
    return [*made, ["Edits in requests", "yes" if served.allow_edits else "no"], ["Values of sites", "yes" if served.allow_sites else "no"]]


def _of_chat(served: Served, base: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": "Hello!"}]
    body = {"model": served.name, "messages": messages, "max_tokens": 64}
    said = [f"    model={json.dumps(served.name)},", f"    messages={json.dumps(messages)},"]
    shown = 'print(chunk.choices[0].delta.content or "", end="", flush=True)'
    return _three("A chat, by curl", f"{base}/v1/chat/completions", body, "chat.completions", said, shown, served, base)


def _of_text(served: Served, base: str) -> list[dict[str, str]]:
    body = {"model": served.name, "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0.8}
    said = [f"    model={json.dumps(served.name)},", '    prompt="Once upon a time",']
    shown = 'print(chunk.choices[0].text, end="", flush=True)'
    return _three("A text is continued, by curl", f"{base}/v1/completions", body, "completions", said, shown, served, base)


def _three(title: str, url: str, body: dict[str, Any], verb: str, said: list[str], shown: str, served: Served, base: str) -> list[dict[str, str]]:
    """By curl, by the client as it comes, and with the inside."""
    head = ["from openai import OpenAI", "", "# api_key: the server's, or any text if it has none", f'client = OpenAI(base_url="{base}/v1", api_key="...")']
    stream = [*head, f"stream = client.{verb}.create(", *said, "    max_tokens=64,", "    stream=True,", ")"]
    stream += ["for chunk in stream:", "    if chunk.choices:", f"        {shown}"]
    inside = [f"        {json.dumps(name)}: {json.dumps(value)}," for name, value in _inside(served).items()]
    opened = [*head, f"answer = client.{verb}.create(", *said, "    max_tokens=8,", "    extra_body={", *inside, "    },", ")", "choice = answer.choices[0]"]
    opened += ['print(choice.trace["chain"])', *(["for site in choice.sites:", '    print(site["site"], site["shape"])'] if served.allow_sites else [])]
    return [
        _example(title, _curl(url, body)),
        _example("The same in Python, as it comes (pip install openai)", "\n".join(stream)),
        _example("With the inside", "\n".join(opened)),
    ]


def _inside(served: Served) -> dict[str, Any]:
    names = list(served.anatomy.axes)
    wanted = next((p for p in names if p.endswith("attn.pattern")), None)
    stream = next((p for p in reversed(names) if p.endswith("resid_post")), None)
    sites = [p for p in (stream, None if wanted is None else f"{wanted}[0]") if p is not None]
    return ({"return_sites": sites} if served.allow_sites else {}) | {"return_trace": 5}


def _curl(url: str, body: dict[str, Any]) -> str:
    # In single quotes for a shell; the key's name is in double quotes, where a shell puts its value.
    plain = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f'curl {url} \\\n  -H "Content-Type: application/json" \\\n  -H "Authorization: Bearer {KEY}" \\\n  -d {plain}'


def _example(title: str, code: str) -> dict[str, str]:
    return {"title": title, "code": code}


def _paths(served: Served) -> list[list[str]]:
    writes = [["POST /v1/chat/completions", "a conversation is answered"], ["POST /v1/completions", "a text is continued"]]
    return [
        *(writes if served.chats else writes[1:] if served.writes else []),
        *([["POST /v1/embeddings", "a vector for each text"], ["GET /v1/models", "what is served"], ["POST /tokenize", "the ids of a text or a conversation"]]),
        *([["POST /detokenize", "the text of ids"], ["GET /health", "ok, or draining"], ["GET /metrics", "for Prometheus"]]),
        ["GET /openapi.json", "all of it, described for programs"],
    ]
