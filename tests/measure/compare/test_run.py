"""A study carried out: what is done already is left out, what ends is kept at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from bncli.errors import Refused
from bncli.measure.compare import plan
from bncli.measure.compare.plan import Job, Study, collect, named_runs
from bncli.measure.compare.processes import Processes
from bncli.measure.compare.run import Ended, Started, check, execute
from bncli.measure.compare.summary import summarise
from bncli.measure.compare.work import Work
from bncli.report.compare.notes import sentences
from bncli.results.compare import ComparisonStarted, RunBegan, RunEnded, RunProgressed, RunRecord
from bncli.results.serialize import to_plain
from bncli.results.train import RunResult
from tests.measure.compare.conftest import ARMS, BASE, UNTUNED, StudyOf, result


class Serial:
    """An executor that answers every run at once, with its steps to target or the reason of its failure."""

    def __init__(self, answer: Callable[[Job], float | str | None] = lambda job: 100.0) -> None:
        self.answer, self.ran = answer, list[str]()
        self.result: Callable[[float | None], RunResult] = result

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | RunProgressed | Ended | None]:
        while work.more and not stop():
            if not (jobs := work.take(workers=10**9)):
                yield None
                continue
            (job,) = jobs
            self.ran.append(job.key)
            yield Started(0, job)
            yield None
            yield RunProgressed(0, 5, 0.5)
            steps = self.answer(job)
            yield Ended(0, job, None, steps) if isinstance(steps, str) else Ended(0, job, to_plain(self.result(steps)))

    def give_up(self, keys: Collection[str]) -> None:
        pass

    def close(self) -> None:
        pass


class Kept(dict[str, RunRecord]):
    """A store in memory."""

    def save(self, record: RunRecord) -> None:
        self[record.key] = record


def carry_out(asked: Study, store: Kept, executor: Serial, **arguments: Any) -> tuple[list[Any], dict[str, RunRecord]]:
    """The events, and the records after them; runs that failed before are tried again, as in a new call."""
    records = {key: record for key, record in store.items() if record.result is not None}
    return list(execute(asked, store.save, executor, records, **arguments)), records


def test_every_planned_run_is_done_and_kept_as_it_ends(asked: Study) -> None:
    store = Kept()
    events, records = carry_out(asked, store, Serial())
    assert records == store
    assert len(records) == 50
    assert events[0] == ComparisonStarted("recipe0", 28, 0, "accuracy")
    assert [type(event) for event in events[1:4]] == [RunBegan, RunProgressed, RunEnded]
    assert events[1].label == "plain, lr 1, seed 7"  # from the middle of the grid outwards
    planned = [event.planned for event in events if isinstance(event, RunEnded)]
    assert planned == sorted(planned)  # 28, and more with each arm that keeps all three of its points
    assert (planned[0], planned[-1]) == (28, 50)  # with a run for each arm that measures what a step costs
    assert (events[-1].done, events[-1].record.result) == (50, result(100.0))


def test_a_second_call_repeats_no_run(asked: Study) -> None:
    store, executor = Kept(), Serial()
    carry_out(asked, store, Serial())
    events, records = carry_out(asked, store, executor)
    assert executor.ran == []
    assert events == [ComparisonStarted("recipe0", 50, 50, "accuracy")]
    assert len(records) == 50


def test_a_failed_run_is_kept_with_its_reason_and_tried_once_in_each_call(study_of: StudyOf) -> None:
    store, asked, executor = Kept(), study_of(BASE + UNTUNED.replace("5", "4")), Serial(lambda job: "it died")
    events, records = carry_out(asked, store, executor)
    assert len(executor.ran) == len(set(executor.ran)) == 8 + 2
    assert {record.failure for record in records.values()} == {"it died"}
    assert (events[-1].record.result, events[-1].record.failure) == (None, "it died")
    executor = Serial(lambda job: None)
    events, _ = carry_out(asked, store, executor)
    assert len(executor.ran) == 8 + 2
    assert events[-1].record.result == result(None)


def test_stop_leaves_the_rest_for_later(asked: Study) -> None:
    store, executor = Kept(), Serial()
    carry_out(asked, store, Serial(), stop=lambda: len(store) >= 5)
    assert len(store) == 5
    carry_out(asked, store, executor)
    assert len(executor.ran) == 45


def test_runs_that_arms_share_are_done_and_counted_once(study_of: StudyOf) -> None:
    store, executor = Kept(), Serial()
    asked = study_of(BASE + ARMS.replace("normed:", "again:\n  normed:"))
    events, _ = carry_out(asked, store, executor)
    assert len(executor.ran) == 50
    assert events[0] == ComparisonStarted("recipe0", 28, 0, "accuracy")
    assert (events[-1].done, events[-1].planned) == (50, 50)
    events, _ = carry_out(asked, store, executor)
    assert events == [ComparisonStarted("recipe0", 50, 50, "accuracy")]
    found = summarise(asked.plan, collect(asked, store), named_runs(asked, store).planned)
    assert [arm.runs for arm in found.arms] == [8, 8, 8]
    assert not any("runs are done" in note for note in sentences(found.notes))


@pytest.mark.parametrize(("best", "runs"), [(0.1, 36), (1, 30)])
def test_runs_shared_with_a_point_of_another_arms_grid_are_planned_once(
    study_of: StudyOf, best: float, runs: int
) -> None:
    asked = study_of(BASE + ARMS.replace("normed:", "fixed: {optimizer: {lr: 1}}\n  normed:"))
    executor = Serial(lambda job: 100.0 if job.point["optimizer.lr"] == best else 200.0)
    events, _ = carry_out(asked, Kept(), executor)
    assert (events[0].planned, events[-1].done, events[-1].planned, len(executor.ran)) == (33, runs, runs, runs)


@pytest.mark.parametrize("seeds", [5, 25])
def test_the_study_is_asked_no_more_often_than_arms_are_tuned(
    study_of: StudyOf, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    """However many runs are open: asking takes as long as they are many."""
    asked: list[int] = []
    monkeypatch.setattr(plan, "named_runs", lambda *given: asked.append(1) or named_runs(*given))  # type: ignore[func-returns-value]
    executor = Serial()
    carry_out(study_of(BASE + ARMS.replace("report: 5", f"report: {seeds}")), Kept(), executor)
    assert len(set(executor.ran)) == len(executor.ran) == 18 + 2 * 3 * seeds + 2
    assert len(asked) == 5  # at the beginning, then for each arm once it is tuned and once it is through


# --- the search for the largest learning rate -------------------------------------------------------------------------

SEARCHED = """
largest_learning_rate: {steps: 300, accuracy: 0.8}
claims:
  - {say: it trains at higher rates, measure: largest_learning_rate, arm: normed, over: plain, at_least: 3}
