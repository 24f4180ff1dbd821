"""The OpenAPI document, and what schemathesis makes of it: requests that nobody would write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi import checks

from glassformer.web import Limits
from web import serving

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.running(serving.loaded(), limits=Limits(new_tokens=4, answers=4, answer_seconds=20)) as made:
        yield made


def test_the_document_describes_every_path_and_every_argument(server: serving.Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert set(PATHS) | {"/v1/models", "/v1/sites", "/health", "/metrics"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    assert {"temperature", "top_k", "return_sites", "edits", "return_trace", "response_format"} <= set(schemas["CompletionRequest"]["properties"])
    assert schemas["ChatRequest"]["additionalProperties"] is False

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "$ref")
            for v in value.values():
                yield from named(v)
        elif isinstance(value, list):
            for v in value:
                yield from named(v)

    assert {r.rsplit("/", 1)[1] for r in named(document)} <= set(schemas)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_whatever_is_sent_gets_a_documented_reply(server: serving.Running, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["POST"]
    seen: set[int] = set()
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        def run(case: Any) -> None:
            reply = case.call(timeout=60)
            seen.add(reply.status_code)
            case.validate_response(reply, checks=CHECKS)

        run()
    assert 400 in seen
    serving.idle(server.served)
