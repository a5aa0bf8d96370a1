"""`bncli compare`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bncli import __version__
from bncli.cli.options import (
    MOST_THREADS,
    AllowCode,
    Csv,
    Device,
    DryRun,
    Json,
    Markdown,
    Quiet,
    Recipes,
    RequireTarget,
    Set,
)
from bncli.cli.running import StopSignal, check_outputs, chosen_form, loaded_all, print_result, say, show_plan
from bncli.errors import CHECK_FAILED, RecipeError

if TYPE_CHECKING:
    from bncli.measure.compare import Study
    from bncli.recipe.file import Loaded
    from bncli.results import Comparison


def compare(
    recipes: Recipes = None,
    sets: Set = None,
    device: Device = "auto",
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--jobs", "-j", min=1, help="Runs at a time.  [default: one a core, or one a GPU]", show_default=False
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of each run.")] = 1,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out", "-o", help="Where runs are kept and found again.  [default: runs/NAME]", show_default=False
        ),
    ] = None,
    saved: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", help="Make the report again from a saved JSON or folder; train nothing."),
    ] = None,
    json: Json = False,
    csv: Csv = False,
    markdown: Markdown = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.svg|png", help="Draw curves and intervals (needs the extra bncli[plot])."),
    ] = None,
    html: Annotated[Optional[Path], typer.Option(metavar="FILE.html", help="Write a self-contained report.")] = None,  # noqa: UP045
    quiet: Quiet = False,
    dry_run: DryRun = False,
    require_target: RequireTarget = False,
    allow_code: AllowCode = False,
) -> None:
    """Train every arm over learning rates and seeds: how many times fewer steps to the target?

    Example: bncli compare recipes/digits.yaml --plot digits.svg
    """
    form = chosen_form(json, csv, markdown)
    if bool(recipes) == bool(saved):
        raise RecipeError("give a recipe, as in: bncli compare recipes/digits.yaml (or --from a saved comparison)")
    if saved:
        given = {"--set": sets, "--dry-run": dry_run, "--out": out, "--jobs": jobs}
        if idle := [option for option, value in given.items() if value]:
            raise RecipeError(f"{', '.join(idle)}: nothing is trained with --from, so that would have no effect")
    check_outputs(plot, html)
    stopped = 0
    if saved:
        comparison = _again(saved)
    else:
        from bncli.recipe.file import load

        if (recipes or []).count("-") > 1:
            raise RecipeError("- is standard input, which can be read only once")
        loaded = [load(path, sets or (), allow_code=allow_code) for path in recipes or ()]
        if dry_run:
            from bncli.measure.dry_run import of_comparison

            show_plan(of_comparison(loaded), json)
            return
        comparison, stopped = _run_comparison(loaded, device, jobs, threads, out, quiet)
    _show(comparison, form)
    _write(comparison, plot, html, quiet)
    if stopped:
        raise typer.Exit(stopped)
    if any(arm.failures for arm in comparison.arms):
        raise typer.Exit(CHECK_FAILED)
    if require_target and any(arm.hits < arm.runs for arm in comparison.arms):
        raise typer.Exit(CHECK_FAILED)


def _run_comparison(
    loaded: list[Loaded], device: str, jobs: int | None, threads: int, out: Path | None, quiet: bool
) -> tuple[Comparison, int]:
    from bncli.measure.compare import collect, planned_runs, study
    from bncli.measure.execute import execute
    from bncli.measure.pool import Pool
    from bncli.measure.summary import summarise
    from bncli.report.folder import ComparisonFolder
    from bncli.report.progress import CompareProgress

    asked: Study = study(loaded, identity(device))
    folder = ComparisonFolder(out or Path("runs") / asked.plan.name)
    records: dict[str, Any] = {}
    loaded_all()
    with folder, StopSignal() as stop, CompareProgress(quiet) as progress:
        pool = Pool(device, jobs, threads, folder.path / "logs")
        for event in execute(asked, folder, pool, records, stop):
            progress(event)
    comparison = summarise(asked.plan, collect(asked, records), planned_runs(asked, records))
    folder.finish(comparison)
    if stop.number:
        done, planned = len(comparison.runs), comparison.planned_runs
        say(f"Stopped: {done} of {planned} runs are kept in {folder.path}; the same command goes on from there", False)
    return comparison, stop.exit_code if stop.number else 0


def identity(device: str) -> dict[str, str]:
    """What a run's key depends on besides its recipe: another version or device makes it another run."""

    torch = importlib.metadata.version("torch")
    without_gpu = torch.endswith("+cpu") or (sys.platform == "linux" and not list(Path("/dev").glob("nvidia[0-9]*")))
    kind = "cpu" if device == "auto" and without_gpu else device.partition(":")[0]
    return {"bncli": __version__, "torch": torch, "device": kind}


def _again(saved: Path) -> Comparison:
    from bncli.measure.summary import summarise
    from bncli.report.folder import load_comparison

    found = load_comparison(saved)
    return summarise(found.plan, found.runs, found.planned_runs)


def _show(comparison: Comparison, form: str) -> None:
    """The comparison on stdout: tables and curves, or one of the forms for other programs."""
    from bncli.report import exports, record, tables

    if form != "table":
        print_result({"json": record.to_json, "csv": exports.to_csv, "markdown": exports.to_markdown}[form](comparison))
        return
    print_result(tables.comparison_report(comparison))


def _write(comparison: Comparison, plot: Path | None, html: Path | None, quiet: bool) -> None:
    if plot:
        from bncli.report.plots import plot as draw

        draw(comparison, plot)
        say(f"Drawn in {plot}", quiet)
    if html:
        from bncli.report.exports import to_html
        from bncli.report.record import write_atomically

        write_atomically(html, to_html(comparison))
        say(f"Written to {html}", quiet)
