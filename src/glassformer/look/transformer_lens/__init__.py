"""For people who come from TransformerLens: their names on the same sites.

from glassformer.look.transformer_lens import HookedTransformer, FactoredMatrix, utils

model = HookedTransformer.from_pretrained("runs/books")
logits, cache = model.run_with_cache("The old man", remove_batch_dim=True)
cache["pattern", 2]
"""

from __future__ import annotations

from ..factored import FactoredMatrix
from . import patching, utils
from .cache import ActivationCache
from .hook_points import HookPoint
from .model import HookedTransformer

__all__ = ["ActivationCache", "FactoredMatrix", "HookPoint", "HookedTransformer", "patching", "utils"]
