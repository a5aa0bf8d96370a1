"""From runs' records to the table's figures and notes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bncli.measure.compare.plan import Job, Study, planned_runs, wanted
from bncli.measure.compare.summary import summarise
from bncli.results.compare import Comparison, RunRecord
from bncli.results.environment import Interval
from bncli.results.train import Evaluation, Target, TargetReached
from tests.measure.compare.test_plan import ARMS, BASE, carried_out, record, result, sentences, study_of


def summary(asked: Study, found: Sequence[RunRecord]) -> Comparison:
    return summarise(asked.plan, found, planned_runs(asked, {one.key: one for one in found}))


def test_the_further_runs_of_a_single_point_count_also_where_its_first_ones_failed(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("{norm: batch}", "{norm: batch, optimizer: {lr: 1}}"))
    found = [
        replace(one, result=None, failure="it died") if one.arm == "normed" and one.phase == "tune" else one
        for one in carried_out(asked, lambda job: 100.0 + job.seed)
    ]
    normed = summary(asked, found).arms[1]
    assert (normed.runs, normed.hits, len(normed.failures)) == (5, 5, 3)


def by_arm_and_rate(
    plain: dict[float, float], normed: dict[float, float], spread: float = 0.1
) -> Callable[[Job], float]:
    """Steps about each rate's own, the same draw for both arms at one seed and rate."""

    def steps(job: Job) -> float:
        centre = (plain if job.arm == "plain" else normed)[job.point["optimizer.lr"]]
        return centre * math.exp(random.Random(f"{job.point} {job.seed}").gauss(0, spread))

    return steps


RATES = {0.1: 600.0, 1.0: 300.0, 10.0: 500.0}
TENTH = {rate: steps / 10 for rate, steps in RATES.items()}


def test_the_ratio_is_reference_steps_over_the_arms_at_each_ones_best_rate(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    other = {0.1: 30.0, 1.0: 70.0, 10.0: 80.0}
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(RATES, other, 1e-9)))
    plain, normed = comparison.arms
    assert plain.ratio is None
    assert normed.ratio is not None
    assert (normed.ratio.value, normed.ratio.method) == (pytest.approx(10), "means")
    assert (plain.hits, plain.runs, plain.steps.value) == (8, 8, pytest.approx(300))  # tuning seeds count too
    assert (plain.point, normed.point) == ({"optimizer.lr": 1}, {"optimizer.lr": 0.1})
    assert [cell.kept for cell in plain.tuning] == [False, True, False]
    assert plain.choice is not None
    assert (plain.choice.points, plain.choice.kept, plain.choice.doubt) == (3, 1, 0)
    assert comparison.planned_runs == len(comparison.runs) == 28


def test_a_choice_that_is_not_clear_says_how_many_points_were_kept_and_how_often_another_is_chosen(
    tmp_path: Path,
) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    close = {0.1: 300.0, 1.0: 300.0, 10.0: 300.0}
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(close, TENTH)))
    plain, normed = comparison.arms
    assert plain.choice is not None
    assert plain.choice.kept == 3
    assert plain.choice.doubt is not None
    assert 0 < plain.choice.doubt < 1
    assert comparison.planned_runs == len(comparison.runs) == 18 + 15 + 5
    assert normed.ratio is not None
    alone = summary(asked, carried_out(asked, by_arm_and_rate(RATES, TENTH))).arms[1].ratio
    assert alone is not None
    assert normed.ratio.interval.high is not None
    assert alone.interval.high is not None
    assert normed.ratio.interval.high / normed.ratio.value > alone.interval.high / alone.value  # type: ignore[operator]


