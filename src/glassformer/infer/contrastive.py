"""Contrastive decoding: what a strong model knows and a weak one does not."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap

from .combined import Combined, JointCache, Keep, Lengths, branches, is_pair, same_device
from .sampler import GONE
from .session import _check_readout, vocabulary


@part
class Contrast(Spec):
    """Contrastive decoding with log-probabilities e of the expert and a of the amateur. Only plausible tokens stay: e >= max e + ln alpha; of these

        beta a number   (1 + beta) e - beta a      O'Brien & Lewis 2023, arXiv 2309.09117, there alpha = 0.1, beta = 0.5
        beta None       e - a                      Li et al. 2022, arXiv 2210.15097, there alpha = 0.1 and the amateur at temperature 0.5

    The first is written in logits there, which is the same distribution. ``temperature`` divides the amateur's logits before its soft-max.
    alpha = 0 leaves all tokens; with beta = 0 besides it is off: the expert's logits, bit for bit, and the amateur is not run.

    Raises :class:`SamplerError` if ``alpha`` is not in [0, 1], ``beta`` is negative, or ``temperature`` is not above 0.
    """

    _error = SamplerError

    alpha: float = 0.1
    beta: float | None = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SamplerError(
                f"The plausibility of contrastive decoding is a fraction from 0 to 1, but alpha={self.alpha} was given. Use 0.1; 0 keeps all tokens."
            )
        if self.beta is not None and not (self.beta >= 0 and isfinite(self.beta)):
            raise SamplerError(f"The strength of contrastive decoding is 0 or more, but beta={self.beta} was given. Use 0.5, or None for e - a.")
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise SamplerError(f"The amateur's temperature is above 0, but {self.temperature} was given. Use 1 for its own distribution.")

    @property
    def off(self) -> bool:
        """Whether the expert's logits stay as they are."""
        return self.alpha == 0 and self.beta == 0

    def over(self, expert: Any, amateur: Any) -> Contrasted:
        """The combined model. Raises :class:`InputError` if the two cannot stand side by side."""
        return Contrasted(self, expert, amateur)

    def apply(self, expert: Tensor, amateur: Tensor) -> Tensor:
        """The rule, on logits ``[… v]`` of both; float32."""
        e, a = expert.float().log_softmax(dim=-1), (amateur.float() / self.temperature).log_softmax(dim=-1)
        mixed = e - a if self.beta is None else e + self.beta * (e - a)
        gone = e == GONE
        if self.alpha > 0:
            gone |= e < e.amax(dim=-1, keepdim=True) + log(self.alpha)
        return mixed.masked_fill_(gone, GONE)


class Contrasted(Combined):
    """An expert and an amateur under :class:`Contrast`; both read the same tokens."""

    amateur: Any

    def __init__(self, contrast: Contrast, expert: Any, amateur: Any):
        super().__init__(expert)
        amateur = Combined(amateur).model
        if is_pair(expert) or is_pair(amateur):
            raise InputError("Contrastive decoding compares two models that continue the prompt, but an encoder-decoder was given: use guidance for that one.")
        _check_readout(amateur)
        sizes = vocabulary(expert), vocabulary(amateur)
        if None not in sizes and sizes[0] != sizes[1]:
            raise InputError(f"The expert has {sizes[0]} tokens and the amateur {sizes[1]}, but their logits are compared token by token: use one tokenizer.")
        same_device(expert, amateur)
        self.contrast, self.amateur = contrast, amateur

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> JointCache:
        """An empty cache for both models."""
        made = {"batch": batch, "capacity": capacity} | ({"rewind": rewind} if rewind else {})
        return JointCache([model.cache(**made) for model in ((self.model,) if self.contrast.off else (self.model, self.amateur))])

    def forward(
        self, tokens: Tensor, *, lengths: Lengths = None, cache: Cache | None = None, keep: Keep = None, tap: Tap | None = None, path: str = ""
    ) -> Tensor:
        """Contrasted logits ``[b t v]`` of ``tokens [b t]``, ``-inf`` where a token is not plausible."""
        with branches(cache, 1 if self.contrast.off else 2) as caches:
            strong: Tensor = self.model(tokens, lengths=lengths, cache=caches[0], keep=keep, tap=tap, path=path)
            if self.contrast.off:
                return strong
            with torch.no_grad():
                weak = self.amateur(tokens, lengths=lengths, cache=caches[1], keep=keep, path=path)
        if strong.shape != weak.shape:
            raise InputError(f"The expert's logits are {list(strong.shape)} and the amateur's {list(weak.shape)}: both need the same tokens in the vocabulary.")
        return self.contrast.apply(strong, weak)
