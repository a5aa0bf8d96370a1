"""Several calls on one folder: each run is done by one of them, and all give one report."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bncli.measure.compare import reuse, run
from bncli.measure.compare.plan import Job, Study, collect, known_runs, named_runs
from bncli.measure.compare.run import Started, execute
from bncli.measure.compare.summary import summarise
from bncli.measure.compare.work import Work
from bncli.report.compare import leases
from bncli.report.compare.folder import ComparisonFolder
from bncli.report.files import to_json
from bncli.results.compare import BegunComparison, RunEnded, RunRecord
from tests.measure.compare.conftest import ARMS, BASE, UNTUNED, StudyOf
from tests.measure.compare.test_run import SEARCHED, Serial, Trained


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Call:
    """A call of the command in a folder, as the command line makes it."""

    def __init__(self, asked: Study, path: Path, executor: Serial, share: Callable[[str], bool] = lambda key: True):
        self.asked, self.folder, self.executor, self.share = asked, ComparisonFolder(path), executor, share
        self.records: dict[str, RunRecord] = {}
        self.events: list[Any] = []
        self.kept: dict[str, RunRecord] = {}

    def find(self, keys: set[str]) -> dict[str, RunRecord]:
        self.kept.update(reuse.usable(self.folder.finished(keys)))
        return {**self.kept, **self.folder.failures}

    def __call__(self, stop: Callable[[], bool] = lambda: False) -> None:
        with self.folder:
            self.folder.begin(BegunComparison(self.asked.plan, {}, 1, ()))
            for event in execute(
                self.asked, self.folder.save, self.executor, self.records, stop, self.find, self.folder, self.share
            ):
                self.events.append(event)
            self.folder.free(self.records)
            known_runs(self.asked, self.records, self.find)

    @property
    def report(self) -> str:
        planned = named_runs(self.asked, self.records).planned
        return to_json(summarise(self.asked.plan, collect(self.asked, self.records), planned))


class Slow(Serial):
    """Each run takes a millisecond."""

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Any]:
        for event in super().run(work, stop):
            time.sleep(0.001)
            yield event


def at_once(*calls: Call) -> None:
    started = [threading.Thread(target=call) for call in calls]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(120)
        assert not thread.is_alive()


def steps(job: Job) -> float | None:
    return None if (job.seed, job.arm) == (9, "plain") else 100.0 + 7 * job.seed + 50 * job.recipe.optimizer.lr


@pytest.mark.parametrize("calls", [2, 3])
def test_calls_at_the_same_time_do_no_run_twice_and_report_what_one_alone_reports(
    study_of: StudyOf, tmp_path: Path, calls: int
) -> None:
    asked = study_of(BASE + ARMS)
    alone = Call(asked, tmp_path / "alone", Serial(steps))
    alone()
    made = [Call(asked, tmp_path / "shared", Slow(steps)) for _ in range(calls)]
    at_once(*made)
    ran = [key for call in made for key in call.executor.ran]
    assert sorted(ran) == sorted(alone.executor.ran)
    assert {call.report for call in made} == {alone.report}
    ended = [event for event in made[0].events if isinstance(event, RunEnded)]
    assert ended[-1].done == ended[-1].planned == len(ran)
    assert sum(event.worker is not None for event in ended) == len(made[0].executor.ran)
    assert not list((tmp_path / "shared/runs").glob("*.lease"))


def test_runs_of_another_plan_are_shared_too(study_of: StudyOf, tmp_path: Path) -> None:
    few, many = (study_of(BASE + ARMS.replace("report: 5", f"report: {seeds}")) for seeds in (3, 5))
    made = [Call(few, tmp_path / "shared", Slow()), Call(many, tmp_path / "shared", Slow())]
    at_once(*made)
    ran = made[0].executor.ran + made[1].executor.ran
    assert len(set(ran)) == len(ran)
    assert len(made[0].records) < len(made[1].records) == len(ran)


class Waiting(Slow):
    """Waits in its first run until it is told to go on."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.waits, self.go = threading.Event(), threading.Event()

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Any]:
        for event in super().run(work, stop):
            yield event
            if isinstance(event, Started) and not self.waits.is_set():
                self.waits.set()
                assert self.go.wait(60)


