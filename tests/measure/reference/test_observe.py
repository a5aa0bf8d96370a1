"""One run of a kernel: what it gave, and what kept it from giving something, by kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bncli.measure.reference.candidate import KernelFailed
from bncli.measure.reference.case import Case, inputs
from bncli.measure.reference.observe import finding_of, observe, quantities, unlike
from bncli.results.finding import Finding
from tests.measure.reference import wrong_kernels

CASE = Case("train", "float32", "contiguous", (4, 3, 5))


def observed(kernel: Callable[..., Tensor], case: Case = CASE) -> dict[str, Finding]:
    def call(*arguments: object) -> Tensor:
        return kernel(*arguments[:8])

    return observe(call, case, inputs(case, torch.device("cpu"))).problems


def test_a_right_kernel_gives_every_quantity_and_no_problem() -> None:
    assert observed(wrong_kernels.right) == {}


def test_what_a_kernel_raises_is_every_quantitys_problem_once_and_in_its_own_words() -> None:
    found = observed(wrong_kernels.raises)
    assert tuple(found) == quantities(CASE)
    assert set(found.values()) == {Finding("raised", exception="KeyError", text="'no such thing'")}


def test_autograd_says_by_its_words_that_a_saved_tensor_was_written_to() -> None:
    found = observed(wrong_kernels.writes_what_it_saved)
    assert found["dx"].kind == "saved_written"
    assert found["dx"].exception == "RuntimeError"
    assert "forward" not in found


def test_each_backward_pass_has_a_forward_pass_of_its_own() -> None:
    """As a function of torch.compile needs it, which allows one backward pass for each."""
    calls, backwards = [], []

    def kernel(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        y = wrong_kernels.right(*arguments)
        y.register_hook(lambda g: backwards.append(len(calls)))
        return y

    assert observed(kernel) == {}
    assert backwards == [1, 2]


def test_the_message_of_an_exception_is_not_cut() -> None:
    text = "A sentence that says what is wrong. " * 20 + "Its last word."
    assert finding_of(ValueError(f"{text}\nand details")).text == text


def test_autograd_says_by_its_words_that_a_leaf_was_written_to() -> None:
    def writes(input: Tensor, *others: object) -> Tensor:
        return input.mul_(2)

    assert observed(writes)["forward"].kind == "leaf_written"


class NoRoom(MemoryError):
    """As numpy has one of its own."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), NoRoom("for 9 GiB"), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9")],
)
def test_lack_of_memory_is_not_a_kernels_error(error: Exception) -> None:
    assert finding_of(error).kind == "no_memory"


def test_a_gradient_without_a_graph_is_no_second_derivative() -> None:
    def detached(input: Tensor, *others: object) -> Tensor:
        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):  # type: ignore[no-untyped-def]
                return x.clone()

            @staticmethod
            def backward(ctx, g):  # type: ignore[no-untyped-def]
                return g.detach()

        return Identity.apply(input)

    assert observed(detached)["double backward"].kind == "no_second_derivative"


def test_running_statistics_that_an_evaluation_moves_are_named() -> None:
    found = observed(wrong_kernels.moved_in_evaluation, Case("eval", "float32", "contiguous", (4, 3, 5)))
    assert found == {"forward": Finding("running_moved", names=("running_mean",))}


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        ([1], "wrong_type"),
        (torch.zeros(2), "wrong_shape"),
        (torch.zeros(3).double(), "wrong_dtype"),
        (torch.zeros(3, device="meta"), "wrong_device"),
    ],
)
def test_an_output_that_is_unlike_its_input_has_a_kind(y: object, kind: str) -> None:
    found = unlike(y, torch.zeros(3))
    assert found is not None
    assert found.kind == kind
    assert unlike(torch.ones(3), torch.zeros(3)) is None


def test_a_failure_with_a_finding_of_its_own_keeps_it() -> None:
    own = Finding("wrong_type", given="list", wanted="a tensor")
    assert finding_of(KernelFailed(own)) == own
    long = finding_of(ValueError("one\ntwo"))
    assert long == Finding("raised", exception="ValueError", text="one")


def test_a_case_is_judged_by_the_running_statistics_in_training_alone() -> None:
    assert "running_var" in quantities(Case("train", "float32", "contiguous", (4, 3)))
    assert "running_var" not in quantities(Case("eval", "float32", "contiguous", (4, 3)))
