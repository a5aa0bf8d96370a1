"""Studies of a small recipe, and made-up results of their runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bncli.measure.compare.plan import Job, Study, collect, named_runs, study
from bncli.recipe.load import load
from bncli.results.compare import RunRecord
from bncli.results.environment import Environment
from bncli.results.train import Evaluation, RunResult, Status, Target

BASE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 200, held_out: 50}
model: {kind: mlp, hidden: [8]}
optimizer: {kind: sgd, lr: 1.0}
train: {steps: 1000, batch_size: 20, evaluate_every: 5, target: {value: 0.9}, seed: 7}
"""
ARMS = """
arms:
  plain:
  normed: {norm: batch}
grid: {optimizer.lr: [0.1, 1, 10]}
seeds: {tune: 3, report: 5}
"""
UNTUNED = "arms: {plain: , normed: {norm: batch}}\nseeds: {report: 5}"

HERE = Environment("0", "3", "2", "Linux", "a processor", "cpu", None, 1, "2026-01-01T00:00:00+00:00")

StudyOf = Callable[..., Study]


@pytest.fixture
def study_of(tmp_path: Path) -> StudyOf:
    """Makes the study of one or more recipes, given as texts; they are recipe0, recipe1 and so on."""

    def make(*texts: str) -> Study:
        files = [tmp_path / f"recipe{number}.yaml" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return study([load(str(file), allow_code=True) for file in files])

    return make


@pytest.fixture
def asked(study_of: StudyOf) -> Study:
    return study_of(BASE + ARMS)


def result(
    steps: float | None, status: Status | None = None, best: float = 0.95, processor: str = "a", every: int = 5
) -> RunResult:
    """A run at 0.1 up to its steps to target and at `best` from there on; a step takes a millisecond."""
    status = status or ("budget" if steps is None else "reached")
    run = 1000 if steps is None else every * math.ceil(1.3 * steps / every)
    at = range(0, run + 1, every)
    evaluations = tuple(Evaluation(s, 0.1 if s < (steps or run) else best, 2.3, None) for s in at)
    return RunResult(
        status, run, 1000, Target("accuracy", 0.9), steps, None if steps is None else math.ceil(steps), best, best,
        evaluations, 1.0, 60_000.0, 1.0, 0.1, 300.0, 99, replace(HERE, processor=processor),
    )  # fmt: skip


def record(job: Job, steps: float | None, **changes: Any) -> RunRecord:
    return RunRecord(job.key, job.arm, job.point, job.seed, job.phase, result(steps, **changes))


def carried_out(asked: Study, steps: Callable[[Job], float | None]) -> list[RunRecord]:
    """Every run of a study done, `steps(job)` giving its steps to target."""
    records: dict[str, RunRecord] = {}
    while to_do := [job for job in named_runs(asked, records).jobs if job.key not in records]:
        records.update({job.key: record(job, steps(job)) for job in to_do})
    return collect(asked, records)


def always(record: RunRecord) -> bool:
    return True


def changed(
    records: Sequence[RunRecord], when: Callable[[RunRecord], bool] = always, threads: int = 1, **fields: Any
) -> list[RunRecord]:
    """The records, with other fields in the results of some."""

    def change(one: RunRecord) -> RunRecord:
        assert one.result is not None
        environment = replace(one.result.environment, threads=threads)
        return replace(one, result=replace(one.result, environment=environment, **fields))

    return [change(one) if when(one) else one for one in records]


def failed(records: Sequence[RunRecord], when: Callable[[RunRecord], bool] = always) -> list[RunRecord]:
    """The records, with a failure in place of the results of some."""
    return [replace(one, result=None, failure="it died") if when(one) else one for one in records]
