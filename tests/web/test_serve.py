"""``glassformer serve`` as a program: how it starts, what it warns of, and how a signal ends it."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import glassformer as gf
import warm
from glassformer.cli import app as cli
from web import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    what = serving.loaded()
    return gf.save(what.model, tmp_path_factory.mktemp("models") / "small", what.tokenizer)


def begun(folder: Path, *more: str) -> tuple[warm.Program, str]:
    """A server as a program, once it listens, and its address."""
    program = warm.Program(["-m", "glassformer", "serve", str(folder), "--port", "0", "--device", "cpu", *more])
    until = time.monotonic() + 90
    while time.monotonic() < until and program.returncode is None:
        if found := re.search(r"at (http://\S+) \(", program.errors()):
            url = found[1].replace("0.0.0.0", "127.0.0.1")
            while time.monotonic() < until:
                try:
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        return program, url
                except httpx.TransportError:
                    time.sleep(0.05)
        time.sleep(0.05)
    raise AssertionError(program.errors())


def test_a_signal_lets_the_running_answer_finish(folder: Path) -> None:
    program, url = begun(folder, "--name", "mine", "--slots", "2", "--capacity", "300", "--log")
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
    lines: list[str] = []
    started, refused = threading.Event(), []

    def ask() -> None:
        body = {"prompt": "The sea", "max_tokens": 250, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
            for line in reply.iter_lines():
                lines.append(line)
                started.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert started.wait(60)
    program.send_signal(signal.SIGTERM)
    until = time.monotonic() + 20
    while time.monotonic() < until and not refused:
        got = httpx.get(f"{url}/health", timeout=10)
        if got.status_code == 503:
            assert got.json()["status"] == "draining"
            refused.append(httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=10).status_code)
    thread.join(120)
    assert refused == [503]
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 250
    assert program.wait(60) == 0
    assert program.errors().rstrip().endswith("stopped")
    assert '"GET /v1/models HTTP/1.1" 200' in program.errors()  # --log: a line for every request, with all else that is said


@pytest.mark.parametrize("how", ["the time is over", "a second signal"])
def test_what_does_not_finish_in_time_is_told(folder: Path, how: str) -> None:
    """Whoever still waits gets 503, a stream the error as an event; and the log holds no traceback."""
    program, url = begun(folder, "--slots", "2", "--capacity", "2048", "--drain", "0.5" if how == "the time is over" else "60")
    told: dict[str, Any] = {}
    started = threading.Event()
    body = {"prompt": "The sea", "max_tokens": 2000, "seed": 1}

    def whole() -> None:
        told["whole"] = httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    def stream() -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as reply:
            for line in reply.iter_lines():
                told.setdefault("lines", []).append(line)
                started.set()

    threads = [threading.Thread(target=whole), threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    begin = time.monotonic()
    program.send_signal(signal.SIGTERM)
    if how == "a second signal":
        time.sleep(0.3)
        program.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert program.wait(30) == 0
    assert time.monotonic() - begin < 10
    assert told["whole"].status_code == 503
    assert "was not finished in time" in told["whole"].json()["error"]["message"]
    last = [line for line in told["lines"] if line][-1]
    assert "was not finished in time" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in program.errors()


def test_beyond_loopback_without_a_key_it_warns(folder: Path) -> None:
    program, _ = begun(folder, "--host", "0.0.0.0")
    assert "note: everybody who can reach 0.0.0.0 may use this model: give --api-key" in program.errors()
    assert re.search(r"the client's base_url is http://NAME-OF-THIS-MACHINE:\d+/v1\.", program.errors())
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 0


def test_the_key_comes_from_the_environment_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSFORMER_API_KEY", "secret")
    program, url = begun(folder, "--host", "0.0.0.0", "--drain", "1")
    assert "note:" not in program.errors()
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 0


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(["serve", *args])
    return code, capsys.readouterr().err


def test_many_devices_are_for_vllm_and_it_says_how(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, err = said(capsys, str(folder), "--devices", "4")
    assert code == 2
    assert "runs on one device, and 4 were asked for" in err
    assert f"glassformer convert {folder} small-hf --to hf && vllm serve small-hf --tensor-parallel-size 4" in err
    assert said(capsys, str(folder), "--device", "cuda:0,cuda:1")[1].endswith("--tensor-parallel-size 2\n")
    assert said(capsys, "hf://owner/name", "--devices", "2")[1].endswith("format: vllm serve owner/name --tensor-parallel-size 2\n")


def test_no_command_is_given_that_would_fail(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    unheard = gf.Decoder(vocab_size=9, d_model=8, blocks=(gf.Block(gf.Attention(2, position=gf.ALiBi()), gf.Gated(8, act="relu2")),))
    gf.save(unheard.build(seed=0), tmp_path / "unheard")
    err = said(capsys, str(tmp_path / "unheard"), "--devices", "4")[1]
    assert "4 were asked for; no other server runs this model either: No published family computes what this Decoder does." in err
    assert "vllm" not in err
    assert "There is nothing at" in said(capsys, str(tmp_path / "nowhere"), "--devices", "4")[1]


def test_a_folder_of_the_hub_needs_no_conversion(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(folder), str(tmp_path / "hub"), "--to", "hf"]) == 0
    capsys.readouterr()
    err = said(capsys, str(tmp_path / "hub"), "--devices", "2")[1]
    assert f"hub's format: vllm serve {tmp_path / 'hub'} --tensor-parallel-size 2" in err


def test_what_is_missing_is_named_with_the_remedy(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest))
    assert said(capsys, str(folder)) == (2, "error: The server needs uvicorn: pip install 'glassformer[serve]'.\n")


@pytest.mark.parametrize("origin", ["foo", "https://", "https://a.example/", "a.example:80/x"])
def test_what_is_no_origin_is_refused_before_it_listens(capsys: pytest.CaptureFixture[str], folder: Path, origin: str) -> None:
    code, err = said(capsys, str(folder), "--cors", origin)
    assert code == 2
    assert f"{origin!r} is no origin, so no page would be let in: https://example.org is one" in err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, err = said(capsys, str(folder), "--port", str(port))
    assert code == 2
    assert f"Nobody can listen at 127.0.0.1:{port} (Address already in use): choose another --port or --host." in err
    assert "There is no model at" in said(capsys, "nowhere")[1]


def test_the_page_shows_how_to_ask_this_very_server() -> None:
    with serving.running(serving.loaded()) as server:
        page = httpx.get(f"{server.url}/").text
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
        assert "https://" not in page.replace("https://example", "")
        assert data["examples"][0]["code"].startswith(f"curl {server.url}/v1/chat/completions")
        streamed, inside = data["examples"][1]["code"], data["examples"][2]["code"]
        for code in (streamed, inside):
            exec(compile(code, "page", "exec"), {"print": lambda *_, **__: None})
        assert "return_sites" in inside
    with serving.running(serving.loaded(None), key="secret") as server:  # with a key any Host is let in
        page = httpx.get(f"{server.url}/", headers={"Host": "a</script><b>:1"}).text
        assert "<b>" not in page
        assert "completions.create" in page
    with serving.running(serving.encoder()) as server:
        assert "/v1/embeddings" in httpx.get(f"{server.url}/").text
