"""Hours of a comparison: memory, threads and open files of bncli and of its workers, as many tiny runs are made.

`python -m tests.benchmarks.soak --minutes 30 --runs 2000` runs `bncli compare` until its runs have ended or the time is
over, and prints a line at the start, for every 100 runs and at the end, and how much each grows over 1,000 runs.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

RECIPE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 120, held_out: 60, noise: 0.5}
model: {kind: mlp, hidden: [16]}
optimizer: {kind: sgd, lr: 0.5}
train: {steps: STEPS, batch_size: 20, evaluate_every: 50, stop_at_target: false, target: {value: 0.9}}
arms: {plain: {}, normed: {norm: batch}}
grid: {optimizer.lr: {log: [0.01, 1], points: 10}}
seeds: {tune: SEEDS, report: 10}
"""
ARMS_AND_POINTS = 20
EVERY_RUNS = 100
WARM = 0.1  # of the runs, which are left out of the growth: what is loaded lazily is loaded by then
COLUMNS = ("rss_mib", "pss_mib", "threads", "files")


class Sample(NamedTuple):
    """One process at one moment. pss_mib: its memory, with what it shares divided among those that share it."""

    runs: int  # that have ended
    process: str
    rss_mib: float
    pss_mib: float
    threads: int
    files: int


def sampled(pid: int, runs: int) -> Iterator[Sample]:
    """The command's process, and each of its workers."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        workers = sorted(parent.children(), key=lambda process: process.create_time())
        for name, process in [("parent", parent), *((f"worker {n}", each) for n, each in enumerate(workers, 1))]:
            with contextlib.suppress(psutil.Error), process.oneshot():
                memory = process.memory_full_info()
                mib = memory.rss / 2**20, getattr(memory, "pss", memory.rss) / 2**20
                yield Sample(runs, name, *mib, process.num_threads(), process.num_fds())


def growth(samples: Sequence[Sample], column: str) -> float:
    """How much a column grows over 1,000 runs: the median slope of all pairs, without the first runs."""
    last = max((sample.runs for sample in samples), default=0)
    points = [(each.runs, getattr(each, column)) for each in samples if each.runs >= WARM * last]
    slopes = [(v - u) / (n - m) for i, (m, u) in enumerate(points) for n, v in points[i + 1 :] if n > m]
    return 1000 * median(slopes) if slopes else float("nan")


def show(sample: Sample) -> None:
    print(
        f"{sample.runs:7,} {sample.process:9} {sample.rss_mib:8.1f} {sample.pss_mib:8.1f} {sample.threads:8} "
        f"{sample.files:6}",
        flush=True,
    )


def soak(folder: Path, minutes: float, runs: int, steps: int, jobs: int) -> tuple[list[Sample], int, float]:
    """Run it. Samples after every 10 runs or so, how many runs ended, and the minutes that it took."""
    seeds = max(3, round((runs - ARMS_AND_POINTS) / ARMS_AND_POINTS))
    (folder / "soak.yaml").write_text(RECIPE.replace("SEEDS", str(seeds)).replace("STEPS", str(steps)))
    options = ["--out", "soak", "--device", "cpu", "--jobs", str(jobs), "--quiet"]
    command = [sys.executable, "-m", "bncli", "compare", "soak.yaml", *options]
    began, samples, shown = time.monotonic(), list[Sample](), -1
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.2)
            done = sum(1 for _ in (folder / "soak" / "runs").glob("[!.]*.json"))
            if done and (not samples or done >= samples[-1].runs + EVERY_RUNS / 10):
                samples += (found := list(sampled(process.pid, done)))
                if done // EVERY_RUNS > shown:
                    shown = done // EVERY_RUNS
                    for sample in found:
                        show(sample)
            if time.monotonic() - began > 60 * minutes:
                process.send_signal(signal.SIGINT)
                process.wait()
    done = sum(1 for _ in (folder / "soak" / "runs").glob("[!.]*.json"))
    return samples, done, (time.monotonic() - began) / 60


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--runs", type=int, default=2000, help="about how many")
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args(arguments)
    print(f"{'runs':>7} {'process':9} {'RSS MiB':>8} {'PSS MiB':>8} {'threads':>8} {'files':>6}")
    with tempfile.TemporaryDirectory() as folder:
        samples, done, minutes = soak(Path(folder), asked.minutes, asked.runs, asked.steps, asked.jobs)
    print(summary(samples, done, minutes))


def summary(samples: Sequence[Sample], done: int, minutes: float) -> str:
    """Each process at its first and last sample, and its growth."""
    lines = [f"{done:,} runs in {minutes:.1f} minutes"]
    for name in dict.fromkeys(sample.process for sample in samples):
        of_one = [sample for sample in samples if sample.process == name]
        parts = []
        for column in COLUMNS:
            first, last = getattr(of_one[0], column), getattr(of_one[-1], column)
            parts.append(f"{column} {first:.4g} to {last:.4g} ({growth(of_one, column):+.3g} over 1,000 runs)")
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
