"""A study carried out: what is done already is left out, what ends is kept at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bncli.measure.compare import run as execute_module
from bncli.measure.compare.executors import Ended, Progressed, Started
from bncli.measure.compare.plan import Job, Study, collect, planned_runs, wanted
from bncli.measure.compare.run import execute
from bncli.measure.compare.summary import summarise
from bncli.results.compare import ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import to_plain
from tests.measure.compare.test_plan import ARMS, BASE, result, sentences, study_of


class Serial:
    """An executor that answers every run at once."""

    def __init__(self, answer: Callable[[str], float | str | None]) -> None:
        self.answer, self.ran = answer, list[str]()

    def run(self, wanted: deque[Job], stop: Callable[[], bool]) -> Iterator[Started | Progressed | Ended | None]:
        while wanted and not stop():
            key = wanted.popleft().key
            self.ran.append(key)
            yield Started(0, key)
            yield None
            yield Progressed(0, key, 5, 0.5)
            steps = self.answer(key)
            if isinstance(steps, str):
                yield Ended(0, key, None, steps)
            else:
                yield Ended(0, key, to_plain(result(steps)), None)


class Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.records: dict[str, RunRecord] = {}

    def finished(self) -> dict[str, RunRecord]:
        return {key: record for key, record in self.records.items() if record.result is not None}

    def save(self, record: RunRecord) -> None:
        self.records[record.key] = record


def carry_out(asked: Study, store: Kept, executor: Serial, **arguments: Any) -> tuple[list[Any], dict[str, RunRecord]]:
    records = store.finished()
    return list(execute(asked, store, executor, records, **arguments)), records


def test_every_planned_run_is_done_and_kept_as_it_ends(tmp_path: Path) -> None:
    store = Kept()
    events, records = carry_out(study_of(tmp_path, BASE + ARMS), store, Serial(lambda key: 100.0))
    assert records == store.records
    assert len(records) == 48
    assert events[0] == ComparisonStarted("recipe0", 28, 0, "accuracy")
    assert [type(event) for event in events[1:4]] == [RunBegan, RunProgressed, RunEnded]
    assert events[1].label == "plain, lr 0.1, seed 7"
    planned = [event.planned for event in events if isinstance(event, RunEnded)]
    assert planned == sorted(planned)  # 28, and more with each arm that keeps all three of its points
    assert (planned[0], planned[-1]) == (28, 48)
    assert (events[-1].done, events[-1].record.result) == (48, result(100.0))


def test_a_second_call_does_nothing_again(tmp_path: Path) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + ARMS)
    carry_out(asked, store, Serial(lambda key: 100.0))
    executor = Serial(lambda key: 100.0)
    events, records = carry_out(asked, store, executor)
    assert executor.ran == []
    assert events == [ComparisonStarted("recipe0", 48, 48, "accuracy")]
    assert len(records) == 48


def test_a_run_that_fails_is_kept_with_its_reason_not_tried_twice_and_tried_again_by_the_next_call(
    tmp_path: Path,
) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 4}")
    executor = Serial(lambda key: "it died")
    events, records = carry_out(asked, store, executor)
    assert len(executor.ran) == len(set(executor.ran)) == 8
    assert {record.failure for record in records.values()} == {"it died"}
    assert (events[-1].record.result, events[-1].record.failure) == (None, "it died")
    again = Serial(lambda key: None)
    events, _ = carry_out(asked, store, again)
    assert len(again.ran) == 8
    assert events[-1].record.result == result(None)


def test_stop_leaves_the_rest_for_later(tmp_path: Path) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + ARMS)
    carry_out(asked, store, Serial(lambda key: 100.0), stop=lambda: len(store.records) >= 5)
    assert len(store.records) == 5
    executor = Serial(lambda key: 100.0)
    carry_out(asked, store, executor)
    assert len(executor.ran) == 43


def test_runs_that_arms_share_are_done_and_counted_once(tmp_path: Path) -> None:
    store, executor = Kept(), Serial(lambda key: 100.0)
    asked = study_of(tmp_path, BASE + ARMS.replace("normed:", "again:\n  normed:"))
    events, _ = carry_out(asked, store, executor)
    assert len(executor.ran) == 48
    assert events[0] == ComparisonStarted("recipe0", 28, 0, "accuracy")
    assert (events[-1].done, events[-1].planned) == (48, 48)
    again, _ = carry_out(asked, store, executor)
    assert again == [ComparisonStarted("recipe0", 48, 48, "accuracy")]
    found = summarise(asked.plan, collect(asked, store.records), planned_runs(asked, store.records))
    assert [arm.runs for arm in found.arms] == [8, 8, 8]
    assert not any("runs are done" in note for note in sentences(found.notes))


def test_runs_that_an_arm_shares_with_one_point_of_anothers_grid_are_planned_once_when_that_is_known(
    tmp_path: Path,
) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("normed:", "fixed: {optimizer: {lr: 1}}\n  normed:"))
    for best, runs in ((0.1, 33), (1, 28)):
        fast = {job.key for job in wanted(asked, {}) if job.point["optimizer.lr"] == best}
        executor = Serial(lambda key, fast=fast: 100.0 if key in fast else 200.0)  # type: ignore[misc]
        events, _ = carry_out(asked, Kept(), executor)
        assert (events[0].planned, events[-1].done, events[-1].planned, len(executor.ran)) == (33, runs, runs, runs)


def test_the_study_is_asked_no_more_often_than_arms_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many runs are open: asking takes as long as they are many."""
    asked: list[int] = []
    monkeypatch.setattr(execute_module, "wanted", lambda *given: asked.append(1) or wanted(*given))  # type: ignore[func-returns-value]
    for seeds in (5, 50):
        asked.clear()
        executor = Serial(lambda key: 100.0)
        carry_out(study_of(tmp_path, BASE + ARMS.replace("report: 5", f"report: {seeds}")), Kept(), executor)
        assert len(set(executor.ran)) == len(executor.ran) == 18 + 2 * 3 * seeds
        assert len(asked) == 5  # at the beginning, then for each arm once it is tuned and once it is through
