"""Folder of a run: its recipe, its metrics, its result, and what continues it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.files import event_line, from_json, to_json
from bncli.results.serialize import from_plain
from bncli.results.train import Event, RunResult, RunStarted
from bncli.storage import locked, make, read_plain, replace, sweep

Place = tuple[int, str]  # of an event in a run: its step, and its name

RESULT, METRICS, RECIPE, TENSORBOARD = "result.json", "metrics.jsonl", "recipe.yaml", "tensorboard"
CHECKPOINT, MODEL, BEST = "checkpoint.pt", "model.safetensors", "model-best.safetensors"
SAVED = {"model": MODEL, "best": BEST, "checkpoint": CHECKPOINT}  # by the engine
PLAN = "plan.json"  # of a comparison


class RunFolder:
    """One run of `bncli train`: its recipe (resolved), metrics (an event per line), result, checkpoint and weights.

    Nothing is made before `begin`, which locks the folder for this run. A file that bncli did not write, or that
    was edited since, is never written over; bncli's own are with `overwrite`.

    save: what the engine saves -> what takes its content. checkpoint: what the run goes on from.
    """

    _argument, _instead = "out", ", or choose another folder"
    checkpoint: bytes | None = None
    initial_weights: str | None = None

    def __init__(self, path: Path | None, name: str, overwrite: bool = False) -> None:
        self.path = path or Path("runs") / name  # without a path: the parent of the folder that begin makes
        self._dated, self._overwrite = path is None, overwrite
        self._metrics: TextIO | None = None
        self.begun = False
        self.save = {what: partial(self._write, file) for what, file in SAVED.items()}
        there = next(folder for folder in (self.path, *self.path.parents) if os.path.lexists(folder))
        if os.path.isdir(there) and not os.access(there, os.W_OK | os.X_OK):
            raise self._refused(f"{there.absolute()} is not writable; change its mode{self._instead}")
        if not self._dated:
            self._refuse_other_files()

    def begin(self, recipe_yaml: str) -> None:
        """Make the folder and write what is about to run. Raises UsageError where the folder holds a run already."""
        if self._metrics is None:
            if self._dated:
                self.path = _make_dated(self.path)
            else:
                make(self.path)
                self._refuse_other_files()
            self._metrics = self._claim()
            self._metrics.truncate(0)
            for name in SAVED.values():  # of the run that is written over
                (self.path / name).unlink(missing_ok=True)
        (self.path / RESULT).unlink(missing_ok=True)  # it is not that of the new recipe, or of more steps
        self._write(RECIPE, signed(recipe_yaml).encode())
        self.begun = True

    def _refuse_other_files(self) -> None:
        if os.path.lexists(self.path / PLAN):
            raise self._refused("contains a comparison; choose another folder for a single run")
        there = [name for name in OWN if os.path.lexists(self.path / name)]
        for file in (self.path / name for name in (*there, TENSORBOARD)):
            if not _is_own(file):
                why = "was not written by bncli, or was edited since, and is never overwritten"
                raise self._refused(f"{file} {why}; restore it, or move it away{self._instead}")
        if there and not self._overwrite:
            what = "a run" if RESULT in there else "an unfinished run" + "; continue it" * (CHECKPOINT in there)
            raise self._refused(f"already contains {what}; choose another folder, or overwrite it", "overwrite")

    def _claim(self) -> TextIO:
        """metrics.jsonl, locked, so that only one run gets the folder; what killed ones left half written is swept."""
        try:
            file = locked(self.path / METRICS, 0 if self._overwrite else os.O_EXCL)
        except FileExistsError:
            raise self._refused("already contains a run; choose another folder, or overwrite it", "overwrite") from None
        except OSError as error:
            raise self._refused(f"cannot be written to: {error.strerror}") from error
        if file is None:
            raise self._refused(f"another run is writing there; wait for it{self._instead}")
        sweep(self.path)
        return file

    def _refused(self, why: str, permission: str | None = None) -> UsageError:
        return UsageError(why, field=self._argument, value=self.path, permission=permission)

    def metrics(self, event: Event) -> None:
        """A sink: writes the event as a line of metrics.jsonl and flushes it."""
        assert self._metrics is not None
        with self._writing(METRICS):
            self._metrics.write(event_line(event) + "\n")
            self._metrics.flush()

    def finish(self, result: RunResult) -> None:
        self._write(RESULT, to_json(result).encode())

    @property
    def saved(self) -> list[str]:
        """The files that can be continued, evaluated or started from."""
        return [name for name in SAVED.values() if (self.path / name).is_file()]

    def _write(self, name: str, data: bytes) -> None:
        with self._writing(name):
            if self._metrics:
                os.fsync(self._metrics.fileno())  # what happened before is on the disk before
            replace(self.path / name, data, read_back=name == CHECKPOINT)
            if name == MODEL:  # of an earlier end; the engine saves the best, if it is kept too, after the last
                (self.path / BEST).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn what the disk or another program does to the folder into an error that names the file."""
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            if not self.path.is_dir():
                why = f"the run's folder {self.path} was removed or renamed while it was in use"
            raise BncliError(f"{self.path / name}: cannot be written: {why}; what was saved before is kept") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # each line was flushed, or failed to be
                self._metrics.close()


