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
    _trail: list[list[Tensor | None]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.seeds)

    def own(self, link: int, stream: str) -> Own:
        """What link number ``link`` may see of this state."""
        return Own(self, self.memory[link], stream)

    def advance(self, memory: list[Tensor | None]) -> None:
        """One token was drawn in every row; ``memory`` is what the links remember from now on."""
        if any(m is not None for m in memory):
            self._trail.append(self.memory)
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

        def cut(memory: list[Tensor | None]) -> list[Tensor | None]:
            return [None if m is None else m[torch.as_tensor(list(rows), device=m.device)] for m in memory]

        return State(self.seed, [self.seeds[r] for r in rows], [self.steps[r] for r in rows], cut(self.memory), [cut(m) for m in self._trail])

    def rewind(self, k: int) -> None:
        """Forget the last ``k`` draws of every row. Raises :class:`SamplerError` if a row has drawn fewer."""
        if k < 0 or k > min(self.steps, default=k):
            raise SamplerError(f"The sampler has drawn {min(self.steps, default=0)} tokens, so it cannot be wound back by {k}.")
        self.steps = [n - k for n in self.steps]
        if k and self._trail:
            self.memory = self._trail[-k]
            del self._trail[-k:]


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
