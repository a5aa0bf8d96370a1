"""Every batch norm shape of two networks on a CPU, with every operation: `bncli profile`'s own run, and its targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bncli.measure.profile.budget import NATIVE, OPERATIONS, Asked
from bncli.measure.profile.kernels import KernelRun
from bncli.measure.profile.shapes import Calls, shape_set
from bncli.measure.timing import speedup
from bncli.measure.timing.ceilings import Ladder
from bncli.measure.timing.clock import Deadline, gb_per_s
from bncli.report.profile.text import note_words, of_copy
from bncli.results.profile import Case, Ceilings, KernelCost, KernelMean, KernelProfile, RowDone, Speedup
from tests.benchmarks.kernels_check import Check
from tests.benchmarks.kernels_report import faster, ms
from tests.benchmarks.kernels_sections import Run, words_of
from tests.benchmarks.kernels_speed import Target

SETS = ("resnet20", "resnet50")  # at the batches of shapes.BATCHES
LAYOUTS = ("contiguous", "channels_last")
MEAN_AT_LEAST = {"bn": 2.0, "bn+relu": 3.0, "bn+add+relu": 3.0}
WORST_AT_LEAST = 1.2
WARM_SHARE = 0.62  # of the section's time; the rest is for the second figure, with a cold cache


class NoPeaks:
    """Stands in for the processes that measure peaks of memory, which are not asked for here."""

    failure: str | None = "not asked for"

    def start(self) -> None:
        pass

    def peak_mib(self, case: Case, kernel: str) -> float | None:
        return None

    def close(self) -> None:
        pass


def layers(run: Run, deadline: Deadline, shapes: Sequence[Calls] | None = None) -> None:
    """Warm, each sample after the same work, as in a loop: these are held to the targets. Then cold."""
    if shapes is None:
        shapes = [entry for name in SETS for entry in shape_set(name)]
        shapes = shapes[::4] if run.quick else shapes
    whole_s = deadline.left_s
    warm = _measured(run, shapes, cold=False, seconds=WARM_SHARE * whole_s)
    _report_means(run, warm)
    run.report.target("", targets(warm))
    cold = _measured(run, shapes, cold=True, seconds=min(deadline.left_s, (1 - WARM_SHARE) * whole_s))
    _report_means(run, cold)


def _measured(run: Run, shapes: Sequence[Calls], *, cold: bool, seconds: float) -> KernelProfile:
    heat = "cold" if cold else "warm"
    how = "64 MiB written before each sample" if cold else "in a loop as training has it"
    run.report.heading(f"Layers of {' and '.join(SETS)}, training, fp32, forward + backward, {heat}: {how}")
    asked = Asked(
        kernels=(NATIVE, run.candidate),
        operations=OPERATIONS,
        dtypes=("fp32",),
        layouts=LAYOUTS,
        shapes=tuple(shapes),
        cold=cold,
        seconds=seconds,
    )
    ladder = Ladder(run.clock, run.device, cold=cold)
    measured = KernelRun(
        *(asked, run.device, run.clock), peaks=NoPeaks(), ladder=ladder, sources=run.sources_of(asked.kernels)
    )
    _report_rows(run, measured, ladder, heat)
    found = measured.result()
    for row in found.rows:
        run.report.record("layers", cold=cold, **_raw(row))
    copies = ", ".join(f"{size / 2**20:g} MiB {reached:.1f}" for size, reached in found.ceilings.copies)
    run.report.line(f"copies, GB/s read and written: {copies}; shares are of the last")
    for note in found.notes:
        if note.reason != NoPeaks.failure:
            run.report.line(f"note: {note_words(note)}")
    return found


def _report_rows(run: Run, measured: KernelRun, ladder: Ladder, heat: str) -> None:
    """Measure, with a line a case as it comes. A wrong kernel is a check that failed, and has no times."""
    native: dict[Case, KernelCost] = {}
    missing: dict[str, list[str]] = {}  # why -> of what
    for event in measured.events():
        if not isinstance(event, RowDone) or not isinstance(event.row, KernelCost):
            continue
        row = event.row
        if row.error is None or row.wrong:
            run.report.check([Check(f"layers, {row.kernel}", str(row.case), not row.wrong, words_of(row))])
        else:
            missing.setdefault(row.error, []).append(f"{row.kernel} on {row.case}")
        if row.error is not None:
            continue
        if row.kernel == NATIVE:
            native[row.case] = row
        elif row.case in native:
            run.report.line(row_line(row, native[row.case], ladder.ceilings()))
    for why, rows in missing.items():
        run.report.note(f"layers, {heat}: {len(rows)} rows, the first {rows[0]}: {why}")


def _raw(row: KernelCost) -> dict[str, Any]:
    ways = {"forward": row.forward, "backward": row.backward, "both": row.both}
    samples = {way: times.samples_ms for way, times in ways.items() if times is not None}
    return {"case": str(row.case), "kernel": row.kernel, "samples_ms": samples, "error": row.error}


def row_line(row: KernelCost, native: KernelCost, ceilings: Ceilings) -> str:
    """One case: both kernels' times, the ratio with its interval, and the share of the copy bandwidth."""
    assert row.both is not None
    assert native.both is not None
    assert row.faster is not None
    share = of_copy(row, ceilings)
    apart = [
        f"{statistics.median(times.samples_ms):.3f}" if times is not None else "unknown"
        for times in (row.forward, row.backward)
    ]
    return (
        f"{row.case!s:50} native {ms(native.both.samples_ms)}  {row.kernel} "
        f"{ms(row.both.samples_ms)} (apart {' + '.join(apart)})  {faster(row.faster)}  "
        + (f"{share:.0%} of copy" if share is not None else "")
    )


