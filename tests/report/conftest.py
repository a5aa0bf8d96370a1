"""Handmade comparisons for the tests of reports: nothing is trained or computed."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bncli.errors import UsageError
from bncli.results.compare import (
    ArmSummary,
    AtTarget,
    Choice,
    Comparison,
    ComparisonPlan,
    Cost,
    Note,
    Ratio,
    RunRecord,
    Steps,
    TuningCell,
)
from bncli.results.environment import Environment, Interval
from bncli.results.train import Evaluation, RunResult, Target

Show = Callable[..., str]  # the fixture of that name: a renderable, a width and an encoding
ENVIRONMENT = Environment(
    bncli="0.1.0",
    python="3.12.1",
    torch="2.13.0",
    platform="Linux x86_64",
    processor="Example CPU <4 GHz>",
    device="cpu",
    driver=None,
    threads=1,
    date="2026-01-02T03:04:05+00:00",
)
GRID = {"optimizer.lr": (0.03, 0.1, 0.3, 1.0, 3.0)}
BUDGET = 3000
NOTHING = Interval(None, None)


def run_result(steps: float | None, *, status: str = "reached", tau: float = 300.0, loss: bool = False) -> RunResult:
    """A run whose accuracy follows 0.1 + 0.87 (1 - exp(-step / tau)), evaluated every 10 steps up to its target."""
    last = BUDGET if steps is None else min(BUDGET, int(steps) + 20)
    at = list(range(0, last, max(10, last // 1000 * 50)))
    seen = [0.1 + 0.87 * (1 - math.exp(-step / tau)) for step in at]
    evaluations = tuple(
        Evaluation(step=s, accuracy=a, loss=2.3 * (1 - a), train_loss=None if s == 0 else 2.2 * (1 - a))
        for s, a in zip(at, seen, strict=True)
    )
    return RunResult(
        status=status,  # type: ignore[arg-type]
        steps_run=last,
        budget=BUDGET,
        target=Target("loss", 0.1) if loss else Target("accuracy", 0.95),
        steps_to_target=steps,
        first_hit=None if steps is None else math.ceil(steps / 10) * 10,
        final=seen[-1],
        best=max(seen),
        evaluations=evaluations,
        ms_per_step=1.3333,
        samples_per_s=45000.0,
        training_s=last * 1.3333e-3,
        evaluation_s=0.31,
        peak_memory_mib=412.25,
        parameters=27910,
        environment=ENVIRONMENT,
        reason="loss is nan at step 12" if status == "diverged" else None,
        evaluation_peak_memory_mib=398.5,
    )


def curve(tau: float, last: int, loss: bool = False) -> tuple[tuple[float, float, float, float], ...]:
    points = []
    for step in range(0, last, max(10, last // 100)):
        accuracy = 0.1 + 0.87 * (1 - math.exp(-step / tau))
        spread = 0.1 * math.exp(-step / tau) + 0.004
        middle = 2.3 * (1 - accuracy) if loss else accuracy
        points.append((float(step), middle, middle - spread, middle + spread))
    return tuple(points)


def arm_summary(name: str, runs: list[RunRecord], *, tau: float, **changes: Any) -> ArmSummary:
    mine = [run.result for run in runs if run.arm == name and run.phase == "report" and run.result is not None]
    steps = [result.steps_to_target for result in mine if result.steps_to_target is not None]
    mean = math.exp(sum(map(math.log, steps)) / len(steps)) if steps and len(steps) == len(mine) else None
    last = int(max(steps)) + 20 if mean is not None else BUDGET
    full = ArmSummary(
        arm=name,
        point={"optimizer.lr": 0.3},
        fixed=(),
        at_edge=(),
        hits=len(steps),
        runs=len(mine),
        steps=Steps(mean, Interval(0.9 * mean, 1.1 * mean), "geometric mean")
        if mean is not None
        else Steps(None, NOTHING, "bound"),
        first_hit=mean and mean + 6,
        ratio=None,
        best=0.9612 if mine else None,
        samples_per_s=45231.4 if mine else None,
        ms_per_step=1.3333 if mine else None,
        peak_memory_mib=412.25 if mine else None,
        parameters=27910 if mine else None,
        diverged=sum(result.status == "diverged" for result in mine),
        failures=(),
        tuning=(),
        curve=curve(tau, last) if mine else (),
    )
    return replace(full, **changes)


def cost(value: float, ratio: float | None = None) -> Cost:
    """An amount to target, and how many times fewer than the reference's; intervals of a tenth to each side."""

    def around(middle: float) -> Interval:
        return Interval(0.9 * middle, 1.1 * middle)

    found = None if ratio is None else Ratio(ratio, around(ratio), "means", 1e-6)
    return Cost(Steps(value, around(value), "geometric mean"), found)


