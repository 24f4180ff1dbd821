"""The application: its paths, how a body is read, and how errors are told.

POST /v1/chat/completions   POST /v1/completions   POST /v1/embeddings   GET /v1/models   GET /v1/models/{model}
POST /tokenize   POST /detokenize   GET /health   GET /metrics   GET /   GET /openapi.json
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from glassformer import __version__
from glassformer.core.errors import GlassformerError, InputError
from glassformer.infer.options import read_prompts

from . import prepare, replies
from .answers import answer, encoded, while_there
from .gate import GateMiddleware
from .page import page
from .problems import Problem, of_error, of_validation
from .schemas import REQUESTS, Body, ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .served import Served
from .vectors import vectors, width

B = TypeVar("B", bound=Body)
DEEPEST = 100
"""Lists and objects within each other that a body may have."""


def create_app(served: Served, *, key: str | None = None, cors: Sequence[str] = (), host: str = "127.0.0.1") -> FastAPI:
    """The application over what is served. Its engine is started with it, and stopped with it.

    ``key``: what callers have to send (None: nothing). ``cors``: origins whose pages may ask (none by default). ``host``: where it will listen.
    """
    if key is not None and not key.strip():
        raise InputError("The key is empty, and everybody has that: give a longer one, or none.")
    if key is not None and key != key.strip():
        raise InputError("The key begins or ends with a space or a line's end, which no header carries: leave that out.")

    for origin in cors:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            raise InputError(f"{origin!r} is no origin, so no page would be let in: https://example.org is one, with a port where it has one; '*' lets all in.")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if served.engine is not None:
            served.engine.start()
        try:
            yield
        finally:
            if served.engine is not None:
                await asyncio.to_thread(served.engine.stop, False)
            served.close()

    app = FastAPI(title="glassformer", version=__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.state.served = served
    _routes(app, served)
    _errors(app)
    allowed: Any = {"allow_origins": list(cors), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    if cors:
        app.add_middleware(CORSMiddleware, **allowed)

    def answer_of(problem: Problem) -> Any:
        """A refusal at the gate, which stands outside: a page that may ask may read it too."""
        told = refusal(problem)
        return CORSMiddleware(told, **allowed) if cors and problem.code not in ("origin_not_allowed", "host_not_allowed") else told

    app.add_middleware(GateMiddleware, served=served, key=key, origins=cors, host=host, answer=answer_of)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _routes(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models", responses=replies.of("ModelList"))
    async def models() -> Response:
        """The model that is served."""
        return _json({"object": "list", "data": [_model(served)]})

    @app.get("/v1/models/{model:path}", responses=replies.of("Model", 404))
    async def model(model: str) -> Response:
        """One model by its name."""
        served.check_name(model)
        return _json(_model(served))

    @app.get("/v1/sites", responses=replies.of("SiteList"))
    async def sites() -> Response:
        """The model's sites, which ``return_sites`` and ``edits`` name."""
        return _json({"object": "list", "data": [{"site": s.path, "axes": s.axes, "meaning": s.meaning} for s in served.anatomy.sites]})

    @app.post("/v1/completions", responses=replies.of("Completion", *replies.USUAL), openapi_extra=_takes(CompletionRequest))
    async def completions(http: Request) -> Response:
        """A text is continued."""
        body = await read(http, CompletionRequest, served)
        return await answer(served, await served.prepare(lambda: prepare.completion(served, body)), http)

    @app.post("/v1/chat/completions", responses=replies.of("ChatCompletion", *replies.USUAL), openapi_extra=_takes(ChatRequest))
    async def chat(http: Request) -> Response:
        """A conversation is answered."""
        body = await read(http, ChatRequest, served)
        return await answer(served, await served.prepare(lambda: prepare.chat(served, body)), http)

    @app.post("/v1/embeddings", responses=replies.of("Embeddings", *replies.USUAL), openapi_extra=_takes(EmbeddingRequest))
    async def embeddings(http: Request) -> Response:
        """A vector for each text."""
        return await _embeddings(served, await read(http, EmbeddingRequest, served), http)

    @app.post("/tokenize", responses=replies.of("Tokens", *replies.USUAL), openapi_extra=_takes(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        """The ids of a text, or of a conversation."""
        body = await read(http, TokenizeRequest, served)
        return _json(await asyncio.to_thread(_tokens, served, body))

    @app.post("/detokenize", responses=replies.of("Text", *replies.USUAL), openapi_extra=_takes(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        """The text of ids."""
        body = await read(http, DetokenizeRequest, served)
        served.check_name(body.model)
        tokenizer = served.check_text()
        return _json({"text": await asyncio.to_thread(_refusing, "ids", tokenizer.decode, body.ids)})

    @app.get("/health", responses=replies.of("Health", 503))
    async def health() -> Response:
        """Whether the server takes requests: 200, or 503 while it finishes what runs."""
        draining = served.gate.draining
        return _json({"status": "draining" if draining else "ok", "model": served.name}, 503 if draining else 200)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def start(http: Request) -> HTMLResponse:
        """How to ask this very server."""
        return HTMLResponse(page(served, str(http.base_url)))


# Bodies


async def read(http: Request, kind: type[B], served: Served) -> B:
    """The body of a request. Raises a :class:`Problem` for one that is too large, too slow, no UTF-8, no JSON, or no such request."""
    limits = served.limits
    sent = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != "application/json" and not (sent.startswith("application/") and sent.endswith("+json")):
        # A browser asks nobody before it sends another type from a foreign page.
        raise Problem(
            415,
            f"The body was sent {f'as {sent[:60]!r}' if sent else 'without a type'}, and this server reads JSON: "
            "send the header 'Content-Type: application/json'.",
            code="not_json",
        )
    most, said = limits.body_bytes, http.headers.get("content-length", "")
    if said.isdigit() and int(said[:20]) > most:
        raise _too_large(int(said[:20]), most)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in http.stream():
                data += chunk
                if len(data) > most:
                    raise _too_large(len(data), most)
    except TimeoutError:
        raise Problem(408, f"The body did not arrive within {limits.body_seconds:g} seconds; {len(data):,} bytes of it did: send it again.") from None
    if len(data) > 1 << 16:
        return await asyncio.to_thread(_parsed, bytes(data), kind)
    return _parsed(bytes(data), kind)


def _too_large(size: int, most: int) -> Problem:
    return Problem(413, f"The body has {size:,} bytes or more, and this server reads {most:,}: make the request smaller.", code="body_too_large")


def _parsed(data: bytes, kind: type[B]) -> B:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(400, f"The body is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. JSON is sent as UTF-8.", code="invalid_json") from None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is no JSON: {str(error)[:200] or type(error).__name__}.", code="invalid_json") from None
    if _deeper(given):
        raise Problem(400, f"The body holds more than {DEEPEST} lists and objects within each other.", code="invalid_json")
    if not isinstance(given, dict):
        raise Problem(400, f"The body is JSON, but no object: it is {json.dumps(given)[:60]}.", code="invalid_json")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False), kind.model_fields) from None


def _deeper(value: Any) -> bool:
    """Whether a value is nested more than DEEPEST deep; what is below would only be a burden to every step after."""
    level = [value]
    for _ in range(DEEPEST):
        level = [x for v in level if isinstance(v, list | dict) for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, list | dict)]
        if not level:
            return False
    return True


def _refusing(param: str, do: Any, *given: Any) -> Any:
    """Do something with what was given; what a deeper room finds wrong with it is a mistake in the request."""
    try:
        return do(*given)
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = param
        raise problem from None


# The smaller paths


def _model(served: Served) -> dict[str, Any]:
    made: dict[str, Any] = {"id": served.name, "object": "model", "created": served.created, "owned_by": "glassformer"}
    return made | ({"max_model_len": served.context} if served.writes else {})


def _tokens(served: Served, body: TokenizeRequest) -> dict[str, Any]:
    served.check_name(body.model)
    tokenizer = served.check_text()
    if (body.text is None) == (body.messages is None):
        raise Problem(400, "Give text, or messages, and not both: their ids are what comes back.", param="text")
    if body.messages is not None:
        ids = prepare.conversation(served, body.messages, None, {})
    else:
        ids = _refusing("text", tokenizer.prompt if body.add_special else tokenizer.encode, body.text)
    return {"ids": ids, "count": len(ids), "pieces": [tokenizer.decode([i]) for i in ids], "max_model_len": served.context if served.writes else None}


async def _embeddings(served: Served, body: EmbeddingRequest, http: Request) -> Response:
    served.check_name(body.model)
    rows = await asyncio.to_thread(_texts, served, body.input)
    d = width(served.model)
    if body.dimensions not in (None, d):
        raise Problem(400, f"dimensions is {body.dimensions}, and the vectors of this model have {d}: leave it out.", param="dimensions")
    try:
        found = await while_there(served, http, lambda check: vectors(served.model, rows, check))
    except GlassformerError as error:
        raise of_error(error, ("input",)) from None

    def written() -> bytes:
        array = found.numpy().astype("<f4")
        plain = [v.tolist() if body.encoding_format != "base64" else base64.b64encode(v.tobytes()).decode() for v in array]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(plain)]
        n = sum(map(len, rows))
        return encoded({"object": "list", "data": data, "model": served.name, "usage": {"prompt_tokens": n, "total_tokens": n}})

    return Response(await asyncio.to_thread(written), media_type="application/json")


