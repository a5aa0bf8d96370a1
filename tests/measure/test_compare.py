"""From recipes to runs, and from runs' records to the table's figures."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bncli.errors import RecipeError
from bncli.measure.compare import Job, Study, best_point, collect, planned_runs, study, summarise, wanted
from bncli.recipe.file import load
from bncli.results import Environment, Evaluation, RunRecord, RunResult, Status, Target

BASE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 200, held_out: 50}
model: {kind: mlp, hidden: [8]}
optimizer: {kind: sgd, lr: 1.0}
train: {steps: 1000, batch_size: 20, evaluate_every: 5, target: {value: 0.9}, seed: 7}
"""
ARMS = """
arms:
  plain:
  normed: {norm: batch}
grid: {optimizer.lr: [0.1, 1, 10]}
seeds: {tune: 3, report: 5}
"""

HERE = Environment("0", "3", "2", "Linux", "a processor", "cpu", None, 1, "2026-01-01T00:00:00+00:00")


def study_of(folder: Path, text: str, *more: str, sets: Sequence[str] = ()) -> Study:
    loaded = []
    for number, content in enumerate((text, *more)):
        file = folder / f"recipe{number}.yaml"
        file.write_text(content)
        loaded.append(load(str(file), sets))
    return study(loaded)


def result(steps: float | None, status: Status | None = None, best: float = 0.95, processor: str = "a") -> RunResult:
    status = status or ("budget" if steps is None else "reached")
    run = math.ceil(steps or 1000)
    evaluations = (Evaluation(0, 0.1, 2.3, None), Evaluation(run, best, 0.2, 0.2))
    return RunResult(
        status, run, 1000, Target("accuracy", 0.9), steps, None if steps is None else run, best, best, evaluations,
        1.0, 60_000.0, 1.0, 0.1, 300.0, 99, replace(HERE, processor=processor),
    )  # fmt: skip


def record(job: Job, steps: float | None, **changes: Any) -> RunRecord:
    return RunRecord(job.key, job.arm, job.point, job.seed, job.phase, result(steps, **changes))


def carried_out(asked: Study, steps: Any) -> list[RunRecord]:
    """Every run of a study done, `steps(job)` giving its steps to target."""
    records: dict[str, RunRecord] = {}
    while to_do := [job for job in wanted(asked, records) if job.key not in records]:
        records.update({job.key: record(job, steps(job)) for job in to_do})
    return collect(asked, records)


# --- planning -----------------------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_grid_and_the_same_seeds_and_the_report_gets_fresh_ones(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    assert asked.plan.tune_seeds == (7, 8, 9)
    assert asked.plan.report_seeds == (10, 11, 12, 13, 14)
    jobs = wanted(asked, {})
    for arm in ("plain", "normed"):
        mine = [(job.point["optimizer.lr"], job.seed) for job in jobs if job.arm == arm]
        assert sorted(mine) == [(lr, seed) for lr in (0.1, 1, 10) for seed in (7, 8, 9)]
    assert planned_runs(asked) == 2 * 3 * 3 + 2 * 5


