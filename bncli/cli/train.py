"""`bncli train`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bncli.cli import options
from bncli.cli.console import StopSignal, enable_gc, log, print_result, show_plan
from bncli.cli.output import Output
from bncli.errors import CHECK_FAILED, DIVERGED
from bncli.recipe import examples


def _show_example(context: typer.Context, name: str | None) -> None:
    if name is None or context.resilient_parsing:  # the shell completes
        return
    lines = [f"{each:<22}{purpose}" for each, purpose in examples.purposes().items()]
    print_result("\n".join(lines) if name == "list" else examples.text(name))
    raise typer.Exit


def train(
    context: typer.Context,
    recipe: options.Recipe_,
    sets: options.Set = None,
    arm: options.ArmName = None,
    device: options.Device = "auto",
    threads: Annotated[int | None, options.ThreadsOption(help="CPU threads.  [default: by a step's size]")] = None,
    out: Annotated[Path | None, options.FolderOption(help="The run's folder.  [default: runs/NAME/DATE-TIME]")] = None,
    force: Annotated[bool, options.OutputOption("--force", "-f", help="Overwrite an earlier run in --out.")] = False,
    json: options.Json = False,
    plot: options.Plot = None,
    plot_width: options.PlotWidth = None,
    no_caption: options.NoCaption = False,
    tensorboard: Annotated[bool, options.OutputOption("--tensorboard", help="Write TensorBoard files too.")] = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    require_target: options.RequireTarget = False,
    allow_code: options.AllowCode = False,
    example: Annotated[
        str | None,
        options.RecipeOption(
            metavar="NAME", callback=_show_example, is_eager=True, help="Print a recipe; list: their names."
        ),
    ] = None,
) -> None:
    """Train one recipe until its target or its step budget.

    Example: bncli train recipes/smoke.yaml --set optimizer.lr=0.3
    """
    from bncli.recipe.load import Arm, load, plain

    output = Output.of(context)
    output.check()
    loaded = load(recipe, sets or (), allow_code=allow_code, sets_from="--set")
    chosen = Arm(loaded.name, loaded.base) if arm is None else loaded.arm(arm)
    if dry_run:
        from bncli.measure.dry_run import planned_training

        show_plan(planned_training(loaded, chosen), json)
        return
    from bncli.report import tensorboard as board

    if tensorboard:
        board.check_installed()
    from bncli.recipe.yaml import dump
    from bncli.report import layers, run_figure
    from bncli.report.files import to_json
    from bncli.report.folder import RunFolder
    from bncli.report.progress import TrainProgress
    from bncli.report.train import run_table
    from bncli.results.train import Event, RunFinished, RunStarted

    with RunFolder(out, loaded.name, force) as folder, StopSignal() as stop:
        from bncli.engine import train as engine

        # What a user's model prints must not get between the lines of a result.
        with TrainProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr):
            sinks: list[Callable[[Event], None]] = [folder.metrics, progress]
            for event in engine.train(chosen.recipe, device, threads=threads, name=chosen.name, stop=stop):
                if isinstance(event, RunStarted):
                    enable_gc()
                    folder.begin(dump(plain(chosen.recipe)))
                    if tensorboard:
                        sinks.append(board.TensorBoard(folder.path / "tensorboard"))
                for sink in sinks:
                    sink(event)
                if isinstance(event, RunFinished):
                    result = event.result
        folder.finish(result)
    output.show(result, {"json": to_json, "table": lambda found: run_table(found, chosen.name)})
    run = layers.Arm(0, chosen.name, [chosen.recipe.train.seed], [result])
    output.write(run, {"": run_figure.draw} | ({"-layers": layers.draw} if layers.has_layers(run) else {}))
    log(f"Saved in {folder.path}", quiet)
    if stop.number:
        raise typer.Exit(stop.exit_code)
    if result.status == "diverged":
        raise typer.Exit(DIVERGED)
    if require_target and result.steps_to_target is None:
        raise typer.Exit(CHECK_FAILED)