def test_the_summary_is_the_same_whatever_the_order_of_the_records(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    shuffled = random.Random(0).sample(found, len(found))
    one, other = (summarise(asked.plan, runs, 28) for runs in (found, shuffled))
    assert one == other


def test_seconds_and_examples_to_target_have_ratios_of_their_own(tmp_path: Path) -> None:
    arms = ARMS.replace("{norm: batch}", "{norm: batch, train: {batch_size: 40}}")
    asked = study_of(tmp_path, BASE + arms)
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    slower = [
        replace(one, result=replace(one.result, ms_per_step=2.5)) if one.arm == "normed" and one.result else one
        for one in found
    ]
    plain, normed = summary(asked, slower).arms
    assert plain.seconds is not None
    assert plain.steps.value is not None
    assert plain.seconds.ratio is None
    assert plain.seconds.typical.value == pytest.approx(plain.steps.value / 1e3)
    assert normed.seconds is not None
    assert normed.examples is not None
    for cost, value in ((normed.seconds, 4), (normed.examples, 5)):
        assert cost.ratio is not None
        assert cost.ratio.value == pytest.approx(value, rel=1e-6)
        assert cost.ratio.interval.low is not None
        assert 0.8 * value < cost.ratio.interval.low <= value
    assert any(
        note.startswith("the arms differ in train.batch_size: plain 20, normed 40")
        for note in sentences(summary(asked, found).notes)
    )
    unknown = [replace(one, result=replace(one.result, ms_per_step=None)) for one in found if one.result]
    assert summary(asked, unknown).arms[1].seconds is None


def test_every_target_of_the_runs_has_its_own_ratio(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE.replace("{value: 0.9}", "{value: 0.9, also: [0.8, 0.95]}") + ARMS)
    easier, harder = asked.plan.also
    assert (easier, harder) == (Target("accuracy", 0.8), Target("accuracy", 0.95))
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))

    def with_targets(one: RunRecord) -> RunRecord:
        assert one.result is not None
        steps = one.result.steps_to_target
        assert steps is not None
        first = TargetReached(easier, steps / (2 if one.arm == "plain" else 4), 5)
        last = TargetReached(harder, None if one.arm == "plain" else 2 * steps, None)
        return replace(one, result=replace(one.result, also=(first, last)))

    plain, normed = summary(asked, [with_targets(one) for one in found]).arms
    assert [(each.target, each.hits, each.ratio) for each in plain.also] == [(easier, 8, None), (harder, 0, None)]
    first, last = normed.also
    assert first.ratio is not None
    assert first.ratio.value == pytest.approx(20)
    assert last.ratio is not None
    assert (last.hits, last.ratio.value, last.ratio.method) == (8, None, "bound")


def test_arms_that_are_one_recipe_read_exactly_one_and_say_so(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("normed:", "again:\n  normed:"))
    found = carried_out(asked, lambda job: 100.0 + job.seed)
    comparison = summary(asked, found)
    again = comparison.arms[1]
    assert again.ratio is not None
    assert (again.ratio.value, again.ratio.interval, again.ratio.method) == (1.0, Interval(1.0, 1.0), "same recipe")
    assert "again: the same recipe as plain under another name, so the ratio is 1 by itself" in sentences(
        comparison.notes
    )
    assert not any("told apart" in note and "again" in note for note in sentences(comparison.notes))


