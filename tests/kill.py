"""SIGKILL at random moments: `python -m tests.kill --times 100`. Prints counts; exit code 1 if anything was lost.

A command is killed, its folder is looked at, and it is started again, until it ends; what it leaves must be what an
uninterrupted call leaves, times excepted. Each start is a fork of this process, which has loaded everything already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.numpy

import bncli.cli
from bncli.engine.train import checkpoint
from bncli.engine.train.weights import unpacked_weights
from bncli.errors import BncliError
from bncli.measure.compare import processes
from bncli.recipe.load import load
from bncli.report.compare.folder import COMPARISON, ComparisonFolder
from bncli.report.files import from_json
from bncli.report.folder import CHECKPOINT, METRICS, MODEL, PLAN, RESULT
from bncli.report.folder import RECIPE as RECIPE_FILE
from bncli.results.train import RunResult
from bncli.storage import TEMPORARY, replace, sweep
from tests.measure.compare.instant_worker import RAN

RECIPE = """\
data: {source: synthetic, shape: [16], classes: 4, examples: 400, held_out: 100, noise: 0.9}
model: {kind: mlp, hidden: [32, 32], activation: relu}
norm: batch
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
schedule: {kind: cosine, warmup: 10}
train: {steps: 400, batch_size: 20, evaluate_every: 5}
"""
STUDY = (
    RECIPE.replace("evaluate_every: 5", "evaluate_every: 5, target: {value: 0.85}")
    + """\
arms: {plain: {norm: none}, normed: }
grid: {optimizer.lr: [0.03, 0.1]}
seeds: {tune: 3, report: 2}
"""
)
SAVED = ["--set", "train.checkpoint.every=50"]
JOBS = 2  # workers of a comparison
MARK = "BNCLI_KILLED"  # in the environment of the processes of one trial
GONE_S = 10.0  # after which a process whose parent was killed must have ended
LONGEST_S = 300.0  # of one start on a busy machine
# Fields that differ from call to call: times, memory, the day, and the digest of a text with these.
TIMES = {
    "ms_per_step", "samples_per_s", "training_s", "evaluation_s", "probes_s", "checkpoint_s", "peak_memory_mib",
    "evaluation_peak_memory_mib", "memory_mib", "environment", "cores_lacked", "at_a_time", "seconds", "notes",
    "remarks", "sources", "sha256",
}  # fmt: skip


# --- processes ----------------------------------------------------------------------------------------------------


class Start:
    """A fork of this process that runs something, with its output in a file."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ[MARK] = self.mark
                work()
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                os._exit(code)
        self.code: int | None = None

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = LONGEST_S) -> bool:
        """Wait for something, or for the end of the process. Whether it still runs."""
        end = time.monotonic() + seconds
        while self.running() and not until() and time.monotonic() < end:
            time.sleep(0.002)
        return self.running()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def orphans(self) -> list[int]:
        """The processes that it started and that are still there when it is gone for some seconds; they are ended."""
        end = time.monotonic() + GONE_S
        while (left := list(self._marked())) and time.monotonic() < end:
            time.sleep(0.05)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return [process.pid for process in left]

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def bncli_(*arguments: str, worker: Sequence[str] | None = None) -> Callable[[], None]:
    """A call of the command line. worker: the command of a worker process, instead of bncli's."""

    def call() -> None:
        if worker:
            made = partialmethod(processes.Processes.__init__, command=worker)
            processes.Processes = type("Processes", (processes.Processes,), {"__init__": made})  # type: ignore[assignment,misc]
        sys.argv = ["bncli", *arguments]
        bncli.cli.main()

    return call


# --- commands -----------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A command and its folder. problems: what was found wrong, in sentences."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    kept: dict[Path, bytes] = field(default_factory=dict)  # files that must never change again
    seen: set[str] = field(default_factory=set)  # names of files that were there
    counts: Counter[str] = field(default_factory=Counter)

    def next_start(self) -> Callable[[], object]:
        raise NotImplementedError

    def begun(self) -> bool:
        """Whether the folder shows that work has begun."""
        raise NotImplementedError

    def look(self) -> None:
        """Look at the folder after a kill."""
        raise NotImplementedError

    def outcome(self) -> Any:
        """What the command left, without times."""
        raise NotImplementedError

    def temporary(self) -> set[Path]:
        return {file for file in self.folder.rglob(".*") if TEMPORARY.fullmatch(file.name)}


