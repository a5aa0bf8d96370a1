"""A study carried out: what is done already is left out, what ends is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bncli.measure.compare import Study
from bncli.measure.execute import execute
from bncli.measure.pool import Ended, Progressed, Started
from bncli.plain_data import to_plain
from bncli.results import ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from tests.measure.test_compare import ARMS, BASE, result, study_of


class Serial:
    """A pool of one that answers every run at once."""

    limit = 1

    def __init__(self, answer: Callable[[str], float | str | None]) -> None:
        self.answer, self.ran = answer, list[str]()

    def run(
        self, wanted: Callable[[], Sequence[tuple[str, dict[str, Any]]]], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Started | Progressed | Ended | None]:
        while (to_do := wanted()) and not stop():
            key = to_do[0][0]
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


def carry_out(asked: Study, store: Kept, pool: Serial, **arguments: Any) -> tuple[list[Any], dict[str, RunRecord]]:
    records: dict[str, RunRecord] = {}
    return list(execute(asked, store, pool, records, **arguments)), records  # type: ignore[arg-type]


def test_every_planned_run_is_done_and_kept_as_it_ends(tmp_path: Path) -> None:
    store = Kept()
    events, records = carry_out(study_of(tmp_path, BASE + ARMS), store, Serial(lambda key: 100.0))
    assert records == store.records
    assert len(records) == 28
    assert events[0] == ComparisonStarted("recipe0", 28, 0, "accuracy")
    assert [type(event) for event in events[1:4]] == [RunBegan, RunProgressed, RunEnded]
    assert events[1].label == "plain, lr 0.1, seed 7"
    assert (events[-1].done, events[-1].outcome) == (28, "target after 100 steps")


def test_a_second_call_does_nothing_again(tmp_path: Path) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + ARMS)
    carry_out(asked, store, Serial(lambda key: 100.0))
    pool = Serial(lambda key: 100.0)
    events, records = carry_out(asked, store, pool)
    assert pool.ran == []
    assert events == [ComparisonStarted("recipe0", 28, 28, "accuracy")]
    assert len(records) == 28


def test_a_run_that_fails_is_kept_with_its_reason_not_tried_twice_and_tried_again_by_the_next_call(
    tmp_path: Path,
) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 4}")
    pool = Serial(lambda key: "it died")
    events, records = carry_out(asked, store, pool)
    assert len(pool.ran) == len(set(pool.ran)) == 8
    assert {record.failure for record in records.values()} == {"it died"}
    assert events[-1].outcome == "failed: it died"
    again = Serial(lambda key: None)
    events, _ = carry_out(asked, store, again)
    assert len(again.ran) == 8
    assert events[-1].outcome == "target not reached in 1,000 steps"


def test_stop_leaves_the_rest_for_later(tmp_path: Path) -> None:
    store, asked = Kept(), study_of(tmp_path, BASE + ARMS)
    carry_out(asked, store, Serial(lambda key: 100.0), stop=lambda: len(store.records) >= 5)
    assert len(store.records) == 5
    pool = Serial(lambda key: 100.0)
    carry_out(asked, store, pool)
    assert len(pool.ran) == 23
