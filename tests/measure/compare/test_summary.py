"""From runs' records to the table's figures and notes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from bncli.measure.compare.plan import Job, Study, named_runs
from bncli.measure.compare.summary import summarise
from bncli.report.compare.notes import sentences
from bncli.results.compare import Comparison, RunRecord
from bncli.results.environment import Interval
from bncli.results.train import Evaluation, Target, TargetReached
from tests.measure.compare.conftest import (
    ARMS,
    BASE,
    UNTUNED,
    StudyOf,
    carried_out,
    changed,
    failed,
    record,
    result,
)


def summary(asked: Study, found: Sequence[RunRecord]) -> Comparison:
    return summarise(asked.plan, found, named_runs(asked, {one.key: one for one in found}).planned)


def notes(asked: Study, found: Sequence[RunRecord]) -> list[str]:
    return sentences(summary(asked, found).notes)


def normed(one: RunRecord) -> bool:
    return one.arm == "normed"


def by_arm_and_rate(
    plain: dict[float, float], normed: dict[float, float], spread: float = 0.1
) -> Callable[[Job], float]:
    """Steps scattered about those of each rate, the same draw for both arms at one seed and rate."""

    def steps(job: Job) -> float:
        centre = (plain if job.arm == "plain" else normed)[job.point["optimizer.lr"]]
        return centre * math.exp(random.Random(f"{job.point} {job.seed}").gauss(0, spread))

    return steps


RATES = {0.1: 600.0, 1.0: 300.0, 10.0: 500.0}
TENTH = {rate: steps / 10 for rate, steps in RATES.items()}
EQUAL = dict.fromkeys(RATES, 300.0)


# --- steps and ratios ---------------------------------------------------------------------------------------------


def test_the_ratio_is_that_of_both_arms_steps_at_their_best_rates(asked: Study) -> None:
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(RATES, {0.1: 30.0, 1.0: 70.0, 10.0: 80.0}, 1e-9)))
    plain, normed = comparison.arms
    assert plain.ratio is None
    assert (normed.ratio.value, normed.ratio.method) == (pytest.approx(10), "means")
    assert (plain.hits, plain.runs, plain.steps.value) == (8, 8, pytest.approx(300))  # tuning seeds count too
    assert (plain.point, normed.point) == ({"optimizer.lr": 1}, {"optimizer.lr": 0.1})
    assert [cell.kept for cell in plain.tuning] == [False, True, False]
    assert (plain.choice.points, plain.choice.kept, plain.choice.doubt) == (3, 1, 0)
    assert comparison.planned_runs == len(comparison.runs) == 30


def test_an_unclear_choice_tells_the_points_kept_and_how_often_others_win(asked: Study) -> None:
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(EQUAL, TENTH)))
    plain, normed = comparison.arms
    assert plain.choice.kept == 3
    assert 0 < plain.choice.doubt < 1
    assert comparison.planned_runs == len(comparison.runs) == 18 + 15 + 5 + 2
    clear = summary(asked, carried_out(asked, by_arm_and_rate(RATES, TENTH))).arms[1].ratio
    assert normed.ratio.interval.high / normed.ratio.value > clear.interval.high / clear.value


def test_the_order_of_the_records_does_not_matter(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    assert summary(asked, random.Random(0).sample(found, len(found))) == summary(asked, found)


def test_runs_that_trained_together_have_the_costs_of_the_run_that_was_made_alone(asked: Study) -> None:
    found = changed(carried_out(asked, by_arm_and_rate(RATES, TENTH)), ms_per_step=None, samples_per_s=None)
    costs: dict[str, float] = {"plain": 2.0, "normed": 3.0}
    for arm, ms in costs.items():
        found = changed(found, lambda one, arm=arm: (one.arm, one.phase) == (arm, "cost"), ms_per_step=ms)  # type: ignore[misc]
    rows = summary(asked, found).arms
    assert [row.ms_per_step for row in rows] == [2.0, 3.0]
    assert [row.seconds and row.seconds.typical.value for row in rows] == [
        pytest.approx(ms / 1e3 * (row.steps.value or 0)) for ms, row in zip(costs.values(), rows, strict=True)
    ]
    assert [row.runs for row in rows] == [8, 8]
    alone = changed(found, lambda one: one.phase == "report", ms_per_step=7.0)
    assert summary(asked, alone).arms[0].ms_per_step == 7.0
    without = [one for one in found if one.phase != "cost"]
    assert summary(asked, without).arms[0].seconds is None


def test_every_target_has_its_own_ratio(study_of: StudyOf) -> None:
    asked = study_of(BASE.replace("{value: 0.9}", "{value: 0.9, also: [0.8, 0.95]}") + ARMS)
    easier, harder = asked.plan.also
    assert (easier, harder) == (Target("accuracy", 0.8), Target("accuracy", 0.95))

    def with_targets(one: RunRecord) -> RunRecord:
        steps = one.result.steps_to_target
        first = TargetReached(easier, steps / (2 if one.arm == "plain" else 4), 5)
        last = TargetReached(harder, None if one.arm == "plain" else 2 * steps, None)
        return replace(one, result=replace(one.result, also=(first, last)))

    found = map(with_targets, carried_out(asked, by_arm_and_rate(RATES, TENTH)))
    plain, normed = summary(asked, list(found)).arms
    assert [(each.target, each.hits, each.ratio) for each in plain.also] == [(easier, 8, None), (harder, 0, None)]
    first, last = normed.also
    assert first.ratio.value == pytest.approx(20)
    assert (last.hits, last.ratio.value, last.ratio.method) == (8, None, "bound")


def test_arms_of_one_recipe_have_a_ratio_of_one_and_a_note(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS.replace("normed:", "again:\n  normed:"))
    found = carried_out(asked, lambda job: 100.0 + job.seed)
    ratio = summary(asked, found).arms[1].ratio
    assert (ratio.value, ratio.interval, ratio.method) == (1.0, Interval(1.0, 1.0), "same recipe")
    said = notes(asked, found)
    assert "again: the same recipe as plain, so the ratio is 1" in said
    assert not any("distinguishable" in note and "again" in note for note in said)


def test_a_ratio_rests_on_the_seeds_of_both_arms_at_their_best_points(asked: Study) -> None:
    """The reference's best point over all of its seeds is another than over those that the arm has too."""

    def steps(job: Job) -> float:
        rate, early = job.point["optimizer.lr"], job.seed < 12
        if job.arm == "normed":
            return 30.0 * (1 + rate)
        uneven = 40 * (job.seed % 2)  # so that three tuning seeds cannot tell 0.1 from 1
        return float({0.1: (305 if early else 200) + uneven, 1: (320 if early else 400) - uneven, 10: 600}[rate])

    found = failed(carried_out(asked, steps), lambda one: one.arm == "normed" and one.seed >= 12)
    plain, normed = summary(asked, found).arms
    assert (plain.point, plain.runs, normed.runs) == ({"optimizer.lr": 0.1}, 8, 5)
    assert normed.ratio.value == pytest.approx((305**2 * 345**3) ** 0.2 / 33)
    assert "The ratio rests on the seeds that plain has too: normed (5)" in notes(asked, found)


