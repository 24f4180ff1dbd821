"""``/metrics``: what Prometheus reads. Counts of this server, and what the engine says of itself at that moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from .served import Served

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server, in a registry of their own: two servers in one process do not meet."""

    def __init__(self, served: Served):
        self.registry = CollectorRegistry()
        self.requests = Counter("glassformer_requests", "Requests answered, by path and status", ["path", "status"], registry=self.registry)
        self.finished = Counter("glassformer_answers", "Answers, by how they ended", ["reason"], registry=self.registry)
        self.prompt = Counter("glassformer_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.written = Counter("glassformer_generated_tokens", "Tokens generated", registry=self.registry)
        self.first = Histogram("glassformer_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=self.registry)
        self.whole = Histogram("glassformer_answer_seconds", "From the request to its last token", buckets=SECONDS, registry=self.registry)
        self.registry.register(_Now(served))

    def ticket(self, ticket: Any, reason: str) -> None:
        """Count an answer that has ended."""
        self.finished.labels(reason).inc()
        self.prompt.inc(len(ticket.prompt_ids))
        self.written.inc(len(ticket.tokens))
        if ticket.first is not None:
            self.first.observe(ticket.first - ticket.submitted)
        if ticket.finished is not None:
            self.whole.observe(ticket.finished - ticket.submitted)

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        return generate_latest(self.registry)


class _Now:
    """Numbers that are asked for at the moment of reading."""

    def __init__(self, served: Served):
        self.served = served

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("glassformer_running_requests", "Requests that are being answered", value=self.served.gate.running)
        yield GaugeMetricFamily("glassformer_draining", "1 while the server finishes what runs and takes nothing new", value=float(self.served.gate.draining))
        for name, value in numbers(self.served.engine.stats() if self.served.engine is not None else {}).items():
            yield GaugeMetricFamily(f"glassformer_engine_{name}", f"The engine's {name.replace('_', ' ')}", value=value)


def numbers(stats: Any) -> dict[str, float]:
    """The numbers among what an engine says of itself."""
    found = stats if isinstance(stats, dict) else dataclasses.asdict(stats) if dataclasses.is_dataclass(stats) and not isinstance(stats, type) else vars(stats)
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