# --- over all shapes ----------------------------------------------------------------------------------------------


def _report_means(run: Run, profile: KernelProfile) -> None:
    for mean in profile.means:
        run.report.line(
            f"{mean.operation:12} {mean.layout:14} geometric mean of {mean.shapes} shapes {faster(mean.faster)}, "
            f"worst {mean.least:.2f}x at {'x'.join(map(str, mean.least_shape))}; "
            f"at the copy's speed over the floor's bytes {at_copy_speed(profile, mean):.2f}x"
        )
    for operation in OPERATIONS:
        found = over_both(profile.rows, operation)
        if found is not None:
            run.report.line(f"{operation:12} {'both layouts':14} geometric mean {faster(found)}")


def at_copy_speed(profile: KernelProfile, mean: KernelMean) -> float:
    """The ratio to native, over a mean's shapes, of a kernel that moved the floor's bytes alone, as fast as a copy.

    The copy is the smallest measured one that is no smaller than the tensor. No kernel that reads x twice gets there.
    """
    ratios_ = []
    for row in profile.rows:
        key = (row.case.operation, row.case.dtype, row.case.layout)
        if row.kernel == NATIVE and row.both is not None and key == (mean.operation, mean.dtype, mean.layout):
            copies = profile.ceilings.copies
            reached = next((speed for size, speed in copies if size >= row.case.tensor_bytes), copies[-1][1])
            ratios_.append(gb_per_s(row.both.floor_bytes, statistics.median(row.both.samples_ms)) / reached)
    return 1 / statistics.geometric_mean(ratios_)


def over_both(rows: Sequence[KernelCost], operation: str) -> Speedup | None:
    """The geometric mean over an operation's cases in all layouts; None where none was timed beside native."""
    native = {row.case: row.both for row in rows if row.kernel == NATIVE and row.both is not None}
    pairs = [
        (native[row.case].samples_ms, row.both.samples_ms)
        for row in rows
        if row.faster is not None and row.both is not None and row.case.operation == operation and row.case in native
    ]
    return speedup.faster_over(pairs) if pairs else None


def targets(profile: KernelProfile) -> list[Target]:
    """For each operation: the mean in each layout and over both, and the worst shape of each layout.

    A mean or a worst shape is known only where every shape was timed: without some, the target is not measured.
    """
    planned = {row.case for row in profile.rows}
    timed = {row.case for row in profile.rows if row.faster is not None}
    found: list[Target] = []
    for operation in OPERATIONS:
        mine = {case for case in planned if case.operation == operation}
        for mean in profile.means:
            if mean.operation == operation:
                whole = {case for case in mine if case.layout == mean.layout} <= timed
                found += (
                    _of_mean(mean, profile.rows)
                    if whole
                    else [_target(f"{operation} {mean.layout}, mean", None, MEAN_AT_LEAST[operation])]
                )
        both = over_both(profile.rows, operation) if mine <= timed else None
        found.append(_target(f"{operation}, both layouts, mean", both, MEAN_AT_LEAST[operation]))
    return found


def _of_mean(mean: KernelMean, rows: Sequence[KernelCost]) -> Iterator[Target]:
    what = f"{mean.operation} {mean.layout}"
    yield _target(f"{what}, mean", mean.faster, MEAN_AT_LEAST[mean.operation])
    shape = "x".join(map(str, mean.least_shape))
    worst = next(
        row.faster
        for row in rows
        if row.faster is not None
        and (row.kernel, row.case.operation, row.case.layout) == (mean.kernel, mean.operation, mean.layout)
        and row.case.shape == mean.least_shape
    )
    yield _target(f"{what}, worst ({shape})", worst, WORST_AT_LEAST)


def _target(name: str, found: Speedup | None, at_least: float) -> Target:
    return Target(name, None, at_least) if found is None else Target(name, found.value, at_least, found.interval)
