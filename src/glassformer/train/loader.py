"""The loader: which windows of the data make up the next batch.

    tokens   |--phase--|----window 0----|----window 1----|----window 2----|  …
                        ^ read with one token more: the last target is the next window's first input

An epoch is all windows of ``context`` tokens behind a random phase, in random order: every token of theirs is
predicted once, unless ``repeats`` writes over it. The order is a pure function of (seed, epoch), drawn by a
counter-based generator, so the whole state is three numbers and the global generators are never touched.

With ``repeats`` a share of the rows says something twice, as text of the web does and a novel seldom:

    row      … a passage of n tokens … other text … the same passage …        n from SHORTEST to half a row
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glassformer.core.errors import CheckpointError, DataError
from glassformer.tasks import Batch

from .data import TokenData

SHORTEST = 8
"""Tokens of the shortest passage that is said twice."""


class Loader:
    """Endless batches of shuffled windows.

    ``batch``: rows; ``context``: predicted tokens to a row (``t``). ``documents=True`` adds the numbers of
    the documents, so that the task can keep attention and prediction within them. ``repeats``: the share of rows in which a
    later passage is overwritten by an earlier one, so that a model can learn to copy within minutes: what may be looked up in
    the context is what in-context learning forms on (bursty data, arXiv 2205.05055; induction heads, arXiv 2209.11895). Raises
    :class:`DataError` if the data is shorter than one window, and for rows too short for two passages.
    """

    def __init__(self, data: TokenData, batch: int, context: int, *, seed: int = 0, documents: bool = False, repeats: float = 0.0):
        if batch < 1 or context < 1:
            raise DataError(f"A batch has at least one row of one token; batch {batch} and context {context} were given.")
        if len(data) < context + 1:
            raise DataError(f"The data has {len(data)} tokens, but one window of context {context} needs {context + 1}: use a shorter context or more text.")
        if not 0.0 <= repeats <= 1.0:
            raise DataError(f"repeats is the share of rows that say a passage twice, from 0 to 1; {repeats} was given.")
        if repeats and documents:
            raise DataError("repeats copies a passage across documents, and documents=True keeps them apart: use one of the two.")
        if repeats and context + 1 < 2 * SHORTEST:
            raise DataError(f"repeats={repeats} needs rows of two passages of {SHORTEST} tokens, but a row of context {context} has {context + 1}.")
        self.data, self.batch, self.context, self.seed, self.documents, self.repeats = data, batch, context, seed, documents, repeats
        self._epoch, self._position = 0, 0
        self._starts = self._order(0)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Where the windows of an epoch begin, in the order in which they are read."""
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        free = len(self.data) - 1
        phase = int(draw.integers(min(self.context, free - self.context + 1)))
        windows = (free - phase) // self.context
        return draw.permutation(windows) * self.context + phase

    def next(self) -> Batch:
        """The next batch: tokens int64 [b t+1] (and documents)."""
        rows: list[npt.NDArray[np.int64]] = []
        wanted = self.batch
        while wanted:
            if self._position == len(self._starts):
                self._epoch, self._position = self._epoch + 1, 0
                self._starts = self._order(self._epoch)
            taken = self._starts[self._position : self._position + wanted]
            rows.append(taken)
            wanted, self._position = wanted - len(taken), self._position + len(taken)
        starts = rows[0] if len(rows) == 1 else np.concatenate(rows)
        read = self.data.read(starts, self.context + 1)
        if self.repeats:
            self._repeat(read)
        tokens = torch.from_numpy(read)
        return Batch(tokens, torch.from_numpy(self.data.document_ids(starts, self.context + 1)) if self.documents else None)

    def _repeat(self, rows: npt.NDArray[np.int64]) -> None:
        """In the chosen rows [b t+1] a later passage becomes an earlier one. As the order, it follows from seed, epoch and position alone."""
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self._epoch, self._position])))
        length = rows.shape[1]
        for i in np.flatnonzero(draw.random(len(rows)) < self.repeats):
            n = int(draw.integers(SHORTEST, length // 2 + 1))
            first = int(draw.integers(0, length - 2 * n + 1))
            again = int(draw.integers(first + n, length - n + 1))
            rows[i, again : again + n] = rows[i, first : first + n]

    @property
    def epoch(self) -> float:
        """How often the data has been read, as a fraction."""
        return self._epoch + self._position / len(self._starts)

    # What a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Everything that decides the batches to come."""
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken."""
        if state["seed"] != self.seed:
            raise CheckpointError(f"The checkpoint was read with data seed {state['seed']}, but this run has {self.seed}: use the same.")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._starts = self._order(self._epoch)
        if self._position > len(self._starts):
            raise CheckpointError(
                f"The checkpoint stands at window {self._position} of an epoch that has {len(self._starts)}: the data or the context changed."
            )
