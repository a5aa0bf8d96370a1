"""Results as JSON and back, and files that are written whole or not at all.

Fields of free content (`point`, `grid`, `recipes`, a note's `facts`) are not checked; lists in them stay lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bncli.errors import FileError, UsageError
from bncli.report.export import json_text
from bncli.results.compare import BegunComparison, Comparison, RunRecord
from bncli.results.environment import COMPARISON_VERSION, RUNS_VERSION
from bncli.results.serialize import Mismatch, from_plain, to_plain
from bncli.results.train import Evaluated, Event, RunFinished, RunResult
from bncli.storage import read_plain

T = TypeVar("T")
Result = TypeVar("Result", BegunComparison, Comparison, RunRecord, RunResult)

# What each is called in messages, and the format versions that can be read.
READABLE: dict[type, tuple[str, tuple[int, ...]]] = {
    BegunComparison: ("comparison's plan", (RUNS_VERSION,)),
    Comparison: ("comparison", (2, COMPARISON_VERSION)),
    RunRecord: ("run of a comparison", (RUNS_VERSION,)),
    RunResult: ("run's result", (RUNS_VERSION,)),
}


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(result: BegunComparison | Comparison | RunRecord | RunResult) -> str:
    """The whole result; a comparison with every run, so that each table can be made again from this text alone."""
    plain = {"format_version": RUNS_VERSION, **to_plain(result)}  # a comparison has its own
    return json_text(plain)


def from_json(kind: type[Result], text: str) -> Result:
    """The result that `to_json` wrote. Raises FileError."""
    what, versions = READABLE[kind]
    plain = json_object(text, what, versions)
    if kind is not Comparison:
        del plain["format_version"]
    elif plain["format_version"] == 2:
        plain["format_version"] = COMPARISON_VERSION
        for part in ("notes", "remarks"):
            if isinstance(plain.get(part), list):
                plain[part] = [{"kind": "words", "facts": {"words": words}} for words in plain[part]]
    found = rebuilt(kind, plain, what)
    if isinstance(found, Comparison) and not _sound(found):
        raise FileError("its plan and its runs do not match; create it again")
    return found


def json_object(text: str, what: str, versions: Sequence[int], kinds: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a JSON text in one of those format versions and, where there are kinds, of one of them.

    Raises FileError that says what is wrong with it and what to do. `what`: its name in the message.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"is not JSON ({error}); give a {what} that bncli wrote") from error
    if not isinstance(plain, dict) or "format_version" not in plain or (kinds and plain.get("kind") not in kinds):
        raise FileError(f"is JSON, but not a {what}; give a {what} that bncli wrote")
    version = plain["format_version"]
    if version not in versions:
        advice = "update bncli" if isinstance(version, int) and version > versions[-1] else "create it again"
        reads = " and ".join(map(str, versions))
        raise FileError(f"its format_version is {json.dumps(version)} and this bncli reads {reads}; {advice}")
    return plain


def rebuilt(kind: type[T], plain: dict[str, Any], what: str) -> T:
    """The result with those fields. Raises FileError."""
    try:
        return from_plain(kind, plain)
    except Mismatch as error:
        raise FileError(f"is not a valid {what}: {error}; create it again") from error


def _sound(comparison: Comparison) -> bool:
    plan, runs = comparison.plan, comparison.runs
    steps = [run.result.steps_to_target for run in runs if run.result and run.result.steps_to_target is not None]
    arms = plan.reference in plan.arms and {run.arm for run in runs} <= set(plan.arms)
    return arms and plan.budget > 0 and min(steps, default=0) >= 0


def event_line(event: Event) -> str:
    """One line of metrics.jsonl: an evaluation's fields beside the event's, a finished run without its curves."""
    plain = to_plain(event)
    if isinstance(event, Evaluated):
        plain = plain.pop("evaluation") | plain
    elif isinstance(event, RunFinished):
        plain = plain["result"]
        del plain["evaluations"], plain["probes"]
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return json.dumps({"event": name, **plain}, allow_nan=False)


# --- files --------------------------------------------------------------------------------------------------------


def load(path: Path, parse: Callable[[str], T], field: str, wanted: str = "a JSON file that bncli wrote") -> T:
    """What `parse` makes of a file that was named for the argument `field`. Raises UsageError."""
    try:
        return parse(read_plain(path, follow=True).decode())
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text, or nested too deeply"
        message = f"cannot be read: {why}; give {wanted}"
        raise UsageError(message, field=field, value=path) from error
    except FileError as error:
        raise UsageError(str(error).removeprefix(f"{path}: "), field=field, value=path) from error
