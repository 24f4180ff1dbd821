"""What a lens reads: the streams between blocks, what a sublayer adds to them, and the read-out as a linear map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.flow import Pass
from glassformer.core.tap import Edit, Record
from glassformer.models.transformer import TransformerModel
from glassformer.parts.norm import LayerNormLayer, NoNormLayer, RMSNormLayer
from glassformer.parts.wiring import SequentialBlock

from .subject import Subject, feedforward_of, with_weights


def stream_sites(s: Subject, between: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and sites of the streams between blocks: the one that enters block 0, then the one after each block (``between``: after each sublayer)."""
    names, sites = ["embedding"], ["blocks.0.resid_pre"]
    for i in range(s.layers):
        for site, after in (("resid_mid", "attn"), ("resid_mid_cross", "cross")) if between else ():
            if s.has(path := f"blocks.{i}.{site}"):
                names.append(f"block {i} {after}")
                sites.append(path)
        names.append(f"block {i}" if i < s.layers - 1 else "output")
        sites.append(f"blocks.{i}.resid_post")
    return tuple(names), tuple(sites)


def streams_of(s: Subject, of: str) -> tuple[tuple[str, ...], list[Tensor], Tensor]:
    """Names, streams [t d] and the model's logits [t v]."""
    between = of == "resid_mid"
    if between and not isinstance(s.stack, TransformerModel):
        s.path("blocks.*.resid_mid")  # says why it cannot be reached
    if between and not s.has("blocks.*.resid_mid"):
        raise InputError("of='resid_mid' asks for the stream between attention and feed-forward, but here both read the same stream: use of='attn' or 'ffn'.")
    names, sites = stream_sites(s, between)
    record, logits = s.run(*sites)
    return names, [record[s.path(site)][0] for site in sites], logits


def added_of(s: Subject, of: str, norm: str) -> tuple[tuple[str, ...], list[Tensor], Tensor]:
    """Names, what each sublayer of one kind adds [t d], and the model's logits [t v]."""
    if norm == "final":
        check_linear(s)
    kinds = [feedforward_of(s.stack, i) if of == "ffn" else of for i in range(s.layers)]
    there = [i for i in range(s.layers) if s.has(f"blocks.{i}.{kinds[i]}.out")]
    if not there:
        raise InputError(f"of={of!r} asks for what {of} adds, but this model has none: use of='attn' or 'ffn'.")
    sites = [f"blocks.{i}.{kinds[i]}.out" for i in there]
    record, logits = s.run(*sites)
    return tuple(f"block {i} {kinds[i]}" for i in there), [added(s, record, i, kinds[i])[0] for i in there], logits


def added(s: Subject, record: Record, layer: int, kind: str) -> Tensor:
    """[b t d] What a sublayer adds to the stream: its output, behind the norm that some wirings put there."""
    y = record[s.path(f"blocks.{layer}.{kind}.out")]
    if not isinstance(s.stack, TransformerModel):
        behind = s.stack.norm_behind(layer, kind)
        return y if behind is None else behind(y)
    name, _ = norms_after(s.stack, layer, kind)
    if not name:
        return y
    normed: Tensor = getattr(s.stack.blocks[layer], name)(y, plain_pass(y))
    return normed


def norms_after(stack: Any, layer: int, kind: str) -> tuple[str, str]:
    """The names of the norms of what a sublayer returns, and of the sum that it is added to (empty: none)."""
    block = stack.blocks[layer] if isinstance(stack, TransformerModel) else None
    if isinstance(block, SequentialBlock):
        return next((out, after) for name, _, out, after in block.steps if name == kind)
    return "", ""


def plain_pass(x: Tensor, tap: Any = None) -> Pass:
    """The side inputs of a part that is called by itself on [.. t d]."""
    index = torch.arange(x.shape[-2], device=x.device)
    return Pass(positions=index, index=index, tap=tap)


# The read-out as a linear map


def check_linear(s: Subject) -> None:
    """Raise :class:`InputError` unless what a sublayer adds reaches the scores before the cap by a linear map, once the final norm's scale is known."""
    stack = with_weights(s.stack, "norm='final'")
    todo = "use norm='own'"
    if any(norms_after(stack, i, kind)[1] for i, block in enumerate(stack.blocks) for kind in getattr(block, "order", ())):
        raise InputError(
            f"norm='final' reads parts of the final stream, but here a norm stands behind every sum (post-norm), which no part passes alone: {todo}."
        )
    if not isinstance(stack.final_norm, LayerNormLayer | RMSNormLayer | NoNormLayer):
        kind = type(stack.spec.final_norm).__name__
        raise InputError(f"norm='final' divides by the final norm's scale, but {kind} is no division by a number: {todo}.")
    if stack.readout.transform is not None:
        raise InputError(f"norm='final' adds up parts of the logits, but this read-out has a transform that is not linear: {todo}.")


class FrozenReadOut:
    """Final norm and read-out at the scale of the model's own final stream at these positions, without biases and cap: linear, [t d] -> [t v]."""

    def __init__(self, s: Subject, at: Sequence[int]):
        self.stack = s.stack
        self.tap: Edit | None = None
        if not isinstance(self.stack.final_norm, NoNormLayer):
            record, _ = s.run("final_norm.scale")
            scale = record[s.path("final_norm.scale")][0, list(at)]
            self.tap = Edit("scale", lambda _: scale)

    def __call__(self, h: Tensor) -> Tensor:
        p, norm, out = plain_pass(h, self.tap), self.stack.final_norm, self.stack.readout
        # A norm whose scale is held is affine; what it makes of 0 is its bias.
        y = norm(h, p) - norm(torch.zeros_like(h), p)
        scores: Tensor = torch.nn.functional.linear(y * out.factor, out.weight)
        return scores