class TrainTrial(Trial):
    """With checkpoints; a run that has one goes on from it, and any other begins again."""

    files = (RECIPE_FILE, METRICS, RESULT, CHECKPOINT, MODEL)

    def next_start(self) -> Callable[[], object]:
        recipe = self.folder.parent / "run.yaml"
        recipe.write_text(RECIPE)
        if (self.folder / CHECKPOINT).exists():
            self.counts["starts from a checkpoint"] += 1
            return bncli_("train", "--resume", str(self.folder), "--quiet")
        fixed = ["--device", "cpu", "--threads", "1", "--quiet", "--force"]
        return bncli_("train", str(recipe), "--out", str(self.folder), *fixed, "--set", "train.checkpoint.every=50")

    def begun(self) -> bool:
        return (self.folder / METRICS).exists()

    def look(self) -> None:
        if (self.folder / METRICS).exists():
            *whole, last = (self.folder / METRICS).read_text().split("\n")
            try:
                found = [json.loads(line) for line in whole]
            except ValueError as error:
                self.problems.append(f"{METRICS} has a broken line before its last: {error}")
                found = []
            self.counts["torn last lines of metrics"] += bool(last)
            names = [(each["event"], each.get("step"), str(each.get("points"))) for each in found]
            self.problems += [f"{METRICS} has {count} of {name}" for name, count in Counter(names).items() if count > 1]
        read: dict[str, Callable[[bytes], object]] = {
            CHECKPOINT: checkpoint.unpacked,
            MODEL: unpacked_weights,
            RESULT: lambda data: from_json(RunResult, data.decode()),
            RECIPE_FILE: lambda data: load(str(self.folder / RECIPE_FILE)),
        }
        for name, reader in read.items():
            if (self.folder / name).exists():
                try:
                    reader((self.folder / name).read_bytes())
                except BncliError as error:
                    self.problems.append(f"{name} does not read: {error}")
            elif name == CHECKPOINT and name in self.seen:
                self.problems.append(f"{name} is gone")
        self.seen |= {name for name in self.files if (self.folder / name).exists()}

    def outcome(self) -> Any:
        self.look()
        events = [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]
        result = without_times(json.loads((self.folder / RESULT).read_bytes()))
        return without_times(events), result, safetensors.numpy.load_file(self.folder / MODEL)


class CompareTrial(Trial):
    options: Sequence[str] = ()
    worker: Sequence[str] | None = None

    def next_start(self) -> Callable[[], object]:
        recipe = self.folder.parent / "study.yaml"
        if not recipe.exists():  # another call on the folder may be reading it
            recipe.write_text(STUDY)
        arguments = ["compare", str(recipe), "--out", str(self.folder), "--device", "cpu"]
        arguments += ["--jobs", str(JOBS), "--full-grid", *self.options]  # which points are given up depends on times
        return bncli_(*arguments, worker=self.worker)

    def begun(self) -> bool:
        return (self.folder / PLAN).exists()

    def look(self) -> None:
        for file, content in self.kept.items():
            if not file.exists():
                self.problems.append(f"{file.name}: a finished run is gone")
            elif file.read_bytes() != content:
                self.problems.append(f"{file.name}: a finished run has changed")
        opened = ComparisonFolder(self.folder)
        files = list((self.folder / "runs").glob("*.json"))
        found = opened.finished({file.stem.split("-")[1] for file in files})
        if len(found) != len(files):
            self.problems.append(f"{len(files)} runs have ended and {len(found)} are found")
        self.problems += [f"failed: {record.failure}" for record in opened.failed().values()]
        self.kept.update({file: file.read_bytes() for file in files})
        for name, read in ((PLAN, opened.begun), (COMPARISON, opened.answer)):
            if (self.folder / name).exists() and read() is None:
                self.problems.append(f"{name} is there and cannot be used")
        self.problems += [f"{file} does not read: {why}" for file, why in opened.unfit.items()]
        for file in (self.folder / "checkpoints").glob("[!.]*.pt"):
            checkpoint.unpacked(file.read_bytes())

    def outcome(self) -> Any:
        self.look()
        return without_times(json.loads((self.folder / COMPARISON).read_bytes()))


class CheckpointedCompareTrial(CompareTrial):
    options = SAVED


