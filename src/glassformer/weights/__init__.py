"""Weights: how parameters arrive and leave.

opened = weights.open(path)                 what it is; nothing is read
model, report = opened.load(dtype="bf16")   the model, and what became of every tensor
weights.load(path)                          the model, its tokenizer and settings in one word
weights.save(model, folder)                 our own format
weights.export_hf(model, folder)            a folder that transformers, vLLM and llama.cpp's converter open
"""

from .export import export_hf
from .opened import Opened, Report, load, open
from .own import Loaded, save

__all__ = ["Loaded", "Opened", "Report", "export_hf", "load", "open", "save"]
