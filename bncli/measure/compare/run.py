"""Run of a study: hands its runs to an executor, keeps each record as it comes, leaves out what is done already."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Protocol

from bncli.measure.compare.executors import Ended, Executor, Progressed, Started
from bncli.measure.compare.plan import Job, Study, planned_runs, wanted
from bncli.results.compare import ComparisonEvent, ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import from_plain
from bncli.results.train import RunResult


class Store(Protocol):
    """Where records are kept: a folder of files, or a dict in a test."""

    def save(self, record: RunRecord) -> None: ...


class OpenRuns:
    """The runs of a study that are not done, in the order in which they are to be handed out.

    The study is asked again once every named run of an arm has ended, which alone can change its answer; so a run
    that ends costs the same however many are open.
    """

    def __init__(self, study: Study, records: dict[str, RunRecord]) -> None:
        self.study, self.records = study, records
        self.jobs: dict[str, Job] = {}
        self.wanted: deque[Job] = deque()
        self._running: set[str] = set()
        self._arms: dict[str, list[str]] = {}  # key of an open run -> the arms that wait for it
        self._open: Counter[str] = Counter()  # arm -> its open runs
        self._ask()

    def started(self, key: str) -> Job:
        self._running.add(key)
        return self.jobs[key]

    def ended(self, record: RunRecord) -> None:
        self._running.discard(record.key)
        self.records[record.key] = record
        arms = self._arms.pop(record.key, [])
        self._open.subtract(arms)
        if any(not self._open[arm] for arm in arms):
            self._ask()

    def _ask(self) -> None:
        self.planned = planned_runs(self.study, self.records)
        self._arms, self._open = {}, Counter()
        self.wanted.clear()
        for job in wanted(self.study, self.records):
            self.jobs.setdefault(job.key, job)
            if job.key in self.records:
                continue
            arms = self._arms.setdefault(job.key, [])
            if not arms and job.key not in self._running:
                self.wanted.append(self.jobs[job.key])
            if job.arm not in arms:
                arms.append(job.arm)
                self._open[job.arm] += 1


def execute(
    study: Study,
    store: Store,
    executor: Executor,
    records: dict[str, RunRecord],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ComparisonEvent]:
    """Do every run of the study that `records`, by key, does not hold; it is filled as they come.

    A run that fails is recorded with its reason and not tried again in this call. Raises what the executor raises.
    """
    runs, plan = OpenRuns(study, records), study.plan
    done = sum(key in records for key in runs.jobs)
    yield ComparisonStarted(plan.name, runs.planned, done, plan.target.metric)
    for event in executor.run(runs.wanted, stop):
        if isinstance(event, Started):
            yield RunBegan(event.worker, runs.started(event.key).label, plan.budget)
        elif isinstance(event, Progressed):
            yield RunProgressed(event.worker, event.step, event.value)
        elif isinstance(event, Ended):
            job = runs.jobs[event.key]
            record = _record(job, study.identity, event)
            store.save(record)
            runs.ended(record)
            done += 1
            yield RunEnded(event.worker, job.label, done, runs.planned, record)


def _record(job: Job, identity: dict[str, str], event: Ended) -> RunRecord:
    result = from_plain(RunResult, event.result) if event.result is not None else None
    asked = (job.key, job.arm, job.point, job.seed, job.phase)
    return RunRecord(*asked, result, event.failure, event.at_a_time, job.recipe_key, identity, event.code)
