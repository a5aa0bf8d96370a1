"""Contexts of a kernel by its name, or of a test's own function; and runs that give the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bncli.engine.models.whitening import Whitening
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import Candidate, candidate
from bncli.measure.reference.case import Case, inputs
from bncli.measure.reference.judge import CheckContext, Evidence
from bncli.names import CHECKED_GROUP_SIZE, GRADCHECK_KERNELS
from bncli.results.gradcheck import Effort
from tests.measure.reference import wrong_kernels

CPU = torch.device("cpu")


def named(kernel: str) -> str:
    """A kernel of bncli's, or one of `wrong_kernels` as the command line names it."""
    return kernel if kernel in GRADCHECK_KERNELS else f"{wrong_kernels.__name__}:{kernel}"


def context_of(kernel: str = "native", norm: str = "batch", effort: Effort = "quick") -> CheckContext:
    return CheckContext(candidate(named(kernel), norm, CPU, allow_code=True), CPU, effort)


def context_with(call: Callable[..., Tensor], effort: Effort = "quick") -> CheckContext:
    return CheckContext(Candidate("a test's", "batch", call, "a function of a test's", "own function"), CPU, effort)


def whitening_context(change: Callable[[Whitening], object], effort: Effort = "quick") -> CheckContext:
    """Of a module that `change` makes wrong."""

    def call(*arguments: Any) -> Tensor:
        x, _, _, weight, bias, _, _, eps, _, _ = arguments
        module = Whitening(x.size(1), CHECKED_GROUP_SIZE, eps, affine=weight is not None)
        change(module)
        vectors = {} if weight is None else {"weight": weight, "bias": bias}
        y: Tensor = torch.func.functional_call(module, vectors, (x,))
        return y

    row = candidate("native", "whiten", CPU, allow_code=False)
    return CheckContext(replace(row, call=call), CPU, effort)


BUG_CASES = [  # for each known bug some that show it
    Case("train", "float64", "contiguous", (4, 3, 5)),
    Case("train", "bfloat16", "contiguous", (4, 3, 5, 7)),
    Case("train", "float32", "channels_last", (4, 3, 5, 7), "relu+residual"),
    Case("eval", "float32", "channels_last", (4, 3, 5, 7), "relu+residual"),
    Case("eval", "float64", "contiguous", (4, 3, 5)),
]


def evidence_of(case: Case) -> Evidence:
    """What a run of the case gives where every quantity is the truth."""
    given = inputs(case, CPU)
    held_to = tolerances.expected(case, given, second=False)
    return Evidence(case, given.wide(), held_to.truth, held_to.truth, held_to.floors("native"))