def _texts(served: Served, given: Any) -> list[list[int]]:
    single = isinstance(given, str) or (bool(given) and all(isinstance(i, int) for i in given))
    texts = [given] if single else list(given)
    if not texts or len(texts) > served.limits.texts:
        raise Problem(400, f"input has {len(texts)} texts, and one request has from 1 to {served.limits.texts}.", param="input")
    # An encoder reads texts between its own marks.
    marked = [served.check_text().encode(t, add_special=True) if isinstance(t, str) else t for t in texts] if not served.writes else texts
    if any(not len(t) for t in marked):
        raise Problem(400, "input holds an empty text, which has no vector: leave it out.", param="input")
    rows: list[list[int]] = _refusing("input", read_prompts, marked, served.tokenizer)[0]
    spec = getattr(served.model.spec, "encoder", served.model.spec)
    longest, top = max(map(len, rows)), max(map(max, rows))
    if longest > served.readable:
        raise Problem(
            400, f"A text of input has {longest} tokens, and this model reads {served.readable}: shorten it.", param="input", code="context_length_exceeded"
        )
    if top >= spec.vocab_size:
        raise Problem(400, f"input holds id {top}, but the vocabulary has {spec.vocab_size} tokens, 0 to {spec.vocab_size - 1}.", param="input")
    return rows


