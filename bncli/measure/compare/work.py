"""Runs of a comparison that wait for a worker, and those in progress."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from bncli.measure.compare.plan import Job

MOST_TOGETHER = 32  # runs in a batch: with more a run-step costs hardly less, and a lost batch costs more
MOST_SEEN = 256  # runs that wait, among which those for a batch are looked for: an arm's follow one another


class Work:
    """The runs that wait, in the order in which they are to begin; those that can train together are taken together.

    waiting: it may be changed after every event of an executor. running: those that were taken and are not recorded.
    elsewhere: key -> run that another call is doing, and that may wait here again.
    """

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        self.waiting = deque(jobs)
        self.running: dict[str, Job] = {}
        self.elsewhere: dict[str, Job] = {}
        self._alone: set[str] = set()  # keys of runs that are to be tried again one by one

    @property
    def more(self) -> bool:
        """Whether there is a run to take, now or later, though none is in progress."""
        return bool(self.waiting or self.elsewhere)

    def take(self, workers: int) -> list[Job]:
        """The runs that one of so many workers does next, all at once; they count as in progress. Empty for none."""
        if not self.waiting:
            return []
        taken = [self.waiting.popleft()]
        if self._together(taken[0]):
            seen = [self.waiting.popleft() for _ in range(min(MOST_SEEN, len(self.waiting)))]
            alike = [job for job in seen if job.company == taken[0].company and self._together(job)]
            others = sum(job.company == taken[0].company for job in self.running.values())
            taken += alike[: min(MOST_TOGETHER, math.ceil((1 + len(alike) + others) / workers)) - 1]
            keys = {job.key for job in taken}
            self.waiting.extendleft(job for job in reversed(seen) if job.key not in keys)
        self.running.update((job.key, job) for job in taken)
        return taken

    def _together(self, job: Job) -> bool:
        return bool(job.company) and job.key not in self._alone

    def put_back(self, jobs: Sequence[Job], one_by_one: bool = False) -> None:
        """Runs that were taken and have not begun, or, `one_by_one`, that a worker died with, wait again, as the first.

        The run that a worker dies of then fails alone.
        """
        for job in jobs:
            del self.running[job.key]
        self.waiting.extendleft(reversed(jobs))
        if one_by_one:
            self._alone.update(job.key for job in jobs)
