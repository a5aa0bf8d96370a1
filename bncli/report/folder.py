"""Folders of results: one for each run and one for each comparison. Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.files import Result, event_line, from_json, load, to_json, write_atomically
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.serialize import to_plain
from bncli.results.train import Event, RunResult

T = TypeVar("T")

RESULT, METRICS, RECIPE = "result.json", "metrics.jsonl", "recipe.yaml"
PLAN, COMPARISON = "plan.json", "comparison.json"
TAKEN = "already contains {}; choose another folder, or overwrite it"


class RunFolder:
    """One run of `bncli train`: recipe.yaml (resolved), metrics.jsonl (one event per line), result.json.

    Nothing is made before `begin`, which locks the folder for this run. A file that bncli did not write, or that
    was edited since, is never written over; bncli's own are with `overwrite`.
    """

    def __init__(self, path: Path | None, name: str, overwrite: bool = False) -> None:
        self.path = path or Path("runs") / name  # without a path: the parent of the folder that begin makes
        self._dated, self._overwrite = path is None, overwrite
        self._metrics: TextIO | None = None
        if not self._dated:
            self._refuse_other_files()

    def begin(self, recipe_yaml: str) -> None:
        """Make the folder and write what is about to run. Raises UsageError where the folder holds a run already."""
        if self._dated:
            self.path = _make_dated(self.path)
        else:
            make(self.path)
            self._refuse_other_files()
        self._metrics = self._claim()
        self._metrics.truncate(0)
        (self.path / RESULT).unlink(missing_ok=True)
        write_atomically(self.path / RECIPE, signed(recipe_yaml))

    def _refuse_other_files(self) -> None:
        if os.path.lexists(self.path / PLAN):
            raise self._refused("contains a comparison; choose another folder for a single run")
        there = [name for name in OWN if os.path.lexists(self.path / name)]
        for file in (self.path / name for name in there):
            if not _read(file, OWN[file.name]):
                raise self._refused(
                    f"{file} was not written by bncli, or was edited since, and is never overwritten; "
                    "choose another folder"
                )
        if there and not self._overwrite:
            raise self._refused(TAKEN.format("a run" if RESULT in there else "an unfinished run"), "overwrite")

    def _claim(self) -> TextIO:
        """metrics.jsonl, open and locked: only one of several runs gets the folder."""
        try:
            file = _open(self.path / METRICS, 0 if self._overwrite else os.O_EXCL)
        except FileExistsError:
            raise self._refused(TAKEN.format("a run"), "overwrite") from None
        except OSError as error:
            raise self._refused(f"cannot be written to: {error.strerror}") from error
        if not _lock(file):
            file.close()
            raise self._refused("another run is writing there; choose another folder")
        return file

    def _refused(self, why: str, permission: str | None = None) -> UsageError:
        return UsageError(why, field="out", value=self.path, permission=permission)

    def metrics(self, event: Event) -> None:
        """A sink: writes the event as a line of metrics.jsonl and flushes it."""
        assert self._metrics is not None
        self._metrics.write(event_line(event) + "\n")
        self._metrics.flush()

    def finish(self, result: RunResult) -> None:
        write_atomically(self.path / RESULT, to_json(result))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):  # of a full disk, which does not tell the file
            error.filename = error.filename or str(self.path / METRICS)
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # each line was flushed, or failed to be
                self._metrics.close()


def signed(recipe_yaml: str) -> str:
    """A resolved recipe below a first line with its digest, which shows whether it was edited."""
    digest = hashlib.sha256(recipe_yaml.encode()).hexdigest()
    return f"# Resolved by bncli, which writes over this file only while it is unedited: sha256 {digest}\n{recipe_yaml}"


# File of a run's folder -> whether its content is as bncli wrote it.
OWN: dict[str, Callable[[str], bool]] = {
    RECIPE: lambda text: text == signed(text.partition("\n")[2]),
    METRICS: lambda text: not text or text.startswith('{"event": "run_started", '),  # empty until the first event
    RESULT: lambda text: isinstance(from_json(RunResult, text), RunResult),
}


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
            self._lock = _open(self.path / ".lock")
        except OSError as error:
            raise UsageError(f"cannot be written to: {error.strerror}", field="out", value=self.path) from error
        if not _lock(self._lock):
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
        write_atomically(self.path / PLAN, to_json(begun))

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
        write_atomically(file, to_json(record))

    def keep_other(self, plan: ComparisonPlan) -> Path | None:
        """Rename an existing answer to another plan, so that it is kept. Its new name; None where there was none."""
        answer = self.answer()
        if answer is None or to_plain(answer.plan) == to_plain(plan):
            return None
        return _keep_beside(self.path / COMPARISON)

    def finish(self, comparison: Comparison) -> None:
        write_atomically(self.path / COMPARISON, to_json(comparison))


def _name(record: RunRecord) -> str:
    """A run's file name without its suffix."""
    code = hashlib.sha256(json.dumps(record.code, sort_keys=True).encode()).hexdigest()[:8]
    return f"{record.key}-{code}" if record.code else record.key


def _result(file: Path, kind: type[Result]) -> Result | None:
    return _read(file, lambda text: from_json(kind, text))


def _read(file: Path, parse: Callable[[str], T]) -> T | None:
    """The parsed content of a plain file; None where it is missing, a link, or not readable by `parse`."""
    with contextlib.suppress(BncliError, OSError, UnicodeDecodeError):
        if file.is_file() and not file.is_symlink():
            return parse(file.read_text(encoding="utf-8"))
    return None


def _keep_beside(file: Path) -> Path:
    """Rename a file to the first free one of NAME-1, NAME-2 and so on."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not os.path.lexists(name)))


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises UsageError for anything else."""
    file, wanted = path / COMPARISON if path.is_dir() else path, "the folder or the JSON file of a comparison"
    return load(file, lambda text: from_json(Comparison, text), "saved", wanted)


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be created: {error.strerror}", field="out", value=folder) from error


def _make_dated(parent: Path) -> Path:
    """A new folder named after the time; with a number where a run of the same second has made that one."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    make(parent)
    names = (f"{now}-{number}" if number else now for number in itertools.count())
    while True:
        path = parent / next(names)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise FileError(f"{path}: cannot be created: {error.strerror}") from error


def _open(file: Path, flags: int = 0) -> TextIO:
    """The file, created where it is missing, for writing; links are not followed."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | no_link | flags, 0o666), "w", encoding="utf-8")


def _lock(file: TextIO) -> bool:
    """Lock an open file until this process closes it or ends; False where another process holds the lock."""
    with contextlib.suppress(ImportError):  # no such lock on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
