"""The cases that are checked before anything is timed, the most telling first."""

from __future__ import annotations

import random

import torch

from bncli.measure.reference.case import DTYPE_NAMES, OPERATIONS
from bncli.results.profile import Case
from tests.benchmarks import kernels_hazards as hazards
from tests.benchmarks.kernels_check import accuracy
from tests.benchmarks.kernels_pool import Task

MAIN = ("bn", "bn+relu", "bn+add+relu")
EVERYTHING = ((8, 24, 14, 14), (2, 5, 3, 7, 5))
AWKWARD = (
    (1, 3, 5, 7),
    (2, 1, 1, 2),
    (2, 3, 1, 1),
    (5, 7),
    (257, 33),
    (3, 13, 11),
    (64, 16, 1, 1),
    (1, 2, 67, 129),
    (7, 129, 1, 31),
    (1, 1, 1, 4099),
    (2, 1000, 3, 3),
    (3, 7, 5, 3, 2),
)
TYPICAL = (
    (32, 64, 56, 56),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (8, 64, 112, 112),
    (32, 1024, 14, 14),
    (64, 32, 32, 32),
    (4, 32, 16, 16, 16),
)
ON_CPU = ((4, 3, 5, 7), (5, 7), (2, 5, 3, 7, 5))  # in Triton's interpreter too
BEYOND_32_BITS = Case((33, 64, 1024, 1024), tracked=False)


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("contiguous", "channels_last", "strided") if len(shape) >= 4 else ("contiguous", "strided")


def _product(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
    operations: tuple[str, ...],
    most_layouts: int,
    modes: tuple[bool, ...] = (True, False),
) -> list[Case]:
    return [
        Case(shape, operation, dtype, layout, training)
        for shape in shapes
        for layout in layouts(shape)[:most_layouts]
        for dtype in dtypes
        for operation in operations
        for training in modes
    ]


def accuracy_cases(device: torch.device, quick: bool, interpreted: bool) -> list[Case]:
    """All dtypes, layouts, operations and modes on small shapes; the common ones on awkward and on typical shapes."""
    if interpreted:  # a second a case; bfloat16 is left out, since the interpreter truncates where a GPU rounds
        found = [
            Case((2, 3, 4, 5), "bn+relu", "fp32"),
            Case((2, 3, 4, 5), "bn+add+relu", "fp16", "channels_last"),
            Case((5, 7), "bn+silu", "fp64", training=False),
        ]
        return found if quick else found + _product(ON_CPU, ("fp32", "fp16"), tuple(OPERATIONS), 3, (True,))
    if device.type == "cpu":  # where a case takes milliseconds: everything on every shape that is not large
        found = _product((*ON_CPU, *AWKWARD, *EVERYTHING), tuple(DTYPE_NAMES), tuple(OPERATIONS), 3)
    else:
        found = _product(TYPICAL, ("bf16", "fp16"), MAIN, 2, (True,))
        found += _product(EVERYTHING, tuple(DTYPE_NAMES), tuple(OPERATIONS), 3)
        found += _product(AWKWARD, ("bf16", "fp32"), MAIN[1:], 2)
    for affine, tracked in (("none", True), ("same", True), ("none", False), ("wide", False)):
        found += [Case((8, 24, 14, 14), "bn+relu", dtype, affine=affine, tracked=tracked) for dtype in ("bf16", "fp32")]
    random.Random(0).shuffle(found)  # so that what a deadline cuts off is a sample of all
    return found[:: 6 if quick else 1]


def hazard_tasks(device: torch.device, kernel: str, quick: bool) -> list[Task]:
    name = str(device)
    if device.type == "cpu":
        return [
            Task(hazards.under_autocast, (Case((4, 3, 5, 7), "bn+relu", dtype), kernel, name))
            for dtype in ("bf16", "fp32")
        ]
    several = [  # whose slabs need one program and several, of planes and of rows
        Case((32, 64, 56, 56), "bn+relu"),
        Case((32, 64, 56, 56), "bn+add+relu", "fp16", "channels_last"),
        Case((32, 256, 14, 14), "bn+add+relu"),
        Case((8, 16, 7, 7), "bn"),
    ]
    repeats = 100 if quick else 1000
    tasks = [Task(hazards.two_streams, (case, kernel, name, repeats)) for case in several]
    tasks += [Task(hazards.graph_replays, (case, kernel, name, repeats)) for case in several]
    tasks += [Task(hazards.compiled, (case, kernel, name)) for case in several]
    tasks += [
        Task(hazards.under_autocast, (Case((8, 24, 14, 14), "bn+relu", dtype), kernel, name))
        for dtype in ("bf16", "fp32")
    ]
    return tasks if quick else [*tasks, Task(hazards.beyond_32_bits, (BEYOND_32_BITS, kernel, name))]


def tasks(device: torch.device, kernel: str, quick: bool, interpreted: bool) -> list[Task]:
    found = [] if interpreted else hazard_tasks(device, kernel, quick)
    cases_ = accuracy_cases(device, quick, interpreted)
    return [*found, *(Task(accuracy, (case, kernel, str(device))) for case in cases_)]
