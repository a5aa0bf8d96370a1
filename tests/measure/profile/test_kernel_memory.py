"""Peaks of kernels in fresh processes, against what the definition says must be there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bncli.measure.profile.kernel_memory import KernelPeaks
from bncli.results.profile import Case

linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is read from /proc")
FOUR_MIB = Case((16, 64, 32, 32), "bn", "fp32")


@pytest.fixture(scope="module")
def peaks() -> Iterator[KernelPeaks]:
    with KernelPeaks() as found:
        yield found


@linux
def test_the_peak_of_batch_norm_is_its_output_and_the_gradient_of_its_input(peaks: KernelPeaks) -> None:
    small, large = (peaks.peak_mib(case, "native") for case in (Case((2, 3), "bn", "fp32"), FOUR_MIB))
    relu = peaks.peak_mib(Case(FOUR_MIB.shape, "bn+relu", "fp32"), "native")
    assert peaks.failure is None
    assert small is not None
    assert small < 1.0
    assert large == pytest.approx(2 * 4.0, abs=1.0)
    assert relu == pytest.approx(3 * 4.0, abs=1.0)


@linux
def test_a_case_takes_no_part_of_its_peak_from_the_one_before(peaks: KernelPeaks) -> None:
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
    with KernelPeaks(allow_code=True, limit_s=1.0) as peaks:
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
def test_code_of_the_users_own_is_not_run_unasked(peaks: KernelPeaks) -> None:
    assert peaks.peak_mib(FOUR_MIB, "bncli.kernels.native:batch_norm") is None
    assert peaks.failure is not None
    assert "code of yours that would run" in peaks.failure


@linux
def test_once_its_server_was_killed_there_is_a_reason_and_no_second_try() -> None:
    with KernelPeaks() as peaks:
        assert peaks.peak_mib(FOUR_MIB, "native") is not None
        assert peaks.server_pid is not None
        os.kill(peaks.server_pid, signal.SIGKILL)
        assert peaks.peak_mib(FOUR_MIB, "native") is None
        assert peaks.failure is not None
        assert "the process that measures memory ended" in peaks.failure
        assert peaks.peak_mib(FOUR_MIB, "native") is None
        assert peaks.server_pid is None