class ResumedFolder(RunFolder):
    """The folder of a run that goes on from its checkpoint: locked at once, and changed from its first new event on.

    name, initial_weights, recipe_yaml: of the run so far.
    """

    _argument, _instead = "resume", ""

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.name, overwrite=True)
        if missing := [name for name in (RECIPE, METRICS) if not os.path.lexists(path / name)]:
            raise self._refused(f"is not the folder of a run: it has no {missing[0]}")
        if not os.path.lexists(path / CHECKPOINT):
            raise self._refused(
                f"has no {CHECKPOINT} to continue from: one is saved at the end, on a signal and as often as the "
                f"recipe's train.checkpoint says; train {path / RECIPE} again in another folder, or overwrite this one"
            )
        self._metrics = self._claim()
        self.checkpoint = read_plain(path / CHECKPOINT)
        began, self._before = _events(path / METRICS)
        self.name, self.initial_weights = began.name, began.initial_weights
        self._started = b""  # the line of the new start, until the first event after it
        self.recipe_yaml = read_plain(path / RECIPE).decode().partition("\n")[2]

    def finished(self, recipe_yaml: str) -> RunResult | None:
        """The run's result, if it has ended and that is its recipe."""
        if self.recipe_yaml != recipe_yaml or not os.path.lexists(self.path / RESULT):
            return None
        result = from_json(RunResult, read_plain(self.path / RESULT).decode())
        return result if result.status != "interrupted" else None

    def metrics(self, event: Event) -> None:
        """As of any run, without a second start. The engine yields the events after the checkpoint again, so the first
        new one shows which of those in the file come again, and they are dropped.
        """
        if isinstance(event, RunStarted):
            self._started = event_line(event).encode() + b"\n"
            return
        if self._started:
            new = _place(json.loads(event_line(event)))
            kept = itertools.takewhile(lambda old: old[0] != new and old[0][0] <= new[0], self._before)
            with self._writing(METRICS):
                replace(self.path / METRICS, b"".join([self._started, *(line for _, line in kept)]))
                self._metrics = self._claim()  # the new file, while the one before is still locked
            self._metrics.seek(0, os.SEEK_END)
            self._started = b""
        super().metrics(event)


def _events(file: Path) -> tuple[RunStarted, list[tuple[Place, bytes]]]:
    """A run's first event, and the later ones in metrics.jsonl with their lines, but its end and a line that is torn.

    Raises FileError for a line that is no event.
    """
    found, number = [], 1
    first, *lines = read_plain(file).splitlines(keepends=True) or [b""]
    try:
        plain = json.loads(first)
        began = from_plain(RunStarted, {name: plain[name] for name in plain if name != "event"})
        for line in lines:
            number += 1
            if line.endswith(b"\n") and (place := _place(json.loads(line)))[1] != "run_finished":
                found.append((place, line))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FileError(f"{file}:{number}: is not an event of a run; restore it, or train the run again") from error
    return began, found


def _place(event: dict[str, Any]) -> Place:
    """Step and name of an event as JSON. No step has two of one name."""
    step = event["points"][0]["step"] if "points" in event else event.get("step", event.get("steps_run", 0))
    return int(step), str(event["event"])


def recipe_in(run: Path) -> str:
    """The file of the recipe in a run's folder. Raises UsageError for another folder."""
    if not _is_own(run / RECIPE):
        raise UsageError(f"{run} is a folder without a {RECIPE} as bncli writes one for a run; name a recipe")
    return str(run / RECIPE)


def signed(recipe_yaml: str) -> str:
    """A resolved recipe below a first line with its digest, which shows whether it was edited."""
    digest = hashlib.sha256(recipe_yaml.encode()).hexdigest()
    return f"# Resolved by bncli, which writes over this file only while it is unedited: sha256 {digest}\n{recipe_yaml}"


# File of a run's folder -> whether its content is as bncli wrote it.
OWN: dict[str, Callable[[bytes], bool]] = {
    RECIPE: lambda data: data.decode() == signed(data.decode().partition("\n")[2]),
    METRICS: lambda data: not data or data.startswith(b'{"event": "run_started", '),  # empty until the first event
    RESULT: lambda data: isinstance(from_json(RunResult, data.decode()), RunResult),
    CHECKPOINT: lambda data: data.startswith(b"bncli checkpoint "),
    **dict.fromkeys((MODEL, BEST), lambda data: b'"bncli":"' in data[: int.from_bytes(data[:8], "little")]),
}


def _is_own(file: Path) -> bool:
    if file.name == TENSORBOARD:
        return not os.path.lexists(file) or (file.is_dir() and not file.is_symlink())
    with contextlib.suppress(BncliError, OSError, UnicodeDecodeError):
        return OWN[file.name](read_plain(file))
    return False


def _make_dated(parent: Path) -> Path:
    """A new folder named after the time; with a number where a run of the same second has made that one."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    make(parent)
    for number in itertools.count():
        path = parent / (f"{now}-{number}" if number else now)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path