# --- costs --------------------------------------------------------------------------------------------------------


def test_seconds_and_examples_to_target_have_their_own_ratios(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS.replace("{norm: batch}", "{norm: batch, train: {batch_size: 40}}"))
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    plain, normed_ = summary(asked, changed(found, normed, ms_per_step=2.5)).arms
    assert plain.seconds.ratio is None
    assert plain.seconds.typical.value == pytest.approx(plain.steps.value / 1e3)
    for cost, value in ((normed_.seconds, 4), (normed_.examples, 5)):
        assert cost.ratio.value == pytest.approx(value, rel=1e-6)
        assert 0.8 * value < cost.ratio.interval.low <= value
    assert any(
        note.startswith("The arms differ in train.batch_size: plain 20, normed 40") for note in notes(asked, found)
    )
    assert summary(asked, changed(found, ms_per_step=None)).arms[1].seconds is None
    assert summarise(replace(asked.plan, recipes={}), found, 28).arms[1].examples is None


def test_seconds_with_other_threads_are_left_out_of_both_arms(asked: Study) -> None:
    seeds = {"plain": (10,), "normed": (7, 8)}
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    found = changed(found, lambda one: one.seed in seeds[one.arm], threads=4, ms_per_step=9.0)
    seconds = summarise(asked.plan, found, 28, threads=1).arms[1].seconds
    assert seconds.ratio.value == pytest.approx(10)
    assert seconds.typical.value == pytest.approx(0.03, rel=0.2)


