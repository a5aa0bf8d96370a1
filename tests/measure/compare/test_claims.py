"""Verdicts on claims: paired by seed, at one level for interval and verdict, never from a single run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from bncli.measure.compare.plan import Study, named_runs
from bncli.measure.compare.summary import summarise
from bncli.results.compare import JudgedClaim, RunRecord
from bncli.results.train import Evaluation, ProbePoint
from tests.measure.compare.conftest import BASE, UNTUNED, StudyOf, carried_out

PROBED = "probes: {measure: all}\n"
DRIFT, COSINE = "inputs.drift", "shift.cosine"


def claims(*each: str) -> str:
    return "claims:\n" + "".join(f"  - {{say: so, arm: normed, over: plain, {one}}}\n" for one in each)


@pytest.fixture
def judged(study_of: StudyOf) -> Callable[..., Any]:
    """The verdicts on claims, each `measure: ..., at_least: ...`, from made-up values by arm and index of the seed."""

    def judge(*each: str, values: Callable[[str, int], dict[str, Any]], seeds: int = 5) -> tuple[JudgedClaim, ...]:
        asked = study_of(BASE + PROBED + UNTUNED.replace("5", str(seeds)) + "\n" + claims(*each))
        records = [of_values(asked, one, values) for one in carried_out(asked, lambda job: 100.0)]
        return summarise(asked.plan, records, named_runs(asked, {}).planned).claims

    return judge


def of_values(asked: Study, one: RunRecord, values: Callable[[str, int], dict[str, Any]]) -> RunRecord:
    assert one.result is not None
    changes = values(one.arm, asked.plan.report_seeds.index(one.seed))
    return replace(one, result=replace(one.result, **changes))


def points(measure: str, by_step: dict[int, float], layer: str | None = None) -> tuple[ProbePoint, ...]:
    probe, name = measure.split(".")
    return tuple(ProbePoint(probe, layer, step, {name: value}) for step, value in by_step.items())


def at_end(measure: str, plain: Sequence[float], normed: Sequence[float]) -> Callable[[str, int], dict[str, Any]]:
    """One layer, and one value for each seed of each arm."""
    both = {"plain": plain, "normed": normed}
    return lambda arm, seed: {"probes": points(measure, {0: 9.0, 100: both[arm][seed]}, "hidden1.activation")}


# --- intervals and verdicts -------------------------------------------------------------------------------------------

PLAIN, NORMED = [1.0, 1.1, 0.9, 1.05, 1.2], [2.1, 2.0, 1.9, 2.2, 2.3]


@pytest.mark.parametrize(("measure", "scale"), [(DRIFT, np.log), (COSINE, np.asarray)])
@pytest.mark.parametrize("others", [0, 3])
def test_pairs_are_compared_by_students_t_at_the_level_of_all_claims(
    judged: Callable[..., Any], measure: str, scale: Callable[[Any], Any], others: int
) -> None:
    claim = f"measure: {measure}, at_least: 1.5, when: end"
    found = judged(*[claim] * (1 + others), values=at_end(measure, PLAIN, NORMED))[0]
    differences = scale(np.array(NORMED)) - scale(np.array(PLAIN))
    expected = ttest_1samp(differences, float(scale(1.5)))
    interval = expected.confidence_interval(1 - 0.05 / (1 + others))
    assert found.level == pytest.approx(1 - 0.05 / (1 + others))
    assert scale([found.interval.low, found.interval.high]) == pytest.approx([interval.low, interval.high])
    assert scale(found.value) == pytest.approx(differences.mean())
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.seeds, found.of_seeds) == (5, 5)


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [("at_least: 1.2", "shown"), ("at_most: 1.2", "refuted"), ("at_least: 3", "refuted"), ("at_most: 3", "shown"),
     ("at_least: 2", "cannot tell"), ("at_most: 2", "cannot tell"), ("expect: more", "shown"),
     ("expect: less", "refuted")],
)  # fmt: skip
def test_a_claim_is_shown_or_refuted_where_the_whole_interval_says_so(
    judged: Callable[..., Any], bound: str, verdict: str
) -> None:
    (found,) = judged(f"measure: {DRIFT}, when: end, {bound}", values=at_end(DRIFT, PLAIN, NORMED))
    assert found.verdict == verdict
    assert (found.p_value < 1 - found.level) == (verdict != "cannot tell")
    assert (found.seeds_needed is None) == (verdict != "cannot tell")


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [("expect: more", "refuted"), ("expect: less", "refuted"), ("at_least: 0", "shown"), ("at_most: 0", "shown")],
)
def test_arms_that_are_equal_in_every_run_fulfil_a_stated_bound_and_refute_a_difference(
    judged: Callable[..., Any], bound: str, verdict: str
) -> None:
    (found,) = judged(
        f"measure: saturation.dead, when: end, {bound}", values=at_end("saturation.dead", [0] * 5, [0] * 5)
    )
    assert (found.value, found.verdict) == (0, verdict)


def test_a_verdict_is_never_from_a_single_run(judged: Callable[..., Any]) -> None:
    values = at_end(DRIFT, [PLAIN[0], math.nan], NORMED[:2])
    (found,) = judged(f"measure: {DRIFT}, when: end, at_least: 1.1", values=values, seeds=2)
    assert (found.verdict, found.interval.low, found.interval.high) == ("cannot tell", None, None)
    assert (found.no_interval, found.seeds, found.value) == ("one pair", 1, pytest.approx(2.1))


def test_the_seeds_that_would_decide_it_decide_it_in_four_of_five_comparisons(judged: Callable[..., Any]) -> None:
    normed = [1.1, 1.0, 1.0, 1.15, 1.2]
    (found,) = judged(f"measure: {COSINE}, when: end, expect: more", values=at_end(COSINE, PLAIN, normed))
    assert found.verdict == "cannot tell"
    differences = np.array(normed) - np.array(PLAIN)
    draws = np.random.default_rng(1).normal(differences.mean(), differences.std(ddof=1), (4000, found.seeds_needed))
    assert (ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_an_effect_at_the_bound_can_be_decided_by_no_number_of_seeds(judged: Callable[..., Any]) -> None:
    values = at_end(COSINE, [0.0, 1.0], [1.0, 0.0])
    (found,) = judged(f"measure: {COSINE}, when: end, expect: more", values=values, seeds=2)
    assert (found.verdict, found.seeds_needed) == ("cannot tell", None)


# --- what is known of single runs -------------------------------------------------------------------------------------


def test_runs_without_a_finite_value_are_left_out_and_counted(judged: Callable[..., Any]) -> None:
    values = at_end(DRIFT, [*PLAIN[:4], math.nan], [math.inf, *NORMED[1:]])
    (found,) = judged(f"measure: {DRIFT}, when: end, at_least: 1.1", values=values)
    assert (found.seeds, found.of_seeds, found.no_interval) == (3, 5, None)


def test_a_ratio_needs_values_above_zero(judged: Callable[..., Any]) -> None:
    values = at_end(DRIFT, PLAIN, [0.0, *NORMED[1:]])
    (found,) = judged(f"measure: {DRIFT}, when: end, at_least: 1.1", values=values)
    assert (found.verdict, found.no_interval, found.value) == ("cannot tell", "not positive", None)


def test_a_layer_that_no_run_measures_cannot_be_told(judged: Callable[..., Any]) -> None:
    claim = f"measure: {DRIFT}, when: end, expect: more, layer"
    values = at_end(DRIFT, PLAIN, NORMED)
    wrong, right = judged(f"{claim}: hidden1.linear", f"{claim}: hidden1.activation", values=values)
    assert (wrong.verdict, wrong.no_interval) == ("cannot tell", "unknown layer")
    assert right.verdict == "shown"


def test_without_probes_there_is_no_pair(judged: Callable[..., Any]) -> None:
    (found,) = judged(f"measure: {DRIFT}, expect: more", values=lambda arm, seed: {})
    assert (found.verdict, found.no_interval, found.seeds, found.of_seeds) == ("cannot tell", "no pairs", 0, 5)


def test_final_is_the_median_of_the_last_five_evaluations(judged: Callable[..., Any]) -> None:
    def values(arm: str, seed: int) -> dict[str, Any]:
        last = [0.9, 0.91, 0.1, 0.92, 0.93] if arm == "normed" else [0.8 + seed / 1000] * 5
        return {"evaluations": tuple(Evaluation(step, value, 1.0, 1.0) for step, value in enumerate([0.1, *last]))}

    (found,) = judged("measure: final, at_least: 0.1", values=values)
    assert (found.of_arm, found.of_over) == (pytest.approx(0.91), pytest.approx(0.802))
    assert found.verdict == "shown"


def test_best_and_generalization_gap_are_differences(judged: Callable[..., Any]) -> None:
    def values(arm: str, seed: int) -> dict[str, Any]:
        gap = (0.1 if arm == "normed" else 0.3) + seed / 100
        return {"best": 0.9 + seed / 1000, "probes": points("regularization.gap", {100: gap})}

    best, gap = judged("measure: best, expect: more", "measure: regularization.gap, at_most: -0.1", values=values)
    assert (best.value, best.verdict) == (0, "refuted")
    assert (gap.value, gap.verdict) == (pytest.approx(-0.2), "shown")


# --- over a run -------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_the_log_of_the_step_and_over_layers(judged: Callable[..., Any]) -> None:
    def values(arm: str, seed: int) -> dict[str, Any]:
        scale = 1.01**seed * (2 if arm == "normed" else 1)
        lines = {"hidden1": {0: 1e6, 1: 1.0, 10: 3.0, 1000: 5.0}, "hidden2": {0: 1e6, 1: 2.0, 1000: 2.0}}
        by_layer = [
            points(DRIFT, {step: scale * value for step, value in line.items()}, layer) for layer, line in lines.items()
        ]
        return {"probes": sum(by_layer, ())}

    (found,) = judged(f"measure: {DRIFT}, at_least: 1.9", values=values)
    first = ((1 + 3) / 2 * 1 + (3 + 5) / 2 * 2) / 3  # one decade, then two
    assert found.of_over == pytest.approx(1.01**2 * (first + 2) / 2)
    assert found.value == pytest.approx(2)


def test_a_run_that_goes_on_longer_is_compared_over_the_steps_of_both(judged: Callable[..., Any]) -> None:
    """The value grows with the step alone, as in both arms; one of them stops earlier, between two points."""

    def values(arm: str, seed: int) -> dict[str, Any]:
        steps = [1, 10, 30] if arm == "normed" else [0, 1, 10, 100, 1000]
        return {"probes": points(COSINE, {step: math.log(max(step, 1e-9)) + seed / 10 for step in steps}, "hidden1")}

    (found,) = judged(f"measure: {COSINE}, at_most: 0.001", values=values)
    assert found.of_arm == pytest.approx(math.log(30) / 2 + 0.2)
    assert found.value == pytest.approx(0, abs=1e-9)


def test_runs_without_steps_in_common_cannot_be_told(judged: Callable[..., Any]) -> None:
    steps = {"normed": {0: 1.0, 35: 1.0}, "plain": {0: 1.0, 100: 1.0, 160: 1.0}}
    (found,) = judged(
        f"measure: {COSINE}, expect: less", values=lambda arm, seed: {"probes": points(COSINE, steps[arm])}
    )
    assert (found.verdict, found.no_interval) == ("cannot tell", "no common steps")


def test_at_equal_loss_two_runs_of_different_speed_and_the_same_path_are_equal(judged: Callable[..., Any]) -> None:
    """The value is a function of the loss; the faster arm passes the same losses earlier and goes on further."""

    def values(arm: str, seed: int) -> dict[str, Any]:
        rate = (0.02 if arm == "normed" else 0.01) * (1 + seed / 10)
        losses = {step: 2.3 * math.exp(-rate * step) for step in range(0, 200, 5)}
        of_loss = {step: math.log(loss) + 10 for step, loss in losses.items()}
        return {"probes": points(COSINE, of_loss, "hidden1") + points("loss.training", losses)}

    equal, mean = (f"measure: {COSINE}, expect: less, when: {when}" for when in ("equal loss", "mean"))
    at_equal_loss, over_steps = judged(equal, mean, values=values)
    assert at_equal_loss.value == pytest.approx(0, abs=1e-9)
    assert at_equal_loss.verdict != "shown"
    assert over_steps.verdict == "shown"


def test_held_out_loss_is_compared_at_equal_training_loss_in_evaluation_mode(judged: Callable[..., Any]) -> None:
    """Twice the loss of the training set in one arm and the same in the other, at every loss; batch norm's loss in
    training mode, with statistics that do not lag behind, is far lower at first."""

    def values(arm: str, seed: int) -> dict[str, Any]:
        rate, gap, lag = (0.04, 2.0, 0.1) if arm == "normed" else (0.02, 1.0, 1.0)
        losses = {step: 4.0 * math.exp(-rate * step) for step in range(0, 200, 5)}
        found = {step: {"training_loss": loss, "held_out_loss": gap * loss} for step, loss in losses.items()}
        of_mode = {step: loss * (lag if step < 50 else 1) for step, loss in losses.items()}
        return {
            "probes": points("loss.training", of_mode)
            + tuple(ProbePoint("regularization", None, step, each) for step, each in found.items())
        }

    claim = "measure: regularization.held_out_loss, when: equal loss, at_least: 1.9"
    (found,) = judged(claim, values=values)
    assert found.value == pytest.approx(2)
    assert found.of_over == pytest.approx(math.sqrt(4.0 * 4.0 * math.exp(-0.02 * 195)))  # geometric, of first and last


def test_runs_that_pass_no_common_loss_cannot_be_told(judged: Callable[..., Any]) -> None:
    def values(arm: str, seed: int) -> dict[str, Any]:
        losses = {0: 2.0, 100: 1.0} if arm == "normed" else {0: 0.9, 100: 0.5}
        return {"probes": points(COSINE, dict.fromkeys(losses, 1.0)) + points("loss.training", losses)}

    (found,) = judged(f"measure: {COSINE}, expect: less, when: equal loss", values=values)
    assert (found.verdict, found.no_interval) == ("cannot tell", "no common loss")


# --- to the target ----------------------------------------------------------------------------------------------------

STEPS = "measure: steps_to_target"


@pytest.mark.parametrize("misses", [0, 2])
def test_steps_agree_with_the_table(study_of: StudyOf, misses: int) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "8") + "\n" + claims(f"{STEPS}, at_most: 0.5"))
    steps = {"plain": [500, 550, 600, 480, 520, 530, 610, 505], "normed": [100, 110, 95, 90, 105, 120, 99, 98]}
    runs: dict[tuple[str, int], float | None] = {
        (arm, seed): value
        for arm, each in steps.items()
        for seed, value in zip(asked.plan.report_seeds, each, strict=True)
    }
    runs |= {("plain", seed): None for seed in asked.plan.report_seeds[:misses]}
    report = summarise(asked.plan, carried_out(asked, lambda job: runs[job.arm, job.seed]), 16)
    (claim,), ratio = report.claims, report.arms[1].ratio
    assert ratio is not None
    assert ratio.value is not None
    assert claim.value == pytest.approx(1 / ratio.value)
    assert claim.interval.high == pytest.approx(1 / ratio.interval.low)
    assert (claim.interval.low is None) == (ratio.interval.high is None) == bool(misses)
    assert (claim.verdict, claim.seeds) == ("shown", 8)


def test_a_bound_can_show_a_claim_and_a_stricter_level_leaves_it_open(study_of: StudyOf) -> None:
    """Of 6 runs per arm half missed in one: order statistics bound a median at 2.5 %, and at 0.5 % they do not."""
    for others, verdict in ((0, "shown"), (4, "cannot tell")):
        asked = study_of(BASE + UNTUNED.replace("5", "6") + "\n" + claims(*[f"{STEPS}, at_most: 0.5"] * (1 + others)))
        records = carried_out(asked, lambda job: None if job.arm == "plain" else 100.0 + job.seed)
        claim = summarise(asked.plan, records, 12).claims[0]
        assert (claim.verdict, claim.value, claim.interval.low) == (verdict, None, None)
    assert claim.no_interval == "too few hits"


def test_half_missed_in_both_arms_cannot_be_told(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED + "\n" + claims(f"{STEPS}, expect: less"))
    claim = summarise(asked.plan, carried_out(asked, lambda job: None), 10).claims[0]
    assert (claim.verdict, claim.no_interval) == ("cannot tell", "too few hits")


def test_a_p_value_is_of_the_bound_and_never_of_equal_hits(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "9") + "\n" + claims(f"{STEPS}, expect: less"))
    hit = {("normed", seed) for seed in asked.plan.report_seeds[:4]}
    report = summarise(asked.plan, carried_out(asked, lambda job: 100.0 if (job.arm, job.seed) in hit else None), 18)
    assert report.arms[1].ratio is not None
    assert report.arms[1].ratio.method == "hits"
    assert report.claims[0].p_value is None


def test_a_target_that_is_held_before_training_has_no_ratio(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED + "\n" + claims(f"{STEPS}, expect: less"))
    claim = summarise(asked.plan, carried_out(asked, lambda job: 0.0 if job.arm == "plain" else 100.0), 10).claims[0]
    assert (claim.verdict, claim.no_interval) == ("cannot tell", "not positive")


def test_arms_of_one_recipe_are_equal_once_there_are_two_runs(study_of: StudyOf) -> None:
    text = BASE + UNTUNED.replace("{norm: batch}", "") + "\n" + claims(f"{STEPS}, at_least: 3")
    asked = study_of(text.replace("report: 5", "report: 2"))
    records = carried_out(asked, lambda job: 100.0)
    first = [record for record in records if record.seed == min(asked.plan.report_seeds)]
    for ended, verdict in ((first, "cannot tell"), (records, "refuted")):
        assert summarise(asked.plan, ended, 2).claims[0].verdict == verdict


def test_seconds_and_examples_have_their_own_ratio(study_of: StudyOf) -> None:
    asked = study_of(
        BASE + UNTUNED.replace("{norm: batch}", "{train: {batch_size: 40}}") + "\n"
        + claims(*(f"measure: {unit}_to_target, expect: less" for unit in ("steps", "seconds", "examples")))
    )  # fmt: skip
    records = carried_out(asked, lambda job: (100.0 if job.arm == "plain" else 50.0) + job.seed)
    steps, seconds, examples = summarise(asked.plan, records, 10).claims
    assert seconds.value == pytest.approx(steps.value)
    assert examples.value == pytest.approx(2 * steps.value)  # type: ignore[operator]
    assert (steps.verdict, examples.verdict) == ("shown", "refuted")
