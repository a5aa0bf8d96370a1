"""`bncli compare`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli import options
from bncli.cli.console import StopSignal, enable_gc, given_options, log, show_plan, system_errors
from bncli.cli.output import Output, origin
from bncli.errors import CHECK_FAILED, BncliError, UsageError

if TYPE_CHECKING:
    from bncli.measure.compare.cluster import Cluster
    from bncli.measure.compare.plan import Job, Study
    from bncli.measure.compare.processes import Processes
    from bncli.recipe.load import Loaded
    from bncli.report.compare.folder import ComparisonFolder
    from bncli.results.compare import Comparison, MemoryNeeded


NO_CLAIMS = "--require-claims: there are no claims; write them into the recipe under claims"


def compare(
    context: typer.Context,
    recipes: options.Recipes = None,
    sets: options.Set = None,
    device: options.Device = "auto",
    jobs: Annotated[
        int | None,
        options.MachineOption(
            "--jobs", "-j", min=1, metavar="N", help="Parallel runs.  [default: one per core or per GPU]"
        ),
    ] = None,
    threads: Annotated[int, options.ThreadsOption(help="CPU threads per run.")] = 1,
    run_timeout: Annotated[
        float | None,
        options.MachineOption(
            min=0.1,
            metavar="SECONDS",
            help="End a run that makes no step for so long; loading the data and compilation count.",
        ),
    ] = None,
    executor: Annotated[
        Literal["processes", "dask"],
        options.MachineOption(help="Train in processes of this machine, or on a Dask cluster."),
    ] = "processes",
    scheduler: Annotated[
        str | None,
        options.MachineOption(metavar="ADDRESS", help="Of the Dask cluster.  [default: a cluster on this machine]"),
    ] = None,
    out: Annotated[
        Path | None, options.FolderOption(help="Folder of the runs.  [default: runs/NAME, or runs/A+B]")
    ] = None,
    shard: Annotated[
        str | None,
        options.MachineOption(metavar="I/N", help="Do only the I-th of N shares of the runs, and wait for no others."),
    ] = None,
    saved: Annotated[
        Path | None,
        options.OutputOption("--from", metavar="FOLDER|FILE.json", help="Report on a saved comparison; train nothing."),
    ] = None,
    json: options.Json = False,
    csv: options.Csv = False,
    markdown: options.Markdown = False,
    latex: options.Latex = False,
    plot: options.Plot = None,
    plot_width: options.PlotWidth = None,
    no_caption: options.NoCaption = False,
    html: options.Html = None,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    full_grid: Annotated[
        bool,
        options.RecipeOption(
            "--full-grid", help="Train every point of the grid to its end, also those that can no longer be the best."
        ),
    ] = False,
    require_target: options.RequireTarget = False,
    require_claims: options.RequireClaims = False,
    allow_code: options.AllowCode = False,
) -> None:
    """Compare a recipe's arms by their steps to the target.

    Every arm is trained over the grid and several seeds, and compared at its best point of the grid.

    Example: bncli compare recipes/digits.yaml --plot digits.svg
    """
    output = Output.of(context)
    if bool(recipes) == bool(saved):
        raise UsageError("give a recipe, as in: bncli compare recipes/digits.yaml (or --from a saved comparison)")
    training = ("sets", "dry_run", "full_grid", "out", "jobs", "device", "threads", "run_timeout", "allow_code")
    if saved and (idle := given_options(context, *training, "executor", "scheduler", "shard")):
        raise UsageError(f"{idle}: nothing is trained with --from, so that would have no effect")
    if scheduler and executor != "dask":
        raise UsageError("is of no use without --executor dask", field="scheduler", value=scheduler)
    output.check()
    stopped = 0
    if saved:
        comparison = _saved_comparison(saved, quiet)
        if require_claims and not comparison.plan.claims:
            raise UsageError(NO_CLAIMS)
    else:
        from bncli.measure.compare.plan import study
        from bncli.measure.compare.processes import Processes
        from bncli.measure.compare.reuse import identity
        from bncli.recipe.load import load

        if (recipes or []).count("-") > 1:
            raise UsageError("- is standard input, which can be read only once")
        loaded = [load(path, sets or (), allow_code=allow_code, sets_from="--set") for path in recipes or ()]
        if require_claims and not any(each.file.claims for each in loaded):
            raise UsageError(NO_CLAIMS)
        asked = study(loaded, identity(device, loaded[0].base), full_grid)
        on = "cpu" if asked.identity["device"] == "cpu" else device  # then no worker has to be asked what there is
        made: Cluster | Processes
        if executor == "dask":
            from bncli.measure.compare.cluster import Cluster  # imports asyncio, which worker processes do without

            made = Cluster(device, jobs, threads, scheduler, run_timeout)
        else:
            made = Processes(on, jobs, threads, longest_silence_s=run_timeout)
        plan_as = output.form if dry_run else ""
        comparison, stopped = _run_comparison(asked, loaded, made, _share(shard), out, quiet, plan_as)
    folder = saved or out or Path("runs") / comparison.plan.name
    if stopped and output.form != "json" and not any(run.result for run in comparison.runs):
        goes_on = "continues from their checkpoints" if any(folder.glob("checkpoints/*.pt")) else "begins again"
        log(f"Stopped before any run ended; the same command {goes_on}")
        raise typer.Exit(stopped)
    done = f"{len({run.key for run in comparison.runs})} of {comparison.planned_runs} runs"
    if shard and not stopped and any(note.kind == "unfinished" for note in comparison.notes):
        log(
            f"Share {shard} is done: {done} are in {folder}. With the runs/*.json of all shares copied there, the same "
            "command goes on, and without --shard to the end"
        )
        raise typer.Exit(CHECK_FAILED if any(arm.failures for arm in comparison.arms) else 0)
    with system_errors(f"the runs in {folder} are kept; free space, then: bncli compare --from {folder}"):
        _show(comparison, output)
    if stopped:
        log(f"Stopped: {done} are kept in {folder}; the same command continues from there")
        raise typer.Exit(stopped)
    if output.form in ("table", "markdown"):
        _log_next(comparison, folder, output, bool(saved))
    missed = require_target and any(arm.hits < arm.runs for arm in comparison.arms)
    unfinished = any(note.kind == "unfinished" for note in comparison.notes)
    not_shown = require_claims and (unfinished or any(claim.verdict != "shown" for claim in comparison.claims))
    if missed or not_shown or any(arm.failures for arm in comparison.arms):
        raise typer.Exit(CHECK_FAILED)


def _share(shard: str | None) -> Callable[[str], bool]:
    """Whether a run, by its key, is of a share, given as 2/4. Raises UsageError."""
    if shard is None:
        return lambda key: True
    found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", shard)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError("write I/N, such as 2/4: the second of four shares", field="shard", value=shard)
    return lambda key: int(key, 16) % int(found[2]) == int(found[1]) - 1


def _run_comparison(
    asked: Study,
    loaded: list[Loaded],
    executor: Cluster | Processes,
    share: Callable[[str], bool],
    out: Path | None,
    quiet: bool,
    plan_as: str,
) -> tuple[Comparison, int]:
    """The comparison, and the exit code of the signal that ended it before its time, or 0.

    plan_as: the form in which a dry run prints its plan, which leaves by typer.Exit; empty for no dry run.
    """
    from bncli.measure.compare import reuse
    from bncli.measure.compare.plan import collect, known_runs, named_runs, planned_comparison
    from bncli.measure.compare.run import check, execute
    from bncli.report.compare.folder import ComparisonFolder
    from bncli.report.compare.notes import sentences
    from bncli.report.progress import CompareProgress
    from bncli.results.compare import BegunComparison, Note, RunRecord

    folder = ComparisonFolder(out or Path("runs") / asked.plan.name)
    enable_gc()
    with contextlib.ExitStack() as opened:
        if plan_as:
            executor.folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        else:
            executor.folder, executor.checkpoints = folder.path / "logs", folder.path / "checkpoints"
            kept_words = f"the runs in {folder.path} are kept; free space, and the same command continues"
            opened.enter_context(system_errors(kept_words))
            opened.enter_context(folder)
        opened.enter_context(contextlib.closing(executor))
        sources = _sources(folder, asked, loaded)
        records, kept = dict[str, RunRecord](), dict[str, RunRecord]()  # kept: of earlier calls

        def find(keys: set[str]) -> dict[str, RunRecord]:
            kept.update(reuse.usable(folder.finished(keys)))
            kept.update(folder.failures)
            return kept

        def not_reused(named: list[Job]) -> list[Note]:
            lost = [job for job in named if job.key not in kept]
            earlier = folder.finished({job.recipe_key for job in lost})
            earlier = [run for run in earlier if run.key not in records or run.code != records[run.key].code]
            return reuse.not_reused(lost, earlier, asked.identity)

        named = known_runs(asked, records, find)
        for words in sentences(not_reused(named.jobs)):
            log(words, quiet)
        _log_unfit(folder, quiet)
        if not plan_as and not folder.alone():
            log(f"{folder.path}: other calls are doing runs here too; each run is done by one of them", quiet)
        with StopSignal() as stop, CompareProgress(quiet) as progress:
            to_do = [job for job in named.to_do if share(job.key)]
            executor.jobs, memory = _jobs(asked, to_do, executor, quiet)
            checked = check(asked, to_do, executor, stop, progress.check, bool(plan_as))
            if plan_as:
                planned = planned_comparison(asked, loaded[0], records)
                show_plan(replace(planned, checked=checked and not stop.number, memory=memory), plan_as == "json")
                raise typer.Exit(stop.number and stop.exit_code)
            folder.begin(BegunComparison(asked.plan, asked.identity, executor.threads, sources))
            for event in execute(asked, folder.save, executor, records, stop, find, folder, share):
                progress(event)
        from bncli.measure.compare.summary import summarise  # imports scipy, which a dry run does without

        remarks = not_reused(named_runs(asked, records).jobs)
        folder.free(records)  # of which other calls may have ended more meanwhile
        known_runs(asked, records, find)
        _log_unfit(folder, quiet)
        latest = {record.key: record for record in reuse.of_one_code(records.values())}
        if left_out := len({record.key for record in collect(asked, records)} - latest.keys()):
            remarks.append(Note.of("earlier code", runs=left_out))
        if earlier := folder.keep_other(asked.plan):
            remarks.append(Note.of("earlier answer", file=earlier.name))
            log(f"{folder.path}: {sentences(remarks[-1:])[0]}", quiet)
        planned_runs = named_runs(asked, latest).planned
        comparison = summarise(asked.plan, collect(asked, latest), planned_runs, executor.threads, tuple(remarks))
        folder.finish(comparison)
    return comparison, stop.exit_code if stop.number else 0


def _jobs(
    asked: Study, to_do: list[Job], executor: Cluster | Processes, quiet: bool
) -> tuple[int | None, MemoryNeeded | None]:
    """How many runs at a time, and the memory that they need here. Raises UsageError where they are too many for it."""
    from bncli.measure.compare.processes import Processes, cores
    from bncli.measure.dry_run import memory_needed
    from bncli.report.dry_run import memory_words

    jobs, shared = executor.jobs, isinstance(executor, Processes) and hasattr(os, "memfd_create")
    if not isinstance(executor, Processes) and executor.scheduler:
        return jobs, None
    needed = memory_needed([job.recipe for job in to_do], jobs or cores(), shared)
    if asked.identity["device"] != "cpu" or (fits := needed.fitting) == needed.jobs:
        return jobs, needed
    if jobs:
        raise UsageError(f"{memory_words(needed)}; free memory, or use {fits}", field="jobs", value=jobs)
    log(f"--jobs {fits} instead of one per core: {memory_words(needed)}", quiet)
    return fits, replace(needed, jobs=fits)


def _sources(folder: ComparisonFolder, asked: Study, loaded: list[Loaded]) -> tuple[str, ...]:
    """The recipes' files. Raises UsageError where the runs of the folder are another comparison's."""
    from bncli.measure.compare.plan import named_runs

    sources = [str(Path(each.source).resolve()) for each in loaded if each.source != "standard input"]
    begun = folder.begun()
    before = begun.sources if begun else ()
    other = folder.count and not set(sources) & set(before)
    if other and not folder.finished({job.recipe_key for job in named_runs(asked, {}).jobs}):
        of = f" of {', '.join(before)}" * bool(before)
        raise UsageError(
            f"{folder.path}: contains {folder.count} runs of another comparison{of}, none of which fits this one; "
            "choose another folder with --out"
        )
    return tuple(sources)


def _log_unfit(folder: ComparisonFolder, quiet: bool) -> None:
    """Say which files of a folder could not be used, once."""
    if unfit := [f"{file} ({why})" for file, why in folder.unfit.items()]:
        more = f" and {len(unfit) - 3} more" if len(unfit) > 3 else ""
        log(f"{folder.path}: {len(unfit)} of its files cannot be used: {', '.join(unfit[:3])}{more}", quiet)
    folder.unfit.clear()


def _saved_comparison(saved: Path, quiet: bool) -> Comparison:
    """A saved answer, or the one that a folder's plan and runs give where they say more."""
    from bncli.measure.compare.reuse import report_of_runs, says_more
    from bncli.measure.compare.summary import summarise
    from bncli.report.compare.folder import ComparisonFolder, load_comparison
    from bncli.report.folder import PLAN

    folder = ComparisonFolder(saved)
    begun = folder.begun() if saved.is_dir() else None
    if begun is None:
        _log_unfit(folder, quiet)
    else:
        try:
            made = report_of_runs(begun, folder.finished, folder.failed().values())
        except BncliError as error:
            raise UsageError(str(error), field="saved", value=saved / PLAN) from error
        answer = folder.answer()
        _log_unfit(folder, quiet)
        if answer is None or says_more(made, answer):
            why = "has no comparison.json" if answer is None else "contains runs that its comparison.json does not"
            log(f"{saved} {why}: the report is made from its plan and runs", quiet)
            return made
        if begun.plan != answer.plan:
            log(f"{saved}: the last call had another plan and no run of it has ended that this report lacks", quiet)
    found = load_comparison(saved)
    return summarise(found.plan, found.runs, found.planned_runs, found.threads, found.remarks)


