"""What the tests of the server share: small models with a real tokenizer, and servers on free ports."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn

import glassformer as gf
from glassformer.infer.engine import Engine
from glassformer.models import Block, Decoder, Encoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm
from glassformer.parts.readout import Mean, Vector
from glassformer.parts.rotary import Rotary
from glassformer.web import Limits, Served, create_app
from glassformer.weights.own import Loaded
from tools import lively

BOOKS = Path(__file__).resolve().parents[1] / "data" / "books"
TEMPLATE = (
    "{% if tools %}Write <tool_call> and JSON.\n{% for t in tools %}{{ t|tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = gf.Tokenizer.load(BOOKS)
    made.chat_template = template
    return made


def spec(layers: int = 2) -> Decoder:
    block = Block(Attention(4, n_kv_heads=2, position=Rotary()), Gated(48), norm=RMSNorm())
    return Decoder(2048, 32, (block,) * layers, final_norm=RMSNorm(), tied=True)


@cache
def loaded(template: str | None = TEMPLATE, seed: int = 0) -> Loaded:
    return Loaded(lively(spec().build(seed=seed), seed).eval(), tokenizer(template), {})


@cache
def encoder() -> Loaded:
    made = Encoder(2048, 32, (Block(Attention(4, position=Rotary()), Gated(48)),) * 2, readout=Vector(pool=Mean(), normalise=True))
    return Loaded(lively(made.build(seed=0)).eval(), tokenizer(None), {})


class Running:
    """A server that runs: its address, what it serves, and clients for it."""

    def __init__(self, url: str, served: Served, key: str = "none"):
        self.url, self.served, self.key = url, served, key

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    @property
    def asynchronous(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)


@contextlib.contextmanager
def running(what: Loaded, *, slots: int = 4, capacity: int = 256, queue: int = 64, limits: Limits | None = None, **how: Any) -> Iterator[Running]:
    """A real uvicorn in a thread, until the block ends."""
    torch.set_num_threads(1)
    writes = not isinstance(what.model.spec, Encoder)
    engine = Engine(what.model, what.tokenizer, slots=slots, capacity=capacity, queue=queue) if writes else None
    allowed = {name: how.pop(name) for name in ("allow_edits", "allow_sites") if name in how}
    served = Served(what, "tiny", engine, limits or Limits(), **allowed)
    app = create_app(served, **how)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", served, how.get("key") or "none")
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def idle(served: Served, seconds: float = 10) -> None:
    """Wait until nothing runs and nothing waits in the engine."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stats = served.engine.stats()
        if stats.running == stats.waiting == served.gate.running == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"still busy after {seconds} s: {stats}, {served.gate}")
