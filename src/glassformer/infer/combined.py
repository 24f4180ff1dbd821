"""Models made of models: what they say together is read, cached, forked and wound back as if one model had said it.

    guided  = Guidance(1.5).over(model)                     # away from what the model says without the prompt
    careful = Contrast(alpha=0.1).over(expert, amateur)     # away from what a weaker model says
    factual = DoLa("high").over(model)                      # away from what the model's own early layers say
    varied  = ContrastiveSearch(0.6, k=4).over(model)                  # away from what the text has been about

    tokens ──┬──► branch 0 ──► logits ──┐
             └──► branch 1 ──► logits ──┴──► one rule ──► logits      Session, generate, stream and the traces see these only
    cache  = (cache of branch 0, cache of branch 1)

A combined model is called as a model is, and its ``cache()`` is a :class:`JointCache`. Everything that is reported as the model's own
(``logprob``, ``top``, a trace before its first link) is of the combined distribution. A tap sees the pass of the first branch only: the model with the
prompt, the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.cache import Cache
from glassformer.core.errors import CacheError, InputError
from glassformer.core.fields import described

Keep = Tensor | int | None
Lengths = Sequence[int] | Tensor | None


class Combined(nn.Module):
    """Base of all combined models: ``model`` is the branch that taps see, and whose Spec is theirs."""

    model: Any

    def __init__(self, model: Any):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"A combined model is made of models, but {described(type(model))} was given: spec.build() makes one, load(folder).model is one.")
        if isinstance(model, Combined):
            raise InputError(f"A combined model is made of plain models, but {type(model).__name__} is one itself: choose one of the two combinations.")
        self.model = model

    @property
    def spec(self) -> Any:
        """What the first branch was built from."""
        return self.model.spec

    @property
    def beside(self) -> int:
        """How long a text another branch begins with in place of the prompt; 0 if none does."""
        return 0

    def sites(self, path: str = "") -> Any:
        """The sites that a tap sees: those of the first branch."""
        return self.model.sites(path)


class JointCache(Cache):
    """The caches of several branches as one. What is asked of it is answered by the first; what changes it changes all.

    ``begun``: whether the branches have read anything. ``least``: what the later branches hold at least once they have begun.
    Raises :class:`CacheError` where it is handed to a model that is not the combined one.
    """

    def __init__(self, parts: Sequence[Cache], begun: bool = False, least: int = 0):
        super().__init__(parts[0].clock, parts[0].layers, parts[0].capacity)
        self.parts, self.begun, self.least, self._torn = tuple(parts), begun, least, False

    def open(self, rows: int, t: int, lengths: Sequence[int] | None, device: torch.device) -> Tensor:
        raise CacheError("This cache holds the branches of a combined model, and a single model was given it: make one with that model's own cache(...).")

    @property
    def bytes(self) -> int:
        """Bytes of all buffers of all branches."""
        return sum(part.bytes for part in self.parts)

    def select(self, rows: Sequence[int]) -> JointCache:
        """A new cache of copies of these rows of every branch."""
        self._check_whole()
        return JointCache([part.select(rows) for part in self.parts], self.begun, self.least)

    def rewind(self, k: int | Sequence[int]) -> None:
        """Forget the last ``k`` tokens of every row (or of each row its number) in every branch; in none, if one of them cannot.

        A cache whose first branch is left with nothing is as new: what a branch had begun with in place of the prompt is forgotten too.
        """
        self._check_whole()
        ks = [k] * self.batch if isinstance(k, int) else list(k)
        empty, before = bool(self.length) and ks == self.lengths, [part.clock.lengths for part in self.parts]
        try:
            for part in self.parts:
                part.rewind(part.lengths if empty else k)
            if not empty and any(n < self.least for part in self.parts[1:] for n in part.lengths):
                raise CacheError(f"Cannot forget {max(ks)} tokens: a branch that began with another text than the prompt is wound back to its prompt at most.")
        except CacheError:
            for part, lengths in zip(self.parts, before, strict=True):
                part.clock.lengths = lengths
            raise
        self.begun = self.begun and not empty

    def _check_whole(self) -> None:
        if self._torn:
            raise CacheError("An earlier call with this cache failed after its first branch had read: make a new cache with model.cache(...).")
        for part in self.parts:
            part._check_whole()

    def __repr__(self) -> str:
        return f"JointCache({', '.join(map(repr, self.parts))})"


@contextmanager
def branches(cache: Cache | None, n: int) -> Iterator[tuple[Cache | None, ...]]:
    """The caches of ``n`` branches for one call: all of them advance, or none, or the cache says from then on that it is torn."""
    if cache is None:
        yield (None,) * n
        return
    if not isinstance(cache, JointCache) or len(cache.parts) != n:
        raise CacheError(f"A combined model of {n} branches keeps one cache for each, but {described(type(cache))} was given: use its own cache(...).")
    cache._check_whole()
    before = cache.lengths
    try:
        yield cache.parts
    except BaseException:
        cache._torn = cache.lengths != before
        raise
    cache.begun = True


def counted(tokens: Tensor, lengths: Lengths) -> list[int]:
    """How many tokens each row ``[b t]`` really has."""
    return [tokens.shape[1]] * tokens.shape[0] if lengths is None else [int(n) for n in lengths]


def places(tokens: Tensor, keep: Keep) -> Tensor:
    """The columns that are read out ``[b q]``: all, the last ``keep``, or one per row."""
    b, t = tokens.shape
    if isinstance(keep, Tensor):
        return keep.to(tokens.device)[:, None]
    return torch.arange(0 if keep is None else max(0, t - keep), t, device=tokens.device).expand(b, -1)


def same_device(*models: Any) -> None:
    """Raise :class:`InputError` if the models stand on different devices."""
    found = [next((p.device for p in model.parameters()), None) for model in models]
    if len({str(d) for d in found if d is not None}) > 1:
        raise InputError(f"The models of a combined one stand on different devices, {' and '.join(map(str, found))}: move one with model.to(...).")


def is_pair(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return hasattr(model, "encode") and hasattr(model, "decode")
