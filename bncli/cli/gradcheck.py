"""`bncli gradcheck`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.console import StopSignal, enable_gc, given_options, listed, print_result
from bncli.cli.options import AllowCode, Device, Html, Json, Quiet
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
            show_default=False,
        ),
    ] = None,
    norm: Annotated[NormName, typer.Option(help="Norm to check.")] = "batch",
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases: at most 15 s on 2 cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All cases, and how each tolerance is derived.")] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="CASE", help="Run only the cases matching this name or glob.", show_default=False),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show how a bias grows where the mean's gradient is ignored; check nothing.")
    ] = False,
    json: Json = False,
    html: Html = None,
    quiet: Quiet = False,
    allow_code: AllowCode = False,
) -> None:
    """Check a kernel's results and gradients against float64.

    Example: bncli gradcheck --quick
    """
    if quick and full:
        raise UsageError("--quick and --full: choose one, or neither for the checks in between")
    if demo:
        if idle := given_options(context, "kernels", "norm", "device", "quick", "full", "only", "html", "allow_code"):
            raise UsageError(f"{idle}: nothing is checked with --demo, so that would have no effect")
        _show_demo(json)
        return
    names = ("native",) if kernels is None else listed(kernels)
    if len(names) != 1:
        several = ", ".join(names)
        raise UsageError(f"--kernel {several}: one kernel is checked at a time; run bncli gradcheck once for each")
    (kernel,) = names
    check_kernel(kernel, GRADCHECK_KERNELS, allow_code)
    output = Output(html=html, quiet=quiet)
    output.check()
    effort: Effort = "quick" if quick else "full" if full else "default"
    from bncli.report.gradcheck import page, table, text
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
            from bncli.results.gradcheck import CheckGroup

            enable_gc()
            for found in stop.until(
                checks.run(kernel=kernel, norm=norm, device=device, effort=effort, only=only, allow_code=allow_code)
            ):
                if isinstance(found, CheckGroup):
                    groups.append(found)
                    progress(found)
                else:
                    result = found
    except KeyboardInterrupt as stopped:
        print_result(text.interrupted_to_json(groups) if json else table.interrupted_table(groups, kernel))
        raise typer.Exit(getattr(stopped, "exit_code", INTERRUPTED)) from None  # Typer would make any of them 130
    commands = [rerun_command(result, failure) for failure in result.failures]
    print_result(text.to_json(result, commands) if json else table.GradcheckReport(result, commands))
    output.write(result, html=lambda found: page.to_html(found, commands, origin({})[0]))
    if not result.passed:
        raise typer.Exit(CHECK_FAILED)


def _show_demo(as_json: bool) -> None:
    from bncli.measure.gradcheck.chain_rule import bias_demo
    from bncli.report.gradcheck import table, text

    steps = bias_demo()
    print_result(text.demo_to_json(steps) if as_json else table.demo_table(steps))


def rerun_command(result: Gradcheck, failure: CheckFailure) -> list[str]:
    """The command that runs only a failing case, or everything for a check that needs a whole run."""
    parts = ["bncli", "gradcheck", "--kernel", result.kernel]
    parts += ["--norm", result.norm] if result.norm != "batch" else []
    parts += ["--device", result.device] if result.device != "auto" else []
    parts += ["--allow-code"] if result.allow_code else []
    return parts if failure.check == "paths" else [*parts, "--only", failure.case]