def tuning(*steps: float | str | None, kept: tuple[float, ...] = ()) -> tuple[TuningCell, ...]:
    """A cell a value of the grid: steps of three runs that hit, "diverged", or None for three runs that never did."""
    return tuple(
        TuningCell({"optimizer.lr": value}, 0, 3, None, diverged=3)
        if isinstance(cell, str)
        else TuningCell({"optimizer.lr": value}, 0 if cell is None else 3, 3, cell, kept=value in kept)
        for value, cell in zip(GRID["optimizer.lr"], steps, strict=True)
    )


def report_runs(arm: str, steps: Sequence[float | None], tau: float, status: str = "budget") -> list[RunRecord]:
    return [
        RunRecord(
            key=f"{arm}-{seed}".replace(" ", "-"),
            arm=arm,
            point={"optimizer.lr": 0.3},
            seed=100 + seed,
            phase="report",
            result=run_result(each, tau=tau, status="reached" if each is not None else status),
        )
        for seed, each in enumerate(steps)
    ]


def comparison(arms: list[ArmSummary], runs: list[RunRecord], **changes: Any) -> Comparison:
    grid = changes.pop("grid", GRID)
    notes = changes.pop("notes", (Note.of("words", words="The paper's 14x is another net on other data."),))
    plan = ComparisonPlan(
        name="digits",
        arms=tuple(arm.arm for arm in arms),
        fixed={arm.arm: arm.fixed for arm in arms if arm.fixed},
        grid=grid,
        reference=arms[0].arm,
        tune_seeds=(0, 1, 2),
        report_seeds=tuple(range(100, 110)),
        target=changes.pop("target", Target("accuracy", 0.95)),
        budget=BUDGET,
        data="digits, 1,297 training and 500 held-out examples",
        also=changes.pop("also", ()),
        recipes={arm.arm: {"optimizer": {"kind": "sgd", "lr": 0.3}, "hidden": [100, 100, 100]} for arm in arms},
    )
    planned = changes.pop("planned_runs", len(runs))
    return Comparison(plan=plan, arms=tuple(arms), notes=notes, runs=tuple(runs), planned_runs=planned)


def spread(middle: float, n: int = 10) -> list[float | None]:
    """n values around `middle`, up to about 15 % away."""
    return [middle * (1 + 0.15 * math.sin(2.4 * k)) for k in range(n)]


MEANS = Ratio(12.13, Interval(9.81, 14.94), "means", 1e-9, 2e-9)


def two_arms() -> Comparison:
    runs = report_runs("plain", spread(812), 250) + report_runs("batch norm", spread(67), 20)
    plain = arm_summary(
        "plain", runs, tau=250, point={"optimizer.lr": 3.0}, at_edge=("optimizer.lr",),
        tuning=tuning(None, 2711.0, 1712.4, 903.0, 806.1),
    )  # fmt: skip
    batch = arm_summary(
        "batch norm",
        runs,
        tau=20,
        ratio=MEANS,
        tuning=tuning(175.2, 98.0, 61.3, 64.0, "diverged", kept=(0.3, 1.0)),
        choice=Choice(5, 2, 0.12),
        seconds=cost(0.089, 9.1),
        examples=cost(4020.0, 12.1),
        also=(AtTarget(Target("accuracy", 0.9), 10, 10, cost(31.2).typical, cost(1, 20.4).ratio),),
    )
    plain = replace(
        plain,
        choice=Choice(5, 1, 0.0),
        seconds=cost(0.81),
        examples=cost(48_720.0),
        also=(AtTarget(Target("accuracy", 0.9), 10, 10, cost(636.0).typical, None),),
    )
    return comparison([plain, batch], runs, also=(Target("accuracy", 0.9),))


