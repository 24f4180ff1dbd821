"""Tokenizers: train, load, save, and see which letters became which token. No torch in this room.

>>> from glassformer.text import Tokenizer, train
>>> tokenizer = train("bpe", texts=["the car is red, the car is fast"], vocab_size=300, special=["<|endoftext|>"])
>>> tokenizer.decode(tokenizer.encode("the red car"))
'the red car'
"""

from .tokenizer import Piece, Tokenizer
from .training import KINDS, train

__all__ = ["KINDS", "Piece", "Tokenizer", "train"]
