"""`bncli profile`: the kernel view, or with a recipe or a model the step view."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bncli.cli import options
from bncli.cli.console import StopSignal, enable_gc, given_options, listed, log, print_result
from bncli.cli.output import Output, origin
from bncli.errors import CHECK_FAILED, CODE_OF_YOURS, INTERRUPTED, UNAVAILABLE, UsageError
from bncli.measure.profile.shapes import MOST_SIZE, SETS
from bncli.names import PROFILE_KERNELS, RECIPE_KERNELS, check_kernel
from bncli.results.environment import FEWEST_ROUNDS

if TYPE_CHECKING:
    from bncli.measure.profile.kernels import KernelRun
    from bncli.measure.profile.run import Options
    from bncli.measure.profile.steps import StepRun
    from bncli.results.profile import Gate, Profile

SECONDS, QUICK_SECONDS = 45.0, 9.0  # of measuring; the rest is loading torch and checking
FAIL_ABOVE = 1.10
# Options by the heading under which the help has them.
MeasuredOption = partial(typer.Option, rich_help_panel="Both views")
KernelOption = partial(typer.Option, rich_help_panel="Kernel view")
StepOption = partial(typer.Option, rich_help_panel="Step view: a recipe, or your own model")
TimeOption = partial(typer.Option, rich_help_panel="Time")
BaselineOption = partial(typer.Option, rich_help_panel="Baseline")
KERNEL_VIEW = ("operations", "dtypes", "layouts", "shapes", "own_shapes", "batch", "warm")  # options of this view alone
STEP_VIEW = ("sets", "arm", "inputs", "trace")


@dataclass(frozen=True)
class _Asked:
    """Options of both views."""

    device: str
    threads: int | None
    kernels: tuple[str, ...]
    seconds: float
    min_rounds: int
    allow_code: bool
    output: Output
    baseline: Path | None
    fail_above: float
    strict: bool
    recipes: dict[str, Any]  # arm -> its recipe with all defaults, for a page


def profile(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="YAML recipe or folder of a run, for the step view; without one: kernel view."
        ),
    ] = None,
    sets: options.Set = None,
    arm: options.ArmName = None,
    model: Annotated[
        str | None,
        StepOption(metavar="MODULE:FUNCTION", help="Your own model, for the step view; needs --input, --allow-code."),
    ] = None,
    inputs: Annotated[
        str | None, StepOption("--input", metavar="BxCxHxW", help="Shape of --model's input, with the batch.")
    ] = None,
    device: options.Device = "auto",
    kernels: Annotated[
        list[str] | None,
        MeasuredOption(
            "--kernel",
            metavar="KERNELS",
            help=f"{', '.join(PROFILE_KERNELS)}, or your own as package.module:function; may be repeated.  "
            "[default: native,fused]",
        ),
    ] = None,
    operations: Annotated[
        list[str] | None,
        KernelOption("--operation", metavar="OPERATIONS", help="bn, bn+relu, bn+add+relu, ...  [default: the model's]"),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        KernelOption("--dtype", metavar="DTYPES", help="fp32, bf16, fp16 or fp64.  [default: fp32, on a GPU bf16]"),
    ] = None,
    layouts: Annotated[
        list[str] | None,
        KernelOption("--layout", metavar="LAYOUTS", help="contiguous or channels_last.  [default: both]"),
    ] = None,
    shapes: Annotated[
        str | None,
        KernelOption(metavar="SET", help=f"{', '.join(SETS)}, or a CSV file.  [default: resnet20, on a GPU resnet50]"),
    ] = None,
    own_shapes: Annotated[
        list[str] | None, KernelOption("--shape", metavar="NxCxHxW", help="Your own shape; may be repeated.")
    ] = None,
    batch: Annotated[
        int | None,
        KernelOption(min=1, max=MOST_SIZE, metavar="N", help="Batch size of --shapes.  [default: the set's own]"),
    ] = None,
    warm: Annotated[bool, KernelOption("--warm", help="Do not flush the cache before each sample.")] = False,
    threads: options.Threads = None,
    quick: Annotated[bool, TimeOption("--quick", help="Fewer samples: the default shapes in 15 s on 2 cores.")] = False,
    seconds: Annotated[
        float | None,
        TimeOption(
            "--time",
            metavar="SECONDS",
            help=f"How long to measure; longer where --min-rounds takes longer.  [default: {SECONDS:g}]",
        ),
    ] = None,
    min_rounds: Annotated[
        int,
        TimeOption(
            min=1, metavar="N", help=f"Fewest rounds per ratio, whatever the time; an interval needs {FEWEST_ROUNDS}."
        ),
    ] = FEWEST_ROUNDS,
    json: options.Json = False,
    csv: options.Csv = False,
    markdown: options.Markdown = False,
    latex: options.Latex = False,
    plot: options.Plot = None,
    plot_width: options.PlotWidth = None,
    no_caption: options.NoCaption = False,
    html: options.Html = None,
    junit: Annotated[
        Path | None, BaselineOption(metavar="FILE.xml", help="Write a JUnit report of the verdicts on --baseline.")
    ] = None,
    trace: Annotated[
        Path | None, StepOption(metavar="FILE.json", help="Write a Chrome trace of one training step per kernel.")
    ] = None,
    baseline: Annotated[
        Path | None,
        BaselineOption(metavar="FILE.json", help="Compare with a saved --json profile; exit 1 on a regression."),
    ] = None,
    fail_above: Annotated[
        float,
        BaselineOption(metavar="RATIO", help="With --baseline: the slowdown above which a row is a regression."),
    ] = FAIL_ABOVE,
    strict: Annotated[
        bool, BaselineOption("--strict", help="With --baseline: exit 1 also where the intervals are inconclusive.")
    ] = False,
    quiet: options.Quiet = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Measure the time and memory of batch norm on this machine.

    Kernel view: each kernel at each shape, next to the machine's bandwidth. Step view, with a recipe or --model: whole
    training and evaluation steps.

    Example: bncli profile --shapes resnet50 --plot costs.svg
    """
    of_steps = recipe is not None or model is not None
    _check_recipe_name(recipe)
    from bncli.report.folder import recipe_in

    run = Path(recipe) if recipe and Path(recipe).is_dir() else None
    recipe = recipe_in(run) if run else recipe
    if idle := given_options(context, *(KERNEL_VIEW if of_steps else STEP_VIEW)):
        view = "the kernel view: omit the recipe or --model" if of_steps else "the step view: give a recipe"
        raise UsageError(f"{idle} {'belong' if ',' in idle else 'belongs'} to {view}")
    output = Output.of(context)
    _check_times(seconds, quick, min_rounds, baseline)
    _check_gate(context, output.form, baseline, fail_above)
    asked = _Asked(
        device=device,
        threads=threads,
        kernels=RECIPE_KERNELS if kernels is None else listed(kernels),
        seconds=QUICK_SECONDS if quick else SECONDS if seconds is None else seconds,
        min_rounds=min_rounds,
        allow_code=allow_code,
        output=output,
        baseline=baseline,
        fail_above=fail_above,
        strict=strict,
        # Standard input cannot be read twice.
        recipes=_resolved(recipe, sets or [], arm) if html and recipe and recipe != "-" else {},
    )
    for name in asked.kernels:
        check_kernel(name, PROFILE_KERNELS, allow_code)
    if of_steps:
        _profile_steps(asked, recipe, run, model, sets or [], arm, inputs, trace)
    else:
        names = {"operations": listed(operations), "dtypes": listed(dtypes), "layouts": listed(layouts)}
        _profile_kernels(asked, **names, shapes=shapes, own_shapes=own_shapes or (), batch=batch, cold=not warm)


