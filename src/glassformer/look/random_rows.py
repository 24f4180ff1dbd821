"""Rows of random tokens, each twice: what tells heads that go by a token's identity from those that go by place or content."""

from __future__ import annotations

from typing import Any

import torch

from glassformer.core.errors import InputError
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .subject import most_positions, vocabulary
from .windows import Reading

FEWEST = 4
"""Shortest random row that is repeated."""


def random_rows(model: Any, tokenizer: Tokenizer | None, source: Any, repeats: int, length: int, seed: int) -> tuple[list[list[int]], tuple[int, int], Any]:
    """Rows ``before + r + r + after``, how many tokens stand around them, and a source for them where one is needed."""
    bare = model.model if isinstance(model, Loaded) else model
    halves = isinstance(bare, EncoderDecoderModel)
    probe = Reading(model, [[0]], tokenizer, source=[0] if halves else None)
    before, after = probe.around
    special = (
        set(probe.tokenizer.special.values()) | {i for r in probe.tokenizer.roles if (i := probe.tokenizer.role_id(r)) is not None}
        if probe.tokenizer
        else set()
    )
    v = vocabulary(probe.stack) if probe.tokenizer is None else min(vocabulary(probe.stack), probe.tokenizer.vocab_size)
    ordinary = torch.tensor([i for i in range(v) if i not in special and i not in (*before, *after)])
    limit = most_positions(bare)
    room = length if limit is None else min(length, (limit - len(before) - len(after)) // 2)
    most = min(room, len(ordinary))
    if most < FEWEST:
        raise InputError(
            f"Random rows of {FEWEST} different tokens are repeated, but this model has {f'{limit:,}' if limit is not None else 'unlimited'} positions "
            f"and {len(ordinary)} ordinary tokens: too few to look for induction."
        )
    draw = torch.Generator().manual_seed(seed)
    least = max(FEWEST, most // 2)
    rows = []
    for i in range(repeats):
        n = most if repeats == 1 else least + round(i * (most - least) / (repeats - 1))
        r = ordinary[torch.randperm(len(ordinary), generator=draw)[:n]].tolist()
        rows.append([*before, *r, *r, *after])
    random_source = ordinary[torch.randperm(len(ordinary), generator=draw)[:most]].tolist() if halves else None
    return rows, (len(before), len(after)), random_source
