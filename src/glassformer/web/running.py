"""Running the server: uvicorn, and how it comes to an end.

signal ──► draining: /health says so, new requests get 503 ──► running answers are finished ──► exit 0
second signal, or drain_seconds over ───────────────────────► what still runs is cut off   ──► exit 0
"""

from __future__ import annotations

import copy
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from glassformer.core.errors import InputError

from .served import Served


class Draining(uvicorn.Server):
    """uvicorn that finishes what runs before it closes the door."""

    def __init__(self, config: uvicorn.Config, served: Served):
        super().__init__(config)
        self.served = served
        self._since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins to drain, the second ends at once."""
        if self.served.gate.draining:
            self.should_exit = self.force_exit = True
        self.served.gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.served.gate.draining and not self.should_exit:
            self._since = self._since or time.monotonic()
            over = time.monotonic() - self._since > self.served.limits.drain_seconds
            self.should_exit = over or self.served.gate.running == 0
        return await super().on_tick(counter)


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, log: str = "warning", said: Any = None) -> None:
    """Run until a signal ends it. ``port`` 0 takes a free one. ``said(url)`` is called once it listens.

    Raises :class:`InputError` if nobody can listen there.
    """
    served: Served = app.state.served
    written = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    written["handlers"]["access"]["stream"] = "ext://sys.stderr"  # with all else that is said
    config = uvicorn.Config(
        app, host=host, port=port, log_level=log, access_log=log == "info", log_config=written, timeout_graceful_shutdown=5, lifespan="on", server_header=False
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
        Draining(config, served).run(sockets=[listener])
    print("stopped", file=sys.stderr)