"""


class Trained(Serial):
    """Runs reach their target up to a rate: `limit`, a tenth of it in the plain arm, some more for some seeds."""

    def __init__(self, limit: float = 100.0) -> None:
        super().__init__(lambda job: self.steps(job))
        self.limit = limit
        self.result = lambda steps: result(steps, best=0.1 if steps is None else 0.95)

    def steps(self, job: Job) -> float | None:
        limit = self.limit * 1.1 ** (job.seed % 3) * (0.1 if job.arm == "plain" else 1)
        return 100.0 if job.recipe.optimizer.lr <= limit else None


def test_the_largest_rate_of_each_arm_and_seed_is_searched_by_runs_that_are_kept(
    asked: Study, study_of: StudyOf
) -> None:
    store, study = Kept(), study_of(BASE + ARMS + SEARCHED)
    events, records = carry_out(study, store, Trained())
    found = collect(study, records)
    searches = [record for record in found if record.phase == "rate"]
    assert {(record.arm, record.seed) for record in searches} == {
        (arm, seed) for arm in study.plan.arms for seed in study.plan.report_seeds
    }
    assert (events[-1].done, events[-1].planned) == (len(records), len(records))
    report = summarise(study.plan, found, named_runs(study, records).planned)
    (claim,) = report.claims
    assert claim.value == pytest.approx(10, rel=0.2)
    assert claim.verdict == "shown"
    assert not any("runs are done" in note for note in sentences(report.notes))
    without = summarise(asked.plan, collect(asked, records), named_runs(asked, records).planned)
    assert report.arms == without.arms  # the table is of the other runs alone


def test_a_search_runs_to_the_end_of_its_own_budget_without_probes(study_of: StudyOf) -> None:
    study = study_of(BASE + "probes: {measure: all}" + ARMS + SEARCHED)
    jobs: list[Job] = []
    executor = Trained()
    steps = executor.steps
    executor.answer = lambda job: jobs.append(job) or steps(job)  # type: ignore[func-returns-value]
    carry_out(study, Kept(), executor)
    of = {phase: [job.recipe for job in jobs if job.phase == phase] for phase in ("tune", "report", "rate")}
    assert {(recipe.train.steps, recipe.train.stop_at_target) for recipe in of["rate"]} == {(300, False)}
    assert {recipe.train.steps for recipe in of["tune"] + of["report"]} == {1000}
    assert {phase: {recipe.probes is None for recipe in recipes} for phase, recipes in of.items()} == {
        "tune": {True}, "report": {False}, "rate": {True},
    }  # fmt: skip


def test_a_search_that_was_stopped_goes_on_where_it_was(study_of: StudyOf) -> None:
    store, study, first, second, once = Kept(), study_of(BASE + ARMS + SEARCHED), Trained(), Trained(), Trained()
    carry_out(study, Kept(), once)
    carry_out(study, store, first, stop=lambda: len(store) >= len(once.ran) - 9)
    carry_out(study, store, second)
    assert sorted(first.ran + second.ran) == sorted(once.ran)


def test_a_search_with_a_failed_run_ends_without_a_rate(study_of: StudyOf) -> None:
    study = study_of(BASE + ARMS + SEARCHED)
    executor = Trained()
    steps = executor.steps
    executor.answer = lambda job: "it died" if job.phase == "rate" and job.seed == 10 else steps(job)
    _, records = carry_out(study, Kept(), executor)
    report = summarise(study.plan, collect(study, records), named_runs(study, records).planned)
    assert (report.claims[0].seeds, report.claims[0].of_seeds) == (4, 5)
    assert any("seed 10: it died" in failure for failure in report.arms[0].failures)


@pytest.mark.parametrize(("trains", "reason"), [(True, "no rate fails"), (False, "no rate trains")])
def test_a_seed_without_a_largest_rate_leaves_the_claim_without_an_interval(
    study_of: StudyOf, trains: bool, reason: str
) -> None:
    """Left out, it would flatter the arm: the other seeds alone are those with a limit."""
    study = study_of(BASE + ARMS + SEARCHED)
    executor = Trained()
    steps = executor.steps
    executor.answer = lambda job: (100.0 if trains else None) if (job.phase, job.seed) == ("rate", 10) else steps(job)
    _, records = carry_out(study, Kept(), executor)
    (claim,) = summarise(study.plan, collect(study, records), named_runs(study, records).planned).claims
    assert (claim.verdict, claim.no_interval, claim.seeds) == ("cannot tell", reason, 4)


# --- the check before the first run -------------------------------------------------------------------------------

OWN = BASE.replace("{kind: mlp, hidden: [8]}", "{kind: module, module: 'mine:make'}")
ALIKE = "arms: {a: , b: {optimizer: {lr: 3}}, c: {norm: batch}}\ngrid: {train.batch_size: [10, 20]}\nseeds: {tune: 3}\n"


def checked(asked: Study, answer: Callable[[Job], float | str | None], dry: bool = False) -> tuple[bool, list[Job]]:
    """Whether the check tried something, and what it tried."""
    tried = list[Job]()
    executor = Serial(lambda job: tried.append(job) or answer(job))  # type: ignore[func-returns-value]
    return check(asked, named_runs(asked, {}).jobs, executor, lambda: False, lambda: None, dry), tried


def test_a_model_that_arms_and_points_have_in_common_is_tried_once_with_the_arms_probes(study_of: StudyOf) -> None:
    asked = study_of(BASE + "probes: {measure: [gradients]}\n" + ALIKE)
    found, tried = checked(asked, lambda job: 100.0)
    assert found
    assert [(job.recipe.norm.kind, job.check) for job in tried] == [("none", True), ("batch", True)]
    assert all(job.recipe.probes is not None for job in tried)


def test_the_mistakes_of_all_arms_are_told_at_once_and_common_ones_once(study_of: StudyOf) -> None:
    asked = study_of(BASE + ALIKE)
    with pytest.raises(Refused) as refused:
        checked(asked, lambda job: "it raised")
    assert (refused.value.mistakes, refused.value.exit_code) == (("arms a, b, c: it raised",), 2)
    with pytest.raises(Refused) as refused:
        checked(asked, lambda job: f"with {job.recipe.norm.kind}")
    assert refused.value.mistakes == ("arms a, b: with none", "arm c: with batch")


@pytest.mark.parametrize(
    ("text", "tries"),
    [
        (BASE, False),
        (OWN, True),
        (OWN.replace("{source: synthetic, ", "{source: hub, name: large, ").replace("[8]", "[3, 8, 8]"), False),
    ],
    ids=["built in", "own", "own on large data"],
)
def test_a_dry_run_tries_what_the_recipe_does_not_tell(study_of: StudyOf, text: str, tries: bool) -> None:
    asked = study_of(text + ALIKE)
    found, tried = checked(asked, lambda job: 100.0, dry=True)
    assert (found, bool(tried)) == (tries, tries)


COUNTING = """
from torch import nn
made = 0
def make(shape, classes, norm):
    global made
    made += 1
    model = nn.Sequential(norm(shape[0]), nn.Linear(shape[0], classes))
    nn.init.constant_(model[1].weight, 0.01 * made)
    return model
"""
KINDS = """
arms:
  own: {model: {kind: module, module: "mine:make"}, norm: batch}
  fused: {norm: {kind: batch, kernel: fused}, train: {accumulate: 2}}
seeds: {report: 2}
"""


def test_no_bit_of_any_run_depends_on_the_check_before_them(
    study_of: StudyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the code of the one arm counts in its process how often it was called."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(COUNTING)
    asked = study_of(BASE.replace("1000", "20") + KINDS)
    found = []
    for with_check in (False, True):
        store = Kept()
        with contextlib.closing(Processes("cpu", 1, 1, tmp_path)) as executor:
            assert not with_check or check(
                asked, named_runs(asked, {}).jobs, executor, lambda: False, lambda: None, False
            )
            list(execute(asked, store.save, executor, {}))
        results = [(record.arm, record.seed, record.result) for record in store.values()]
        found.append([(arm, seed, result and result.evaluations) for arm, seed, result in results])
    assert len(found[0]) == 4
    assert all(evaluations for *_, evaluations in found[0])
    assert found[0] == found[1]
