"""`bncli train`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bncli.cli import options
from bncli.cli.console import StopSignal, enable_gc, given_options, log, print_result, rank, show_plan
from bncli.cli.output import Output
from bncli.errors import CHECK_FAILED, DIVERGED, INTERRUPTED, UsageError
from bncli.recipe import examples

if TYPE_CHECKING:
    from bncli.engine.distributed import Ranks
    from bncli.recipe.load import Arm
    from bncli.report.folder import RunFolder
    from bncli.results.train import RunResult


def _show_example(context: typer.Context, name: str | None) -> None:
    if name is None or context.resilient_parsing:  # the shell completes
        return
    lines = [f"{each:<22}{purpose}" for each, purpose in examples.purposes().items()]
    print_result("\n".join(lines) if name == "list" else examples.text(name))
    raise typer.Exit


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="YAML recipe; - reads standard input. Not needed with --resume."),
    ] = None,
    sets: options.Set = None,
    arm: options.ArmName = None,
    resume: Annotated[
        Path | None, options.RecipeOption(metavar="RUN", help="Continue the run in that folder from its checkpoint.")
    ] = None,
    from_weights: Annotated[
        Path | None, options.RecipeOption(metavar="FILE", help="Start from the weights in a .safetensors file.")
    ] = None,
    evaluate: Annotated[
        bool, options.RecipeOption("--evaluate", help="Evaluate a trained model: RECIPE is its run's folder or file.")
    ] = False,
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
    if not dry_run:
        from bncli.engine.memory import keep_freed_memory

        keep_freed_memory()
    if rank() is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DistributedDataParallel's advice about its options
    if rank():
        if not (dry_run or evaluate):
            _follow(device)
        return
    _check_combination(context, recipe, resume, evaluate)
    output = Output.of(context)
    output.check()
    from bncli.report import folder as folders

    if evaluate:
        _evaluate(Path(recipe or ""), device, threads, allow_code, output)
        return
    from bncli.recipe.load import Arm, load, plain

    ranked: contextlib.AbstractContextManager[Ranks | None] = contextlib.nullcontext()
    if rank() is not None and not dry_run:
        from bncli.engine.distributed import joined

        resume, force = _after_restart(out, resume, force)
        ranked = joined(device)
    resumed = folders.ResumedFolder(resume) if resume else None
    loaded = load(recipe or f"{resume}/{folders.RECIPE}", sets or (), allow_code=allow_code, sets_from="--set")
    chosen = loaded.arm(arm) if arm else Arm(resumed.name if resumed else loaded.name, loaded.base)
    if dry_run:
        from bncli.measure.dry_run import planned_training

        show_plan(planned_training(loaded, chosen), json)
        return
    if tensorboard:
        from bncli.report.tensorboard import check_installed

        check_installed()
    from bncli.recipe.yaml import dump
    from bncli.report import layers, run_figure
    from bncli.report.files import to_json
    from bncli.report.train import run_table

    recipe_yaml = dump(plain(chosen.recipe))
    with resumed or folders.RunFolder(out, loaded.name, force) as folder, ranked as ranks, StopSignal() as stop:
        finished = resumed and resumed.finished(recipe_yaml)
        if finished:
            grows = chosen.recipe.schedule.kind != "cosine"  # which is spread over its steps
            on = {"budget": "train.steps=N" * grows, "reached": "train.stop_at_target=false"}.get(finished.status)
            log("This run has ended, so nothing is trained" + f"; --set {on} continues it" * bool(on), quiet)
        again = ["--device", device] * (device != "auto") + ["--tensorboard"] * tensorboard
        again += ["--allow-code"] * allow_code
        if ranks:
            ranks.share(None if finished else (chosen.recipe, folder.checkpoint, threads))

        def say_how_to_continue() -> None:
            start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m"] if ranks else []
            log(f"Continue it with: {shlex.join([*start, 'bncli', 'train', '--resume', str(folder.path), *again])}")

        try:
            of_engine = {"device": device, "threads": threads, "stop": stop} | ({"ranks": ranks} if ranks else {})
            result = finished or _run(chosen, recipe_yaml, folder, from_weights, tensorboard, quiet, **of_engine)
        except BaseException:  # of any kind: what is saved can be continued
            if folder.begun and folders.CHECKPOINT in folder.saved:
                say_how_to_continue()
            raise
        try:
            if not finished:
                folder.finish(result)
        finally:  # printed also where it cannot be saved
            table = run_table(result, chosen.name, folder.saved)
            output.show(result, {"json": to_json, "table": lambda _: table})
    run = layers.Arm(0, chosen.name, [chosen.recipe.train.seed], [result])
    output.write(run, {"": run_figure.draw} | ({"-layers": layers.draw} if layers.has_layers(run) else {}))
    if result.status == "interrupted":
        say_how_to_continue()
    log(f"Saved in {folder.path}", quiet)
    if stop.number or result.status == "interrupted":  # of ranks, another may have got the signal
        raise typer.Exit(stop.exit_code if stop.number else INTERRUPTED)
    if result.status == "diverged":
        raise typer.Exit(DIVERGED)
    if require_target and result.steps_to_target is None:
        raise typer.Exit(CHECK_FAILED)


def _run(
    arm: Arm,
    recipe_yaml: str,
    folder: RunFolder,
    from_weights: Path | None,
    tensorboard: bool,
    quiet: bool,
    **of_engine: Any,
) -> RunResult:
    """Train, and keep in the folder what happens. of_engine: as `engine.train` takes them."""
    import hashlib  # here, as the help does without

    from bncli.engine import train as engine
    from bncli.engine.train.weights import read, tensors_of
    from bncli.report.progress import TrainProgress
    from bncli.report.tensorboard import TensorBoard
    from bncli.results.train import Event, RunFinished, RunStarted

    initial = folder.initial_weights
    if from_weights and not folder.checkpoint:
        content, file = read(from_weights)
        of_engine["weights"] = tensors_of(content, file)
        initial = f"{from_weights} sha256 {hashlib.sha256(content).hexdigest()}"
    # What a user's model prints must not get between the lines of a result.
    with TrainProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: log(f"\nWarning: {message}")  # not with a line of bncli's code
        sinks: list[Callable[[Event], None]] = [folder.metrics, progress]
        of_engine |= {"checkpoint": folder.checkpoint, "save": folder.save}
        for event in engine.train(arm.recipe, name=arm.name, **of_engine):
            if isinstance(event, RunStarted):
                event = replace(event, initial_weights=initial)
                enable_gc()
                folder.begin(recipe_yaml)
                if tensorboard:
                    sinks.append(TensorBoard(folder.path / "tensorboard", goes_on=folder.checkpoint is not None))
            elif isinstance(event, RunFinished):
                result = replace(event.result, initial_weights=initial)
                event = RunFinished(result)
            for sink in sinks:
                sink(event)
    return result


def _after_restart(out: Path | None, resume: Path | None, force: bool) -> tuple[Path | None, bool]:
    """The run to continue, and whether to overwrite one: as torchrun starts rank 0 again after a failure."""
    from bncli.engine.distributed import is_of_earlier_start
    from bncli.report.folder import CHECKPOINT

    if out is None and resume is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UsageError("torchrun --max-restarts continues the run in its folder; name one", field="out")
    if out and is_of_earlier_start(out):
        return (out, False) if (out / CHECKPOINT).exists() else (None, True)
    return resume, force


def _follow(device: str) -> None:
    """Train as a rank above 0: what, rank 0 says, which alone reads the recipe, prints and writes."""
    from bncli.engine import train as engine
    from bncli.engine.distributed import joined

    enable_gc()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        joined(device) as ranks,
        StopSignal() as stop,
    ):
        if task := ranks.share():
            recipe, checkpoint, threads = task
            for _ in engine.train(recipe, checkpoint=checkpoint, threads=threads, stop=stop, ranks=ranks):
                pass


def _evaluate(model: Path, device: str, threads: int | None, allow_code: bool, output: Output) -> None:
    """Print how well a trained model does on the held-out data of its recipe."""
    from bncli.report.export import json_text
    from bncli.report.train import evaluation_table
    from bncli.results.serialize import to_plain

    with StopSignal(at_once=True), contextlib.redirect_stdout(sys.stderr):
        from bncli.engine.train.weights import evaluate_weights

        found = evaluate_weights(model, device, threads, allow_code)
    forms = {"json": lambda it: json_text(to_plain(it)), "table": lambda it: evaluation_table(it, str(model))}
    output.show(found, forms)


def _check_combination(context: typer.Context, recipe: str | None, resume: Path | None, evaluate: bool) -> None:
    """Refuse options that contradict each other, and a missing recipe."""
    if recipe is None and resume is None:
        raise UsageError(f"RECIPE is missing; see {context.command_path} --help")
    if recipe and Path(recipe).is_dir() and not evaluate:
        raise UsageError(f"{recipe} is a folder; a run's goes on with --resume {recipe}, and --evaluate evaluates it")
    if evaluate:
        kept = ("recipe", "evaluate", "device", "threads", "json", "quiet", "allow_code")
        others = [each.name for each in context.command.params if each.name not in kept]
        why = "--evaluate: nothing is trained, and the model's recipe is in its file"
    elif resume:
        others = ["out", "force", "from_weights", *["arm"] * (recipe is None)]
        why = "--resume: a run goes on in its folder, from its checkpoint, as what it was"
    else:
        return
    if idle := given_options(context, *filter(None, others)):
        raise UsageError(f"{idle} with {why}; omit {'them' if ',' in idle else 'it'}")
