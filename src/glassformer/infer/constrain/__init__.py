"""Constrained decoding: text that a schema, a pattern, a grammar, a choice or a function of yours allows, and calls of tools.

    gf.generate(model, prompt, tokenizer=tok, json_schema=schema)        regex=…   grammar=…   choices=[…]   allowed=function
    Constrained(JSONSchema(schema), tok) | Temperature(0.8) | Draw()     the same as links

    rule ──► one grammar ────────────────────────────────┬──► Matchers (where a row stands) ──► the tokens that may follow; all others -inf
    tokenizer ──► Vocabulary (the bytes of each token) ──┘

The grammar's work is llguidance's: an Earley parser over derivatives of regular expressions, walked along a trie of the vocabulary.
"""

from .links import Constrained, Where
from .rules import AnyJSON, Choices, Grammar, JSONSchema, Regex, TextRule
from .tools import Tool, ToolCall, ToolForm, ToolParser
from .vocabulary import Vocabulary

__all__ = [
    "AnyJSON",
    "Choices",
    "Constrained",
    "Grammar",
    "JSONSchema",
    "Regex",
    "TextRule",
    "Tool",
    "ToolCall",
    "ToolForm",
    "ToolParser",
    "Vocabulary",
    "Where",
]
