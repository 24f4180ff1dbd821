"""Directions as words: which tokens a vector that is added to the stream raises, and which a vector that reads the stream answers to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.models.transformer import TransformerModel
from glassformer.parts.wiring import ParallelBlock, PostNorm

from .subject import Subject, feedforward_of, reads_tokens
from .vectors import back_through, matrix_of, through


@dataclass(frozen=True)
class Words:
    """Tokens with a number each, the strongest first."""

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    values: tuple[float, ...]

    def __str__(self) -> str:
        return "  ".join(self.pieces)


def words_written(subject: Subject, layer: int, ffn: Any, unit: int, k: int, among: Tensor) -> tuple[Words | None, Words | None]:
    """The tokens whose logits one unit's column of ``W_out`` raises and lowers most on the direct way to the read-out.

    ``W_U g(u)`` less its mean over the vocabulary, ``u`` the column through the norms on the way, without their divisions (which scale all tokens
    alike). None where there are no logits, or a transform with an activation stands before them, behind which a direction means nothing by itself.
    """
    stack: Any = subject.stack
    if not reads_tokens(stack):
        return None, None
    readout = stack.readout
    if readout.transform is not None and readout.transform.act.__name__ != "_identity":
        return None, None
    u = matrix_of(ffn.down)[:, unit]
    for norm in norms_after(stack, layer):
        u = through(norm, u)
    u = through(stack.final_norm, u)
    if readout.transform is not None:
        u = through(readout.transform.norm, matrix_of(readout.transform.linear) @ u)
    with torch.no_grad():
        logits = readout.factor * (readout.weight.detach().float().cpu() @ u)
    logits = (logits - logits.mean())[among]
    return _best(subject, logits, k, among), _best(subject, -logits, k, among, -1.0)


def words_read(subject: Subject, layer: int, row: Tensor, k: int, among: Tensor) -> Words:
    """The tokens whose embedding has the largest cosine with the direction in the stream that a row of ``W_in`` [d] reads, through the norm before it.

    In the first layers the stream still holds the embeddings; further up it holds much else, and the words say less.
    """
    stack: Any = subject.stack
    direction = back_through(norm_before(stack, layer), row)
    with torch.no_grad():
        embed = stack.embed
        rows = embed.weight[among.to(embed.weight.device)] * embed.factor  # only these are candidates: the whole table may be a thousand times as long
        table = embed.lift_sum(embed.lift_tokens(rows)).detach().float().cpu()
    return _best(subject, F.normalize(table, dim=-1) @ F.normalize(direction, dim=0), k, among)


def norm_before(stack: TransformerModel, layer: int) -> Any:
    """The norm between the stream and the feed-forward layer, or None."""
    block: Any = stack.blocks[layer]
    name = _step(block, layer, stack)[1]
    return getattr(block, name) if name else None


def norms_after(stack: TransformerModel, layer: int) -> list[Any]:
    """The norms that stand on the direct way from the feed-forward layer's output to the final norm: its own, and those on the stream (post-norm)."""
    block: Any = stack.blocks[layer]
    names = () if isinstance(block, ParallelBlock) else _step(block, layer, stack)[2:]
    found = [getattr(block, name) for name in names if name]
    for later in range(layer + 1, len(stack.blocks)):
        b: Any = stack.blocks[later]
        if isinstance(stack.spec.blocks[later].wiring, PostNorm):
            found += [getattr(b, step[3]) for step in b.steps if step[3]]
    return found


def _step(block: Any, layer: int, stack: TransformerModel) -> tuple[str, ...]:
    kind = feedforward_of(stack, layer)
    step: tuple[str, ...] = next(s for s in block.steps if s[0] == kind)
    return step


def _best(subject: Subject, scores: Tensor, k: int, among: Tensor, sign: float = 1.0) -> Words:
    """The ``k`` largest of the scores of the tokens ``among``."""
    values, at = scores.topk(min(k, len(among)))
    ids = among[at]
    return Words(tuple(subject.piece(int(i)) for i in ids), tuple(int(i) for i in ids), tuple(sign * float(v) for v in values))
