"""Looking inside: one page that shows what a model computed on a text.

look.write_page("inside.html", model, tokenizer, "The cat sat on the mat")
inside = look.gather(model, tokenizer, "The cat sat on the mat")      # the same numbers, as arrays
"""

from __future__ import annotations

from .gather import Card, Inside, Lens, Norms, gather, head_figures
from .page import page, render, write_page

__all__ = ["Card", "Inside", "Lens", "Norms", "gather", "head_figures", "page", "render", "write_page"]