# --- the two views ----------------------------------------------------------------------------------------------------


def _profile_kernels(asked: _Asked, **of_cases: Any) -> None:
    """The kernel view. of_cases: those of `measure.profile.run.kernel_run`."""
    from bncli.report.profile.kernels import KernelReport
    from bncli.results.profile import KernelProfile

    earlier = _checked_baseline(asked, KernelProfile)
    asked.output.check()
    from bncli.measure.profile import memory

    # What a user's code prints is no result.
    with (
        StopSignal(at_once=True) as stop,
        contextlib.redirect_stdout(sys.stderr),
        contextlib.closing(memory.kernel_processes()) as processes,
    ):
        if memory.MEASURED and not asked.device.startswith("cuda"):
            processes.start()  # it loads torch while this process does
        from bncli.measure.profile.run import kernel_run

        run = kernel_run(_run_options(asked), **of_cases, processes=processes)
        stopped = _measure(run, stop, asked.output.quiet)
    _finish(asked, run.result(), stopped, earlier, KernelReport)


def _profile_steps(
    asked: _Asked,
    recipe: str | None,
    run_folder: Path | None,
    model: str | None,
    sets: list[str],
    arm: str | None,
    inputs: str | None,
    trace: Path | None,
) -> None:
    """The step view of a recipe, of that in a run's folder, or of the user's own model."""
    from bncli.report.profile.steps import StepReport
    from bncli.results.profile import StepProfile

    if others := [name for name in asked.kernels if name not in RECIPE_KERNELS]:
        raise UsageError(
            f"--kernel {', '.join(others)}: models can only be trained with {' and '.join(RECIPE_KERNELS)}"
        )
    if model is not None:
        _check_model(model, recipe, sets, arm, inputs, asked.allow_code)
    elif inputs is not None:
        raise UsageError(f"--input {inputs}: it belongs to --model; a recipe's data have a shape")
    earlier = _checked_baseline(asked, StepProfile)
    asked.output.check(trace)
    with StopSignal(at_once=True) as stop, contextlib.redirect_stdout(sys.stderr):
        from bncli.measure.profile.run import model_run, recipe_run

        if recipe is not None:
            run = recipe_run(_run_options(asked), recipe, sets, arm, trace, "--set", run_folder)
        else:
            run = model_run(_run_options(asked), model or "", inputs or "", trace)
        stopped = _measure(run, stop, asked.output.quiet)
    if trace and trace.exists():
        log(f"Trace of one step per kernel written to {trace}: open it at https://ui.perfetto.dev", asked.output.quiet)
    _finish(asked, run.result(), stopped, earlier, StepReport)


