"""Kernels by name: all have one signature, and one that cannot run is refused with the reason."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels import native
from bncli.names import GRADCHECK_KERNELS, KERNELS
from tests.test_architecture import modules_after

CPU = torch.device("cpu")
PARAMETERS = ["x", "weight", "bias", "eps", "residual", "activation", "statistics", "running"]


def numbers() -> Tensor:
    return torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2


def test_the_names_are_known_without_torch() -> None:
    assert "torch" not in modules_after("import bncli.kernels")


@pytest.mark.parametrize("name", [name for name in GRADCHECK_KERNELS if name != "compiled"])
def test_a_kernel_is_its_modules_function_and_has_the_parameters_of_all(name: str) -> None:
    kernel = kernels.load(name)
    assert kernel is importlib.import_module(KERNELS[name].module).batch_norm
    positional = [
        each for each in inspect.signature(kernel).parameters.values() if each.kind == each.POSITIONAL_OR_KEYWORD
    ]
    assert [each.name for each in positional] == PARAMETERS
    assert [each.default for each in positional[4:]] == [None] * 4


def test_the_native_kernel_runs_on_every_device() -> None:
    for device in (None, CPU, torch.device("cuda:7"), torch.device("mps")):
        assert kernels.get("native", device) is native.batch_norm


@pytest.mark.parametrize("name", ["nativ", "compiled", ""])  # profile alone knows the kernel compiled
@pytest.mark.parametrize("find", [kernels.get, kernels.load])
def test_an_unknown_name_is_answered_with_the_known_ones(find: Any, name: str) -> None:
    with pytest.raises(Unavailable) as refused:
        find(name)
    assert str(refused.value) == f"kernel {name}: expected one of native, fused, fused-interpreted"


def test_a_kernel_is_loaded_and_refused_where_it_cannot_run() -> None:
    with pytest.raises(Unavailable) as refused:
        kernels.get("fused", torch.device("mps"))
    assert str(refused.value) == (
        "the fused kernel cannot run: it needs a CPU or an NVIDIA GPU, and was asked to run on mps. "
        "No other kernel replaces it; the native kernel is torch's own operator and runs everywhere"
    )
    assert refused.value.exit_code == 3
    assert callable(kernels.load("fused"))


def test_availability_is_checked_for_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(native, "unavailable_reason", asked.append)
    kernels.get("native")
    kernels.get("native", CPU)
    assert asked == [None, CPU]


def test_a_function_that_updates_running_statistics_is_a_kernel_itself() -> None:
    assert kernels.adapted(native.batch_norm) is native.batch_norm


def test_running_statistics_are_updated_after_a_function_that_does_not() -> None:
    def function(x, weight, bias, eps, residual, activation):  # type: ignore[no-untyped-def]
        return native.batch_norm(x, weight, bias, eps, residual, activation)

    x, kernel = numbers(), kernels.adapted(function)
    ours, theirs = [(torch.zeros(3).double(), torch.ones(3).double(), 0.3) for _ in range(2)]
    found = kernel(x, None, None, 1e-5, x.flip(0), "relu", running=ours)
    expected = native.batch_norm(x, None, None, 1e-5, x.flip(0), "relu", running=theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=0)
    assert ours[0].all()


def test_statistics_are_passed_to_a_function_only_where_they_are_given() -> None:
    seen: list[tuple[Any, ...]] = []

    def function(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(rest)
        return x, torch.zeros(3), torch.ones(3)

    kernel, pair = kernels.adapted(function), (torch.zeros(3), torch.ones(3))
    kernel(numbers(), None, None, 1e-5)
    kernel(numbers(), None, None, 1e-5, statistics=pair)
    assert [len(rest) for rest in seen] == [5, 6]
    assert seen[1][5] is pair
