"""The door: commands, options, exit codes. It opens at once: torch, pydantic and scipy load inside a command's body."""

from __future__ import annotations

import contextlib
import errno
import gc
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from bncli import __version__
from bncli.errors import CHECK_FAILED, DIVERGED, INTERRUPTED, BncliError, RecipeError

MOST_THREADS = 1024  # far more crash OpenMP

if TYPE_CHECKING:
    from bncli.measure.compare import Study
    from bncli.recipe.file import Arm, Loaded
    from bncli.results import CheckGroup, Comparison, Effort, Gradcheck, Planned

app = typer.Typer(
    name="bncli",
    help="How many training steps does batch normalization save, what does it cost, are its gradients right?",
    epilog="Exit codes: 0 fine; 1 a check or a run failed; 2 a mistake in a recipe, an option or the data; "
    "3 a device or kernel is not available; 4 diverged; 130 interrupted (143 by SIGTERM).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe; - reads standard input.")]
Recipes = Annotated[
    Optional[list[str]], typer.Argument(metavar="[RECIPE]...", help="YAML recipes; - reads standard input.")  # noqa: UP045
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a field of the recipe; may be repeated."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Import your own model or kernel where it is named.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be done and train nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
RequireTarget = Annotated[bool, typer.Option("--require-target", help="Exit 1 when a target is missed.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"bncli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Recipe_,
    sets: Set = None,
    arm: Annotated[Optional[str], typer.Option(help="Train this arm of the recipe instead of its base.")] = None,  # noqa: UP045
    device: Device = "auto",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, max=MOST_THREADS, help="CPU threads.  [default: torch's choice]", show_default=False),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="The run's folder.  [default: runs/NAME/DATE-TIME]", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Write over an earlier run in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    require_target: RequireTarget = False,
    allow_code: AllowCode = False,
) -> None:
    """Train one recipe until its target or its step budget.

    Example: bncli train recipes/smoke.yaml --set optimizer.lr=0.3
    """
    from bncli.recipe.file import load

    loaded = load(recipe, sets or (), allow_code=allow_code)
    chosen = _arm(loaded, arm)
    if dry_run:
        from bncli.measure.dry_run import of_training

        _show_plan(of_training(loaded, chosen), json)
        return
    from bncli.recipe.file import plain
    from bncli.recipe.yaml12 import dump
    from bncli.report.folder import RunFolder
    from bncli.report.progress import TrainProgress
    from bncli.report.record import result_to_json
    from bncli.results import RunFinished, RunStarted

    with RunFolder(out, loaded.name, force) as folder, StopSignal() as stop:
        from bncli.engine.train import run

        # What a user's model prints must not get between the lines of a result.
        with TrainProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr):
            for event in run(chosen.recipe, device, threads=threads, name=chosen.name, stop=stop):
                if isinstance(event, RunStarted):
                    _loaded_all()
                    folder.begin(dump(plain(chosen.recipe)))
                folder.metrics(event)
                progress(event)
                if isinstance(event, RunFinished):
                    result = event.result
        folder.finish(result)
    from bncli.report.tables import run_table

    _print(result_to_json(result) if json else run_table(result, chosen.name))
    _say(f"Saved in {folder.path}", quiet)
    if stop.number:
        raise typer.Exit(stop.exit_code)
    if result.status == "diverged":
        raise typer.Exit(DIVERGED)
    if require_target and result.steps_to_target is None:
        raise typer.Exit(CHECK_FAILED)


@app.command()
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
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
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
    if json + csv + markdown > 1:
        raise RecipeError("--json, --csv and --markdown: choose one, the result is printed once")
    if bool(recipes) == bool(saved):
        raise RecipeError("give a recipe, as in: bncli compare recipes/digits.yaml (or --from a saved comparison)")
    if saved:
        given = {"--set": sets, "--dry-run": dry_run, "--out": out, "--jobs": jobs}
        if idle := [option for option, value in given.items() if value]:
            raise RecipeError(f"{', '.join(idle)}: nothing is trained with --from, so that would have no effect")
    _check_outputs(plot, html)
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

            _show_plan(of_comparison(loaded), json)
            return
        comparison, stopped = _run_comparison(loaded, device, jobs, threads, out, quiet)
    _show(comparison, "json" if json else "csv" if csv else "markdown" if markdown else "table")
    _write(comparison, plot, html, quiet)
    if stopped:
        raise typer.Exit(stopped)
    if any(arm.failures for arm in comparison.arms):
        raise typer.Exit(CHECK_FAILED)
    if require_target and any(arm.hits < arm.runs for arm in comparison.arms):
        raise typer.Exit(CHECK_FAILED)