def _show(comparison: Comparison, output: Output) -> None:
    from bncli.report import files, layers
    from bncli.report.compare import export, figure, page
    from bncli.report.compare.table import ComparisonReport

    forms = {
        "table": ComparisonReport,
        "json": files.to_json,
        "csv": export.to_csv,
        "markdown": export.to_markdown,
        "latex": export.to_latex,
    }
    output.show(comparison, forms)
    plan = comparison.plan
    made = {"grid": plan.grid, "seeds": {"tune": plan.tune_seeds, "report": plan.report_seeds}}
    figures = {"": figure.draw} | ({"-layers": layers.draw} if layers.has_layers(comparison) else {})
    output.write(comparison, figures, lambda found: page.to_html(found, *origin(plan.recipes, **made)))


def _wider_grid(comparison: Comparison, again: str) -> str:
    """The command with a value beyond the edge that a best point is at, or words if it may be invalid; else empty."""
    from bncli.recipe.load import with_values
    from bncli.recipe.sections import Recipe

    found = [(arm, arm.at_edge[0]) for arm in comparison.arms if arm.at_edge]
    if not found:
        return ""
    arm, edge = found[0]
    best, values = arm.point[edge], sorted(comparison.plan.grid[edge])
    try:
        beyond = float(f"{best**2 / values[1 if best == values[0] else -2]:.3g}")
        values.append(int(beyond) if isinstance(best, int) and beyond.is_integer() else beyond)
        with_values(Recipe.model_validate(comparison.plan.recipes[arm.arm]), {edge: values[-1]})
    except (ArithmeticError, KeyError, ValueError):  # pydantic's is a ValueError
        return f"add values to grid.{edge} beyond its edge, as far as the field allows"
    return f"{again} --set {quote(f'grid.{edge}={sorted(values)}')}"


