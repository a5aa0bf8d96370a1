"""A small recipe and the user's own code in the current folder, and calls of the command line."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bncli.cli import main
from bncli.engine import data
from bncli.engine.device import resolve
from bncli.engine.train import train, train_together
from bncli.engine.user_code import LoadedFiles
from bncli.measure.compare import processes
from bncli.measure.compare.plan import Job
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.results.serialize import to_plain
from bncli.results.train import RunFinished
from tests.measure.compare.conftest import result

RECIPE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 120, held_out: 60, noise: 0.5}
model: {kind: mlp, hidden: [16], activation: relu}
optimizer: {kind: sgd, lr: 0.5}
train: {steps: 60, batch_size: 20, evaluate_every: 5, target: {value: 0.9}}
arms:
  plain: {}
  normed: {norm: batch}
grid: {optimizer.lr: [0.1, 0.5]}
seeds: {tune: 3, report: 2}
"""


@dataclass(frozen=True)
class Ran:
    """What a call of the command line left."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The output without its line breaks."""
        return " ".join(self.out.split())


def bncli(*arguments: str) -> Ran:
    """A call in this process."""
    out, err, argv = io.StringIO(), io.StringIO(), mock.patch.object(sys, "argv", ["bncli", *arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv, pytest.raises(SystemExit) as left:
        main()
    gc.enable()
    assert "Traceback" not in err.getvalue()
    return Ran(int(left.value.code or 0), out.getvalue(), err.getvalue())


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A call in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "bncli", *arguments], text=True, **pipes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the small recipe; modules of the user's own that are imported from it are forgotten."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget_modules(tmp_path)


def forget_modules(folder: Path) -> None:
    """Forget what was imported from a folder, as a new process would."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def recipe(folder: Path) -> str:
    return "small.yaml"


# --- comparisons without worker processes -------------------------------------------------------------------------


@dataclass
class InThisProcess:
    """An executor in the place of the worker processes."""

    device: str
    jobs: int | None
    threads: int
    folder: Path = Path()
    checkpoints: Path | None = None
    longest_silence_s: float | None = None
    command: Sequence[str] = ()

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | Ended | None]:
        while work.more and not stop():
            if not (jobs := work.take(workers=10**9)):  # other calls do the rest
                yield None
                continue
            (job,) = jobs
            work.ended(job)
            yield Started(0, job)
            yield self.ended(job)

    def give_up(self, keys: Collection[str]) -> None:
        pass

    def close(self) -> None:
        pass

    def ended(self, job: Job) -> Ended:
        """A result that is made up; the arm called deadly fails, the one called late misses its target."""
        if job.arm == "deadly" and not job.check:
            return Ended(0, job, None, "its worker process was killed by SIGKILL")
        steps, budget = 5.0 + job.seed + 50 * (job.recipe.optimizer.lr < 0.5), job.recipe.train.steps
        found = result(None if job.arm == "late" or steps > budget else steps)
        environment = replace(found.environment, threads=self.threads)
        evaluations = tuple(each for each in found.evaluations if each.step <= budget)
        found = replace(found, budget=budget, steps_run=min(found.steps_run, budget), evaluations=evaluations)
        return Ended(0, job, to_plain(replace(found, ms_per_step=float(self.threads), environment=environment)))


@dataclass
class Training(InThisProcess):
    """An executor that trains each run in this process, and forgets the user's own code before as a new one would."""

    def __post_init__(self) -> None:
        forget_modules(Path.cwd())
        self.loaded = LoadedFiles()

    def ended(self, job: Job) -> Ended:
        last: Any
        if job.company:
            dataset = data.load(job.recipe.data, resolve(self.device))
            *_, (_, last) = train_together([job.recipe], self.device, dataset=dataset, threads=self.threads)
        else:
            *_, last = train(job.recipe, self.device, threads=self.threads)
        assert isinstance(last, RunFinished)
        self.loaded.note()
        code = self.loaded.files if job.recipe.model.kind == "module" else {}
        return Ended(0, job, json.loads(json.dumps(to_plain(last.result))), code=code)


@pytest.fixture
def made_up_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "Processes", InThisProcess)


@pytest.fixture
def runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "Processes", Training)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)  # of a test before, in another folder
