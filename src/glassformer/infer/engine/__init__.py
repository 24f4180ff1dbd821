"""Continuous batching: many requests at once over one cache, each as if it were alone."""

from .engine import Engine
from .request import Request
from .stats import BOUNDS, Stats
from .ticket import Ticket

__all__ = ["BOUNDS", "Engine", "Request", "Stats", "Ticket"]
