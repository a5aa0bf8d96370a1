"""Carry a study out: hand its runs to a pool, keep each record as it comes, leave out what is done already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from bncli.measure.compare import Job, Study, planned_runs, wanted
from bncli.measure.pool import Ended, Pool, Progressed, Started
from bncli.plain_data import from_plain
from bncli.recipe.file import plain
from bncli.results import (
    ComparisonEvent,
    ComparisonStarted,
    RunBegan,
    RunEnded,
    RunProgressed,
    RunRecord,
    RunResult,
)


class Store(Protocol):
    """Where records live between calls: a folder of files, or a dict in a test."""

    def finished(self) -> dict[str, RunRecord]: ...

    def save(self, record: RunRecord) -> None: ...


def execute(
    study: Study, store: Store, pool: Pool, records: dict[str, RunRecord], stop: Callable[[], bool] = lambda: False
) -> Iterator[ComparisonEvent]:
    """Do every run of the study that `store` does not hold; `records`, by key, is filled as they come.

    A run that fails is recorded with its reason and not tried again in this call. Raises what the pool raises.
    """
    records.update(store.finished())
    jobs: dict[str, Job] = {}

    def to_do() -> list[tuple[str, dict[str, object]]]:
        jobs.update({job.key: job for job in wanted(study, records)})
        return [(key, {"recipe": plain(job.recipe)}) for key, job in jobs.items() if key not in records]

    to_do()
    planned, total = planned_runs(study, records), study.plan
    done = sum(key in records for key in jobs)
    yield ComparisonStarted(total.name, planned, done, total.target.metric)
    for event in pool.run(to_do, stop):
        if isinstance(event, Started):
            yield RunBegan(event.worker, jobs[event.key].label, total.budget)
        elif isinstance(event, Progressed):
            yield RunProgressed(event.worker, event.step, event.value)
        elif isinstance(event, Ended):
            record = _record(jobs[event.key], event, pool.limit)
            store.save(record)
            records[record.key] = record
            done += 1
            planned = planned_runs(study, records)
            yield RunEnded(event.worker, jobs[event.key].label, done, _outcome(record), planned)


def _record(job: Job, event: Ended, at_a_time: int) -> RunRecord:
    result = from_plain(RunResult, event.result) if event.result is not None else None
    return RunRecord(job.key, job.arm, job.point, job.seed, job.phase, result, event.failure, at_a_time)


def _outcome(record: RunRecord) -> str:
    if record.result is None:
        return f"failed: {record.failure}"
    if record.result.steps_to_target is not None:
        return f"target after {record.result.steps_to_target:,.0f} steps"
    return record.result.reason or f"target not reached in {record.result.steps_run:,} steps"
