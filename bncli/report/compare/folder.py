"""Folder of a comparison: its plan, its runs and its answer."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.files import Result, from_json, load, to_json
from bncli.report.folder import PLAN
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.serialize import to_plain
from bncli.storage import locked, make, read_plain, replace, sweep

COMPARISON = "comparison.json"
FOLDERS = ("runs", "failed", "checkpoints", "logs")
# A run's file: its recipe's key (not in files of format 2), its key, and the digest of the user's code, if it has any.
RUN_NAME = re.compile(r"(?:([0-9a-f]{20})-)?([0-9a-f]{20})(?:-[0-9a-f]{8})?\.json")


class ComparisonFolder:
    """All runs of a comparison, each in a file under its key, so that a killed call continues where it stopped.

    plan.json: the plan of the last call. runs/RECIPEKEY-KEY.json: runs that ended; RECIPEKEY-KEY-CODE.json with a model
    of the user's, so that runs of earlier code are kept. failed: runs that died, to be tried again. checkpoints/KEY.pt:
    states of runs that have not ended. comparison.json: the answer. A lock, which ends with its process, lets one
    process at a time write here. A file that does not read as what bncli writes there is never written over or deleted.

    unfit: files that were read and cannot be used, with the reason.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unfit = path, dict[str, str]()
        self._read = dict[str, RunRecord | None]()
        for folder in (path / name for name in FOLDERS):
            if folder.is_symlink():
                raise FileError(f"{folder}: is a symbolic link, which is not followed here; choose another folder")

    def __enter__(self) -> ComparisonFolder:
        self._new = not self.path.exists()
        make(self.path)
        with contextlib.ExitStack() as opened:
            try:
                file = locked(self.path / ".lock")
            except OSError as error:
                raise self._refused(f"cannot be written to: {error.strerror}") from error
            if file is None:
                why = "another comparison is writing here; wait for it, or choose another folder"
                raise BncliError(f"{self.path}: {why}")
            opened.enter_context(file)
            begun, answer = self.begun(), self.answer(without="runs")
            for name, read in ((PLAN, begun), (COMPARISON, answer)):
                if os.path.lexists(self.path / name) and read is None:
                    why = f"{self.path / name} was not written by this version of bncli, or was changed since"
                    raise self._refused(f"{why}, and is never overwritten; move it away: the runs beside it are kept")
            for folder in (self.path, *(self.path / name for name in FOLDERS)):
                make(folder)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise self._refused(f"{folder} is not writable; choose another folder")
                sweep(folder)
            self._answered = answer and answer.plan
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._opened:
            if isinstance(error, FileNotFoundError) and not (self.path / ".lock").exists():
                raise self._refused("was removed or renamed meanwhile") from error
            if self._new and not any(self.path.rglob("*.json")):  # nothing was begun, so nothing is left behind
                shutil.rmtree(self.path, ignore_errors=True)  # or it was removed meanwhile

    def _refused(self, why: str) -> UsageError:
        return UsageError(why, field="out", value=self.path)

    def begin(self, begun: BegunComparison) -> None:
        """Save the plan, and delete the runs that failed before."""
        for name in self.failed():
            (self.path / "failed" / name).unlink()
        replace(self.path / PLAN, to_json(begun).encode())

    def begun(self) -> BegunComparison | None:
        """The plan of the last call; None where it is missing or not fit."""
        return self._result(PLAN, BegunComparison)

    def answer(self, without: str = "") -> Comparison | None:
        """The last call's answer, without the items of that list; None where there is none."""
        return self._result(COMPARISON, Comparison, without)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """A run's key, or its recipe's -> the names of files in runs."""
        found = defaultdict[str, list[str]](list)
        for match in self._listed("runs"):
            record = self._run("runs", match[0]) if match[1] is None else None  # which alone tells its recipe
            for key in (match[2], match[1] or (record and record.recipe_key)):
                found[key or ""].append(match[0])
        return found

    def _listed(self, folder: str) -> list[re.Match[str]]:
        """The names of the runs in a folder, in order."""
        with contextlib.suppress(FileNotFoundError):
            return list(filter(None, map(RUN_NAME.fullmatch, sorted(os.listdir(self.path / folder)))))
        return []

    @property
    def count(self) -> int:
        """The files of runs that ended, readable or not."""
        return len(set().union(*self._names.values()))

    def finished(self, keys: Iterable[str]) -> list[RunRecord]:
        """The runs that ended with any of those keys, theirs or their recipe's: one for each version of their code."""
        names = dict.fromkeys(name for key in keys for name in self._names.get(key, ()))
        return [record for name in names if (record := self._run("runs", name))]

    def failed(self) -> dict[str, RunRecord]:
        """The failed runs of the last call, by file name."""
        names = [match[0] for match in self._listed("failed")]
        return {name: record for name in names if (record := self._run("failed", name))}

    def _run(self, folder: str, name: str) -> RunRecord | None:
        """A run's record, read once; None, with the reason in `unfit`, where its file is not as bncli writes it."""
        file = f"{folder}/{name}"
        if file not in self._read:
            record = self._result(file, RunRecord)
            if record and name not in (_name(record), _name(record).removeprefix(f"{record.recipe_key}-")):
                self.unfit[file], record = "holds another run than its name says", None
            self._read[file] = record
        return self._read[file]

    def save(self, record: RunRecord) -> None:
        name, folder = _name(record), "runs" if record.result is not None else "failed"
        file = self.path / folder / name
        if os.path.lexists(file) and self._run(folder, name) is None:
            _keep_beside(file)
        replace(file, to_json(record).encode())
        if record.result is not None:
            with contextlib.suppress(OSError):  # one that stays is never read again
                (self.path / "checkpoints" / f"{record.key}.pt").unlink()

    def _result(self, file: str, kind: type[Result], without: str = "") -> Result | None:
        """What a file holds; None where it is missing and, with the reason in `unfit`, where bncli cannot read it."""
        try:
            return from_json(kind, read_plain(self.path / file).decode(), without)
        except FileNotFoundError:
            return None
        except (BncliError, OSError, UnicodeDecodeError) as error:
            self.unfit[file] = str(error)
            return None

    def keep_other(self, plan: ComparisonPlan) -> Path | None:
        """Rename an existing answer to another plan, so that it is kept. Its new name; None where there was none."""
        if self._answered is None or to_plain(self._answered) == to_plain(plan):
            return None
        return _keep_beside(self.path / COMPARISON)

    def finish(self, comparison: Comparison) -> None:
        self._answered = comparison.plan
        replace(self.path / COMPARISON, to_json(comparison).encode())


def _name(record: RunRecord) -> str:
    """A run's file name."""
    code = hashlib.sha256(json.dumps(record.code, sort_keys=True).encode()).hexdigest()[:8] if record.code else ""
    return "-".join(filter(None, (record.recipe_key, record.key, code))) + ".json"


def _keep_beside(file: Path) -> Path:
    """Rename a file to the first free one of NAME-1, NAME-2 and so on."""
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(1))
    return file.rename(next(name for name in names if not os.path.lexists(name)))


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises UsageError for anything else."""
    file, wanted = path / COMPARISON if path.is_dir() else path, "the folder or the JSON file of a comparison"
    return load(file, lambda text: from_json(Comparison, text), "saved", wanted)
