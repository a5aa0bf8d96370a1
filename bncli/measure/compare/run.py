"""Execution of a comparison: runs go to an executor and are recorded as they end; finished ones are skipped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol

from bncli.errors import USAGE, Refused, by_arm
from bncli.measure.compare.plan import Find, Job, Study, known_runs, point_and_seed
from bncli.measure.compare.work import Work
from bncli.recipe.load import digest, plain
from bncli.recipe.sections import Hub, Mnist, Npz, OwnModel
from bncli.results.compare import ComparisonEvent, ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import from_plain
from bncli.results.train import RunResult

LOOK_EVERY_S = 1.0  # for what other calls have done in the same folder
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


class Leases(Protocol):
    """Which of the calls on a folder does which run; after `lease` and `free`, `find` sees what others have ended."""

    def lease(self, key: str, recipe_key: str, own_code: bool) -> bool:
        """Take the lease of a run; False where another call does it."""

    def free(self, keys: Collection[str]) -> Collection[str]:
        """Those runs of other calls which no call does any more."""

    def release(self, key: str) -> None:
        """Give back the lease of a run."""

    def alone(self) -> bool:
        """Whether no other call is there."""


class _OpenRuns(Work):
    """The runs of a study that are not done, in the order in which they are to be handed out.

    The study is asked again once every named run of an arm has ended, or of one of its searches for the largest
    learning rate, which alone can change its answer; so a run that ends costs the same however many are open.

    below: key -> steps below the target so far, of runs in progress.
    """

    def __init__(
        self,
        study: Study,
        records: dict[str, RunRecord],
        find: Find,
        leases: Leases | None,
        share: Callable[[str], bool],
    ) -> None:
        super().__init__()
        self.study, self.records, self.find, self.leases, self.share = study, records, find, leases, share
        self.below: dict[str, float] = {}
        self._looked_s = 0.0
        self._ask()

    def take(self, workers: int) -> list[Job]:
        """As `Work.take`, but for the runs that another call does, or has ended meanwhile."""
        while taken := super().take(workers):
            for job in taken:
                if not self._leased(job):
                    self.elsewhere[job.key] = self.running.pop(job.key)
            if mine := [job for job in taken if job.key in self.running]:
                return mine
        return []

    def _leased(self, job: Job) -> bool:
        if self.leases is None:
            return True
        if not self.leases.lease(job.key, job.recipe_key, isinstance(job.recipe.model, OwnModel)):
            return False
        if ended := self._new({job.key}):
            self.leases.release(job.key)
        return not ended

    def put_back(self, jobs: Sequence[Job], one_by_one: bool = False) -> None:
        super().put_back(jobs, one_by_one)
        if self.leases:  # else other calls would wait for runs that this one may no longer need
            for job in jobs:
                self.leases.release(job.key)

    def record(self, record: RunRecord) -> None:
        """Of a run that has ended."""
        self.records[record.key] = record
        self.running.pop(record.key, None)
        arms = [keys for keys in self._open.values() if record.key in keys]
        self.done += bool(arms)
        for keys in arms:
            keys.remove(record.key)
        if not all(arms):
            self._ask()

    def of_others(self) -> Iterator[RunRecord]:
        """The runs that other calls have ended since the last time."""
        if self.leases is None or monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        if self.elsewhere or not self.leases.alone():
            free = self.leases.free(self.elsewhere)  # they wait again
            new = self._new(set().union(*self._open.values()) - self.running.keys())
            freed, ended = [self.elsewhere.pop(key) for key in free], {record.key for record in new}
            self.waiting = deque(job for job in (*self.waiting, *freed) if job.key not in ended)
            for record in new:
                self.elsewhere.pop(record.key, None)
                self.record(record)
                yield record
        self._looked_s = monotonic()

    def _new(self, keys: set[str]) -> list[RunRecord]:
        """The runs with those keys that other calls have ended, as far as they are not known yet."""
        found = self.find(keys)
        return [found[key] for key in keys if key in found and found[key] != self.records.get(key)]

    def _ask(self) -> None:
        named = known_runs(self.study, self.records, self.find)
        self.planned = named.planned
        self._open: dict[tuple[str, int | None], set[str]] = {}  # arm, seed of a search -> keys of runs not done
        to_do: dict[str, Job] = {}
        for job in named.to_do:
            to_do.setdefault(job.key, job)
            self._open.setdefault((job.arm, job.seed if job.phase == "rate" else None), set()).add(job.key)
        self.done = len({job.key for job in named.jobs}) - len(to_do)
        # What was given up, since runs then in progress were better, is done only where these did not bear it out.
        given_up = {key for key in to_do if key in self.records}
        for keys in self._open.values():
            if not keys <= given_up:
                keys -= given_up
        open_runs = set().union(*self._open.values())
        self.elsewhere = {key: job for key, job in self.elsewhere.items() if key in open_runs}
        mine = [key for key in to_do if key in open_runs and self.share(key)]
        self.waiting = deque(to_do[key] for key in mine if key not in self.running and key not in self.elsewhere)
        self._race_at = 0.0  # at once: runs that wait again may be without a chance

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
        lost = set().union(*out.values())
        lost -= set().union(*(keys - out.get(group, set()) for group, keys in self._open.items()))
        if dropped := {job.key for job in self.waiting} & lost:
            self.waiting = deque(job for job in self.waiting if job.key not in dropped)
            self.planned -= len(dropped)
            for keys in self._open.values():
                keys -= dropped
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
        trials.setdefault(key := digest(step), replace(job, key=key, recipe=recipe, check=True, company=""))
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
    leases: Leases | None = None,
    share: Callable[[str], bool] = lambda key: True,
) -> Iterator[ComparisonEvent]:
    """Do every run of the study that `records`, by key, does not hold; each new record is saved and added to it.

    find: those of some keys that were done in earlier calls; asked when runs are named that depend on others. leases:
    where other calls do runs of the same folder; those are waited for. share: whether a run, by its key, is this
    call's; the others are neither done nor waited for.
    A run that fails is recorded with its reason and not tried again in this call. Raises what the executor raises.
    """
    plan = study.plan
    runs = _OpenRuns(study, records, find, leases, share)
    yield ComparisonStarted(plan.name, runs.planned, runs.done, plan.target.metric)
    for event in executor.run(runs, stop):
        for record in runs.of_others():
            label = f"{record.arm}, {point_and_seed(record.point, record.seed)}"
            yield RunEnded(None, label, runs.done, runs.planned, record, len(runs.elsewhere))
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
            yield RunEnded(event.worker, job.label, runs.done, runs.planned, record, len(runs.elsewhere))
        if event is not None and (lost := runs.without_a_chance()):
            executor.give_up(lost)
