"""Execution of a comparison: runs go to an executor and are recorded as they end; finished ones are skipped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol

from bncli.errors import USAGE, Refused, by_arm
from bncli.measure.compare.plan import Find, Job, Study, known_runs
from bncli.measure.compare.work import Work
from bncli.recipe.load import digest, plain
from bncli.recipe.sections import Hub, Mnist, Npz, OwnModel
from bncli.results.compare import ComparisonEvent, ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import from_plain
from bncli.results.train import RunResult

RACE_EVERY_S = 0.2  # at most so often it is looked which points of the grid can no longer win,
RACE_REST = 50  # and for one part of the time in so many,
RACE_AGAIN_S = 2.0  # but after so long in any case: the first time includes the import of scipy


@dataclass(frozen=True)
class Started:
    worker: int
    job: Job


@dataclass(frozen=True)
class Ended:
    """A run's result as plain data, or why there is none."""

    worker: int
    job: Job
    result: dict[str, Any] | None
    failure: str | None = None
    code: dict[str, str] = field(default_factory=dict)  # of the user's own that was loaded: file -> SHA-256
    at_a_time: int = 1  # runs that may have been in progress at once


class Executor(Protocol):
    """Executes the runs of a comparison and reports events.

    The folder of run files is authoritative: an executor only distributes work, and a lost run is repeated.
    """

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | RunProgressed | Ended | None]:
        """Execute runs until there are no more or `stop()` is true.

        A worker that is free takes the runs that it trains together, often a single one. Yields events, and None now
        and then so that a progress bar can be updated. Every run that was taken has an Ended, or is put back, but those
        that `stop` has ended. It can be called again.
        """
        ...

    def give_up(self, keys: Collection[str]) -> None:
        """End those of the runs in progress soon, as `given up`; a hint that an executor may leave alone."""
        ...

    def close(self) -> None:
        """End the processes that did them; another `run` starts new ones."""
        ...


class _OpenRuns(Work):
    """The runs of a study that are not done, in the order in which they are to be handed out.

    The study is asked again once every named run of an arm has ended, or of one of its searches for the largest
    learning rate, which alone can change its answer; so a run that ends costs the same however many are open.

    below: key -> steps below the target so far, of runs in progress.
    """

    def __init__(self, study: Study, records: dict[str, RunRecord], find: Find) -> None:
        super().__init__()
        self.study, self.records, self.find = study, records, find
        self.below: dict[str, float] = {}
        self._ask()

    def record(self, record: RunRecord) -> None:
        """Of a run that has ended."""
        self.records[record.key] = record
        self.done += 1
        arms = [keys for keys in self._open.values() if record.key in keys]
        for keys in arms:
            keys.remove(record.key)
        if not all(arms):
            self._ask()

    def _ask(self) -> None:
        named = known_runs(self.study, self.records, self.find)
        self.planned = named.planned
        self.done = len({job.key for job in named.jobs}) - len({job.key for job in named.to_do})
        self._open: dict[tuple[str, int | None], set[str]] = {}  # arm, seed of a search -> keys of runs not done
        self._race_at = 0.0  # at once: runs that wait again may be without a chance
        self.waiting.clear()
        for job in named.to_do:
            if job.key not in self.running and not any(job.key in keys for keys in self._open.values()):
                self.waiting.append(job)
            group = (job.arm, job.seed if job.phase == "rate" else None)
            self._open.setdefault(group, set()).add(job.key)

    def without_a_chance(self) -> set[str]:
        """Keys of the runs in progress at points of the grid that can no longer win; those that wait are dropped.

        Looked at now and then alone, since it takes longer the more runs there are. Runs that arms share are kept as
        long as one of the arms needs them.
        """
        if (began := monotonic()) < self._race_at:
            return set()
        below = {key: self.below[key] for key in self.running if key in self.below}
        tuning = {job.key for job in (*self.waiting, *self.running.values()) if job.phase == "tune"}
        arms = [arm for arm in self.study.arms if tuning & self._open.get((arm.name, None), set())]
        out: dict[Any, set[str]] = {(arm.name, None): self.study.out(arm, self.records, below) for arm in arms}
        rest = max(RACE_EVERY_S, RACE_REST * (monotonic() - began))
        self._race_at = monotonic() + min(RACE_AGAIN_S, rest)
        needed = set().union(*(keys - out.get(group, set()) for group, keys in self._open.items()))
        lost = set().union(*out.values()) - needed
        if dropped := [job for job in self.waiting if job.key in lost]:
            kept = [job for job in self.waiting if job.key not in lost]
            self.waiting.clear()
            self.waiting.extend(kept)
            for keys in self._open.values():
                keys.difference_update(job.key for job in dropped)
            self.planned -= len(dropped)
            if not all(self._open.values()):
                self._ask()
                return (lost & self.running.keys()) | self.without_a_chance()
        return lost & self.running.keys()


