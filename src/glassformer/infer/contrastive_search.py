"""Contrastive search: the next token is probable and unlike what the text has been about.

context  ──► model ──► the k most probable tokens, and the states h_1 … h_n of the text
                          │
         each behind the context ──► model ──► its own state h_v ──► (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap

from .combined import Combined, JointCache, Keep, Lengths, branches, counted, is_pair
from .dola import Streams
from .sampler import GONE


@part
class ContrastiveSearch(Spec):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417): of the ``k`` most probable tokens v that of the largest

        (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

    with p among the whole vocabulary, h_v the state of v behind the context, and h_j those of the tokens before; states are those after the final
    norm, which the read-out reads. The scores stand in place of the logits, ``-inf`` for all other tokens: take the strongest (Greedy). The rule is
    that of ``transformers`` (``penalty_alpha``, ``top_k``). Every step runs the model on one token, and then on ``k``. alpha = 0 picks what greedy picks.

    Raises :class:`SamplerError` if ``alpha`` is not in [0, 1] or ``k`` is below 1.
    """

    _error = SamplerError

    alpha: float = 0.6
    k: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SamplerError(f"The penalty of contrastive search is a weight from 0 to 1, but alpha={self.alpha} was given. Use 0.6.")
        if self.k < 1:
            raise SamplerError(f"Contrastive search looks at 1 candidate or more, but k={self.k} was given. Use 4.")

    def over(self, model: Any) -> Searching:
        """The combined model. Raises :class:`InputError` for a model whose states cannot be seen."""
        return Searching(self, model)


class StatesCache(JointCache):
    """A model's cache and the states ``[b n d]`` of the tokens that it holds, whose directions only count: they have length 1."""

    def __init__(self, parts: Sequence[Cache], begun: bool = False, states: Tensor | None = None):
        super().__init__(parts, begun)
        self.states = states

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, the states too."""
        return super().bytes + (0 if self.states is None else self.states.nbytes)

    def add(self, states: Tensor, before: list[int], held: list[int]) -> Tensor:
        """Put ``states [b t d]`` of a call behind the ``before[b]`` that each row has, and return all of them; row b then holds ``held[b]``."""
        old, (b, t, d) = self.states, states.shape
        known = old if old is not None and max(before) else states.new_zeros(b, 0, d)
        room = max(max(before) + t, known.shape[1])
        grown = torch.cat([known, states.new_zeros(b, room - known.shape[1], d)], dim=1)
        at = torch.tensor(before, device=states.device)[:, None] + torch.arange(t, device=states.device)
        self.states = grown.scatter(1, at[:, :, None].expand(-1, -1, d), states)[:, : max(held)]
        return self.states

    def select(self, rows: Sequence[int]) -> StatesCache:
        """A new cache of copies of these rows."""
        new = super().select(rows)
        return StatesCache(new.parts, self.begun, None if self.states is None else self.states[torch.tensor(list(rows), device=self.states.device)])


class Searching(Combined):
    """A decoder under :class:`ContrastiveSearch`. Only the last place of each row is scored: ``keep`` is 1, or the last place of each row."""

    def __init__(self, search: ContrastiveSearch, model: Any):
        super().__init__(model)
        if is_pair(model):
            raise InputError("Contrastive search compares the states of one text, but an encoder-decoder was given: use beams or sampling for that one.")
        if not hasattr(model, "blocks"):
            raise InputError(f"Contrastive search needs the states of a Decoder, but {type(model).__name__} has none to see: build it from a Decoder.")
        self.search = search

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> StatesCache:
        """An empty cache; it has room for the candidate behind the last token."""
        return StatesCache([self.model.cache(batch=batch, capacity=None if capacity is None else capacity + 1, **({"rewind": rewind} if rewind else {}))])

    def forward(
        self, tokens: Tensor, *, lengths: Lengths = None, cache: Cache | None = None, keep: Keep = None, tap: Tap | None = None, path: str = ""
    ) -> Tensor:
        """Scores ``[b 1 v]`` of what may follow ``tokens [b t]``."""
        (b, t), new = tokens.shape, counted(tokens, lengths)
        if keep is None or (isinstance(keep, int) and keep != 1):
            raise InputError(f"Contrastive search scores what follows the last token of each row, but keep={keep} asks for more places: use keep=1.")
        last = keep.tolist() if isinstance(keep, Tensor) else [t - 1] * b
        before = [0] * b if cache is None else cache.lengths
        # Without a cache of ours one is made for this call: the candidates go on from it.
        used = cache if cache is not None else self.cache(batch=b, capacity=t)
        with branches(used, 1) as (inner,):
            assert inner is not None
            assert isinstance(used, StatesCache)
            site = f"{path}.resid_final" if path else "resid_final"
            seen = Streams([site], torch.arange(t, device=tokens.device).expand(b, -1), self.model, tap)
            logits = self.model(tokens, lengths=lengths, cache=inner, keep=keep, tap=seen, path=path)[:, -1].float()
            held = [n + m for n, m in zip(before, new, strict=True)]
            states = used.add(_directions(seen.values[site]), before, held)
            rows = [row for row in range(b) if last[row] == new[row] - 1]  # of a row that takes no token nothing is asked
            scores = torch.full_like(logits, GONE)
            if rows:
                self._score(logits, scores, inner, states, held, rows)
        return scores[:, None]

    def _score(self, logits: Tensor, scores: Tensor, cache: Cache, states: Tensor, held: list[int], rows: list[int]) -> None:
        """Fill in the scores of these rows' candidates."""
        at, k = torch.tensor(rows, device=logits.device), min(self.search.k, logits.shape[1])
        p, ids = logits[at].softmax(dim=-1).topk(k, dim=-1)
        seen = Streams(["resid_final"], ids.new_zeros(len(rows) * k, 1), self.model, None)
        twins = cache.select([row for row in rows for _ in range(k)])
        self.model(ids.reshape(-1, 1), cache=twins, keep=1, tap=seen)
        candidates = _directions(seen.values["resid_final"]).reshape(len(rows), k, -1)
        alike = candidates @ states[at].transpose(1, 2)  # [r k n]
        real = torch.arange(states.shape[1], device=at.device) < torch.tensor([held[row] for row in rows], device=at.device)[:, None]
        alike = alike.masked_fill(~real[:, None], GONE).amax(dim=-1)
        scores[at] = scores[at].scatter(1, ids, (1 - self.search.alpha) * p - self.search.alpha * alike)


def _directions(states: Tensor) -> Tensor:
    """States of length 1, float32."""
    x = states.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


__all__ = ["ContrastiveSearch", "Searching", "StatesCache"]