def test_an_arm_whose_runs_waited_for_cores_is_noted(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    assert summary(asked, found).arms[0].cores_lacked is None
    found = changed(found, lambda one: one.arm == "normed", cores_lacked=0.4)
    plain, normed = summary(asked, found).arms
    assert (plain.cores_lacked, normed.cores_lacked) == (None, 0.4)
    (noted,) = [note for note in summary(asked, found).notes if note.kind == "disturbed"]
    assert noted.facts == {"cores_lacked": {"normed": 0.4}}


def test_a_tuned_batch_size_is_noted_and_counts_in_examples(study_of: StudyOf) -> None:
    arms = ARMS.replace("optimizer.lr: [0.1, 1, 10]", "train.batch_size: [10, 20, 40]")
    asked = study_of(BASE + arms.replace("{norm: batch}", "{norm: batch, train: {batch_size: 40}}"))
    found = carried_out(asked, lambda job: 100.0 + abs(job.point["train.batch_size"] - 20) + job.seed)
    words = "The arms differ in train.batch_size: plain 20, normed 40: a step processes a different number of examples"
    assert words in notes(asked, found)
    normed = summary(asked, found).arms[1]
    assert normed.examples.typical.value == pytest.approx(40 * normed.steps.value)


def test_seconds_are_those_of_the_point_with_the_fewest_steps(asked: Study) -> None:
    noise = {seed: random.Random(seed).gauss(0, 1) for seed in range(7, 25)}
    fast = {0.1: 30.0, 1.0: 31.0, 10.0: 32.0}

    def steps(job: Job) -> float:
        rate = job.point["optimizer.lr"]
        return RATES[rate] if job.arm == "plain" else fast[rate] + 2 * noise[job.seed + int(rate)]

    found = carried_out(asked, steps)
    slow = changed(found, lambda one: normed(one) and one.point["optimizer.lr"] == 0.1, ms_per_step=9.0)
    arm = summary(asked, slow).arms[1]
    assert (arm.choice.kept, arm.point) == (3, {"optimizer.lr": 0.1})
    assert arm.seconds.typical.value == pytest.approx(9e-3 * arm.steps.value)
    assert arm.seconds.ratio.value == pytest.approx(arm.ratio.value / 9)


# --- notes --------------------------------------------------------------------------------------------------------


def test_every_second_evaluation_that_moves_the_ratio_is_noted(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(RATES, dict.fromkeys(RATES, 150.0)))
    fine = summary(asked, found)
    assert fine.arms[1].thinned is not None
    assert not any("very second evaluation" in note for note in sentences(fine.notes))

    def spiked(one: RunRecord) -> RunRecord:  # every second evaluation of the fast arm is above its target at once
        evaluations = [replace(e, accuracy=0.95) if k % 2 else e for k, e in enumerate(one.result.evaluations)]
        return replace(one, result=replace(one.result, evaluations=tuple(evaluations))) if normed(one) else one

    said = notes(asked, [spiked(one) for one in found])
    assert any(note.startswith("Every second evaluation alone gives another ratio: normed (") for note in said)


@pytest.mark.parametrize("best", [0.1, 10])
def test_a_best_value_at_the_edge_of_the_grid_is_noted(asked: Study, best: float) -> None:
    rates = {lr: 100.0 if lr == best else 500.0 for lr in (0.1, 1, 10)}
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(rates, rates)))
    for arm in comparison.arms:
        assert arm.at_edge == ("optimizer.lr",)
    arms = f"plain (optimizer.lr {best:g}), normed (optimizer.lr {best:g})"
    assert f"At the edge of the grid: {arms}; add values beyond" in sentences(comparison.notes)


