"""Bytes saved for backward, and peaks of fresh processes, against what the definition says must be there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.reference import case as cases
from bncli.measure.timing import fresh_processes, memory
from bncli.measure.timing.fresh_processes import FreshProcesses
from bncli.measure.timing.memory import saved_bytes
from bncli.results.profile import Case

linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is read from /proc")
FOUR_MIB = Case((16, 64, 32, 32), "bn", "fp32")


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
    assert saved_bytes(lambda: KeepsTwice.apply(x)) == 2 * 400


def test_nothing_is_saved_where_nothing_is_differentiated() -> None:
    assert saved_bytes(lambda: torch.ones(10).square()) == 0


def test_batch_norm_saves_its_input_and_relu_its_output() -> None:
    for operation, tensors in (("bn", 1), ("bn+relu", 2), ("bn+add+relu", 2)):
        case = Case((8, 16, 8, 8), operation, "fp32")
        inputs = cases.make(case, torch.device("cpu"))
        inputs.leaves()
        saved = saved_bytes(lambda case=case, inputs=inputs: cases.apply(case, "native")(inputs))  # type: ignore[misc]
        vectors = saved - tensors * case.tensor_bytes
        assert 0 < vectors <= 8 * 16 * 4  # weight, running statistics, the batch's mean and deviation


@pytest.fixture(scope="module")
def peaks() -> Iterator[FreshProcesses]:
    with FreshProcesses() as found:
        yield found


@linux
def test_the_peak_of_batch_norm_is_its_output_and_the_gradient_of_its_input(peaks: FreshProcesses) -> None:
    small, large = (peaks.peak_mib(case, "native") for case in (Case((2, 3), "bn", "fp32"), FOUR_MIB))
    relu = peaks.peak_mib(Case(FOUR_MIB.shape, "bn+relu", "fp32"), "native")
    assert peaks.failure is None
    assert small is not None
    assert small < 1.0
    assert large == pytest.approx(2 * 4.0, abs=1.0)
    assert relu == pytest.approx(3 * 4.0, abs=1.0)


@linux
def test_a_case_takes_no_part_of_its_peak_from_the_one_before(peaks: FreshProcesses) -> None:
    found = [peaks.peak_mib(case, "native") for case in (FOUR_MIB, Case((16, 64, 64, 64), "bn", "fp32"), FOUR_MIB)]
    assert found[0] == pytest.approx(found[2], abs=0.75)


OWN = """
import os, signal, time
from torch.nn import functional as F
def crashes(input, running_mean, running_var, weight, bias, training, momentum, eps):
    os.kill(os.getpid(), signal.SIGSEGV)
def leaves(input, running_mean, running_var, weight, bias, training, momentum, eps):
    os._exit(7)
def hangs(input, running_mean, running_var, weight, bias, training, momentum, eps):
    time.sleep(600)
def raises(input, running_mean, running_var, weight, bias, training, momentum, eps):
    raise ValueError("mine")
def speaks(input, running_mean, running_var, weight, bias, training, momentum, eps):
    print("hello")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
"""


@linux
def test_a_child_that_crashes_hangs_or_raises_costs_its_own_figure_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_norms.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with FreshProcesses(allow_code=True, hang_s=1.0) as peaks:
        for function, failure in (
            ("crashes", "its process ended with SIGSEGV"),
            ("leaves", "its process ended with exit code 7"),
            ("hangs", "it took longer than 1 s"),
            ("raises", "ValueError: mine"),
        ):
            assert peaks.peak_mib(FOUR_MIB, f"own_norms:{function}") is None
            assert peaks.failure == failure
        assert peaks.peak_mib(FOUR_MIB, "own_norms:speaks") == pytest.approx(8.0, abs=1.0)
        assert peaks.failure is None


@linux
def test_code_of_the_users_own_is_not_run_unasked(peaks: FreshProcesses) -> None:
    assert peaks.peak_mib(FOUR_MIB, "bncli.kernels.native:batch_norm") is None
    assert peaks.failure is not None
    assert "--allow-code" in peaks.failure


def processes_of(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@linux
def test_no_process_is_left_after_the_context_nor_after_a_server_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_norms.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with FreshProcesses() as peaks:
        assert peaks.peak_mib(FOUR_MIB, "native") is not None
        assert peaks._server is not None
        group = peaks._server.pid
        os.kill(group, signal.SIGKILL)
        assert peaks.peak_mib(FOUR_MIB, "native") is None
        assert peaks.failure is not None
        assert "the process that measures memory ended" in peaks.failure
        assert peaks.peak_mib(FOUR_MIB, "native") is None  # and it is not tried again
    assert wait_for_none(group)
    peaks = FreshProcesses(allow_code=True, hang_s=30.0)
    peaks.start()
    assert peaks._server is not None
    group = peaks._server.pid
    peaks._reply(peaks._server, 60.0)
    assert peaks._server.stdin is not None
    peaks._server.stdin.write(
        b'{"case": {"shape": [2, 3], "dtype": "fp32"}, "kernel": "own_norms:hangs", "hang_s": 30.0}\n'
    )
    peaks._server.stdin.flush()
    peaks.close()  # while a child hangs
    assert wait_for_none(group)


def wait_for_none(group: int) -> bool:
    end_s = time.monotonic() + 5.0
    while processes_of(group) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not processes_of(group)


def test_a_failure_to_start_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_processes, "SERVER", "raise SystemExit(3)")
    with FreshProcesses() as peaks:
        assert peaks.peak_mib(FOUR_MIB, "native") is None
        assert peaks.failure


@pytest.mark.cuda
def test_on_a_gpu_the_peak_is_the_allocators() -> None:
    from bncli.measure.profile.candidates import Candidate

    device = torch.device("cuda")
    case = Case((64, 64, 56, 56), "bn", "fp32")
    arm, inputs = Candidate(cases.apply(case, "native")), cases.make(case, device)
    peak = memory.cuda_peak_mib(arm.step(inputs), device)
    assert peak == pytest.approx(2 * case.tensor_bytes / 2**20, rel=0.1)
