"""What `bncli profile` refuses before torch is loaded: options that do not go together, files that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.cli.running import KERNEL_NAMES, check_kernel_name, check_outputs
from bncli.errors import RecipeError

if TYPE_CHECKING:
    from bncli.results import KernelProfile, StepProfile

KERNELS = ("native", "fused", "compiled", "apex", "inplace_abn", "flag_gems")  # that can be named
SHAPE_SETS = ("resnet20", "resnet50", "inception", "mlp")  # those of bncli.measure.shapes


def check_views(of_steps: bool, of_kernel_view: dict[str, Any], of_step_view: dict[str, Any]) -> None:
    """Refuse the options of the other view. Each: option -> its value."""
    given = of_kernel_view if of_steps else of_step_view
    if idle := [option for option, value in given.items() if value]:
        of_kernels, of_a_step = "the kernel view: leave the recipe or --model away", "the step view: give a recipe"
        belongs = "belong" if len(idle) > 1 else "belongs"
        raise RecipeError(f"{', '.join(idle)} {belongs} to {of_kernels if of_steps else of_a_step}")


def check_kernels(kernels: tuple[str, ...], of_steps: bool, compared: bool, allow_code: bool) -> None:
    """Refuse names of none, those that no model can be trained with, and what gives no ratio to hold to a baseline."""
    for name in kernels:
        check_kernel_name(name, allow_code, KERNELS)
    if of_steps and (others := [name for name in kernels if name not in KERNEL_NAMES]):
        raise RecipeError(f"--kernel {', '.join(others)}: models are trained with {' and '.join(KERNEL_NAMES)} alone")
    if compared and ("native" not in kernels or len(kernels) < 2):
        raise RecipeError("--baseline: ratios to native are compared; name native and another with --kernel")


def check_recipe(recipe: str | None) -> None:
    """Refuse a set of shapes, a shape or a file of shapes in the place of the recipe."""
    if recipe in SHAPE_SETS or (recipe or "").endswith(".csv"):
        raise RecipeError(f"{recipe} is no recipe; for its shapes give --shapes {recipe}")
    if recipe and "x" in recipe and recipe.replace("x", "").isdigit():
        raise RecipeError(f"{recipe} is no recipe; for that shape give --shape {recipe}")


def check_model(
    model: str | None,
    inputs: str | None,
    *,
    recipe: str | None,
    sets: list[str] | None,
    arm: str | None,
    allow_code: bool,
) -> None:
    """Refuse what --model cannot be measured with."""
    if model is None:
        return
    if recipe is not None:
        raise RecipeError(f"{recipe} and --model {model}: give one of them")
    if sets or arm:
        raise RecipeError("--set and --arm change a recipe; with --model there is none")
    if not all(model.partition(":")):
        raise RecipeError(f"--model {model}: expected package.module:function, as in models.small:make")
    if inputs is None:
        raise RecipeError(f"--model {model}: give its input's shape too, as in --input 32x3x224x224")
    if not allow_code:
        raise RecipeError(f"--model {model} is code of yours that would run; allow it with --allow-code")


def check_gate(form: str, baseline: Path | None, fail_above: float) -> None:
    """Refuse a bound that is none, and a form that has no place for the verdicts."""
    if not (math.isfinite(fail_above) and fail_above > 1):
        raise RecipeError(f"--fail-above {fail_above}: expected more than 1, as in 1.10 for a tenth slower")
    if form == "csv" and baseline:
        raise RecipeError("--csv with --baseline: the verdicts have no place in the CSV; use --json or --markdown")


def check_files(
    plot: Path | None, trace: Path | None, baseline: Path | None, of_steps: bool
) -> KernelProfile | StepProfile | None:
    """The baseline, if one is named. Refuses before any work what could not be read, or written, after it."""
    check_outputs(plot, trace)
    if baseline is None:
        return None
    from bncli.report.cost_exports import load
    from bncli.results import StepProfile

    earlier = load(baseline)
    if isinstance(earlier, StepProfile) != of_steps:
        holds, asks = ("kernels", "a step") if of_steps else ("a step", "kernels")
        raise RecipeError(f"--baseline {baseline}: it holds the profile of {holds}, and this is one of {asks}")
    return earlier
