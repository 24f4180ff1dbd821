"""What a client reads when something is wrong: every mistake in OpenAI's form, with both values in it, and never a path of this machine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import glassformer as gf
from glassformer.core.errors import InputError
from glassformer.infer.named import Settings
from glassformer.web import Limits, create_app
from glassformer.web.schemas import NOT_SERVED, Sampling
from web import serving

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[serving.Running]:
    with serving.running(serving.loaded(), limits=Limits(body_bytes=100_000, new_tokens=200, body_seconds=1.0)) as made:
        yield made


def refused(server: serving.Running, path: str, body: Any, status: int = 400, **how: Any) -> dict[str, Any]:
    sent = {"content": body, "headers": JSON} if isinstance(body, bytes) else {"json": body}
    got = httpx.post(server.url + path, timeout=30, **sent, **how)
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "/work" not in got.text
    assert "Traceback" not in got.text
    return error


# Arguments


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (COMPLETION, {"prompt": "x", "temprature": 1}, "temprature", "There is no argument 'temprature'. Did you mean 'temperature'"),
        (COMPLETION, {"prompt": "x", "top_p": 0}, "top_p", "top-p is a probability above 0"),
        (COMPLETION, {"prompt": "x", "top_p": "0.5"}, "top_p", "top_p: a number is needed, but '0.5' was given"),
        (COMPLETION, {"prompt": "x", "temperature": -1}, "temperature", "a number of 0 or more is needed, but -1 was given"),
        (COMPLETION, {"prompt": "x", "n": 0}, "n", "n: a number of 1 or more is needed, but 0 was given"),
        (COMPLETION, {"prompt": "x", "n": 65}, "n", "One prompt with n=65 would be 65 answers, and one request has at most 64"),
        (COMPLETION, {"prompt": "x", "stream": 1}, "stream", "true or false is needed, but 1 was given"),
        (COMPLETION, {"prompt": "x", "stop": ["a", 5]}, "stop.1", "stop.1: a text is needed, but 5 was given"),
        (COMPLETION, {"prompt": "x", "stop": [""]}, "stop", "A stop string is empty"),
        (COMPLETION, {}, "prompt", "prompt is missing"),
        (COMPLETION, {"prompt": []}, "prompt", "prompt is empty"),
        (COMPLETION, {"prompt": [5000]}, "prompt", "The prompt holds id 5000, but the model's vocabulary has 2048 tokens"),
        (COMPLETION, {"prompt": "x", "max_tokens": 0}, "max_tokens", "there is nothing to answer"),
        (COMPLETION, {"prompt": "x", "max_tokens": 201}, "max_tokens", "max_tokens is 201, and an answer has at most 200 tokens"),
        (COMPLETION, {"prompt": "x", "logprobs": 21}, "logprobs", "logprobs is 21, and this server reports at most 20"),
        (COMPLETION, {"prompt": "x", "best_of": 3}, "best_of", "best_of is 3 and n is 1"),
        (COMPLETION, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "give stream=true too"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias", "9999"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias", "logit_bias names the token '-1', and ids are whole numbers from 0 on"),
        (COMPLETION, {"prompt": "x", "logit_bias": {"1.5": 1}}, "logit_bias", "logit_bias names the token '1.5'"),
        (
            COMPLETION,
            {"prompt": "x", "stop_token_ids": [9999]},
            "stop_token_ids",
            "stop_token_ids holds id 9999, but the vocabulary has 2048 tokens, 0 to 2047",
        ),
        (COMPLETION, {"prompt": "x", "stop": "x" * 20_000}, "stop", "a text of at most 10,000 characters is needed"),
        (COMPLETION, {"prompt": "x", "xtc_probability": 3}, "xtc_probability", "probability"),
        (COMPLETION, {"prompt": "x", "typical_p": 0}, "typical_p", "typical sampling takes"),
        (COMPLETION, {"prompt": "x", "dry_multiplier": -1}, "dry_multiplier", "DRY"),
        (COMPLETION, {"prompt": "x", "json_schema": False}, "json_schema", "an object or true is needed, but false was given"),
        (COMPLETION, {"prompt": None}, "prompt", "but null was given"),
        (COMPLETION, {"prompt": ["x"] * 65}, "prompt", "65 prompts with n=1 would be 65 answers"),
        (COMPLETION, {"prompt": "x", "mirostat": 2, "top_k": 5}, "top_k", "leave top_k out"),
        (COMPLETION, {"prompt": "x", "xtc_threshold": 0.2}, "xtc_threshold", "xtc_threshold was given without xtc_probability"),
        (COMPLETION, {"prompt": "x", "repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty", "two names of one thing"),
        (COMPLETION, {"prompt": "x", "order": "lama.cpp"}, "order", "Did you mean 'llama.cpp'?"),
        (COMPLETION, {"prompt": "x", "regex": "("}, "regex", "("),
        (COMPLETION, {"prompt": "x", "regex": "a", "grammar": "b"}, "regex", "leave all but one out"),
        (COMPLETION, {"prompt": "x", "json_schema": {"type": "object", "minProperties": 2, "maxProperties": 1}}, "json_schema", "schema"),
        (COMPLETION, {"prompt": "x", "json_schema": {"$ref": "file:///etc/passwd"}}, "json_schema", "schema"),
        (COMPLETION, {"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format", "with a JSON schema in it"),
        (COMPLETION, {"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        (CHAT, {"messages": []}, "messages", "a list of at least 1 items is needed"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "messages.0.role is missing"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "this server reads {'type': 'text'",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, "messages", "a part of type 'None'"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs", "give logprobs=true too"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "two names of one number"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tool_choice": "auto"}, "tool_choice", "there are no tools to choose from"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools", "tools[0]"),
        ("/v1/embeddings", {"input": []}, "input", "input has 0 texts"),
        ("/v1/embeddings", {"input": ["", "x"]}, "input", "holds an empty text"),
        ("/tokenize", {}, "text", "Give text, or messages"),
        ("/detokenize", {"ids": [99999]}, "ids", "99999"),
    ],
)
def test_a_mistake_is_a_400_that_names_it(server: serving.Running, path: str, body: dict[str, Any], param: str, says: str) -> None:
    error = refused(server, path, body)
    assert says in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_schema_that_cannot_be_met_is_a_400_for_the_client(server: serving.Running) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 5, "maxLength": 2}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], response_format=form)


def test_a_prompt_longer_than_the_context_says_both_numbers(server: serving.Running) -> None:
    error = refused(server, COMPLETION, {"prompt": [5] * 250, "max_tokens": 10})
    assert error["code"] == "context_length_exceeded"
    assert "context here is 256 tokens" in error["message"]
    assert "260" in error["message"]
    assert "250 of the prompt, 10 of the answer" in error["message"]
    for more in ({}, {"max_tokens": 4}):
        error = refused(server, CHAT, {"messages": [{"role": "user", "content": "word " * 500}]} | more)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_every_setting_of_the_sampler_may_be_said() -> None:
    from glassformer.core.fields import hints

    rules = {"json_schema", "regex", "grammar", "choices"}
    assert set(hints(Settings)) - set(NOT_SERVED) - rules == set(Sampling.model_fields) - {"seed"}


def test_a_stop_that_never_comes_is_no_error(server: serving.Running) -> None:
    got = server.client.completions.create(model="tiny", prompt="x", max_tokens=3, stop=["never to be seen"])
    assert got.choices[0].finish_reason == "length"


def test_another_model_is_not_found(server: serving.Running) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here: this server serves 'tiny'"):
        server.client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.client.models.retrieve("../etc/passwd")


def test_a_model_without_a_template_sends_to_completions() -> None:
    with serving.running(serving.loaded(None)) as server:
        error = refused(server, CHAT, {"messages": [{"role": "user", "content": "x"}]})
        assert "no chat template" in error["message"]
        assert "/v1/completions" in error["message"]


def test_a_template_that_refuses_is_a_400() -> None:
    with serving.running(serving.loaded("{{ raise_exception('no system here') }}")) as server:
        assert "no system here" in refused(server, CHAT, {"messages": [{"role": "system", "content": "x"}]})["message"]


# Bodies


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "\xff\xfe"}', "The body is not UTF-8: byte 12 is 0xff"),
        (b'{"prompt": "x"', "The body is no JSON"),
        (b"", "The body is no JSON"),
        (b"[1, 2]", "The body is JSON, but no object"),
        (b'{"prompt": "x", "temperature": NaN}', "a finite number is needed, but nan was given"),
        (b'{"prompt": "x", "temperature": 1e999}', "a finite number is needed, but inf was given"),
        (b'{"prompt": "\\ud800"}', "holds a lone surrogate"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "The body is no JSON"),
        (b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "The body"),
        (b'{"prompt": "x", "json_schema": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}", "more than 100 lists and objects"),
    ],
)
def test_a_body_that_cannot_be_read(server: serving.Running, body: bytes, says: str) -> None:
    assert says in refused(server, COMPLETION, body)["message"]


def test_a_body_that_is_too_large(server: serving.Running) -> None:
    error = refused(server, COMPLETION, json.dumps({"prompt": "x" * 200_000}).encode(), 413)
    assert "200,014 bytes or more, and this server reads 100,000" in error["message"]

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 5000

    got = httpx.post(server.url + COMPLETION, content=pieces(), headers=JSON, timeout=30)
    assert got.status_code == 413


def test_a_body_that_does_not_come(server: serving.Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
        assert b"408" in line.recv(4096)
    serving.idle(server.served)


# Who may ask


def test_a_key_is_needed_where_there_is_one() -> None:
    with serving.running(serving.loaded(), key="secret") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.client.models.list().data[0].id == "tiny"
        for key, says in (("wrong", "not that of this server"), ("secre", "not that"), ("secrets", "not that")):
            with pytest.raises(openai.AuthenticationError, match=says):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0).models.list()
        for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}, {"Authorization": b"Bearer \xff\xfe"}):
            got = httpx.get(f"{server.url}/metrics", headers=headers)
            assert got.status_code == 401
            assert got.headers["www-authenticate"] == "Bearer"
            assert got.json()["error"]["code"] == "invalid_api_key"
        assert "needs a key, and none was given" in httpx.post(f"{server.url}/tokenize", content=b"{").json()["error"]["message"]


def test_an_empty_key_is_refused() -> None:
    from glassformer.web import Served

    with pytest.raises(InputError, match="The key is empty"):
        create_app(Served(serving.loaded(), "x"), key=" ")
    with pytest.raises(InputError, match="begins or ends with a space"):
        create_app(Served(serving.loaded(), "x"), key="secret\n")


def test_pages_of_other_origins_may_not_ask(server: serving.Running) -> None:
    got = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://evil.example"})
    assert got.status_code == 403
    assert "Pages of https://evil.example may not ask" in got.json()["error"]["message"]
    assert "access-control-allow-origin" not in got.headers
    assert httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 403  # another port, another origin
    assert httpx.get(f"{server.url}/v1/models", headers={"Origin": server.url}).status_code == 200
    with serving.running(serving.loaded(), cors=["https://good.example"]) as open_to:
        got = httpx.get(f"{open_to.url}/v1/models", headers={"Origin": "https://good.example"})
        assert got.headers["access-control-allow-origin"] == "https://good.example"
        asked = httpx.options(f"{open_to.url}{CHAT}", headers={"Origin": "https://good.example", "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200
        assert httpx.get(f"{open_to.url}/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_page_that_may_ask_may_read_a_refusal_at_the_gate() -> None:
    with serving.running(serving.loaded(), cors=["https://good.example"], key="secret") as server:
        got = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://good.example"})
        assert got.status_code == 401
        assert got.headers["access-control-allow-origin"] == "https://good.example"


def test_a_foreign_name_that_leads_to_this_machine_is_refused(server: serving.Running) -> None:
    port = server.url.rsplit(":", 1)[1]
    got = httpx.get(f"{server.url}/v1/models", headers={"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"})
    assert got.status_code == 403
    assert got.json()["error"]["code"] == "host_not_allowed"
    assert f"was asked as 'evil.example:{port}': ask 127.0.0.1 or localhost" in got.json()["error"]["message"]
    for name in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]", "127.0.0.2"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": f"{name}:{port}"}).status_code == 200
    with serving.running(serving.loaded(), key="secret") as keyed:
        got = httpx.get(f"{keyed.url}/v1/models", headers={"Host": "any.example", "Authorization": "Bearer secret"})
        assert got.status_code == 200


@pytest.mark.parametrize("sent", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_a_415(server: serving.Running, sent: str) -> None:
    got = httpx.post(f"{server.url}{COMPLETION}", content=b'{"prompt": "x"}', headers={"Content-Type": sent} if sent else {})
    assert got.status_code == 415
    assert "send the header 'Content-Type: application/json'" in got.json()["error"]["message"]
    assert (sent or "without a type") in got.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[" * 900 + b"]" * 900, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b"[" * 40_000 + b"]" * 40_000])
def test_a_deeply_nested_body_is_a_400(server: serving.Running, body: bytes) -> None:
    assert refused(server, COMPLETION, body)["code"] == "invalid_json"


def test_echo_that_cannot_be_streamed_is_refused_before_the_first_byte(server: serving.Running) -> None:
    for more in ({"logprobs": 1}, {"max_tokens": 0}):
        error = refused(server, COMPLETION, {"prompt": "x", "echo": True, "stream": True} | more)
        assert error["param"] == "echo"
        assert "cannot be streamed" in error["message"]


def test_a_scrape_is_no_running_request(server: serving.Running) -> None:
    assert "glassformer_running_requests 0.0" in httpx.get(f"{server.url}/metrics").text


# Limits of time and of the queue


def test_a_request_that_can_never_wait_whole_is_no_429() -> None:
    """Come again would be wrong: it would be refused each time."""
    with serving.running(serving.loaded(), slots=1, queue=4) as small:
        error = refused(small, COMPLETION, {"prompt": "x", "n": 5, "max_tokens": 2})
        assert "The request makes 5 answers, and on this server at most 4 may wait at once (--queue 4): ask for fewer." in error["message"]
        assert error["param"] == "n"
        error = refused(small, COMPLETION, {"prompt": ["x"] * 4, "user": "me", "max_tokens": 2})
        assert "at most 3 of one user may wait at once (--queue 4)" in error["message"]
        assert error["param"] == "prompt"
        assert httpx.post(f"{small.url}{COMPLETION}", json={"prompt": "x", "n": 3, "user": "me", "max_tokens": 2}, timeout=60).status_code == 200


def test_a_full_queue_is_a_429_that_says_when(server: serving.Running) -> None:
    with serving.running(serving.loaded(), slots=1, queue=1) as small:
        client = small.client
        with client.completions.create(model="tiny", prompt="x", max_tokens=250, stream=True, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
            waits = small.served.engine.submit(gf.Request([5], max_new_tokens=2))
            with pytest.raises(openai.RateLimitError, match=r"1 requests are waiting and the queue holds 1: try again later\.") as error:
                client.completions.create(model="tiny", prompt="x", max_tokens=200)
            waits.cancel()
            assert error.value.response.headers["retry-after"] == "1"
        serving.idle(small.served)


def test_an_answer_that_takes_too_long() -> None:
    with serving.running(serving.loaded(), slots=1, limits=Limits(answer_seconds=0.02)) as server:
        with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.02 seconds"):
            server.client.completions.create(model="tiny", prompt="x", max_tokens=200)
        with pytest.raises(openai.APIError, match=r"not finished within 0\.02 seconds"):
            list(server.client.completions.create(model="tiny", prompt="x", max_tokens=200, stream=True))
        serving.idle(server.served)
        assert server.served.engine.stats().cancelled == 2


def test_a_client_that_leaves_ends_its_answers(server: serving.Running) -> None:
    before = server.served.engine.stats().cancelled
    with server.client.completions.create(model="tiny", prompt="x", max_tokens=200, stream=True, n=2) as stream:
        next(iter(stream))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETION, json={"prompt": "y", "max_tokens": 200, "n": 3}, timeout=0.03)
    serving.idle(server.served)
    time.sleep(0.1)
    assert server.served.engine.stats().cancelled >= before + 4


# Other paths


def test_a_path_that_is_none(server: serving.Running) -> None:
    got = httpx.get(f"{server.url}/v1/complete")
    assert got.status_code == 404
    assert "There is nothing at '/v1/complete'" in got.json()["error"]["message"]
    assert httpx.get(server.url + COMPLETION).json()["error"]["message"] == "'/v1/completions' is not asked by GET."


def test_health_tokens_and_metrics(server: serving.Running) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "tiny"}
    ids = serving.tokenizer().encode("The sea")
    got = httpx.post(f"{server.url}/tokenize", json={"text": "The sea"}).json()
    assert (got["ids"], got["count"], got["max_model_len"]) == (ids, len(ids), 256)
    chat = [{"role": "user", "content": "Hi"}]
    assert httpx.post(f"{server.url}/tokenize", json={"messages": chat}).json()["ids"] == serving.loaded().chat(chat)
    assert httpx.post(f"{server.url}/detokenize", json={"ids": ids}).json() == {"text": "The sea"}
    server.client.completions.create(model="tiny", prompt="x", max_tokens=2)
    text = httpx.get(f"{server.url}/metrics").text
    assert 'glassformer_requests_total{path="/v1/completions",status="200"}' in text
    assert "glassformer_engine_slots 4.0" in text
    assert "glassformer_first_token_seconds_count" in text
    assert 'glassformer_answers_total{reason="length"}' in text


def test_while_it_drains_it_takes_nothing_new() -> None:
    with serving.running(serving.loaded()) as server:
        server.served.gate.draining = True
        got = httpx.get(f"{server.url}/health")
        assert (got.status_code, got.json()["status"]) == (503, "draining")
        with pytest.raises(openai.InternalServerError, match="takes nothing new"):
            server.client.completions.create(model="tiny", prompt="x")
        assert httpx.post(server.url + COMPLETION, json={"prompt": "x"}).headers["retry-after"] == "10"


def test_limits_are_above_nothing() -> None:
    with pytest.raises(InputError, match="The limit answers is 0, and a limit is above 0"):
        Limits(answers=0)


@pytest.mark.parametrize("name", ["num_beams", "guidance_scale", "draft"])
def test_what_only_generate_takes_is_said(name: str) -> None:
    from glassformer.web.problems import of_validation

    problem = of_validation([{"type": "extra_forbidden", "loc": (name,), "msg": "", "input": 2}], ["do_sample"])
    assert f"{name!r} is not served" in str(problem) and "glassformer generate" in str(problem)