def check(
    study: Study, jobs: Iterable[Job], executor: Executor, stop: Callable[[], bool], note: Callable[[], None], dry: bool
) -> bool:
    """Make the first step of each model that differs in some jobs, with its arm's probes. Whether there was any.

    note: called first. dry: for a dry run, only what no recipe tells, a model of the user's own or a .npz file, and no
    data that may take minutes to read. Raises Refused with the mistakes of all arms.
    """
    probes = {arm.name: arm.recipe.probes for arm in study.arms}
    trials: dict[str, Job] = {}
    arms: dict[str, list[str]] = {}
    for (arm, _), job in {(job.arm, job.recipe.model.model_dump_json()): job for job in jobs}.items():
        large = isinstance(job.recipe.data, Hub | Mnist)
        if dry and not isinstance(job.recipe.data, Npz) and (large or not isinstance(job.recipe.model, OwnModel)):
            continue
        recipe = job.recipe.model_copy(update={"probes": probes[arm]})
        step: dict[str, Any] = plain(recipe)
        step["optimizer"]["lr"] = step["train"]["seed"] = step["schedule"] = None
        trials.setdefault(key := digest(step), replace(job, key=key, recipe=recipe, check=True))
        arms.setdefault(key, []).append(arm)
    if trials:
        note()
    ended = [event for event in executor.run(Work(trials.values()), stop) if isinstance(event, Ended)]
    failures = {arm: event.failure for event in ended for arm in arms[event.job.key] if event.failure is not None}
    if any(isinstance(job.recipe.model, OwnModel) for job in trials.values()):
        executor.close()  # what the user's code keeps in its process must not reach the runs
    if failures:
        raise Refused(*by_arm((arm, failures[arm]) for arm in probes if arm in failures), exit_code=USAGE)
    return bool(trials)


def execute(
    study: Study,
    save: Callable[[RunRecord], None],
    executor: Executor,
    records: dict[str, RunRecord],
    stop: Callable[[], bool] = lambda: False,
    find: Find = lambda keys: {},
) -> Iterator[ComparisonEvent]:
    """Do every run of the study that `records`, by key, does not hold; each new record is saved and added to it.

    find: those of some keys that were done in earlier calls; asked when runs are named that depend on others.
    A run that fails is recorded with its reason and not tried again in this call. Raises what the executor raises.
    """
    runs, plan = _OpenRuns(study, records, find), study.plan
    yield ComparisonStarted(plan.name, runs.planned, runs.done, plan.target.metric)
    for event in executor.run(runs, stop):
        if isinstance(event, Started):
            yield RunBegan(event.worker, event.job.label, event.job.recipe.train.steps)
        elif isinstance(event, RunProgressed):
            runs.below |= event.below
            yield event
        elif isinstance(event, Ended):
            job = event.job
            record = RunRecord(
                job.key,
                job.arm,
                job.point,
                job.seed,
                job.phase,
                result=from_plain(RunResult, event.result) if event.result is not None else None,
                failure=event.failure,
                at_a_time=event.at_a_time,
                recipe_key=job.recipe_key,
                identity=study.identity,
                code=event.code,
            )
            save(record)
            runs.record(record)
            yield RunEnded(event.worker, job.label, runs.done, runs.planned, record)
        if event is not None and (lost := runs.without_a_chance()):
            executor.give_up(lost)
