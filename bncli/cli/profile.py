"""`bncli profile`: the kernel view, or with a recipe or a model the step view."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bncli.cli.console import StopSignal, chosen_form, listed, loaded_all, print_result, say
from bncli.cli.options import AllowCode, Csv, Device, Json, Markdown, Quiet, Set, Threads
from bncli.cli.profile_checks import (
    FEWEST_ROUNDS,
    SHAPE_SETS,
    check_files,
    check_gate,
    check_kernels,
    check_model,
    check_recipe,
    check_times,
    check_views,
)
from bncli.errors import CHECK_FAILED, INTERRUPTED, UNAVAILABLE, UsageError
from bncli.names import PROFILE_KERNELS, RECIPE_KERNELS

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
        typer.Option(
            metavar="SET", help=f"{', '.join(SHAPE_SETS)}, or a CSV file.  [default: resnet20, on a GPU resnet50]"
        ),
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
    check_recipe(recipe)
    check_views(
        of_steps,
        {"--operation": operation, "--dtype": dtype, "--layout": layout, "--shapes": shapes, "--shape": shape,
         "--batch": batch, "--warm": warm},
        {"--set": sets, "--arm": arm, "--input": inputs, "--trace": trace},
    )  # fmt: skip
    form = chosen_form(json, csv, markdown)
    check_times(seconds, quick, min_rounds, baseline)
    check_gate(form, baseline, fail_above, strict)
    kernels = RECIPE_KERNELS if kernel is None else listed(kernel)
    check_kernels(kernels, of_steps, baseline is not None, allow_code)
    check_model(model, inputs, recipe=recipe, sets=sets, arm=arm, allow_code=allow_code)
    earlier = check_files(plot, trace, baseline, of_steps)
    from bncli.measure.profile.kernel_memory import KernelPeaks

    # What a user's code prints is no result.
    with StopSignal(at_once=True), contextlib.redirect_stdout(sys.stderr), KernelPeaks(allow_code) as peaks:
        if not of_steps and not device.startswith("cuda"):
            peaks.start()  # it loads torch while this process does
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
                own_shapes=shape or (), batch=batch, cold=not warm, peaks=peaks,
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
    from bncli.report.profile.notes import busy_words
    from bncli.results.profile import KernelProfile

    if isinstance(result, KernelProfile) and (busy := busy_words(result)):
        say(f"{busy}; do not keep this for a baseline", quiet)


def _exit_code(result: KernelProfile | StepProfile, gate: Gate | None) -> int:
    """1 for a wrong result or where the gate fails, 3 where nothing but native could run though more was asked for."""
    if any(row.wrong for row in result.rows) or (gate is not None and gate.failed):
        return CHECK_FAILED
    others = [row for row in result.rows if row.kernel not in (None, "native")]
    return UNAVAILABLE if others and all(row.error is not None for row in others) else 0
