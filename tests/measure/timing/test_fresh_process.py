"""Calls in fresh processes: what they return, how they fail, and that nothing of them is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from bncli.errors import Unavailable
from bncli.measure.timing import fresh_process
from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses, ServerGone

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")

prepared: list[int] = []


def prepare() -> None:
    prepared.append(os.getpid())


def add(one: int, other: int) -> int:
    print("no answer")
    return one + other


def pids() -> tuple[int, list[int]]:
    return os.getpid(), prepared


def modules() -> list[str]:
    return sorted(sys.modules)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def give_up() -> None:
    os._exit(3)


def leave_without_an_answer() -> None:
    os._exit(0)


def hang() -> None:
    time.sleep(600)


def raise_it() -> None:
    raise Unavailable("not today")


def return_what_cannot_be_sent() -> threading.Lock:
    return threading.Lock()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with FreshProcesses(prepare) as found:
        yield found


def test_a_call_returns_what_the_function_returns_whatever_it_prints(processes: FreshProcesses) -> None:
    assert processes.call(add, 2, 3, limit_s=60.0) == 5


def test_each_call_has_a_process_of_its_own_forked_from_the_prepared_one(processes: FreshProcesses) -> None:
    (one, before), (other, again) = (processes.call(pids, limit_s=60.0) for _ in range(2))
    assert one != other
    assert before == again == [processes.server_pid]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (kill_itself, "its process ended with SIGSEGV"),
        (give_up, "its process ended with exit code 3"),
        (leave_without_an_answer, "its process ended with exit code 0"),
        (hang, "it took longer than 0.5 s"),
        (raise_it, "Unavailable: not today"),
        (return_what_cannot_be_sent, "its process ended with exit code 1"),
    ],
)
def test_a_call_that_does_not_come_through_says_why_and_the_next_one_does(
    processes: FreshProcesses, function: Callable[[], None], says: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        processes.call(function, limit_s=0.5 if function is hang else 60.0)
    assert str(failed.value) == says
    assert processes.call(add, 1, 1, limit_s=60.0) == 2


def test_a_module_in_the_current_folder_is_not_taken_for_another_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiprocessing", "pickle", "torch", "bncli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(tmp_path)
    with FreshProcesses(prepare) as processes:
        assert "multiprocessing.connection" in processes.call(modules, limit_s=60.0)


def processes_of(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_for_none(group: int) -> bool:
    end_s = time.monotonic() + 5.0
    while processes_of(group) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not processes_of(group)


def test_no_process_is_left_after_the_context_nor_after_a_server_that_was_killed() -> None:
    with FreshProcesses(prepare) as processes:
        assert processes.call(add, 2, 3, limit_s=60.0) == 5
        group = processes.server_pid
        assert group is not None
        assert processes_of(group) == [group]
        os.kill(group, signal.SIGKILL)
        for _ in range(2):  # it is not started again
            with pytest.raises(ServerGone, match="the process that measures memory ended"):
                processes.call(add, 2, 3, limit_s=60.0)
    assert wait_for_none(group)


def test_a_child_that_hangs_ends_with_the_server() -> None:
    processes = FreshProcesses(prepare)
    processes.start()
    group = processes.server_pid
    assert group is not None
    failed: list[BaseException] = []

    def call() -> None:
        try:
            processes.call(hang, limit_s=600.0)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    end_s = time.monotonic() + 60.0
    while len(processes_of(group)) < 2 and time.monotonic() < end_s:
        time.sleep(0.02)
    assert len(processes_of(group)) == 2
    processes.close()
    thread.join(60.0)
    assert wait_for_none(group)
    assert failed


def test_the_server_ends_when_the_program_that_started_it_was_killed() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    program = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=(theirs,))
    program.start()
    assert ours.poll(60.0)
    group = ours.recv()
    assert processes_of(group) == [group]
    program.kill()
    program.join()
    assert wait_for_none(group)


def start_and_wait(connection: Connection) -> None:
    processes = FreshProcesses(prepare)
    processes.call(add, 2, 3, limit_s=60.0)
    connection.send(processes.server_pid)
    time.sleep(600)


def test_a_server_that_cannot_start_is_a_failed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "SERVER", "raise SystemExit(3)")
    with FreshProcesses(prepare) as processes, pytest.raises(ServerGone):
        processes.call(add, 2, 3, limit_s=60.0)
