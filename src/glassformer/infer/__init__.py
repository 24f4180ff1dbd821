"""Generation: sampler chains, sessions that fork and rewind, text that streams."""

from .drawing import XTC, AdaptiveP, Mirostat1, Mirostat2
from .forcing import ForceFirst, ForceLast, MinNewTokens, SuppressFirst
from .generate import Candidate, Generated, Token, generate, generation, stream
from .history import DRY, BadWords, Breakers, NoRepeatNGram, SequenceBias
from .links import Draw, Greedy, LogitBias, MinP, Penalties, Suppress, Temperature, TopK, TopP
from .named import Settings, build_chain
from .sampler import Chain, Final, Link, Narrowing, Step
from .session import Drawn, Session
from .state import Own, State
from .temperatures import DynamicTemperature
from .trace import Chance, Choice, Stage, Trace
from .truncation import Epsilon, Eta, TopA, TopH, TopNSigma, Typical

__all__ = [
    "AdaptiveP",
    "BadWords",
    "Breakers",
    "Candidate",
    "Chain",
    "Chance",
    "Choice",
    "DRY",
    "Draw",
    "Drawn",
    "DynamicTemperature",
    "Epsilon",
    "Eta",
    "Final",
    "ForceFirst",
    "ForceLast",
    "Generated",
    "Greedy",
    "Link",
    "LogitBias",
    "MinNewTokens",
    "MinP",
    "Mirostat1",
    "Mirostat2",
    "Narrowing",
    "NoRepeatNGram",
    "Own",
    "Penalties",
    "SequenceBias",
    "Session",
    "Settings",
    "Stage",
    "State",
    "Step",
    "Suppress",
    "SuppressFirst",
    "Temperature",
    "Token",
    "TopA",
    "TopH",
    "TopK",
    "TopNSigma",
    "TopP",
    "Trace",
    "Typical",
    "XTC",
    "build_chain",
    "generate",
    "generation",
    "stream",
]
