"""A run made from the options' values: what is refused names the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bncli.errors import UsageError
from bncli.measure.profile.kernel_memory import KernelPeaks
from bncli.measure.profile.run import Options, kernel_run, model_run, recipe_run

SMOKE = str(Path(__file__).parents[3] / "recipes" / "smoke.yaml")
OPTIONS = Options("cpu", None, ("native", "fused"), 1.0, 6, allow_code=False)


def kernels(**changes: Any) -> None:
    options = {"operations": (), "dtypes": (), "layouts": (), "shapes": None, "own_shapes": (), "batch": None}
    kernel_run(OPTIONS, cold=True, peaks=KernelPeaks(), **{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"own_shapes": ("8x4",), "batch": 3}, "batch: a shape holds its own batch, its first number"),
        ({"shapes": "mine.csv", "batch": 3}, "batch: mine.csv holds its own"),
        ({"own_shapes": ("8",)}, "shape 8: expected the batch, the channels"),
        ({"shapes": "tiny"}, "shapes tiny: expected one of resnet50, resnet20"),
        ({"dtypes": ("fp8",)}, "dtypes fp8: expected some of"),
    ],
)
def test_a_mistake_names_the_argument_and_its_value(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError) as refused:
        kernels(**changes)
    assert str(refused.value).startswith(error)


def test_the_shape_of_a_models_input_and_an_arm_are_arguments_too() -> None:
    with pytest.raises(UsageError, match=r"^inputs 3: expected the batch"):
        model_run(OPTIONS, "mine:make", "3", None)
    with pytest.raises(UsageError, match=r"^arm none: .*smoke.yaml has no arms"):
        recipe_run(OPTIONS, SMOKE, (), "none", None)
