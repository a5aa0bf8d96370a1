"""A kernel over all of its shapes: the geometric mean of its ratios to native, and the worst of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from bncli.measure.timing.speedup import faster_over
from bncli.results.profile import Case, KernelCost, KernelMean, Times

NATIVE = "native"
Key = tuple[str, str, str, str]  # kernel, operation, dtype, layout


def means(rows: Sequence[KernelCost]) -> tuple[KernelMean, ...]:
    """One for each kernel, operation, dtype and layout that has ratios to native, in the rows' order.

    Every shape counts once, however often a model calls it. Round k of a mean is made of the rounds k of its shapes.
    """
    native = {row.case: row.both for row in rows if row.kernel == NATIVE and row.both is not None}
    groups: dict[Key, list[KernelCost]] = {}
    for row in rows:
        if row.faster is not None and row.both is not None and row.case in native:
            groups.setdefault(_group(row.kernel, row.case), []).append(row)
    return tuple(_mean(key, group, native) for key, group in groups.items())


def _group(kernel: str, case: Case) -> Key:
    return kernel, case.operation, case.dtype, case.layout


def _mean(key: Key, rows: Sequence[KernelCost], native: dict[Case, Times]) -> KernelMean:
    pairs = [(native[row.case].samples_ms, row.both.samples_ms) for row in rows if row.both is not None]
    values = [(row.faster.value, row.case.shape) for row in rows if row.faster is not None]
    least, shape = min(values)
    kernel, operation, dtype, layout = key
    return KernelMean(kernel, operation, dtype, layout, len(rows), faster_over(pairs), least, shape)
