"""Results as JSON and back, and files that are written whole or not at all.

Fields of free content (`point`, `grid`, `recipes`, a note's `facts`) are not checked; lists in them stay lists.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TypeVar

from bncli.errors import FileError
from bncli.report.export import json_text
from bncli.results.compare import BegunComparison, Comparison, RunRecord
from bncli.results.environment import COMPARISON_VERSION, RUNS_VERSION
from bncli.results.serialize import Mismatch, from_plain, to_plain
from bncli.results.train import Evaluated, Event, RunFinished, RunResult

Result = TypeVar("Result", BegunComparison, Comparison, RunRecord, RunResult)

VERSIONS: dict[type, tuple[int, ...]] = {
    Comparison: (2, COMPARISON_VERSION)
}  # readable versions; RUNS_VERSION for the others
WHAT: dict[type, str] = {
    BegunComparison: "comparison's plan",
    Comparison: "comparison",
    RunRecord: "run of a comparison",
    RunResult: "run's result",
}


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(result: BegunComparison | Comparison | RunRecord | RunResult) -> str:
    """The whole result; a comparison with every run, so that each table can be made again from this text alone."""
    plain = {"format_version": RUNS_VERSION, **to_plain(result)}  # a comparison has its own
    return json_text(plain)


def from_json(kind: type[Result], text: str, name: str = "") -> Result:
    """The result that `to_json` wrote. `name`: the file, for messages. Raises FileError."""
    place = f"{name}: " * bool(name)
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{place}this is not JSON ({error}); give a file that bncli wrote") from error
    if not isinstance(plain, dict) or "format_version" not in plain:
        raise FileError(f"{place}this JSON has no format_version; give a {WHAT[kind]} that bncli wrote")
    version, readable = plain["format_version"], VERSIONS.get(kind, (RUNS_VERSION,))
    if version not in readable:
        newer = isinstance(version, int) and version > readable[-1]
        advice = "update bncli" if newer else "create it again with this version"
        raise FileError(
            f"{place}format_version is {json.dumps(version)} and this bncli reads "
            f"{' and '.join(map(str, readable))}; {advice}"
        )
    if kind is not Comparison:
        del plain["format_version"]
    elif version == 2:
        plain["format_version"] = COMPARISON_VERSION
        for part in ("notes", "remarks"):
            if isinstance(plain.get(part), list):
                plain[part] = [{"kind": "words", "facts": {"words": words}} for words in plain[part]]
    try:
        found = from_plain(kind, plain)
    except Mismatch as error:
        raise FileError(f"{place}this is not a {WHAT[kind]} as bncli writes it: {error}; create it again") from error
    if isinstance(found, Comparison) and not _sound(found):
        raise FileError(f"{place}its plan and its runs do not belong together; create it again")
    return found


def _sound(comparison: Comparison) -> bool:
    plan, runs = comparison.plan, comparison.runs
    steps = [run.result.steps_to_target for run in runs if run.result and run.result.steps_to_target is not None]
    arms = plan.reference in plan.arms and {run.arm for run in runs} <= set(plan.arms)
    return arms and plan.budget > 0 and min(steps, default=0) >= 0


def event_line(event: Event) -> str:
    """One line of metrics.jsonl: an evaluation's fields beside the event's, a finished run without its evaluations."""
    plain = to_plain(event)
    if isinstance(event, Evaluated):
        plain = plain.pop("evaluation") | plain
    elif isinstance(event, RunFinished):
        plain = plain["result"]
        del plain["evaluations"]
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return json.dumps({"event": name, **plain}, allow_nan=False)


# --- files --------------------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Raise FileError now, before any work, for a path that `write_atomically` would refuse."""
    folder = path.parent
    if path.is_dir():
        raise FileError(f"{path}: is a folder; give a file's name")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is not writable" if folder.is_dir() else "does not exist"
        raise FileError(f"{path}: its folder {folder} {why}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `path` whole or leave it as it was, even when the process is killed or the power fails.

    A temporary file in the same folder is synced and takes the name's place; it is removed on failure. A link's target
    is replaced, not the link; anything but a plain file (a pipe, /dev/stdout) is written to. Raises FileError where the
    folder is missing or the file may not be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise FileError(f"{path}: cannot be written ({error.strerror}); give a file in a folder of yours") from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the new name durable
        finally:
            os.close(folder)