# Errors, and the description


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(encoded(value), status_code=status, media_type="application/json", headers=headers)


def refusal(problem: Problem) -> Response:
    """A problem as a reply."""
    return _json(problem.body(), problem.status, problem.headers)


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(http: Request, error: Problem) -> Response:
        return refusal(error)

    @app.exception_handler(GlassformerError)
    async def mistake(http: Request, error: GlassformerError) -> Response:
        return refusal(of_error(error))

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> Response:
        path = http.url.path[:100]
        known = sorted({str(r.path).replace("{model:path}", "NAME") for r in app.routes if hasattr(r, "path")})
        said = {404: f"There is nothing at {path!r}: the paths are {', '.join(known)}.", 405: f"{path!r} is not asked by {http.method}."}
        return refusal(Problem(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers))

    @app.exception_handler(Exception)
    async def fault(http: Request, error: Exception) -> Response:
        return refusal(Problem(500, f"The request failed inside the server ({type(error).__name__}); its log has the details."))


def _takes(kind: type[Body]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}}


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__ and "A glassformer model behind HTTP.")
        _, found = models_json_schema([(kind, "validation") for kind in REQUESTS], ref_template="#/components/schemas/{model}")
        schemas = found["$defs"] | replies.SCHEMAS
        app.openapi_schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return app.openapi_schema
