"""What can be put under test: a kernel by its name, a norm, and a function of the user's own."""

from __future__ import annotations

import pytest
import torch

from bncli.errors import UsageError
from bncli.measure.reference.candidate import candidate

CPU = torch.device("cpu")
HERE = "tests.measure.reference.wrong_kernels"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "norm", "message"),
    [
        ("native", "spectral", "norm spectral: expected one of batch, layer, group, instance"),
        ("quick", "batch", "kernel quick: there is no such kernel; expected native, fused, fused-interpreted"),
        ("fused", "layer", "norm layer: has the native kernel alone; fused is a batch norm"),
    ],
)
def test_a_name_that_is_none_is_refused(kernel: str, norm: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidate(kernel, norm, CPU, allow_code=False)


@pytest.mark.parametrize("name", ["./mine.py:batch_norm", "mine.py:batch_norm", "mine:"])
def test_a_file_or_half_a_name_is_refused_with_how_to_write_it(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected package\.module:function, .* as in mine:batch_norm"):
        candidate(name, "batch", CPU, allow_code=True)


def test_own_code_is_not_imported_without_leave() -> None:
    with pytest.raises(UsageError, match="allow_code"):
        candidate("no.such.module:function", "batch", CPU, allow_code=False)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("no_such_module_here:norm", "No module named"),
        (f"{HERE}:no_such_function", "no_such_function"),
        (f"{HERE}:BUGS", "cannot be called"),
        (f"{HERE}:other_signature", r"input, running_mean.*x, weight, bias, eps, residual, activation"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_what_to_do(kernel: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        candidate(kernel, "batch", CPU, allow_code=True)