class FakeCompareTrial(CompareTrial):
    """With workers that train nothing and need no torch."""

    worker = (sys.executable, "-m", "tests.measure.compare.instant_worker")


class SharedCompareTrial(FakeCompareTrial):
    """Several calls at the same time, of which one or all are killed, and others take their places."""

    calls = 3
    options = SAVED  # so that each worker does one run at a time

    def next_start(self) -> Callable[[], object]:
        os.environ[RAN] = str(self.folder.with_suffix(".ran"))
        return super().next_start()

    def outcome(self) -> Any:
        ran = self.folder.with_suffix(".ran").read_text().split()
        again = len(ran) - len(list((self.folder / "runs").glob("*.json")))
        self.counts["runs done again"] += again
        if again > 2 * JOBS * self.counts["kills"]:  # of each worker one that it is doing, and one that is being saved
            self.problems.append(f"{again} runs were done again after {self.counts['kills']} kills")
        calls = [file for file in (self.folder / "calls").iterdir() if file.stat().st_size]  # else killed as it began
        if left := [*(self.folder / "runs").glob("*.lease"), *calls]:
            self.problems.append(f"left: {', '.join(file.name for file in left)}")
        return super().outcome()


class WriteTrial(Trial):
    """Nothing but a file that is replaced again and again, by one of two contents."""

    contents = (b"a" * 3_000_000, b"b" * 40_000)

    def next_start(self) -> Callable[[], object]:
        self.folder.mkdir(exist_ok=True)
        sweep(self.folder)  # as whoever locks a folder does

        def write() -> None:
            while True:
                for content in self.contents:
                    replace(self.folder / "file", content)

        return write

    def begun(self) -> bool:
        return (self.folder / "file").exists()

    def look(self) -> None:
        if self.begun() and (self.folder / "file").read_bytes() not in self.contents:
            self.problems.append("the file is torn")

    def outcome(self) -> Any:
        return None


TRIALS: dict[str, type[Trial]] = {
    "train": TrainTrial,
    "compare": CompareTrial,
    "compare-checkpoint": CheckpointedCompareTrial,
    "compare-fake": FakeCompareTrial,
    "compare-shared": SharedCompareTrial,
    "write": WriteTrial,
}


def without_times(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: without_times(value) for key, value in plain.items() if key not in TIMES}
    return [without_times(each) for each in plain] if isinstance(plain, list) else plain


# --- killing ------------------------------------------------------------------------------------------------------


def difference(one: Any, other: Any, place: str = "its result") -> str | None:
    """The first place at which two outcomes are not equal to the bit."""
    if isinstance(one, dict) and one.keys() == other.keys():
        found = (difference(each, other[name], f"{place}, {name}") for name, each in one.items())
        return next(filter(None, found), None)
    if isinstance(one, list | tuple) and len(one) == len(other):
        found = (difference(each, other[index], f"{place}, {index}") for index, each in enumerate(one))
        return next(filter(None, found), None)
    same = one.tobytes() == other.tobytes() if isinstance(one, np.ndarray) else one == other
    return None if same else place


def uninterrupted(trial: Trial, log: Path) -> tuple[Any, float]:
    """The outcome of a call that is left alone, and how long it took from its first sign to its end, in seconds."""
    start = Start(trial.next_start(), log)
    start.wait(trial.begun)
    began_s = time.monotonic()
    start.wait()
    if start.code != 0:
        raise RuntimeError(f"the uninterrupted call ended with {start.code}:\n{log.read_text()[-2000:]}")
    return trial.outcome(), time.monotonic() - began_s


