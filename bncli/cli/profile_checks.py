"""What `bncli profile` refuses before torch is loaded: options that do not go together, files that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.cli.console import check_kernel_name, check_outputs
from bncli.errors import RecipeError
from bncli.names import PROFILE_KERNELS, RECIPE_KERNELS

if TYPE_CHECKING:
    from bncli.results.profile import KernelProfile, StepProfile

FEWEST_ROUNDS = 6  # that of bncli.measure.timing.speedup
SHAPE_SETS = ("resnet20", "resnet50", "inception", "mlp")  # those of bncli.measure.profile.shapes


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
        check_kernel_name(name, allow_code, PROFILE_KERNELS)
    if of_steps and (others := [name for name in kernels if name not in RECIPE_KERNELS]):
        raise RecipeError(f"--kernel {', '.join(others)}: models are trained with {' and '.join(RECIPE_KERNELS)} alone")
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


def check_times(seconds: float | None, quick: bool, min_rounds: int, baseline: Path | None) -> None:
    """Refuse a time that is none, two times, and too few rounds for a verdict."""
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise RecipeError(f"--time {seconds:g}: expected seconds, more than 0")
    if seconds is not None and quick:
        raise RecipeError("--time and --quick: choose one; both say how long to measure")
    if baseline and min_rounds < FEWEST_ROUNDS:
        raise RecipeError(
            f"--min-rounds {min_rounds} with --baseline: a verdict needs intervals, and those at least "
            f"{FEWEST_ROUNDS} rounds"
        )


def check_gate(form: str, baseline: Path | None, fail_above: float | None, strict: bool) -> None:
    """Refuse a bound that is none, options of the gate without one, and a form that has no place for the verdicts."""
    if fail_above is not None:
        from bncli.measure.profile.baseline import check_fail_above

        check_fail_above(fail_above)
    idle = [option for option, value in {"--fail-above": fail_above, "--strict": strict}.items() if value]
    if idle and baseline is None:
        raise RecipeError(f"{', '.join(idle)}: without --baseline FILE.json nothing is compared; give one")
    if form == "csv" and baseline:
        raise RecipeError("--csv with --baseline: the verdicts have no place in the CSV; use --json or --markdown")


def check_files(
    plot: Path | None, trace: Path | None, baseline: Path | None, of_steps: bool
) -> KernelProfile | StepProfile | None:
    """The baseline, if one is named. Refuses before any work what could not be read, or written, after it."""
    check_outputs(plot, trace)
    if baseline is None:
        return None
    from bncli.measure.profile.baseline import check_view
    from bncli.report.profile.export import load
    from bncli.results.profile import KernelProfile, StepProfile

    earlier = load(baseline)
    check_view(earlier, StepProfile if of_steps else KernelProfile, baseline)
    ratios = [row.faster for row in earlier.rows if row.faster is not None]
    if unbounded := sum(None in (ratio.interval.low, ratio.interval.high) for ratio in ratios):
        raise RecipeError(
            f"--baseline {baseline}: {unbounded} of its {len(ratios)} ratios to native come from too few rounds for an "
            f"interval, so nothing can be held to them; measure it anew, with {FEWEST_ROUNDS} rounds or more"
        )
    return earlier