def _resolved(recipe: str, sets: list[str], arm: str | None) -> dict[str, Any]:
    """Arm -> its recipe with all defaults."""
    from bncli.recipe.load import load, plain

    loaded = load(recipe, sets, allow_code=True, sets_from="--set")
    return {each.name: plain(each.recipe) for each in (not arm and loaded.arms) or [loaded.arm(arm or loaded.name)]}


def _run_options(asked: _Asked) -> Options:
    from bncli.measure.profile.run import Options

    enable_gc()
    return Options(asked.device, asked.threads, asked.kernels, asked.seconds, asked.min_rounds, asked.allow_code)


def _measure(run: KernelRun | StepRun, stop: StopSignal, quiet: bool) -> int:
    """Run it, showing the progress. The exit code of a signal that ended it before its time, or 0."""
    from bncli.report.progress import ProfileProgress

    try:
        with ProfileProgress(quiet) as progress:
            for event in stop.until(run.events()):
                progress(event)
    except KeyboardInterrupt as stopped:
        return getattr(stopped, "exit_code", INTERRUPTED)
    return 0


def _finish(
    asked: _Asked, result: Profile, stopped: int, earlier: Profile | None, report: Callable[[Any], object]
) -> None:
    """Compare the result with the baseline, show it, and exit.

    With 1 for a wrong result or where the gate fails, 3 where only native could run though more was asked for.
    """
    from bncli.report.profile import export, figure, page
    from bncli.report.profile.baseline import GateReport, to_junit
    from bncli.report.text import busy_words
    from bncli.results.profile import FOLDED

    gate: Gate | None = None
    incomparable = None
    if earlier is not None and result.rows:
        from bncli.measure.profile import baseline

        try:
            gate = baseline.gate(result, earlier, asked.fail_above, asked.strict)
        except UsageError as error:
            incomparable = error  # after what was measured is shown
    forms = {
        "table": report,
        "json": lambda found: export.to_json(found, gate),
        "csv": export.to_csv,
        "markdown": lambda found: export.to_markdown(found, gate),
        "latex": export.to_latex,
    }
    if asked.output.form != "table" and (busy := busy_words(row.cores_lacked for row in result.rows)):
        log(f"{busy}; do not use this as a baseline", asked.output.quiet)
    asked.output.show(result, forms)
    if gate is not None and asked.output.form == "table":
        print_result(GateReport(gate, result, earlier))
    if result.rows:
        asked.output.write(
            result,
            {"": figure.draw},
            html=lambda found: page.to_html(found, gate, *origin(asked.recipes)),
            junit=None if gate is None else lambda found: to_junit(found, gate),
        )
    if stopped:
        raise typer.Exit(stopped)
    if incomparable:
        raise incomparable
    if any(row.wrong for row in result.rows) or (gate is not None and gate.failed):
        raise typer.Exit(CHECK_FAILED)
    others = [row for row in result.rows if row.kernel not in (None, "native", FOLDED)]
    if others and all(row.error is not None for row in others):
        native = [row.error for row in result.rows if row.kernel == "native"]
        raise typer.Exit(CHECK_FAILED if native and None not in native else UNAVAILABLE)