def kill_often(name: str, times: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill one command so many times, over as many folders as that takes. Counts, and what was wrong."""
    chance, counts, problems = random.Random(f"{seed} {name}"), Counter[str](), list[str]()
    kind = TRIALS[name]
    endless = kind is WriteTrial
    with tempfile.TemporaryDirectory() as parent:
        expected, longest_s = (None, 0.05)
        if not endless:
            expected, longest_s = uninterrupted(kind(Path(parent) / "alone"), Path(parent) / "alone.log")
        while counts["kills"] < times:
            counts["folders"] += 1
            trial = kind(Path(parent) / f"folder-{counts['folders']}")
            log = Path(parent) / f"folder-{counts['folders']}.log"
            kill = _kill_until_all_end if isinstance(trial, SharedCompareTrial) else _kill_until_it_ends
            ended = kill(trial, log, chance, longest_s, times, counts)
            if ended is not None and ended.code != 0:
                trial.problems.append(f"ended with {ended.code}: {log.read_text()[-1500:]}")
            elif ended is not None and (place := difference(trial.outcome(), expected)):
                trial.problems.append(f"{place}: differs from the uninterrupted call's")
            if endless:
                sweep(trial.folder)
            if (left := trial.temporary()) and not trial.problems:
                trial.problems.append(f"stale temporary files: {', '.join(sorted(map(str, left)))}")
            counts["finished runs kept"] += len(trial.kept)
            counts.update({what: count for what, count in trial.counts.items() if what != "kills"})
            problems += [f"{trial.folder.name}: {each}" for each in trial.problems]
    return counts, problems


def _kill_until_it_ends(
    trial: Trial, log: Path, chance: random.Random, longest_s: float, times: int, counts: Counter[str]
) -> Start | None:
    """Start the command and kill it, again and again; the start that ended by itself."""
    while True:
        last = counts["kills"] >= times
        if last and isinstance(trial, WriteTrial):
            return None
        stale = trial.temporary()
        since = partial(_changed, trial, _last_change(trial))
        start = Start(trial.next_start(), log)
        early = chance.random() < 0.1  # while it starts
        if not early:
            start.wait(since)
            if stale & trial.temporary() and start.running():
                trial.problems.append("temporary files of a killed call are there after the next one has begun")
        moment_s = chance.random() * (0.3 if early else longest_s)
        if not start.wait(seconds=LONGEST_S if last else moment_s):
            counts["orphans"] += len(start.orphans())
            return start
        if last:
            start.kill()
            trial.problems.append(f"has not ended after {LONGEST_S:g} s: {log.read_text()[-1500:]}")
            return None
        start.kill()
        counts["kills"] += 1
        counts["kills while it started"] += early
        counts["temporary files left by kills"] += len(trial.temporary() - stale)
        if orphans := start.orphans():
            trial.problems.append(f"{len(orphans)} processes were left")
            counts["orphans"] += len(orphans)
        if trial.begun():
            trial.look()


def _kill_until_all_end(
    trial: Trial, log: Path, chance: random.Random, longest_s: float, times: int, counts: Counter[str]
) -> Start | None:
    """Start several calls at the same time, kill one or all and start others, again and again; one that has ended."""
    assert isinstance(trial, SharedCompareTrial)
    starts: list[Start] = []
    while counts["kills"] < times and all(start.running() for start in starts):
        starts += [Start(trial.next_start(), log) for _ in range(trial.calls - len(starts))]
        time.sleep(chance.random() * longest_s)
        for start in list(starts) if chance.random() < 0.2 else [chance.choice(starts)]:
            if start.running() and counts["kills"] < times:
                start.kill()
                starts.remove(start)
                counts["kills"] += 1
                trial.counts["kills"] += 1
                counts["orphans"] += len(start.orphans())
        if trial.begun():
            trial.look()
    for start in starts:
        start.wait()
    starts.append(Start(trial.next_start(), log))  # which deletes what those that were killed last have left
    for start in starts:
        if start.wait():
            start.kill()
            trial.problems.append(f"has not ended after {LONGEST_S:g} s: {log.read_text()[-1500:]}")
        elif start.code != 0:
            trial.problems.append(f"ended with {start.code}: {log.read_text()[-1500:]}")
    return starts[-1]


def _changed(trial: Trial, before: int) -> bool:
    return _last_change(trial) != before


def _last_change(trial: Trial) -> int:
    """Of the files that a start writes when it has begun to work in the folder."""
    signs = [trial.folder / name for name in (PLAN, METRICS, RESULT, "file")]
    return max((file.stat().st_mtime_ns for file in signs if file.exists()), default=0)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="kills of each command")
    parser.add_argument("--command", action="append", choices=list(TRIALS), help="may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args(arguments)
    wrong = 0
    for name in asked.command or [each for each in TRIALS if each not in ("compare-fake", "compare-shared")]:
        counts, problems = kill_often(name, asked.times, asked.seed)
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}; {len(problems)} problems")
        for problem in problems:
            print(f"  {problem}")
        sys.stdout.flush()
        wrong += len(problems)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
