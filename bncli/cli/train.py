"""`bncli train`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.console import StopSignal, enable_gc, log, print_result, show_plan
from bncli.cli.options import AllowCode, ArmName, Device, DryRun, Json, Quiet, Recipe_, RequireTarget, Set, Threads
from bncli.errors import CHECK_FAILED, DIVERGED
from bncli.recipe import examples


def _show_example(context: typer.Context, name: str | None) -> None:
    if name is None or context.resilient_parsing:  # the shell completes
        return
    lines = [f"{each:<22}{purpose}" for each, purpose in examples.purposes().items()]
    print_result("\n".join(lines) if name == "list" else examples.text(name))
    raise typer.Exit


def train(
    recipe: Recipe_,
    sets: Set = None,
    arm: ArmName = None,
    device: Device = "auto",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The run's folder.  [default: runs/NAME/DATE-TIME]", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an earlier run in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    require_target: RequireTarget = False,
    allow_code: AllowCode = False,
    example: Annotated[
        str | None,
        typer.Option(metavar="NAME", callback=_show_example, is_eager=True, help="Print a recipe; list: their names."),
    ] = None,
) -> None:
    """Train one recipe until its target or its step budget.

    Example: bncli train recipes/smoke.yaml --set optimizer.lr=0.3
    """
    from bncli.recipe.load import Arm, load, plain

    loaded = load(recipe, sets or (), allow_code=allow_code, sets_from="--set")
    chosen = Arm(loaded.name, loaded.base) if arm is None else loaded.arm(arm)
    if dry_run:
        from bncli.measure.dry_run import planned_training

        show_plan(planned_training(loaded, chosen), json)
        return
    from bncli.recipe.yaml import dump
    from bncli.report.files import to_json
    from bncli.report.folder import RunFolder
    from bncli.report.progress import TrainProgress
    from bncli.report.train import run_table
    from bncli.results.train import RunFinished, RunStarted

    with RunFolder(out, loaded.name, force) as folder, StopSignal() as stop:
        from bncli.engine import train as engine

        # What a user's model prints must not get between the lines of a result.
        with TrainProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr):
            for event in engine.train(chosen.recipe, device, threads=threads, name=chosen.name, stop=stop):
                if isinstance(event, RunStarted):
                    enable_gc()
                    folder.begin(dump(plain(chosen.recipe)))
                folder.metrics(event)
                progress(event)
                if isinstance(event, RunFinished):
                    result = event.result
        folder.finish(result)
    print_result(to_json(result) if json else run_table(result, chosen.name))
    log(f"Saved in {folder.path}", quiet)
    if stop.number:
        raise typer.Exit(stop.exit_code)
    if result.status == "diverged":
        raise typer.Exit(DIVERGED)
    if require_target and result.steps_to_target is None:
        raise typer.Exit(CHECK_FAILED)
