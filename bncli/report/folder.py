"""Where results are kept: a folder a run, a folder a comparison. Whatever stands in a file was written whole."""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from bncli.errors import BncliError, RecipeError
from bncli.report.record import (
    comparison_from_json,
    event_line,
    record_from_json,
    record_to_json,
    result_to_json,
    to_json,
    write_atomically,
)
from bncli.results import Comparison, Event, RunRecord, RunResult

RESULT, METRICS, RECIPE, COMPARISON = "result.json", "metrics.jsonl", "recipe.yaml", "comparison.json"


class RunFolder:
    """One run of `bncli train`: recipe.yaml (resolved), metrics.jsonl (an event a line), result.json."""

    def __init__(self, path: Path | None, name: str, overwrite: bool = False) -> None:
        self.path = path or _dated(Path("runs") / name)
        if (self.path / RESULT).exists() and not overwrite:
            raise RecipeError(
                f"--out {self.path}: holds a run already; choose another folder or write over it with --force"
            )
        self._metrics: TextIO | None = None

    def begin(self, recipe_yaml: str) -> None:
        """Make the folder and write what is about to run."""
        make(self.path)
        (self.path / RESULT).unlink(missing_ok=True)
        write_atomically(self.path / RECIPE, recipe_yaml)
        self._metrics = (self.path / METRICS).open("w", encoding="utf-8")

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
        with contextlib.suppress(ImportError):  # no such lock on Windows
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise BncliError(
                    f"{self.path}: another comparison is writing here; wait for it, or choose --out"
                ) from None
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


def _dated(parent: Path) -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names: Any = (parent / (now + (f"-{n}" if n else "")) for n in range(1000))
    return next(path for path in names if not os.path.lexists(path))
