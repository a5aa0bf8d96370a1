"""Files of weights: what they hold, and that a model made from one computes what the run's did."""

from __future__ import annotations

from pathlib import Path

import torch

import bncli
from bncli.engine.train import train
from bncli.engine.train.weights import MODEL, evaluate_weights, tensors_of
from bncli.results.train import RunFinished
from tests.conftest import tiny


def test_a_model_is_loaded_from_the_folder_of_its_run_and_evaluates_as_there(tmp_path: Path) -> None:
    recipe = tiny(train={"steps": 20, "stop_at_target": False})
    *_, last = train(recipe, "cpu", save={"model": (tmp_path / MODEL).write_bytes})  # type: ignore[dict-item]
    assert isinstance(last, RunFinished)
    content = (tmp_path / MODEL).read_bytes()
    model = bncli.load_model(tmp_path)
    assert not model.training
    state = model.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in tensors_of(content).items())
    found_recipe, found = evaluate_weights(content, "cpu")
    assert found_recipe == recipe
    assert (found.step, found.accuracy, found.loss) == (20, last.result.final, last.result.evaluations[-1].loss)
