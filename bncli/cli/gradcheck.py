"""`bncli gradcheck`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bncli.cli.console import StopSignal, listed, loaded_all, print_result
from bncli.cli.options import AllowCode, Device, Json, Quiet
from bncli.errors import CHECK_FAILED, INTERRUPTED, UsageError
from bncli.names import GRADCHECK_KERNELS, NormName, check_kernel

if TYPE_CHECKING:
    from bncli.results.gradcheck import CheckFailure, CheckGroup, Effort, Gradcheck


def gradcheck(
    kernels: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--kernel",
            metavar="KERNEL",
            help=f"{', '.join(GRADCHECK_KERNELS)}, or package.module:function (your own).  [default: native]",
            show_default=False,
        ),
    ] = None,
    norm: Annotated[NormName, typer.Option(help="The norm to check.")] = "batch",
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases: at most 15 s on 2 cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All cases, and how each tolerance is derived.")] = False,
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="CASE", help="Run the cases of this name alone.", show_default=False),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show what ignoring the mean's gradient does to a bias, and check nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    allow_code: AllowCode = False,
) -> None:
    """Check a kernel's gradients, path by path, against float64.

    Example: bncli gradcheck --quick
    """
    if quick and full:
        raise UsageError("--quick and --full: choose one, or neither for the checks in between")
    if demo:
        changed = {"--kernel": kernels, "--norm": norm != "batch", "--device": device != "auto"}
        given = {**changed, "--quick": quick, "--full": full, "--only": only, "--allow-code": allow_code}
        if idle := [option for option, value in given.items() if value]:
            raise UsageError(f"{', '.join(idle)}: nothing is checked with --demo, so that would have no effect")
        _show_demo(json)
        return
    names = ("native",) if kernels is None else listed(kernels)
    if len(names) != 1:
        several = ", ".join(names)
        raise UsageError(f"--kernel {several}: one kernel is checked at a time; run bncli gradcheck once for each")
    (kernel,) = names
    check_kernel(kernel, GRADCHECK_KERNELS, allow_code)
    effort: Effort = "quick" if quick else "full" if full else "default"
    groups: list[CheckGroup] = []
    try:
        result = _run_gradcheck(
            groups, quiet, kernel=kernel, norm=norm, device=device, effort=effort, only=only, allow_code=allow_code
        )
    except KeyboardInterrupt as stopped:
        _show_interrupted(groups, kernel, json)
        raise typer.Exit(getattr(stopped, "exit_code", INTERRUPTED)) from None  # Typer would make any of them 130
    from bncli.report.gradcheck import table, text

    commands = [rerun_command(result, failure) for failure in result.failures]
    print_result(text.to_json(result, commands) if json else table.GradcheckReport(result, commands))
    if not result.passed:
        raise typer.Exit(CHECK_FAILED)


def _run_gradcheck(groups: list[CheckGroup], quiet: bool, **asked: Any) -> Gradcheck:
    """The result of what is asked of `gradcheck.run`, each group put into `groups` as soon as it is finished."""
    from bncli.report.progress import GradcheckProgress

    # What a user's kernel prints must not get between the lines of a result.
    with StopSignal(at_once=True), GradcheckProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr):
        from bncli.measure.gradcheck import run as gradcheck
        from bncli.results.gradcheck import CheckGroup

        loaded_all()
        for found in gradcheck.run(**asked):
            if isinstance(found, CheckGroup):
                groups.append(found)
                progress(found)
            else:
                result = found
    return result


def _show_interrupted(groups: list[CheckGroup], kernel: str, as_json: bool) -> None:
    from bncli.report.gradcheck import table, text

    print_result(text.interrupted_to_json(groups) if as_json else table.interrupted_table(groups, kernel))


def _show_demo(as_json: bool) -> None:
    from bncli.measure.gradcheck.chain_rule import bias_demo
    from bncli.report.gradcheck import table, text

    steps = bias_demo()
    print_result(text.demo_to_json(steps) if as_json else table.demo_table(steps))


def rerun_command(result: Gradcheck, failure: CheckFailure) -> list[str]:
    """The words of the command that runs a failing case alone, or all, for what a whole run alone computes."""
    parts = ["bncli", "gradcheck", "--kernel", result.kernel]
    parts += ["--norm", result.norm] if result.norm != "batch" else []
    parts += ["--device", result.device] if result.device != "auto" else []
    parts += ["--allow-code"] if result.allow_code else []
    return parts if failure.check == "paths" else [*parts, "--only", failure.case]