def test_every_second_evaluation_that_moves_the_ratio_is_said(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    fine = summary(asked, carried_out(asked, by_arm_and_rate(RATES, dict.fromkeys(RATES, 150.0))))
    assert fine.arms[1].thinned is not None
    assert not any("every second evaluation" in note for note in sentences(fine.notes))

    def spiked(one: RunRecord) -> RunRecord:  # every second evaluation of the fast arm is above its target at once
        assert one.result is not None
        if one.arm == "plain":
            return one
        changed = [replace(each, accuracy=0.95) if k % 2 else each for k, each in enumerate(one.result.evaluations)]
        return replace(one, result=replace(one.result, evaluations=tuple(changed)))

    found = carried_out(asked, by_arm_and_rate(RATES, dict.fromkeys(RATES, 150.0)))
    comparison = summary(asked, [spiked(one) for one in found])
    assert any(
        note.startswith("normed: from every second evaluation the ratio is ") for note in sentences(comparison.notes)
    )


@pytest.mark.parametrize(("best", "word"), [(0.1, "smaller"), (10, "larger")])
def test_a_best_value_at_the_edge_of_the_grid_is_always_warned_of(tmp_path: Path, best: float, word: str) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    rates = {lr: 100.0 if lr == best else 500.0 for lr in (0.1, 1, 10)}
    comparison = summary(asked, carried_out(asked, by_arm_and_rate(rates, rates)))
    for arm in comparison.arms:
        assert arm.at_edge == ("optimizer.lr",)
        expected = f"{arm.arm}: the best optimizer.lr, {best:g}, is at the edge of the grid; add {word} values"
        assert expected in sentences(comparison.notes)


@pytest.mark.parametrize(
    "grid", ["norm.affine: [true, false]", "optimizer.momentum: [0, 0.9]", "optimizer.lr: [1, 2, 4]"]
)
def test_a_switch_a_zero_and_a_value_inside_the_grid_are_no_edge(tmp_path: Path, grid: str) -> None:
    arms = ARMS.replace("optimizer.lr: [0.1, 1, 10]", grid).replace("plain:", "plain: {norm: {kind: batch, eps: 0.1}}")
    asked = study_of(tmp_path, BASE + arms)
    best = {"norm.affine": True, "optimizer.momentum": 0, "optimizer.lr": 2}
    found = carried_out(asked, lambda job: 100.0 if job.point.items() <= best.items() else 500.0)
    comparison = summary(asked, found)
    assert comparison.arms[0].point.items() <= best.items()
    assert not any("edge" in note for note in sentences(comparison.notes))


def test_an_arm_that_never_hits_says_so_instead_of_naming_an_edge(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summary(asked, carried_out(asked, lambda job: None if job.arm == "plain" else 100.0 + job.seed))
    assert "plain: no point of the grid reached the target within the 769 steps the budget can show" in sentences(
        comparison.notes
    )
    assert comparison.arms[0].at_edge == ()
    ratio = comparison.arms[1].ratio
    assert ratio is not None
    assert (ratio.value, ratio.method) == (None, "bound")
    assert ratio.interval.low == pytest.approx(1000 / 1.3 / 114)  # 8 seeds: the largest of the arm's, 100 + 14


def test_half_missed_in_both_arms_compares_their_hits(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 20}")
    found = carried_out(asked, lambda job: 100.0 if job.arm == "normed" and job.seed < 16 else None)
    words = (
        "normed: 9 of 20 runs hit, 0 of 20 of plain; if both hit alike, a difference as large has probability 0.0012 "
        "(Fisher's exact test)"
    )
    notes = sentences(summary(asked, found).notes)
    assert words in notes
    assert not any("told apart" in note for note in notes)
    lost = [
        replace(one, result=None, failure="it died") if (one.arm, one.seed) == ("plain", 7) else one for one in found
    ]
    assert any(
        note.startswith("normed: 8 of 19 runs hit, 0 of 19 of plain; ")
        for note in sentences(summary(asked, lost).notes)
    )


def test_an_arm_without_an_interval_says_how_many_seeds_it_needs(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 5}")
    notes = sentences(
        summary(asked, carried_out(asked, lambda job: None if job.arm == "plain" and job.seed == 7 else 100.0)).notes
    )
    assert "normed: no interval from 5 seeds and a miss; it needs 6" in notes
    assert not any("told apart" in note for note in notes)


def test_too_coarse_evaluations_are_said_with_what_to_set(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summary(asked, carried_out(asked, lambda job: 500.0 if job.arm == "plain" else 30.0))
    assert "normed: fewer than 10 evaluations before its target; set train.evaluate_every to 3 or less" in sentences(
        comparison.notes
    )
    assert not any(note.startswith("plain: fewer") for note in sentences(comparison.notes))
    spaced = study_of(tmp_path, BASE.replace("evaluate_every: 5", "evaluate_every: {points_per_doubling: 2}") + ARMS)
    comparison = summary(spaced, carried_out(spaced, lambda job: 30.0))
    advice = "raise train.evaluate_every.points_per_doubling"
    assert f"normed: fewer than 10 evaluations before its target; {advice}" in sentences(comparison.notes)


def test_too_few_seeds_are_said_with_how_many_would_do(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 3}")
    comparison = summary(asked, carried_out(asked, lambda job: {7: 100.0, 8: 150.0, 9: 220.0}[job.seed]))
    assert any(
        note.startswith("3 seeds an arm are few: at the spread seen here a ratio of 1.5 needs ")
        for note in sentences(comparison.notes)
    )


def test_a_target_that_is_held_before_the_first_step_is_said(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summary(asked, carried_out(asked, lambda job: 0.0))
    assert "plain: 8 of 8 runs were at the target before the first step; choose a harder one" in sentences(
        comparison.notes
    )


def test_no_best_value_is_named_before_the_tuning_is_complete(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    begun = [record(job, 100.0) for job in wanted(asked, {})[:4]]
    arm = summarise(asked.plan, begun, 28).arms[0]
    assert (arm.point, arm.choice, arm.runs) == ({}, None, 0)


def test_an_interrupted_comparison_rests_on_the_seeds_that_every_kept_point_has(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    close = {0.1: 300.0, 1.0: 300.0, 10.0: 300.0}
    found = carried_out(asked, by_arm_and_rate(close, close))
    some = [one for one in found if one.seed < 12 or one.point["optimizer.lr"] == 1]
    whole = [one for one in found if one.seed < 12]
    assert summary(asked, some).arms[1].ratio == summary(asked, whole).arms[1].ratio


def test_points_kept_by_the_tuning_stay_kept_before_their_further_runs_have_ended(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    whole = carried_out(asked, by_arm_and_rate({0.1: 320.0, 1.0: 300.0, 10.0: 310.0}, TENTH, 0.2))
    tuning = [one for one in whole if one.phase == "tune"]
    first = next(one for one in whole if one.phase == "report" and one.arm == "plain")
    plain = summary(asked, [*tuning, first]).arms[0]
    assert plain.choice is not None
    assert (plain.choice.kept, plain.runs) == (3, 3)
    assert plain == summary(asked, tuning).arms[0]


def test_a_ratio_rests_on_the_seeds_of_both_arms_at_each_ones_best_point_and_says_so(tmp_path: Path) -> None:
    """The reference's best point over all of its seeds is another than over those that the arm has too."""
    asked = study_of(tmp_path, BASE + ARMS)

    def steps(job: Job) -> float:
        rate, early = job.point["optimizer.lr"], job.seed < 12
        if job.arm == "normed":
            return 30.0 * (1 + rate)
        uneven = 40 * (job.seed % 2)  # so that three tuning seeds cannot tell 0.1 from 1
        return float({0.1: (305 if early else 200) + uneven, 1: (320 if early else 400) - uneven, 10: 600}[rate])

    found = [
        replace(one, result=None, failure="it died") if one.arm == "normed" and one.seed >= 12 else one
        for one in carried_out(asked, steps)
    ]
    comparison = summary(asked, found)
    plain, normed = comparison.arms
    assert (plain.point, plain.runs, normed.runs) == ({"optimizer.lr": 0.1}, 8, 5)
    assert normed.ratio is not None
    assert normed.ratio.value == pytest.approx((305**2 * 345**3) ** 0.2 / 33)
    assert "normed: its ratio rests on the 5 seeds that plain has too" in sentences(comparison.notes)


def test_seconds_of_runs_with_other_threads_in_one_arm_are_left_out_of_both(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)

    def with_four_threads(one: RunRecord) -> RunRecord:
        assert one.result is not None
        elsewhere = replace(one.result.environment, threads=4)
        return replace(one, result=replace(one.result, environment=elsewhere, ms_per_step=9.0))

    found = [
        with_four_threads(one) if one.seed in ((10,) if one.arm == "plain" else (7, 8)) else one
        for one in carried_out(asked, by_arm_and_rate(RATES, TENTH))
    ]
    normed = summarise(asked.plan, found, 28, threads=1).arms[1]
    assert normed.seconds is not None
    assert normed.seconds.ratio is not None
    assert normed.seconds.ratio.value == pytest.approx(10)
    assert normed.seconds.typical.value == pytest.approx(0.03, rel=0.2)


def test_batch_sizes_that_the_grid_or_an_arm_chose_are_remarked_and_count_in_examples(tmp_path: Path) -> None:
    arms = ARMS.replace("optimizer.lr: [0.1, 1, 10]", "train.batch_size: [10, 20, 40]")
    asked = study_of(tmp_path, BASE + arms.replace("{norm: batch}", "{norm: batch, train: {batch_size: 40}}"))
    found = carried_out(asked, lambda job: 100.0 + abs(job.point["train.batch_size"] - 20) + job.seed)
    comparison = summary(asked, found)
    words = "the arms differ in train.batch_size: plain 20, normed 40: a step sees another number of examples"
    assert words in sentences(comparison.notes)
    normed = comparison.arms[1]
    assert normed.examples is not None
    assert normed.steps.value is not None
    assert normed.examples.typical.value == pytest.approx(40 * normed.steps.value)


def test_seconds_are_those_of_the_point_with_the_fewest_steps(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)

    def slow_steps(one: RunRecord) -> RunRecord:  # at the point of the fewest steps alone
        assert one.result is not None
        slow = one.arm == "normed" and one.point["optimizer.lr"] == 0.1
        return replace(one, result=replace(one.result, ms_per_step=9.0 if slow else 1.0))

    noise = {seed: random.Random(seed).gauss(0, 1) for seed in range(7, 25)}
    fast = {0.1: 30.0, 1.0: 31.0, 10.0: 32.0}

    def steps(job: Job) -> float:
        rate = job.point["optimizer.lr"]
        return RATES[rate] if job.arm == "plain" else fast[rate] + 2 * noise[job.seed + int(rate)]

    normed = summary(asked, [slow_steps(one) for one in carried_out(asked, steps)]).arms[1]
    assert normed.choice is not None
    assert (normed.choice.kept, normed.point) == (3, {"optimizer.lr": 0.1})
    assert normed.steps.value is not None
    assert normed.seconds is not None
    assert normed.seconds.typical.value == pytest.approx(9e-3 * normed.steps.value)
    assert normed.seconds.ratio is not None
    assert normed.ratio is not None
    assert normed.ratio.value is not None
    assert normed.seconds.ratio.value == pytest.approx(normed.ratio.value / 9)


def test_arms_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(
        asked, lambda job: 300 * math.exp(random.Random(f"{job.arm} {job.point} {job.seed}").gauss(0, 0.2))
    )
    assert "not told apart from plain by the 95 % interval: normed" in sentences(summary(asked, found).notes)


def test_diverged_runs_are_misses_and_are_counted(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = [
        replace(one, result=result(None, "diverged")) if one.arm == "normed" and one.seed == 10 else one
        for one in carried_out(asked, by_arm_and_rate(RATES, RATES, 1e-6))
    ]
    comparison = summary(asked, found)
    assert (comparison.arms[1].hits, comparison.arms[1].runs, comparison.arms[1].diverged) == (7, 8, 1)
    assert "normed: 1 of 8 runs diverged and count as misses" in sentences(comparison.notes)


def test_failed_runs_are_named_and_not_counted_as_misses(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = [
        replace(one, result=None, failure="its worker process was killed by SIGKILL") if one.seed == 11 else one
        for one in carried_out(asked, by_arm_and_rate(RATES, RATES, 1e-6))
    ]
    comparison = summarise(asked.plan, found, 28)
    assert comparison.arms[0].runs == 7
    assert comparison.arms[0].failures == ("lr 1, seed 11: its worker process was killed by SIGKILL",)
    assert "26 of 28 runs are done, 2 failed; the figures rest on those" in sentences(comparison.notes)


def test_a_comparison_that_has_only_begun_has_rows_without_figures(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    comparison = summarise(asked.plan, [], 28)
    assert [arm.steps.value for arm in comparison.arms] == [None, None]
    assert sentences(comparison.notes)[0] == "0 of 28 runs are done; the figures rest on those"


def test_runs_of_different_machines_and_runs_that_disturbed_each_other_are_said(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + ARMS)
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    assert not any("at a time" in note or "machines" in note for note in sentences(summary(asked, found).notes))
    found[0] = replace(found[0], result=result(100.0, processor="another"), at_a_time=2)
    notes = sentences(summary(asked, found).notes)
    assert any("different machines" in note for note in notes)
    assert (
        "seconds and samples/s were measured with up to 2 runs at a time; one at a time, each is measured alone"
        in notes
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("train: {precision: bf16}", "the arms differ in train.precision: plain fp32, normed bf16"),
        ("schedule: {warmup: 9}", "the arms differ in schedule: plain constant, normed constant warmup 9"),
    ],
)
def test_arms_that_differ_in_precision_or_schedule_are_remarked(tmp_path: Path, changes: str, words: str) -> None:
    asked = study_of(tmp_path, BASE + ARMS.replace("{norm: batch}", f"{{norm: batch, {changes}}}"))
    found = carried_out(asked, by_arm_and_rate(RATES, TENTH))
    assert words in sentences(summary(asked, found).notes)
    alike = study_of(tmp_path, BASE + ARMS)
    assert not any(
        "differ" in note for note in sentences(summary(alike, carried_out(alike, by_arm_and_rate(RATES, TENTH))).notes)
    )


def test_the_curve_is_the_median_of_runs_and_a_stopped_run_keeps_its_last_value(tmp_path: Path) -> None:
    asked = study_of(tmp_path, BASE + "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 3}")
    found = []
    for one in carried_out(asked, lambda job: 100.0 * (job.seed - 6)):  # 100, 200 and 300 steps
        assert one.result is not None
        end = one.result.steps_to_target
        assert end is not None
        evaluations = (Evaluation(0, 0.1, 2.3, None), Evaluation(int(end), 0.95, 0.2, 0.2))
        found.append(replace(one, result=replace(one.result, evaluations=evaluations)))
    curve = summary(asked, found).arms[0].curve
    assert [(step, middle) for step, middle, _, _ in curve] == [(0, 0.1), (100, 0.1), (200, 0.95), (300, 0.95)]
