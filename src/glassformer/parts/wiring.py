"""Wiring: where the norms stand and how sublayers join the stream.

pre-norm    x ─┬─► norm ─► f ─► + ─►          the stream itself is never normalised (arXiv 2002.04745)
               └────────────────┘
post-norm   x ─┬─► f ─► + ─► norm ─►          the 2017 transformer, BERT (arXiv 1706.03762)
               └────────┘
reordered   x ─┬─► f ─► norm ─► + ─►          OLMo 2 (arXiv 2111.09883, 2501.00656)
               └────────────────┘
sandwich    x ─┬─► norm ─► f ─► norm ─► + ─►  Gemma 2 (arXiv 2105.13290, 2408.00118)
               └────────────────────────┘
parallel    x ─┬─► norm ─► attention ───┐
               ├─► norm ─► feed-forward ┴► + ─►   GPT-J, NeoX, PaLM (arXiv 2204.02311)
               └────────────────────────┘
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core import sites
from glassformer.core.errors import SpecError, did_you_mean
from glassformer.core.flow import Pass
from glassformer.core.sites import Site
from glassformer.core.spec import Spec, part

from .norm import NoNorm, Norm


class Wiring(Spec):
    """How a block's sublayers are joined."""

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        """The block: ``sublayers`` in order (attn, cross, ffn or experts) around a stream of width ``d``."""
        raise NotImplementedError


_NORMS = {"attn": "norm1", "cross": "norm_cross", "ffn": "norm2", "experts": "norm2"}
_AFTER = {"attn": sites.RESID_MID, "cross": sites.RESID_MID_CROSS, "ffn": sites.RESID_POST, "experts": sites.RESID_POST}


class BlockLayer(nn.Module):
    """Base of all blocks: sublayers by name, in ``order``; [b t d] -> [b t d]."""

    def __init__(self, sublayers: dict[str, nn.Module], dropout: float):
        super().__init__()
        self.order = tuple(sublayers)
        self.rate = dropout
        for name, sublayer in sublayers.items():
            self.add_module(name, sublayer)
        self.SITES: tuple[Site, ...] = (sites.RESID_PRE, *(_AFTER[n] for n in self.order))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on what a sublayer adds, in training."""
        return F.dropout(x, self.rate) if self.training and self.rate else x


@part
class PreNorm(Wiring):
    """``x + f(norm(x))``; the sublayers named in ``bare`` read the stream as it is, ``x + f(x)``.

    (ModernBERT's first attention is bare: what it reads comes straight from the embedding's own norm, arXiv 2412.13663.)
    """

    bare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.bare:
            if name not in _NORMS:
                raise SpecError(f"PreNorm(bare={self.bare!r}): {name!r} is no sublayer.{did_you_mean(name, _NORMS)} They are: {', '.join(_NORMS)}.")

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        for name in self.bare:
            if name not in sublayers:
                raise SpecError(f"PreNorm(bare={self.bare!r}) names {name!r}, but the block's sublayers are {' and '.join(sublayers)}.")
        return SequentialBlock(sublayers, norm, NoNorm(), NoNorm(), d, dropout, self.bare)


@part
class PostNorm(Wiring):
    """``norm(x + f(x))``."""

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        return SequentialBlock(sublayers, NoNorm(), NoNorm(), norm, d, dropout)


@part
class ReorderedNorm(Wiring):
    """``x + norm(f(x))``: what is added is normalised, what is read and the stream itself are not."""

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        return SequentialBlock(sublayers, NoNorm(), norm, NoNorm(), d, dropout)


@part
class Sandwich(Wiring):
    """``x + norm_post(f(norm(x)))``."""

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        return SequentialBlock(sublayers, norm, norm, NoNorm(), d, dropout)


class SequentialBlock(BlockLayer):
    """``x = after(x + out(f(before(x))))`` for each sublayer; unused norms are the identity.

    Names: ``norm1``, ``norm_cross``, ``norm2`` for the one norm of pre- and post-norm; a sandwich's
    second, or a reordered block's only one, is ``norm1_post``…
    """

    def __init__(self, sublayers: dict[str, nn.Module], before: Norm, out: Norm, after: Norm, d: int, dropout: float, bare: tuple[str, ...] = ()):
        super().__init__(sublayers, dropout)
        steps = []
        for name in self.order:
            used = []
            for role, norm in (("", NoNorm() if name in bare else before), ("_post", out), ("", after)):
                used.append("" if isinstance(norm, NoNorm) else _NORMS[name] + role)
                if used[-1]:
                    self.add_module(used[-1], norm.build(d))
            steps.append((name, *used))
        self.steps = tuple(steps)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.RESID_PRE, x)
        part: Any = self._modules  # a module's own look-up of a name takes four times as long
        for name, before, out, after in self.steps:
            y = part[before](x, p.at(before)) if before else x
            y = part[name](y, p.at(name))
            if out:
                y = part[out](y, p.at(out))
            x = x + self.drop(y)
            if after:
                x = part[after](x, p.at(after))
            x = p.see(_AFTER[name], x)
        return x

    def normed(self, name: str, x: Tensor, p: Pass) -> Tensor:
        """``x`` through the norm of this name; as it is where there is none."""
        return getattr(self, name)(x, p.at(name)) if name else x


@part
class Parallel(Wiring):
    """``x + attention(norm(x)) + feedforward(norm(x))``; with ``norms=1`` both read the same norm (GPT-J), with 2 each its own (NeoX)."""

    norms: int = 1

    def __post_init__(self) -> None:
        if self.norms not in (1, 2):
            raise SpecError(f"Parallel(norms={self.norms}): one norm for both branches, or two.")

    def build(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float) -> BlockLayer:
        if "cross" in sublayers:
            raise SpecError("Parallel wiring has attention and feed-forward side by side and no place for cross-attention: use PreNorm or PostNorm.")
        return ParallelBlock(sublayers, norm, d, dropout, self.norms)


class ParallelBlock(BlockLayer):
    """Both sublayers read the stream as it enters; there is no ``resid_mid``."""

    def __init__(self, sublayers: dict[str, nn.Module], norm: Norm, d: int, dropout: float, norms: int):
        super().__init__(sublayers, dropout)
        self.SITES = (sites.RESID_PRE, sites.RESID_POST)
        self.norm1 = norm.build(d)
        self.steps = ((self.order[0], "norm1"), (self.order[1], "norm1" if norms == 1 else "norm2"))
        if norms == 2:
            self.norm2 = norm.build(d)

    def forward(self, x: Float[Tensor, "b t d"], p: Pass) -> Float[Tensor, "b t d"]:
        x = p.see(sites.RESID_PRE, x)
        (attn, first), (ffn, second) = self.steps
        y = getattr(self, first)(x, p.at(first))
        a = getattr(self, attn)(y, p.at(attn))
        y = y if second == first else getattr(self, second)(x, p.at(second))
        f = getattr(self, ffn)(y, p.at(ffn))
        return p.see(sites.RESID_POST, x + self.drop(a) + self.drop(f))
