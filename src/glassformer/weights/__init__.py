"""Weights: how parameters arrive and leave."""

from .own import Loaded, load, save

__all__ = ["Loaded", "load", "save"]
