"""From recipes to runs: which are planned, under which keys, and what cannot be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bncli.errors import RecipeError
from bncli.measure.compare.plan import Job, Study, named_runs, planned_comparison, study
from bncli.measure.compare.rates import USUAL_RUNS
from bncli.measure.compare.reuse import identity
from bncli.recipe.load import load
from tests.measure.compare.conftest import ARMS, BASE, UNTUNED, StudyOf, carried_out, record


def of_arm(name: str, jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.arm == name]


def keys(asked: Study) -> list[str]:
    return [job.key for job in named_runs(asked, {}).jobs]


def test_every_arm_gets_the_same_grid_and_seeds_and_then_further_ones(asked: Study) -> None:
    assert asked.plan.tune_seeds == (7, 8, 9)
    assert asked.plan.report_seeds == (10, 11, 12, 13, 14)
    jobs = named_runs(asked, {}).jobs
    for arm in ("plain", "normed"):
        points = [(job.point["optimizer.lr"], job.seed) for job in of_arm(arm, jobs)]
        assert sorted(points) == [(lr, seed) for lr in (0.1, 1, 10) for seed in (7, 8, 9)]
    assert named_runs(asked, {}).planned == 2 * 3 * 3 + 2 * 5


def test_further_seeds_are_named_once_an_arm_is_tuned(asked: Study) -> None:
    tuning = of_arm("plain", named_runs(asked, {}).jobs)
    records = {job.key: record(job, 100 * (1 + job.point["optimizer.lr"])) for job in tuning[:-1]}
    assert {job.phase for job in named_runs(asked, records).jobs} == {"tune"}
    assert named_runs(asked, records).planned == 28
    records[tuning[-1].key] = record(tuning[-1], 700)
    report = [job for job in named_runs(asked, records).jobs if job.phase == "report"]
    assert [(job.arm, job.point["optimizer.lr"], job.seed) for job in report] == [
        ("plain", 0.1, s) for s in range(10, 15)
    ]


def test_every_point_as_good_as_the_best_gets_the_further_seeds(asked: Study) -> None:
    steps = {(0.1, 7): 100, (0.1, 8): 120, (0.1, 9): 110, (1, 7): 112, (1, 8): 115, (1, 9): 108}
    records = {
        job.key: record(job, steps.get((job.point["optimizer.lr"], job.seed), 700))
        for job in named_runs(asked, {}).jobs
    }
    report = [(job.seed, job.point["optimizer.lr"]) for job in named_runs(asked, records).jobs if job.phase == "report"]
    assert report[:4] == [(10, 0.1), (10, 1), (11, 0.1), (11, 1)]  # seed by seed
    assert len(report) == 2 * 2 * 5
    assert named_runs(asked, records).planned == 18 + 20 + 2  # two that measure what a step costs


def test_tuning_begins_in_the_middle_of_the_grid(study_of: StudyOf) -> None:
    grid = ARMS.replace("[0.1, 1, 10]}", "[0.1, 1, 10], train.batch_size: [5, 10, 20, 40]}")
    jobs = of_arm("plain", named_runs(study_of(BASE + grid), {}).jobs)
    points = [(job.point["optimizer.lr"], job.point["train.batch_size"]) for job in jobs]
    assert points[:2] == [(1, 10), (1, 20)]
    assert {*points[8:12]} == {(lr, size) for lr in (0.1, 10) for size in (5, 40)}
    assert points[:12] == points[12:24] == points[24:]
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_runs_that_train_together_have_a_short_run_alone_for_each_arm_and_batch_size(
    study_of: StudyOf, tmp_path: Path
) -> None:
    grid = ARMS.replace("[0.1, 1, 10]}", "[1, 10], train.batch_size: [10, 20]}")
    schedule = "\nschedule: {kind: cosine, warmup: 600}"
    asked = study_of(BASE + schedule + grid.replace("normed: {norm: batch}", "normed: {train: {precision: bf16}}"))
    found = carried_out(asked, lambda job: 100.0)
    costs = [one for one in found if one.phase == "cost"]
    assert [(one.arm, one.point["train.batch_size"]) for one in costs] == [("plain", 10), ("plain", 20)]
    jobs = [job for job in named_runs(asked, {one.key: one for one in found}).jobs if job.phase == "cost"]
    trains = [(job.recipe.train.steps, job.recipe.train.stop_at_target, job.company) for job in jobs]
    assert trains == [(500, False, "")] * 2
    planned = planned_comparison(asked, load(str(tmp_path / "recipe0.yaml")), {})
    assert [arm.alone for arm in planned.arms] == [None, "train.precision"]


def test_an_arm_that_fixes_a_field_of_the_grid_is_not_tuned_in_it(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS.replace("normed:", "slow: {optimizer: {lr: 0.01}}\n  normed:"))
    slow = of_arm("slow", named_runs(asked, {}).jobs)
    assert [job.seed for job in slow] == [7, 8, 9]  # as many seeds as the others, further ones once these have ended
    records = {job.key: record(job, None) for job in slow}
    further = [job for job in of_arm("slow", named_runs(asked, records).jobs) if job.phase == "report"]
    assert [job.seed for job in further] == [10, 11, 12, 13, 14]
    assert {job.point["optimizer.lr"] for job in [*slow, *further]} == {0.01}
    assert {job.recipe.optimizer.lr for job in slow} == {0.01}
    assert asked.plan.fixed["slow"] == ("optimizer.lr",)


def test_several_grid_fields_make_every_combination(study_of: StudyOf) -> None:
    grid = ARMS.replace("[0.1, 1, 10]}", "[0.1, 1], train.batch_size: [10, 20]}")
    jobs = of_arm("plain", named_runs(study_of(BASE + grid), {}).jobs)
    assert len({tuple(job.point.values()) for job in jobs}) == 4


def test_without_a_grid_nothing_is_tuned(study_of: StudyOf) -> None:
    asked = study_of(BASE + UNTUNED.replace("5", "4"))
    assert {job.phase for job in named_runs(asked, {}).jobs} == {"report", "cost"}
    assert named_runs(asked, {}).planned == 8 + 2


def test_a_key_depends_on_recipe_and_identity_and_not_on_the_arms_name(asked: Study, study_of: StudyOf) -> None:
    renamed = study_of(BASE + ARMS.replace("normed", "other name"))
    assert keys(asked) == keys(renamed)
    elsewhere = replace(asked, identity={"torch": "another"}, _jobs={})
    assert not {*keys(asked)} & {*keys(elsewhere)}


def test_data_that_changed_on_disk_make_new_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", x=np.zeros((40, 8), np.float32), y=np.arange(40) % 3)
    base = BASE[BASE.index("optimizer") :].replace("batch_size: 20", "batch_size: 10") + ARMS
    data = "data: {source: npz, path: mine.npz, held_out: 5}\n"
    (tmp_path / "own.yaml").write_text(f"{data}model: {{kind: mlp, hidden: [8]}}\n{base}")

    def found() -> set[str]:
        loaded = load("own.yaml")
        return {*keys(study([loaded], identity("cpu", loaded.base)))}

    with pytest.raises(RecipeError, match=r"arm plain: model\.kind: a cnn needs images and the data are vectors"):
        study([load("own.yaml", ["model={kind: cnn, channels: [4]}"])])
    before = found()
    assert found() == before
    np.savez("mine.npz", x=np.ones((41, 8), np.float32), y=np.arange(41) % 3)
    assert not found() & before


def test_an_added_arm_costs_only_its_own_runs(asked: Study, study_of: StudyOf) -> None:
    records = {one.key: one for one in carried_out(asked, lambda job: 100.0)}
    more = study_of(BASE + ARMS.replace("normed:", "layer: {norm: layer}\n  normed:"))
    assert {job.arm for job in named_runs(more, records).jobs if job.key not in records} == {"layer"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("digits", "scikit-learn's digits"),
        ("{source: mnist}", "mnist-5k"),
        ("{source: mnist, binary: true}", "mnist-5k (binary)"),
        ("{source: synthetic}", "synthetic data"),
    ],
)
def test_the_data_are_named_for_titles(study_of: StudyOf, source: str, words: str) -> None:
    base = BASE.replace("{source: synthetic, shape: [8], classes: 3, examples: 200, held_out: 50}", source)
    assert study_of(base + ARMS).plan.data == words


def test_recipes_without_arms_are_arms_of_their_files_names(study_of: StudyOf) -> None:
    asked = study_of(BASE, BASE + "norm: batch")
    assert asked.plan.arms == ("recipe0", "recipe1")
    assert asked.plan.reference == "recipe0"


def test_arms_of_two_files_that_share_a_name_get_their_files_name(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS, BASE + ARMS.replace("normed", "layered").replace("batch}", "layer}"))
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
        ([BASE + ARMS.replace("tune: 3", "tune: 2")],
         r"recipe0\.yaml:\d+: seeds.tune: 2 cannot show how sure the choice among the grid's points is; write 3"),
        ([BASE.replace("steps: 1000", "steps: {epochs: 4}") + "arms: {a: {}, b: {train: {batch_size: 10}}}"],
         "arm b: train.steps differs from arm a's; epochs are another number of steps at another batch size: write "
         "steps, which are the same for every arm"),
        ([BASE, BASE.replace("evaluate_every: 5", "evaluate_every: {points_per_doubling: 8}")],
         "arm recipe1: train.evaluate_every differs"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_the_reason(study_of: StudyOf, texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        study_of(*texts)


# --- claims -----------------------------------------------------------------------------------------------------------

SEARCH = "\nlargest_learning_rate: {steps: 300, accuracy: 0.8}"
CLAIM = "\nclaims: [{say: so, measure: largest_learning_rate, arm: %s, over: plain, at_least: 3}]"


def test_claims_are_part_of_the_plan_with_the_bound_of_no_difference_where_they_state_none(study_of: StudyOf) -> None:
    each = ["final, at_least: -0.01", "final, expect: less", "steps_to_target, expect: more", "best, at_most: 0"]
    lines = "".join(f"\n  - {{say: so, arm: normed, over: plain, measure: {one}}}" for one in each)
    claims = study_of(BASE + UNTUNED + "\nclaims:" + lines).plan.claims
    assert [(claim.bound, claim.side, claim.bounded) for claim in claims] == [
        (-0.01, "at least", True), (0, "at most", False), (1, "at least", False), (0, "at most", True),
    ]  # fmt: skip


def test_claims_of_several_files_are_about_their_own_arms(study_of: StudyOf) -> None:
    other = BASE + ARMS.replace("normed", "layered").replace("batch}", "layer}") + SEARCH + CLAIM % "layered"
    asked = study_of(BASE + ARMS + CLAIM % "normed" + SEARCH, other)
    found = [(claim.arm, claim.over) for claim in asked.plan.claims]
    assert found == [("normed", "recipe0 plain"), ("layered", "recipe1 plain")]
    with pytest.raises(RecipeError, match=r"recipe1.yaml: largest_learning_rate differs from .*recipe0.yaml's"):
        study_of(BASE + ARMS + CLAIM % "normed" + SEARCH, other.replace("0.8", "0.7"))


def test_a_dry_run_lists_claims_and_counts_the_searches_apart(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(BASE + ARMS)
    without = planned_comparison(study([recipe := load(str(file))]), recipe)
    file.write_text(BASE + ARMS + SEARCH + CLAIM % "normed")
    found = planned_comparison(study([recipe := load(str(file))]), recipe)
    assert (found.runs, found.steps_at_most) == (without.runs, without.steps_at_most)
    assert (found.search_runs, found.search_steps, without.search_runs) == (2 * 5 * USUAL_RUNS, 300, 0)
    assert [claim.say for claim in found.claims] == ["so"]


def test_a_search_begins_at_the_arms_best_point_over_the_tuning_seeds(study_of: StudyOf) -> None:
    asked = study_of(BASE + ARMS + SEARCH + CLAIM % "normed")
    best = {"plain": 0.1, "normed": 10}
    records = carried_out(asked, lambda job: 100.0 if job.point["optimizer.lr"] == best[job.arm] else 500.0)
    starts = {record.arm: record.point for record in reversed(records) if record.phase == "rate"}
    assert starts == {arm: {"optimizer.lr": rate} for arm, rate in best.items()}


def test_only_the_report_seeds_are_probed_and_a_recipe_without_probes_keeps_its_keys(
    asked: Study, study_of: StudyOf
) -> None:
    probed = study_of(BASE + "probes: {measure: all}" + ARMS)
    assert keys(probed) == keys(asked)  # those of the tuning runs
    assert not set(keys_of_report(probed)) & set(keys_of_report(asked))


def keys_of_report(asked: Study) -> list[str]:
    return [job.key for arm in asked.arms for job in asked.jobs(arm, "report", asked.points(arm))]
