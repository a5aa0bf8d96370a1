"""Peaks of kernels and of training steps in fresh processes, against what the definition says must be there."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bncli.measure.profile.memory import (
    kernel_peak_here,
    kernel_peak_mib,
    kernel_processes,
    prepare_for_kernels,
    prepare_for_steps,
    step_memory,
    step_memory_here,
)
from bncli.measure.profile.step_models import RecipeModel
from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses
from bncli.results.profile import Case
from tests.conftest import tiny

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is read from /proc")
FOUR_MIB = Case((16, 64, 32, 32), "bn", "fp32")


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with contextlib.closing(kernel_processes()) as found:
        yield found


def peak_mib(processes: FreshProcesses, case: Case, kernel: str = "native", allow_code: bool = False) -> float:
    return kernel_peak_mib(processes, case, kernel, allow_code)


@linux
def test_the_peak_of_batch_norm_is_its_output_and_the_gradient_of_its_input(processes: FreshProcesses) -> None:
    relu = Case(FOUR_MIB.shape, "bn+relu", "fp32")
    small, large, with_relu = (peak_mib(processes, case) for case in (Case((2, 3), "bn", "fp32"), FOUR_MIB, relu))
    assert small < 1.0
    assert large == pytest.approx(2 * 4.0, abs=1.0)
    assert with_relu == pytest.approx(3 * 4.0, abs=1.0)


@linux
def test_a_case_takes_no_part_of_its_peak_from_the_one_before(processes: FreshProcesses) -> None:
    found = [peak_mib(processes, case) for case in (FOUR_MIB, Case((16, 64, 64, 64), "bn", "fp32"), FOUR_MIB)]
    assert found[0] == pytest.approx(found[2], abs=0.75)


@linux
def test_the_peak_in_this_process_is_measured_in_the_same_way() -> None:
    prepare_for_kernels()
    assert kernel_peak_here(FOUR_MIB, "native", allow_code=False) is not None


USERS = """
import os, signal
from torch.nn import functional as F
def crashes(input, running_mean, running_var, weight, bias, training, momentum, eps):
    os.kill(os.getpid(), signal.SIGSEGV)
def raises(input, running_mean, running_var, weight, bias, training, momentum, eps):
    raise ValueError("mine")
def speaks(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
"""


@linux
def test_a_users_kernel_that_crashes_or_raises_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_norms.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.closing(kernel_processes()) as processes:  # which has that path
        for function, failure in (("crashes", "its process ended with SIGSEGV"), ("raises", "ValueError: mine")):
            with pytest.raises(CallFailed) as failed:
                peak_mib(processes, FOUR_MIB, f"users_norms:{function}", allow_code=True)
            assert str(failed.value) == failure
        assert peak_mib(processes, FOUR_MIB, "users_norms:speaks", allow_code=True) == pytest.approx(8.0, abs=1.0)


@linux
def test_a_users_kernel_needs_allow_code(processes: FreshProcesses) -> None:
    with pytest.raises(CallFailed, match="your own code, which would be executed"):
        peak_mib(processes, FOUR_MIB, "bncli.kernels.native:batch_norm")


# --- a training step --------------------------------------------------------------------------------------------------


def test_the_parts_of_a_steps_memory_are_those_of_the_definition() -> None:
    model = RecipeModel("tiny", tiny(optimizer={"kind": "adam", "lr": 0.1}))
    batch = model.trainable("native", model.dataset(CPU), CPU).batch()
    found = step_memory_here(model, "native", *batch, 3, torch.get_num_threads())
    values = 8 * 16 + 2 * 16 + 16 * 3 + 3  # linear without bias, norm, output
    activations = 20 * (8 + 16 + 16 + 3)  # x, before the norm, after the relu, log softmax
    saved = 4 * 16  # the batch's statistics and the running ones
    tensors = 5  # each with a step counter of its own
    assert found.parameters_mib == found.gradients_mib == values * 4 / 2**20
    assert found.optimizer_mib == (2 * values + tensors) * 4 / 2**20
    assert found.activations_mib == ((activations + saved + 1) * 4 + 20 * 8) / 2**20  # and y, and a count


def test_the_peak_of_a_step_in_a_fresh_process_holds_the_parts() -> None:
    recipe = tiny(model={"kind": "mlp", "hidden": [1500, 1500]}, optimizer={"kind": "adam", "lr": 0.1})
    model = RecipeModel("tiny", recipe)
    dataset = model.dataset(CPU)
    batch = model.trainable("native", dataset, CPU).batch()
    with contextlib.closing(FreshProcesses(prepare_for_steps)) as processes:
        found = step_memory(processes, model, "native", batch, dataset.classes)
    parts = found.parameters_mib + found.gradients_mib + found.optimizer_mib + found.activations_mib
    assert found.parameters_mib > 8
    assert found.peak_mib is not None
    assert parts * 0.9 < found.peak_mib < 5 * parts + 100


class Copying:
    """Calls in this process, with arguments pickled as for a fresh one."""

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        return function(*pickle.loads(pickle.dumps(arguments)))


trained: list[Tensor] = []


class Recording:
    """A model whose steps only record their examples."""

    def trainable(self, *arguments: Any) -> SimpleNamespace:
        def step(x: Tensor, y: Tensor) -> None:
            trained.append(x)

        model = torch.nn.Linear(2, 2)
        return SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters()), step=step)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_measured_in_the_memory_format_of_training(memory_format: torch.memory_format) -> None:
    trained.clear()
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=memory_format)
    step_memory(cast(Any, Copying()), cast(Any, Recording()), "native", (x, torch.zeros(4)), 3)
    assert len(trained) == 2
    assert torch.equal(trained[0], x)
    assert trained[0].stride() == trained[1].stride() == x.stride()
