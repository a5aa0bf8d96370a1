"""How long the door takes to open: `python -m tests.benchmarks.start_up`.

Whole processes, interleaved, CPU time and wall time of each, as ratios to Python with the libraries that such a command
line cannot do without, and to Python alone. Targets: `--help` at most 1.5x of the former; help, usage errors and dry
runs at most 15x of the latter; `train` at most 10 % or 150 ms above what importing torch takes.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).parent.parent.parent
BNCLI = [sys.executable, "-m", "bncli"]
BARE, LIBRARIES, TORCH = "python -c pass", "import typer, rich.table, rich.progress", "import torch"
COMMANDS: dict[str, list[str]] = {
    BARE: [sys.executable, "-c", "pass"],
    LIBRARIES: [sys.executable, "-c", LIBRARIES],
    "bncli --help": [*BNCLI, "--help"],
    "bncli compare --help": [*BNCLI, "compare", "--help"],
    "bncli trian (a typing error)": [*BNCLI, "trian"],
    "bncli train missing.yaml": [*BNCLI, "train", "missing.yaml"],
    "bncli compare digits.yaml --dry-run": [*BNCLI, "compare", "recipes/digits.yaml", "--dry-run"],
    TORCH: [sys.executable, "-c", TORCH],
    "bncli train digits.yaml, 1 step": [
        *BNCLI, "train", "recipes/digits.yaml", "--set", "train.steps=1", "--set", "train.evaluate_every=1", "-q", "-f",
    ],
}  # fmt: skip


def measured(command: Sequence[str]) -> tuple[float, float]:
    """CPU and wall milliseconds of one process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return 1e3 * cpu, 1e3 * (perf_counter() - began)


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: [*c, "-o", folder] if "1 step" in name else c for name, c in COMMANDS.items()}
        for _ in range(rounds + 1):
            for name in random.sample(list(commands), len(commands)):
                found[name].append(measured(commands[name]))
    cpu = {name: [one for one, _ in times[1:]] for name, times in found.items()}  # the first round warms the caches
    wall = {name: [other for _, other in times[1:]] for name, times in found.items()}
    print(f"{'':36} {'wall ms':>8} {'CPU ms':>7}   {'x bare':>6} {'x libraries':>11}   (CPU; medians of {rounds})")
    for name in COMMANDS:
        bare, libraries = (ratio(cpu[name], cpu[base]) for base in (BARE, LIBRARIES))
        print(f"{name:36.36} {median(wall[name]):8.0f} {median(cpu[name]):7.0f}   {bare:6.1f} {libraries:11.2f}")
    train = "bncli train digits.yaml, 1 step"
    above = [a - b for a, b in zip(wall[train], wall[TORCH], strict=True)]
    print(f"train above `import torch`: {median(above):.0f} ms of wall time, {median(above) / median(wall[TORCH]):.0%}")


if __name__ == "__main__":
    main()
