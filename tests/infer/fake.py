"""A model and a tokenizer small enough to reason about: what comes next depends on the last token alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glassformer.core.cache import Cache, Clock


class Bigram(nn.Module):
    """Logits are a row of a table. Takes a cache (which only counts) and lengths as a real model does."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.float())
        self.calls: list[tuple[tuple[int, ...], str]] = []

    @staticmethod
    def random(v: int = 11, seed: int = 0) -> Bigram:
        return Bigram(torch.randn(v, v, generator=torch.Generator().manual_seed(seed)) * 2)

    @staticmethod
    def cycle(ids: list[int], v: int) -> Bigram:
        """Says ``ids`` in a circle, whatever the sampler."""
        table = torch.full((v, v), -50.0)
        for a, b in zip(ids, ids[1:] + ids[:1], strict=True):
            table[a, b] = 50.0
        return Bigram(table)

    def cache(self, batch: int = 1, capacity: int | None = 512) -> Cache:
        return Cache(Clock(batch), [], capacity)

    def forward(self, tokens: Tensor, *, lengths=None, cache=None, keep=None, tap=None, path="") -> Tensor:
        self.calls.append((tuple(tokens.shape), path))
        if cache is not None:
            cache.open(tokens.shape[0], tokens.shape[1], lengths, tokens.device)
            cache.close()
        logits = self.table[tokens]
        if isinstance(keep, Tensor):
            return logits[torch.arange(len(keep)), keep][:, None]
        return logits if keep is None else logits[:, -keep:]


class Bytes:
    """256 bytes, and 256 for the end. Decodes as ``bytes.decode(errors="replace")`` does."""

    eos_id = 256
    bos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Pieces:
    """A vocabulary given as a list of texts."""

    eos_id = None

    def __init__(self, *pieces: str):
        self.pieces = pieces

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            best = max((p for p in self.pieces if p and text.startswith(p)), key=len)
            ids.append(self.pieces.index(best))
            text = text[len(best) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)
