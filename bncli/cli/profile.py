"""`bncli profile`: the kernel view, or with a recipe or a model the step view."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bncli.cli.console import StopSignal, check_outputs, chosen_form, listed, loaded_all, print_result, say
from bncli.cli.options import AllowCode, Csv, Device, Json, Markdown, Quiet, Set, Threads
from bncli.errors import CHECK_FAILED, CODE_OF_YOURS, INTERRUPTED, UNAVAILABLE, UsageError
from bncli.measure.profile.shapes import SETS
from bncli.names import PROFILE_KERNELS, RECIPE_KERNELS, check_kernel
from bncli.results.environment import FEWEST_ROUNDS

if TYPE_CHECKING:
    from bncli.measure.profile.kernels import KernelRun
    from bncli.measure.profile.steps import StepRun
    from bncli.results.profile import Gate, KernelProfile, StepProfile

SECONDS, QUICK_SECONDS = 45.0, 9.0  # of measuring; the rest is loading torch and checking
FAIL_ABOVE = 1.10


def profile(
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[RECIPE]", help="A YAML recipe, for the step view; without one the kernel view."),
    ] = None,
    sets: Set = None,
    arm: Annotated[Optional[str], typer.Option(help="The step view of this arm of the recipe alone.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODULE:FUNCTION", help="The step view of your own model (with --input, --allow-code)."),
    ] = None,
    inputs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--input", metavar="BxCxHxW", help="The shape of --model's input, with the batch."),
    ] = None,
    device: Device = "auto",
    kernel: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="KERNELS",
            help=f"Of {', '.join(PROFILE_KERNELS)}, package.module:function; may be repeated.  [default: native,fused]",
        ),
    ] = None,
    operation: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="OPERATIONS", help="Of bn, bn+relu, bn+add+relu, ...  [default: what the model does]"),
    ] = None,
    dtype: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="DTYPES", help="Of fp32, bf16, fp16, fp64.  [default: fp32, on a GPU bf16]"),
    ] = None,
    layout: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="LAYOUTS", help="Of contiguous, channels_last.  [default: both]"),
    ] = None,
    shapes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SET", help=f"{', '.join(SETS)}, or a CSV file.  [default: resnet20, on a GPU resnet50]"),
    ] = None,
    shape: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NxCxHxW", help="A shape of your own; may be repeated."),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="The batch of a set of shapes.  [default: the set's own]", show_default=False),
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Do not flush the cache before each sample.")] = False,
    threads: Threads = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer samples: the default shapes in 15 s on 2 cores.")
    ] = False,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--time",
            metavar="SECONDS",
            help=f"How long to measure; longer where --min-rounds takes longer.  [default: {SECONDS:g}]",
        ),
    ] = None,
    min_rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds of each ratio, whatever the time; under 6 without interval.")
    ] = FEWEST_ROUNDS,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.svg|png", help="Draw the costs beside their ceilings (needs bncli[plot])."),
    ] = None,
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Write a Chrome trace of a training step (step view)."),
    ] = None,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    baseline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Hold each ratio to native to that of a saved --json."),
    ] = None,
    fail_above: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="RATIO",
            help="With --baseline: how many times slower is a regression (exit 1).  [default: 1.1]",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --baseline: exit 1 also where it cannot tell.")
    ] = False,
    quiet: Quiet = False,
    allow_code: AllowCode = False,
) -> None:
    """What batch norm costs in time and memory, beside what the machine can do.

    Example: bncli profile --shapes resnet50 --plot costs.svg
    """
    of_steps = recipe is not None or model is not None
    _check_recipe(recipe)
    _check_views(
        of_steps,
        {"--operation": operation, "--dtype": dtype, "--layout": layout, "--shapes": shapes, "--shape": shape,
         "--batch": batch, "--warm": warm},
        {"--set": sets, "--arm": arm, "--input": inputs, "--trace": trace},
    )  # fmt: skip
    form = chosen_form(json, csv, markdown)
    _check_times(seconds, quick, min_rounds, baseline)
    _check_gate(form, baseline, fail_above, strict)
    kernels = RECIPE_KERNELS if kernel is None else listed(kernel)
    _check_kernels(kernels, of_steps, baseline is not None, allow_code)
    _check_model(model, inputs, recipe=recipe, sets=sets, arm=arm, allow_code=allow_code)
    earlier = _check_files(plot, trace, baseline, of_steps)
    from bncli.measure.profile import memory

    # What a user's code prints is no result.
    with (
        StopSignal(at_once=True),
        contextlib.redirect_stdout(sys.stderr),
        contextlib.closing(memory.kernel_processes()) as processes,
    ):
        if memory.MEASURED and not of_steps and not device.startswith("cuda"):
            processes.start()  # it loads torch while this process does
        from bncli.measure.profile import run as profile_runs

        loaded_all()
        wished_s = QUICK_SECONDS if quick else SECONDS if seconds is None else seconds
        options = profile_runs.Options(device, threads, kernels, wished_s, min_rounds, allow_code)
        run: KernelRun | StepRun
        if recipe is not None:
            run = profile_runs.recipe_run(options, recipe, sets or (), arm, trace, sets_from="--set")
        elif model is not None:
            run = profile_runs.model_run(options, model, inputs or "", trace)
        else:
            run = profile_runs.kernel_run(
                options, operations=listed(operation), dtypes=listed(dtype), layouts=listed(layout), shapes=shapes,
                own_shapes=shape or (), batch=batch, cold=not warm, processes=processes,
            )  # fmt: skip
        stopped = _measure(run, quiet)
    result = run.result()
    gate, incomparable = _gate(result, earlier, FAIL_ABOVE if fail_above is None else fail_above, strict)
    _show(result, gate, earlier, form)
    if form != "table":
        _warn_of_busy_cores(result, quiet)
    if plot and result.rows:
        from bncli.report.profile import figure

        figure.draw(result, plot)
        say(f"Drawn in {plot}", quiet)
    if trace and trace.exists():
        say(f"Traced in {trace}: open it at https://ui.perfetto.dev", quiet)
    if incomparable and not stopped:
        raise incomparable
    code = stopped or _exit_code(result, gate)
    if code:
        raise typer.Exit(code)


def _measure(run: KernelRun | StepRun, quiet: bool) -> int:
    """Run it, showing how far it is. The exit code of a signal that ended it before its time, or 0."""
    from bncli.report.progress import ProfileProgress

    try:
        with ProfileProgress(quiet) as progress:
            for event in run.events():
                progress(event)
    except KeyboardInterrupt as stopped:
        return getattr(stopped, "exit_code", INTERRUPTED)
    return 0


def _gate(result: Any, earlier: Any, fail_above: float, strict: bool) -> tuple[Gate | None, UsageError | None]:
    """The verdicts, or why there are none; then what was measured is shown all the same."""
    if earlier is None or not result.rows:
        return None, None
    from bncli.measure.profile import baseline

    try:
        return baseline.gate(result, earlier, fail_above, strict), None
    except UsageError as error:
        return None, error


def _show(result: Any, gate: Gate | None, earlier: Any, form: str) -> None:
    from bncli.report.profile import export

    if form == "csv":
        print_result(export.to_csv(result))
    elif form == "table":
        from bncli.report.profile.baseline import GateReport
        from bncli.report.profile.kernels import KernelReport
        from bncli.report.profile.steps import StepReport
        from bncli.results.profile import StepProfile

        print_result(StepReport(result) if isinstance(result, StepProfile) else KernelReport(result))
        if gate is not None:
            print_result(GateReport(gate, result, earlier))
    else:
        print_result({"json": export.to_json, "markdown": export.to_markdown}[form](result, gate))


def _warn_of_busy_cores(result: KernelProfile | StepProfile, quiet: bool) -> None:
    from bncli.report.profile.text import busy_words
    from bncli.results.profile import KernelProfile

    if isinstance(result, KernelProfile) and (busy := busy_words(result)):
        say(f"{busy}; do not keep this for a baseline", quiet)


def _exit_code(result: KernelProfile | StepProfile, gate: Gate | None) -> int:
    """1 for a wrong result or where the gate fails, 3 where nothing but native could run though more was asked for."""
    if any(row.wrong for row in result.rows) or (gate is not None and gate.failed):
        return CHECK_FAILED
    others = [row for row in result.rows if row.kernel not in (None, "native")]
    return UNAVAILABLE if others and all(row.error is not None for row in others) else 0


# --- what is refused before torch is loaded ---------------------------------------------------------------------------


def _check_views(of_steps: bool, of_kernel_view: dict[str, Any], of_step_view: dict[str, Any]) -> None:
    """Refuse the options of the other view. Each: option -> its value."""
    given = of_kernel_view if of_steps else of_step_view
    if idle := [option for option, value in given.items() if value]:
        of_kernels, of_a_step = "the kernel view: leave the recipe or --model away", "the step view: give a recipe"
        belongs = "belong" if len(idle) > 1 else "belongs"
        raise UsageError(f"{', '.join(idle)} {belongs} to {of_kernels if of_steps else of_a_step}")


def _check_kernels(kernels: tuple[str, ...], of_steps: bool, compared: bool, allow_code: bool) -> None:
    """Refuse names of none, those that no model can be trained with, and what gives no ratio to hold to a baseline."""
    for name in kernels:
        check_kernel(name, PROFILE_KERNELS, allow_code)
    if of_steps and (others := [name for name in kernels if name not in RECIPE_KERNELS]):
        raise UsageError(f"--kernel {', '.join(others)}: models are trained with {' and '.join(RECIPE_KERNELS)} alone")
    if compared and ("native" not in kernels or len(kernels) < 2):
        raise UsageError("--baseline: ratios to native are compared; name native and another with --kernel")


def _check_recipe(recipe: str | None) -> None:
    """Refuse a set of shapes, a shape or a file of shapes in the place of the recipe."""
    if recipe in SETS or (recipe or "").endswith(".csv"):
        raise UsageError(f"{recipe} is no recipe; for its shapes give --shapes {recipe}")
    if recipe and "x" in recipe and recipe.replace("x", "").isdigit():
        raise UsageError(f"{recipe} is no recipe; for that shape give --shape {recipe}")


def _check_model(
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
        raise UsageError(f"{recipe} and --model {model}: give one of them")
    if sets or arm:
        raise UsageError("--set and --arm change a recipe; with --model there is none")
    if not all(model.partition(":")):
        raise UsageError(f"--model {model}: expected package.module:function, as in models.small:make")
    if inputs is None:
        raise UsageError(f"--model {model}: give its input's shape too, as in --input 32x3x224x224")
    if not allow_code:
        raise UsageError(f"it is {CODE_OF_YOURS}", field="model", value=model)


def _check_times(seconds: float | None, quick: bool, min_rounds: int, baseline: Path | None) -> None:
    """Refuse a time that is none, two times, and too few rounds for a verdict."""
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"--time {seconds:g}: expected seconds, more than 0")
    if seconds is not None and quick:
        raise UsageError("--time and --quick: choose one; both say how long to measure")
    if baseline and min_rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"--min-rounds {min_rounds} with --baseline: a verdict needs intervals, and those at least "
            f"{FEWEST_ROUNDS} rounds"
        )


def _check_gate(form: str, baseline: Path | None, fail_above: float | None, strict: bool) -> None:
    """Refuse a bound that is none, options of the gate without one, and a form that has no place for the verdicts."""
    if fail_above is not None:
        from bncli.measure.profile.baseline import check_fail_above

        check_fail_above(fail_above)
    idle = [option for option, value in {"--fail-above": fail_above, "--strict": strict}.items() if value]
    if idle and baseline is None:
        raise UsageError(f"{', '.join(idle)}: without --baseline FILE.json nothing is compared; give one")
    if form == "csv" and baseline:
        raise UsageError("--csv with --baseline: the verdicts have no place in the CSV; use --json or --markdown")


def _check_files(
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
        raise UsageError(
            f"--baseline {baseline}: {unbounded} of its {len(ratios)} ratios to native come from too few rounds for an "
            f"interval, so nothing can be held to them; measure it anew, with {FEWEST_ROUNDS} rounds or more"
        )
    return earlier