# --- what is refused before torch is loaded ---------------------------------------------------------------------------


def _check_recipe_name(recipe: str | None) -> None:
    """Refuse a set of shapes, a shape or a file of shapes in the place of the recipe."""
    if recipe in SETS or (recipe or "").endswith(".csv"):
        raise UsageError(f"{recipe} is no recipe; for its shapes give --shapes {recipe}")
    if recipe and "x" in recipe and recipe.replace("x", "").isdigit():
        raise UsageError(f"{recipe} is no recipe; for that shape give --shape {recipe}")


def _check_model(
    model: str, recipe: str | None, sets: list[str], arm: str | None, inputs: str | None, allow_code: bool
) -> None:
    """Refuse what --model cannot be measured with."""
    if recipe is not None:
        raise UsageError(f"{recipe} and --model {model}: give one of them")
    if sets or arm:
        raise UsageError("--set and --arm change a recipe; with --model there is none")
    if not all(model.partition(":")):
        raise UsageError(f"--model {model}: expected package.module:function, as in models.small:make")
    if inputs is None:
        raise UsageError(f"--model {model}: give its input's shape too, as in --input 32x3x224x224")
    if not allow_code:
        raise UsageError(f"it is {CODE_OF_YOURS}", field="model", value=model, permission="allow_code")


def _check_times(seconds: float | None, quick: bool, min_rounds: int, baseline: Path | None) -> None:
    """Refuse a time that is not a positive number, two times, and too few rounds for a verdict."""
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"--time {seconds:g}: expected seconds, more than 0")
    if seconds is not None and quick:
        raise UsageError("--time and --quick: choose one; both say how long to measure")
    if baseline and min_rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"--min-rounds {min_rounds} with --baseline: a verdict needs intervals, which take at least "
            f"{FEWEST_ROUNDS} rounds"
        )


def _check_gate(context: typer.Context, form: str, baseline: Path | None, fail_above: float) -> None:
    """Refuse a bound that is none, options of the gate without a baseline, and a form without room for the verdicts."""
    from bncli.measure.profile.baseline import check_fail_above

    check_fail_above(fail_above)
    if baseline is None and (idle := given_options(context, "fail_above", "strict", "junit")):
        raise UsageError(f"{idle}: without --baseline FILE.json nothing is compared; give one")
    if form in ("csv", "latex") and baseline:
        raise UsageError(f"--{form} with --baseline: it has no place for the verdicts; use --json or --markdown")


def _checked_baseline(asked: _Asked, view: type[Profile]) -> Profile | None:
    """The baseline, if one is named. Refuses one that gives no ratio to compare with."""
    if asked.baseline is None:
        return None
    if "native" not in asked.kernels or len(asked.kernels) < 2:
        raise UsageError("--baseline: speedups over native are compared; name native and another kernel with --kernel")
    from bncli.measure.profile.baseline import check_view
    from bncli.report.profile.export import load

    earlier = load(asked.baseline)
    check_view(earlier, view, asked.baseline)
    ratios = [row.faster for row in earlier.rows if row.faster is not None]
    if unbounded := sum(None in (ratio.interval.low, ratio.interval.high) for ratio in ratios):
        raise UsageError(
            f"--baseline {asked.baseline}: {unbounded} of its {len(ratios)} ratios to native come from too few rounds "
            f"for an interval, so nothing can be compared with them; measure it with {FEWEST_ROUNDS} rounds or more"
        )
    return earlier
