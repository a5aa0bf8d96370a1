"""Racing: the points of the grid that are given up, and that a report without them is that of all runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.measure.compare import run, stats
from bncli.measure.compare.plan import Job, Study, collect, named_runs, study
from bncli.measure.compare.racing import points_out
from bncli.measure.compare.run import Ended, Started, execute
from bncli.measure.compare.summary import summarise
from bncli.measure.compare.work import Work
from bncli.recipe.load import load
from bncli.results.compare import Comparison, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import to_plain
from bncli.results.train import Evaluation, RunResult
from tests.measure.compare.conftest import ARMS, BASE, StudyOf, result

EVERY = 25  # steps between two evaluations
MOST = 1000 / 1.3
Steps = Callable[[Job], float | None]


class Trainer:
    """An executor that makes steps with all runs in progress, `at_once` of them, and gives up what it is told to."""

    def __init__(self, steps: Steps, at_once: int, obeys: bool = True) -> None:
        self.steps, self.at_once, self.obeys = steps, at_once, obeys
        self.trained, self.given_up = 0, set[str]()

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | RunProgressed | Ended | None]:
        step: dict[str, int] = {}
        while (work.more or step) and not stop():
            while len(step) < self.at_once and (jobs := work.take(workers=10**9)):
                for job in jobs:
                    step[job.key] = 0
                    yield Started(0, job)
            for job in list(work.running.values()):
                step[job.key] += EVERY
                self.trained += EVERY
                steps, at = self.steps(job), step[job.key]
                if at >= min(1000, 1.3 * (steps or math.inf)):
                    yield self.ended(step, job, result(steps, every=EVERY))
                elif job.key in self.given_up:
                    yield self.ended(step, job, partly(at))
            below = {key: float(min(step[key], self.steps(job) or math.inf)) for key, job in work.running.items()}
            yield RunProgressed(0, max(step.values(), default=0), None, below)

    def ended(self, step: dict[str, int], job: Job, found: RunResult) -> Ended:
        del step[job.key]
        return Ended(0, job, to_plain(found))

    def give_up(self, keys: Collection[str]) -> None:
        self.given_up |= set(keys) if self.obeys else set()

    def close(self) -> None:
        pass


def partly(step: int) -> RunResult:
    """A run that was given up, below its target all the time."""
    evaluations = tuple(Evaluation(at, 0.1, 2.3, None) for at in range(0, step + 1, EVERY))
    return replace(result(None), status="given up", steps_run=step, evaluations=evaluations)


@pytest.fixture(autouse=True, scope="module")
def _looked_after_every_event() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "RACE_EVERY_S", 0.0)
        patch.setattr(run, "RACE_REST", 0)
        yield


def carried_out(
    asked: Study, executor: Trainer, records: dict[str, RunRecord] | None = None, **arguments: Any
) -> dict[str, RunRecord]:
    records = {} if records is None else records
    events = execute(asked, lambda record: None, executor, records, **arguments)
    *_, last = (event for event in events if isinstance(event, RunEnded))
    assert last.done == last.planned
    return records


def report(asked: Study, records: dict[str, RunRecord]) -> Comparison:
    return summarise(asked.plan, collect(asked, records), named_runs(asked, records).planned)


def without_tuning(found: Comparison) -> list[Any]:
    return [replace(arm, tuning=()) for arm in found.arms]


def full(asked: Study) -> Study:
    return replace(asked, plan=replace(asked.plan, full_grid=True))


RATES = {0.1: 500.0, 1.0: 60.0, 10.0: None}


def by_rate(job: Job) -> float | None:
    steps = RATES[job.point["optimizer.lr"]]
    return steps and steps * math.exp(random.Random(f"{job.point} {job.seed}").gauss(0, 0.05))


@pytest.mark.parametrize("at_once", [18, 2])
def test_a_raced_comparison_has_the_rows_of_a_full_one_from_fewer_steps(asked: Study, at_once: int) -> None:
    raced, whole = Trainer(by_rate, at_once), Trainer(by_rate, at_once)
    records = carried_out(asked, raced)
    found, complete = report(asked, records), report(full(asked), carried_out(full(asked), whole))
    assert without_tuning(found) == without_tuning(complete)
    assert raced.trained < 0.85 * whole.trained
    assert any(one.given_up for one in records.values())
    assert {note.kind for note in found.notes} == {note.kind for note in complete.notes}
    slow, best, _ = found.arms[0].tuning
    assert slow.stopped_at is not None
    assert (best.stopped_at, best.runs, best.kept) == (None, 3, True)
    assert found.planned_runs == len(found.runs) <= complete.planned_runs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Study]:
    """Studies of five points of the grid, by their tuning seeds."""
    made = {}
    for seeds in (3, 5):
        file = tmp_path_factory.mktemp("wide") / "wide.yaml"
        arms = ARMS.replace("[0.1, 1, 10]", "[0.1, 0.3, 1, 3, 10]").replace("report: 5", "report: 2")
        file.write_text(BASE + arms.replace("tune: 3", f"tune: {seeds}"))
        made[seeds] = study([load(str(file))])
    return made


def scattered(seed: int) -> Steps:
    """Steps of made-up arms: points far apart or nearly equal, with little or much scatter, and some misses."""
    of = random.Random(seed)
    spread, scatter, misses = of.choice([0.0, 0.3, 1.0, 2.0]), of.choice([0.0, 0.01, 0.2, 0.8]), of.choice([0, 0, 0.3])
    centres = [of.gauss(4.5, spread) for _ in range(20)]

    def steps(job: Job) -> float | None:
        draw = random.Random(f"{seed} {job.arm} {job.point} {job.seed}")
        centre = centres[hash((job.arm == "plain", job.point["optimizer.lr"])) % 20]
        found = max(1.0, math.exp(centre + draw.gauss(0, scatter)))
        return None if found > MOST or draw.random() < misses else found

    return steps


def check_whole_rule(wide: dict[int, Study], seeds: int, at_once: int, table: int, obeys: bool) -> None:
    asked, steps = wide[seeds], scattered(table)
    found = report(asked, carried_out(asked, Trainer(steps, at_once, obeys)))
    complete = report(full(asked), carried_out(full(asked), Trainer(steps, 10**6)))
    assert without_tuning(found) == without_tuning(complete)
    given_up = [[each.stopped_at is not None or each.runs < seeds for each in arm.tuning] for arm in found.arms]
    for arm, other, stopped in zip(found.arms, complete.arms, given_up, strict=True):
        for mine, its, out in zip(arm.tuning, other.tuning, stopped, strict=True):
            assert mine == its or (out and not its.kept)


TABLES: dict[str, Any] = {
    "seeds": st.sampled_from([3, 5]), "at_once": st.sampled_from([1, 2, 5, 1000]), "table": st.integers(0, 10**6),
    "obeys": st.booleans(),
}  # fmt: skip


@settings(max_examples=3, deadline=None)
@given(**TABLES)
def test_rows_intervals_and_choices_are_those_of_the_complete_table(wide: dict[int, Study], **drawn: Any) -> None:
    check_whole_rule(wide, **drawn)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**TABLES)
def test_the_same_for_many_tables(wide: dict[int, Study], **drawn: Any) -> None:
    check_whole_rule(wide, **drawn)


@settings(max_examples=60, deadline=None)
@given(table=st.integers(0, 10**9), seeds=st.integers(2, 5), points=st.integers(2, 5))
def test_no_point_that_is_out_is_kept_by_any_values_in_the_bounds(
    wide: dict[int, Study], table: int, seeds: int, points: int
) -> None:
    """With values anywhere between the bounds, at their ends, and next to what decides."""
    of, plan = random.Random(table), wide[3].plan
    steps_of = [[of.choice([None, 1.0, 20.0, 21.0, 400.0, 700.0, MOST]) for _ in range(seeds)] for _ in range(points)]
    runs: Any = [
        [ended(steps) if of.random() < 0.6 else of.choice([0.0, 0.5, 1.0]) * (steps or 1000.0) for steps in row]
        for row in steps_of
    ]
    out = points_out(plan, runs)
    for _ in range(20):
        values = [[each if isinstance(each, RunRecord) else between(of, each) for each in row] for row in runs]
        logs, hit = np.empty((points, seeds)), np.empty((points, seeds), bool)
        for row, column in np.ndindex(points, seeds):
            each = values[row][column]
            steps = each.result.steps_to_target if isinstance(each, RunRecord) else each
            hit[row, column], logs[row, column] = steps is not None, math.log(steps or MOST)
        assert not (stats.kept_points(logs, hit) & np.array(out)).any()


def between(of: random.Random, below: float) -> float | None:
    """Steps that a run may come to which was below its target so long."""
    if below > MOST:
        return None
    return of.choice([None, max(1.0, below), MOST, max(1.0, below) * (MOST / max(1.0, below)) ** of.random()])


def ended(steps: float | None) -> RunRecord:
    return RunRecord("", "plain", {}, 0, "tune", replace(result(1.0), steps_to_target=steps))


def kept_after(asked: Study, *rows: list[RunRecord | float]) -> list[bool]:
    return points_out(asked.plan, list(rows))


def test_a_point_is_out_just_where_no_end_of_its_open_runs_brings_it_back(asked: Study) -> None:
    best = [ended(100.0), ended(100.0), ended(100.0)]
    for below, out in ((0.0, False), (150.0, False), (350.0, True)):
        assert kept_after(asked, best, [ended(600.0), ended(600.0), below]) == [False, out]
    # One run that misses makes the difference uncertain, so that the rule keeps the point.
    assert kept_after(asked, best, [ended(150.0), ended(150.0), 140.0]) == [False, False]
    assert stats.kept_points(np.log([[100.0] * 3, [150.0, 150.0, MOST]]), np.ones((2, 3), bool)).tolist() == [True] * 2


def test_a_point_is_out_once_none_of_its_runs_can_hit_and_another_point_has_a_hit(asked: Study) -> None:
    lost: list[RunRecord | float] = [800.0, 900.0, 770.0]
    assert kept_after(asked, [ended(760.0), 5.0, 5.0], lost) == [False, True]
    assert kept_after(asked, [5.0, 5.0, 5.0], lost) == [False, False]  # then the best metric would decide
    assert kept_after(asked, [ended(760.0), 5.0, 5.0], [800.0, 900.0, 760.0]) == [False, False]


@pytest.mark.parametrize(
    "odd",
    [
        RunRecord("", "plain", {}, 0, "tune", None, "it died"),
        RunRecord("", "plain", {}, 0, "tune", result(None, "interrupted")),
        RunRecord("", "plain", {}, 0, "tune", result(0.0)),
    ],
    ids=["failed", "interrupted", "held before training"],
)
def test_nothing_is_out_in_an_arm_with_an_unusual_run(asked: Study, odd: RunRecord) -> None:
    best: list[RunRecord | float] = [ended(100.0)] * 3
    assert kept_after(asked, best, [ended(600.0)] * 3, [900.0] * 3) == [False, True, True]
    assert kept_after(asked, best, [ended(600.0)] * 3, [900.0, 900.0, odd]) == [False] * 3
    assert points_out(replace(asked.plan, full_grid=True), [best, [900.0] * 3]) == [False] * 2


def test_what_was_given_up_is_trained_again_where_the_rule_no_longer_leaves_it_out(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS)
    records = carried_out(asked, Trainer(by_rate, 18))
    given_up = {key for key, one in records.items() if one.given_up}
    assert named_runs(asked, records).to_do == []
    assert {job.key for job in named_runs(full(asked), records).to_do} == given_up
    lost = next(one for one in records.values() if one.arm == "plain" and one.phase == "tune" and not one.given_up)
    records[lost.key] = replace(lost, result=None, failure="it died")
    again = [job for job in named_runs(asked, records).to_do if job.key in given_up]
    assert {job.key for job in again} == {key for key in given_up if records[key].arm == "plain"}
    earlier = dict(records)
    whole = carried_out(full(asked), Trainer(by_rate, 18), records, find=lambda keys: earlier)
    assert not any(one.given_up for one in whole.values())
