"""Generation: sampler chains, sessions that fork and rewind, text that streams."""

from .generate import Candidate, Generated, Token, generate, stream
from .links import Draw, Greedy, LogitBias, MinP, Penalties, Suppress, Temperature, TopK, TopP, build_chain
from .sampler import Chain, Final, Link, Narrowing, Step
from .session import Drawn, Session
from .state import Own, State

__all__ = [
    "Candidate",
    "Chain",
    "Draw",
    "Drawn",
    "Final",
    "Generated",
    "Greedy",
    "Link",
    "LogitBias",
    "MinP",
    "Narrowing",
    "Own",
    "Penalties",
    "Session",
    "State",
    "Step",
    "Suppress",
    "Temperature",
    "Token",
    "TopK",
    "TopP",
    "build_chain",
    "generate",
    "stream",
]
