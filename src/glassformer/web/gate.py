"""The gate: what every request passes before anything of it is read.

    request ──► counted ──► is the server stopping? ──► origin ──► key ──► application
                              503                    403 (host too)  401

A web page of another origin is refused even without a key, since a browser would send its requests to a server on the reader's own machine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Problem
from .served import Gate, Served

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/health")
"""Paths that need no key."""
WATCHING = ("/health", "/metrics")
"""Paths that look at the server: they are no work of it, and are answered while it stops."""


class GateMiddleware:
    """Counts, and refuses what is not to be let in. ``origins``: those whose pages may ask; ``host``: where the server listens."""

    def __init__(self, app: ASGIApp, served: Served, key: str | None, origins: Sequence[str], host: str, answer: Any):
        self.app, self.served, self.origins, self.host, self.answer = app, served, frozenset(origins), host, answer
        self.key = None if key is None else key.encode()

    @property
    def gate(self) -> Gate:
        return self.served.gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        watches = scope["path"] in WATCHING
        self.gate.running += not watches
        try:
            problem = self.refused(scope)
            await (self.app if problem is None else self.answer(problem))(scope, receive, counted)
        finally:
            self.gate.running -= not watches
            route = getattr(scope.get("route"), "path", "other")
            self.served.metrics.requests.labels(route, str(status)).inc()

    def refused(self, scope: Scope) -> Problem | None:
        """Why a request is not let in, if it is not."""
        path, headers = scope["path"], {k.lower(): v for k, v in scope["headers"]}
        if self.gate.draining and path not in WATCHING:
            return Problem(503, "The server is stopping: it finishes what runs and takes nothing new.", headers={"Retry-After": "10"})
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if host and self.key is None and self.host in LOOPBACK and not self._named(host):
            # A name of somebody else's that leads here (DNS rebinding) makes his page and this server one origin to a browser.
            return Problem(
                403,
                f"This server listens on this machine only, and was asked as {host[:100]!r}: ask 127.0.0.1 or localhost, or start it with --api-key or --host.",
                code="host_not_allowed",
            )
        if origin and origin not in self.origins and "*" not in self.origins and not self._own(origin, host):
            return Problem(
                403, f"Pages of {origin[:100]} may not ask this server: start it with --cors {origin[:100]} if they should.", code="origin_not_allowed"
            )
        if self.key is None or path in OPEN or scope["method"] == "OPTIONS":
            return None
        given = headers.get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.key):
            return None
        said = "The key is not that of this server" if token else "This server needs a key, and none was given"
        return Problem(401, f"{said}: send it as 'Authorization: Bearer KEY'.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _own(self, origin: str, host: str) -> bool:
        """Whether a page of this origin came from this very server, its port included."""
        netloc = origin.partition("://")[2]
        return netloc.lower() == host.lower() and (self.key is not None or self._named(host))

    def _named(self, netloc: str) -> bool:
        """Whether ``name:port`` is this server's by its name: nobody else can make that name lead here."""
        if any(netloc == origin.partition("://")[2] for origin in self.origins):
            return True
        try:
            name = urlsplit(f"//{netloc}").hostname or ""
        except ValueError:
            return False
        if name in LOOPBACK or name == self.host:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.host not in LOOPBACK
