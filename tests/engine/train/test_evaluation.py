"""Evaluations: that they can be given up without a trace."""

from __future__ import annotations

import pytest
import torch

from bncli.engine import data
from bncli.engine.train.evaluation import evaluate
from bncli.engine.train.population import GivenUp
from bncli.engine.train.state import TrainState
from tests.conftest import TINY, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("statistics", ["running", "precise"])
def test_an_evaluation_that_is_given_up_leaves_the_run_as_it_was(statistics: str) -> None:
    many = {**TINY["data"], "held_out": 40_000}  # three chunks
    recipe = tiny(data=many, train={"population_statistics": statistics})
    state = TrainState(recipe, data.load(recipe.data, CPU), CPU)
    before = {name: each.clone() for name, each in state.model.state_dict().items()}
    with pytest.raises(GivenUp):
        evaluate(state, stop=lambda: True)
    assert state.runs[0].evaluations == []
    assert all(module.training for module in state.model.modules())
    assert all(torch.equal(each, before[name]) for name, each in state.model.state_dict().items())
