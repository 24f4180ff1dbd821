"""Classifier-free guidance: what the prompt adds to the model's own habits, made stronger.

    cond     p0 p1 p2 p3 │ x0 x1 …        the model with the prompt
    uncond            p3 │ x0 x1 …        the same model without it (or after a negative prompt): the same new tokens
    logits   uncond + scale (cond - uncond)

An encoder-decoder reads two sources, and the decoder the same target twice; both memories lie in one tensor, side by side:

    memory [b s+m d] = [ of the source  s │ m  of the negative source ]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap

from .combined import Combined, JointCache, Keep, Lengths, branches, counted, is_pair, places
from .sampler import GONE
from .session import vocabulary


@part
class Guidance(Spec):
    """Guidance for text (Sanchez et al. 2023, arXiv 2306.17806), in log-probabilities c with the prompt and u without it:  u + scale (c - u).

    The pass without the prompt begins with the prompt's last token, or with ``negative`` (ids, the same for all rows), and goes on with every
    new token; the rule and the beginnings are those of ``transformers`` (``guidance_scale``, ``negative_prompt_ids``). Of an encoder-decoder they
    are the source's. 1 is off: the logits are the model's own, bit for bit, and one pass is run; above 1 follows the prompt more, 0 not at all.

    Raises :class:`SamplerError` if ``scale`` is not finite, or ``negative`` is empty or holds negative ids.
    """

    _error = SamplerError

    scale: float = 1.5
    negative: tuple[int, ...] | Iterable[int] | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise SamplerError(f"The scale of guidance is a finite number, but {self.scale} was given. Use 1 for none, 1.5 for a mild one.")
        if self.negative is not None:
            object.__setattr__(self, "negative", tuple(int(i) for i in self.negative))
            if not self.ids or min(self.ids) < 0:
                raise SamplerError(
                    f"A negative prompt holds one token id or more, each 0 or more, but {list(self.ids)} was given. Use None for no prompt at all."
                )

    @property
    def ids(self) -> tuple[int, ...]:
        """The negative prompt; () if there is none."""
        return cast(tuple[int, ...], self.negative or ())

    def over(self, model: Any) -> Guided:
        """The guided model. Raises :class:`InputError` for what is no model, :class:`SamplerError` for a negative prompt outside its vocabulary."""
        made = GuidedPair(self, model) if is_pair(model) else Guided(self, model)
        size = vocabulary(model) if not is_pair(model) else getattr(model.spec.encoder, "vocab_size", None)
        if size is not None and self.ids and max(self.ids) >= size:
            raise SamplerError(f"The negative prompt holds token {max(self.ids)}, but the vocabulary has {size} tokens: ids go from 0 to {size - 1}.")
        return made


class Guided(Combined):
    """A decoder under :class:`Guidance`.

    Called without a cache, or with one that has read nothing, it needs to know where the prompt ends: ``drawn`` says how many of the last tokens
    were drawn (one number, or one per row; a session says it). What is read later is read by both branches.
    """

    tells_drawn = True

    def __init__(self, guidance: Guidance, model: Any):
        super().__init__(model)
        self.guidance = guidance

    @property
    def beside(self) -> int:
        return 0 if self.guidance.scale == 1 else max(len(self.guidance.ids), 1)

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> JointCache:
        """An empty cache for both branches."""
        parts = [self.model.cache(batch=batch, capacity=capacity, **_rewind(rewind))]
        if self.guidance.scale != 1:
            wide = None if capacity is None else capacity + self.beside - 1  # it may begin with a longer text
            parts.append(self.model.cache(batch=batch, capacity=wide, **_rewind(rewind)))
        return JointCache(parts, least=self.beside - 1 if len(parts) > 1 else 0)

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Lengths = None,
        cache: Cache | None = None,
        keep: Keep = None,
        tap: Tap | None = None,
        path: str = "",
        drawn: int | Sequence[int] = 0,
    ) -> Tensor:
        """Guided logits ``[b t v]`` of ``tokens [b t]``, float32. Places before the prompt's end have no counterpart: there they are the model's own."""
        if self.guidance.scale == 1:
            with branches(cache, 1) as (only,):
                plain: Tensor = self.model(tokens, lengths=lengths, cache=only, keep=keep, tap=tap, path=path)
            return plain
        first = not (isinstance(cache, JointCache) and cache.begun)
        with branches(cache, 2) as (mine, other):
            cond = self.model(tokens, lengths=lengths, cache=mine, keep=keep, tap=tap, path=path)
            if not first:
                assert other is not None
                again = self._ends_of_prompts(tokens, other.lengths)
                return mix(cond, self.model(again, lengths=lengths, cache=other, keep=keep, path=path), self.guidance.scale)
            held, new = counted(tokens, lengths), _drawn(tokens, lengths, drawn)
            beside, counts = self._beside(tokens, held, new)
            at = places(tokens, keep)
            column = at + (torch.tensor(counts, device=at.device) - torch.tensor(held, device=at.device))[:, None]
            ragged = None if len(set(counts)) == 1 and counts[0] == beside.shape[1] else counts
            single = column.shape[1] == 1
            alone = (1 if ragged is None and bool((column == beside.shape[1] - 1).all()) else column[:, 0].clamp(0, beside.shape[1] - 1)) if single else None
            uncond = self.model(beside, lengths=ragged, cache=other, keep=alone, path=path)
            if not single:
                uncond = uncond.gather(1, column.clamp(0, beside.shape[1] - 1)[:, :, None].expand(-1, -1, uncond.shape[2]))
            exists = (column >= self.beside - 1) & (column < torch.tensor(counts, device=at.device)[:, None])
            mixed = mix(cond, uncond, self.guidance.scale)
            return mixed if bool(exists.all()) else torch.where(exists[:, :, None], mixed, cond.float())

    def _ends_of_prompts(self, tokens: Tensor, held: list[int]) -> Tensor:
        """The tokens as the other branch reads them: in a row wound back to its prompt, the negative prompt's last for the prompt's last."""
        ends = [n == self.beside - 1 for n in held]
        if not self.guidance.ids or not any(ends):
            return tokens
        first = torch.where(torch.tensor(ends, device=tokens.device), self.guidance.ids[-1], tokens[:, 0])
        return torch.cat([first[:, None], tokens[:, 1:]], dim=1)

    def _beside(self, tokens: Tensor, held: list[int], new: list[int]) -> tuple[Tensor, list[int]]:
        """What the other branch reads first: its beginning and the drawn tokens, and how many these are per row (0 where a row has none)."""
        begin = torch.tensor([self.guidance.ids], device=tokens.device, dtype=tokens.dtype)
        rows = []
        for row, n, k in zip(tokens, held, new, strict=True):
            rows.append(torch.cat([begin[0] if self.guidance.ids else row[max(n - k - 1, 0) : max(n - k, 1)], row[n - k : n]]))
        width = max(map(len, rows))
        padded = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
        return padded, [len(row) if n else 0 for row, n in zip(rows, held, strict=True)]


class GuidedPair(Guided):
    """An encoder-decoder under :class:`Guidance`: the source is what guides, and the target is read by both branches alike."""

    tells_drawn = False

    @property
    def decoder(self) -> Any:
        """The decoder, which both branches share."""
        return self.model.decoder

    @property
    def beside(self) -> int:
        return 0

    def forward(self, *args: Any, **options: Any) -> Tensor:
        raise InputError("A guided encoder-decoder is generated from: generate(model, source), or encode() and decode(). It has no single forward pass.")

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> JointCache:
        return JointCache([self.model.cache(batch=batch, capacity=capacity, rewind=rewind) for _ in range(1 if self.guidance.scale == 1 else 2)])

    def encode(self, source: Tensor, lengths: Lengths = None, *, tap: Tap | None = None, path: str = "", **options: Any) -> Tensor:
        """The memories of the source and of the negative one, side by side ``[b s+m d]``."""
        memory: Tensor = self.model.encode(source, lengths, tap=tap, path=path, **options)
        if self.guidance.scale == 1:
            return memory
        last = torch.tensor(counted(source, lengths), device=source.device)[:, None] - 1
        ids = torch.tensor([self.guidance.ids], device=source.device, dtype=source.dtype)
        negative = ids.expand(source.shape[0], -1) if self.guidance.ids else source.gather(1, last.clamp(min=0))
        return torch.cat([memory, self.model.encode(negative, path=path)], dim=1)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        *,
        source_lengths: Lengths = None,
        lengths: Lengths = None,
        cache: Cache | None = None,
        keep: Keep = None,
        tap: Tap | None = None,
        path: str = "",
    ) -> Tensor:
        """Guided logits of the target, given what :meth:`encode` made."""
        told: dict[str, Any] = {"lengths": lengths, "keep": keep, "path": path}
        if self.guidance.scale == 1:
            with branches(cache, 1) as (only,):
                plain: Tensor = self.model.decode(target, memory, source_lengths=source_lengths, cache=only, tap=tap, **told)
            return plain
        m = max(len(self.guidance.ids), 1)
        with branches(cache, 2) as (mine, other):
            cond = self.model.decode(target, memory[:, :-m], source_lengths=source_lengths, cache=mine, tap=tap, **told)
            return mix(cond, self.model.decode(target, memory[:, -m:], cache=other, **told), self.guidance.scale)


def mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + scale (c - u) of log-probabilities, float32; what was removed with the prompt stays removed, and what only the other branch removed is c."""
    c, u = cond.float().log_softmax(dim=-1), uncond.float().log_softmax(dim=-1)
    return torch.where(u == GONE, c, u + scale * (c - u)).masked_fill_(c == GONE, GONE)


def _drawn(tokens: Tensor, lengths: Lengths, drawn: int | Sequence[int]) -> list[int]:
    held = counted(tokens, lengths)
    new = [drawn] * len(held) if isinstance(drawn, int) else [int(k) for k in drawn]
    if len(new) != len(held) or any(k < 0 or (n and k >= n) for k, n in zip(new, held, strict=True)):
        raise InputError(f"Of rows of {held} tokens drawn={drawn} were said to be drawn: one number for all or one per row, each less than its row has tokens.")
    return [k if n else 0 for k, n in zip(new, held, strict=True)]


def _rewind(n: int) -> dict[str, int]:
    """The option of ``cache()`` for rings; left out where it says nothing."""
    return {"rewind": n} if n else {}


__all__ = ["Guidance", "Guided", "GuidedPair"]
