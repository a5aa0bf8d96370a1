"""Folder of a comparison: its plan, its runs and its answer."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import TextIO

from bncli.errors import BncliError, UsageError
from bncli.report.files import Result, from_json, load, to_json
from bncli.report.folder import PLAN, parsed
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.serialize import to_plain
from bncli.storage import lock, make, open_plain, replace

COMPARISON = "comparison.json"


class ComparisonFolder:
    """All runs of a comparison, each in a file under its key, so that a killed call continues where it stopped.

    plan.json: the plan of the last call. runs/KEY.json: runs that ended; KEY-CODE.json with a model
    of the user's, so that runs of earlier code are kept. failed/KEY.json: runs that died, to be tried again.
    comparison.json: the answer. A lock, which ends with its process, lets one process at a time write here.
    A file that does not read as what bncli writes there is never written over or deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> ComparisonFolder:
        self._new = not self.path.exists()
        make(self.path)
        try:
            self._lock = open_plain(self.path / ".lock")
        except OSError as error:
            raise UsageError(f"cannot be written to: {error.strerror}", field="out", value=self.path) from error
        if not lock(self._lock):
            self._lock.close()
            raise BncliError(f"{self.path}: another comparison is writing here; wait for it, or choose another folder")
        for file, read in ((PLAN, self.begun), (COMPARISON, self.answer)):
            if os.path.lexists(self.path / file) and read() is None:
                self._lock.close()
                why = f"{self.path / file} was not written by this version of bncli and is never overwritten"
                raise UsageError(f"{why}; choose another folder", field="out", value=self.path)
        for folder in (self.path / "runs", self.path / "failed"):
            make(folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self._new and not any(self.path.rglob("*.json")):  # nothing was begun, so nothing is left behind
            shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock.close()

    def begin(self, begun: BegunComparison) -> None:
        """Save the plan, and delete the runs that failed before."""
        for name in self.failed():
            (self.path / "failed" / f"{name}.json").unlink()
        replace(self.path / PLAN, to_json(begun).encode())

    def begun(self) -> BegunComparison | None:
        """The plan of the last call; None where it is not known."""
        return _result(self.path / PLAN, BegunComparison)

    def answer(self) -> Comparison | None:
        """The last call's answer; None where there is none."""
        return _result(self.path / COMPARISON, Comparison)

    def finished(self) -> dict[str, RunRecord]:
        """The runs that ended, by name. A run whose file cannot be read is missing and will be done again."""
        return self._records("runs")

    def failed(self) -> dict[str, RunRecord]:
        """The failed runs of the last call, by name."""
        return self._records("failed")

    def _records(self, folder: str) -> dict[str, RunRecord]:
        found = {file.stem: _result(file, RunRecord) for file in (self.path / folder).glob("*.json")}
        return {name: record for name, record in found.items() if record is not None and name == _name(record)}

    def save(self, record: RunRecord) -> None:
        file = self.path / ("runs" if record.result is not None else "failed") / f"{_name(record)}.json"
        there = _result(file, RunRecord)
        if os.path.lexists(file) and (there is None or _name(there) != file.stem):
            _keep_beside(file)
        replace(file, to_json(record).encode())

    def keep_other(self, plan: ComparisonPlan) -> Path | None:
        """Rename an existing answer to another plan, so that it is kept. Its new name; None where there was none."""
        answer = self.answer()
        if answer is None or to_plain(answer.plan) == to_plain(plan):
            return None
        return _keep_beside(self.path / COMPARISON)

    def finish(self, comparison: Comparison) -> None:
        replace(self.path / COMPARISON, to_json(comparison).encode())


def _name(record: RunRecord) -> str:
    """A run's file name without its suffix."""
    code = hashlib.sha256(json.dumps(record.code, sort_keys=True).encode()).hexdigest()[:8]
    return f"{record.key}-{code}" if record.code else record.key


def _result(file: Path, kind: type[Result]) -> Result | None:
    return parsed(file, lambda text: from_json(kind, text))


def _keep_beside(file: Path) -> Path:
    """Rename a file to the first free one of NAME-1, NAME-2 and so on."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not os.path.lexists(name)))


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises UsageError for anything else."""
    file, wanted = path / COMPARISON if path.is_dir() else path, "the folder or the JSON file of a comparison"
    return load(file, lambda text: from_json(Comparison, text), "saved", wanted)
