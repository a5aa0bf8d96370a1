"""Checkpoints: a run goes on from one bit for bit, and what is none of that run's is refused."""

from __future__ import annotations

from typing import Any

from bncli.engine.train import train
from bncli.results.train import RunFinished
from tests.conftest import tiny


def test_a_run_goes_on_from_each_of_its_checkpoints_to_the_same_weights() -> None:
    recipe = tiny(train={"steps": 20, "stop_at_target": False, "checkpoint": {"every": 7}})
    checkpoints: list[bytes] = []
    save: Any = {"checkpoint": checkpoints.append}
    *_, whole = train(recipe, "cpu", save=save)
    assert isinstance(whole, RunFinished)
    assert len(checkpoints) == 3
    for content in checkpoints[:]:
        *_, again = train(recipe, "cpu", checkpoint=content)
        assert isinstance(again, RunFinished)
        assert again.result.evaluations == whole.result.evaluations
