"""Cores that a measurement lacked: the kernel's count beside a real load, and the estimate from made-up counters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bncli.engine.load import CoreWait
from bncli.results.environment import disturbed

NOWHERE = Path("no-such-folder")
counted = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel counts no waiting")


def compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@counted
def test_a_thread_that_shares_its_core_with_another_program_lacks_part_of_it() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            time.sleep(0.2)
            wait = CoreWait(1)
            compute(0.5)
            lacked = wait.cores()
            other.kill()
    finally:
        os.sched_setaffinity(0, allowed)
    assert lacked is not None
    assert 0.2 < lacked < 1.0
    assert disturbed(lacked)


@counted
def test_a_thread_that_sleeps_lacks_nothing_on_busy_cores_either() -> None:
    wait = CoreWait(1)
    time.sleep(0.3)
    assert not disturbed(wait.cores())


def test_threads_that_begin_or_end_meanwhile_count_for_what_they_waited_then(tmp_path: Path) -> None:
    def write(thread: str, waited_s: float, slices: int = 7) -> None:
        (tmp_path / thread).mkdir(exist_ok=True)
        (tmp_path / thread / "schedstat").write_text(f"1000 {waited_s * 1e9:.0f} {slices}\n")

    write("1", 100.0)
    write("2", 50.0)
    began_s = time.perf_counter()
    wait = CoreWait(1, tmp_path)
    time.sleep(0.05)
    write("1", 100.0 + 3.0)
    (tmp_path / "2" / "schedstat").unlink()
    write("3", 2.0)
    lacked = wait.cores()
    assert lacked is not None
    assert 5.0 * 0.5 < lacked * (time.perf_counter() - began_s) < 5.0 * 2


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the system says of its cores: idle seconds so far."""

    def say(**times: float) -> None:
        monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(**times))

    return say


def test_without_the_kernels_count_it_is_what_neither_this_process_nor_nobody_had(
    counters: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("0 0 0\n")  # a kernel without the count
    for tasks in (NOWHERE, tmp_path):
        counters(idle=100.0, iowait=5.0)
        wait = CoreWait(2, tasks)
        compute(0.3)
        assert wait.cores() == pytest.approx(1.0, abs=0.95)  # it had one core at most, and none was idle
        assert disturbed(wait.cores())
        counters(idle=110.0, iowait=5.0)
        assert wait.cores() == 0.0  # more than two were idle


def test_an_estimate_of_a_short_time_or_of_a_sandbox_without_counters_is_unknown(counters: Callable[..., None]) -> None:
    counters(idle=100.0)
    assert CoreWait(2, NOWHERE).cores() is None
    counters(idle=0.0)
    wait = CoreWait(2, NOWHERE)
    time.sleep(0.25)
    assert wait.cores() is None
    assert not disturbed(None)
