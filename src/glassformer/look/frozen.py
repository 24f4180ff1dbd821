"""The ends of paths, and the stream of a run walked again with one output changed and every other as it was (what path patching freezes).

sender's new output ──► + ──► norm ──► + ──► … ──► what each later part would read
                        ▲              ▲
                  every other output as it was in the base run: nothing is multiplied by a matrix on the way
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import SiteError
from glassformer.core.flow import Pass
from glassformer.core.tap import Record
from glassformer.models.transformer import TransformerModel
from glassformer.parts.wiring import SequentialBlock

from .patching_question import Question
from .subject import Subject, check_layer, feedforward_of, n_heads, with_weights


@dataclass(frozen=True)
class Node:
    """One end of a path. Senders: ``embed``, a head, or a feed-forward layer; receivers: a head's ``q``, ``k`` or ``v``, a feed-forward layer, ``logits``."""

    kind: str
    layer: int = -1
    head: int = 0
    part: str = ""

    @property
    def name(self) -> str:
        """``5.1``, ``5.1.q``, ``cross 2.0``, ``ffn 3``, ``embed``, ``logits``."""
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.kind in ("attn", "cross"):
            return ("cross " if self.kind == "cross" else "") + f"{self.layer}.{self.head}" + (f".{self.part}" if self.part else "")
        return f"ffn {self.layer}"


_NODE = re.compile(r"(cross\s*)?L?(\d+)\s*[.,H]\s*(\d+)(?:\s*[.]?\s*([qkv]))?", re.IGNORECASE)
_FFN = re.compile(r"(?:ffn|mlp|experts)\s*(\d+)", re.IGNORECASE)


def read_node(s: Subject, given: str | tuple[int, int], receiver: bool) -> list[Node]:
    """The node that a text names; a receiving head without q, k or v is all three. Raises :class:`SiteError` for what the model has not."""
    text = f"{given[0]}.{given[1]}" if isinstance(given, tuple) and len(given) == 2 else given
    if not isinstance(text, str):
        raise SiteError(f"{given!r} names no end of a path: write '{s.layers - 1}.0', 'ffn 0' or '{s.layers - 1}.0.q'.")
    if text == ("logits" if receiver else "embed"):
        return [Node(text, s.layers if receiver else -1)]
    if found := _FFN.fullmatch(text.strip()):
        layer = check_layer(s.stack, int(found[1]))
        return [Node(feedforward_of(s.stack, layer), layer)]
    if found := _NODE.fullmatch(text.strip()):
        kind, layer, head, part = "cross" if found[1] else "attn", check_layer(s.stack, int(found[2])), int(found[3]), (found[4] or "").lower()
        if kind == "cross" and not s.has(f"blocks.{layer}.cross.z"):
            raise SiteError(f"{given!r} names cross-attention, which this model has none of.")
        if head >= (n := n_heads(s.stack, layer, kind)):
            raise SiteError(f"Head {layer}.{head} was asked for, but layer {layer} has {n} heads, 0 to {n - 1}.")
        if receiver and kind == "cross" and part in ("k", "v"):
            raise SiteError(
                f"{given!r}: keys and values of cross-attention are read from the encoder, "
                f"not from the decoder's stream; its queries are 'cross {layer}.{head}.q'."
            )
        if part and not receiver:
            raise SiteError(f"{given!r} is an input; a sender is a head's output: write '{layer}.{head}'.")
        parts = (part,) if part or not receiver else ("q",) if kind == "cross" else ("q", "k", "v")
        return [Node(kind, layer, head, p) for p in parts]
    last = f"{s.layers - 1}.0"  # an example that this model has
    cross = (f"'cross {last}.q', " if receiver else f"'cross {last}', ") if s.has("blocks.*.cross.z") else ""
    example = f"'{last}.q', '{last}' (its q, k and v), {cross}'ffn 0' or 'logits'" if receiver else f"'{last}', {cross}'ffn 0' or 'embed'"
    raise SiteError(f"{given!r} is no {'receiver' if receiver else 'sender'}: write {example}.")


def all_nodes(s: Subject, receiver: bool) -> list[Node]:
    """Every sender, or every receiver, in the order of computation."""
    made = [] if receiver else [Node("embed")]
    for layer in range(s.layers):
        for kind in s.stack.blocks[layer].order:
            if kind not in ("attn", "cross"):
                made.append(Node(kind, layer))
                continue
            for head in range(n_heads(s.stack, layer, kind)):
                made += [Node(kind, layer, head, p) for p in (("q", "k", "v") if kind == "attn" else ("q",))] if receiver else [Node(kind, layer, head)]
    return [*made, Node("logits", s.layers)] if receiver else made