@pytest.mark.parametrize(
    "grid", ["norm.affine: [true, false]", "optimizer.momentum: [0, 0.9]", "optimizer.lr: [1, 2, 4]"]
)
def test_a_switch_a_zero_and_a_value_inside_the_grid_are_no_edge(study_of: StudyOf, grid: str) -> None:
    arms = ARMS.replace("optimizer.lr: [0.1, 1, 10]", grid).replace("plain:", "plain: {norm: {kind: batch, eps: 0.1}}")
    asked = study_of(BASE + arms)
    best = {"norm.affine": True, "optimizer.momentum": 0, "optimizer.lr": 2}
    found = carried_out(asked, lambda job: 100.0 if job.point.items() <= best.items() else 500.0)
    assert summary(asked, found).arms[0].point.items() <= best.items()
    assert not any("edge" in note for note in notes(asked, found))


def test_an_arm_that_never_hits_is_noted_and_has_no_edge(asked: Study) -> None:
    comparison = summary(asked, carried_out(asked, lambda job: None if job.arm == "plain" else 100.0 + job.seed))
    words = "No setting reached the target within the 769 steps that the budget shows: plain"
    assert words in sentences(comparison.notes)
    assert comparison.arms[0].at_edge == ()
    ratio = comparison.arms[1].ratio
    assert (ratio.value, ratio.method) == (None, "bound")
    assert ratio.interval.low == pytest.approx(1000 / 1.3 / 114)  # 8 seeds: the largest of the arm's, 100 + 14


def test_half_missed_in_both_arms_compares_their_hits(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "20"))
    found = carried_out(asked, lambda job: 100.0 if job.arm == "normed" and job.seed < 16 else None)
    said = notes(asked, found)
    words = "Hits and plain's, by Fisher's exact test: normed ("
    assert f"{words}9, 0 of 20, p 0.0012)" in said
    assert not any("distinguishable" in note for note in said)
    said = notes(asked, failed(found, lambda one: (one.arm, one.seed) == ("plain", 7)))
    assert any(note.startswith(f"{words}8, 0 of 19, p ") for note in said)


def test_an_arm_without_an_interval_says_how_many_seeds_it_needs(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED)
    said = notes(asked, carried_out(asked, lambda job: None if job.arm == "plain" and job.seed == 7 else 100.0))
    assert "Fewer seeds than an interval needs: normed (5 of 6)" in said
    assert not any("distinguishable" in note for note in said)


def test_too_coarse_evaluations_are_noted_with_what_to_set(asked: Study, study_of: StudyOf) -> None:
    said = notes(asked, carried_out(asked, lambda job: 500.0 if job.arm == "plain" else 30.0))
    few = "Fewer than 10 evaluations before the target: "
    assert f"{few}normed (set train.evaluate_every to 3 or less)" in said
    spaced = study_of(BASE.replace("evaluate_every: 5", "evaluate_every: {points_per_doubling: 2}") + ARMS)
    said = notes(spaced, carried_out(spaced, lambda job: 30.0))
    advice = "raise train.evaluate_every.points_per_doubling"
    assert f"{few}plain ({advice}), normed ({advice})" in said


def test_too_few_seeds_are_noted_with_how_many_would_do(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "3"))
    said = notes(asked, carried_out(asked, lambda job: {7: 100.0, 8: 150.0, 9: 220.0}[job.seed]))
    start = "Few seeds per arm: 3; with this spread, telling a ratio of 1.5 from 1 needs "
    assert any(note.startswith(start) for note in said)


