"""Drawing one token for each of several requests: those with equal chains together, in one call of the chain.

    logits [b v] ─┬─ rows of one chain ──► Joined state ──► chain ──► tokens
                  ├─ rows of another   ──► Joined state ──► chain ──► tokens
                  └─ a traced row      ──► its own state ─► chain ──► token and Choice

Random numbers are counted and not consumed (see :mod:`glassformer.infer.state`), so a row draws what it would draw alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError

from ..sampler import Chain, Passed
from ..session import Drawn, _measure, _seeded, _why_nothing
from ..state import Own, State, uniform
from ..trace import Choice
from ..tracing import measure
from .request import Job


@dataclass(frozen=True)
class Outcome:
    """What one job drew, or why it could not."""

    job: Job
    token: int = -1
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)
    choice: Choice | None = None
    ended: bool = False
    error: Exception | None = None


class _JoinedOwn(Own):
    """One link's part of a joined state: every row's numbers come from its own run's seed."""

    def uniform(self, device: torch.device) -> Tensor:
        assert isinstance(self.state, Joined)
        drawn = [uniform(s.seed, s.seeds[0], s.steps[0], self.stream) for s in self.state.parts]
        return torch.tensor(drawn, dtype=torch.float64, device=device)


class Joined(State):
    """States of one row each, of one chain, as one state of several rows; what is drawn goes back into each of them."""

    def __init__(self, parts: Sequence[State]):
        memory = [_cat([part.memory[i] for part in parts]) for i in range(len(parts[0].memory))]
        super().__init__(0, [s.seeds[0] for s in parts], [s.steps[0] for s in parts], memory)
        self.parts = list(parts)

    def own(self, link: int, stream: str) -> Own:
        return _JoinedOwn(self, self.memory[link], stream)

    def advance(self, memory: list[Tensor | None]) -> None:
        self.memory, self.steps = memory, [n + 1 for n in self.steps]
        for row, part in enumerate(self.parts):
            # No trail is kept: a request is never wound back.
            part.memory = [None if m is None else m[row : row + 1] for m in memory]
            part.steps = [part.steps[0] + 1]


def _cat(memories: list[Tensor | None]) -> Tensor | None:
    tensors = [m for m in memories if m is not None]
    return torch.cat(tensors) if tensors else None


def choose(jobs: Sequence[Job], logits: Tensor) -> list[Outcome]:
    """The next token of every job from its row of ``logits`` [b v]; what goes wrong in one leaves the others as they are."""
    made: dict[int, Outcome] = {}
    for rows in _groups(jobs):
        group = [jobs[r] for r in rows]
        own = logits if len(rows) == len(jobs) else logits[torch.tensor(rows, device=logits.device)]
        try:
            made |= zip(rows, _draw(group, own), strict=True)
        except Exception as error:
            if len(rows) == 1:
                made[rows[0]] = Outcome(group[0], error=error)
                continue
            for row in rows:  # one of them is to blame
                made[row] = choose([jobs[row]], logits[row : row + 1])[0]
    return [made[row] for row in range(len(jobs))]


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """Rows that one call can draw for: equal chains, equally many candidates to report; a traced one is by itself."""
    groups: list[tuple[Job, list[int]]] = []
    for row, job in enumerate(jobs):
        for first, rows in groups:
            if not job.kept and not first.kept and job.top == first.top and _alike(job.chain, first.chain):
                rows.append(row)
                break
        else:
            groups.append((job, [row]))
    return [rows for _, rows in groups]


def _alike(a: Chain, b: Chain) -> bool:
    """Whether one call does for both; links that cannot be compared (of tensors, say) are called one by one."""
    try:
        return a is b or bool(a == b)
    except Exception:
        return False


def _draw(jobs: list[Job], logits: Tensor) -> list[Outcome]:
    """One call of the chain that these jobs share."""
    first = jobs[0]
    chain = first.chain
    state = first.state if len(jobs) == 1 else Joined([job.state for job in jobs])
    passed: list[Passed] | None = [] if first.kept else None
    history = _history(jobs, chain, logits.device)
    chosen = chain(logits, history, state, passed)
    first.state._trails = [[] for _ in first.state.seeds]  # never wound back either
    drawn: Drawn = _measure(logits, chosen, first.top)
    choices: Sequence[Choice | None] = [None] * len(jobs)
    if passed is not None:
        choices = measure(logits, passed, _seeded(chain, first.state), chosen, first.kept, first.drawn)
    ended = [False] * len(jobs)
    if history is not None and any(link.ends for link in chain.links):
        ended = chain.ended(torch.cat([history, chosen.clamp(min=0)[:, None]], dim=1), state)
    return [
        Outcome(job, token, logprob, top, choice, over, _nothing(job, logits[row]) if token < 0 else None)
        for row, (job, token, logprob, top, choice, over) in enumerate(zip(jobs, drawn.ids, drawn.logprobs, drawn.top, choices, ended, strict=True))
    ]


def _nothing(job: Job, logits: Tensor) -> SamplerError:
    return SamplerError(_why_nothing(logits, job.chain, f"at step {job.drawn} of this request"))


def _history(jobs: list[Job], chain: Chain, device: torch.device) -> Tensor | None:
    """The ids of every row, right-aligned, -1 in front; None where no link asks which token is which."""
    if all(link.off or (link.by_value and not link.ends) for link in chain.links):
        return None
    longest = max(len(job.ids) for job in jobs)
    return torch.tensor([[-1] * (longest - len(job.ids)) + job.ids for job in jobs], device=device)
