"""Every error that glassformer raises on purpose, as one tree.

    GlassformerError
    ├── SpecError         a configuration that cannot be built, or a path in it that does not exist
    ├── InputError        tokens, lengths or shapes that the model cannot take
    ├── SiteError         a name that is no place in this model
    ├── MaskError         a mask that does not fit the call
    ├── CacheError        a cache that is full, or is asked for what it no longer holds
    ├── TokenizerError    text or tokenizer files that cannot be used
    ├── DataError         training data that is missing, empty or made with another tokenizer
    ├── WeightsError      parameters that do not fit the model
    ├── CheckpointError   a saved run that is incomplete, edited or of another run
    ├── TrainingError     a run that cannot go on
    │   └── NotFinite     a loss or an activation became NaN or infinite
    ├── SamplerError      sampling settings that make no sense
    ├── EngineError       an engine that cannot go on with a request
    │   ├── QueueFull     too many requests wait already
    │   └── Cancelled     somebody asked for a request to end
    └── RecipeError       a recipe or a ``--set path=value`` that cannot be read

and one warning, ``GlassformerWarning``: what can be done, but may not mean what was meant.

A message says what happened, the two values that disagree, and what to do. The command line
prints it without a traceback; Python users catch the class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GlassformerError(Exception):
    """The root: ``except GlassformerError`` catches every deliberate error of this package."""


class GlassformerWarning(UserWarning):
    """What can be done, but may not mean what was meant. The command line prints it as one line, ``note: ...``, on standard error."""


class SpecError(GlassformerError, ValueError):
    """A Spec holds a value that cannot be built, or a path names nothing in it."""


class InputError(GlassformerError, ValueError):
    """What was given to a forward pass does not fit the model."""


class SiteError(GlassformerError, LookupError):
    """A site path or pattern matches nothing in this model, or was not recorded."""


class MaskError(GlassformerError, ValueError):
    """A mask does not fit the shapes or the cache of the call."""


class CacheError(GlassformerError, ValueError):
    """The cache cannot hold or give back what was asked."""


class TokenizerError(GlassformerError, ValueError):
    """A tokenizer cannot be trained, read, or applied."""


class DataError(GlassformerError, ValueError):
    """Training data is missing, damaged, or belongs to another tokenizer."""


class WeightsError(GlassformerError, ValueError):
    """Saved parameters do not fit the model."""


class CheckpointError(GlassformerError, ValueError):
    """A checkpoint is incomplete, edited, or belongs to another run."""


class TrainingError(GlassformerError, RuntimeError):
    """Training cannot go on."""


class NotFinite(TrainingError):
    """A loss or an activation became NaN or infinite; the message names the step and the first site."""


class SamplerError(GlassformerError, ValueError):
    """Sampling settings contradict each other or the vocabulary."""


class EngineError(GlassformerError, RuntimeError):
    """An engine is stopped, or cannot go on with a request."""


class QueueFull(EngineError):
    """Too many requests wait already; the message says how many."""


class Cancelled(EngineError):
    """A request was cancelled, or its engine stopped, before it had finished."""


class RecipeError(GlassformerError, ValueError):
    """A recipe file or an override on the command line cannot be read."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """``" Did you mean 'a', 'b'?"`` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=most, cutoff=0.5)
    return f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