def six_arms() -> Comparison:
    """Long names, a fixed field, runs that miss: a median, a bound, an arm that diverged, one that failed."""
    names = [
        "plain",
        "batch norm",
        "batch norm with a learning rate x5",
        "rectified linear units instead of sigmoid",
        "careful xavier initialization",
        "small learning rate",
    ]
    some = [*spread(1900, 7), None, None, None]
    runs = (
        report_runs(names[0], spread(812), 250)
        + report_runs(names[1], spread(67), 20)
        + report_runs(names[2], spread(45), 14)
        + report_runs(names[3], some, 700)
        + report_runs(names[4], [*[None] * 4, *spread(2600, 2)], 1500)
        + report_runs(names[5], [None] * 5, 9000, status="diverged")
    )
    failed = RunRecord("k", names[4], {"optimizer.lr": 0.3}, 106, "report", None, "worker killed by signal 9")
    arms = [
        arm_summary(names[0], runs, tau=250, tuning=tuning(None, 2711.0, 1712.4, 903.0, 806.1)),
        arm_summary(names[1], runs, tau=20, ratio=MEANS, tuning=tuning(175.2, 98.0, 61.3, 64.0, "diverged")),
        arm_summary(
            names[2], runs, tau=14, ratio=Ratio(18.04, Interval(14.2, 22.9), "means", 1e-10, 4e-10),
            fixed=("optimizer.lr",), point={"optimizer.lr": 1.5},
        ),
        arm_summary(
            names[3], runs, tau=700, steps=Steps(1911.0, Interval(1750.2, None), "median"), first_hit=1920.0,
            ratio=Ratio(0.425, Interval(None, 0.61), "medians", None), tuning=tuning(None, None, 2100, 1900, None),
        ),
        arm_summary(
            names[4], runs, tau=1500, ratio=Ratio(None, Interval(None, 0.29), "bound", None),
            failures=("seed 106: worker killed by signal 9",), tuning=tuning(None, None, None, 2900, None),
        ),
        arm_summary(
            names[5], runs, tau=9000, ratio=Ratio(None, NOTHING, "none", None), best=None,
            tuning=tuning("diverged", "diverged", "diverged", "diverged", "diverged"),
        ),
    ]  # fmt: skip
    notes = (
        Note.of("unfinished", done=52, planned=56, failed=1),
        Note.of("failed", failure="worker killed by signal 9", runs=1, arms=[names[4]], run="lr 0.3, seed 106"),
        Note.of("diverged", names[5], diverged=5, runs=5),
    )
    return comparison(arms, [*runs, failed], planned_runs=len(runs) + 5, notes=notes)


def seven_arms() -> Comparison:
    """As many arms as there are colours, each with 1,499 noisy evaluations after the first step."""
    names = ["plain", "batch norm", "layer norm", "group norm with 4 groups", "weight norm",
             "rectified linear units instead of sigmoid", "careful xavier initialization"]  # fmt: skip
    taus = dict(zip(names, (800, 60, 90, 130, 300, 700, 1500), strict=True))
    runs = [run for name, tau in taus.items() for run in report_runs(name, spread(3.2 * tau), tau)]

    def noisy(tau: float) -> tuple[tuple[float, float, float, float], ...]:
        middles = [
            (step, 0.1 + (0.87 - 0.1 * abs(math.sin(step**2))) * (1 - math.exp(-step / tau)))
            for step in range(0, 15000, 10)
        ]
        return tuple((float(step), middle, middle - 0.02, middle + 0.02) for step, middle in middles)

    ratios = {name: Ratio(800 / tau, Interval(640 / tau, 960 / tau), "means", 1e-5) for name, tau in taus.items()}
    arms = [
        arm_summary(name, runs, tau=tau, curve=noisy(tau), ratio=ratios[name] if name != "plain" else None)
        for name, tau in taus.items()
    ]
    return comparison(arms, runs)


def censored_reference() -> Comparison:
    """The depth case: the plain arm never learns, so that the other's ratio is a bound."""
    runs = report_runs("plain", [None] * 10, 1e6) + report_runs("batch norm", spread(240), 70)
    plain = arm_summary("plain", runs, tau=1e6, best=0.11, tuning=tuning(*[None] * 5))
    batch = arm_summary(
        "batch norm", runs, tau=70, ratio=Ratio(None, Interval(11.42, None), "bound", None),
        tuning=tuning(700, 400, 251, 230, None),
    )  # fmt: skip
    return comparison([plain, batch], runs)


def no_runs_yet() -> Comparison:
    arms = [arm_summary(name, [], tau=1) for name in ("plain", "batch norm")]
    unknown = Ratio(None, NOTHING, "none", None)
    arms = [replace(arms[0], point={}), replace(arms[1], point={}, ratio=unknown)]
    return comparison(arms, [], planned_runs=54)


