"""DoLa: what the last layer knows and an early one does not yet.

block 0 ─ block 1 ─ block 2 ─ … ─ block n-1 ─► final norm ─► read-out ─► mature  q
   │         │         │                                                      │
   └─────────┴─────────┴──► final norm ─► read-out ─► premature  p_j          │
                                  └── the p_j farthest from q is subtracted ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log
from typing import Any, cast

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError, did_you_mean
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap

from .combined import Combined, Keep, Lengths, is_pair, places
from .sampler import GONE

DEEP = 40  # of deeper models only the first, or last, 20 layers are looked at


@part
class DoLa(Spec):
    """Decoding by contrasting layers (Chuang et al. 2023, arXiv 2309.03883), at every place and in every row for itself:

        premature layer  M = the candidate j of the largest Jensen-Shannon divergence  JSD(q || p_j),  of equal ones the lowest
        a token stays if  ln q >= max ln q + ln relative_top;  its logit is  ln q - ln p_M

    q is the model's distribution, p_j what the read-out makes of the stream after j blocks (0: the embedding).
    ``layers``: "low" or "high", every second layer of the lower or the upper half (of models deeper than 40 layers of the first or last 20; the
    embedding of a tied model is left out), or the numbers of the candidates: both as in ``transformers``. ``norm``: read early streams through the final
    norm, as they are when they are looked at by a lens; False reads them as they are, which the authors' program and ``transformers`` do. These
    two also choose one layer for a whole batch, and by KL from the mean of the two distributions instead of to it: with a single candidate all agree.

    Raises :class:`SamplerError` for layers of another name, and if ``relative_top`` is not in [0, 1].
    """

    _error = SamplerError

    layers: str | tuple[int, ...] | Iterable[int] = "high"
    relative_top: float = 0.1
    norm: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in ("low", "high"):
                raise SamplerError(
                    f"DoLa has no layers named {self.layers!r}.{did_you_mean(self.layers, ('low', 'high'))} Known: low, high, or a list of numbers."
                )
        else:
            object.__setattr__(self, "layers", tuple(sorted({int(i) for i in self.layers})))
            if not self.layers:
                raise SamplerError("DoLa needs a candidate layer to contrast with, but the list is empty: give numbers, or 'low' or 'high'.")
        if not 0 <= self.relative_top <= 1:
            raise SamplerError(f"DoLa's relative_top is a fraction from 0 to 1, but {self.relative_top} was given. Use 0.1; 0 keeps all tokens.")

    def over(self, model: Any) -> LayersContrasted:
        """The combined model. Raises :class:`InputError` for a model without layers to read, and for layers that it has not."""
        return LayersContrasted(self, model)

    def candidates(self, n: int, tied: bool) -> tuple[int, ...]:
        """The candidate layers of a model of ``n`` blocks. Raises :class:`InputError` for a layer that is not before the last."""
        if not isinstance(self.layers, str):
            given = cast(tuple[int, ...], self.layers)
            for i in given:
                if not 0 <= i < n:
                    raise InputError(f"DoLa contrasts layers 0 to {n - 1} with the last one of this model of {n} blocks, but layer {i} was given.")
            return given
        if n == 0:
            raise InputError("DoLa contrasts early layers with the last one, but this model has no blocks.")
        if self.layers == "high":
            return tuple(range(n // 2 if n <= DEEP else n - 20, n, 2))
        start = 0 if not tied else min(2, n - 1) if n > 1 else 0
        return tuple(range(start, n // 2 if n <= DEEP else 20, 2)) or (start,)

    def apply(self, mature: Tensor, premature: Iterable[Tensor]) -> Tensor:
        """The rule, on the logits ``[… v]`` of the last layer and of the candidates; float32."""
        q = mature.float().log_softmax(dim=-1)
        chosen: Tensor | None = None
        most: Tensor | None = None
        for logits in premature:
            p = logits.float().log_softmax(dim=-1)
            far = divergence(q, p)
            if chosen is None or most is None:
                chosen, most = p, far
            else:
                chosen, most = torch.where(far > most, p, chosen), torch.maximum(far, most)
        assert chosen is not None
        gone = q == GONE
        if self.relative_top > 0:
            gone |= q < q.amax(dim=-1, keepdim=True) + log(self.relative_top)
        return (q - chosen).masked_fill_(gone, GONE)


def divergence(ln_p: Tensor, ln_q: Tensor) -> Tensor:
    """JSD(p || q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats: ``[… v], [… v] -> [… 1]``."""
    ln_m = torch.logaddexp(ln_p, ln_q) - log(2)
    parts = [torch.where(x > GONE, x.exp() * (x - ln_m), 0.0).sum(dim=-1, keepdim=True) for x in (ln_p, ln_q)]
    return (parts[0] + parts[1]) / 2


class LayersContrasted(Combined):
    """A decoder under :class:`DoLa`. Its cache is the model's own."""

    def __init__(self, dola: DoLa, model: Any):
        super().__init__(model)
        if is_pair(model):
            raise InputError("DoLa reads the layers of a model that continues the prompt, but an encoder-decoder was given: use guidance for that one.")
        if not hasattr(model, "blocks") or not hasattr(model, "read"):
            raise InputError(f"DoLa reads the early layers of a Decoder, but {type(model).__name__} has none to read: build it from a Decoder.")
        self.dola = dola
        self.layers = dola.candidates(len(model.blocks), bool(model.spec.tied))

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> Cache:
        """An empty cache of the model."""
        made: Cache = self.model.cache(batch=batch, capacity=capacity, rewind=rewind)
        return made

    def forward(
        self, tokens: Tensor, *, lengths: Lengths = None, cache: Cache | None = None, keep: Keep = None, tap: Tap | None = None, path: str = ""
    ) -> Tensor:
        """Logits ``[b t v]`` of ``tokens [b t]``, ``-inf`` where a token is not plausible."""
        lead = f"{path}." if path else ""
        sites = [f"{lead}blocks.0.resid_pre" if i == 0 else f"{lead}blocks.{i - 1}.resid_post" for i in self.layers]
        seen = Streams(sites, places(tokens, keep), self.model, tap)
        last = self.model(tokens, lengths=lengths, cache=cache, keep=keep, tap=seen, path=path)
        return self.dola.apply(last, (self.model.read(seen.values[site], normed=not self.dola.norm) for site in sites))


class Streams(Tap):
    """Keeps the values at some sites, only at the columns ``at [b q]``, after another tap has seen (and perhaps changed) them."""

    def __init__(self, wanted: Iterable[str], at: Tensor, model: Any, inner: Tap | None):
        self.wanted, self.at, self.inner = frozenset(wanted), at, inner
        self.values: dict[str, Tensor] = {}
        self._checked_by = id(model)
        if inner is not None and getattr(inner, "_checked_by", None) != id(model):
            inner.check([s.path for s in model.sites()])
            inner._checked_by = id(model)  # type: ignore[attr-defined]

    def visit(self, path: str, x: Tensor) -> Tensor:
        if self.inner is not None:
            x = self.inner.visit(path, x)
        if path in self.wanted:
            self.values[path] = x.gather(1, self.at[:, :, None].expand(-1, -1, x.shape[2]))
        return x

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        if self.inner is not None:
            self.inner.begin(path, index, lengths)

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if self.inner is not None:
            self.inner.offer(path, compute)

    def edits(self, path: str) -> bool:
        return self.inner is not None and self.inner.edits(path)

    def differentiates(self) -> bool:
        return self.inner is not None and self.inner.differentiates()