def test_a_target_held_before_the_first_step_is_noted(asked: Study) -> None:
    said = notes(asked, carried_out(asked, lambda job: 0.0))
    assert "At the target before training: plain (8 of 8 runs), normed (8 of 8 runs); choose a harder one" in said


def test_arms_that_cannot_be_told_apart_are_named(asked: Study) -> None:
    def steps(job: Job) -> float:
        return 300 * math.exp(random.Random(f"{job.arm} {job.point} {job.seed}").gauss(0, 0.2))

    said = notes(asked, carried_out(asked, steps))
    assert "Not distinguishable from plain by the 95 % interval: normed" in said


def test_diverged_runs_are_misses_and_are_counted(asked: Study) -> None:
    found = [
        replace(one, result=result(None, "diverged")) if normed(one) and one.seed == 10 else one
        for one in carried_out(asked, by_arm_and_rate(RATES, RATES, 1e-6))
    ]
    arm = summary(asked, found).arms[1]
    assert (arm.hits, arm.runs, arm.diverged) == (7, 8, 1)
    assert "Diverged, which counts as a miss: normed (1 of 8 runs)" in notes(asked, found)


def test_failed_runs_are_named_and_not_counted_as_misses(asked: Study) -> None:
    found = failed(carried_out(asked, by_arm_and_rate(RATES, RATES, 1e-6)), lambda one: one.seed == 11)
    comparison = summarise(asked.plan, found, 30)
    assert comparison.arms[0].runs == 7
    assert comparison.arms[0].failures == ("lr 1, seed 11: it died",)
    assert "28 of 30 runs are done, 2 failed; the figures are based on those" in sentences(comparison.notes)


def test_failures_of_one_text_are_one_fact_with_their_count_and_arms(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(RATES, RATES, 1e-6))
    two = summarise(asked.plan, failed(found, lambda one: one.seed == 11), 28)
    facts = {"failure": "it died", "runs": 2, "arms": ["plain", "normed"], "run": None}
    assert [note.facts for note in two.notes if note.kind == "failed"] == [facts]
    one = summarise(asked.plan, failed(found, lambda one: normed(one) and one.seed == 11), 28)
    assert "Failed: normed (lr 1, seed 11): it died" in sentences(one.notes)


def test_an_arm_without_a_run_that_ended_has_no_best_point(study_of: StudyOf) -> None:
    """A grid of one point is kept whatever its runs did, and was shown as if it had been chosen."""
    fixed = ARMS.replace("{norm: batch}", "{norm: batch, optimizer: {lr: 3}}")
    asked = study_of(BASE + fixed.replace("[0.1, 1, 10]", "[1]"))
    for row in summary(asked, failed(carried_out(asked, lambda job: 100.0))).arms:
        assert (row.runs, row.point) == (0, {"optimizer.lr": 3} if row.fixed else {})


def test_other_machines_and_runs_at_a_time_are_noted(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    assert not any("at a time" in note or "machines" in note for note in notes(asked, found))
    found[0] = replace(found[0], result=result(100.0, processor="another"), at_a_time=2)
    said = notes(asked, found)
    assert any("different machines" in note for note in said)
    words = "Seconds and samples/s were measured with up to 2 runs at once; one at a time disturbs them least"
    assert words in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("train: {precision: bf16}", "The arms differ in train.precision: plain fp32, normed bf16"),
        ("train: {accumulate: 4}", "The arms differ in train.accumulate: plain 1, normed 4: batch norm averages over "
         "micro-batches of different sizes"),
        ("train: {stop_at_target: false}", "The arms differ in train.stop_at_target: plain True, normed False: runs "
         "that end at the target have lower final and best values than those that go on"),
        ("schedule: {warmup: 9}", "The arms differ in schedule: plain constant, normed constant warmup 9"),
    ],
)  # fmt: skip
def test_arms_that_differ_in_what_a_step_or_a_run_is_are_noted(study_of: StudyOf, changes: str, words: str) -> None:
    for arm, differ in ((f"{{norm: batch, {changes}}}", True), ("{norm: batch}", False)):
        asked = study_of(BASE + ARMS.replace("{norm: batch}", arm))
        said = notes(asked, carried_out(asked, by_arm_and_rate(RATES, TENTH)))
        assert (words in said) is differ
        assert any("differ" in note for note in said) is differ