def test_a_run_of_a_call_that_is_silent_is_taken_over_and_its_own_is_the_same(
    asked: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, other = (Call(asked, tmp_path / "shared", kind()) for kind in (Waiting, Serial))
    thread = threading.Thread(target=silent)
    thread.start()
    assert silent.executor.waits.wait(60)  # type: ignore[attr-defined]
    second = threading.Thread(target=other)
    second.start()
    end = time.monotonic() + 60
    while len(other.executor.ran) < 17:  # all of the tuning but one
        assert time.monotonic() < end
        time.sleep(0.01)
    monkeypatch.setattr(leases, "LIMIT_S", -1.0)  # every call is silent for longer than that
    second.join(60)
    assert len(set(other.executor.ran)) == len(other.executor.ran) == len(other.records)
    kept = {file: file.read_bytes() for file in (tmp_path / "shared/runs").glob("*.json")}
    silent.executor.go.set()  # type: ignore[attr-defined]
    thread.join(60)
    assert len(silent.executor.ran) == 1
    assert {file: file.read_bytes() for file in kept} == kept
    assert len(kept) == len(other.records)
    assert silent.report == other.report


def test_a_run_that_fails_in_another_call_is_not_tried_again_by_those_at_the_same_time(
    asked: Study, tmp_path: Path
) -> None:
    first, other = (Call(asked, tmp_path / "shared", kind(answer=lambda job: "it died")) for kind in (Waiting, Slow))
    thread = threading.Thread(target=first)
    thread.start()
    assert first.executor.waits.wait(60)  # type: ignore[attr-defined]
    second = threading.Thread(target=other)
    second.start()
    end = time.monotonic() + 60
    while not other.executor.ran:  # it has begun, so that it no longer deletes what failed before
        assert time.monotonic() < end
        time.sleep(0.001)
    first.executor.go.set()  # type: ignore[attr-defined]
    for each in (thread, second):
        each.join(60)
    ran = first.executor.ran + other.executor.ran
    assert len(set(ran)) == len(ran)


class PutsBack(Serial):
    """Puts its first run back, as where a worker has died, and looks which runs are then its own."""

    runs = Path()

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Any]:
        taken = work.take(workers=10**9)
        self.leased = [len(list(self.runs.glob("*.lease")))]
        work.put_back(taken, one_by_one=True)
        self.leased.append(len(list(self.runs.glob("*.lease"))))
        return super().run(work, stop)


def test_a_run_that_is_put_back_is_free_for_other_calls(study_of: StudyOf, tmp_path: Path) -> None:
    call = Call(study_of(BASE + UNTUNED.replace("5", "2")), tmp_path, executor := PutsBack())
    executor.runs = tmp_path / "runs"
    call()
    assert executor.leased == [1, 0]
    assert len(executor.ran) == len(call.records)


def test_a_call_that_waits_for_others_ends_when_it_is_stopped(asked: Study, tmp_path: Path) -> None:
    first, other = (Call(asked, tmp_path / "shared", kind()) for kind in (Waiting, Serial))
    thread = threading.Thread(target=first)
    thread.start()
    assert first.executor.waits.wait(60)  # type: ignore[attr-defined]
    other(stop=lambda: len(other.executor.ran) == 17)
    assert 0 < len(other.records) < 48
    first.executor.go.set()  # type: ignore[attr-defined]
    thread.join(60)
    assert len(first.executor.ran) + len(other.executor.ran) == len(first.records)


def test_shares_divide_the_runs_and_wait_for_nothing(asked: Study, tmp_path: Path) -> None:
    alone = Call(asked, tmp_path / "alone", Serial(steps))
    alone()
    of_each, runs = list[Serial](), dict[str, bytes]()
    for phase, done in (("tuning", 18), ("report", len(alone.executor.ran))):
        for number in range(3):
            folder = tmp_path / f"{phase} {number}"
            (folder / "runs").mkdir(parents=True)
            for name, content in runs.items():
                (folder / "runs" / name).write_bytes(content)
            call = Call(asked, folder, Serial(steps), lambda key, number=number: int(key, 16) % 3 == number)  # type: ignore[misc]
            call()
            of_each.append(call.executor)
        for file in tmp_path.glob(f"{phase} */runs/*.json"):
            runs[file.name] = file.read_bytes()
        assert len(runs) == done
    assert sorted(key for each in of_each for key in each.ran) == sorted(alone.executor.ran)
    assert all(each.ran for each in of_each)


def test_a_search_is_shared(study_of: StudyOf, tmp_path: Path) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "2") + SEARCHED)
    alone, made = Call(asked, tmp_path / "alone", Trained()), [Call(asked, tmp_path / "x", Trained()) for _ in range(2)]
    alone()
    at_once(*made)
    assert sorted(key for call in made for key in call.executor.ran) == sorted(alone.executor.ran)
    assert {call.report for call in made} == {alone.report}
