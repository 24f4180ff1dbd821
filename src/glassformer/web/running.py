"""Running the server: uvicorn, and how it comes to an end.

signal ──► draining: /health says so, new requests get 503 ──► running answers are finished ──► exit 0
second signal, or drain_seconds over ───────────────────────► what still runs gets 503     ──► exit 0
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from glassformer.core.errors import InputError

from .served import Served

LAST_WORDS = 2.0
"""Seconds in which answers that are cut off may still say so to their clients."""


class Draining(uvicorn.Server):
    """uvicorn that finishes what runs before it closes the door."""

    def __init__(self, config: uvicorn.Config, served: Served):
        super().__init__(config)
        self.served = served
        self._until = self._cut = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins to drain, the second cuts off what still runs."""
        now = time.monotonic()
        self._until = now if self.served.gate.draining else now + self.served.limits.drain_seconds
        self.served.gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.served.gate.draining and not self.should_exit:
            now = time.monotonic()
            if now >= self._until and self._cut == math.inf:
                self._cut = now
                threading.Thread(target=self.served.cut, daemon=True).start()
            self.force_exit = now > self._cut + LAST_WORDS
            self.should_exit = self.force_exit or self.served.gate.running == 0
        return await super().on_tick(counter)


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, log: str = "warning", said: Any = None) -> None:
    """Run until a signal ends it. ``port`` 0 takes a free one. ``said(url)`` is called once it listens.

    Raises :class:`InputError` if nobody can listen there.
    """
    served: Served = app.state.served
    written = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    written["handlers"]["access"]["stream"] = "ext://sys.stderr"  # with all else that is said
    config = uvicorn.Config(
        app, host=host, port=port, log_level=log, access_log=log == "info", log_config=written, timeout_graceful_shutdown=1, lifespan="on", server_header=False
    )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family=family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"Nobody can listen at {host}:{port} ({getattr(error, 'strerror', None) or error}): choose another --port or --host.") from None
    with listener:
        listener.set_inheritable(True)
        if said is not None:
            shown = f"[{host}]" if ":" in host else host
            said(f"http://{shown}:{listener.getsockname()[1]}")
        config.load()  # which sets the logging up
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        Draining(config, served).run(sockets=[listener])
    print("stopped", file=sys.stderr)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log says something: not that a task was cancelled whose client read nothing any more when the server ended."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