class Frozen:
    """The stream of the base run, walked again with one output changed and every other as it was."""

    def __init__(self, q: Question):
        self.q, self.s = q, q.base
        self.stack = with_weights(q.base.stack, "Path patching")
        self.base = q.sweep.base
        sites = [p for p in self._sites() if p != "blocks.0.resid_pre"]
        record, _ = q.other.run("blocks.0.resid_pre", *sites)
        self.other = {p.removeprefix(self.s.prefix): v for p, v in record.values.items()}

    def _sites(self) -> list[str]:
        return sites_of(self.stack)

    def plain(self) -> Pass:
        """Side inputs for parts that work position by position."""
        index = torch.arange(len(self.s), device=self.s.device)
        return Pass(positions=index, index=index)

    def order(self, node: Node) -> tuple[int, int]:
        """Where a node stands: its block, and its place in it. In parallel wiring both sublayers stand at the same place."""
        if node.kind in ("embed", "logits"):
            return node.layer, 0
        block: Any = self.stack.blocks[node.layer]
        return node.layer, block.order.index(node.kind) if isinstance(block, SequentialBlock) else 0

    def reaches(self, sender: Node, receiver: Node) -> bool:
        """Whether there is a direct way from one to the other."""
        return self.order(sender) < self.order(receiver)

    def output(self, sender: Node) -> Tensor:
        """The sublayer's output [1 t d] (for ``embed``: the stream) if this sender alone gave what it gave in the other run."""
        if sender.kind == "embed":
            return self.other["blocks.0.resid_pre"]
        path = f"blocks.{sender.layer}.{sender.kind}"
        if sender.kind not in ("attn", "cross"):
            return self.other[f"{path}.out"]
        layer: Any = getattr(self.stack.blocks[sender.layer], sender.kind)
        change = self.other[f"{path}.z"] - self.base[f"{path}.z"]
        return self.base[f"{path}.out"] + layer.result(change, (sender.head,))[:, :, 0]

    def walk(self, sender: Node, out: Tensor, start: Tensor | None = None) -> list[tuple[tuple[int, int], Tensor]]:
        """The stream [n t d] that enters each later place, with the sender's sublayer giving ``out``; the last is after all blocks."""
        p, found = self.plain(), []
        first = self.order(sender)
        x = out if sender.kind == "embed" else start if start is not None else self.before(first)
        begun = sender.kind == "embed"
        for layer, block in enumerate(self.stack.blocks):
            names: Any = block.order
            if isinstance(block, SequentialBlock):
                for i, (name, _, norm_out, after) in enumerate(block.steps):
                    if begun:
                        found.append(((layer, i), x))
                    y = self.base[f"blocks.{layer}.{name}.out"]
                    if (layer, i) == first and not begun:
                        begun, y = True, out
                    if begun:
                        x = block.normed(after, x + block.normed(norm_out, y, p), p)
            else:
                if begun:
                    found.append(((layer, 0), x))
                ys = {name: self.base[f"blocks.{layer}.{name}.out"] for name in names}
                if layer == first[0] and not begun:
                    begun, ys[sender.kind] = True, out
                if begun:
                    x = x + ys[names[0]] + ys[names[1]]
        return [*found, ((self.s.layers, 0), x)]

    def before(self, place: tuple[int, int]) -> Tensor:
        """The base run's stream [1 t d] that enters a place."""
        layer, i = place
        if layer >= self.s.layers:
            return self.base[f"blocks.{self.s.layers - 1}.resid_post"]
        after = {"attn": "resid_mid", "cross": "resid_mid_cross"}
        block: Any = self.stack.blocks[layer]
        return self.base[f"blocks.{layer}.resid_pre" if i == 0 else f"blocks.{layer}.{after[block.order[i - 1]]}"]

    def received(self, kind: str, layer: int, stream: Tensor, grad: bool = False) -> dict[str, Tensor]:
        """What a sublayer makes of the stream [n t d] that reaches it: its ``in``, and of attention q, k and v of all heads."""
        block: Any = self.stack.blocks[layer]
        p = self.plain()
        if isinstance(block, SequentialBlock):
            x = block.normed(next(before for name, before, _, _ in block.steps if name == kind), stream, p)
        else:
            x = getattr(block, next(norm for name, norm in block.steps if name == kind))(stream, p)
        if kind not in ("attn", "cross"):
            return {"in": x}
        own: Any = self.stack
        encoded = self.q.sweep.encoded
        memory = None if encoded is None else encoded.expand(x.shape[0], -1, -1)
        path = f"{self.s.prefix}blocks.{layer}.{kind}"
        record = Record(*(f"{path}.{n}" for n in "qkv"), grad=True) if grad else _Only(tuple(f"{path}.{n}" for n in "qkv"))
        record._checked_by = id(own)  # type: ignore[attr-defined]
        passed = own._pass(x, None, None, None, None, memory, None, record, None, self.s.prefix.rstrip("."))
        getattr(block, kind)(x, passed.layer(layer).at(kind))
        return {n: record[f"{path}.{n}"] for n in "qkv"}


class _Only(Record):
    """A record of values that exist only where they are edited (keys of latent attention)."""

    def __init__(self, paths: tuple[str, ...]):
        super().__init__(*paths)

    def edits(self, path: str) -> bool:
        return self.wants(path)


def sites_of(stack: TransformerModel) -> list[str]:
    """What a frozen walk needs of a run."""
    sites = ["blocks.0.resid_pre"]
    for layer, block in enumerate(stack.blocks):
        own: Any = block
        sites += [f"blocks.{layer}.{site.name}" for site in own.SITES if site.name.startswith("resid_mid")]
        for kind in own.order:
            sites += [f"blocks.{layer}.{kind}.out"] + ([f"blocks.{layer}.{kind}.z"] if kind in ("attn", "cross") else [])
    return sites
