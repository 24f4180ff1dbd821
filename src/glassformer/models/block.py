"""A block: attention, (cross-attention,) feed-forward, and the wiring between them."""

from __future__ import annotations

from torch import nn

from glassformer.core.errors import SpecError
from glassformer.core.spec import Spec, part
from glassformer.parts.attention import Attention, SelfAttention
from glassformer.parts.feedforward import FeedForward, Plain
from glassformer.parts.norm import LayerNorm, Norm
from glassformer.parts.wiring import BlockLayer, PreNorm, Wiring


@part
class Block(Spec):
    """One layer of a transformer. ``cross``: attention to an encoder's output, after self-attention. ``dropout``: on what each sublayer adds."""

    attention: SelfAttention
    feedforward: FeedForward = Plain(d_ff=256)
    norm: Norm = LayerNorm()
    wiring: Wiring = PreNorm()
    cross: Attention | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise SpecError(f"Block(dropout={self.dropout}): a dropout rate lies in [0, 1).")

    def build(self, d: int, d_memory: int | None) -> BlockLayer:
        """The module in a stream of width ``d``, reading a memory of width ``d_memory``."""
        sublayers: dict[str, nn.Module] = {"attn": self.attention.build(d)}
        if self.cross is not None:
            sublayers["cross"] = self.cross.build_cross(d, d if d_memory is None else d_memory)
        sublayers[self.feedforward.name] = self.feedforward.build(d)
        return self.wiring.build(sublayers, self.norm, d, self.dropout)
