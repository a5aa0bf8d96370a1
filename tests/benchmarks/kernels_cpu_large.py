"""Tensors larger than the last cache on a CPU: how much of the copy bandwidth, of the same run, a batch norm reaches.

A new tensor of that size is new memory from the system, whose pages it hands out, zeroed, at their first touch: a minor
page fault each. Training pays for them, so the target counts them. They are told apart by a second measurement, in
which the C library keeps what is freed (mallopt of glibc) and hands it out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterator, Mapping

import torch

from bncli.measure.profile.kernels import enter
from bncli.measure.reference import case as cases
from bncli.measure.timing import clock as timing
from bncli.measure.timing import speedup
from bncli.measure.timing.clock import Deadline, Work
from bncli.results.profile import Case, Direction, Speedup
from tests.benchmarks import kernels_environment as environment
from tests.benchmarks.kernels_check import Check
from tests.benchmarks.kernels_cpu_layers import LAYOUTS
from tests.benchmarks.kernels_report import faster, ms
from tests.benchmarks.kernels_sections import Run, words_of
from tests.benchmarks.kernels_speed import Target

SHARE_AT_LEAST = 0.6
TIMES_LAST_CACHE = 2
UNKNOWN_CACHE_BYTES = 64 * 2**20  # where the system does not say
MOST_BYTES = 3 * 2**29  # of a tensor, six of which are held at once
EXAMPLE = (64, 112, 112)  # (C, H, W)
ROUNDS, KEPT_ROUNDS = 7, 6
# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULT_TRIM_BYTES, DEFAULT_MMAP_MAX = 64 * 2**20, 65536


def shape_beyond(cache_bytes: int, example: tuple[int, ...] = EXAMPLE) -> tuple[int, ...]:
    """(N, C, H, W) of a float32 tensor TIMES_LAST_CACHE as large as the cache, up to MOST_BYTES."""
    wanted = min(TIMES_LAST_CACHE * cache_bytes, MOST_BYTES)
    one = 4
    for size in example:
        one *= size
    return (max(2, -(-wanted // one)), *example)


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Inside, freed memory stays with the process, whatever its size: whether the C library can do that."""
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):
        yield False
        return
    try:
        yield bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
    finally:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        trim(0)


def page_faults(work: Work) -> int:
    """Minor page faults of this process in one run of it."""
    state = work.prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work.run(state)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def large(run: Run, deadline: Deadline, shape: tuple[int, ...] | None = None) -> None:
    cache = environment.last_cache_bytes()
    shape = shape or shape_beyond(cache or UNKNOWN_CACHE_BYTES)
    known = "of unknown size" if cache is None else f"of {cache / 2**20:.0f} MiB"
    run.report.heading(f"A tensor of {4 * _product(shape) / 2**20:.0f} MiB, fp32, beyond a last cache {known}")
    for layout in LAYOUTS[: 1 if run.quick else None]:
        case = Case(shape, "bn+relu", "fp32", layout)
        if deadline.passed:
            run.report.note(f"large, {case}: for lack of time")
            continue
        _one_case(run, case, deadline)


def _product(sizes: tuple[int, ...]) -> int:
    return torch.Size(sizes).numel()


def _one_case(run: Run, case: Case, deadline: Deadline) -> None:
    entry = enter(case, 1, run.sources_of((run.candidate,)), run.device)
    for refused in entry.refused.values():
        if refused.wrong:
            run.report.check([Check("large", str(case), False, words_of(refused))])
        else:
            run.report.note(f"large, {case}: {refused.error}")
    if entry.inputs is None:
        return
    run.report.check([Check("large", str(case), True)])
    copy, moved_bytes = timing.copy_work(case.tensor_bytes, run.device)
    works = {"copy": copy, **entry.candidates[run.candidate].works(entry.inputs)}
    copy.run(None)  # its pages are there
    rounds = min(run.rounds, ROUNDS)
    samples = timing.interleaved(run.clock, works, rounds, deadline=deadline, fewest=speedup.FEWEST_ROUNDS)
    gb_per_s = timing.gb_per_s(moved_bytes, timing.spread(samples["copy"]).median)
    run.report.line(f"{case}: a copy of the same size reaches {gb_per_s:.1f} GB/s, read and written")
    _report(run, case, samples, moved_bytes, "new memory", page_faults(works["both"]))
    run.report.target("", [_target(case, samples, moved_bytes)])
    with kept_memory() as can:
        if not can:
            run.report.line("  whether kept memory is faster is unknown: mallopt of glibc is not there")
            return
        both = {name: works[name] for name in ("copy", "both")}
        works["both"].run(works["both"].prepare())  # from here on its memory is there
        kept = timing.interleaved(run.clock, both, min(run.rounds, KEPT_ROUNDS), deadline=deadline)
        _report(run, case, kept, moved_bytes, "kept memory", page_faults(works["both"]))


def shares(case: Case, direction: Direction, samples: Mapping[str, tuple[float, ...]], moved_bytes: int) -> Speedup:
    """The floor's bytes a second over a copy's, round by round: 1 is the copy's own speed."""
    floor = cases.floor_bytes(case, direction) / moved_bytes
    return speedup.of_ratios(
        [floor * copy / own for copy, own in zip(samples["copy"], samples[direction], strict=True)]
    )


def _target(case: Case, samples: Mapping[str, tuple[float, ...]], moved_bytes: int) -> Target:
    found = shares(case, "both", samples, moved_bytes)
    return Target(f"large, {case.layout}, share of copy", found.value, SHARE_AT_LEAST, found.interval)


def _report(
    run: Run, case: Case, samples: Mapping[str, tuple[float, ...]], moved_bytes: int, memory: str, faults: int
) -> None:
    run.report.record("large", case=str(case), memory=memory, samples_ms=dict(samples), page_faults=faults)
    ways: tuple[Direction, ...] = ("both", "forward", "backward")
    for way in ways:
        if way not in samples:
            continue
        share = shares(case, way, samples, moved_bytes)
        counted = f", {faults:,} page faults a call" if way == "both" else ""
        run.report.line(
            f"  {memory:11} {way:8} {ms(samples[way])}  {faster(share, '')} of the copy's bandwidth{counted}"
        )