def test_report_runs_are_named_once_an_arm_is_tuned_and_not_before(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    tuning = [job for job in wanted(asked, {}) if job.arm == "plain"]
    records = {job.key: record(job, 100 * job.point["optimizer.lr"]) for job in tuning[:-1]}
    assert {job.phase for job in wanted(asked, records)} == {"tune"}
    records[tuning[-1].key] = record(tuning[-1], 5000)
    report = [job for job in wanted(asked, records) if job.phase == "report"]
    assert [(job.arm, job.point["optimizer.lr"], job.seed) for job in report] == [
        ("plain", 0.1, s) for s in range(10, 15)
    ]


def test_an_arm_that_fixes_a_field_of_the_grid_is_not_tuned_in_it(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("normed:", "slow: {optimizer: {lr: 0.01}}\n  normed:"))
    slow = [job for job in wanted(asked, {}) if job.arm == "slow"]
    assert {job.phase for job in slow} == {"report"}
    assert {job.point["optimizer.lr"] for job in slow} == {0.01}
    assert {job.recipe.optimizer.lr for job in slow} == {0.01}
    assert asked.plan.fixed["slow"] == ("optimizer.lr",)


def test_several_grid_fields_make_every_combination(tmp_path: Path) -> None:
    grid = ARMS.replace("[0.1, 1, 10]}", "[0.1, 1], train.batch_size: [10, 20]}")
    jobs = [job for job in wanted(study_of(tmp_path, BASE + grid), {}) if job.arm == "plain"]
    assert len({tuple(job.point.values()) for job in jobs}) == 4


def test_without_a_grid_nothing_is_tuned(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 4}")
    assert {job.phase for job in wanted(asked, {})} == {"report"}
    assert planned_runs(asked) == 8


def test_a_key_depends_on_the_recipe_and_the_identity_and_not_on_the_arms_name(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    renamed = study_of(tmp_path, BASE + ARMS.replace("normed", "other name"))
    assert [job.key for job in wanted(asked, {})] == [job.key for job in wanted(renamed, {})]
    elsewhere = replace(asked, identity={"torch": "another"}, _jobs={})
    assert not {job.key for job in wanted(asked, {})} & {job.key for job in wanted(elsewhere, {})}


def test_data_or_code_that_changed_on_disk_make_new_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", x=np.zeros((40, 8), np.float32), y=np.arange(40) % 3)
    Path("net.py").write_text("def make(shape, classes, norm): ...")
    base = BASE[BASE.index("optimizer") :].replace("batch_size: 20", "batch_size: 10") + ARMS
    data = "data: {source: npz, path: mine.npz, held_out: 5}\n"
    own = f"{data}model: {{kind: module, module: 'net:make'}}\n{base}"
    (tmp_path / "own.yaml").write_text(own)

    def keys() -> set[str]:
        return {job.key for job in wanted(study([load("own.yaml", allow_code=True)]), {})}

    before = keys()
    assert keys() == before
    Path("net.py").write_text("def make(shape, classes, norm): return None")
    edited = keys()
    assert not edited & before
    np.savez("mine.npz", x=np.ones((41, 8), np.float32), y=np.arange(41) % 3)
    assert not keys() & edited


def test_an_added_arm_costs_only_its_own_runs(tmp_path: Path) -> None:
    before = carried_out(study_of(tmp_path, BASE + ARMS), lambda job: 100.0)
    records = {one.key: one for one in before}
    more = study_of(tmp_path, BASE + ARMS.replace("normed:", "layer: {norm: layer}\n  normed:"))
    assert {job.arm for job in wanted(more, records) if job.key not in records} == {"layer"}


def test_recipes_without_arms_are_arms_of_their_files_names(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE, BASE + "norm: batch")
    assert asked.plan.arms == ("recipe0", "recipe1")
    assert asked.plan.reference == "recipe0"


def test_arms_of_two_files_that_share_a_name_get_their_files_name(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS, BASE + ARMS.replace("normed", "layered").replace("batch}", "layer}"))
    assert asked.plan.arms == ("recipe0 plain", "normed", "recipe1 plain", "layered")
    assert asked.plan.reference == "recipe0 plain"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([BASE], "has no arms; a comparison needs two: add one under arms, or name another recipe"),
        ([BASE + "arms: {one: {}}"], "has one arm; a comparison needs two"),
        ([BASE.replace("target: {value: 0.9}, ", ""), BASE.replace("target: {value: 0.9}, ", "")],
         "train.target is missing; a comparison counts the steps to it"),
        ([BASE, BASE.replace("0.9", "0.8")], "arm recipe1: train.target differs from arm recipe0's"),
        ([BASE, BASE.replace("steps: 1000", "steps: 500")], "arm recipe1: train.steps differs"),
        ([BASE, BASE.replace("classes: 3", "classes: 4")], "arm recipe1: data differs"),
        ([BASE, BASE + "seeds: {report: 2}"], "seeds differs from .*; every arm gets the same seeds"),
        ([BASE + "arms: {a: {}, b: {train: {steps: 10}}}"], "arm b: train.steps differs from arm a's"),
        ([BASE + f"arms: {{a: {{}}, b: {{}}}}\ngrid: {{optimizer.lr: {[n / 100 for n in range(1, 101)]}, "
          f"train.batch_size: {list(range(2, 102))}}}"],
         "2 arms at 10,000 points of the grid make 60,020 runs; a comparison has at most 20,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        study_of(tmp_path, *texts)


# --- choosing -----------------------------------------------------------------------------------------------------


def tuning(
    asked: Study, steps: dict[float, list[float | None]], best: dict[float, float] | None = None
) -> list[RunRecord]:
    jobs = [job for job in wanted(asked, {}) if job.arm == "plain"]
    found = []
    for job in jobs:
        lr = job.point["optimizer.lr"]
        found.append(record(job, steps[lr][job.seed - 7], best=(best or {}).get(lr, 0.95)))
    return found


def test_the_best_point_has_the_most_hits_before_the_fewest_steps(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = tuning(asked, {0.1: [900, 900, 900], 1: [500, 400, 450], 10: [50, 50, None]})
    assert best_point(asked.plan, found) == {"optimizer.lr": 1}


def test_steps_are_averaged_geometrically(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = tuning(asked, {0.1: [10, 10, 800], 1: [100, 100, 100], 10: [900, 900, 900]})
    assert best_point(asked.plan, found) == {
        "optimizer.lr": 0.1
    }  # 43 against 100; the arithmetic means are 273 and 100


def test_without_a_hit_the_best_metric_decides(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    never: list[float | None] = [None, None, None]
    assert best_point(asked.plan, tuning(asked, {0.1: never, 1: never, 10: never}, {0.1: 0.3, 1: 0.5, 10: 0.8})) == {
        "optimizer.lr": 10
    }


# --- summing up ---------------------------------------------------------------------------------------------------


def by_arm_and_rate(plain: dict[float, float], normed: dict[float, float], spread: float = 0.1) -> Any:
    def steps(job: Job) -> float:
        centre = (plain if job.arm == "plain" else normed)[job.point["optimizer.lr"]]
        return centre * math.exp(random.Random(job.key).gauss(0, spread))

    return steps


def test_the_ratio_is_reference_steps_over_the_arms_at_each_ones_best_rate(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, by_arm_and_rate({0.1: 900, 1: 700, 10: 800}, {0.1: 90, 1: 70, 10: 80}, 1e-9))
    comparison = summarise(asked.plan, found, planned_runs(asked))
    plain, normed = comparison.arms
    assert plain.ratio is None
    assert normed.ratio is not None
    assert normed.ratio.value == pytest.approx(10)
    assert (plain.hits, plain.runs, plain.steps.value) == (5, 5, pytest.approx(700))
    assert plain.point == {"optimizer.lr": 1}
    assert len(normed.tuning) == 3
    assert comparison.planned_runs == len(comparison.runs) == 28


def test_the_summary_is_the_same_whatever_the_order_of_the_records(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, by_arm_and_rate({0.1: 900, 1: 700, 10: 800}, {0.1: 90, 1: 70, 10: 80}))
    shuffled = random.Random(0).sample(found, len(found))
    one, other = (summarise(asked.plan, runs, 28) for runs in (found, shuffled))
    assert one == other


@pytest.mark.parametrize(("best", "word"), [(0.1, "smaller"), (10, "larger")])
def test_a_best_value_at_the_edge_of_the_grid_is_always_warned_of(tmp_path: Path, best: float, word: str) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    rates = {lr: 100.0 if lr == best else 500.0 for lr in (0.1, 1, 10)}
    comparison = summarise(asked.plan, carried_out(asked, by_arm_and_rate(rates, rates)), 28)
    for arm in comparison.arms:
        assert arm.at_edge == ("optimizer.lr",)
        expected = f"{arm.arm}: the best optimizer.lr, {best:g}, is at the edge of the grid; add {word} values"
        assert expected in comparison.notes


def test_a_best_value_inside_the_grid_is_not_warned_of(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    rates = {0.1: 500.0, 1: 100.0, 10: 500.0}
    comparison = summarise(asked.plan, carried_out(asked, by_arm_and_rate(rates, rates)), 28)
    assert not any("edge" in note for note in comparison.notes)


def test_an_arm_that_never_hits_says_so_instead_of_naming_an_edge(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, lambda job: None if job.arm == "plain" else 100.0)
    comparison = summarise(asked.plan, found, 28)
    assert "plain: no value of the grid reached the target in 1,000 steps" in comparison.notes
    assert comparison.arms[0].at_edge == ()
    ratio = comparison.arms[1].ratio
    assert ratio is not None
    assert (ratio.value, ratio.method) == (None, "bound")
    assert ratio.interval.low == pytest.approx(10, rel=0.01)


def test_too_coarse_evaluations_are_said_with_what_to_set(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summarise(asked.plan, carried_out(asked, lambda job: 500.0 if job.arm == "plain" else 30.0), 28)
    assert (
        "normed: fewer than 10 evaluations before its target; set train.evaluate_every to 3 or less" in comparison.notes
    )
    assert not any(note.startswith("plain: fewer") for note in comparison.notes)


def test_too_few_seeds_are_said_with_how_many_would_do(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("report: 5", "report: 3"))
    comparison = summarise(
        asked.plan, carried_out(asked, by_arm_and_rate({0.1: 9, 1: 7, 10: 8}, {0.1: 9, 1: 7, 10: 8}, 0.4)), 24
    )
    assert any(
        note.startswith("3 seeds an arm are few: at the spread seen here a ratio of 1.5 needs ")
        for note in comparison.notes
    )


def test_a_target_that_is_held_before_the_first_step_is_said(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summarise(asked.plan, carried_out(asked, lambda job: 0.0), 28)
    assert "plain: it has reached the target before the first step; choose a harder one" in comparison.notes
    mixed = tuning(asked, {0.1: [50.0, 60.0, 55.0], 1: [0.0, 2.0, 1.0], 10: [None, None, None]})
    assert best_point(asked.plan, mixed) == {"optimizer.lr": 1}


def test_no_best_value_is_named_before_the_tuning_is_complete(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    begun = [record(job, 100.0) for job in wanted(asked, {})[:4]]
    assert summarise(asked.plan, begun, 28).arms[0].point == {}


def test_arms_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    same = {0.1: 900.0, 1: 700.0, 10: 800.0}
    comparison = summarise(asked.plan, carried_out(asked, by_arm_and_rate(same, same)), 28)
    assert "not told apart from plain at 5 %: normed" in comparison.notes


def test_diverged_runs_are_misses_and_are_counted(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = [
        replace(one, result=result(None, "diverged")) if one.arm == "normed" and one.seed == 10 else one
        for one in carried_out(asked, lambda job: 100.0)
    ]
    comparison = summarise(asked.plan, found, 28)
    assert (comparison.arms[1].hits, comparison.arms[1].runs, comparison.arms[1].diverged) == (4, 5, 1)
    assert "normed: 1 of 5 runs diverged and count as misses" in comparison.notes


def test_failed_runs_are_named_and_not_counted_as_misses(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = [
        replace(one, result=None, failure="its worker process was killed by SIGKILL") if one.seed == 11 else one
        for one in carried_out(asked, lambda job: 100.0)
    ]
    comparison = summarise(asked.plan, found, 28)
    assert comparison.arms[0].runs == 4
    assert comparison.arms[0].failures == ("seed 11: its worker process was killed by SIGKILL",)
    assert "26 of 28 runs are done, 2 failed; the figures rest on those" in comparison.notes


def test_a_comparison_that_has_only_begun_has_rows_without_figures(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summarise(asked.plan, [], 28)
    assert [arm.steps.value for arm in comparison.arms] == [None, None]
    assert comparison.notes[0] == "0 of 28 runs are done; the figures rest on those"


def test_runs_of_different_machines_are_said(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, lambda job: 100.0)
    found[0] = replace(found[0], result=result(100.0, processor="another"))
    assert any("different machines" in note for note in summarise(asked.plan, found, 28).notes)


def test_the_curve_is_the_median_of_runs_and_a_stopped_run_keeps_its_last_value(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("report: 5", "report: 3"))
    found = carried_out(asked, lambda job: {10: 100.0, 11: 200.0, 12: 300.0}.get(job.seed, 50.0))
    curve = summarise(asked.plan, found, 24).arms[0].curve
    assert [(step, middle) for step, middle, _, _ in curve] == [(0, 0.1), (100, 0.1), (200, 0.95), (300, 0.95)]


# --- tuning does not flatter --------------------------------------------------------------------------------------


def test_equal_grids_and_fresh_seeds_leave_the_ratio_of_equal_arms_at_one(tmp_path: Path) -> None:
    """Two arms of one distribution (A/A), 300 times: the mean log ratio is 0 within 0.01 (its standard error 0.004)."""
    asked = study_of(tmp_path, BASE + ARMS.replace("[0.1, 1, 10]", "[0.1, 0.3, 1, 3, 10]"))
    logs, chosen = [], []
    for repeat in range(300):
        draw = random.Random(repeat)
        jobs = {job.key: draw.lognormvariate(5, 0.1) for arm in asked.arms for phase in ("tune", "report")
                for job in asked.jobs(arm, phase, asked.points(arm))}  # type: ignore[arg-type]  # fmt: skip
        found = carried_out(asked, lambda job, jobs=jobs: jobs[job.key])
        report = {arm: [one.result.steps_to_target for one in found if one.arm == arm and one.phase == "report"]
                  for arm in asked.plan.arms}  # type: ignore[union-attr]  # fmt: skip
        tune = [one.result.steps_to_target for one in found if one.arm == "plain" and one.phase == "tune"]  # type: ignore[union-attr]
        logs.append(sum(map(math.log, report["plain"])) / 5 - sum(map(math.log, report["normed"])) / 5)  # type: ignore[arg-type]
        best = min(math.exp(sum(map(math.log, tune[k : k + 3])) / 3) for k in range(0, 15, 3))  # type: ignore[arg-type]
        chosen.append(math.log(best) - 5)
    assert abs(sum(logs) / len(logs)) < 0.01
    assert sum(chosen) / len(chosen) < -0.05  # the tuning seeds themselves would have read several per cent too few
