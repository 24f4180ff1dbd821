"""Generation: sampler chains, sessions that fork and rewind, text that streams."""

from .branching import Branch, Branches
from .combined import JointCache
from .constrain import AnyJSON, Choices, Constrained, Grammar, JSONSchema, Regex, ToolForm, Where
from .contrastive import Contrast
from .contrastive_search import ContrastiveSearch
from .dola import DoLa
from .drawing import XTC, AdaptiveP, Mirostat1, Mirostat2
from .engine import Engine, Request, Stats, Ticket
from .forcing import ForceFirst, ForceLast, MinNewTokens, SuppressFirst
from .generate import Candidate, Generated, Token, generate, generation, stream
from .guessing import DraftModel, Guesser, Guesses, PromptLookup
from .guidance import Guidance
from .gumbel import Gumbel
from .history import DRY, BadWords, Breakers, NoRepeatNGram, SequenceBias
from .links import Draw, Greedy, LogitBias, MinP, Penalties, Suppress, Temperature, TopK, TopP
from .named import Settings, build_chain
from .sampler import Chain, Final, Link, Narrowing, Step
from .search import BeamSearch, BeamTree, Hypothesis
from .session import Drawn, Session
from .speculative import Speculative
from .state import Own, State
from .temperatures import DynamicTemperature
from .trace import Chance, Choice, Stage, Trace
from .truncation import Epsilon, Eta, TopA, TopH, TopNSigma, Typical

__all__ = [
    "AdaptiveP",
    "AnyJSON",
    "BadWords",
    "BeamSearch",
    "BeamTree",
    "Branch",
    "Branches",
    "Breakers",
    "Candidate",
    "Chain",
    "Chance",
    "Choice",
    "Choices",
    "Constrained",
    "Contrast",
    "ContrastiveSearch",
    "DRY",
    "DoLa",
    "DraftModel",
    "Draw",
    "Drawn",
    "DynamicTemperature",
    "Engine",
    "Epsilon",
    "Eta",
    "Final",
    "ForceFirst",
    "ForceLast",
    "Generated",
    "Grammar",
    "Greedy",
    "Guesser",
    "Guesses",
    "Guidance",
    "Gumbel",
    "Hypothesis",
    "JSONSchema",
    "JointCache",
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
    "PromptLookup",
    "Regex",
    "Request",
    "SequenceBias",
    "Session",
    "Settings",
    "Stage",
    "Speculative",
    "State",
    "Stats",
    "Step",
    "Suppress",
    "SuppressFirst",
    "Temperature",
    "Ticket",
    "Token",
    "ToolForm",
    "TopA",
    "TopH",
    "TopK",
    "TopNSigma",
    "TopP",
    "Trace",
    "Typical",
    "Where",
    "XTC",
    "build_chain",
    "generate",
    "generation",
    "stream",
]
