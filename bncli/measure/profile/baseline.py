"""Comparison of a profile with a baseline: slower rows, unchanged rows, and undecided ones.

Times of different machines or days are not comparable. Speedups over the native kernel of the same run are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from bncli.errors import UsageError
from bncli.results.environment import Interval, disturbed
from bncli.results.profile import Change, Gate, KernelProfile, Profile, Row, Speedup, StepProfile, Verdict

VIEWS: dict[type, str] = {KernelProfile: "kernels", StepProfile: "a step"}


def gate(now: Profile, baseline: Profile, fail_above: float, strict: bool = False) -> Gate:
    """Each row that both have with a ratio to native, and whether it is more than `fail_above` times slower.

    strict: undecided rows fail too, and so do rows of the baseline without a ratio now. A row that other programs
    disturbed in either run does not count as regressed.

    Raises UsageError for a bound that is not above 1, for profiles of two kinds, and where no row is in both.
    """
    check_fail_above(fail_above)
    check_view(baseline, type(now))
    ours, theirs = _ratios(now), _ratios(baseline)
    both = [row for row in ours if row in theirs]
    if not both:
        raise UsageError(_nothing_in_common(ours, theirs), field="baseline")
    changes = [change(row, ours[row], theirs[row], fail_above) for row in both]
    runs: dict[Literal["this run", "the baseline"], Profile] = {"this run": now, "the baseline": baseline}
    rows = {name: {row.key for row in run.rows if disturbed(row.cores_lacked)} & {*both} for name, run in runs.items()}
    unsure = {each for of_run in rows.values() for each in of_run}
    regressed = {each for each in changes if each.verdict == "regressed" and each.row in unsure}
    changes = [replace(each, verdict="cannot tell") if each in regressed else each for each in changes]
    return Gate(
        fail_above=fail_above,
        changes=tuple(changes),
        only_now=tuple(row for row in ours if row not in theirs),
        only_baseline=tuple(row for row in theirs if row not in ours),
        strict=strict,
        disturbed=tuple(name for name, of_run in rows.items() if of_run),
    )


def check_fail_above(fail_above: float) -> None:
    """Raises UsageError for a bound that is no finite number above 1."""
    if not (math.isfinite(fail_above) and fail_above > 1):
        raise UsageError("expected more than 1, as in 1.10 for a tenth slower", field="fail_above", value=fail_above)


def check_view(baseline: Profile, view: type[Profile], file: object = None) -> None:
    """Raises UsageError for a baseline, read from that file, that is not a profile of the same view."""
    if not isinstance(baseline, view):
        holds = f"it holds the profile of {VIEWS[type(baseline)]}, and this is one of {VIEWS[view]}"
        raise UsageError(holds, field="baseline", value=file)


def change(row: Row, now: Speedup, baseline: Speedup, fail_above: float) -> Change:
    """How many times slower a row became. Its interval reaches as far as both intervals together allow."""
    interval = Interval(
        _quotient(baseline.interval.low, now.interval.high), _quotient(baseline.interval.high, now.interval.low)
    )
    return Change(row, now, baseline, baseline.value / now.value, interval, _verdict(interval, fail_above))


def _ratios(profile: Profile) -> dict[Row, Speedup]:
    return {row.key: row.faster for row in profile.rows if row.faster is not None}


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below is not None and below > 0 else None


def _verdict(interval: Interval, fail_above: float) -> Verdict:
    if interval.low is not None and interval.low > fail_above:
        return "regressed"
    return "ok" if interval.high is not None and interval.high <= fail_above else "cannot tell"


def _nothing_in_common(ours: dict[Row, Speedup], theirs: dict[Row, Speedup]) -> str:
    for rows, which in ((ours, "this profile"), (theirs, "the baseline")):
        if not rows:
            return f"{which} has no ratio to native; measure native and at least one more kernel"
    return (
        f"no row is in both (this profile has for example '{next(iter(ours))}', the baseline '{next(iter(theirs))}'); "
        "measure the same kernels, operations, dtypes, layouts and shapes, or the same recipe"
    )
