"""Results as JSON and back, and files that are written whole or not at all.

Fields of free content (`point`, `grid`, `recipes`, a note's `facts`) are not checked; lists in them stay lists.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bncli.errors import FileError, UsageError
from bncli.report.export import json_text
from bncli.results.compare import RATE, BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.environment import COMPARISON_VERSION, RUNS_VERSION
from bncli.results.serialize import Mismatch, from_plain, to_plain
from bncli.results.train import Evaluated, Event, RunFinished, RunResult
from bncli.storage import read_plain

T = TypeVar("T")
Result = TypeVar("Result", BegunComparison, Comparison, RunRecord, RunResult)

# What each is called in messages, and the format versions that can be read.
READABLE: dict[type, tuple[str, tuple[int, ...]]] = {
    BegunComparison: ("comparison's plan", (2, RUNS_VERSION)),
    Comparison: ("comparison", (2, COMPARISON_VERSION)),
    RunRecord: ("run of a comparison", (2, RUNS_VERSION)),
    RunResult: ("run's result", (2, RUNS_VERSION)),
}


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(result: BegunComparison | Comparison | RunRecord | RunResult) -> str:
    """The whole result; a comparison with every run, so that each table can be made again from this text alone.

    All but a comparison, which may be edited, have the digest of their text, which shows whether it was changed.
    """
    plain = {"format_version": RUNS_VERSION, **to_plain(result)}  # a comparison has its own
    # A run in one line, which json writes four times as fast as indented lines.
    if isinstance(result, Comparison):
        runs = ",\n".join(json.dumps(run, allow_nan=False) for run in plain["runs"])
        return json_text(plain | {"runs": []}).replace('\n "runs": []', f'\n "runs": [\n{runs}\n ]')
    text = json.dumps(plain, allow_nan=False) + "\n" if isinstance(result, RunRecord) else json_text(plain)
    version, _, rest = text.partition(",")
    return f"{version}{_digest(text)},{rest}"


def _digest(text: str) -> str:
    """The field that stands behind the version in a text that is without it."""
    return f', "sha256": "{hashlib.sha256(text.encode(errors="replace")).hexdigest()}"'


def from_json(kind: type[Result], text: str, without: str = "") -> Result:
    """The result that `to_json` wrote, without the items of that list. Raises FileError."""
    what, versions = READABLE[kind]
    plain = json_object(text, what, versions)
    plain |= {without: []} if without else {}
    if kind is not Comparison:
        if plain.pop("format_version") > 2:
            signed = f', "sha256": "{plain.pop("sha256", None)}"'
            if signed != _digest(text.replace(signed, "", 1)):
                raise FileError("was changed after bncli wrote it (its digest is another); create it again")
    elif plain["format_version"] == 2:
        plain["format_version"] = COMPARISON_VERSION
        for part in ("notes", "remarks"):
            if isinstance(plain.get(part), list):
                plain[part] = [{"kind": "words", "facts": {"words": words}} for words in plain[part]]
    found = rebuilt(kind, plain, what)
    if mistake := next(_mistakes(found), None):
        raise FileError(f"cannot be a {what}: {mistake}; create it again")
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


# --- values that no run can have ----------------------------------------------------------------------------------


def _mistakes(found: BegunComparison | Comparison | RunRecord | RunResult) -> Iterator[str]:
    """What shows that bncli cannot have written it so; comparisons and files of format 2 have no digest that would."""
    results = {"": found if isinstance(found, RunResult) else found.result if isinstance(found, RunRecord) else None}
    if isinstance(found, BegunComparison | Comparison):
        if found.plan.reference not in found.plan.arms or found.plan.budget < 1:
            yield "its plan has no reference arm or no budget"
        for run in found.runs if isinstance(found, Comparison) else ():
            results[f"run {run.key}: "] = run.result
            if not _is_planned(found.plan, run):
                yield f"run {run.key}: is not of the plan"
    for where, result in results.items():
        yield from (where + mistake for mistake in _mistakes_of_result(result)) if result else ()


def _mistakes_of_result(result: RunResult) -> Iterator[str]:
    at = [each.step for each in result.evaluations]
    steps = [result.steps_run, *at, result.first_hit, result.steps_to_target]
    steps += [step for each in result.also for step in (each.first_hit, each.steps)]
    shares = [result.constant_guess, *(each.accuracy for each in result.evaluations)]
    amounts = [result.ms_per_step, result.samples_per_s, result.training_s, result.evaluation_s, result.peak_memory_mib]
    limits = {"steps": (steps, result.budget), "accuracy": (shares, 1), "cost": (amounts, sys.maxsize)}
    for what, (values, most) in limits.items():
        if not all(0 <= value <= most for value in values if value is not None):  # NaN is in no range
            yield f"{what} outside of 0 to {most:g}"
    if at != sorted(set(at)):
        yield "evaluations that are not in the order of their steps"


def _is_planned(plan: ComparisonPlan, run: RunRecord) -> bool:
    searched, free = run.phase == "rate", plan.grid.keys() - plan.fixed.get(run.arm, ())
    seeds = plan.tune_seeds if run.phase == "tune" else plan.report_seeds
    if searched:
        in_grid = isinstance(run.point.get(RATE), int | float)
    else:
        in_grid = all(run.point.get(path) in plan.grid[path] for path in free)
    in_budget = run.result is None or run.result.budget == plan.budget_of(run.phase)
    return run.arm in plan.arms and run.seed in seeds and in_grid and in_budget


# --- lines of metrics.jsonl ---------------------------------------------------------------------------------------


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
