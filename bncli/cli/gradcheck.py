"""`bncli gradcheck`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli import options
from bncli.cli.console import StopSignal, enable_gc, given_options, listed, print_result
from bncli.cli.output import Output, origin
from bncli.errors import CHECK_FAILED, INTERRUPTED, UsageError
from bncli.names import GRADCHECK_KERNELS, NormName, check_kernel

if TYPE_CHECKING:
    from bncli.results.gradcheck import CheckFailure, CheckGroup, Effort, Gradcheck


def gradcheck(
    context: typer.Context,
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            metavar="KERNEL",
            help=f"{', '.join(GRADCHECK_KERNELS)}, or your own as package.module:function.  [default: native]",
        ),
    ] = None,
    norm: Annotated[NormName, typer.Option(help="Norm to check.")] = "batch",
    device: options.Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases: at most 15 s on 2 cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All cases, and how each tolerance is derived.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CASES", help="Run only the cases of these names or globs; may be repeated."),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="DTYPES", help="Only cases of fp32, bf16, fp16 or fp64.  [default: all]"),
    ] = None,
    threads: options.Threads = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show how a bias grows where the mean's gradient is ignored; check nothing.")
    ] = False,
    json: options.Json = False,
    csv: options.Csv = False,
    markdown: options.Markdown = False,
    latex: options.Latex = False,
    plot: options.Plot = None,
    plot_width: options.PlotWidth = None,
    no_caption: options.NoCaption = False,
    html: options.Html = None,
    junit: options.Junit = None,
    quiet: options.Quiet = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Check a kernel's results and gradients against float64.

    Example: bncli gradcheck --quick
    """
    if quick and full:
        raise UsageError("--quick and --full: choose one, or neither for the checks in between")
    output = Output.of(context)
    output.check()
    if plot and only:
        raise UsageError("--plot with --only: it draws dL/dx of a whole check; leave --only out")
    from bncli.report.gradcheck import figure, table, text

    if demo:
        used = ("demo", "plot", "plot_width", "no_caption", "json", "quiet")
        others = [str(each.name) for each in context.command.params if each.name not in used]
        if idle := given_options(context, *others):
            raise UsageError(f"{idle}: nothing is checked with --demo, so that would have no effect")
        from bncli.measure.gradcheck.chain_rule import bias_demo

        steps = bias_demo()
        output.show(steps, {"json": text.demo_to_json, "table": table.demo_table})
        output.write(steps, {"": figure.draw_demo})
        return
    names = ("native",) if kernels is None else listed(kernels)
    if len(names) != 1:
        several = ", ".join(names)
        raise UsageError(f"--kernel {several}: one kernel is checked at a time; run bncli gradcheck once for each")
    (kernel,) = names
    check_kernel(kernel, GRADCHECK_KERNELS, allow_code)
    effort: Effort = "quick" if quick else "full" if full else "default"
    from bncli.report.gradcheck import page
    from bncli.report.progress import GradcheckProgress

    groups: list[CheckGroup] = []
    try:
        # What a user's kernel prints must not get between the lines of a result.
        with (
            StopSignal(at_once=True) as stop,
            GradcheckProgress(quiet) as progress,
            contextlib.redirect_stdout(sys.stderr),
        ):
            from bncli.measure.gradcheck import run as checks
            from bncli.results.gradcheck import CheckGroup, Gradcheck

            enable_gc()
            run = checks.run(kernel, norm, device, effort, listed(only), allow_code, listed(dtypes), threads)
            for found in stop.until(run):
                if isinstance(found, Gradcheck):
                    result = found
                else:
                    groups += [found] if isinstance(found, CheckGroup) else []
                    progress(found)
    except KeyboardInterrupt as stopped:
        print_result(text.interrupted_to_json(groups) if json else table.interrupted_table(groups, kernel))
        raise typer.Exit(getattr(stopped, "exit_code", INTERRUPTED)) from None  # Typer would make any of them 130
    commands = [rerun_command(result, failure) for failure in result.failures]
    forms = {
        "table": lambda found: table.GradcheckReport(found, commands),
        "json": lambda found: text.to_json(found, commands),
        "csv": text.to_csv,
        "markdown": lambda found: text.to_markdown(found, commands),
        "latex": text.to_latex,
    }
    output.show(result, forms)
    output.write(
        result,
        {"": figure.draw_parts},
        html=lambda found: page.to_html(found, commands, origin({})[0]),
        junit=lambda found: text.to_junit(found, commands),
    )
    if not result.passed:
        raise typer.Exit(CHECK_FAILED)


def rerun_command(result: Gradcheck, failure: CheckFailure) -> list[str]:
    """The command that runs only a failing case, or everything for a check that needs a whole run."""
    parts = ["bncli", "gradcheck", "--kernel", result.kernel]
    parts += ["--norm", result.norm] if result.norm != "batch" else []
    parts += ["--device", result.device] if result.device != "auto" else []
    parts += [f"--{result.effort}"] if result.effort != "default" else []
    parts += ["--dtype", ",".join(result.dtypes)] if result.dtypes else []
    parts += ["--threads", str(result.threads)] if result.threads else []
    parts += ["--allow-code"] if result.allow_code else []
    return parts if failure.check == "paths" else [*parts, "--only", failure.case]
