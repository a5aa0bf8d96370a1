"""A profile held to an earlier one: what became slower, what did not, and what the intervals cannot tell.

Times of two machines, or of two days, do not compare. Ratios to the native kernel of the same run do: native is the
yardstick that each run brings along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from bncli.errors import RecipeError
from bncli.results.environment import Interval
from bncli.results.profile import Change, Faster, Gate, KernelCost, KernelProfile, StepCost, StepProfile, Verdict

Profile = KernelProfile | StepProfile
VIEWS: dict[type, str] = {KernelProfile: "kernels", StepProfile: "a training step"}


def gate(now: Profile, baseline: Profile, fail_above: float, strict: bool = False) -> Gate:
    """Each row that both have with a ratio to native, and whether it is more than `fail_above` times slower.

    strict: what the intervals cannot tell fails too, and so does a row of the baseline that came to no ratio now. Where
    other programs used the cores in either run, no row is called regressed.

    Raises RecipeError for a bound that is not above 1, for profiles of two kinds, and where no row is in both.
    """
    if not (fail_above > 1 and math.isfinite(fail_above)):
        raise RecipeError(
            f"--fail-above {fail_above:g}: it is how many times slower fails; give more than 1, such as 1.10"
        )
    if type(now) is not type(baseline):
        kinds = f"the baseline is a profile of {VIEWS[type(baseline)]}, this one of {VIEWS[type(now)]}"
        raise RecipeError(f"--baseline: {kinds}; give one that the same command wrote with --json")
    ours, theirs = _ratios(now), _ratios(baseline)
    both = [name for name in ours if name in theirs]
    if not both:
        raise RecipeError(f"--baseline: {_nothing_in_common(ours, theirs)}")
    changes = [change(name, ours[name], theirs[name], fail_above) for name in both]
    disturbed = tuple(which for which, of in (("this run", now), ("the baseline", baseline)) if _is_disturbed(of))
    if disturbed:
        changes = [replace(each, verdict="cannot tell") if each.verdict == "regressed" else each for each in changes]
    return Gate(
        fail_above=fail_above,
        changes=tuple(changes),
        only_now=tuple(name for name in ours if name not in theirs),
        only_baseline=tuple(name for name in theirs if name not in ours),
        strict=strict,
        disturbed=disturbed,
    )


def _is_disturbed(profile: Profile) -> bool:
    """Whether other programs used a CPU's cores meanwhile, which slows kernels unlike; of a step it is not known."""
    return isinstance(profile, KernelProfile) and profile.environment.device == "cpu" and profile.ceilings.cores_shared


def change(name: str, now: Faster, baseline: Faster, fail_above: float) -> Change:
    """How many times slower a row became. Its interval reaches as far as both intervals together allow."""
    interval = Interval(
        _quotient(baseline.interval.low, now.interval.high), _quotient(baseline.interval.high, now.interval.low)
    )
    return Change(name, now, baseline, baseline.value / now.value, interval, _verdict(interval, fail_above))


def row_name(row: KernelCost | StepCost) -> str:
    """What makes a row the same row in another run: three parts, a comma between them, the last two free of commas."""
    if isinstance(row, StepCost):
        return f"{row.arm}, {row.mode}, {row.kernel}"
    case = row.case
    words = [case.operation, case.dtype, case.layout, "" if case.training else "evaluation"]
    words += ["" if case.affine == "wide" else f"affine={case.affine}", "" if case.tracked else "untracked"]
    return f"{' '.join(filter(None, words))}, {'x'.join(map(str, case.shape))}, {row.kernel}"


def _ratios(profile: Profile) -> dict[str, Faster]:
    return {name: faster for name, faster in _rows(profile) if faster is not None}


def _rows(profile: Profile) -> Iterator[tuple[str, Faster | None]]:
    for row in profile.rows:
        yield row_name(row), row.faster


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below is not None and below > 0 else None


def _verdict(interval: Interval, fail_above: float) -> Verdict:
    if interval.low is not None and interval.low > fail_above:
        return "regressed"
    return "ok" if interval.high is not None and interval.high <= fail_above else "cannot tell"


def _nothing_in_common(ours: dict[str, Faster], theirs: dict[str, Faster]) -> str:
    for names, which in ((ours, "this profile"), (theirs, "the baseline")):
        if not names:
            return f"{which} has no ratio to native; measure with --kernel native and at least one more"
    return (
        f"no row is in both (this profile has for example {next(iter(ours))!r}, the baseline {next(iter(theirs))!r}); "
        "measure the same kernels, operations, dtypes, layouts and shapes, or the same recipe"
    )
