"""Folder of a run: its recipe, its metrics and its result."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.files import event_line, from_json, to_json
from bncli.results.train import Event, RunResult
from bncli.storage import lock, make, open_plain, read_plain, replace

T = TypeVar("T")

RESULT, METRICS, RECIPE = "result.json", "metrics.jsonl", "recipe.yaml"
PLAN = "plan.json"  # of a comparison
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
        replace(self.path / RECIPE, signed(recipe_yaml).encode())

    def _refuse_other_files(self) -> None:
        if os.path.lexists(self.path / PLAN):
            raise self._refused("contains a comparison; choose another folder for a single run")
        there = [name for name in OWN if os.path.lexists(self.path / name)]
        for file in (self.path / name for name in there):
            if not parsed(file, OWN[file.name]):
                raise self._refused(
                    f"{file} was not written by bncli, or was edited since, and is never overwritten; "
                    "choose another folder"
                )
        if there and not self._overwrite:
            raise self._refused(TAKEN.format("a run" if RESULT in there else "an unfinished run"), "overwrite")

    def _claim(self) -> TextIO:
        """metrics.jsonl, open and locked: only one of several runs gets the folder."""
        try:
            file = open_plain(self.path / METRICS, 0 if self._overwrite else os.O_EXCL)
        except FileExistsError:
            raise self._refused(TAKEN.format("a run"), "overwrite") from None
        except OSError as error:
            raise self._refused(f"cannot be written to: {error.strerror}") from error
        if not lock(file):
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
        replace(self.path / RESULT, to_json(result).encode())

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


def parsed(file: Path, parse: Callable[[str], T]) -> T | None:
    """The parsed content of a plain file; None where it is missing, a link, or not readable by `parse`."""
    with contextlib.suppress(BncliError, OSError, UnicodeDecodeError):
        return parse(read_plain(file).decode())
    return None


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
