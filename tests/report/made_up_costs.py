"""Handmade profiles for the tests of reports: nothing is measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from bncli.results.environment import Interval
from bncli.results.profile import (
    STEP_CLASSES,
    Case,
    Ceilings,
    Change,
    Gate,
    KernelCost,
    KernelMean,
    KernelProfile,
    KernelRow,
    NormLayers,
    NormRemark,
    Note,
    Speedup,
    StepCost,
    StepMemory,
    StepProfile,
    Times,
)
from tests.report import conftest

ENVIRONMENT = replace(conftest.ENVIRONMENT, threads=2)
CEILINGS = Ceilings(copies=((2**20, 41.2), (2**24, 19.6), (2**28, 11.87)), gflop_per_s=118.4)
SHAPES = (
    (256, 64, 112, 112), (256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7),
    (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7), (60, 100),
)  # fmt: skip
SPEEDS = {"native": 1.0, "fused": 2.31, "compiled": 0.26, "flaggems": 1.02}
RAN = {"native": "ATen", "fused": "in cache", "compiled": "Inductor", "flaggems": "Triton"}
ERROR = "dx is wrong: 3.2e-02 beside a tolerance of 1.1e-05 (relative, at 256x64x56x56)"


def samples(middle: float, n: int = 9, spread: float = 0.03) -> tuple[float, ...]:
    """n samples around `middle`, which is their median, up to `spread` away."""
    return tuple(middle * (1 + spread * (k - n // 2) / max(1, n // 2)) for k in range(n))


def times(ms: float, case: Case, tensors: int) -> Times:
    per_element = {"bn": 3.0, "bn+relu": 3.2, "bn+add+relu": 2.6}[case.operation]
    return Times(
        samples(ms), floor_bytes=float(tensors * case.tensor_bytes), flops=tensors * per_element * case.elements
    )


def faster(value: float, width: float = 0.03) -> Speedup:
    return Speedup(value, Interval(value * (1 - width), value * (1 + width)))


def kernel_cost(case: Case, kernel: str, **changes: Any) -> KernelCost:
    """A row whose native kernel reaches a third of the copy bandwidth, and the others SPEEDS times that."""
    tensors = 7 if "add" in case.operation else 5
    wobble = 1 + 0.2 * math.sin(case.elements)
    ms = tensors * case.tensor_bytes / (0.33 * CEILINGS.copy_gb_per_s * 1e6) / SPEEDS[kernel] * wobble
    row = KernelCost(
        case=case,
        kernel=kernel,
        calls=3,
        ran="two passes" if kernel == "fused" and case.elements > 1e8 else RAN[kernel],
        forward=times(0.4 * ms, case, 2),
        backward=times(0.6 * ms, case, 3),
        both=times(ms, case, tensors),
        faster=None if kernel == "native" else faster(SPEEDS[kernel]),
        peak_memory_mib=2.5 * case.tensor_bytes / 2**20,
        saved_mib=case.tensor_bytes / 2**20,
    )
    return replace(row, **changes)


def failed(case: Case, kernel: str, error: str, wrong: bool = False) -> KernelCost:
    return KernelCost(case=case, kernel=kernel, calls=1, ran=None, error=error, wrong=wrong)


def kernel_profile(
    shapes: int = 2,
    operations: tuple[str, ...] = ("bn", "bn+relu"),
    layouts: tuple[str, ...] = ("contiguous",),
    kernels: tuple[str, ...] = ("native", "fused", "compiled"),
    dtype: str = "fp32",
) -> KernelProfile:
    cases = [
        Case(shape, operation, dtype, layout)
        for layout, operation, shape in itertools.product(layouts, operations, SHAPES[1 : 1 + shapes])
    ]
    rows = tuple(kernel_cost(case, kernel) for case in cases for kernel in kernels)
    means = tuple(
        KernelMean(kernel, operation, dtype, layout, shapes, faster(SPEEDS[kernel]), 0.9 * SPEEDS[kernel], SHAPES[1])
        for kernel, operation, layout in itertools.product(kernels, operations, layouts)
        if kernel != "native"
    )
    return KernelProfile(
        ENVIRONMENT, True, 41.3, CEILINGS, rows, means, (Note("compilation", "compiled", seconds=7.04),), len(rows)
    )


def with_errors() -> KernelProfile:
    """One kernel that is wrong, one that is not there, and a case in evaluation."""
    profile = kernel_profile(1, ("bn+relu",))
    case, rare = Case(SHAPES[1], "bn+relu", "fp32"), Case(SHAPES[4], "bn", "bf16", training=False, affine="none")
    bad = (
        failed(case, "mine:norm", ERROR, wrong=True),
        failed(case, "apex", "is not installed; pip install apex"),
        kernel_cost(rare, "native", peak_memory_mib=None, saved_mib=None, ran=None),
        kernel_cost(rare, "fused", faster=Speedup(1.04, Interval(None, 1.2))),
    )
    return replace(profile, rows=(*profile.rows, *bad), planned=12, cold=False)


def one_case() -> KernelProfile:
    return kernel_profile(1, ("bn",), kernels=("native", "fused"))


def in_new_memory_too() -> KernelProfile:
    profile, speedup = one_case(), faster(3.75)
    rows = [replace(row, new_memory=times(321.0, row.case, 5)) for row in profile.rows]
    rows[1] = replace(rows[1], faster_new_memory=speedup)
    means = [replace(mean, faster_new_memory=speedup) for mean in profile.means]
    return replace(profile, rows=tuple(rows), means=tuple(means))


def nothing_measured() -> KernelProfile:
    return replace(one_case(), rows=(), means=(), planned=4)


def resnet() -> KernelProfile:
    """The 36 rows of 3 shapes, 3 operations, 2 layouts and 2 kernels."""
    both = ("contiguous", "channels_last")
    return kernel_profile(3, ("bn", "bn+relu", "bn+add+relu"), both, ("native", "fused"), "bf16")


def hundred_rows() -> KernelProfile:
    both = ("contiguous", "channels_last")
    return kernel_profile(8, ("bn", "bn+relu", "bn+add+relu"), both, ("native", "fused"))


KERNELS = {
    "six rows": kernel_profile,
    "one case": one_case,
    "new memory": in_new_memory_too,
    "with errors": with_errors,
    "nothing measured": nothing_measured,
    "resnet": resnet,
    "hundred rows": hundred_rows,
}


FUSED_NORMS = (
    NormLayers("batch norm", 9, "fused", True, (("relu",),)),
    NormLayers("batch norm", 9, "fused", True, (("residual add", "relu"),)),
    NormLayers("batch norm", 1, "fused", True, ((),)),
)


# --- steps --------------------------------------------------------------------------------------------------------


def step_cost(arm: str, kernel: str | None, mode: str, ms: float, ratio: float | None) -> StepCost:
    parts = (0.31 if kernel != "fused" else 0.14, 0.40, 0.09, 0.02, 0.05, 0.01, 0.03, 0.09)
    return StepCost(
        arm=arm,
        kernel=kernel,
        mode=mode,  # type: ignore[arg-type]
        batch_size=128,
        samples_ms=samples(ms),
        shares_ms={name: ms * part / sum(parts) for name, part in zip(STEP_CLASSES, parts, strict=True)},
        memory=StepMemory(1.03, 1.03, 2.06, 84.5, 412.25 if kernel else None) if mode == "training" else None,
        faster=None if ratio is None else faster(ratio),
        norms=FUSED_NORMS if kernel == "fused" else (),
    )


def step_profile() -> StepProfile:
    rows = (
        step_cost("batch norm", "native", "training", 102.4, None),
        step_cost("batch norm", "fused", "training", 83.1, 1.232),
        step_cost("batch norm", "native", "evaluation", 31.9, None),
        step_cost("batch norm", "fused", "evaluation", 25.2, 1.266),
        step_cost("plain", None, "training", 71.3, None),
        replace(
            step_cost("plain", None, "evaluation", 22.0, None), samples_ms=(), shares_ms={}, error="ran out of memory"
        ),
    )
    remarks = (
        NormRemark("batch norm", "short half-life", "stem.norm", figures={"momentum": 0.9, "half_life_steps": 0.301}),
        NormRemark(
            "batch norm", "bias without effect", "blocks.0.norm1", 3, {"parameters": 64}, source="blocks.0.conv1"
        ),
    )
    notes = (Note("norms watched", arm="batch norm", count=5, of=35),)
    return StepProfile("digits", ENVIRONMENT, 12.4, rows, remarks, notes, len(rows))


# --- gates --------------------------------------------------------------------------------------------------------


def made_gate() -> Gate:
    kinds = itertools.product(("contiguous", "channels_last"), ("fused", "compiled"))
    rows = [KernelRow(Case(SHAPES[1], "bn+relu", "fp32", layout), kernel) for layout, kernel in kinds]
    verdicts: tuple[Any, ...] = ("ok", "regressed", "cannot tell", "ok")
    changes = tuple(
        Change(
            row, faster(now), faster(2.31), 2.31 / now, Interval(2.2 / now, None if now == 2.1 else 2.4 / now), verdict
        )
        for row, now, verdict in zip(rows, (2.3, 1.7, 2.1, 2.5), verdicts, strict=True)
    )
    only_now, only_baseline = (KernelRow(Case(shape, "bn", "fp32"), "fused") for shape in (SHAPES[-1], (8, 8)))
    return Gate(1.1, changes, (only_now,), (only_baseline,))