def _log_next(comparison: Comparison, folder: Path, output: Output, saved: bool) -> None:
    """Say where the results are, and which command would tell most next."""
    from bncli.report.compare.folder import ComparisonFolder

    again = join(["bncli", *sys.argv[1:]])
    if saved:
        begun = ComparisonFolder(folder).begun() if folder.is_dir() else None
        known = begun and begun.sources and join(["bncli", "compare", *begun.sources, "--out", str(folder)])
        again = known or "the command that trained it, with"
    edge = _wider_grid(comparison, again)
    seeds = max((claim.seeds_needed or 0 for claim in comparison.claims), default=0)
    page = quote(f"{comparison.plan.name}.html")
    page += "" if find_spec("matplotlib") else " (with figures after: pip install matplotlib)"
    advice = {
        "mend what failed, see Warnings; until then it will fail again": any(arm.failures for arm in comparison.arms),
        again.removesuffix(", with"): any(note.kind == "unfinished" for note in comparison.notes),
        edge: edge,
        f"{again} --set seeds.report={seeds}": seeds,
        f"bncli compare --from {quote(str(folder))} --html {page}": not output.html,
    }
    step = next((f" Next: {words}" for words, fits in advice.items() if fits), "")
    log(f"{'Runs and result in' if folder.is_dir() else 'Read from'} {folder}.{step}", output.quiet)
