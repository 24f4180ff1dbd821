"""Searches: the most probable texts in place of one drawn token by token, and the tree of everything that was considered."""

from .beam import BeamRun, Found
from .endings import Endings
from .hypothesis import Node
from .phrases import Phrases, read_phrases
from .settings import BeamSearch, read_search
from .tree import BeamTree, Hypothesis

__all__ = ["BeamRun", "BeamSearch", "BeamTree", "Endings", "Found", "Hypothesis", "Node", "Phrases", "read_phrases", "read_search"]