@app.command()
def gradcheck(
    kernel: Annotated[
        str, typer.Option(metavar="KERNEL", help="native, fused, or package.module:function (your own).")
    ] = "native",
    norm: Annotated[Literal["batch", "layer", "group", "instance"], typer.Option(help="The norm to check.")] = "batch",
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
        raise RecipeError("--quick and --full: choose one, or neither for the checks in between")
    if demo:
        changed = {"--kernel": kernel != "native", "--norm": norm != "batch", "--device": device != "auto"}
        given = {**changed, "--quick": quick, "--full": full, "--only": only, "--allow-code": allow_code}
        if idle := [option for option, value in given.items() if value]:
            raise RecipeError(f"{', '.join(idle)}: nothing is checked with --demo, so that would have no effect")
        _show_demo(json)
        return
    _check_kernel_name(kernel, allow_code)
    effort: Effort = "quick" if quick else "full" if full else "default"
    groups: list[CheckGroup] = []
    try:
        result = _run_gradcheck(
            groups, quiet, kernel=kernel, norm=norm, device=device, effort=effort, only=only, allow_code=allow_code
        )
    except KeyboardInterrupt as stopped:
        _show_interrupted(groups, kernel, json)
        raise typer.Exit(getattr(stopped, "exit_code", INTERRUPTED)) from None  # Typer would make any of them 130
    from bncli.report import gradients

    _print(gradients.to_json(result) if json else gradients.GradcheckReport(result))
    if not gradients.passed(result):
        raise typer.Exit(CHECK_FAILED)


# --- the commands' parts ------------------------------------------------------------------------------------------


def _arm(loaded: Loaded, name: str | None) -> Arm:
    """The run to train: the recipe's base, or one of its arms under the recipe's and its own name."""
    from bncli.recipe.file import Arm, suggestion

    if name is None:
        return Arm(loaded.name, loaded.base)
    for arm in loaded.arms:
        if arm.name == name:
            return arm
    names = [arm.name for arm in loaded.arms]
    raise RecipeError(f"--arm {name}: {suggestion(name, names) if names else f'{loaded.source} has no arms'}")


def _check_outputs(plot: Path | None, html: Path | None) -> None:
    """Refuse before any work what could not be written after it."""
    from bncli.report.record import check_writable

    if plot:
        from bncli.report.plots import check_path

        check_path(plot)
    for file in (plot, html):
        if file:
            check_writable(file)


def _run_comparison(
    loaded: list[Loaded], device: str, jobs: int | None, threads: int, out: Path | None, quiet: bool
) -> tuple[Comparison, int]:
    from bncli.measure.compare import collect, planned_runs, study, summarise
    from bncli.measure.execute import execute
    from bncli.measure.pool import Pool
    from bncli.report.folder import ComparisonFolder
    from bncli.report.progress import CompareProgress

    asked: Study = study(loaded, identity(device))
    folder = ComparisonFolder(out or Path("runs") / asked.plan.name)
    records: dict[str, Any] = {}
    _loaded_all()
    with folder, StopSignal() as stop, CompareProgress(quiet) as progress:
        pool = Pool(device, jobs, threads, folder.path / "logs")
        for event in execute(asked, folder, pool, records, stop):
            progress(event)
    comparison = summarise(asked.plan, collect(asked, records), planned_runs(asked))
    folder.finish(comparison)
    if stop.number:
        done, planned = len(comparison.runs), comparison.planned_runs
        _say(f"Stopped: {done} of {planned} runs are kept in {folder.path}; the same command goes on from there", False)
    return comparison, stop.exit_code if stop.number else 0


KERNEL_NAMES = ("native", "fused")  # those of bncli.kernels, which needs torch


def _check_kernel_name(kernel: str, allow_code: bool) -> None:
    """Refuse a name that is no kernel's, and code of the user's own that is not allowed, before torch is loaded."""
    if kernel in KERNEL_NAMES:
        return
    if ":" not in kernel:
        from bncli.recipe.file import suggestion

        hint = suggestion(kernel, [*KERNEL_NAMES, "package.module:function"])
        raise RecipeError(f"--kernel {kernel}: there is no such kernel; {hint}")
    if not allow_code:
        raise RecipeError(f"--kernel {kernel} is code of yours that would run; allow it with --allow-code")


def _run_gradcheck(groups: list[CheckGroup], quiet: bool, **asked: Any) -> Gradcheck:
    """The result of what is asked of `gradcheck.run`, each group put into `groups` as soon as it is finished."""
    from bncli.report.gradients import GradcheckProgress

    # What a user's kernel prints must not get between the lines of a result.
    with StopSignal(at_once=True), GradcheckProgress(quiet) as progress, contextlib.redirect_stdout(sys.stderr):
        from bncli.measure import gradcheck
        from bncli.results import CheckGroup

        _loaded_all()
        for found in gradcheck.run(**asked):
            if isinstance(found, CheckGroup):
                groups.append(found)
                progress(found)
            else:
                result = found
    return result


def _show_interrupted(groups: list[CheckGroup], kernel: str, as_json: bool) -> None:
    from bncli.report import gradient_tables, gradients

    _print(gradients.interrupted_to_json(groups) if as_json else gradient_tables.interrupted_table(groups, kernel))


def _show_demo(as_json: bool) -> None:
    from bncli.measure.gradient_paths import bias_demo
    from bncli.report import gradient_tables, gradients

    steps = bias_demo()
    _print(gradients.demo_to_json(steps) if as_json else gradient_tables.demo_table(steps))


def identity(device: str) -> dict[str, str]:
    """What a run's key depends on besides its recipe: another version or device makes it another run."""
    import importlib.metadata

    torch = importlib.metadata.version("torch")
    without_gpu = torch.endswith("+cpu") or (sys.platform == "linux" and not list(Path("/dev").glob("nvidia[0-9]*")))
    kind = "cpu" if device == "auto" and without_gpu else device.partition(":")[0]
    return {"bncli": __version__, "torch": torch, "device": kind}


def _again(saved: Path) -> Comparison:
    from bncli.measure.compare import summarise
    from bncli.report.folder import load_comparison

    found = load_comparison(saved)
    return summarise(found.plan, found.runs, found.planned_runs)


def _show(comparison: Comparison, form: str) -> None:
    """The comparison on stdout: tables and curves, or one of the forms for other programs."""
    from bncli.report import exports, record, tables

    if form != "table":
        _print({"json": record.to_json, "csv": exports.to_csv, "markdown": exports.to_markdown}[form](comparison))
        return
    _print(tables.comparison_report(comparison))


def _write(comparison: Comparison, plot: Path | None, html: Path | None, quiet: bool) -> None:
    if plot:
        from bncli.report.plots import plot as draw

        draw(comparison, plot)
        _say(f"Drawn in {plot}", quiet)
    if html:
        from bncli.report.exports import to_html
        from bncli.report.record import write_atomically

        write_atomically(html, to_html(comparison))
        _say(f"Written to {html}", quiet)


def _show_plan(planned: Planned, as_json: bool) -> None:
    from bncli.report import dry_run

    _print(dry_run.to_json(planned) if as_json else dry_run.render(planned))


def _loaded_all() -> None:
    """From here on garbage is collected; what has been loaded stays and is left out of it."""
    gc.freeze()
    gc.enable()


def _print(result: Any) -> None:
    """A result, to stdout: text as it is, anything else through rich."""
    if isinstance(result, str):
        sys.stdout.write(result if result.endswith("\n") else result + "\n")
        return
    from rich.console import Console

    Console(highlight=False).print(result)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


class StopAtOnce(KeyboardInterrupt):
    """The second signal. A KeyboardInterrupt, so that nobody takes it for an error of a run's own."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class StopSignal:
    """Ctrl-C or SIGTERM: the first asks the work to end at the next step, the second ends it at once.

    With `at_once` the first does so, for work that yields what it has finished.
    """

    number: int = 0

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once

    def __enter__(self) -> StopSignal:
        self._before = {each: signal.signal(each, self._take) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number or self.at_once:
            _say("\nStopped at once; what was finished before is kept", False)
            raise StopAtOnce(128 + number)
        self.number = number
        _say("\nStopping after this step; once more to stop at once", False)

    def __call__(self) -> bool:
        return self.number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def main() -> None:
    """The console script: runs a command and turns a user's mistake into a message and an exit code."""
    gc.disable()  # while modules load there is no garbage, and looking for it is an eighth of importing torch
    try:
        app()
    except BncliError as error:
        mistakes = getattr(error, "mistakes", (str(error),))
        if len(mistakes) > 1:
            print(f"bncli: {len(mistakes)} mistakes", file=sys.stderr)
        for mistake in mistakes:
            print(f"  {mistake}" if len(mistakes) > 1 else f"bncli: {mistake}", file=sys.stderr)
        sys.exit(error.exit_code)
    except StopAtOnce as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print(f"bncli: the result cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(CHECK_FAILED)


if __name__ == "__main__":
    main()
