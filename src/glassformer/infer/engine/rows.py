"""The rows of one shared cache: who sits where, what is read in a step, and what may be taken over from another row.

rows 0 … n-1     requests at work, kept together: a step runs on a view of the first n rows, nothing is gathered
rows n … slots-1 free; what they hold stays until the place is needed, and may be the beginning of a later prompt
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache, View
from glassformer.core.packed_cache import packed
from glassformer.core.tap import Tap
from glassformer.models import program
from glassformer.parts.rotary import RopeScaling, RotaryLayer

from ..session import _boundaries
from .request import Job
from .taps import Looker, RowTap, only_looks

SHORTEST = 16
"""Fewer equal tokens than this are not worth copying."""


class Rows:
    """The cache of an engine, allocated at once, and the jobs in its rows."""

    def __init__(self, model: Any, slots: int, capacity: int, device: torch.device, chunk: int, prefix: bool, form: str | None = None):
        self.model, self.slots, self.capacity, self.device, self.chunk = model, slots, capacity, device, chunk
        self.translates = hasattr(model, "encode") and hasattr(model, "decode")
        self.boundaries = _boundaries(model)
        self.reach = _reach(model)
        self.prefix = prefix and not self.translates
        self.cache: Cache = self._allocated(form)
        self.jobs: list[Job] = []
        self.texts: list[list[int]] = [[] for _ in range(slots)]  # what each row's cache holds, where others may take it over
        self.used = [0] * slots  # when each was left
        self.left = 0
        self._views: dict[tuple[int, int], View] = {}

    @property
    def free(self) -> int:
        """How many more jobs find a place."""
        return self.slots - len(self.jobs)

    def _allocated(self, form: str | None) -> Cache:
        """A cache whose buffers are all there: made by reading one token in every row."""
        cache: Cache = self.model.cache(batch=self.slots, capacity=self.capacity)
        if form is not None:
            packed(cache, form)
        tokens = torch.zeros(self.slots, 1, dtype=torch.long, device=self.device)
        if self.translates:
            cache.shelve(self.capacity)
            memory = self.model.encode(tokens[:1]).expand(self.slots, -1, -1)
            self.model.decode(tokens, memory, cache=cache)
        else:
            self.model(tokens, cache=cache)
        for row in range(self.slots):
            cache.clear_row(row, wipe=True)
        return cache

    # Coming and going

    def admit(self, job: Job) -> int:
        """Give a job the first free row; how many of its tokens were there already, or are taken over from another row."""
        row = len(self.jobs)
        donor, n = self._donor(job)
        # The free row that is given up: the one that holds just what is needed, or nothing, or was left longest ago.
        whole = n and donor >= row and n == len(self.texts[donor])
        victim = donor if whole else min(range(row, self.slots), key=lambda r: (bool(self.texts[r]), self.used[r]))
        if victim != row:
            self._swap(victim, row)
            donor = victim if donor == row else row if donor == victim else donor
        self.jobs.append(job)
        if n and donor == row:
            self.cache.trim_row(row, n)
            self.texts[row] = self.texts[row][:n]
        else:
            self._clear(row)
            self._take_over(job, donor, n)
        job.held = n
        return n

    def leave(self, job: Job, spoilt: bool) -> None:
        """Free a job's row; the last job moves there. ``spoilt``: what it holds is wiped, and never taken over."""
        if not any(j is job for j in self.jobs):  # it failed on the way in: what the free rows hold is uncertain
            self.texts[len(self.jobs) :] = [[] for _ in range(self.free)]
            return
        row, last = self._row(job), len(self.jobs) - 1
        if spoilt:
            self._views.clear()  # one may have been left in the middle of a call
            self._clear(row, wipe=True)
        self._swap(row, last)
        self.jobs[row] = self.jobs[last]
        self.jobs.pop()
        self.left += 1
        self.used[last] = self.left

    def empty(self) -> None:
        """Free all rows, wiped: for when nobody knows any more what they hold."""
        self.jobs.clear()
        self._views.clear()
        for row in range(self.slots):
            self._clear(row, wipe=True)

    def _row(self, job: Job) -> int:
        return next(row for row, j in enumerate(self.jobs) if j is job)

    def _swap(self, a: int, b: int) -> None:
        self.cache.swap_rows(a, b)
        self.texts[a], self.texts[b] = self.texts[b], self.texts[a]
        self.used[a], self.used[b] = self.used[b], self.used[a]

    def _clear(self, row: int, wipe: bool = False) -> None:
        self.cache.clear_row(row, wipe)
        self.texts[row] = []

    # What others have read

    def _shares(self, job: Job) -> bool:
        """Whether the keys and values of a job are those that any other text with this beginning has."""
        return self.prefix and job.tap is None and (self.reach is None or len(job.ids) <= self.reach)

    def _donor(self, job: Job) -> tuple[int, int]:
        """The row that holds most of this job's beginning, and how many tokens that are: all but the last at most, which has to be read."""
        best, most = -1, max(SHORTEST - 1, job.held)
        for row in range(self.slots) if self._shares(job) else ():
            n = common(self.texts[row], job.ids[:-1])
            if n > most and self.cache.keeps(row, n):
                best, most = row, n
        return (best, most) if best >= 0 else (-1, 0)

    def _take_over(self, job: Job, donor: int, n: int) -> None:
        if n:
            row = self._row(job)
            self.cache.copy_row(donor, row, n)
            self.texts[row] = job.ids[:n]

    def catch_up(self) -> int:
        """Take over what other rows have read since a job came, where it has not begun to read itself; how many tokens that were."""
        found = 0
        for job in self.jobs:
            if not job.begun and not self._waits(job):
                donor, n = self._donor(job)
                self._take_over(job, donor, n)
                found += max(0, n - job.held)
                job.held = max(n, job.held)
        return found

    def _waits(self, job: Job) -> bool:
        """Whether an older job is about to read what this one would begin with."""
        if job.begun or not self._shares(job):
            return False
        for older in self.jobs:
            if older.number < job.number and older.reading and self._shares(older):
                n = common(older.ids, job.ids[:-1])
                if n > older.held and n >= job.held + SHORTEST and self.cache.would_keep(len(older.ids), n):
                    return True
        return False

    # Reading

    def pieces(self) -> list[tuple[Job, int]]:
        """Who reads how much of a prompt in this step, ``chunk`` tokens in all.

        The oldest gets half, so that it gets on; of the rest the shortest come first, so that they need not wait for the long.
        """
        reading = [job for job in self.jobs if job.reading and not self._waits(job)]
        if not reading:
            return []
        oldest, *others = sorted(reading, key=lambda job: job.number)
        left = self.chunk
        share = min(self._rest(oldest), left if not others else max(1, left // 2))
        left -= share
        given: list[tuple[Job, int]] = []
        for job in sorted(others, key=lambda job: self._rest(job)):
            n = min(self._rest(job), left)
            if n > 0:
                given.append((job, n))
                left -= n
        share = min(self._rest(oldest), share + left)
        return [(job, self._rest(job) if self._whole(job) else n) for job, n in [(oldest, share), *given]]

    def _begin_anew(self) -> None:
        """Have rows read all again that have just grown so long that their keys were turned by other angles than the new ones will be (LongRoPE)."""
        for row, job in enumerate(self.jobs):
            if not job.reading and len(job.ids) - 1 in self.boundaries:
                self._clear(row)
                job.held = 0

    def _rest(self, job: Job) -> int:
        return len(job.ids) - job.held

    def _whole(self, job: Job) -> bool:
        """Whether it has to be read in one piece: a tap sees one prefill, and some positions depend on how long a call is."""
        return job.tap is not None or self.translates or (self.reach is not None and len(job.ids) > self.reach)

    def read(self, job: Job, n: int) -> Tensor | None:
        """Read the next ``n`` tokens of a job; logits [1 v] after the last one if nothing is left to read."""
        row = self._row(job)
        view = self._view(row, row + 1)
        tokens = torch.tensor([job.ids[job.held : job.held + n]], device=self.device)
        if job.source is not None and job.held == 0:
            source = torch.tensor([job.source], device=self.device)
            memory = self.model.encode(source, [len(job.source)], tap=job.tap, path="step.0")
            view.begin(len(job.source))
            logits = self._call(view, tokens, None, job.tap, job.drawn, memory)
        else:
            logits = self._call(view, tokens, None, job.tap, job.drawn)
        self._note(row, job, n)
        return logits if job.held == len(job.ids) else None

    def decode(self) -> Iterator[tuple[list[Job], Tensor | Exception]]:
        """Read the last token of every job that has read all else: jobs and their logits [b v], or what went wrong in them.

        One call for all, but for those whose taps may change something.
        """
        self._begin_anew()
        ready = [(row, job) for row, job in enumerate(self.jobs) if not job.reading]
        together = [(row, job) for row, job in ready if job.tap is None or only_looks(job.tap)]
        apart = [job for _, job in ready if not (job.tap is None or only_looks(job.tap))]
        if together:
            yield from self._decode(together)
        for job in apart:
            try:
                logits: Tensor | Exception | None = self.read(job, 1)
            except Exception as error:
                logits = error
            assert logits is not None
            yield [job], logits

    def _decode(self, together: list[tuple[int, Job]]) -> Iterator[tuple[list[Job], Tensor | Exception]]:
        n = 1 + together[-1][0]
        fed = [0] * n
        for row, _ in together:
            fed[row] = 1
        tokens = torch.tensor([[self.jobs[row].ids[-1] if fed[row] else 0] for row in range(n)], device=self.device)
        view = self._view(0, n)
        lookers = [Looker(row, job.tap, job.drawn) for row, job in together if job.tap is not None]
        tap = RowTap(lookers, view) if lookers else None
        try:
            logits = self._call(view, tokens, None if all(fed) else fed, tap, 0)
        except Exception as error:
            yield [job for _, job in together], error
            return
        for row, job in together:
            self._note(row, job, 1)
        failed = tap.failed if tap is not None else {}
        well = [(row, job) for row, job in together if row not in failed]
        spoilt = [([self.jobs[row]], error) for row, error in failed.items()]
        if len(well) < n:
            logits = logits[torch.tensor([row for row, _ in well], dtype=torch.long, device=self.device)]
        if well:
            yield [job for _, job in well], logits
        yield from spoilt

    def _call(self, view: View, tokens: Tensor, fed: list[int] | None, tap: Tap | None, step: int, memory: Tensor | None = None) -> Tensor:
        """Logits [b v] after the last column."""
        if fed is None and tap is None and not self.translates and (quick := program.decode(self.model, tokens, view)) is not None:
            return quick
        options: dict[str, Any] = {"lengths": fed, "cache": view, "keep": 1, "tap": tap, "path": f"step.{step}"}
        if not self.translates:
            logits: Tensor = self.model(tokens, **options)
        else:
            logits = self.model.decode(tokens, memory, source_lengths=view.clock.sources, **options)
        return logits[:, -1]

    def _view(self, first: int, last: int) -> View:
        key = (first, last)
        if key not in self._views:
            self._views[key] = self.cache.view(first, last)
        return self._views[key].refresh()

    def _note(self, row: int, job: Job, n: int) -> None:
        """The row holds ``n`` more tokens of the job."""
        if self._shares(job) and len(self.texts[row]) == job.held:
            self.texts[row] += job.ids[job.held : job.held + n]
        job.held += n
        job.begun = True


def common(a: list[int], b: list[int]) -> int:
    """With how many equal tokens two texts begin."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _reach(model: Any) -> int | None:
    """The longest text that every rotary position reads the same whatever it is read with (None: any)."""
    layers = (m for m in model.modules() if isinstance(m, RotaryLayer)) if hasattr(model, "modules") else ()
    scalings = [m.spec.scaling for m in layers]
    return min((int(getattr(s, "original_context", 0)) for s in scalings if type(s).fit is not RopeScaling.fit), default=None)
