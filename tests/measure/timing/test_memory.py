"""Bytes saved for backward, and the allocator's peak, against what the definition says must be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import by_name
from bncli.measure.timing import memory
from bncli.measure.timing.memory import saved_mib
from bncli.results.profile import Case


class KeepsTwice(torch.autograd.Function):
    """Saves its input twice and a new tensor of the same size once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.view(-1), x * 2)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_a_storage_counts_once_however_often_it_is_saved() -> None:
    x = torch.ones(10, 10, requires_grad=True)
    assert saved_mib(lambda: KeepsTwice.apply(x)) == 2 * 400 / memory.MIB
    assert saved_mib(lambda: KeepsTwice.apply(x), leave_out=[x]) == 400 / memory.MIB


def test_nothing_is_saved_where_nothing_is_differentiated() -> None:
    assert saved_mib(lambda: torch.ones(10).square()) == 0


def test_batch_norm_saves_its_input_and_relu_its_output() -> None:
    for operation, tensors in (("bn", 1), ("bn+relu", 2), ("bn+add+relu", 2)):
        case = Case((8, 16, 8, 8), operation, "fp32")
        inputs = cases.timed_inputs(cases.timed(case), torch.device("cpu"))
        inputs.leaves()
        given = cases.arguments(cases.timed(case), inputs)
        saved = memory.MIB * saved_mib(lambda given=given: by_name("native")(*given))  # type: ignore[misc]
        vectors = saved - tensors * case.tensor_bytes
        assert 0 < vectors <= 8 * 16 * 4  # weight, running statistics, the batch's mean and deviation


@pytest.mark.cuda
def test_on_a_gpu_the_peak_is_the_allocators() -> None:
    from bncli.measure.profile.timed_kernels import TimedKernel

    device = torch.device("cuda")
    case = Case((64, 64, 56, 56), "bn", "fp32")
    timed = cases.timed(case)
    step = TimedKernel(timed, by_name("native")).step(cases.timed_inputs(timed, device))
    peak = memory.peak_mib(step, device)
    assert peak == pytest.approx(2 * case.tensor_bytes / 2**20, rel=0.1)
