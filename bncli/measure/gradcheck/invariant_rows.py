"""The invariants as rows of the table: which norms, modes, dtypes and shapes each is checked on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bncli.measure.gradcheck import invariants
from bncli.measure.reference.gradient_cases import Case, Inputs, divisible
from bncli.measure.reference.observe import Check, Finding, Setting, Stage, fresh
from bncli.names import NORMS

Invariant = Callable[[Setting, Case, Inputs], Finding]
ANY = tuple(NORMS)


@dataclass(frozen=True)
class Row:
    slug: str
    name: str
    tolerance: str
    check: Invariant
    norms: tuple[str, ...] = ("batch",)
    modes: tuple[str, ...] = ("train",)
    dtypes: tuple[str, ...] = ("float32", "float64")
    eps: tuple[float, ...] = (1e-3,)
    shapes: tuple[tuple[int, ...], ...] = ((4, 0, 5, 7),)  # 0: the norm's usual number of channels
    fused: bool = False  # with a residual and an activation, where the subject has them


SUMMED = "the sum of the elements' floors"
EXACT = "none: every bit"
ROWS = (
    Row("sum-dx", "sum of dx over the batch is 0", SUMMED, invariants.sum_of_dx, ANY),
    Row("ones", "dx is 0 for an all-ones upstream gradient", "the floor of dx", invariants.all_ones),
    Row("sum-xhat-dx", "sum of xhat dx is its eps term", SUMMED, invariants.sum_of_xhat_dx, ANY, eps=(1e-5, 0.5)),
    Row("scale", "BN((aW)u) = BN(Wu), its gradient 1/a", SUMMED, invariants.scaled_weights, ANY, shapes=((8, 0, 5),)),
    Row(
        "moments",
        "output mean is bias, variance weight^2 var/(var+eps)",
        "the mean floor of y",
        invariants.output_moments,
    ),
    Row(
        "eval-gradient",
        "evaluation gradient is weight/sqrt(running_var+eps) g",
        "the floor of dx",
        invariants.evaluation_gradient,
        modes=("eval",),
    ),
    Row(
        "running",
        "running statistics move by momentum, variance by m/(m-1)",
        "their floors",
        invariants.running_statistics,
        shapes=((2, 0, 2), (4, 0, 5, 7)),
    ),
    Row(
        "unwritten",
        "inputs are not written to",
        EXACT,
        invariants.inputs_unwritten,
        ANY,
        ("train", "eval"),
        ("float32", "bfloat16"),
        fused=True,
    ),
    Row(
        "no-grad",
        "the same without gradients, and with x frozen",
        "the floors of y, dweight and dbias",
        invariants.without_gradients,
        # batch norm alone: torch 2.13's group norm of channels last on a CPU crashes where x is frozen
        modes=("train", "eval"),
        fused=True,
    ),
    Row(
        "same-bits",
        "two runs give the same bits",
        EXACT,
        invariants.repeatable,
        ANY,
        ("train", "eval"),
        ("float32", "bfloat16"),
        shapes=((4, 0, 5, 7), (8, 0, 33, 35)),
    ),
)


def stages(setting: Setting, refused: dict[str, str]) -> Iterator[Stage]:
    """A row for each invariant that the norm has."""
    subject = setting.subject
    for row in ROWS:
        modes = [mode for mode in row.modes if mode == "train" or subject.evaluates]
        if subject.norm not in row.norms or not modes:
            continue
        checks = [_check(setting, row, case) for case in _cases(setting, row, modes) if not case.needs & set(refused)]
        yield Stage("invariants", checks, row.tolerance, row=row.name)


def _cases(setting: Setting, row: Row, modes: list[str]) -> Iterator[Case]:
    channels = divisible(3, setting.subject.norm)
    layouts = ("contiguous",) if setting.effort == "quick" else ("contiguous", "channels_last")
    dtypes = row.dtypes if setting.effort != "quick" else row.dtypes[:1]
    fusions = ("plain", "relu+residual") if row.fused and setting.subject.fuses else ("plain",)
    few = setting.effort == "quick" or (setting.subject.interpreted and row.slug == "same-bits")  # minutes, interpreted
    shapes = row.shapes[:1] if few else row.shapes
    for mode in modes:
        for dtype in dtypes:
            for shape in [tuple(size or channels for size in shape) for shape in shapes]:
                for layout in layouts if len(shape) == 4 else layouts[:1]:
                    for fusion in fusions:
                        for eps in row.eps:
                            yield Case(mode, dtype, layout, shape, fusion, eps=eps, norm=setting.subject.norm)


def _check(setting: Setting, row: Row, case: Case) -> Check:
    def judged() -> list[Finding]:
        try:
            return [row.check(setting, *fresh(setting, case))]
        except (Exception, SystemExit) as error:  # the kernel's own, which may be anything
            text = str(error) if isinstance(error, invariants.Broken) else f"raised {type(error).__name__}: {error}"
            return [Finding("", math.inf, text)]

    suffix = f"/eps={case.eps:g}" if len(row.eps) > 1 else ""
    return Check(f"invariants/{row.slug}/{case.identifier}{suffix}", ("",), judged)
