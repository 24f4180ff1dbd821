"""Speaking: a model's own door to generation, which lives one floor above the models and is fetched when it is first asked for.

model.generate("Once upon", tokenizer=tok, temperature=0.8, seed=7)      what gf.generate(model, …) gives
print(model.generation(temperature=0.8, min_p=0.05, order="llama.cpp"))  the chain that these options build
"""

from __future__ import annotations

import importlib
from typing import Any


class Speaking:
    """What every built model can be asked to say."""

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt: ``gf.generate(model, prompt, **options)``, whose options, results and errors these are."""
        return _upstairs().generate(self, prompt, **options)

    def generation(self, **options: Any) -> Any:
        """The chain that :meth:`generate` builds from these options, ``gf.generation(model, **options)``; print it to see what is done, in which order."""
        return _upstairs().generation(self, **options)


def _upstairs() -> Any:
    return importlib.import_module("glassformer.infer")