def two_fields() -> Comparison:
    grid = {"optimizer.lr": (0.1, 0.3, 1.0), "optimizer.momentum": (0.0, 0.9)}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = report_runs("plain", spread(812), 250) + report_runs("batch norm", spread(67), 20)
    runs = [replace(run, point={**run.point, "optimizer.momentum": 0.9}) for run in runs]
    cells = {"plain": (2711.0, 903, 806, 451, None, 433), "batch norm": (98.0, 61, 64, 55, 51, 70)}
    filled = {
        name: tuple(
            TuningCell(point, 3 if steps else 0, 3, steps) for point, steps in zip(points, each, strict=True)
        )
        for name, each in cells.items()
    }  # fmt: skip
    best = {"optimizer.lr": 1.0, "optimizer.momentum": 0.9}
    other = {"optimizer.lr": 1.0, "optimizer.momentum": 0.0}
    arms = [
        arm_summary("plain", runs, tau=250, point=best, at_edge=tuple(grid), tuning=filled["plain"]),
        arm_summary("batch norm", runs, tau=20, point=other, ratio=MEANS, at_edge=("optimizer.lr",),
                    fixed=("optimizer.momentum",), tuning=filled["batch norm"]),
    ]  # fmt: skip
    return comparison(arms, runs, grid=grid)


def no_grid() -> Comparison:
    found = two_arms()
    arms = [replace(arm, point={}, at_edge=(), tuning=()) for arm in found.arms]
    return comparison(arms, list(found.runs), grid={}, notes=())


def falling_loss() -> Comparison:
    found = two_arms()
    arms = [
        replace(arm, best=0.0871, curve=curve(tau, 1000 if tau > 100 else 110, loss=True))
        for arm, tau in zip(found.arms, (250, 20), strict=True)
    ]
    return comparison(arms, list(found.runs), target=Target("loss", 0.1))


EXAMPLES = {
    "two arms": two_arms,
    "six arms": six_arms,
    "censored reference": censored_reference,
    "no runs yet": no_runs_yet,
    "two fields": two_fields,
    "no grid": no_grid,
    "falling loss": falling_loss,
}


def check_latex(text: str) -> None:
    """Braces, dollars and environments are balanced, each row has its columns, and comments are comments."""
    lines = [line for line in text.splitlines() if line and not line.startswith("%")]
    plain = re.sub(r"\\[{}$&%#_]", "", "\n".join(lines))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert not re.search("[%#_~^]", plain)
    assert plain.count(r"\begin{tabular}") == plain.count(r"\end{tabular}") > 0
    sides = ""
    for line in plain.splitlines():
        if found := re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", line):
            sides = found[1]
        elif line.endswith(r" \\"):
            assert line.count("&") == len(sides) - 1
        else:
            assert re.fullmatch(r"\\(toprule|midrule|bottomrule|end\{tabular\})", line)


def laid_out(draw: Callable[[Any], object]) -> Any:
    """The figure that `draw` fills, in the style and with the layout of a file."""
    from bncli.report.figure import rendered

    figures: list[Any] = []

    def keep(figure: Any) -> None:
        draw(figure)
        figures.append(figure)

    rendered(keep, "png", 100)  # fewer dots make text wider than in a file
    return figures[0]


def check_everything_is_inside(figure: Any, width: float) -> None:
    """All that is drawn is inside the figure, which has the width (inches) that was asked for, in 8 points or more."""
    from matplotlib.text import Text

    box = figure.get_tightbbox()
    assert figure.get_figwidth() == width
    assert min(box.x0, box.y0) > -0.02
    assert (box.x1 < width + 0.02, box.y1 < figure.get_figheight() + 0.02) == (True, True), box
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 8


@pytest.fixture(scope="session")
def examples() -> dict[str, Comparison]:
    return {name: make() for name, make in EXAMPLES.items()}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest, examples: dict[str, Comparison]) -> Comparison:
    return examples[request.param]


@pytest.fixture(scope="session")
def make_result() -> Any:
    return run_result


@pytest.fixture(scope="session")
def show() -> Show:
    """Renders as on a pipe: no colour, a fixed width, the given encoding."""

    def shown(renderable: Any, width: int = 80, encoding: str = "utf-8") -> str:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        Console(file=file, width=width, no_color=True, legacy_windows=False).print(renderable)
        file.seek(0)
        return file.read()

    return shown


def refusal_to_an_ordinary_user(action: Callable[[], object]) -> str:
    """The words of the UsageError that it raises where its process has no rights of root; empty if there is none."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with contextlib.suppress(OSError):
                os.setuid(65534)
            action()
        except UsageError as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    with open(reads) as said:
        return said.read()
