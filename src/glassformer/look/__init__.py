"""Looking inside: one question, one function, one answer that shows itself.

look.write_page("inside.html", model, tokenizer, "The cat sat on the mat")     a page for a text

Every function takes a model (or what ``gf.load`` gives) and a text or token ids (:mod:`~glassformer.look.subject`), and gives a
:class:`Result`: ``print`` it, ``.plot()`` it, ``.save("answer.html")`` it, or take its tensors.
"""

from __future__ import annotations

from .gather import Card, Inside, Lens, Norms, gather, head_figures
from .page import page, render, write_page
from .result import Grid, Result
from .subject import Subject, Target, read

__all__ = [
    "Card",
    "Grid",
    "Inside",
    "Lens",
    "Norms",
    "Result",
    "Subject",
    "Target",
    "gather",
    "head_figures",
    "page",
    "read",
    "render",
    "write_page",
]
