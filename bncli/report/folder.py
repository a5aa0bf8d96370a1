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
from typing import TextIO, TypeVar

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.files import Result, event_line, from_json, to_json, write_atomically
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.serialize import to_plain
from bncli.results.train import Event, RunResult

T = TypeVar("T")

RESULT, METRICS, RECIPE = "result.json", "metrics.jsonl", "recipe.yaml"
PLAN, COMPARISON = "plan.json", "comparison.json"
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
        """Make the folder and write what is about to run. Raises UsageError where the folder holds a run already."""
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
        if os.path.lexists(self.path / PLAN):
            raise self._refused("holds a comparison; choose another folder for a run of its own")
        there = [name for name in OWN if os.path.lexists(self.path / name)]
        for name in there:
            if not _read(self.path / name, OWN[name]):
                raise self._refused(
                    f"{self.path / name} was not written by bncli, or was edited since, and is never written over; "
                    "choose another folder"
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
            raise self._refused(f"cannot be written to: {error.strerror}") from error
        file = os.fdopen(number, "w", encoding="utf-8")
        if not _lock(file):
            file.close()
            raise self._refused("another run is writing there; choose another folder")
        return file

    def _taken(self, why: str) -> UsageError:
        return self._refused(f"{why}; choose another folder or write over it", permission="overwrite")

    def _refused(self, why: str, permission: str | None = None) -> UsageError:
        return UsageError(why, field="out", value=self.path, permission=permission)

    def metrics(self, event: Event) -> None:
        """A sink: the event as a line of metrics.jsonl, there at once for whoever reads along."""
        assert self._metrics is not None
        self._metrics.write(event_line(event) + "\n")
        self._metrics.flush()

    def finish(self, result: RunResult) -> None:
        write_atomically(self.path / RESULT, to_json(result))

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
    return not text or text.startswith('{"event": "run_started", ')


def _is_result(text: str) -> bool:
    return isinstance(from_json(RunResult, text), RunResult)


# The files of a run's folder -> whether their contents are as bncli wrote them.
OWN: dict[str, Callable[[str], bool]] = {RECIPE: _is_signed, METRICS: _begins_a_run, RESULT: _is_result}


class ComparisonFolder:
    """All runs of a comparison, a file each under its key, so that a call that was killed goes on where it stopped.

    plan.json: what the last call set out to do. runs/KEY.json: ended runs; with a model of the user's own
    KEY-CODE.json, so that those of earlier code are kept. failed/KEY.json: runs that died, to be tried again.
    comparison.json: the answer. One process at a time may write here; a lock that dies with its holder sees to it.
    A file that does not read as what bncli writes there is never written over or deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> ComparisonFolder:
        make(self.path)
        try:
            self._lock = os.fdopen(os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | NO_LINK, 0o666), "w")
        except OSError as error:
            why = f"cannot be written to: {error.strerror}"
            raise UsageError(why, field="out", value=self.path) from error
        if not _lock(self._lock):
            self._lock.close()
            raise BncliError(f"{self.path}: another comparison is writing here; wait for it, or choose another folder")
        for file, read in ((PLAN, self.begun), (COMPARISON, self.answer)):
            if os.path.lexists(self.path / file) and read() is None:
                self._lock.close()
                why = f"{self.path / file} is not as this bncli writes it and is never written over"
                raise UsageError(f"{why}; choose another folder", field="out", value=self.path)
        for folder in (self.path / "runs", self.path / "failed"):
            make(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def begin(self, begun: BegunComparison) -> None:
        """Write down what is about to be done, and forget the runs that failed before."""
        for name in self.failed():
            (self.path / "failed" / f"{name}.json").unlink()
        write_atomically(self.path / PLAN, to_json(begun))

    def begun(self) -> BegunComparison | None:
        """What the last call set out to do; None where that is not known."""
        return _result(self.path / PLAN, BegunComparison)

    def answer(self) -> Comparison | None:
        """The last call's answer; None where there is none."""
        return _result(self.path / COMPARISON, Comparison)

    def finished(self) -> dict[str, RunRecord]:
        """The runs that ended, by name. A file that cannot be read is as good as none: its run is done again."""
        return self._records("runs")

    def failed(self) -> dict[str, RunRecord]:
        """The last call's runs that died, by name."""
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
        """Rename an answer to another plan, before this one's is written. Its new name, if there was one."""
        answer = self.answer()
        if answer is None or to_plain(answer.plan) == to_plain(plan):
            return None
        return _keep_beside(self.path / COMPARISON)

    def finish(self, comparison: Comparison) -> None:
        write_atomically(self.path / COMPARISON, to_json(comparison))


def _name(record: RunRecord) -> str:
    """A run's file name without its ending."""
    code = hashlib.sha256(json.dumps(record.code, sort_keys=True).encode()).hexdigest()[:8]
    return f"{record.key}-{code}" if record.code else record.key


def _result(file: Path, kind: type[Result]) -> Result | None:
    return _read(file, lambda text: from_json(kind, text))


def _read(file: Path, parse: Callable[[str], T]) -> T | None:
    """What a plain file holds; None where it is missing, a link, or not what `parse` reads."""
    with contextlib.suppress(BncliError, OSError, UnicodeDecodeError):
        if file.is_file() and not file.is_symlink():
            return parse(file.read_text(encoding="utf-8"))
    return None


def _keep_beside(file: Path) -> Path:
    """Give a file the first of the names NAME-1, NAME-2 and so on that is free."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not os.path.lexists(name)))


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises UsageError for anything else."""
    file = path / COMPARISON if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        message = f"{file} cannot be read: {why}; give a JSON file that compare wrote"
        raise UsageError(message, field="saved", value=path) from error
    try:
        return from_json(Comparison, text)
    except BncliError as error:
        raise UsageError(str(error), field="saved", value=file) from error


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be made: {error.strerror}", field="out", value=folder) from error


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
            raise FileError(f"{path}: cannot be made: {error.strerror}") from error
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
