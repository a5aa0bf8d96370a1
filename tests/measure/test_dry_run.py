"""What would be run, and how large it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bncli.measure.compare.plan import planned_comparison, study
from bncli.measure.dry_run import planned_training
from bncli.recipe.load import Loaded, load
from bncli.results.train import most_steps_to_target
from tests.measure.compare.conftest import ARMS, BASE

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(folder: Path, text: str) -> Loaded:
    (folder / "small.yaml").write_text(text)
    return load(str(folder / "small.yaml"))


def test_a_comparison_counts_its_runs_and_what_each_arm_changes(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BASE + ARMS)
    planned = planned_comparison(study([recipe]), recipe)
    assert (planned.runs, planned.steps_at_most) == (28, 28_000)
    plain, normed = planned.arms
    assert (plain.changes, plain.tuning_runs, plain.report_runs) == ((), 9, 5)
    assert normed.changes[0] == ("norm.kind", "batch")
    assert plain.parameters is not None
    assert normed.parameters == plain.parameters + 8  # for each unit a scale and a shift, and no bias
    assert planned.grid == {"optimizer.lr": (0.1, 1, 10)}


def test_one_training_run_is_one_run_of_the_arm_that_is_chosen(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BASE + ARMS)
    planned = planned_training(recipe, recipe.arms[1])
    assert (planned.name, planned.runs, planned.steps_at_most) == ("normed", 1, 1000)
    assert len(planned.arms) == 1


def test_the_papers_arms_are_planned_without_their_data() -> None:
    """Ioffe & Szegedy 2015, section 4.2: the rates, and in the last three a fifth of L2 and a decay 6 times faster."""
    recipe = load(str(RECIPES / "imagenet-inception.yaml"))
    planned = planned_comparison(study([recipe]), recipe)
    assert [arm.name for arm in planned.arms] == ["baseline", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]
    assert [arm.recipe.optimizer.lr for arm in recipe.arms] == [0.0015, 0.0015, 0.0075, 0.045, 0.0075]
    assert [arm.recipe.model.model_dump()["dropout"] for arm in recipe.arms] == [0.4, 0.4, 0, 0, 0]
    first, *_, last = (arm.recipe for arm in recipe.arms)
    assert first.optimizer.weight_decay == pytest.approx(5 * last.optimizer.weight_decay)
    assert first.schedule.model_dump()["every"] == pytest.approx(6 * last.schedule.model_dump()["every"], rel=1e-4)
    assert most_steps_to_target(recipe.base.train.steps) == pytest.approx(31.0e6)
    assert all(arm.parameters is not None and arm.memory_mib is not None for arm in planned.arms)
