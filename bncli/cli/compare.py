"""`bncli compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bncli.cli.console import StopSignal, check_outputs, chosen_form, loaded_all, print_result, say, show_plan
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
from bncli.errors import CHECK_FAILED, BncliError, UsageError

if TYPE_CHECKING:
    from bncli.measure.compare.plan import Study
    from bncli.recipe.load import Loaded
    from bncli.report.folder import ComparisonFolder
    from bncli.results.compare import Comparison, RunRecord


# Options without effect where nothing is trained, and the parameters that they set.
FOR_TRAINING = {
    "--set": "sets",
    "--dry-run": "dry_run",
    "--out": "out",
    "--jobs": "jobs",
    "--device": "device",
    "--threads": "threads",
    "--allow-code": "allow_code",
}


def compare(
    context: typer.Context,
    recipes: Recipes = None,
    sets: Set = None,
    device: Device = "auto",
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--jobs", "-j", min=1, help="Parallel runs.  [default: one per core or per GPU]", show_default=False
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
        raise UsageError("give a recipe, as in: bncli compare recipes/digits.yaml (or --from a saved comparison)")
    if saved and (idle := [option for option, name in FOR_TRAINING.items() if _given(context, name)]):
        raise UsageError(f"{', '.join(idle)}: nothing is trained with --from, so that would have no effect")
    check_outputs(plot, html)
    stopped = 0
    if saved:
        comparison = _again(saved, quiet)
    else:
        from bncli.recipe.load import load

        if (recipes or []).count("-") > 1:
            raise UsageError("- is standard input, which can be read only once")
        loaded = [load(path, sets or (), allow_code=allow_code, sets_from="--set") for path in recipes or ()]
        if dry_run:
            from bncli.measure.compare.plan import planned_comparison

            show_plan(planned_comparison(loaded), json)
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


def _given(context: typer.Context, parameter: str) -> bool:
    """Whether an option stands on the command line, be it at its default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _run_comparison(
    loaded: list[Loaded], device: str, jobs: int | None, threads: int, out: Path | None, quiet: bool
) -> tuple[Comparison, int]:
    from bncli.measure.compare import reuse
    from bncli.measure.compare.executors.processes import Processes
    from bncli.measure.compare.plan import collect, planned_runs, study, wanted
    from bncli.measure.compare.run import execute
    from bncli.measure.compare.summary import summarise
    from bncli.report.compare.notes import sentence
    from bncli.report.folder import ComparisonFolder
    from bncli.report.progress import CompareProgress
    from bncli.results.compare import Note

    asked: Study = study(loaded, reuse.identity(device, loaded[0].base))
    folder = ComparisonFolder(out or Path("runs") / asked.plan.name)
    loaded_all()
    with folder:
        kept = list(folder.finished().values())
        _begin(folder, asked, kept, threads, loaded)
        records = reuse.usable(kept)
        for note in reuse.not_reused(wanted(asked, records), kept, asked.identity):
            say(sentence(note), quiet)
        with StopSignal() as stop, CompareProgress(quiet) as progress:
            executor = Processes(device, jobs, threads, folder.path / "logs")
            for event in execute(asked, folder, executor, records, stop):
                progress(event)
        remarks = reuse.not_reused(wanted(asked, records), kept, asked.identity)
        latest = {record.key: record for record in reuse.of_one_code(records.values())}
        if left_out := len({record.key for record in collect(asked, records)} - latest.keys()):
            remarks.append(Note.of("earlier code", runs=left_out))
        if beside := folder.keep_other(asked.plan):
            remarks.append(Note.of("earlier answer", file=beside.name))
            say(f"{folder.path}: {sentence(remarks[-1])}", quiet)
        planned = planned_runs(asked, latest)
        comparison = summarise(asked.plan, collect(asked, latest), planned, threads, tuple(remarks))
        folder.finish(comparison)
    if stop.number:
        ended = len({run.key for run in comparison.runs})
        say(f"Stopped: {ended} of {planned} runs are kept in {folder.path}; the same command goes on from there", False)
    return comparison, stop.exit_code if stop.number else 0


def _begin(folder: ComparisonFolder, asked: Study, kept: list[RunRecord], threads: int, loaded: list[Loaded]) -> None:
    """Write the plan into the folder. Raises UsageError where its runs are another comparison's."""
    from bncli.measure.compare.reuse import fits
    from bncli.results.compare import BegunComparison

    sources = [str(Path(each.source).resolve()) for each in loaded if each.source != "standard input"]
    before = folder.begun()
    known = [record for record in kept if record.recipe_key]
    if known and not (before and set(sources) & set(before.sources)) and not fits(asked, known):
        of = f" of {', '.join(before.sources)}" if before and before.sources else ""
        raise UsageError(
            f"{folder.path}: holds {len(known)} runs of another comparison{of}, none of which fits this one; choose "
            "another folder with --out"
        )
    folder.begin(BegunComparison(asked.plan, asked.identity, threads, tuple(sources)))


def _again(saved: Path, quiet: bool) -> Comparison:
    """A saved answer, or the one that a folder's plan and runs give where they say more."""
    from bncli.measure.compare.reuse import report_of_runs, says_more
    from bncli.measure.compare.summary import summarise
    from bncli.report.folder import PLAN, ComparisonFolder, load_comparison

    folder = ComparisonFolder(saved)
    if saved.is_dir() and (begun := folder.begun()):
        try:
            made = report_of_runs(begun, folder.finished().values(), folder.failed().values())
        except BncliError as error:
            raise UsageError(f"--from {saved / PLAN}: {error}") from error
        answer = folder.answer()
        if answer is None or says_more(made, answer):
            why = "has no comparison.json" if answer is None else "holds runs that its comparison.json does not"
            say(f"{saved} {why}: the report is made from its plan and runs", quiet)
            return made
        if begun.plan != answer.plan:
            say(f"{saved}: the last call had another plan and has come to no run yet that is not in this report", quiet)
    found = load_comparison(saved)
    return summarise(found.plan, found.runs, found.planned_runs, found.threads, found.remarks)


def _show(comparison: Comparison, form: str) -> None:
    """The comparison on stdout: tables and curves, or one of the forms for other programs."""
    from bncli.report import files
    from bncli.report.compare import export
    from bncli.report.compare.table import ComparisonReport

    forms = {
        "table": ComparisonReport,
        "json": files.to_json,
        "csv": export.to_csv,
        "markdown": export.to_markdown,
    }
    print_result(forms[form](comparison))


def _write(comparison: Comparison, plot: Path | None, html: Path | None, quiet: bool) -> None:
    if plot:
        from bncli.report.compare.figure import plot as draw

        draw(comparison, plot)
        say(f"Drawn in {plot}", quiet)
    if html:
        from bncli.report.compare.export import to_html
        from bncli.report.files import write_atomically

        write_atomically(html, to_html(comparison))
        say(f"Written to {html}", quiet)
