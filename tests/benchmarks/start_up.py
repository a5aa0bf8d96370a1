"""How long commands take to start: `python -m tests.benchmarks.start_up`.

First table: whole processes, interleaved; CPU time as ratios, paired within a round, to Python with the libraries that
such a command line needs in any case, and to Python alone. Targets: `--help` at most 1.5x of the former; help, usage
errors and dry runs at most 15x of the latter.

Last line: wall time until `bncli train` begins its first step, and until `import torch` is done. Target: at most 10 %
or 150 ms above.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
BNCLI = [sys.executable, "-m", "bncli"]
BARE, LIBRARIES = "python -c pass", "python -c 'import typer, rich...'"
HELP, COMMAND_HELP, USAGE = "bncli --help", "bncli compare --help", "an unknown command"
MISSING, DRY_RUN = "bncli train missing.yaml", "bncli compare digits.yaml --dry-run"
COMMANDS: dict[str, list[str]] = {
    BARE: [sys.executable, "-c", "pass"],
    LIBRARIES: [sys.executable, "-c", "import typer, rich.table, rich.progress"],
    HELP: [*BNCLI, "--help"],
    COMMAND_HELP: [*BNCLI, "compare", "--help"],
    USAGE: [*BNCLI, "trian"],
    MISSING: [*BNCLI, "train", "missing.yaml"],
    DRY_RUN: [*BNCLI, "compare", "recipes/digits.yaml", "--dry-run"],
}


def cpu_and_wall_ms(command: Sequence[str]) -> tuple[float, float]:
    """Of one whole process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return 1e3 * cpu, 1e3 * (time.perf_counter() - began)


def ms_until(file: Path, command: Sequence[str]) -> float:
    """Wall time from the start of a process until it has made a file."""
    file.unlink(missing_ok=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not file.exists():
        assert process.poll() is None, f"{command} ended without {file}"
        time.sleep(0.001)
    found = 1e3 * (time.perf_counter() - began)
    process.wait()
    return found


def interleaved(tasks: dict[str, Callable[[], tuple[float, ...]]], rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """Every task once a round in random order; of several rounds the first warms the caches and is not counted."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name in random.sample(list(tasks), len(tasks)):
            found[name].append(tasks[name]())
    return {name: times[1:] or times for name, times in found.items()}


def cpu_ratios(rounds: int) -> dict[str, tuple[float, float, float, float]]:
    """Command -> median wall ms, median CPU ms, CPU ratio to bare Python, CPU ratio to Python with the libraries."""
    found = interleaved({name: lambda c=c: cpu_and_wall_ms(c) for name, c in COMMANDS.items()}, rounds)  # type: ignore[misc]

    def ratio(name: str, base: str) -> float:
        return median(one[0] / other[0] for one, other in zip(found[name], found[base], strict=True))

    return {
        name: (median(t[1] for t in times), median(t[0] for t in times), ratio(name, BARE), ratio(name, LIBRARIES))
        for name, times in found.items()
    }


def train_and_torch_ms(rounds: int) -> tuple[float, float]:
    """Median wall ms until `bncli train` on digits begins its first step, and until torch is imported."""
    with tempfile.TemporaryDirectory() as folder:
        begun, imported = Path(folder) / "metrics.jsonl", Path(folder) / "imported"
        settings = ["--set", "train.steps=1", "--set", "train.evaluate_every=1", "-q", "-f", "-o", folder]
        train = [*BNCLI, "train", "recipes/digits.yaml", *settings]
        torch = [sys.executable, "-c", f"import torch, pathlib; pathlib.Path({str(imported)!r}).touch()"]
        found = interleaved(
            {"train": lambda: (ms_until(begun, train),), "torch": lambda: (ms_until(imported, torch),)}, rounds
        )
    return median(t for (t,) in found["train"]), median(t for (t,) in found["torch"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args(arguments).rounds
    print(f"{'':36} {'wall ms':>8} {'CPU ms':>7} {'x bare':>8} {'x libraries':>12}   (medians of {rounds} rounds)")
    for name, (wall, cpu, bare, libraries) in cpu_ratios(rounds).items():
        print(f"{name:36} {wall:8.0f} {cpu:7.0f} {bare:8.1f} {libraries:12.2f}")
    train, torch = train_and_torch_ms(rounds)
    print(f"`bncli train` begins its first step after {train:.0f} ms, `import torch` takes {torch:.0f} ms: "
          f"{train - torch:.0f} ms or {train / torch - 1:.0%} above")  # fmt: skip


if __name__ == "__main__":
    main()
