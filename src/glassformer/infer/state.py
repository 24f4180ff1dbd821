"""What a sampler remembers between steps, as an object that the caller holds.

A chain of links is a frozen Spec. Everything that changes while it is used lives here, one entry
per row: how many tokens the row has drawn (its place in its stream of random numbers) and what
single links remember. So a state can be forked with the rows of a batch, cut down with them, and
wound back, and two generations never disturb each other.

Random numbers are *counted*, not consumed: the number for one draw is a hash of

    (seed of the run, seed of the row, step of the row, name of the stream)

and depends on nothing else: not on the other rows, not on the device, not on what was drawn before
(the idea of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import SamplerError

_WORD = 2**64


def uniform(seed: int, row_seed: int, step: int, stream: str) -> float:
    """One number of [0, 1) with 53 random bits, fixed by its four arguments alone."""
    key = struct.pack("<QQQ", seed % _WORD, row_seed % _WORD, step % _WORD) + stream.encode()
    return float(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def fresh_seed() -> int:
    """A seed from torch's global generator, so that seeding everything also fixes unseeded samplers."""
    return int(torch.randint(2**62, ()).item())


class Room:
    """Wide tensors that a chain writes into at every step: a CPU takes as long for the memory of a new one as for what is done in it.

    What is written is good until the next step. ``borrowed`` counts those in use within a step.
    """

    def __init__(self) -> None:
        self._wide: list[Tensor] = []
        self._scratch: list[Tensor] = []
        self._marks: np.ndarray | None = None
        self.borrowed = 0

    def copy(self, x: Tensor) -> Tensor:
        """A copy of ``x`` that nobody else has in this step, float32."""
        if self.borrowed == len(self._wide):
            self._wide.append(torch.empty_like(x, dtype=torch.float32))
        if self._wide[self.borrowed].shape != x.shape or self._wide[self.borrowed].device != x.device:
            self._wide[self.borrowed] = torch.empty_like(x, dtype=torch.float32)
        self.borrowed += 1
        return self._wide[self.borrowed - 1].copy_(x)

    def scratch(self, like: Tensor, i: int) -> Tensor:
        """A place for what is needed at once only; ``i`` is 0 or 1."""
        if not self._scratch or self._scratch[0].shape != like.shape:
            self._scratch = [torch.empty_like(like), torch.empty_like(like)]
        return self._scratch[i]

    def marks(self, like: Tensor) -> np.ndarray:
        """A place for one truth value each."""
        if self._marks is None or self._marks.shape != tuple(like.shape):
            self._marks = np.empty(tuple(like.shape), dtype=bool)
        return self._marks


@dataclass
class State:
    """The memory of one chain over the rows of a batch; made by ``chain.state(rows)``.

    ``seed`` is the run's, ``seeds`` the rows', ``steps`` counts the tokens that each row has drawn.
    ``memory[i]`` belongs to link ``i``: a tensor whose first axis is the rows, or None.
    """

    seed: int
    seeds: list[int]
    steps: list[int]
    memory: list[Tensor | None]
    _trails: list[list[tuple[Tensor | None, ...]]] = field(default_factory=list, repr=False)  # per row, what was remembered before each draw

    _room: Room = field(default_factory=Room, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._trails = self._trails or [[] for _ in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def own(self, link: int, stream: str) -> Own:
        """What link number ``link`` may see of this state."""
        return Own(self, self.memory[link], stream)

    def advance(self, memory: list[Tensor | None]) -> None:
        """One token was drawn in every row; ``memory`` is what the links remember from now on."""
        if any(m is not None for m in memory):
            for row, trail in enumerate(self._trails):
                trail.append(tuple(None if m is None else m[row] for m in self.memory))
        self.memory = memory
        self.steps = [n + 1 for n in self.steps]

    def fork(self, n: int) -> State:
        """Each row ``n`` times. The copies share their streams: they draw the same until given other ``seeds``."""
        return self.select([row for row in range(len(self)) for _ in range(n)])

    def select(self, rows: Sequence[int]) -> State:
        """A new state of these rows, in this order."""
        outside = [r for r in rows if not 0 <= r < len(self)]
        if outside:
            raise SamplerError(f"The sampler's state has {len(self)} rows, so row {outside[0]} cannot be selected.")

        memory = [None if m is None else m[torch.as_tensor(list(rows), device=m.device)] for m in self.memory]
        return State(self.seed, [self.seeds[r] for r in rows], [self.steps[r] for r in rows], memory, [list(self._trails[r]) for r in rows])

    def put(self, rows: Sequence[int], other: State) -> None:
        """Let these rows go on from where the rows of ``other``, which were selected from them, have got to."""
        for row, steps, trail in zip(rows, other.steps, other._trails, strict=True):
            self.steps[row], self._trails[row] = steps, trail
        places = list(rows)
        self.memory = [
            m if m is None or new is None else m.index_copy(0, torch.as_tensor(places, device=m.device), new)
            for m, new in zip(self.memory, other.memory, strict=True)
        ]

    def rewind(self, k: int | Sequence[int]) -> None:
        """Forget the last ``k`` draws of every row, or of each row as many as its number in a list says.

        Raises :class:`SamplerError` if a row has drawn fewer.
        """
        ks = [k] * len(self) if isinstance(k, int) else [int(n) for n in k]
        if len(ks) != len(self):
            raise SamplerError(f"The sampler's state has {len(self)} rows, but {len(ks)} numbers of draws to forget were given: give one per row.")
        for n, drawn in zip(ks, self.steps, strict=True):
            if n < 0 or n > drawn:
                raise SamplerError(f"The sampler has drawn {drawn} tokens, so it cannot be wound back by {n}.")
        self.steps = [drawn - n for drawn, n in zip(self.steps, ks, strict=True)]
        if not any(n and trail for n, trail in zip(ks, self._trails, strict=True)):
            return
        memory = list(self.memory)
        for i, now in enumerate(self.memory):
            if now is not None:
                rows = [trail[-n][i] if n else now[row] for row, (n, trail) in enumerate(zip(ks, self._trails, strict=True))]
                memory[i] = torch.stack([now[row] if old is None else old for row, old in enumerate(rows)])
        self.memory = memory
        for n, trail in zip(ks, self._trails, strict=True):
            del trail[len(trail) - n :]


@dataclass(frozen=True)
class Own:
    """One link's part of a :class:`State`: its memory, and its stream of random numbers."""

    state: State
    memory: Tensor | None
    stream: str

    def uniform(self, device: torch.device) -> Tensor:
        """One number of [0, 1) per row, ``[b]`` in float64; the same for as long as no token is drawn."""
        s = self.state
        return torch.tensor([uniform(s.seed, r, n, self.stream) for r, n in zip(s.seeds, s.steps, strict=True)], dtype=torch.float64, device=device)
