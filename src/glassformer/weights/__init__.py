"""Weights: how parameters arrive and leave.

opened = weights.open(path)                 what it is; nothing is read
model, report = opened.load(dtype="bf16")   the model, and what became of every tensor
weights.load(path)                          the model, its tokenizer and settings in one word
weights.save(model, folder)                 our own format
weights.verify(folder)                      the same tokens here and in transformers, site by site
weights.quantise(model, "int8")             matrices in 8 or 4 bits (torchao)
weights.export_hf(model, folder)            a folder that transformers, vLLM and llama.cpp's converter open
weights.export_gguf(model, file)            a file that llama.cpp opens
"""

from .export import export_hf
from .export_gguf import export_gguf
from .opened import Opened, Report, load, open
from .own import Loaded, save
from .quantise import quantise
from .verify import Verification, verify

__all__ = ["Loaded", "Opened", "Report", "Verification", "export_gguf", "export_hf", "load", "open", "quantise", "save", "verify"]
