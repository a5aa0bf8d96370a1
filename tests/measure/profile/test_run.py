"""Runs made from the options' values: what is refused names the argument."""

from __future__ import annotations

from pathlib import Path

import pytest

from bncli.errors import UsageError
from bncli.measure.profile.memory import kernel_processes
from bncli.measure.profile.run import Options, kernel_run, model_run, recipe_run

SMOKE = str(Path(__file__).parents[3] / "recipes" / "smoke.yaml")
OPTIONS = Options("cpu", None, ("native", "fused"), 1.0, 6, allow_code=False)


def test_a_mistake_names_the_argument_and_its_value() -> None:
    with pytest.raises(UsageError, match=r"^dtypes fp8: expected some of"):
        kernel_run(
            OPTIONS, operations=(), dtypes=("fp8",), layouts=(), shapes=None, own_shapes=(), batch=None, cold=True,
            processes=kernel_processes(),
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"^inputs 3: expected the batch"):
        model_run(OPTIONS, "mine:make", "3", None)
    with pytest.raises(UsageError, match=r"^arm none: .*smoke.yaml has no arms"):
        recipe_run(OPTIONS, SMOKE, (), "none", None)
