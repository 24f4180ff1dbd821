"""Encoder and decoder: one reads the source, the other writes the target and asks the first.

source ──► encoder ──► memory ─────────────┐ keys and values
                                           ▼
target ──► decoder block: self-attention ─► cross-attention ─► feed-forward ──► logits
                                             ▲ queries
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SpecError
from glassformer.core.fields import typed
from glassformer.core.flow import Ledger
from glassformer.core.mask import Mask
from glassformer.core.sites import SiteInfo
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap
from glassformer.parts.readout import States

from .anatomy import Anatomy
from .speaking import Speaking
from .transformer import Decoder, Encoder, TransformerModel, finish


@part
class EncoderDecoder(Spec):
    """An encoder and a decoder whose blocks have cross-attention (arXiv 1706.03762).

    ``shared``: both read the same embedding table, which the encoder's ``init`` fills. ``start``: the token a target begins with.
    """

    encoder: Encoder
    decoder: Decoder
    shared: bool = True
    start: int = 0

    def __post_init__(self) -> None:
        if any(b.cross is None for b in self.decoder.blocks):
            raise SpecError("A decoder block of this encoder-decoder has no cross-attention: give every one of them Block(cross=Attention(...)).")
        if self.shared and (self.encoder.vocab_size, self.encoder.d_model) != (self.decoder.vocab_size, self.decoder.d_model):
            raise SpecError(
                f"A shared embedding needs equal sizes, but the encoder has vocab_size={self.encoder.vocab_size}, d_model={self.encoder.d_model} "
                f"and the decoder vocab_size={self.decoder.vocab_size}, d_model={self.decoder.d_model}: make them equal, or set shared=False."
            )
        tables = [half.embedding.lift.widths(half.d_model)[0] for half in (self.encoder, self.decoder)]
        if self.shared and tables[0] != tables[1]:
            raise SpecError(
                f"A shared embedding is one table, but the encoder's is {tables[0]} wide and the decoder's {tables[1]}: give both the same "
                "Embedding(lift=...), or set shared=False."
            )

    @typed(SpecError)
    def build(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, seed: int | None = None) -> EncoderDecoderModel:
        """The model; arguments as in :meth:`Decoder.build`."""
        with torch.device("meta"):
            model = EncoderDecoderModel(self)

        def fill(seed: int) -> None:
            model.tie()
            self.encoder.init.apply(model.encoder, len(self.encoder.blocks), seed, "encoder")
            self.decoder.init.apply(model.decoder, len(self.decoder.blocks), seed, "decoder", ("embed.weight",) if self.shared else ())

        made: EncoderDecoderModel = finish(model, fill, device, dtype, seed)
        made.tie()
        return made


class EncoderDecoderModel(Anatomy, Speaking, nn.Module):
    """A built :class:`EncoderDecoder`."""

    def __init__(self, spec: EncoderDecoder):
        super().__init__()
        self.spec = spec
        # The encoder's stream is read by the decoder, not read out.
        self.encoder = TransformerModel(spec.encoder.replace(readout=States()))
        self.decoder = TransformerModel(spec.decoder, d_memory=spec.encoder.d_model)
        self.has_experts = self.encoder.has_experts or self.decoder.has_experts
        self.tie()

    def tie(self) -> None:
        """Make the decoder read the encoder's embedding table (where ``spec.shared``)."""
        if self.spec.shared:
            self.decoder.embed.weight = self.encoder.embed.weight

    def forward(
        self,
        source: Tensor | None = None,
        target: Tensor | None = None,
        *,
        source_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        source_positions: Tensor | None = None,
        positions: Tensor | None = None,
        source_lengths: Sequence[int] | Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        keep: int | Tensor | None = None,
        tap: Tap | None = None,
        aux: Ledger | None = None,
        path: str = "",
    ) -> Tensor:
        """Logits [b t v] of ``target`` [b t] given ``source`` [b s]. Raises :class:`InputError` without a target.

        ``source_embeds`` [b s d] stand in for the source's tokens, ``inputs_embeds`` [b t d] for the target's; ``source_positions`` and ``positions``
        [s] or [b s], [t] or [b t] are theirs where they do not count from 0. The other options are the decoder's (see :meth:`TransformerModel.forward`).
        """
        if target is None and inputs_embeds is None:
            raise InputError(
                f"An encoder-decoder reads a source and a target, but only the source was given: a target begins with the token {self.spec.start} "
                "(spec.start); generate(model, source) writes one."
            )
        memory = self.encode(source, source_lengths, inputs_embeds=source_embeds, positions=source_positions, tap=tap, aux=aux, path=path)
        return self.decode(
            target,
            memory,
            source_lengths=source_lengths,
            inputs_embeds=inputs_embeds,
            positions=positions,
            lengths=lengths,
            mask=mask,
            cache=cache,
            keep=keep,
            tap=tap,
            aux=aux,
            path=path,
        )

    def encode(
        self,
        source: Tensor | None,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        tap: Tap | None = None,
        path: str = "",
        **options: Any,
    ) -> Tensor:
        """The memory [b s d] of a source [b s]. Further options as in :meth:`TransformerModel.states`."""
        self._check_tap(tap)
        return self.encoder.states(source, lengths=lengths, tap=tap, path=f"{path}.encoder".lstrip("."), **options)

    def decode(
        self,
        target: Tensor | None,
        memory: Tensor | None,
        *,
        source_lengths: Sequence[int] | Tensor | None = None,
        tap: Tap | None = None,
        path: str = "",
        **options: Any,
    ) -> Tensor:
        """Logits of ``target`` given the memory; with a filled cache the memory may be None. Further options as in :meth:`TransformerModel.forward`."""
        self._check_tap(tap)
        logits: Tensor = self.decoder(target, memory=memory, memory_lengths=source_lengths, tap=tap, path=f"{path}.decoder".lstrip("."), **options)
        return logits

    def _check_tap(self, tap: Tap | None) -> None:
        if tap is not None and not torch.compiler.is_compiling() and getattr(tap, "_checked_by", None) != id(self):
            tap.check([s.path for s in self.sites()])
            tap._checked_by = id(self)  # type: ignore[attr-defined]

    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> Cache:
        """An empty cache of the decoder; its cross slots are filled on the first call."""
        return self.decoder.cache(batch, capacity, rewind)

    def sites(self, path: str = "") -> list[SiteInfo]:
        """Every observable value of both halves."""
        return self.encoder.sites(f"{path}.encoder".lstrip(".")) + self.decoder.sites(f"{path}.decoder".lstrip("."))
