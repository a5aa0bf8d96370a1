"""What can be put under test: a kernel by its name, a norm, and a function of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bncli.engine.models.whitening import Whitening
from bncli.errors import UsageError
from bncli.kernels.definition import definition
from bncli.measure.reference.candidate import Candidate, KernelFailed, by_name, candidate
from bncli.measure.reference.case import Case, arguments, inputs
from bncli.names import CHECKED_GROUP_SIZE, CHECKED_GROUPS, CHECKED_NEWTON_STEPS
from tests.measure.reference import wrong_kernels

CPU = torch.device("cpu")
HERE = "tests.measure.reference.wrong_kernels"


def own(function: str) -> Candidate:
    return candidate(f"{HERE}:{function}", "batch", CPU, allow_code=True)


def result(call: object, case: Case) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and the running statistics after the call."""
    given = inputs(case, CPU)
    assert callable(call)
    return call(*arguments(case, given)), given.running_mean, given.running_var


# --- what is called ---------------------------------------------------------------------------------------------------


CASES = [
    Case(mode, "float64", "contiguous", (4, 3, 5), fusion) for mode in ("train", "eval") for fusion in ("plain", "silu")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.identifier)
@pytest.mark.parametrize("kernel", ["native", "fused", f"{HERE}:right_by_the_seam"])
def test_a_kernel_by_its_name_and_a_function_by_the_kernels_contract_are_called_alike(kernel: str, case: Case) -> None:
    found = candidate(kernel, "batch", CPU, allow_code=True)
    assert (found.fuses, found.evaluates) == (True, True)
    torch.testing.assert_close(result(found.call, case), result(definition("batch"), case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_function_with_the_parameters_of_torchs_own_is_called_by_their_names(mode: str) -> None:
    case = Case(mode, "float64", "contiguous", (4, 3, 5))
    found = own("right")
    assert (found.fuses, found.evaluates, found.rule) == (False, True, "own function")
    torch.testing.assert_close(result(found.call, case), result(definition("batch"), case), rtol=1e-10, atol=1e-10)


def first_by_position(values, /, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    return wrong_kernels.right(values, running_mean, running_var, weight, bias, training, momentum, eps)


def first_of_another_name(activations, weight, bias, eps, residual, activation, statistics=None):  # type: ignore[no-untyped-def]
    return wrong_kernels.right_by_the_seam(activations, weight, bias, eps, residual, activation, statistics)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("function", ["first_by_position", "first_of_another_name"])
def test_the_first_parameter_may_have_any_name(function: str, mode: str) -> None:
    case = Case(mode, "float64", "contiguous", (4, 3, 5))
    found = candidate(f"{__name__}:{function}", "batch", CPU, allow_code=True)
    assert found.evaluates
    torch.testing.assert_close(result(found.call, case), result(definition("batch"), case), rtol=1e-10, atol=1e-10)


def test_the_compiled_kernel_is_torchs_own_compiled_for_each_shape() -> None:
    found = candidate("compiled", "batch", CPU, allow_code=False)
    assert (found.ran, found.rule) == ("torch.compile of torch's own operator", "own function")
    assert (found.fuses, found.evaluates) == (True, True)


def a_kernel_that_moves(x, weight, bias, eps, residual=None, activation=None, running=None):  # type: ignore[no-untyped-def]
    """Its running mean ends at 7: nobody else may move it once more."""
    y, mean, var = wrong_kernels.right_by_the_seam(x, weight, bias, eps, residual, activation)
    if running is not None:
        running[0].fill_(7.0)
    return y, mean, var


def test_running_statistics_are_updated_by_the_kernel_or_after_it() -> None:
    case = Case("train", "float64", "contiguous", (4, 3, 5))
    moves = candidate(f"{__name__}:a_kernel_that_moves", "batch", CPU, allow_code=True)
    assert not moves.evaluates
    _, mean, _ = result(moves.call, case)
    assert mean is not None
    assert bool((mean == 7.0).all())
    without = own("right_without_evaluation")
    assert not without.evaluates
    found, expected = result(without.call, case), result(definition("batch"), case)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def swapped_statistics(x, weight, bias, eps, residual=None, activation=None):  # type: ignore[no-untyped-def]
    y, mean, var = wrong_kernels.right_by_the_seam(x, weight, bias, eps, residual, activation)
    return y, mean[None], var


@pytest.mark.parametrize(
    ("kernel", "kind", "given"),
    [
        (f"{HERE}:returns_y_alone", "wrong_type", "Tensor"),
        (f"{__name__}:swapped_statistics", "wrong_shape", "(1, 3) and (3,)"),
    ],
)
def test_a_kernel_must_return_three_tensors_with_channel_statistics(kernel: str, kind: str, given: str) -> None:
    with pytest.raises(KernelFailed) as caught:
        result(candidate(kernel, "batch", CPU, allow_code=True).call, Case("train", "float32", "contiguous", (4, 3, 5)))
    assert (caught.value.finding.kind, caught.value.finding.given) == (kind, given)


MODULES = {
    "layer": lambda c: nn.GroupNorm(1, c, eps=1e-3),
    "group": lambda c: nn.GroupNorm(CHECKED_GROUPS, c, eps=1e-3),
    "instance": lambda c: nn.GroupNorm(c, c, eps=1e-3),
}


@pytest.mark.parametrize("norm", MODULES)
@pytest.mark.parametrize("affine", ["wide", "none"])
def test_the_other_norms_are_modules_with_the_calls_own_weight_bias_and_eps(norm: str, affine: str) -> None:
    found = candidate("native", norm, CPU, allow_code=False)
    assert (found.fuses, found.evaluates, found.rule) == (False, False, "native")
    case = Case("train", "float32", "contiguous", (4, 6, 5), norm=norm, affine=affine)
    given = inputs(case, CPU)
    module = MODULES[norm](6)
    if given.weight is not None:
        module.load_state_dict({"weight": given.weight, "bias": given.bias})
    y, _, _ = result(found.call, case)
    torch.testing.assert_close(y, module(given.x))


@pytest.mark.parametrize(("norm", "iterations"), [("whiten", None), ("iternorm", CHECKED_NEWTON_STEPS)])
@pytest.mark.parametrize("affine", ["wide", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whitening_norms_are_bnclis_modules_in_training(
    norm: str, iterations: int | None, affine: str, dtype: str
) -> None:
    found = candidate("native", norm, CPU, allow_code=False)
    assert (found.fuses, found.evaluates, found.rule) == (False, False, "module")
    case = Case("train", dtype, "contiguous", (4, 6, 5), norm=norm, affine=affine)
    given = inputs(case, CPU)
    module = Whitening(6, CHECKED_GROUP_SIZE, case.eps, iterations=iterations).to(case.stored)
    if given.weight is not None:
        module.load_state_dict({"weight": given.weight, "bias": given.bias}, strict=False)
    y, _, _ = result(found.call, case)
    torch.testing.assert_close(y, module(given.x))
    assert (given.running_mean, given.running_var) == (None, None)


def test_the_implementation_that_runs_is_reported() -> None:
    assert candidate("native", "batch", CPU, allow_code=False).ran == "torch's own operator"
    assert candidate("fused", "batch", CPU, allow_code=False).ran.startswith("C, compiled for this CPU")
    assert own("right").ran == f"your function {HERE}:right"
    assert own("right_by_the_seam").ran.startswith(f"your function {HERE}:right_by_the_seam, ")


def test_a_function_itself_is_called_like_a_kernel_by_name() -> None:
    case = Case("train", "float64", "contiguous", (4, 3, 5), "relu+residual")
    found = result(by_name(wrong_kernels.right_by_the_seam), case)
    torch.testing.assert_close(found, result(definition("batch"), case), rtol=1e-10, atol=1e-10)


def without_x(running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """None of its parameters is the input, and they are listed in their order."""


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "norm", "message"),
    [
        ("native", "spectral", "norm spectral: expected one of batch, layer, group, instance, whiten, iternorm"),
        ("quick", "batch", "kernel quick: there is no such kernel; expected native, fused, fused-interpreted"),
        ("native", "ghost", "norm ghost: expected one of batch, layer, group, instance"),  # nothing to check it against
        ("fused", "layer", "norm layer: has only the native kernel; fused is a batch norm"),
    ],
)
def test_a_name_that_is_none_is_refused(kernel: str, norm: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidate(kernel, norm, CPU, allow_code=False)


@pytest.mark.parametrize("name", ["./mine.py:batch_norm", "mine.py:batch_norm", "mine:", "a b:c d"])
def test_a_file_or_half_a_name_is_refused_with_how_to_write_it(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected package\.module:function, .* as in mine:batch_norm"):
        candidate(name, "batch", CPU, allow_code=True)


def test_user_code_needs_allow_code() -> None:
    with pytest.raises(UsageError, match="allow_code"):
        candidate("no.such.module:function", "batch", CPU, allow_code=False)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("no_such_module_here:norm", "No module named"),
        (f"{HERE}:no_such_function", "no_such_function"),
        (f"{HERE}:BUGS", "cannot be called"),
        (
            f"{__name__}:without_x",
            r"parameters are \(running_mean, running_var, weight, bias, training, momentum, eps\)\. Ex",
        ),
        (f"{HERE}:other_signature", r"input, running_mean.*x, weight, bias, eps, residual, activation"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_what_to_do(kernel: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidate(kernel, "batch", CPU, allow_code=True)
