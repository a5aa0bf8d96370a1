"""What a comparison costs besides its runs: `python -m tests.benchmarks.many_runs --runs 500 1000 2000 5000`.

The first table is of the whole command with workers that answer at once: CPU of the parent for each run, which must
not grow with their number; the same command again, which reads every run; a dry run; and a small comparison in a folder
that holds the run files of all these. With --real N, N tiny runs are trained by worker processes, and the CPU of parent
and workers together is compared with the workers' alone. With --dask N, N runs that do nothing pass through a Dask
cluster of two workers: the CPU that each costs the driver and the scheduler says how many workers they can feed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from unittest import mock

from bncli.cli import main as command
from bncli.measure.compare import processes
from bncli.measure.compare.cluster import Cluster
from bncli.measure.compare.plan import named_runs, study
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.recipe.load import load
from bncli.results.environment import Environment
from bncli.results.serialize import to_plain
from bncli.results.train import Evaluation, RunResult, Target
from tests.measure.compare.dask_cluster import two_workers

RECIPE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 120, held_out: 60, noise: 0.5}
model: {kind: mlp, hidden: [16]}
optimizer: {kind: sgd, lr: 0.5}
train: {steps: 60, batch_size: 20, evaluate_every: 5, target: {value: 0.9}}
arms: {plain: {}, normed: {norm: batch}}
grid: {optimizer.lr: {log: [0.01, 1], points: 10}}
"""
POINTS, REPORT = 10, 10
HERE = Environment("0", "3", "2", "Linux", "a processor", "cpu", None, 1, "2026-01-01T00:00:00+00:00")


class AtOnce(processes.Processes):
    """An executor that answers every run at once, by a run of 13 evaluations."""

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | Ended | None]:
        while work.more and not stop():
            if not (jobs := work.take(workers=10**9)):  # other calls do the rest
                yield None
                continue
            (job,) = jobs
            yield Started(0, job)
            found = _result((10.0 if job.recipe.optimizer.lr == 1 else 30.0) + job.seed % 7)
            yield Ended(0, job, json.loads(json.dumps(to_plain(found))))

    def close(self) -> None:
        pass


def _result(steps: float) -> RunResult:
    seen = tuple(Evaluation(s, 0.1 if s < steps else 0.95, 2.3, None) for s in range(0, 61, 5))
    hit = 5 * math.ceil(steps / 5)
    return RunResult(
        "reached", 60, 60, Target("accuracy", 0.9), steps, hit, 0.95, 0.95, seen, 1.0, 2e4, 1.0, 0.1, 300.0, 99, HERE
    )


def bncli(*arguments: str) -> str:
    """Call the command line in this process; what it printed."""
    printed, argv = io.StringIO(), mock.patch.object(sys, "argv", ["bncli", *arguments])
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), argv:
        code = None
        try:
            command()
        except SystemExit as left:
            code = left.code
    assert not code, arguments
    return printed.getvalue()


def cpu_s(*arguments: str) -> float:
    began = process_time()
    bncli(*arguments)
    return process_time() - began


def seeds_of(runs: int) -> str:
    """The seeds with which the recipe has about so many runs, if each arm keeps a single point of the grid."""
    return f"seeds={{tune: {max(3, (runs // 2 - REPORT) // POINTS)}, report: {REPORT}}}"


def of_the_parent(runs: int, recipe: str) -> dict[str, float]:
    """CPU seconds of the command for so many runs, of the same again, of a dry run, and of another one beside them."""
    seeds = seeds_of(runs)
    with mock.patch.object(processes, "Processes", AtOnce):
        asked = ("compare", recipe, "--out", str(runs), "--quiet", "--set")
        found = {"all": cpu_s(*asked, seeds)}
        found["again"] = cpu_s(*asked, seeds)
        found["dry run"] = cpu_s("compare", recipe, "--out", "none", "--dry-run", "--set", seeds)
        found["beside"] = cpu_s(*asked, "seeds={tune: 3, report: 2}", "--set", f"train.seed={runs}")
    return found


def of_workers(runs: int, jobs: int, recipe: str) -> tuple[float, float, float]:
    """CPU seconds of the parent and of its workers, and seconds on the clock, of so many tiny runs."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    began = perf_counter()
    bncli("compare", recipe, "--out", "real", "--quiet", "-j", str(jobs), "--set", seeds_of(runs))
    took = perf_counter() - began
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    parent, workers = (b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))
    return parent, workers, took


def through_dask(runs: int, recipe: str) -> tuple[float, float, float]:
    """CPU seconds of this process and of the scheduler's, and seconds on the clock, of so many runs that do nothing."""
    asked = study([load(recipe, [f"seeds={{tune: {math.ceil(runs / 2 / POINTS)}, report: 1}}"])])
    jobs = [replace(job, company="") for job in named_runs(asked, {}).jobs[:runs]]
    assert len(jobs) == runs
    command = (sys.executable, "-m", "tests.measure.compare.instant_worker", "--at-once")
    with two_workers() as (address, scheduler):
        executor = Cluster("cpu", None, 1, address, command=command)
        with contextlib.closing(executor):
            list(executor.run(Work(jobs[:20]), lambda: False))  # starts the processes
            before, began, clock = sum(scheduler.cpu_times()[:2]), process_time(), perf_counter()
            ended = [event for event in executor.run(Work(jobs), lambda: False) if isinstance(event, Ended)]
            driver, took = process_time() - began, perf_counter() - clock
            of_scheduler = sum(scheduler.cpu_times()[:2]) - before
    assert sum(event.failure is None for event in ended) == runs
    return driver, of_scheduler, took


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="*", default=[500, 1000, 2000, 5000])
    parser.add_argument("--real", type=int, default=0, metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="workers, with --real")
    parser.add_argument("--dask", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("small.yaml").write_text(RECIPE)
        print(f"{'CPU of the parent':>18} {'runs':>7} {'all, s':>8} {'ms a run':>9} {'again, s':>9} {'dry run, s':>11} "
              f"{'beside, s':>10}")  # fmt: skip
        of_the_parent(60, "small.yaml")  # loads the modules
        for runs in options.runs:
            found = of_the_parent(runs, "small.yaml")
            print(f"{'':18} {runs:7,} {found['all']:8.2f} {1e3 * found['all'] / runs:9.2f} {found['again']:9.2f} "
                  f"{found['dry run']:11.2f} {found['beside']:10.2f}", flush=True)  # fmt: skip
        if options.real:
            parent, workers, took = of_workers(options.real, options.jobs, "small.yaml")
            print(f"{options.real:,} runs by {options.jobs} workers: {1e3 * workers / options.real:.1f} ms of a "
                  f"worker's CPU a run, {1e3 * parent / options.real:.1f} ms of the parent's; all over the workers' "
                  f"{(parent + workers) / workers:.2f} (target: at most 1.3); {took:.1f} s on the clock")  # fmt: skip
        if options.dask:
            driver, scheduler, took = (1e3 * each / options.dask for each in through_dask(options.dask, "small.yaml"))
            first, full = "driver" if driver > scheduler else "scheduler", 1e4 / max(driver, scheduler)
            print(f"{options.dask:,} runs through Dask: {driver:.2f} ms of the driver's CPU a run, {scheduler:.2f} ms "
                  f"of the scheduler's, {took:.2f} ms on the clock with 2 workers; with runs of 10 s the {first} is "
                  f"busy all the time from {full:,.0f} workers on")  # fmt: skip


if __name__ == "__main__":
    main()
