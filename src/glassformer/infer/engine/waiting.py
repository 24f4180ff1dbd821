"""The queue: bounded, first come first served within a user, users in turns.

ann:  a1 a2 a3 a4 ─┐
ben:  b1           ├─► a1 b1 c1 a2 c2 a3 a4
cy:   c1 c2       ─┘
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from glassformer.core.errors import QueueFull

from .request import Job

SHARE = 4
"""A named user leaves one place in so many to the others."""


class Waiting:
    """Jobs that wait for a slot, at most ``room``; not thread-safe by itself."""

    def __init__(self, room: int):
        self.room = room
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Job]:
        for line in self._lines.values():
            yield from line

    def most(self, user: str) -> int:
        """How many jobs of this user may wait."""
        return self.room - self.room // SHARE if user else self.room

    def check(self, user: str) -> None:
        """Raise :class:`QueueFull` if this user has to wait outside."""
        if len(self) >= self.room:
            raise QueueFull(f"{len(self)} requests are waiting and the queue holds {self.room}: try again later, or make Engine(queue=…) longer.")
        own, most = len(self._lines.get(user, ())), self.most(user)
        if user and own >= most:
            raise QueueFull(f"{own} requests of {user!r} are waiting, and one user has at most {most} of the {self.room} places: try again later.")

    def add(self, job: Job) -> None:
        """Put a job at the end of its user's line."""
        self.check(job.user)
        self._lines.setdefault(job.user, deque()).append(job)

    def take(self) -> Job:
        """The next one: the first of the user whose turn it is; who was served goes to the end."""
        user, line = next(iter(self._lines.items()))
        job = line.popleft()
        self._lines.move_to_end(user)
        if not line:
            del self._lines[user]
        return job

    def remove(self, job: Job) -> bool:
        """Take a job out; whether it was there."""
        line = self._lines.get(job.user, deque())
        found = any(j is job for j in line)
        if found:
            self._lines[job.user] = deque(j for j in line if j is not job)
            if not self._lines[job.user]:
                del self._lines[job.user]
        return found
