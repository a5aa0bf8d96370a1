"""Where results are kept: a folder a run, a folder a comparison. Whatever stands in a file was written whole."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from bncli.errors import BncliError, RecipeError
from bncli.report.record import (
    comparison_from_json,
    event_line,
    record_from_json,
    record_to_json,
    result_from_json,
    result_to_json,
    to_json,
    write_atomically,
)
from bncli.results import Comparison, Event, RunRecord, RunResult

RESULT, METRICS, RECIPE, COMPARISON = "result.json", "metrics.jsonl", "recipe.yaml", "comparison.json"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # not on Windows


class RunFolder:
    """One run of `bncli train`: recipe.yaml (resolved), metrics.jsonl (an event a line), result.json.

    Nothing is made before `begin`, which takes the folder for this run alone. A file that bncli did not write, or that
    was edited since, is never written over; bncli's own are with `overwrite`.
    """

    def __init__(self, path: Path | None, name: str, overwrite: bool = False) -> None:
        self.path = path or Path("runs") / name  # without a path: the parent of the folder that begin makes
        self._dated, self._overwrite = path is None, overwrite
        self._metrics: TextIO | None = None
        if not self._dated:
            self._refuse_what_stands()

    def begin(self, recipe_yaml: str) -> None:
        """Make the folder and write what is about to run. Raises RecipeError where the folder holds a run already."""
        if self._dated:
            self.path = _make_dated(self.path)
        else:
            make(self.path)
            self._refuse_what_stands()
        self._metrics = self._claim()
        self._metrics.truncate(0)
        (self.path / RESULT).unlink(missing_ok=True)
        write_atomically(self.path / RECIPE, signed(recipe_yaml))

    def _refuse_what_stands(self) -> None:
        there = [name for name in OWN if os.path.lexists(self.path / name)]
        for name in there:
            if not _is_own(self.path / name):
                raise RecipeError(
                    f"--out {self.path}: {self.path / name} was not written by bncli, or was edited since, and is "
                    "never written over; choose another folder"
                )
        if there and not self._overwrite:
            unfinished = "a run" if RESULT in there else "an unfinished run"
            raise self._taken(f"holds {unfinished} already")

    def _claim(self) -> TextIO:
        """metrics.jsonl, open and locked: of several runs that want one folder, one gets it."""
        fresh = 0 if self._overwrite else os.O_EXCL
        try:
            number = os.open(self.path / METRICS, os.O_WRONLY | os.O_CREAT | fresh | NO_LINK, 0o666)
        except FileExistsError:
            raise self._taken("holds a run already") from None
        except OSError as error:
            raise RecipeError(f"--out {self.path}: cannot be written to: {error.strerror}") from error
        file = os.fdopen(number, "w", encoding="utf-8")
        if not _lock(file):
            file.close()
            raise RecipeError(f"--out {self.path}: another run is writing there; choose another folder")
        return file

    def _taken(self, why: str) -> RecipeError:
        return RecipeError(f"--out {self.path}: {why}; choose another folder or write over it with --force")

    def metrics(self, event: Event) -> None:
        """A sink: the event as a line of metrics.jsonl, there at once for whoever reads along."""
        assert self._metrics is not None
        self._metrics.write(event_line(event) + "\n")
        self._metrics.flush()

    def finish(self, result: RunResult) -> None:
        write_atomically(self.path / RESULT, result_to_json(result))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()


def signed(recipe_yaml: str) -> str:
    """A resolved recipe under a first line by which an edited one is told from one as bncli wrote it."""
    digest = hashlib.sha256(recipe_yaml.encode()).hexdigest()
    return f"# Resolved by bncli, which writes over this file only while it is unedited: sha256 {digest}\n{recipe_yaml}"


def _is_signed(text: str) -> bool:
    return text == signed(text.partition("\n")[2])


def _begins_a_run(text: str) -> bool:
    """Whether this is a metrics.jsonl; it is empty until the first event."""
    return not text or bool(json.loads(text.partition("\n")[0])["event"] == "run_started")


def _is_result(text: str) -> bool:
    return isinstance(result_from_json(text), RunResult)


OWN: dict[str, Callable[[str], bool]] = {RECIPE: _is_signed, METRICS: _begins_a_run, RESULT: _is_result}


def _is_own(path: Path) -> bool:
    """Whether bncli wrote this file of a run's folder. A link is nobody's: what it points to may stand anywhere."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return OWN[path.name](path.read_text(encoding="utf-8"))
    except (BncliError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


class ComparisonFolder:
    """All runs of a comparison, a file each under its key, so that a call that was killed goes on where it stopped.

    runs/KEY.json: ended runs. failed/KEY.json: runs that died, to be tried again. comparison.json: the answer.
    One process at a time may write here; a lock that dies with its holder sees to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> ComparisonFolder:
        for folder in (self.path / "runs", self.path / "failed"):
            make(folder)
        self._lock = (self.path / ".lock").open("w")
        if not _lock(self._lock):
            self._lock.close()
            raise BncliError(f"{self.path}: another comparison is writing here; wait for it, or choose --out")
        for failed in (self.path / "failed").glob("*.json"):
            failed.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def finished(self) -> dict[str, RunRecord]:
        """The runs that ended, by key. A file that cannot be read is as good as none: its run is done again."""
        found = {}
        for file in (self.path / "runs").glob("*.json"):
            with contextlib.suppress(BncliError, OSError, UnicodeDecodeError):
                record = record_from_json(file.read_text(encoding="utf-8"))
                found[record.key] = record
        return found

    def save(self, record: RunRecord) -> None:
        folder = "runs" if record.result is not None else "failed"
        write_atomically(self.path / folder / f"{record.key}.json", record_to_json(record))

    def finish(self, comparison: Comparison) -> None:
        write_atomically(self.path / COMPARISON, to_json(comparison))


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises RecipeError for anything else."""
    file = path / COMPARISON if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RecipeError(
            f"--from {path}: {file} cannot be read: {why}; give a JSON file that compare wrote"
        ) from error
    try:
        return comparison_from_json(text)
    except BncliError as error:
        raise RecipeError(f"--from {file}: {error}") from error


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {folder}: cannot be made: {error.strerror}") from error


def _make_dated(parent: Path) -> Path:
    """A new folder named after the time. Whoever makes it has it; the next in the same second takes the next name."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (now + (f"-{number}" if number else "") for number in itertools.count())
    while True:
        path = parent / next(names)
        make(parent)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise RecipeError(f"{path}: cannot be made: {error.strerror}") from error
        return path


def _lock(file: TextIO) -> bool:
    """Take an open file's lock, which ends with the process that holds it; False where another holds it."""
    with contextlib.suppress(ImportError):  # no such lock on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
