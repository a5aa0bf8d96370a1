"""Folder of a comparison: its plan, its runs and its answer."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

from bncli.errors import BncliError, FileError, UsageError
from bncli.report.compare.leases import Leases
from bncli.report.files import Result, from_json, load, to_json
from bncli.report.folder import PLAN
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.serialize import to_plain
from bncli.storage import make, read_plain, replace, sweep

COMPARISON = "comparison.json"
FOLDERS = ("runs", "failed", "checkpoints", "logs", "calls")
# A run's file: its recipe's key (not in files of format 2), its key, and the digest of the user's code, if it has any.
RUN_NAME = re.compile(r"(?:([0-9a-f]{20})-)?([0-9a-f]{20})(?:-[0-9a-f]{8})?\.json")


class ComparisonFolder:
    """All runs of a comparison, each in a file under its key, so that a killed call continues where it stopped.

    plan.json: the plan of the last call. runs/RECIPEKEY-KEY.json: runs that ended; RECIPEKEY-KEY-CODE.json with a model
    of the user's, so that runs of earlier code are kept. failed: runs that died, to be tried again. checkpoints/KEY.pt:
    states of runs that have not ended. comparison.json: the answer. Any number of calls write here at the same time:
    each run has a lease (`report.compare.leases`), and every file is replaced as a whole. A file that does not read as
    what bncli writes there is never written over or deleted.

    unfit: files that were read and cannot be used, with the reason. failures: key -> a run that failed in another call
    meanwhile, and is not tried again in this one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unfit, self.failures = path, dict[str, str](), dict[str, RunRecord]()
        self._read = dict[str, RunRecord | None]()
        self._leases = Leases(path / "runs", path / "calls")
        for folder in (path / name for name in FOLDERS):
            if folder.is_symlink():
                raise FileError(f"{folder}: is a symbolic link, which is not followed here; choose another folder")

    def __enter__(self) -> ComparisonFolder:
        self._new = not self.path.exists()
        make(self.path)
        for name, read in ((PLAN, self.begun()), (COMPARISON, self.answer(without="runs"))):
            if read is None and name in self.unfit:  # and not missing, though another call may write it just now
                why = f"{self.path / name} was not written by this version of bncli, or was changed since"
                raise self._refused(f"{why}, and is never overwritten; move it away: the runs beside it are kept")
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            make(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise self._refused(f"{folder} is not writable; choose another folder")
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._leases)
            self._sweep()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._opened:
            if isinstance(error, FileNotFoundError) and not (self.path / "runs").exists():
                raise self._refused("was removed or renamed meanwhile") from error
            self._sweep()
            with contextlib.suppress(FileNotFoundError):  # the folder was removed
                self.free(())
                for lease in (self.path / "runs").glob(
                    "*.lease"
                ):  # of a call that was killed once it had saved the run
                    if lease.name.partition(".")[0] in self._names and self.alone():
                        lease.unlink(missing_ok=True)
        if self._new and not any(self.path.rglob("*.json")):  # nothing was begun, so nothing is left behind
            with contextlib.suppress(OSError):  # another call is there, or it was removed meanwhile
                (self.path / "calls").rmdir()
                shutil.rmtree(self.path)

    def _sweep(self) -> None:
        """Delete what killed calls left half written, unless another call is there, which may be writing."""
        sweep(self.path, *(self.path / name for name in FOLDERS), alone=self.alone)

    def _refused(self, why: str) -> UsageError:
        return UsageError(why, field="out", value=self.path)

    def begin(self, begun: BegunComparison) -> None:
        """Save the plan, and delete the runs that failed before."""
        for name in self.failed():
            (self.path / "failed" / name).unlink(missing_ok=True)
            del self._read[f"failed/{name}"]
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
        found = dict[str, list[str]]()
        self._note(found, os.listdir(runs) if (runs := self.path / "runs").is_dir() else ())
        return found

    def _note(self, found: dict[str, list[str]], names: Iterable[str]) -> None:
        """Add those of the names in runs that are not known yet."""
        for match in filter(None, map(RUN_NAME.fullmatch, sorted(names))):
            if match[0] not in found.setdefault(match[2], []):
                record = self._run("runs", match[0]) if match[1] is None else None  # which alone tells its recipe
                for key in (match[2], match[1] or (record and record.recipe_key)):
                    found.setdefault(key or "", []).append(match[0])

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
        names = sorted(os.listdir(failed)) if (failed := self.path / "failed").is_dir() else ()
        return {name: record for name in names if RUN_NAME.fullmatch(name) and (record := self._run("failed", name))}

    def _run(self, folder: str, name: str) -> RunRecord | None:
        """A run's record, read once; None, with the reason in `unfit`, where its file is not as bncli writes it."""
        file = f"{folder}/{name}"
        if file not in self._read:
            record = self._result(file, RunRecord)
            if record and name not in (_name(record), _name(record).removeprefix(f"{record.recipe_key}-")):
                self.unfit[file], record = "holds another run than its name says", None
            self._read[file] = record
        return self._read[file]

    def lease(self, key: str, recipe_key: str, own_code: bool) -> bool:
        """Take the lease of a run; False where another call does it. Looks again whether one has ended it.

        own_code: whether it loads code of the user's, so that there may be several files with that key.
        """
        if not self._leases.take(key):
            return False
        runs, name = self.path / "runs", f"{recipe_key}-{key}.json"
        if own_code or os.path.lexists(runs / name):
            self._note(self._names, os.listdir(runs) if own_code else [name])
            for each in self._names.get(key, ()):
                self._read.pop(f"runs/{each}", None)
        if failed := os.path.lexists(self.path / "failed" / name) and self._run("failed", name):
            self.failures[key] = failed
        return True

    def release(self, key: str) -> None:
        """Give back the lease of a run."""
        self._leases.release(key)

    def alone(self) -> bool:
        """Whether no other call is there."""
        return self._leases.alone()

    def free(self, keys: Collection[str]) -> set[str]:
        """Those runs of other calls which no call does any more. Looks again what other calls have ended."""
        names = os.listdir(self.path / "runs")
        self._note(self._names, names)
        self.failures |= {record.key: record for record in self.failed().values() if record.key in keys}
        return self._leases.free(keys, {name.partition(".")[0] for name in names if name.endswith(".lease")})

    def save(self, record: RunRecord) -> None:
        """Write the file of a run and end its lease.

        A call that was silent for so long that another one has taken the run over writes the same run again.
        """
        name, folder = _name(record), "runs" if record.result is not None else "failed"
        file = self.path / folder / name
        if os.path.lexists(file) and self._run(folder, name) is None:
            _keep_beside(file)
        replace(file, to_json(record).encode())
        if record.result is not None:
            with contextlib.suppress(OSError):  # one that stays is never read again
                (self.path / "checkpoints" / f"{record.key}.pt").unlink()
        self.release(record.key)

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
        answer = self.answer(without="runs")  # of another call, perhaps, which has ended since this one began
        if answer is None or to_plain(answer.plan) == to_plain(plan):
            return None
        return _keep_beside(self.path / COMPARISON)

    def finish(self, comparison: Comparison) -> None:
        replace(self.path / COMPARISON, to_json(comparison).encode())


def _name(record: RunRecord) -> str:
    """A run's file name."""
    code = hashlib.sha256(json.dumps(record.code, sort_keys=True).encode()).hexdigest()[:8] if record.code else ""
    return "-".join(filter(None, (record.recipe_key, record.key, code))) + ".json"


def _keep_beside(file: Path) -> Path:
    """Rename a file to the first free one of NAME-1, NAME-2 and so on."""
    for number in itertools.count(1):
        beside = file.with_name(f"{file.stem}-{number}{file.suffix}")
        with contextlib.suppress(FileExistsError):
            beside.open("x").close()  # so that of two calls each has a name of its own
            break
    return file.replace(beside)


def load_comparison(path: Path) -> Comparison:
    """A comparison saved as JSON, or the one in a comparison's folder. Raises UsageError for anything else."""
    file, wanted = path / COMPARISON if path.is_dir() else path, "the folder or the JSON file of a comparison"
    return load(file, lambda text: from_json(Comparison, text), "saved", wanted)