# --- comparisons that are not complete ----------------------------------------------------------------------------


def test_a_comparison_that_has_only_begun_has_rows_without_figures(asked: Study) -> None:
    comparison = summarise(asked.plan, [], 28)
    assert [arm.steps.value for arm in comparison.arms] == [None, None]
    assert sentences(comparison.notes)[0] == "0 of 28 runs are done; the figures are based on those"


def test_no_best_value_is_named_before_the_tuning_is_complete(asked: Study) -> None:
    arm = summarise(asked.plan, [record(job, 100.0) for job in named_runs(asked, {}).jobs[:4]], 28).arms[0]
    assert (arm.point, arm.choice, arm.runs) == ({}, None, 0)


def test_an_interrupted_comparison_rests_on_the_seeds_of_every_kept_point(asked: Study) -> None:
    found = carried_out(asked, by_arm_and_rate(EQUAL, EQUAL))
    some = [one for one in found if one.seed < 12 or one.point["optimizer.lr"] == 1]
    whole = [one for one in found if one.seed < 12]
    assert summary(asked, some).arms[1].ratio == summary(asked, whole).arms[1].ratio


def test_kept_points_stay_kept_before_their_further_runs_have_ended(asked: Study) -> None:
    whole = carried_out(asked, by_arm_and_rate({0.1: 320.0, 1.0: 300.0, 10.0: 310.0}, TENTH, 0.2))
    tuning = [one for one in whole if one.phase == "tune"]
    first = next(one for one in whole if one.phase == "report" and one.arm == "plain")
    plain = summary(asked, [*tuning, first]).arms[0]
    assert (plain.choice.kept, plain.runs) == (3, 3)
    assert plain == summary(asked, tuning).arms[0]


def test_a_single_points_further_runs_count_where_its_first_ones_failed(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS.replace("{norm: batch}", "{norm: batch, optimizer: {lr: 1}}"))
    found = carried_out(asked, lambda job: 100.0 + job.seed)
    arm = summary(asked, failed(found, lambda one: normed(one) and one.phase == "tune")).arms[1]
    assert (arm.runs, arm.hits, len(arm.failures)) == (5, 5, 3)


@pytest.mark.parametrize(("steps", "has_a_ratio"), [(100.0, True), (None, False)])
def test_the_seeds_in_common_are_named_only_where_there_is_a_ratio(
    study_of: StudyOf, steps: float | None, has_a_ratio: bool
) -> None:
    found = carried_out(study_of(BASE + UNTUNED), lambda job: steps if job.arm == "plain" else 50.0)
    made = summary(study_of(BASE + UNTUNED), failed(found, lambda one: normed(one) and one.seed == found[0].seed))
    assert made.arms[1].runs == 4
    assert any(note.kind == "common seeds" for note in made.notes) == has_a_ratio


def test_the_curve_is_the_median_and_a_stopped_run_keeps_its_last_value(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "3"))
    found = []
    for one in carried_out(asked, lambda job: 100.0 * (job.seed - 6)):  # 100, 200 and 300 steps
        end = int(one.result.steps_to_target)
        evaluations = (Evaluation(0, 0.1, 2.3, None), Evaluation(end, 0.95, 0.2, 0.2))
        found.append(replace(one, result=replace(one.result, evaluations=evaluations)))
    curve = summary(asked, found).arms[0].curve
    assert [(step, middle) for step, middle, _, _ in curve] == [(0, 0.1), (100, 0.1), (200, 0.95), (300, 0.95)]
